"""Motion read from a trace, against traces whose numbers can be counted by hand."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from arms import PERIOD_NS, DeltaSolver, NumberArm, arm

from policies.hold import ScriptedPolicy
from vla.runtime.gate import Decision, Gate, Reason, Verdict
from vla.runtime.loop import ControlLoop, Delay, run_episode
from vla.runtime.motion import Jumps, Motion, motion, pooled
from vla.runtime.scheduler import DueAction, SequentialScheduler
from vla.runtime.trace import Trace

MOVES = (0.010, 0.010, 0.012, 0.030, 0.030)  # metres per period of joint 1, two chunks: three actions, then two


def walk(chunks, moves, verdicts=(), waits: int = 1, embodiment=None) -> Trace:
    """Joint 1 follows `moves` per period; chunk -1: nothing was due. Before that the arm waits for the first chunk."""
    trace, x, tick = Trace(embodiment or arm(), 50), 0.0, 10
    for _ in range(waits):
        trace.tick(0, None, Decision(Verdict.STOP, Reason.WAITING, np.zeros(4)), np.zeros(4), 0, 1.0)
        tick += 1
    for place, (number, move) in enumerate(zip(chunks, moves)):
        verdict = verdicts[place] if verdicts else Verdict.PASS if number >= 0 else Verdict.STOP
        now, x = tick * PERIOD_NS, x + move
        due = None
        if number >= 0:
            seen_ns = now - 2 * PERIOD_NS * (number + 1)
            due = DueAction(np.array([move, 0, 0, 1], np.float32), now, place, number, seen_ns)
        trace.tick(now, due, Decision(verdict, Reason.NONE, np.array([x, 0, 0, 0.1 * tick])), np.zeros(4), 0, 1.0)
        tick += 1
    return trace


def test_changes_of_velocity_are_told_apart_by_where_chunks_meet() -> None:
    found = motion(walk((0, 0, 0, 1, 1), MOVES))
    assert (found.periods, found.pauses, found.longest_pause, found.switches) == (5, 0, 0, 1)
    # 20 periods per second: 2 and 18 mm more per period are 40 and 360 mm/s; the gripper's opening is no joint here.
    assert astuple(found.joints_rad_s) == pytest.approx((0.36, 0.36, 0.04 / 3, 0.04))
    assert astuple(found.tool_mm_s) == pytest.approx((360.0, 360.0, 40 / 3, 40.0), rel=1e-5)
    # ages: three actions of two periods, two of four
    assert found.age_ms == pytest.approx((3 * 100 + 2 * 200) / 5)
    speeds = np.diff(np.concatenate([[0.0], np.cumsum(MOVES)])) * 20
    jerk = np.zeros((3, 3))
    jerk[:, 0] = np.diff(speeds, n=2) * 400
    assert found.jerk_rad_s3 == pytest.approx(np.sqrt(np.mean(jerk**2)))


def test_a_pause_is_between_chunks_and_its_periods_are_counted() -> None:
    found = motion(walk((0, 0, -1, -1, 1, -1, 1), (0.01, 0.01, 0.004, 0.0, 0.01, 0.0, 0.01)))
    assert (found.periods, found.pauses, found.longest_pause, found.switches) == (7, 3, 2, 1)
    assert found.tool_mm_s is not None and found.joints_rad_s is not None
    assert found.tool_mm_s.switch_max == pytest.approx(200.0), "an arm that stops and starts again jumps twice"
    assert found.joints_rad_s.within_max < 1e-9 and found.joints_rad_s.switch_mean == pytest.approx(0.2)


def test_an_action_that_the_gate_stopped_is_a_pause() -> None:
    verdicts = (Verdict.PASS, Verdict.STOP, Verdict.STOP, Verdict.RESHAPE, Verdict.PASS)
    found = motion(walk((0, 0, 0, 0, 0), MOVES, verdicts))
    assert (found.pauses, found.longest_pause) == (2, 2) and found.age_ms == pytest.approx(100.0)


def test_an_arm_that_begins_at_once_begins_from_where_it_stood() -> None:
    early, late = (motion(walk((0, 0, 1), (0.01, 0.01, 0.01), waits=waits)) for waits in (0, 3))
    assert early == late and early.periods == 3


def test_what_a_robot_does_not_tell_is_none() -> None:
    found = motion(walk((0, 0, 1), (0.1, 0.1, 0.2), embodiment=arm("osc_delta")))
    assert (found.joints_rad_s, found.tool_mm_s, found.jerk_rad_s3) == (None, None, None) and found.switches == 1
    assert motion(walk((0, 1), (0.1, 0.1), embodiment=arm("joint_position"))).tool_mm_s is None
    trace = walk((0, 1), (0.1, 0.1))
    trace.stamp_ns[:] = -1
    assert motion(trace).age_ms is None
    nothing = motion(walk((), ()))
    assert (nothing.periods, nothing.age_ms, nothing.jerk_rad_s3, nothing.joints_rad_s) == (0, None, None, Jumps())


def test_it_comes_back_from_plain_data_and_episodes_are_pooled() -> None:
    short, long = motion(walk((0, 0, 1), (0.01,) * 3)), motion(walk((0, -1, -1, 1, 1), (0.01, 0.0, 0.0, 0.01, 0.01)))
    assert Motion.from_dict(long.to_dict()).to_dict() == long.to_dict() != short.to_dict()
    both = pooled([short, long])
    assert (both["periods"], both["pauses"], both["pause_share"], both["longest_pause"]) == (8, 2, 0.25, 2)
    assert both["switches"] == 1.0 and both["joints_rad_s"]["switch_max"] == pytest.approx(0.1)
    assert pooled([])["pause_share"] is None and pooled([])["tool_mm_s"] is None


def test_stop_and_think_pauses_for_as_many_periods_as_it_thinks() -> None:
    trace = Trace(arm(), 200)
    loop = ControlLoop(arm(), SequentialScheduler(4), Gate(arm()), DeltaSolver(), trace)
    actions = np.tile(np.array([0.005, 0, 0, 1], np.float32), (8, 1))
    run_episode(NumberArm(arm()), ScriptedPolicy(arm(), [actions]), loop, 1, delays=lambda number: Delay(120_000_000))
    found = motion(trace)
    # of 40 periods three pass before the first action; then four actions and three periods of thinking, in turn
    assert found.periods == 37 and found.pauses == 15 and found.longest_pause == 3 and found.switches == 5
    assert found.age_ms == pytest.approx(150 + 75, abs=10)
