"""What /diagnostics names of a node, and the stops that a run is judged by."""

from __future__ import annotations

from typing import Any

from ros_nodes.node import Now
from vla.runtime.reasons import Reason

REJECT_SHOWN_NS = 1_000_000_000
_STOPS_KEPT = 1000


class Faults(dict[str, str]):
    """Why, by topic or kind, for as long as it stands; and for a second, messages that could not be read."""

    def __init__(self) -> None:
        super().__init__()
        self._rejected: dict[str, tuple[str, int]] = {}  # by topic: why, and the steady time

    def reject(self, topic: str, why: str, now: Now) -> None:
        self._rejected[topic] = (why, now.steady_ns)

    def shown(self, now: Now) -> dict[str, str]:
        recent = {k: why for k, (why, at) in self._rejected.items() if now.steady_ns - at < REJECT_SHOWN_NS}
        return {**recent, **self}


class Stops(list[dict[str, Any]]):
    """The first stops of a run: in which episode, why, when, and how long the policy had been silent."""

    def note(self, episode: int | None, reason: Reason, silence_ns: int | None, stamp_ns: int) -> None:
        if len(self) < _STOPS_KEPT:
            silence_ms = None if silence_ns is None else round(silence_ns / 1e6, 1)
            self.append({"episode": episode, "reason": reason.text, "silence_ms": silence_ms, "stamp_ns": stamp_ns})
