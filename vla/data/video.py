"""Video of a data set: one short clip per episode, joined without re-encoding, decoded frame by frame. PyAV only.

Frames are uint8[N, H, W, 3] RGB. Clips have a constant frame rate, start at a key frame and hold no B-frames, so that
joining is copying packets with shifted time stamps: an episode looks the same alone and inside a data set.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vla.errors import ConfigError, DataError, explain, nearest
from vla.files import replacing


@dataclass(frozen=True)
class VideoCodec:
    """How frames are encoded.

    encoder: FFmpeg encoder name. pix_fmt: what it is given; stored_pix_fmt: what lies in the file.
    gop: frames from one key frame to the next, the most that a random access decodes. crf: quality, lower is better.
    """

    name: str
    encoder: str
    pix_fmt: str
    stored_pix_fmt: str
    crf: int
    gop: int
    options: tuple[tuple[str, str], ...] = ()

    def encoder_options(self) -> dict[str, str]:
        return {"crf": str(self.crf), "g": str(self.gop), **dict(self.options)}


_FAST = (("preset", "ultrafast"), ("bf", "0"))
# h264 stores RGB itself: nearly exact (53 dB on the tabletop; conversion to YUV alone costs more than that and shifts
# colours by a level), and fast both ways. h264_420 plays everywhere, av1 is what the `lerobot` package writes by
# default; both halve the resolution of colour, which small objects suffer from.
CODECS = {
    "h264": VideoCodec("h264", "libx264rgb", "rgb24", "gbrp", 16, 10, _FAST),
    "h264_420": VideoCodec("h264", "libx264", "yuv420p", "yuv420p", 18, 10, _FAST),
    "av1": VideoCodec("av1", "libsvtav1", "yuv420p", "yuv420p", 30, 2),
}


def codec(name: str) -> VideoCodec:
    """The named entry of CODECS, if this FFmpeg build can encode it; ConfigError otherwise."""
    if name not in CODECS:
        raise ConfigError(f"codec: {name!r} is unknown. {nearest(name, CODECS)}")
    chosen = CODECS[name]
    if chosen.encoder not in av.codecs_available:
        raise ConfigError(
            explain(f"codec {name!r}", f"an FFmpeg with {chosen.encoder}", "none in PyAV", "Choose another codec.")
        )
    return chosen


@contextlib.contextmanager
def _scheduling_kept() -> Iterator[None]:
    """Neither the caller nor threads begun inside rise above the caller's real-time priority. SVT-AV1 gives both the
    highest there is when root opens it, and what controls an arm would wait for a film, and for all the rest of the
    process."""
    tasks = Path("/proc/self/task")
    if not (hasattr(os, "sched_setscheduler") and tasks.is_dir()):
        yield
        return
    policy, parameters, known = os.sched_getscheduler(0), os.sched_getparam(0), set(tasks.iterdir())
    try:
        yield
    finally:
        for thread in (0, *(int(task.name) for task in set(tasks.iterdir()) - known)):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                if os.sched_getparam(thread).sched_priority > parameters.sched_priority:
                    os.sched_setscheduler(thread, policy, parameters)


def encode(path: Path, frames: Iterable[np.ndarray], fps: int, chosen: VideoCodec) -> int:
    """Write frames (uint8[H, W, 3] each) as an mp4 clip, atomically; returns how many.

    One encoder thread, so that equal frames give equal bytes.
    """
    count = 0
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream: Any = None
        for image in frames:
            if stream is None:
                stream = container.add_stream(chosen.encoder, rate=fps, options=chosen.encoder_options())
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = chosen.pix_fmt
                stream.thread_count = 1
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            with contextlib.nullcontext() if count else _scheduling_kept():  # the first frame opens the encoder
                container.mux(stream.encode(frame))
            count += 1
        if stream is None:
            raise DataError(explain(str(path), "at least one frame", "none", "Record before writing a clip."))
        container.mux(stream.encode())
    return count


def concatenate(path: Path, clips: Sequence[tuple[Path, int]], fps: int) -> None:
    """Join clips [(file, frames)] into one mp4 by copying packets, atomically. All clips share codec and size."""
    offset = 0
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as output:
        target: Any = None
        for clip, frames in clips:
            with _open(clip) as source:
                stream = source.streams.video[0]
                if target is None:
                    target = output.add_stream_from_template(stream, opaque=True)  # copy, no encoder needed
                    target.time_base = Fraction(1, fps)
                for packet in source.demux(stream):
                    if packet.pts is None or packet.dts is None or packet.time_base is None:
                        continue  # the flushing packet at the end
                    pts = round(packet.pts * packet.time_base * fps) + offset
                    dts = round(packet.dts * packet.time_base * fps) + offset
                    packet.time_base = Fraction(1, fps)
                    packet.pts, packet.dts, packet.duration = pts, dts, 1
                    packet.stream = target
                    output.mux(packet)
            offset += frames


def decode(path: Path, start: int = 0, stop: int | None = None, fps: float = 0.0) -> Iterator[np.ndarray]:
    """Yield frames start..stop-1 as uint8[H, W, 3]. `fps` is needed to begin anywhere but at 0.

    A file that cannot be decoded, or that ends before `stop`, raises DataError.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1  # several loader processes share the machine
        index = 0
        if start > 0:
            if not fps > 0:
                raise ValueError("decode: fps is needed to seek")
            container.seek(round((start - 0.5) / fps / float(stream.time_base)), stream=stream, backward=True)
            index = -1
        try:
            for frame in container.decode(stream):
                if index < 0:
                    index = round(float(frame.time) * fps)
                if stop is not None and index >= stop:
                    break
                if index >= start:
                    yield frame.to_ndarray(format="rgb24")
                index += 1
        except av.FFmpegError as error:
            raise _unreadable(path, f"{type(error).__name__} after frame {index}") from error
    if stop is not None and index < stop:
        raise _unreadable(path, f"{max(index, 0)} frames, {stop} expected")


def _open(path: Path) -> Any:
    try:
        container = av.open(str(path))
    except FileNotFoundError as error:
        raise DataError(
            explain(str(path), "a video file", "no such file", "Copy the data set again, or collect it again.")
        ) from error
    except av.FFmpegError as error:
        raise _unreadable(path, type(error).__name__) from error
    if not container.streams.video:
        container.close()
        raise _unreadable(path, "a file without a video stream")
    return container


def _unreadable(path: Path, got: str) -> DataError:
    return DataError(
        explain(
            str(path), "a complete video", got, "The file is truncated: copy the data set again, or collect it again."
        )
    )
