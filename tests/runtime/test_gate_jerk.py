"""What the gate promises for robots that state jerk limits, checked from the emitted stream alone.

`Stream` knows commands and times, and takes divided differences of them: on an even grid the usual finite differences,
on any grid averages of the derivatives. `pytest -m slow tests/runtime/test_gate_jerk.py` runs 100 000 chunks.
"""

from __future__ import annotations

from dataclasses import replace

import gate_inputs
import numpy as np
import pytest
from arms import JOINTS, PERIOD_NS, arm
from gate_inputs import (
    BOX,
    LOWER,
    PERIOD_S,
    SHIPPED,
    SPEED,
    START,
    UPPER,
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
from vla.runtime.gate import MAX_PERIODS, Gate, Reason, Verdict
from vla.runtime.jerk import Stop
from vla.runtime.limits import JointLimits

JERK = np.array([40.0, 500.0, 8.0, 60.0])
SMOOTH = tuple(replace(joint, max_jerk=jerk) for joint, jerk in zip(JOINTS, JERK))
CHUNKS_OF_SHIPPED = 60
NEAR = 1e-4  # metres: the way of a stop is looked at in points, and the tool moves on arcs between them


def smooth_arm(action_space: str = "ee_delta", **changes):
    return arm(action_space, joints=SMOOTH, **changes)


SHEET = Sheet.of(smooth_arm())


class Stream:
    """An emitted stream, in pieces of steady time. `check` compares it with the data sheet."""

    def __init__(self, start: np.ndarray, now_ns: int = 0, sheet: Sheet = SHEET) -> None:
        self.start, self.now_ns, self.first, self.sheet = np.array(start), now_ns, True, sheet
        self.pieces: list[tuple[list[float], list[np.ndarray]]] = []
        self._begin(self.start)

    def _begin(self, q: np.ndarray) -> None:
        """At rest at q for longer than three samples."""
        self.pieces.append(([-k * self.sheet.period_s for k in (3, 2, 1, 0)], [q, q, q, q]))

    @property
    def q(self) -> np.ndarray:
        return self.pieces[-1][1][-1]

    def see(self, values: np.ndarray, now_ns: int, stopped: bool) -> None:
        dt = (now_ns - self.now_ns) * 1e-9
        self.now_ns = now_ns
        assert np.all(np.isfinite(values))
        if dt < 0 or (dt == 0 and not self.first):
            assert np.array_equal(values, self.q), "no time has passed, but the command moved"
            return
        if self.first or dt > MAX_PERIODS * self.sheet.period_s:  # at rest in between, at the last command
            if not self.first:
                self._begin(self.q)
            dt, self.first = self.sheet.period_s, False
        times, positions = self.pieces[-1]
        times.append(times[-1] + dt)
        positions.append(values)

    def worst(self) -> np.ndarray:
        """Largest share of the limits of velocity, acceleration and jerk that the stream takes, float64[3]."""
        pieces = [(np.array(times), np.array(rows)) for times, rows in self.pieces]
        return np.max([largest_shares(times, rows, self.sheet) for times, rows in pieces], axis=0)

    def check(self) -> None:
        assert np.all(self.worst() <= 1.0 + 1e-6), self.worst()
        lower, upper = self.sheet.lower, self.sheet.upper
        for _, rows in self.pieces:
            q = np.array(rows)
            assert np.all(q >= np.minimum(lower, self.start) - 1e-9)
            assert np.all(q <= np.maximum(upper, self.start) + 1e-9)
            step = np.diff(q, axis=0)  # outside the limits, motion is inward
            assert np.all(step[q[:-1] > upper + 1e-9] <= 1e-9) and np.all(step[q[:-1] < lower - 1e-9] >= -1e-9)

    def ends_at_rest(self) -> bool:
        rows = self.pieces[-1][1]
        return all(np.array_equal(row, rows[-1]) for row in rows[-4:])


def largest_shares(t: np.ndarray, q: np.ndarray, sheet: Sheet = SHEET) -> np.ndarray:
    """float64[3]: divided differences of q float64[N, D] at t float64[N], as shares of their limits; what rounding of
    q alone can make of close samples is taken off."""
    d = np.diff(t)[:, None]
    bounds = (sheet.speed, sheet.acceleration, sheet.jerk)
    value, noise, out = q, np.full_like(q, 2.0**-50 * np.max(np.abs(q))), []
    for order, bound in enumerate(bounds, 1):
        width = sum(d[k : len(d) - order + 1 + k] for k in range(order)) / order
        value = np.diff(value, axis=0) / width
        noise = (noise[1:] + noise[:-1]) / width
        out.append(np.max((np.abs(value) - noise) / bound, initial=0.0))
    return np.array(out)


def run_to_rest(gate: Gate, stream: Stream) -> None:
    """Silence: the stream must end at rest, in the time that the slowest stop takes, and stay there."""
    sheet, now_ns = stream.sheet, stream.now_ns
    slowest_s = np.max(sheet.speed / sheet.acceleration + 2 * sheet.acceleration / sheet.jerk)
    for _ in range(int(np.ceil(slowest_s / sheet.period_s)) + 7):
        now_ns += sheet.period_ns
        stream.see(gate.step(now_ns, None).values, now_ns, True)
    assert gate.at_rest and stream.ends_at_rest()


def any_input(action_space: str, steps: list[dict], start: tuple[float, ...]) -> None:
    gate, stream = Gate(smooth_arm(action_space)), Stream(np.array(start))
    gate.reset(np.array(start), 0)
    drive(gate, stream, steps)
    run_to_rest(gate, stream)
    stream.check()


@pytest.mark.parametrize("action_space", ["ee_delta", "joint_position"])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(steps=st.lists(step, max_size=12), start=start)
def test_no_input_makes_the_stream_leave_its_limits(action_space, steps, start):
    any_input(action_space, steps, start)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("action_space", ["ee_delta", "joint_position"])
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(steps=st.lists(step, max_size=25), start=start)
def test_nor_do_inputs_never_tried_before(action_space, steps, start):
    any_input(action_space, steps, start)


def chunks_within_limits(chunks: int, action_space: str, seed: int) -> None:
    rng, gate = np.random.default_rng(seed), Gate(smooth_arm(action_space))
    stream, worst = Stream(START), np.zeros(3)
    gate.reset(START, 0)
    for chunk in range(chunks):
        random_chunk(rng, gate, stream, chunk)
        if chunk % 20 == 19:
            run_to_rest(gate, stream)
            stream.check()
            worst = np.maximum(worst, stream.worst())
            stream = Stream(gate.command, stream.now_ns)
            stream.first = False
    assert np.all(worst > 0.95), f"the limits are used, not only kept: {worst}"


@pytest.mark.parametrize("action_space", ["ee_delta", "joint_position"])
def test_random_chunks_stay_within_limits(action_space):
    chunks_within_limits(100, action_space, seed=1)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_robots_stay_within_limits_with_faults_among_the_inputs(name):
    robot, rng = load_embodiment(name), np.random.default_rng(6)
    sheet, worst, moved = Sheet.of(robot), np.zeros(3), 0
    gate, stream = Gate(robot), Stream(sheet.aside, sheet=sheet)
    gate.reset(stream.q, 0)
    for chunk in range(CHUNKS_OF_SHIPPED):
        moved += faulty_chunk(rng, gate, stream, chunk)
        if chunk % 20 == 19:
            run_to_rest(gate, stream)
            stream.check()
            worst = np.maximum(worst, stream.worst())
            stream = Stream(gate.command, stream.now_ns, sheet)
            stream.first = False
    assert np.all(worst > 0.95), f"the limits are used, not only kept: {worst}"
    assert moved > 3 * CHUNKS_OF_SHIPPED, "of eight actions, three or more are not in a stop"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("action_space", ["ee_delta", "joint_position"])
def test_a_hundred_thousand_chunks_stay_within_limits(action_space):
    chunks_within_limits(50_000, action_space, seed=2)


def test_the_tool_stays_in_the_workspace_box():
    rng = np.random.default_rng(3)
    gate = Gate(smooth_arm(workspace_lower=BOX[0], workspace_upper=BOX[1]), planar)
    stream = Stream(np.array([-0.3, 0.45, 1.0, 0.04]))
    gate.reset(stream.q, 0)
    for chunk in range(60):
        random_chunk(rng, gate, stream, chunk, BOX, NEAR)
        if chunk % 20 == 19:
            run_to_rest(gate, stream)
            assert inside(planar(gate.command), BOX, NEAR)
    stream.check()


# ---- single rules ----
class Drive(gate_inputs.Drive):
    """What comes out is watched."""

    def __init__(self, action_space: str = "joint_position", start=START, **options):
        super().__init__(smooth_arm(action_space), start=start, **options)
        self.stream = Stream(np.array(start, float))

    def step(self, target, dt_ns=PERIOD_NS, **inputs):
        decision = super().step(target, dt_ns, **inputs)
        self.stream.see(decision.values, self.now_ns, False)
        return decision


def test_a_stream_within_its_limits_passes_exactly():
    drive, t = Drive(), np.arange(1, 80)[:, None] * PERIOD_S
    for target in START + np.array([0.3, 0.2, 0.1, 0.01]) * (1 - np.cos(t)):
        decision = drive.step(target)
        assert decision.verdict is Verdict.PASS and decision.reason is Reason.NONE
        np.testing.assert_allclose(decision.values[:3], target[:3], atol=1e-12)


def test_a_jump_of_an_absolute_goal_is_met_without_overshoot_and_nearly_as_fast_as_can_be():
    drive, goal = Drive(), START + np.array([0.0, 0.0, 0.3, 0.0])
    ticks = 0
    while not np.array_equal(drive.gate.command, goal):
        assert drive.step(goal).values[2] <= goal[2] + 1e-9
        ticks += 1
    # 0.3 m at 0.5 m/s, 1 m/s^2, 8 m/s^3: jerk phases of a/j = 1/8 s, and the speed limit is not reached.
    peak = 0.5 * (-1 / 8 + np.sqrt(1 / 64 + 4 * 0.3))
    assert ticks * PERIOD_S < 2 * (peak / 1.0 + 1 / 8) * 1.15
    for _ in range(5):
        decision = drive.step(goal)
    assert decision.verdict is Verdict.PASS and drive.gate.at_rest
    drive.stream.check()


def test_a_step_of_velocity_is_reached_without_overshoot_and_named():
    drive, speeds, reasons = Drive("ee_delta"), [], []
    for _ in range(20):
        decision = drive.step(drive.gate.command + np.array([0.025, 0, 0, 0]))
        speeds.append(drive.gate.velocity[0])
        reasons.append(decision.reason)
    assert max(speeds) == pytest.approx(0.5, abs=1e-12) and speeds[-1] == pytest.approx(0.5, abs=1e-12)
    assert reasons[0] in (Reason.ACCELERATION, Reason.JERK) and reasons[-1] is Reason.NONE


def test_the_arm_slows_down_as_a_whole():
    drive, direction = Drive("ee_delta"), np.array([0.04, -0.02, 0.01, 0.0])
    for _ in range(4):
        before = drive.gate.command
        got = drive.step(before + 3 * direction).values - before
        np.testing.assert_allclose(got[:3] / np.linalg.norm(got), direction[:3] / np.linalg.norm(direction), atol=1e-9)


def test_a_fault_brakes_at_once_within_all_limits_and_needs_a_newer_chunk():
    drive = Drive("ee_delta")
    for _ in range(10):
        drive.step(drive.gate.command + np.array([0.025, 0, 0, 0]))
    decision = drive.step(None, heartbeat_ns=None)
    assert decision.verdict is Verdict.STOP and decision.reason is Reason.HEARTBEAT
    assert drive.gate.velocity[0] < 0.5
    while not drive.gate.at_rest:
        decision = drive.step(drive.gate.command + 0.01)
        assert decision.reason is Reason.HEARTBEAT
    assert drive.step(drive.gate.command).verdict is Verdict.STOP, "the same chunk"
    assert drive.step(drive.gate.command, chunk_number=1).verdict is Verdict.PASS
    drive.stream.check()


def test_position_limits_are_reached_at_rest():
    drive = Drive("ee_delta")
    for _ in range(80):
        decision = drive.step(drive.gate.command + np.array([0.05, 0, 0, 0]))
    assert decision.values[0] == pytest.approx(1.0, abs=1e-6) and decision.reason is Reason.POSITION
    drive.stream.check()


def test_a_driver_that_had_the_stop_with_the_command_is_met_where_that_stop_ended():
    for carries_stop in (False, True):
        drive = Drive("ee_delta", carries_stop=carries_stop)
        for _ in range(10):
            drive.step(drive.gate.command + np.array([0.025, 0, 0, 0]))
        last, (stop, *_) = drive.gate.command, drive.gate.stop_path()
        decision = drive.step(None, dt_ns=3_000_000_000)
        np.testing.assert_allclose(decision.values, stop[-1] if carries_stop else last, atol=1e-12)
        assert stop[-1][0] > last[0] + 0.02


def test_every_command_is_followed_by_a_stop_within_all_limits():
    rng, drive = np.random.default_rng(5), Drive("ee_delta")
    for k in range(200):
        if k % 10 == 0:
            push = rng.uniform(-1.5, 1.5, 4) * SPEED * PERIOD_S
        drive.step(drive.gate.command + push)
        positions, velocities, accelerations, step_s = drive.gate.stop_path()
        times, rows = drive.stream.pieces[-1]
        t = np.concatenate([times[-4:], times[-1] + step_s * np.arange(1, len(positions) + 1)])
        assert np.all(largest_shares(t, np.vstack([rows[-4:], positions])) <= 1 + 1e-6)
        assert not np.any(velocities[-1]) and not np.any(accelerations[-1])
        assert np.all(positions >= LOWER - 1e-9) and np.all(positions <= UPPER + 1e-9)


# ---- the stop ----
LIMITS = JointLimits.of(smooth_arm())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(v=st.floats(-2, 2), a=st.floats(-1, 1), j=st.floats(0.5, 1000), limit=st.floats(0.5, 20))
def test_a_stop_is_smooth_bounded_and_ends_at_rest(v, a, j, limit):
    a = a * limit
    one = np.array([1.0])
    stop = Stop.of(0 * one, v * one, a * one, limit * one, j * one)
    t = np.linspace(0, float(stop.duration[0]), 4001)[:, None]
    q, speed, push = (x[:, 0] for x in stop.at(t))
    assert q[0] == 0 and speed[0] == pytest.approx(v) and push[0] == pytest.approx(a)
    assert speed[-1] == push[-1] == 0 and q[-1] == stop.rest[0]
    dt = t[1, 0]
    if dt > 1e-7:
        assert np.max(np.abs(push)) <= limit * (1 + 1e-9)
        assert np.max(np.abs(np.diff(push))) / dt <= j * (1 + 1e-6) + 1e-9
        np.testing.assert_allclose(np.diff(speed) / dt, (push[1:] + push[:-1]) / 2, atol=j * dt + 1e-6)
        np.testing.assert_allclose(np.diff(q) / dt, (speed[1:] + speed[:-1]) / 2, atol=limit * dt + 1e-6)
    low, high = stop.span()
    assert low[0] <= q.min() + 1e-9 and high[0] >= q.max() - 1e-9
    assert low[0] >= q.min() - limit * dt * dt - 1e-9 and high[0] <= q.max() + limit * dt * dt + 1e-9


def test_the_stop_is_the_fastest():
    """From cruising: 2 sqrt(v / j) while the acceleration limit is not reached, v / a + a / j beyond it."""
    one = np.ones(1)
    for v, a, j in ((0.1, 4.0, 40.0), (1.0, 4.0, 40.0)):
        stop = Stop.of(0 * one, v * one, 0 * one, a * one, j * one)
        expected = 2 * np.sqrt(v / j) if v < a * a / j else v / a + a / j
        assert stop.duration[0] == pytest.approx(expected) and stop.rest[0] == pytest.approx(v * expected / 2)


def test_the_stop_agrees_with_ruckig():
    ruckig = pytest.importorskip("ruckig")
    rng, plan = np.random.default_rng(0), ruckig.InputParameter(1)
    plan.control_interface = ruckig.ControlInterface.Velocity
    plan.target_velocity = plan.target_acceleration = plan.current_position = [0.0]
    for _ in range(300):
        a, j = rng.uniform(1, 20), rng.uniform(1, 5000)
        v, push = rng.normal() * 2, rng.uniform(-a, a)
        plan.current_velocity, plan.current_acceleration, plan.max_acceleration, plan.max_jerk = [v], [push], [a], [j]
        trajectory = ruckig.Trajectory(1)
        ruckig.Ruckig(1).calculate(plan, trajectory)
        stop = Stop.of(*(np.array([x]) for x in (0.0, v, push, a, j)))
        extrema = trajectory.position_extrema[0]
        got = [stop.duration[0], *(x[0] for x in stop.span())]
        np.testing.assert_allclose(got, [trajectory.duration, extrema.min, extrema.max], atol=1e-9)
