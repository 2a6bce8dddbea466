"""Inputs for the gate: any at all, and chunks of a healthy run. What comes out is shown to a `monitor`: now_ns, and
see(values, now_ns, stopped)."""

from __future__ import annotations

import numpy as np
from arms import JOINTS, PERIOD_NS, arm
from hypothesis import strategies as st

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
