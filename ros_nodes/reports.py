"""What a command node says of itself: status, diagnostics, and the stops that a run is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ros_nodes.messages import ERROR, OK, WARN, Diagnostics, Status, Text
from ros_nodes.node import CONTROL_STATUS, DIAGNOSTICS, Now, Send
from vla.runtime.gate import Decision, Verdict
from vla.runtime.loop import ControlLoop
from vla.runtime.reasons import Reason

REJECT_SHOWN_NS = 1_000_000_000
_STOPS_KEPT = 1000


class Faults(dict[str, str]):
    """Why, by topic or kind, for as long as it stands; and for a second, messages that could not be read or followed.
    One that is refused is an event: of its topic, nothing better may ever come to end it."""

    def __init__(self) -> None:
        super().__init__()
        self._rejected: dict[str, tuple[str, int]] = {}  # by topic: why, and the steady time

    def reject(self, topic: str, why: str, now: Now) -> None:
        self._rejected[topic] = (f"{topic}: {why}", now.steady_ns)

    def stand(self, topic: str, why: str) -> None:
        """Until it is withdrawn, with "" for why."""
        self.pop(topic, None)
        if why:
            self[topic] = why

    def shown(self, now: Now) -> dict[str, str]:
        """What stands, then the newest of what was refused: what is read of it is cut to a length."""
        newest = sorted(self._rejected.items(), key=lambda item: -item[1][1])
        recent = {k: why for k, (why, at) in newest if now.steady_ns - at < REJECT_SHOWN_NS}
        return {**self, **{k: why for k, why in recent.items() if k not in self}}


class Stops(list[dict[str, Any]]):
    """The first stops of a run: in which episode, why, when, and how long the policy had been silent."""

    def note(self, episode: int | None, reason: Reason, silence_ns: int | None, stamp_ns: int) -> None:
        if len(self) < _STOPS_KEPT:
            silence_ms = None if silence_ns is None else round(silence_ns / 1e6, 1)
            self.append({"episode": episode, "reason": reason.text, "silence_ms": silence_ms, "stamp_ns": stamp_ns})


def status(loop: ControlLoop, facts: Mapping[str, Any], now: Now) -> Send:
    """facts: those that the loop does not know."""
    scheduler, decision = loop.scheduler, loop.last[1]
    return Send(
        CONTROL_STATUS.topic,
        Text.of(
            **facts,
            verdict="" if decision is None else decision.verdict.name.lower(),
            reason="" if decision is None else decision.reason.text,
            due=scheduler.due_actions,
            missed=scheduler.missed_actions,
            late=scheduler.late_actions,
            chunks=scheduler.chunks,
            time_scale=round(scheduler.time_scale, 3),
            queue=scheduler.queue_depth,
            refused=dict(scheduler.refused),
            stamp_ns=now.stamp_ns,
        ),
    )


def diagnostics(
    node: str, robot: str, decision: Decision | None, faults: Mapping[str, str], values: Mapping[str, str], now: Now
) -> Send:
    """decision: the last one of a moving arm. A stop is an error; a fault, or anything short of a pass, a warning."""
    reasons = [] if decision is None or not decision.reason else [decision.reason.text]
    level = ERROR if decision is not None and decision.verdict is Verdict.STOP else WARN if reasons or faults else OK
    text = "; ".join([*reasons, *faults.values()])[:400] or "ok"
    return Send(DIAGNOSTICS.topic, Diagnostics(now.stamp_ns, (Status(level, node, text, dict(values), robot),)))
