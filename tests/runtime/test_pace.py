"""Chunks that are too fast: slowed down as a whole, on their own path, with due times that move; or refused."""

from __future__ import annotations

import numpy as np
import pytest
from arms import PERIOD_NS, DeltaSolver, arm
from test_gate_jerk import START, largest_shares, smooth_arm

from vla.policy import DecodeReport, InferResult
from vla.runtime.gate import Gate, Reason, Verdict
from vla.runtime.limits import JointLimits
from vla.runtime.loop import ControlLoop
from vla.runtime.pace import factor_for, stretched, tool_factor
from vla.runtime.scheduler import OverlappedScheduler
from vla.types import ActionChunk

PERIOD_S = PERIOD_NS * 1e-9
ROBOT = smooth_arm("joint_position", max_time_scale=2.5)
LIMITS = JointLimits.of(ROBOT)
T = 24


def wave(amplitude: float) -> np.ndarray:
    """float64[T, 4]: all joints on one half wave, at rest at both ends; the gripper opens in the middle."""
    share = 0.5 * (1 - np.cos(np.pi * np.arange(1, T + 1) / T))
    rows = START + amplitude * share[:, None] * np.array([1.0, -0.5, 0.4, 0.0])
    rows[T // 2 :, 3] = 0.08
    return rows


def shares(rows: np.ndarray) -> np.ndarray:
    """Largest shares of the limits that the arm takes on rows one period apart, from the first action on."""
    still = np.where(np.arange(4) == 3, 0.0, rows)  # the gripper moves apart from the arm
    return largest_shares(np.arange(len(rows)) * PERIOD_S, still)


def test_a_chunk_within_its_limits_is_left_alone():
    path = np.vstack([START, wave(0.2)])
    assert factor_for(path, ROBOT, LIMITS) == 1.0


@pytest.mark.parametrize("amplitude", [0.9, 1.2, 1.4])
def test_one_factor_brings_a_fast_chunk_within_all_limits_on_the_same_path(amplitude):
    rows = wave(amplitude)
    factor = factor_for(np.vstack([START, rows]), ROBOT, LIMITS)
    assert factor > 1.0 and np.max(shares(rows)) > 1.0
    slow = stretched(rows, START, ROBOT, factor)
    assert len(slow) == int(np.ceil(factor * T - 1e-9)) and np.max(shares(slow)) <= 1.0 + 1e-3
    assert np.max(shares(slow)) > 0.9, "no slower than it must be"
    np.testing.assert_allclose(slow[-1], rows[-1], atol=1e-6)
    # On the path: the joints move in proportion, as they do in the chunk.
    moved = (slow - START)[:, :3]
    np.testing.assert_allclose(moved, moved[:, :1] * np.array([1.0, -0.5, 0.4]), atol=1e-6)
    assert set(slow[:, 3].tolist()) == set(rows[:, 3].astype(np.float32).tolist()), "a gripper is not interpolated"
    switch = int(np.argmax(slow[:, 3] > 0.06))
    assert switch / factor == pytest.approx(T // 2, abs=1.0), "and changes where it changed on the path"


def test_a_chunk_that_begins_far_away_is_too_fast_for_any_allowed_factor():
    rows = wave(0.2) + np.array([0.9, 0, 0, 0])
    assert factor_for(np.vstack([START, rows]), ROBOT, LIMITS) > ROBOT.max_time_scale


def test_deltas_add_up_to_the_same_motion_and_the_tool_speed_counts():
    robot = arm(max_tool_speed_m_s=0.4)
    deltas = np.zeros((10, 4))
    deltas[:, 0], deltas[:, 3] = 0.03, np.where(np.arange(10) < 5, -1, 1)
    factor = tool_factor(deltas, robot)
    assert factor == pytest.approx(1.5)
    slow = stretched(deltas, None, robot, factor)
    np.testing.assert_allclose(slow.sum(axis=0)[0], 0.3, atol=1e-6)
    np.testing.assert_allclose(slow[:, 0], 0.02, atol=1e-6)
    assert len(slow) == 15 and np.array_equal(slow[:, 3], np.where(np.arange(15) < 7, -1, 1))


# ---- in the loop ----
class Loop:
    def __init__(self, robot=ROBOT, kinematics=None, execute: int = 12):
        self.loop = ControlLoop(robot, OverlappedScheduler(execute, 2), Gate(robot), kinematics)
        self.now_ns, self.commands = 0, [START]
        self.loop.reset(START, 0)

    def offer(self, rows: np.ndarray) -> None:
        scheduler = self.loop.scheduler
        scheduler.context(self.now_ns, 0)
        assert not scheduler.submit(InferResult(ActionChunk(rows.astype(np.float32), self.now_ns, PERIOD_S),
                                                DecodeReport()), self.now_ns)  # fmt: skip

    def tick(self):
        self.loop.heartbeat(self.now_ns)
        command = self.loop.tick(self.now_ns, self.loop.gate.command, None, self.now_ns)
        self.commands.append(command.values)
        self.now_ns += PERIOD_NS
        return self.loop.last


def test_the_loop_slows_the_chunk_down_says_so_and_makes_its_actions_due_later():
    loop, rows = Loop(execute=T), wave(0.9)
    loop.offer(rows)
    factor = factor_for(np.vstack([START, rows.astype(np.float32)]), ROBOT, LIMITS)
    ticks = int(np.ceil(factor * T - 1e-9))
    for tick in range(ticks):
        due, decision = loop.tick()
        assert due.due_ns == tick * PERIOD_NS and due.index == int(tick / factor + 1e-6)
        assert decision.verdict is Verdict.RESHAPE
        assert loop.loop.scheduler.time_scale == pytest.approx(factor, rel=1e-3)
        # The gate blends the start in, which at the limits of the chunk takes until these let it catch up.
        assert decision.reason is Reason.TIME_SCALED or tick < 0.9 * ticks
    assert loop.loop.scheduler.queue_depth == 0 and loop.loop.scheduler.missed_actions == 0
    np.testing.assert_allclose(loop.commands[-1], rows[-1], atol=2e-3)
    stream = np.array([START] * 3 + loop.commands)
    assert np.all(largest_shares(np.arange(len(stream)) * PERIOD_S, stream) <= 1 + 1e-6)


def test_the_next_chunk_begins_after_what_was_really_executed():
    loop, rows = Loop(execute=12), wave(0.9)
    loop.offer(rows)
    loop.tick()
    factor = loop.loop.scheduler.time_scale
    while not loop.loop.scheduler.should_infer(loop.now_ns):
        loop.tick()
    asked = len(loop.commands) - 1
    assert asked == int(np.ceil(12 * factor)) - 2, "12 actions take longer, and so the request comes later"
    context = loop.loop.scheduler.context(loop.now_ns, 0)
    assert context.executed == int(asked / factor + 1e-6)
    assert context.previous.period_s == pytest.approx(factor * PERIOD_S)
    for _ in range(2):
        loop.tick()
    loop.loop.scheduler.submit(
        InferResult(ActionChunk(wave(0.1).astype(np.float32), context.start_ns, PERIOD_S), DecodeReport()), loop.now_ns
    )
    due, _ = loop.tick()
    assert due.chunk_number == 1 and due.index == int(2 / factor + 1e-6)


def test_a_chunk_that_is_too_fast_brakes_the_arm_until_a_newer_one_comes():
    loop = Loop()
    loop.offer(wave(0.2))
    for _ in range(6):
        loop.tick()
    loop.loop.scheduler.reset(loop.now_ns)
    loop.offer(wave(0.2) + np.array([0.9, 0, 0, 0]))
    seen = [loop.tick()[1] for _ in range(12)]
    assert all(d.verdict is Verdict.STOP and d.reason is Reason.CHUNK_TOO_FAST for d in seen)
    assert loop.loop.gate.at_rest
    loop.loop.scheduler.reset(loop.now_ns)
    loop.offer(np.tile(loop.loop.gate.command, (8, 1)))
    assert loop.tick()[1].verdict is Verdict.PASS
    stream = np.array([START] * 3 + loop.commands)
    assert np.all(largest_shares(np.arange(len(stream)) * PERIOD_S, stream) <= 1 + 1e-6)


def test_end_effector_chunks_are_looked_at_through_their_joints():
    class Solver(DeltaSolver):
        def path(self, actions, reference):
            rows = []
            for action in actions:
                reference = self.solve(action, reference)
                rows.append(reference)
            return np.array(rows)

    loop = Loop(smooth_arm("ee_delta", max_time_scale=2.5), Solver(), execute=8)
    deltas = np.zeros((12, 4))
    deltas[:, 1], deltas[:, 3] = -0.15 * np.sin(np.pi * np.arange(1, 13) / 13), 1.0  # 3 rad/s where 2 are allowed
    loop.offer(deltas)
    loop.tick()
    assert 1.4 < loop.loop.scheduler.time_scale < 2.0
    for _ in range(20):
        due, _ = loop.tick()
        if due is None:
            break
    assert loop.commands[-1][1] == pytest.approx(deltas[:, 1].sum(), abs=0.02)


def test_robots_that_do_not_ask_for_it_are_not_slowed_down():
    loop = Loop(smooth_arm("joint_position"))
    loop.offer(wave(0.9))
    assert loop.tick()[0].index == 0 and loop.loop.scheduler.time_scale == 1.0


@pytest.mark.parametrize("robot", [ROBOT, arm("joint_position")], ids=["jerk limits", "none"])
def test_what_is_planned_after_a_command_keeps_the_limits_and_ends_at_rest(robot):
    loop = Loop(robot)
    loop.offer(wave(0.5))
    for _ in range(10):
        loop.tick()
        path = loop.loop.command_path(2)
        np.testing.assert_array_equal(path.positions[0], loop.commands[-1])
        assert not np.any(path.velocities[-1]) and not np.any(path.accelerations[-1])
        before = np.array(([START] * 3 + loop.commands)[-4:-1])
        t = np.concatenate([PERIOD_S * np.arange(-2, 1), path.times_s])
        found = largest_shares(t, np.vstack([before, path.positions]))
        assert np.all(found[: 3 if robot is ROBOT else 2] <= 1 + 1e-6)
    # With nothing more coming the arm does what was planned last.
    for row in path.positions[1:3]:
        loop.tick()
        np.testing.assert_allclose(loop.commands[-1], row, atol=1e-9)
