"""A node that only looks: keeps camera pictures and episode states of a run for the film and the trace."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Picture

from ros_nodes.messages import Image, Message, Text
from ros_nodes.node import SENSOR, SIM_STATUS, Effects, Endpoint, Now
from vla.cli.film import FrameSpool, Shot, hold
from vla.embodiment import Embodiment
from vla.errors import TransportError

NEVER_NS = 1 << 62
OUTCOME_STANDS_S = 0.75


@dataclass
class Recorded:
    """frames: per camera, (stamp_ns, index in the spool), in order of arrival."""

    episode: int
    instruction: str
    frames: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    success: bool | None = None
    end_ns: int | None = None


class RecorderCore:
    """Frames go to a scratch file per camera below `scratch`, only while an episode runs."""

    name = "vla_recorder"

    def __init__(self, embodiment: Embodiment, scratch: Path):
        self._cameras = {camera.topic: camera.name for camera in embodiment.cameras}
        self._spools = {name: FrameSpool(scratch / f"{name}.raw") for name in self._cameras.values()}
        self.subscriptions = (*(Endpoint(topic, Image.type_name, SENSOR) for topic in self._cameras), SIM_STATUS)
        self.publications: tuple[Endpoint, ...] = ()
        self.next_tick_ns = NEVER_NS
        self.episodes: list[Recorded] = []
        self.refused = 0

    def on_message(self, topic: str, message: Message, now: Now) -> Effects:
        if isinstance(message, Image) and topic in self._cameras:
            self._on_image(self._cameras[topic], message)
        elif topic == SIM_STATUS.topic and isinstance(message, Text):
            try:
                self._on_status(message.object())
            except (TransportError, KeyError):
                self.refused += 1
        return ()

    def _on_status(self, status: dict[str, Any]) -> None:
        number, state = int(status["episode"]), status["state"]
        if state == "running" and (not self.episodes or self.episodes[-1].episode != number):
            self.episodes.append(Recorded(number, str(status.get("instruction", ""))))
        elif state == "done" and self.episodes and self.episodes[-1].episode == number:
            self.episodes[-1].success = bool(status["success"])
            self.episodes[-1].end_ns = int(status["stamp_ns"])

    def _on_image(self, camera: str, message: Image) -> None:
        if not self.episodes or self.episodes[-1].end_ns is not None:
            return
        try:
            index = self._spools[camera].append(message.rgb())
        except ValueError:
            self.refused += 1
            return
        self.episodes[-1].frames.setdefault(camera, []).append((message.stamp_ns, index))

    def on_reject(self, topic: str, reason: str, now: Now) -> Effects:
        self.refused += 1
        return ()

    def on_result(self, name: str, value: Any, now: Now) -> Effects:
        return ()

    def tick(self, now: Now) -> Effects:
        return ()

    def close(self, now: Now) -> Effects:
        return ()

    def summary(self) -> dict[str, Any]:
        return {"frames": {name: len(spool) for name, spool in self._spools.items()}, "refused": self.refused}

    # ---- after the run ----
    def shots(self, headlines: dict[int, str], fps: int) -> Iterator[Shot]:
        """The film: for every picture of the first camera, the others' newest at that time."""
        for episode in self.episodes:
            shot = None
            title = headlines.get(episode.episode, f"episode {episode.episode + 1}")
            for stamp_ns, views in self._sets(episode):
                over = episode.end_ns is not None and stamp_ns >= episode.end_ns
                shot = Shot(views, episode.instruction, title, episode.success if over else None)
                yield shot
            if shot is not None and episode.success is not None:
                last = Shot(shot.views, shot.instruction, shot.headline, episode.success)
                yield from hold(last, round(OUTCOME_STANDS_S * fps))

    def _sets(self, episode: Recorded) -> Iterator[tuple[int, list[np.ndarray]]]:
        names = list(self._spools)
        if any(name not in episode.frames for name in names):
            return
        stamps = {name: np.array([stamp for stamp, _ in episode.frames[name]]) for name in names}
        for stamp_ns, index in episode.frames[names[0]]:
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

    def dispose(self) -> None:
        """Remove the scratch files."""
        for spool in self._spools.values():
            spool.close()
