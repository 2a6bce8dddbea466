"""Single rules of the gate; what holds for any input is in test_gate_properties.py."""

from __future__ import annotations

from dataclasses import replace

import gate_inputs
import numpy as np
import pytest
from arms import JOINTS, arm
from gate_inputs import START

from vla.errors import ConfigError, ObservationError
from vla.resources import load_embodiment
from vla.runtime.gate import Gate, Reason, Verdict
from vla.runtime.limits import JointLimits, approach_speed, braked, limit_tool, velocity_bounds


class Drive(gate_inputs.Drive):
    def cruise(self, ticks=4, chunk=0):
        """joint1 at 0.5 rad/s."""
        for k in range(1, ticks + 1):
            decision = self.step(self.gate.command + np.array([min(0.5, 0.2 * k) * 0.05, 0, 0, 0]), chunk=chunk)
        return decision

    def until_rest(self, chunk=0):
        ticks = 0
        while not self.gate.at_rest:
            self.step(None, chunk=chunk)
            ticks += 1
            assert ticks < 100
        return ticks


def test_a_target_within_limits_passes_exactly():
    drive = Drive()
    for k in range(1, 10):
        target = START + np.array([0.002, -0.004, 0.001, 0.0]) * k
        decision = drive.step(target)
        assert decision.verdict is Verdict.PASS and decision.reason is Reason.NONE
        np.testing.assert_allclose(decision.values, target, atol=1e-12)


def test_an_over_fast_target_is_slowed_as_a_whole_not_joint_by_joint():
    drive = Drive()
    direction = np.array([0.04, -0.02, 0.01, 0.0])
    for _ in range(6):
        before = drive.gate.command
        decision = drive.step(before + 3 * direction)
        step = decision.values - before
        assert decision.verdict is Verdict.RESHAPE and decision.reason in (Reason.VELOCITY, Reason.ACCELERATION)
        np.testing.assert_allclose(step / np.linalg.norm(step), direction / np.linalg.norm(direction), atol=1e-9)
    assert abs(step[2] / 0.05) <= JOINTS[2].max_velocity + 1e-12


def test_a_jump_of_an_absolute_goal_is_met_without_overshoot():
    drive = Drive(arm("joint_position"))
    goal = np.array([0.5, 0.4, 1.3, 0.04])
    for _ in range(80):
        decision = drive.step(goal)
        assert np.all(decision.values[:3] <= goal[:3] + 1e-12)
    np.testing.assert_allclose(decision.values, goal, atol=1e-9)
    assert drive.gate.at_rest and decision.verdict is Verdict.PASS


def test_an_absolute_goal_that_moves_is_followed_without_lag():
    drive = Drive(arm("joint_position"))
    goal = START.copy()
    for k in range(60):
        goal = goal + np.array([0.01 * min(1, k / 10), 0, 0, 0])
        decision = drive.step(goal)
    np.testing.assert_allclose(decision.values, goal, atol=1e-9)
    assert decision.verdict is Verdict.PASS


