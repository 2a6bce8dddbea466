"""Pictures of a V4L2 device or of a video file, through PyAV (FFmpeg), loaded when the first source is opened.

A source is opened, read and closed by one thread at a time. What it raises is DataError: the device is away, the file
is damaged, the pictures are of another size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vla.data.transforms import resize
from vla.errors import DataError, explain
from vla.types import NS_PER_S

OPEN_S = 2.5  # how long a device may take until it shows its first picture
SILENT_S = 2.0  # a device without a picture for so long is given up; both are less than a shell waits for a job
_POLL_S = 0.001
_OLD_NS = 100_000_000  # pictures that waited longer in the driver are passed over
_PLAUSIBLE_NS = NS_PER_S  # a driver's stamp further from now than this is of another clock
_REMEDIES = {
    FileNotFoundError: "Plug the camera in, or name another source.",
    PermissionError: "Let this user read it: usermod -aG video USER, then log in again.",
}


class Frame(NamedTuple):
    """pixels: uint8[H, W, 3], RGB. at_ns: steady time at which a device took it; of a file, since its first picture."""

    pixels: np.ndarray
    at_ns: int


class Source(Protocol):
    """name: for messages. live: it gives pictures when they are taken; else when they are asked for."""

    name: str
    live: bool

    def open(self) -> None:
        """Nothing where it is open already."""
        ...

    def read(self) -> Frame | None:
        """The next picture, waited for; None at the end."""
        ...

    def close(self) -> None: ...


class _Video:
    """What both have: a container with one video stream, and the size that is wanted, (height, width) or None."""

    live = False

    def __init__(self, name: str, size: tuple[int, int] | None, scaled: bool):
        self.name, self._size, self._scaled = name, size, scaled
        self._container: Any = None

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def _open(self, **how: Any) -> Any:
        """The stream of a container that is now open."""
        import av

        try:
            self._container = av.open(self.name, **how)
        except (av.FFmpegError, OSError) as error:
            raise self._failed("a camera or a video", error) from error
        try:
            if not self._container.streams.video:
                raise DataError(explain(self.name, "a video stream", "none", "Name another source."))
            stream = self._container.streams.video[0]
            self._check(stream.codec_context.height, stream.codec_context.width)
        except DataError:
            self.close()
            raise
        return stream

    def _failed(self, expected: str, error: Exception) -> DataError:
        remedy = next((text for kind, text in _REMEDIES.items() if isinstance(error, kind)), "Name another source.")
        return DataError(explain(self.name, expected, getattr(error, "strerror", "") or str(error), remedy))

    def _check(self, height: int, width: int) -> None:
        if self._size is not None and not self._scaled and (height, width) != self._size:
            expected = f"{self._size[0]}x{self._size[1]}"
            raise DataError(
                explain(f"pictures of {self.name}", expected, f"{height}x{width}", "Say `resize` to scale them.")
            )

    def _pixels(self, frame: Any) -> np.ndarray:
        pixels: np.ndarray = frame.to_ndarray(format="rgb24")
        self._check(*pixels.shape[:2])
        return pixels if self._size is None else resize(pixels, *self._size)


class Device(_Video):
    """A V4L2 device. size: asked of the driver, which may give another. rate_hz, pixel_format (of FFmpeg's
    input_format, such as mjpeg): likewise; 0 and "" leave them to it. driver: FFmpeg's name of the kind of device.

    A picture's time is the driver's stamp where that is of the steady clock, as UVC cameras have it, else its arrival.
    """

    live = True

    def __init__(
        self,
        path: str,
        size: tuple[int, int] | None = None,
        rate_hz: float = 0.0,
        pixel_format: str = "",
        scaled: bool = False,
        driver: str = "v4l2",
    ):
        super().__init__(path, size, scaled)
        self._driver = driver
        # AVFMT_FLAG_NONBLOCK, which has no name here. Without it a camera that hangs holds a read in the kernel.
        self._options = {"fflags": "+4"}
        if size is not None:
            self._options["video_size"] = f"{size[1]}x{size[0]}"
        if rate_hz:
            self._options["framerate"] = f"{rate_hz:g}"
        if pixel_format:
            self._options["input_format"] = pixel_format

    def open(self) -> None:
        if self._container is None:
            self._stream = self._open(format=self._driver, options=self._options, timeout=(OPEN_S, None))
            self._stream.codec_context.thread_count = 1  # threads of a codec hold pictures back

    def read(self) -> Frame | None:
        import av

        deadline = time.monotonic() + SILENT_S
        try:
            while time.monotonic() < deadline:
                try:
                    frame = next(self._container.decode(self._stream), None)
                except BlockingIOError:
                    time.sleep(_POLL_S)
                    continue
                except av.InvalidDataError:  # a camera's first JPEG is often cut short
                    continue
                if frame is None:
                    raise DataError(explain(self.name, "pictures", "their end", "Plug it in again."))
                now_ns = time.monotonic_ns()
                taken_ns = round(frame.time * NS_PER_S) if frame.time is not None else now_ns
                age_ns = now_ns - taken_ns if 0 <= now_ns - taken_ns < _PLAUSIBLE_NS else 0
                if age_ns <= _OLD_NS:
                    return Frame(self._pixels(frame), now_ns - age_ns)
        except av.FFmpegError as error:
            raise self._failed("pictures", error) from error
        raise DataError(explain(self.name, "pictures", f"none for {SILENT_S:g} s", "Plug it in again."))


class File(_Video):
    """A video file. rate_hz: of playing, 0 for its own times. loop: it begins anew at its end, one period later."""

    def __init__(
        self,
        path: str,
        size: tuple[int, int] | None = None,
        rate_hz: float = 0.0,
        loop: bool = False,
        scaled: bool = False,
    ):
        super().__init__(path, size, scaled)
        self._rate_hz, self._loop = rate_hz, loop

    def open(self) -> None:
        if self._container is None:
            if not Path(self.name).is_file():
                raise DataError(explain(self.name, "a video file", "no such file", "Check the path."))
            self._stream = self._open()
            own = self._stream.average_rate or self._stream.guessed_rate
            self._period_ns = round(NS_PER_S / (self._rate_hz or float(own or 0) or 30.0))
            self._frames = self._decoded()

    def read(self) -> Frame | None:
        import av

        try:
            return next(self._frames, None)
        except av.FFmpegError as error:
            raise self._failed("a whole video", error) from error

    def _decoded(self) -> Iterator[Frame]:
        next_ns = 0
        while True:
            begin_ns, first_s = next_ns, None
            for frame in self._container.decode(self._stream):
                at_ns = next_ns
                if not self._rate_hz and frame.time is not None:
                    first_s = frame.time if first_s is None else first_s
                    at_ns = begin_ns + round((frame.time - first_s) * NS_PER_S)
                next_ns = at_ns + self._period_ns
                yield Frame(self._pixels(frame), at_ns)
            if not self._loop or next_ns == begin_ns:
                return
            self._container.seek(0)
