"""What the gate promises for any input, checked from the emitted commands alone.

The monitor knows only commands and times. `pytest -m slow tests/runtime` runs 100 000 chunks, and searches with new
inputs each time; a failure there prints how to repeat it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from arms import PERIOD_NS, arm
from gate_inputs import (
    BOX,
    NUMBERS,
    SHIPPED,
    START,
    Sheet,
    drive,
    faulty_chunk,
    inside,
    planar,
    random_chunk,
    start,
    step,
)  # fmt: skip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vla.resources import load_embodiment
from vla.runtime.gate import MAX_PERIODS, Gate

CHUNKS_OF_SHIPPED = 90


class Monitor:
    """Recomputes velocity and acceleration of an emitted stream and compares them with the data sheet."""

    def __init__(self, start: np.ndarray, now_ns: int = 0, sheet: Sheet = NUMBERS) -> None:
        self.q, self.v, self.now_ns, self.first, self.sheet = start.copy(), np.zeros_like(start), now_ns, True, sheet
        self.lower, self.upper = np.minimum(sheet.lower, start), np.maximum(sheet.upper, start)
        self.worst = np.zeros(2)  # largest share of the limits of speed and acceleration that was taken

    def see(self, values: np.ndarray, now_ns: int, stopped: bool) -> None:
        dt, sheet = (now_ns - self.now_ns) * 1e-9, self.sheet
        self.now_ns = now_ns
        assert np.all(np.isfinite(values))
        if dt < 0 or (dt == 0 and not self.first):
            assert np.array_equal(values, self.q), "no time has passed, but the command moved"
            return
        if self.first or dt > MAX_PERIODS * sheet.period_s:  # the arm has come to rest in between
            self.v, dt, self.first = np.zeros_like(self.v), sheet.period_s, False
        v = (values - self.q) / dt
        slack = 1e-9 + 1e-14 / dt
        assert np.all(values >= self.lower - 1e-12) and np.all(values <= self.upper + 1e-12)
        change = sheet.acceleration * dt
        assert np.all(np.abs(v) <= sheet.speed + slack)
        assert np.all(np.abs(v - self.v) <= change + 2 * slack)
        if stopped:
            assert np.all(np.abs(v) <= np.maximum(np.abs(self.v) - change, 0) + 2 * slack)
        # Outside the limits, motion is inward or braking.
        outward = ((values > sheet.upper) & (v > slack)) | ((values < sheet.lower) & (v < -slack))
        assert not np.any(outward & (np.abs(v) > np.maximum(np.abs(self.v) - change, 0) + 2 * slack))
        self.lower = np.where(values < sheet.lower, np.minimum(values, self.upper), sheet.lower)
        self.upper = np.where(values > sheet.upper, values, sheet.upper)
        taken = [np.max(np.abs(v) / sheet.speed), np.max((np.abs(v - self.v) - 2 * slack) / change)]
        self.worst = np.maximum(self.worst, taken)
        self.q, self.v = values, v


def run_to_rest(gate: Gate, monitor: Monitor) -> None:
    """Silence: the stream must end at rest, in the time that braking from top speed takes, and stay there."""
    sheet = monitor.sheet
    ticks = int(np.ceil(np.max(sheet.speed / sheet.acceleration) / sheet.period_s)) + 1
    now_ns, values = monitor.now_ns, gate.command
    for _ in range(ticks):
        now_ns += sheet.period_ns
        values = gate.step(now_ns, None).values
        monitor.see(values, now_ns, True)
    assert gate.at_rest
    for _ in range(3):
        now_ns += sheet.period_ns
        assert np.array_equal(gate.step(now_ns, None).values, values)
        monitor.see(values, now_ns, True)


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


def chunks_within_limits(chunks: int, action_space: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gate, monitor = Gate(arm(action_space)), Monitor(START)
    gate.reset(monitor.q, 0)
    for chunk in range(chunks):
        random_chunk(rng, gate, monitor, chunk)
        if chunk % 50 == 49:
            run_to_rest(gate, monitor)


@pytest.mark.parametrize("action_space", ["ee_delta", "joint_position"])
def test_random_chunks_stay_within_limits(action_space):
    chunks_within_limits(500, action_space, seed=1)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_robots_stay_within_limits_with_faults_among_the_inputs(name):
    """Without their jerk limits, with which test_gate_jerk.py tries them: a robot's own file may state none."""
    shipped, rng = load_embodiment(name), np.random.default_rng(5)
    robot = replace(shipped, joints=tuple(replace(joint, max_jerk=None) for joint in shipped.joints))
    sheet, moved = Sheet.of(robot), 0
    gate, monitor = Gate(robot), Monitor(sheet.aside, sheet=sheet)
    gate.reset(monitor.q, 0)
    for chunk in range(CHUNKS_OF_SHIPPED):
        moved += faulty_chunk(rng, gate, monitor, chunk)
        if chunk % 50 == 49:
            run_to_rest(gate, monitor)
    assert np.all(monitor.worst > 0.99), f"the limits are used, not only kept: {monitor.worst}"
    assert moved > 4 * CHUNKS_OF_SHIPPED, "half of the time it moves"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("action_space", ["ee_delta", "joint_position"])
def test_a_hundred_thousand_chunks_stay_within_limits(action_space):
    chunks_within_limits(50_000, action_space, seed=2)


def test_the_tool_stays_in_the_workspace_box():
    rng = np.random.default_rng(3)
    embodiment = arm("ee_delta", workspace_lower=BOX[0], workspace_upper=BOX[1])
    gate, monitor = Gate(embodiment, planar), Monitor(np.array([-0.3, 0.45, 1.0, 0.04]))
    assert inside(planar(monitor.q), BOX)
    gate.reset(monitor.q, 0)
    for chunk in range(500):
        random_chunk(rng, gate, monitor, chunk, BOX)
        if chunk % 20 == 19:  # a stop near the border must also end inside
            run_to_rest(gate, monitor)
            assert inside(planar(gate.command), BOX)


def test_from_outside_the_box_only_inward_motion_passes():
    embodiment = arm("ee_delta", workspace_lower=BOX[0], workspace_upper=BOX[1])
    q = START  # stretched out: x = 0.75
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
