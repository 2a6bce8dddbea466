"""What the gate promises for any input, checked from the emitted commands alone.

The monitor knows only commands and times. `pytest -m slow tests/runtime` runs 100 000 chunks, and searches with new
inputs each time; a failure there prints how to repeat it.
"""

from __future__ import annotations

import numpy as np
import pytest
from arms import JOINTS, PERIOD_NS, arm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vla.runtime.gate import MAX_PERIODS, Gate, Reason, Verdict

PERIOD_S = PERIOD_NS * 1e-9
LOWER, UPPER = np.array([j.lower for j in JOINTS]), np.array([j.upper for j in JOINTS])
SPEED = np.array([j.max_velocity for j in JOINTS])
ACCELERATION = np.array([j.max_acceleration for j in JOINTS])
LINKS = np.array([0.4, 0.35])


def planar(q: np.ndarray) -> np.ndarray:
    """Tool point of a planar two-link arm on a lift: strongly curved, unlike the box."""
    angles = np.cumsum(q[:2] * np.array([1.0, 1.5]))
    return np.array([LINKS @ np.cos(angles), LINKS @ np.sin(angles), 0.2 * q[2]])


class Monitor:
    """Recomputes velocity and acceleration of an emitted stream and compares them with the data sheet."""

    def __init__(self, start: np.ndarray, now_ns: int = 0) -> None:
        self.q, self.v, self.now_ns, self.first = start.copy(), np.zeros_like(start), now_ns, True
        self.lower, self.upper = np.minimum(LOWER, start), np.maximum(UPPER, start)

    def see(self, values: np.ndarray, now_ns: int, stopped: bool) -> None:
        dt = (now_ns - self.now_ns) * 1e-9
        self.now_ns = now_ns
        assert np.all(np.isfinite(values))
        if dt < 0 or (dt == 0 and not self.first):
            assert np.array_equal(values, self.q), "no time has passed, but the command moved"
            return
        if self.first or dt > MAX_PERIODS * PERIOD_S:  # the arm has come to rest in between
            self.v, dt, self.first = np.zeros_like(self.v), PERIOD_S, False
        v = (values - self.q) / dt
        slack = 1e-9 + 1e-14 / dt
        assert np.all(values >= self.lower - 1e-12) and np.all(values <= self.upper + 1e-12)
        assert np.all(np.abs(v) <= SPEED + slack)
        assert np.all(np.abs(v - self.v) <= ACCELERATION * dt + 2 * slack)
        if stopped:
            assert np.all(np.abs(v) <= np.maximum(np.abs(self.v) - ACCELERATION * dt, 0) + 2 * slack)
        # Outside the limits, motion is inward or braking.
        outward = ((values > UPPER) & (v > slack)) | ((values < LOWER) & (v < -slack))
        assert not np.any(outward & (np.abs(v) > np.maximum(np.abs(self.v) - ACCELERATION * dt, 0) + 2 * slack))
        self.lower = np.where(values < LOWER, np.minimum(values, self.upper), LOWER)
        self.upper = np.where(values > UPPER, values, UPPER)
        self.q, self.v = values, v


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


def drive(gate: Gate, monitor: Monitor, steps: list[dict], rng_noise: float = 0.01) -> None:
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
            monitor.see(decision.values, now_ns, stopped)


def run_to_rest(gate: Gate, monitor: Monitor) -> None:
    """Silence: the stream must end at rest, in the time that braking from top speed takes, and stay there."""
    ticks = int(np.ceil(np.max(SPEED / ACCELERATION) / PERIOD_S)) + 1
    now_ns, values = monitor.now_ns, gate.command
    for _ in range(ticks):
        now_ns += PERIOD_NS
        values = gate.step(now_ns, None).values
        monitor.see(values, now_ns, True)
    assert gate.at_rest
    for _ in range(3):
        now_ns += PERIOD_NS
        assert np.array_equal(gate.step(now_ns, None).values, values)
        monitor.see(values, now_ns, True)


