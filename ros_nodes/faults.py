"""What /diagnostics names of a node."""

from __future__ import annotations

from ros_nodes.node import Now

REJECT_SHOWN_NS = 1_000_000_000


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
