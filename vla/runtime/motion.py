"""How an episode moved, read from its trace: pauses, jumps where chunks meet, jerk, and how old its actions were.

What compares schedulers. Everything is counted from what was commanded and executed. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from vla.embodiment import Embodiment
from vla.runtime.gate import Verdict
from vla.runtime.trace import Trace
from vla.types import ControlMode


@dataclass(frozen=True)
class Jumps:
    """Changes of velocity from one control period to the next: mean and largest, where chunks meet and within chunks. A
    pause between them counts once, with the largest change of its stop and start. 0 where there are none."""

    switch_mean: float = 0.0
    switch_max: float = 0.0
    within_mean: float = 0.0
    within_max: float = 0.0


@dataclass(frozen=True)
class Motion:
    """One episode, from its first action on.

    periods: control periods. pauses: of these, without a fresh action: none was due, or the Gate stopped it.
    longest_pause: in a row. switches: how often another chunk took over. age_ms: mean time from the observation an
    action came from to its execution, None where the trace does not know. joints_rad_s: the largest change among the
    arm's commanded joints. tool_mm_s: change of the commanded tool velocity, before any limit. jerk_rad_s3: root mean
    square over periods and arm joints. None where the robot's actions or commands do not tell.
    """

    periods: int
    pauses: int
    longest_pause: int
    switches: int
    age_ms: float | None
    joints_rad_s: Jumps | None
    tool_mm_s: Jumps | None
    jerk_rad_s3: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, rounded to 6 digits."""
        rounded: dict[str, Any] = _rounded(asdict(self))
        return rounded

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Motion:
        """Inverse of `to_dict`."""
        jumps = {key: None if data[key] is None else Jumps(**data[key]) for key in ("joints_rad_s", "tool_mm_s")}
        return cls(**{**data, **jumps})


def motion(trace: Trace) -> Motion:
    """Of a trace that holds one episode."""
    robot, end = trace.embodiment, trace.rows
    executed = (trace.chunk[:end] >= 0) & (trace.verdict[:end] != Verdict.STOP)
    begin = int(executed.argmax()) if executed.any() else end
    rows = slice(begin, end)
    executed = executed[rows]
    chunks = np.where(executed, trace.chunk[rows], -1)
    known = executed & (trace.stamp_ns[rows] >= 0)
    ages_ns = (trace.tick_ns[rows] - trace.stamp_ns[rows])[known]
    joints, tool = _arm_joints(robot), _tool_actions(robot)
    rest = trace.command[begin - 1 : begin] if begin else trace.measured[:1]
    speeds = np.diff(np.concatenate([rest, trace.command[rows]])[:, joints], axis=0) * robot.rate_hz
    moves = np.where(executed[:, None], trace.action[rows][:, tool], 0.0) * robot.rate_hz * 1e3
    return Motion(
        periods=len(executed),
        pauses=int(np.sum(~executed)),
        longest_pause=_longest(~executed),
        switches=int(np.sum(np.diff(chunks[executed]) != 0)),
        age_ms=float(ages_ns.mean()) * 1e-6 if ages_ns.size else None,
        joints_rad_s=_jumps(np.abs(np.diff(speeds, axis=0)), chunks) if joints else None,
        tool_mm_s=_jumps(np.linalg.norm(np.diff(moves, axis=0), axis=1, keepdims=True), chunks) if tool else None,
        jerk_rad_s3=_rms(np.diff(speeds, n=2, axis=0) * robot.rate_hz**2) if joints else None,
    )


def pooled(motions: Sequence[Motion]) -> dict[str, Any]:
    """Many episodes as one line: pauses over all periods, the rest as means over the episodes that tell. Largest jumps
    are means too, of each episode's largest: the largest of many episodes says how many there were."""
    periods = sum(m.periods for m in motions)
    out: dict[str, Any] = {
        "periods": periods,
        "pauses": sum(m.pauses for m in motions),
        "pause_share": sum(m.pauses for m in motions) / periods if periods else None,
        "longest_pause": max((m.longest_pause for m in motions), default=0),
        "switches": _mean([m.switches for m in motions]),
        "age_ms": _mean([m.age_ms for m in motions]),
        "jerk_rad_s3": _mean([m.jerk_rad_s3 for m in motions]),
    }
    for key in ("joints_rad_s", "tool_mm_s"):
        told = [jumps for jumps in (getattr(m, key) for m in motions) if jumps is not None]
        out[key] = {f.name: _mean([getattr(j, f.name) for j in told]) for f in fields(Jumps)} if told else None
    rounded: dict[str, Any] = _rounded(out)
    return rounded


def _arm_joints(robot: Embodiment) -> list[int]:
    if robot.control_mode is not ControlMode.JOINT_POSITION:
        return []
    return [i for i, name in enumerate(robot.command_names) if "gripper" not in name and "finger" not in name]


def _tool_actions(robot: Embodiment) -> list[int]:
    if robot.action_space != "ee_delta":
        return []
    return [i for i, unit in enumerate(robot.action_units) if unit == "m" and i not in robot.grippers]


def _jumps(changes: np.ndarray, chunks: np.ndarray) -> Jumps:
    """changes: float[n, D], from each period to the next, the largest of D counts. chunks: int[n + 1], the chunk that
    each period's action came from, -1 for none."""
    sizes = changes.max(axis=1, initial=0.0)
    acted = np.flatnonzero(chunks >= 0)
    ends = np.append(acted[1:], len(sizes))  # an arm that stops for good has jumped, too
    inside: list[float] = []
    between: list[float] = []
    for begin, end in zip(acted, ends):
        if begin < end:
            same = end == begin + 1 and chunks[end] == chunks[begin]
            (inside if same else between).append(float(sizes[begin:end].max()))
    return Jumps(_mean(between) or 0.0, max(between, default=0.0), _mean(inside) or 0.0, max(inside, default=0.0))


def _longest(flags: np.ndarray) -> int:
    """Length of the longest run of True."""
    edges = np.diff(np.concatenate([[0], flags.astype(int), [0]]))
    return int(np.max(np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0), initial=0))


def _rms(values: np.ndarray) -> float | None:
    return float(np.sqrt(np.mean(values**2))) if values.size else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 6) if isinstance(value, float) else value