start = st.tuples(*(st.floats(j.lower - 0.3, j.upper + 0.3) for j in JOINTS[:3]), st.floats(0, 0.08))


@pytest.mark.parametrize("action_space", ["ee_delta", "joint_position"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(steps=st.lists(step, max_size=25), start=start)
def test_no_input_makes_the_stream_leave_its_limits(action_space, steps, start):
    gate, monitor = Gate(arm(action_space)), Monitor(np.array(start))
    gate.reset(np.array(start), 0)
    drive(gate, monitor, steps)
    run_to_rest(gate, monitor)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("action_space", ["ee_delta", "joint_position"])
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(steps=st.lists(step, max_size=25), start=start)
def test_nor_do_inputs_never_tried_before(action_space, steps, start):
    gate, monitor = Gate(arm(action_space)), Monitor(np.array(start))
    gate.reset(np.array(start), 0)
    drive(gate, monitor, steps)
    run_to_rest(gate, monitor)


def random_chunk(rng: np.random.Generator, gate: Gate, monitor: Monitor, chunk: int, tool_box=None) -> None:
    """Eight actions of one kind: smooth, violent, drifting to a corner, or noise; jittered ticks; perfect health."""
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
            assert np.all(point >= tool_box[0]) and np.all(point <= tool_box[1]), point


def chunks_within_limits(chunks: int, action_space: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gate, monitor = Gate(arm(action_space)), Monitor(np.array([0.0, 0.0, 1.0, 0.04]))
    gate.reset(monitor.q, 0)
    for chunk in range(chunks):
        random_chunk(rng, gate, monitor, chunk)
        if chunk % 50 == 49:
            run_to_rest(gate, monitor)


@pytest.mark.parametrize("action_space", ["ee_delta", "joint_position"])
def test_random_chunks_stay_within_limits(action_space):
    chunks_within_limits(500, action_space, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("action_space", ["ee_delta", "joint_position"])
def test_a_hundred_thousand_chunks_stay_within_limits(action_space):
    chunks_within_limits(50_000, action_space, seed=2)


BOX = ((0.35, -0.3, 0.05), (0.72, 0.3, 0.5))


def test_the_tool_stays_in_the_workspace_box():
    rng = np.random.default_rng(3)
    embodiment = arm("ee_delta", workspace_lower=BOX[0], workspace_upper=BOX[1])
    gate, monitor = Gate(embodiment, planar), Monitor(np.array([-0.3, 0.45, 1.0, 0.04]))
    assert np.all(planar(monitor.q) > BOX[0]) and np.all(planar(monitor.q) < BOX[1])
    gate.reset(monitor.q, 0)
    for chunk in range(500):
        random_chunk(rng, gate, monitor, chunk, BOX)
        if chunk % 20 == 19:  # a stop near the border must also end inside
            run_to_rest(gate, monitor)
            point = planar(gate.command)
            assert np.all(point >= BOX[0]) and np.all(point <= BOX[1])


def test_from_outside_the_box_only_inward_motion_passes():
    embodiment = arm("ee_delta", workspace_lower=BOX[0], workspace_upper=BOX[1])
    q = np.array([0.0, 0.0, 1.0, 0.04])  # stretched out: x = 0.75
    gate = Gate(embodiment, planar)
    gate.reset(q, 0)
    assert planar(q)[0] > BOX[1][0]
    rng, now_ns, far = np.random.default_rng(4), 0, planar(q)[0]
    for _ in range(200):
        now_ns += PERIOD_NS
        q = gate.command
        target = q + rng.normal(0, 0.05, 4) + np.array([0.0, 0.01, 0.0, 0.0])
        gate.step(
            now_ns, target, due_ns=now_ns, chunk_number=0, positions=q, positions_stamp_ns=now_ns, heartbeat_ns=now_ns
        )
        x = planar(gate.command)[0]
        assert x <= max(far, BOX[1][0]) + 1e-6
        far = x
    assert x <= BOX[1][0], "inward motion was let through until the tool was inside"
