"""Camera pictures of a run as they came over the topics, for the film and the trace."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image as Picture

from vla.cli.film import FrameSpool, Shot, hold

OUTCOME_STANDS_S = 0.75


@dataclass
class Recorded:
    """frames: per camera, (stamp_ns, index in the spool), in order of arrival. start_ns, end_ns: of the motion."""

    number: int
    frames: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    instruction: str = ""
    success: bool | None = None
    start_ns: int = 0
    end_ns: int | None = None


class Recorder:
    """Frames go to one scratch file per camera: a long run must not fill the memory it is measuring.

    `on_image` is called by the thread that receives, the rest by the one that runs the episodes.
    """

    def __init__(self, cameras: Sequence[str], scratch: Path):
        self._spools = {name: FrameSpool(scratch / f".{name}.frames") for name in cameras}
        self._lock = threading.Lock()
        self._open: Recorded | None = None
        self.episodes: list[Recorded] = []
        self.refused = 0

    def begin(self, number: int) -> None:
        with self._lock:
            self._open = Recorded(number)
            self.episodes.append(self._open)

    def on_image(self, camera: str, stamp_ns: int, rgb: np.ndarray) -> None:
        """rgb: uint8[H, W, 3]. Frames outside episodes, and of another size than the first, are left out."""
        with self._lock:
            if self._open is None:
                return
            try:
                index = self._spools[camera].append(rgb)
            except ValueError:
                self.refused += 1
                return
            self._open.frames.setdefault(camera, []).append((stamp_ns, index))

    def end(self, instruction: str, success: bool | None, start_ns: int, end_ns: int | None) -> None:
        """success: None when the episode was broken off."""
        with self._lock:
            if self._open is not None:
                self._open.instruction, self._open.success = instruction, success
                self._open.start_ns, self._open.end_ns = start_ns, end_ns
            self._open = None

    # ---- after the run ----
    @property
    def frames(self) -> int:
        """Pictures of the first camera."""
        return len(next(iter(self._spools.values()))) if self._spools else 0

    def shots(self, total: int, fps: int) -> Iterator[Shot]:
        """The film: for every picture of the first camera, the others' newest at that time."""
        for episode in self.episodes:
            shot = None
            headline = f"episode {episode.number + 1} of {total}"
            for stamp_ns, views in self._sets(episode):
                over = episode.end_ns is not None and stamp_ns >= episode.end_ns
                shot = Shot(views, episode.instruction, headline, episode.success if over else None)
                yield shot
            if shot is not None and episode.success is not None:
                final = Shot(shot.views, shot.instruction, shot.headline, episode.success)
                yield from hold(final, round(OUTCOME_STANDS_S * fps))

    def _sets(self, episode: Recorded) -> Iterator[tuple[int, list[np.ndarray]]]:
        names = list(self._spools)
        if any(name not in episode.frames for name in names):
            return
        stamps = {name: np.array([stamp for stamp, _ in episode.frames[name]]) for name in names}
        for stamp_ns, index in episode.frames[names[0]]:
            if stamp_ns < episode.start_ns:  # still on the way when the scene was reset
                continue
            views = [self._spools[names[0]][index]]
            for name in names[1:]:
                newest = max(0, int(np.searchsorted(stamps[name], stamp_ns, side="right")) - 1)
                views.append(self._spools[name][episode.frames[name][newest][1]])
            yield stamp_ns, views

    def pictures(self, every: int = 2, quality: int = 85) -> Iterator[tuple[str, int, bytes]]:
        """(camera, stamp_ns, JPEG) of every `every`-th frame, for the trace."""
        for episode in self.episodes:
            for camera, frames in episode.frames.items():
                for stamp_ns, index in frames[::every]:
                    buffer = io.BytesIO()
                    Picture.fromarray(self._spools[camera][index]).save(buffer, "JPEG", quality=quality)
                    yield camera, stamp_ns, buffer.getvalue()

    def close(self) -> None:
        """Remove the scratch files."""
        for spool in self._spools.values():
            spool.close()
