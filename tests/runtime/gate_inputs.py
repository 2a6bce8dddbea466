"""Inputs for the gate: any at all, chunks of a healthy run, and chunks with faults for any arm. What comes out is shown
to a `monitor`: now_ns, see(values, now_ns, stopped), and for the last of them sheet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from arms import JOINTS, PERIOD_NS, arm
from hypothesis import strategies as st

from vla.embodiment import Embodiment
from vla.runtime.gate import Gate, Reason, Verdict

PERIOD_S = PERIOD_NS * 1e-9
LOWER, UPPER = np.array([j.lower for j in JOINTS]), np.array([j.upper for j in JOINTS])
SPEED = np.array([j.max_velocity for j in JOINTS])
ACCELERATION = np.array([j.max_acceleration for j in JOINTS])
LINKS = np.array([0.4, 0.35])
START = np.array([0.0, 0.0, 1.0, 0.04])
BOX = ((0.35, -0.3, 0.05), (0.72, 0.3, 0.5))


def planar(q: np.ndarray) -> np.ndarray:
    """Tool point of a planar two-link arm on a lift: strongly curved, unlike the box."""
    angles = np.cumsum(q[:2] * np.array([1.0, 1.5]))
    return np.array([LINKS @ np.cos(angles), LINKS @ np.sin(angles), 0.2 * q[2]])


def inside(point: np.ndarray, box, near: float = 0.0) -> bool:
    return bool(np.all(point >= np.array(box[0]) - near) and np.all(point <= np.array(box[1]) + near))


class Sheet(NamedTuple):
    """What a data sheet says: limits float64[D] and the control period. jerk: NaN where none is stated."""

    lower: np.ndarray
    upper: np.ndarray
    speed: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    period_s: float
    period_ns: int  # rounded: 1/30 s is no whole number of them

    @property
    def aside(self) -> np.ndarray:
        """A start from which the limits of position are soon reached."""
        return self.lower + 0.9 * (self.upper - self.lower)

    @classmethod
    def of(cls, robot: Embodiment) -> Sheet:
        names = ("lower", "upper", "max_velocity", "max_acceleration", "max_jerk")
        columns = [np.array([getattr(joint, name) for joint in robot.joints], np.float64) for name in names]
        return cls(*columns, robot.period_s, round(1e9 * robot.period_s))


NUMBERS = Sheet.of(arm())
SHIPPED = ("panda", "ur5e", "so101", "aloha")


class Drive:
    """A gate with healthy inputs and a 20 Hz clock; keyword arguments replace an input for one step."""

    def __init__(self, embodiment=None, tool_position=None, start=START, **options):
        self.gate = Gate(embodiment or arm(), tool_position, **options)
        self.now_ns = 0
        self.gate.reset(np.asarray(start), 0)

    def step(self, target, dt_ns=PERIOD_NS, chunk=0, **inputs):
        self.now_ns += dt_ns
        values = {
            "due_ns": self.now_ns,
            "chunk_number": chunk,
            "positions": self.gate.command,
            "positions_stamp_ns": self.now_ns,
            "heartbeat_ns": self.now_ns,
        }
        target = None if target is None else np.asarray(target, float)
        return self.gate.step(self.now_ns, target, **{**values, **inputs})


number = st.floats(allow_nan=True, allow_infinity=True, width=32)
near = st.floats(-4, 4)
vector = st.one_of(
    st.lists(near, min_size=4, max_size=4),
    st.lists(st.one_of(near, number), min_size=4, max_size=4),
    st.lists(near, min_size=3, max_size=5),
    st.none(),
)
step = st.fixed_dictionaries(
    {
        "dt": st.one_of(st.just(PERIOD_NS), st.integers(100_000, 99_000_000), st.sampled_from([0, -7, 10**8, 10**10])),
        "target": vector,
        "delta": st.booleans(),
        "chunk": st.integers(0, 8),
        "age": st.sampled_from([0, 0, 0, PERIOD_NS, 2 * PERIOD_NS + 1, -PERIOD_NS - 1, 10**12]),
        "heartbeat": st.sampled_from([0, 0, 0, 50_000_000, 150_000_000, None]),
        "joints": st.sampled_from(["good", "good", "good", "good", "nan", "far", "old", "future", "none", "short"]),
        "repeat": st.integers(1, 8),
    }
)
start = st.tuples(*(st.floats(j.lower - 0.3, j.upper + 0.3) for j in JOINTS[:3]), st.floats(0, 0.08))


def drive(gate: Gate, monitor, steps: list[dict], rng_noise: float = 0.01) -> None:
    """Feed the steps; measured joints follow the command. Every fault must be a stop in the same tick."""
    now_ns = monitor.now_ns
    for item in steps:
        for _ in range(item["repeat"]):
            back = item["dt"] < 0
            now_ns += item["dt"]
            target = None if item["target"] is None else np.array(item["target"])
            if item["delta"] and target is not None and target.shape == (4,):
                target = gate.command + 0.05 * target
            positions: np.ndarray | None = gate.command + rng_noise
            stamp_ns = now_ns
            match item["joints"]:
                case "nan":
                    positions[1] = np.nan
                case "far":
                    positions[0] += 0.8
                case "old":
                    stamp_ns -= 150_000_000
                case "future":
                    stamp_ns += 150_000_000
                case "none":
                    positions = None
                case "short":
                    positions = positions[:3]
            heartbeat_ns = None if item["heartbeat"] is None else now_ns - item["heartbeat"]
            decision = gate.step(
                now_ns,
                target,
                due_ns=now_ns - item["age"],
                chunk_number=item["chunk"],
                positions=positions,
                positions_stamp_ns=stamp_ns,
                heartbeat_ns=heartbeat_ns,
            )
            bad_action = target is None or target.shape != (4,) or not np.all(np.isfinite(target))
            stale = not -PERIOD_NS <= item["age"] <= 2 * PERIOD_NS
            silent = item["heartbeat"] in (None, 150_000_000)
            stopped = decision.verdict is Verdict.STOP
            if bad_action or stale or silent or back or item["joints"] != "good":
                assert stopped and decision.reason is not Reason.NONE
            if decision.verdict is Verdict.PASS and item["dt"] <= 2 * PERIOD_NS:
                assert np.allclose(decision.values[:3], target[:3], atol=1e-8)
            # An arm that did not follow: after the brake, the command goes back to it, within all limits.
            monitor.see(decision.values, now_ns, stopped and decision.reason is not Reason.TRACKING)


def random_chunk(rng: np.random.Generator, gate: Gate, monitor, chunk: int, tool_box=None, near=0.0) -> None:
    """Eight actions of one kind: smooth, violent, drifting to a corner, or noise; jittered ticks; perfect health.

    tool_box: where the tool has to stay; it may be `near` metres outside.
    """
    kind, now_ns = rng.integers(4), monitor.now_ns
    goal = rng.uniform(LOWER - 0.5, UPPER + 0.5)
    for _ in range(8):
        now_ns += int(PERIOD_NS * (1 if rng.random() < 0.5 else rng.uniform(0.02, 1.98)))
        q = gate.command
        match kind:
            case 0:
                target = q + rng.uniform(-1, 1) * SPEED * PERIOD_S
            case 1:
                target = goal
            case 2:
                target = q + 0.2 * (goal - q)
            case _:
                target = q + rng.normal(0, 0.1, 4)
        decision = gate.step(
            now_ns,
            target,
            due_ns=now_ns,
            chunk_number=chunk,
            positions=q,
            positions_stamp_ns=now_ns,
            heartbeat_ns=now_ns,
        )
        assert decision.verdict is not Verdict.STOP, decision.reason.text
        monitor.see(decision.values, now_ns, False)
        if tool_box is not None:
            point = planar(decision.values)
            assert inside(point, tool_box, near), point


# What a fault does to the inputs of one step.
FAULTS: dict[str, Callable[[dict[str, Any], int], None]] = {
    "no heartbeat for 150 ms": lambda inputs, period_ns: inputs.update(heartbeat_ns=inputs["now_ns"] - 150_000_000),
    "no action": lambda inputs, period_ns: inputs.update(target=None),
    "NaN in an action": lambda inputs, period_ns: inputs["target"].__setitem__(-1, np.nan),
    "an action that is late": lambda inputs, period_ns: inputs.update(due_ns=inputs["now_ns"] - 3 * period_ns),
    "NaN in a joint state": lambda inputs, period_ns: inputs["positions"].__setitem__(0, np.nan),
    "a joint state that is old": lambda inputs, period_ns: inputs.update(
        positions_stamp_ns=inputs["now_ns"] - 150_000_000
    ),
}


def faulty_chunk(rng: np.random.Generator, gate: Gate, monitor, chunk: int, share: float = 0.04) -> int:
    """Eight actions as of `random_chunk`, for any arm, each of which meets a fault with this probability; how many were
    not stopped. A fault is a stop in its own tick; ticks are jittered, and one in a hundred comes after a pause. Twelve
    chunks in a row are of one kind and have one goal, so that a heavy arm comes to its top speed and to its limits."""
    sheet, now_ns, moved, plan = monitor.sheet, monitor.now_ns, 0, np.random.default_rng(chunk // 12)
    span, far = sheet.upper - sheet.lower, sheet.speed * sheet.period_s
    kind, goal = (1, 2, 1, 0, 1, 3)[chunk // 12 % 6], plan.uniform(sheet.lower - span, sheet.upper + span)
    goal = np.clip(goal, sheet.lower - 0.5, sheet.upper + 0.5)  # most joints beyond a limit
    for _ in range(8):
        jitter = 1 if rng.random() < 0.5 else rng.uniform(0.02, 1.98) if rng.random() < 0.98 else 10
        now_ns += int(sheet.period_ns * jitter)
        q = gate.command
        motions = (rng.uniform(-1, 1) * far, goal - q, 0.2 * (goal - q), rng.normal(size=len(q)) * far)
        inputs = {
            "now_ns": now_ns,
            "target": q + motions[kind],
            "due_ns": now_ns,
            "chunk_number": chunk,
            "positions": q.copy(),
            "positions_stamp_ns": now_ns,
            "heartbeat_ns": now_ns,
        }
        fault = str(rng.choice(list(FAULTS))) if rng.random() < share else ""
        if fault:
            FAULTS[fault](inputs, sheet.period_ns)
        decision = gate.step(**inputs)
        stopped = decision.verdict is Verdict.STOP
        assert stopped or not fault, fault
        monitor.see(decision.values, now_ns, stopped)
        moved += not stopped
    return moved