def test_the_gripper_slews_without_alarm_and_without_slowing_the_arm():
    drive = Drive(start=[0, 0, 1, 0.0])
    for k in range(1, 12):
        decision = drive.step([0.002 * k, 0, 1, 0.08])
        assert decision.verdict is Verdict.PASS
        assert decision.values[0] == pytest.approx(0.002 * k)
        assert decision.values[3] <= 0.08 + 1e-12
    assert decision.values[3] == pytest.approx(0.08, abs=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_every_joint_reaches_its_speed_limit_and_no_more(sign):
    for joint, limit in enumerate((1.0, 2.0, 0.5)):
        start = [0.0, -0.5, 1.5, 0.04]
        drive, push = Drive(arm("ee_delta"), start=start), np.zeros(4)
        push[joint] = sign
        speeds = []
        for _ in range(12):
            drive.step(drive.gate.command + push)
            speeds.append(sign * drive.gate.velocity[joint])
        assert max(speeds) == pytest.approx(limit, rel=1e-9)


def test_position_limits_are_kept_and_named():
    drive = Drive()
    for _ in range(60):
        decision = drive.step(drive.gate.command + np.array([0.05, 0, 0, 0]))
    assert decision.values[0] <= 1.0 and decision.values[0] > 0.999
    assert decision.verdict is Verdict.RESHAPE and decision.reason is Reason.POSITION


def test_a_joint_at_its_limit_does_not_freeze_the_others():
    drive = Drive(start=[1.0, 0, 1, 0.04])
    decision = drive.step([1.2, -0.01, 1, 0.04])
    assert decision.values[0] == 1.0 and decision.values[1] == pytest.approx(-0.01)
    assert decision.reason is Reason.POSITION


def test_from_outside_the_limits_only_inward_motion_passes():
    drive = Drive(start=[1.2, 0, 1, 0.04])
    for outward in (0.01, 0.0, 0.5):
        assert drive.step(drive.gate.command + np.array([outward, 0, 0, 0])).values[0] == 1.2
    for _ in range(100):
        before = drive.gate.command[0]
        after = drive.step(drive.gate.command + np.array([-0.004, 0, 0, 0])).values[0]
        assert after < before
    assert after < 1.0


FAULTS = {
    Reason.ACTION_INVALID: {"target": [np.nan, 0, 1, 0.04]},
    Reason.ACTION_STALE: {"due_ns": 0},
    Reason.ACTION_EARLY: {"due_ns": 10**10},
    Reason.JOINT_STATE_INVALID: {"positions": np.array([0, np.nan, 1, 0.04])},
    Reason.JOINT_STATE_STALE: {"positions_stamp_ns": 50_000_000},
    Reason.HEARTBEAT: {"heartbeat_ns": 50_000_000},
    Reason.TRACKING: {"positions": np.array([0.9, 0, 1, 0.04])},
    Reason.OPERATOR: {"fault": Reason.OPERATOR},
    Reason.KINEMATICS: {"fault": Reason.KINEMATICS},
}


@pytest.mark.parametrize("reason", FAULTS, ids=lambda reason: reason.name)
def test_every_fault_brakes_at_once_holds_and_needs_a_newer_chunk(reason):
    drive = Drive()
    drive.cruise()
    speed = drive.gate.velocity[0]
    assert speed == pytest.approx(0.5)
    inputs = dict(FAULTS[reason])
    target = inputs.pop("target", drive.gate.command + np.array([0.025, 0, 0, 0]))
    decision = drive.step(target, **inputs)
    assert decision.verdict is Verdict.STOP and decision.reason is reason and decision.reason.text
    assert drive.gate.velocity[0] == pytest.approx(speed - 4.0 * 0.05)
    decision = drive.step(drive.gate.command + np.array([0.025, 0, 0, 0]))
    assert decision.reason is reason, "healthy again, but still in motion: the brake goes on, and so does the reason"
    drive.until_rest()
    held = drive.gate.command
    decision = drive.step(held + np.array([0.005, 0, 0, 0]))
    assert decision.verdict is Verdict.STOP and np.array_equal(decision.values, held), "same chunk: still held"
    decision = drive.step(held + np.array([0.005, 0, 0, 0]), chunk=1)
    assert decision.verdict is Verdict.PASS and drive.gate.stopped is Reason.NONE


def test_heartbeat_silence_of_150_ms_brakes_although_actions_are_due():
    drive = Drive()
    drive.cruise()
    alive_ns = drive.now_ns
    verdicts = [
        drive.step(drive.gate.command + np.array([0.025, 0, 0, 0]), heartbeat_ns=alive_ns).verdict for _ in range(3)
    ]
    assert verdicts == [Verdict.PASS, Verdict.PASS, Verdict.STOP]


def test_a_pause_between_actions_brakes_but_does_not_latch():
    drive = Drive()
    drive.cruise()
    decision = drive.step(None)
    assert decision.verdict is Verdict.STOP and decision.reason is Reason.NO_ACTION
    assert drive.step(drive.gate.command + drive.gate.velocity * 0.05).verdict is Verdict.PASS


def test_a_clock_that_jumps_back_stops():
    drive = Drive()
    drive.cruise()
    before = drive.gate.command
    decision = drive.step(before, dt_ns=-(10**8))
    assert decision.reason is Reason.CLOCK and np.array_equal(decision.values, before)
    assert drive.until_rest() == 3


def test_a_long_gap_between_ticks_starts_again_from_rest():
    drive = Drive()
    drive.cruise()
    before = drive.gate.command
    decision = drive.step(before + np.array([0.5, 0, 0, 0]), dt_ns=2_000_000_000)
    assert decision.values[0] - before[0] == pytest.approx(4.0 * 0.05 * 0.05)


def test_a_closed_gripper_that_measures_open_is_no_tracking_fault():
    drive = Drive(start=[0, 0, 1, 0.0], max_tracking_error=0.02)
    decision = drive.step([0, 0, 1, 0.0], positions=np.array([0, 0, 1, 0.05]))
    assert decision.verdict is Verdict.PASS


def test_a_failing_tool_position_brakes():
    def broken(q):
        raise RuntimeError("no model")

    drive = Drive(arm(workspace_lower=(-1, -1, -1), workspace_upper=(1, 1, 1)), broken)
    decision = drive.step(START)
    assert decision.verdict is Verdict.STOP and decision.reason is Reason.KINEMATICS


def test_what_the_gate_refuses_to_be_built_or_started_with():
    with pytest.raises(ConfigError, match="tool_position"):
        Gate(arm(workspace_upper=(1, 1, 1)))
    with pytest.raises(ConfigError, match="joints"):
        Gate(arm(joints=()))
    with pytest.raises(ConfigError, match="reset"):
        Gate(arm()).step(0, START)
    with pytest.raises(ObservationError, match="joint positions"):
        Gate(arm()).reset(np.array([0, np.nan, 1, 0]), 0)


# ---- operational space ----
def test_osc_passes_clips_and_limits_the_slew():
    drive = Drive(arm("osc_delta"), slew_per_s=4.0)
    assert drive.step([0.1, -0.1, 0.2, 1.0]).verdict is Verdict.PASS
    decision = drive.step([0.9, -0.5, 0.2, -1.0])
    np.testing.assert_allclose(decision.values, [0.3, -0.2, 0.2, -1.0])  # one factor for the arm, the gripper apart
    assert decision.reason is Reason.SLEW
    for _ in range(5):
        decision = drive.step([3.0, 0, 0, 2.0])
    np.testing.assert_allclose(decision.values, [1, 0, 0, 1], atol=1e-12)
    assert decision.verdict is Verdict.RESHAPE and decision.reason is Reason.POSITION


def test_osc_stops_with_zeros():
    drive = Drive(arm("osc_delta"))
    drive.step([0.5, 0, 0, 1.0])
    decision = drive.step([np.nan, 0, 0, 1.0])
    assert decision.reason is Reason.ACTION_INVALID and not np.any(decision.values)
    assert not np.any(drive.step([0.5, 0, 0, 1.0]).values)
    assert drive.step([0.5, 0, 0, 1.0], chunk=1).verdict is Verdict.PASS


# ---- tool speed ----
def test_tool_speed_scales_translation_and_rotation_by_one_factor():
    embodiment = arm(
        action_names=("dx", "dy", "dz", "drz", "gripper"),
        action_units=("m", "m", "m", "rad", "1"),
        max_tool_speed_m_s=0.2,
        max_tool_speed_rad_s=1.0,
    )
    action = np.array([0.03, 0.04, 0.0, 0.02, -1.0])
    limited, scaled = limit_tool(action, embodiment, 0.05)
    assert scaled is Reason.TOOL_SPEED
    np.testing.assert_allclose(limited, [0.006, 0.008, 0.0, 0.004, -1.0])
    small = action * [0.1, 0.1, 0.1, 0.1, 1]
    same, scaled = limit_tool(small, embodiment, 0.05)
    assert scaled is Reason.NONE and same is small


def test_a_tool_that_is_pushed_against_a_wall_slides_along_it():
    embodiment = arm(workspace_lower=(-1, -1, 0.0), workspace_upper=(1, 1, 1))
    action = np.array([0.01, 0.0, -0.02, 1.0])
    limited, reason = limit_tool(action, embodiment, 0.05, tool=np.array([0.0, 0.0, 0.005]))
    assert reason is Reason.WORKSPACE
    np.testing.assert_allclose(limited, [0.01, 0.0, -0.005, 1.0])
    outside = np.array([0.0, 0.0, -0.1])
    np.testing.assert_allclose(limit_tool(action, embodiment, 0.05, outside)[0], [0.01, 0.0, 0.0, 1.0])
    inward = np.array([0.0, 0.0, 0.03, 1.0])
    assert limit_tool(inward, embodiment, 0.05, outside) == (inward, Reason.NONE)


def test_a_joint_that_must_turn_around_does_not_hold_up_the_others():
    drive = Drive()
    drive.cruise()
    before = drive.gate.command
    decision = drive.step(before + np.array([-0.01, 0.01, 0, 0]))
    assert decision.verdict is Verdict.RESHAPE
    assert decision.values[0] - before[0] == pytest.approx((0.5 - 0.2) * 0.05), "still braking"
    assert decision.values[1] - before[1] == pytest.approx(0.01)


# ---- the mathematics ----
def test_the_speed_of_approach_is_the_exact_discrete_optimum():
    a, dt = 4.0, 0.05
    for distance in np.geomspace(1e-6, 2.0, 50):
        speed = float(approach_speed(np.array(distance), np.array(a), dt))
        covered, v = 0.0, speed
        while v > 1e-15:
            covered, v = covered + v * dt, max(v - a * dt, 0)
        assert covered == pytest.approx(distance, rel=1e-9)


def test_the_fastest_allowed_velocity_can_still_brake_before_the_limit_for_any_later_ticks():
    limits = JointLimits.of(arm())
    rng = np.random.default_rng(0)
    for _ in range(300):
        q = rng.uniform(limits.lower, limits.upper)
        v = rng.uniform(-limits.velocity, limits.velocity)
        q, v = q, np.clip(v, *velocity_bounds(q, np.zeros(4), limits, 10.0))
        for _ in range(200):
            dt = rng.uniform(0.001, 0.1)
            v = braked(v, limits, dt)
            q = q + v * dt
        assert np.all(q >= limits.lower - 1e-12) and np.all(q <= limits.upper + 1e-12)


@pytest.mark.parametrize("jerk", [False, True])
@pytest.mark.parametrize("action_space", ["joint_position", "ee_delta"])
def test_the_command_goes_back_to_an_arm_that_does_not_follow(action_space, jerk):
    robot = arm(action_space)
    if jerk:
        robot = replace(robot, joints=tuple(replace(joint, max_jerk=200.0) for joint in robot.joints))
    drive = Drive(robot)
    way = np.array([0.02, 0, 0, 0])
    decisions = [drive.step(drive.gate.command + way, positions=START) for _ in range(40)]
    first = next(k for k, decision in enumerate(decisions) if decision.verdict is Verdict.STOP)
    assert decisions[first].reason is Reason.TRACKING
    # 0.4 rad/s: 0.2 rad beyond what was commanded 0.2 s ago, and a braking distance
    furthest = max(decision.values[0] for decision in decisions) - START[0]
    assert 0.2 < furthest < 0.2 + 0.4 * 0.25 + 0.06
    for _ in range(60):
        drive.step(drive.gate.command + way, positions=START)
    np.testing.assert_allclose(drive.gate.command, START, atol=1e-6)
    assert drive.gate.at_rest
    decision = drive.step(drive.gate.command + way / 10, chunk=1, positions=START)
    assert decision.verdict is not Verdict.STOP, "a newer chunk, of an arm that follows again"


def test_an_arm_that_lags_is_no_fault():
    drive, sent = Drive(arm("joint_position")), [START]
    for k in range(30):
        goal = START + np.array([0.0, 0.05, 0, 0]) * min(k, 10)  # up to 1 rad/s
        decision = drive.step(goal, positions=sent[max(0, len(sent) - 4)])  # 0.2 s behind
        assert decision.verdict is not Verdict.STOP
        sent.append(decision.values)
    assert np.max(np.abs(sent[8] - sent[5])) > 0.1


def test_joint_states_that_are_wrong_are_followed_once_only():
    drive = Drive(arm("joint_position"))
    drive.step(START)
    for _ in range(300):
        decision = drive.step(START, positions=drive.gate.command + np.array([0.3, 0, 0, 0]))
        assert decision.reason is Reason.TRACKING and decision.values[0] <= START[0] + 0.3 + 1e-9


# ---- joints that are sent as velocities ----
@pytest.mark.parametrize("bad", [np.full(8, np.nan), np.zeros(7), None])
def test_a_stop_holds_whatever_is_measured_of_driven_joints(bad) -> None:
    panda = load_embodiment("panda")
    gate = Gate(panda, driven=tuple(range(8)))
    gate.reset(np.array(panda.home), 0)
    known = dict(positions_stamp_ns=50_000_000, heartbeat_ns=50_000_000)
    decision = gate.step(50_000_000, None, positions=bad, fault=Reason.OPERATOR, **known)
    assert decision.reason is Reason.OPERATOR
    np.testing.assert_array_equal(decision.values, panda.home)


@pytest.mark.parametrize("driven", [(), (0,)])
def test_of_joints_sent_both_ways_the_one_that_stuck_does_not_hold_up_the_rest(driven: tuple[int, ...]) -> None:
    """Joint 0 by velocities and noisy, joint 1 by positions and stuck."""
    panda, rng = load_embodiment("panda"), np.random.default_rng(0)
    gate, home = Gate(panda, driven=driven), np.array(panda.home)
    gate.reset(home, 0)
    reasons = []
    for tick in range(1, 300):
        now, target = tick * 50_000_000, home.copy()
        target[1] += min(0.01 * tick, 0.4) if tick < 60 else 0.0
        measured = home + rng.normal(0, 1e-4, 8)
        known = dict(positions=measured, positions_stamp_ns=now, heartbeat_ns=now)
        reasons.append(gate.step(now, target, due_ns=now, chunk_number=tick // 8, **known).reason)
    assert Reason.TRACKING in reasons and reasons[-1] is Reason.NONE
