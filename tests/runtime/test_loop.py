"""The one loop, alone and driving an arm made of numbers."""

from __future__ import annotations

import time

import numpy as np
import pytest
from arms import PERIOD_NS, DeltaSolver, NumberArm, arm

from policies.hold import HoldPolicy, ScriptedPolicy
from vla.errors import ConfigError, EmbodimentMismatch
from vla.policy import InferResult
from vla.runtime.clock import MonotonicClock, VirtualClock
from vla.runtime.gate import Gate, Reason, Verdict
from vla.runtime.loop import ControlLoop, Delay, run_episode
from vla.runtime.scheduler import OverlappedScheduler, SequentialScheduler
from vla.runtime.trace import Trace
from vla.types import ActionChunk

START = np.array([0.0, 0.0, 1.0, 0.04])


def chunk(x: float = 0.02, length: int = 12) -> np.ndarray:
    actions = np.zeros((length, 4), np.float32)
    actions[:, 0], actions[:, 3] = x, 1.0
    return actions


def make(embodiment=None, scheduler=None, solver=None, **gate) -> ControlLoop:
    embodiment = embodiment or arm()
    solver = solver or (DeltaSolver() if embodiment.action_space == "ee_delta" else None)
    trace = Trace(embodiment, 2000)
    return ControlLoop(embodiment, scheduler or SequentialScheduler(), Gate(embodiment, **gate), solver, trace)


class Bench:
    """A loop with one long chunk in it, ticked by hand; the joints follow."""

    def __init__(self, actions: np.ndarray, **options):
        self.loop, self.now_ns = make(**options), 0
        self.loop.reset(START, 0)
        self.offer(actions)

    def offer(self, actions: np.ndarray) -> str:
        context = self.loop.scheduler.context(self.now_ns, 0)
        return self.loop.scheduler.submit(InferResult(ActionChunk(actions, context.start_ns, 0.05)), self.now_ns)

    def tick(self, beat: bool = True, positions="follow", dt_ns: int = PERIOD_NS):
        if beat:
            self.loop.heartbeat(self.now_ns)
        measured = self.loop.gate.command if isinstance(positions, str) else positions
        command = self.loop.tick(self.now_ns, measured, np.zeros(4), self.now_ns)
        self.now_ns += dt_ns
        return command


def test_actions_start_from_the_last_command_and_the_gripper_is_metres():
    bench = Bench(chunk(0.005))
    values = [bench.tick().values for _ in range(3)]
    np.testing.assert_allclose([v[0] for v in values], [0.005, 0.010, 0.015], atol=1e-9)
    assert values[2][3] > 0.04


def test_a_solver_that_fails_brakes_and_the_loop_lives():
    class Failing(DeltaSolver):
        def solve(self, action, reference):
            if action[0] > 0.02:
                raise RuntimeError("no solution")
            return super().solve(action, reference)

    actions = chunk(0.01)
    actions[4:, 0] = 0.03
    bench = Bench(actions, solver=Failing())
    commands = [bench.tick() for _ in range(8)]
    assert bench.loop.last[1].reason is Reason.KINEMATICS
    assert "kinematics" in commands[-1].note
    assert np.array_equal(commands[-1].values, commands[-2].values)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_action_that_is_not_a_number_never_reaches_the_solver(bad):
    class Watching(DeltaSolver):
        def solve(self, action, reference):
            assert np.all(np.isfinite(action))
            return super().solve(action, reference)

    actions = chunk(0.01)
    actions[3, 2] = bad
    bench = Bench(actions, solver=Watching())
    verdicts = [(bench.tick(), bench.loop.last[1].reason)[1] for _ in range(6)]
    assert verdicts[3] is Reason.ACTION_INVALID and verdicts[5] is Reason.ACTION_INVALID


def test_a_chunk_of_the_wrong_width_stops():
    bench = Bench(np.zeros((4, 3), np.float32))
    bench.tick()
    assert bench.loop.last[1].reason is Reason.ACTION_INVALID


def test_joint_states_that_never_come_or_turn_nan_stop():
    bench = Bench(chunk())
    bench.tick(positions=None)
    assert bench.loop.last[1].reason is Reason.JOINT_STATE_INVALID
    bench = Bench(chunk())
    bench.tick(positions=START * np.nan)
    assert bench.loop.last[1].reason is Reason.JOINT_STATE_INVALID


def test_silence_is_acted_upon_between_slots():
    bench = Bench(chunk(0.02))
    for _ in range(5):
        bench.tick()
    moving = bench.loop.gate.velocity[0]
    # The last beat was at tick 4. Ticks 5 and 6 are silent for 50 and 100 ms; an extra tick comes at 150 ms + 10 ms.
    bench.tick(beat=False)
    bench.tick(beat=False, dt_ns=5_000_000)
    standing = bench.tick(beat=False, dt_ns=55_000_000)
    assert bench.loop.last[1].verdict is not Verdict.STOP
    assert np.array_equal(standing.values, bench.loop.gate.command)
    bench.tick(beat=False)
    assert bench.loop.last[1].reason is Reason.HEARTBEAT
    assert bench.loop.gate.velocity[0] < moving


def test_an_operator_stop_holds_until_released_and_a_newer_chunk():
    bench = Bench(chunk(0.01, 30), scheduler=OverlappedScheduler(20, 2))
    for _ in range(4):
        bench.tick()
    bench.loop.request_stop()
    for _ in range(8):
        held = bench.tick()
    assert bench.loop.last[1].reason is Reason.OPERATOR and bench.loop.gate.at_rest
    bench.loop.request_stop(False)
    assert np.array_equal(bench.tick().values, held.values)
    while not bench.loop.scheduler.should_infer(bench.now_ns):
        bench.tick()
    assert bench.offer(chunk(0.01)) == ""
    for _ in range(4):
        command = bench.tick()
    assert command.values[0] > held.values[0]


def test_tool_speed_is_limited_before_the_solver_and_reported():
    bench = Bench(chunk(0.02), embodiment=arm(max_tool_speed_m_s=0.1))
    commands = [bench.tick().values[0] for _ in range(6)]
    assert commands[-1] - commands[-2] == pytest.approx(0.005)
    assert bench.loop.last[1].reason is Reason.TOOL_SPEED and bench.loop.last[1].verdict is Verdict.RESHAPE


def test_absolute_joint_actions_need_no_solver():
    embodiment = arm("joint_position")
    loop = make(embodiment)
    goal = np.tile(np.array([0.35, 0, 1, 0.04], np.float32), (40, 1))
    result = run_episode(NumberArm(embodiment), ScriptedPolicy(embodiment, [goal]), loop, seed=1)
    assert result.success and result.gate["stop"] == 0


# ---- episodes ----
def episode(scheduler, latency_s=0.0, seed=1):
    environment, loop = NumberArm(arm()), make(scheduler=scheduler)
    result = run_episode(environment, ScriptedPolicy(arm(), [chunk()]), loop, seed, latency_s=latency_s)
    return result, environment.commands, loop


def test_an_episode_reports_what_happened():
    seen = []
    environment, loop = NumberArm(arm()), make()
    policy = ScriptedPolicy(arm(), [chunk()])
    result = run_episode(environment, policy, loop, seed=7, task="left", on_step=lambda *item: seen.append(item))
    assert result.success and result.seed == 7 and result.task == "left" and result.family == "numbers"
    assert result.moved == "joint1" and result.instruction == "move joint 1 to the left"
    assert result.steps == len(seen) == len(environment.commands) == sum(result.gate.values())
    assert result.executed == result.steps and result.missed == result.late == result.refused == 0
    assert result.chunks == len(result.inference_ms) == 2
    observation, command, info = seen[-1]
    assert observation.stamp_ns == command.stamp_ns == info["stamp_ns"] and not info["success"]
    assert loop.trace.rows == result.steps and loop.trace.episodes[0].success


def test_episodes_repeat_and_latency_within_the_lead_changes_only_the_start():
    first, commands, _ = episode(OverlappedScheduler(8, 2))
    again, same, _ = episode(OverlappedScheduler(8, 2))
    assert np.array_equal(commands, same) and first.steps == again.steps
    late, delayed, _ = episode(OverlappedScheduler(8, 2), latency_s=0.1)
    assert late.missed == 0 and late.steps == first.steps + 2
    assert np.array_equal(delayed[:2], [START, START]), "two periods of waiting at rest"
    np.testing.assert_allclose(delayed[2:], commands, atol=1e-12)


def test_sequential_execution_pays_for_latency_with_missed_slots():
    result, _, _ = episode(SequentialScheduler(), latency_s=0.1)
    assert result.success and result.missed == 2 and result.gate["stop"] == 2


class Joining(ScriptedPolicy):
    """Chunks that begin with the committed actions, as real-time chunking gives them. Chunk k's own actions are k + 1
    micrometres long; computing takes as long as it likes."""

    def __init__(self, embodiment, naps_s=(0.0,)):
        super().__init__(embodiment, [np.zeros((16, 4), np.float32)])
        self.contexts, self._naps_s = [], naps_s

    def _play(self, context):
        time.sleep(self._naps_s[len(self.contexts) % len(self._naps_s)])
        result = super()._play(context)
        self.contexts.append(context)
        result.chunk.actions[:, 0] = len(self.contexts) * 1e-6
        committed = np.empty((0, 4)) if context.committed is None else context.committed
        result.chunk.actions[: len(committed)] = committed
        return result


def replayed(delays_ms, policy=None, scheduler=None):
    """(loop, policy) after an episode whose inference k took delays_ms[k], the last again and again."""
    policy, loop = policy or Joining(arm()), make(scheduler=scheduler or OverlappedScheduler(8, 2))
    delays = [Delay(round(ms * 0.75e6), round(ms * 0.25e6)) for ms in delays_ms]
    run_episode(NumberArm(arm()), policy, loop, 1, delays=lambda number: delays[min(number, len(delays) - 1)])
    return loop, policy


def test_a_spike_in_mid_episode_skips_exactly_what_was_due_before_the_chunk_came():
    loop, _ = replayed([30, 30, 190, 30])
    trace = loop.trace
    rows = slice(0, trace.rows)
    ticks, chunks, index = trace.tick_ns[rows], trace.chunk[rows], trace.index[rows]
    for number in range(4):
        begin = int(np.argmax(chunks == number))
        seen, came = trace.infer_stamp_ns[number], trace.infer_end_ns[number]
        assert trace.stamp_ns[begin] == seen and index[begin] >= 0
        ran = np.sum((ticks >= seen) & (ticks < ticks[begin]) & (chunks >= 0))
        assert index[begin] == ran, "what was executed since the observation, no more and no less"
        assert ticks[begin] >= came
    begun = [int(index[chunks == number][0]) for number in range(4)]
    assert begun == [0, 2, 4, 2], "the spike of 190 ms costs four actions, and nothing afterwards"
    assert loop.scheduler.missed_actions == 0 and np.all(chunks[1:] >= 0)
    took = trace.infer_end_ns - trace.infer_start_ns
    assert (took[:3] // 1_000_000).tolist() == [30, 30, 190]
    assert trace.infer_ms[2] == pytest.approx(142.5), "a trace of simulated latency tells simulated times"


@pytest.mark.parametrize("delay_ms", [0, 20, 50, 99, 100])
def test_what_was_committed_is_what_runs_while_the_chunk_is_on_its_way(delay_ms):
    """Within the lead, every chunk begins behind its committed actions: nothing of it is dropped, nothing repeated."""
    loop, policy = replayed([delay_ms])
    trace = loop.trace
    for number in range(1, 4):
        context, seen = policy.contexts[number], trace.infer_stamp_ns[number]
        after = np.flatnonzero(trace.tick_ns[: trace.rows] >= seen)
        np.testing.assert_array_equal(trace.action[after[:2]].astype(np.float32), context.committed)
        assert trace.chunk[after[:3]].tolist() == [number - 1, number - 1, number] and trace.index[after[2]] == 2


def test_a_chunk_later_than_the_lead_was_told_less_than_what_ran_and_still_drops_all_of_it():
    loop, policy = replayed([30, 30, 190, 30])
    trace, context = loop.trace, policy.contexts[2]
    after = np.flatnonzero(trace.tick_ns[: trace.rows] >= trace.infer_stamp_ns[2])
    assert len(context.committed) == 2
    np.testing.assert_array_equal(trace.action[after[:2]].astype(np.float32), context.committed)
    assert trace.chunk[after[:5]].tolist() == [1, 1, 1, 1, 2]
    left = context.previous.actions[context.executed :]
    np.testing.assert_array_equal(trace.action[after[:4]].astype(np.float32), left[:4])


@pytest.mark.parametrize("scheduler", [SequentialScheduler, OverlappedScheduler])
def test_the_same_delays_give_the_same_episode_however_long_computing_takes(scheduler):
    delays = [35, 120, 5, 60, 260, 30]
    slow, _ = replayed(delays, Joining(arm(), (0.0, 0.02, 0.005)), scheduler(8))
    fast, _ = replayed(delays, Joining(arm()), scheduler(8))
    for name in ("tick_ns", "due_ns", "action", "command", "verdict", "reason", "chunk", "index", "stamp_ns", "missed"):
        np.testing.assert_array_equal(getattr(slow.trace, name), getattr(fast.trace, name), name)
    for name in ("infer_stamp_ns", "infer_start_ns", "infer_end_ns", "infer_ms"):
        np.testing.assert_array_equal(getattr(slow.trace, name), getattr(fast.trace, name), name)


def test_delays_of_one_length_are_a_constant_latency():
    _, same, _ = episode(OverlappedScheduler(8, 2), latency_s=0.1)
    environment, loop = NumberArm(arm()), make(scheduler=OverlappedScheduler(8, 2))
    policy = ScriptedPolicy(arm(), [chunk()])
    run_episode(environment, policy, loop, 1, delays=lambda number: Delay(60_000_000, 40_000_000))
    assert np.array_equal(environment.commands, same)


def test_a_policy_that_is_slower_than_its_chunks_are_long_is_refused_not_obeyed():
    result, commands, _ = episode(SequentialScheduler(max_age_s=0.5), latency_s=0.6)
    assert not result.success and result.executed == 0 and result.refused > 0
    assert np.ptp(np.array(commands), axis=0).max() == 0.0


def test_holding_moves_nothing():
    for embodiment in (arm(), arm("joint_position"), arm("osc_delta")):
        environment = NumberArm(embodiment)
        result = run_episode(environment, HoldPolicy(embodiment), make(embodiment), seed=1)
        assert not result.success and result.gate["stop"] == 0
        moved = np.ptp(np.array(environment.commands), axis=0)
        assert np.all(moved[:3] < 1e-7)


def test_a_policy_for_another_arm_is_refused_by_name():
    with pytest.raises(EmbodimentMismatch, match=r"rate_hz.*gripper_open"):
        run_episode(NumberArm(arm()), HoldPolicy(arm(rate_hz=10.0, gripper_open=-1)), make(), seed=1)


def test_loops_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="kinematics"):
        ControlLoop(arm(), SequentialScheduler(), Gate(arm()))
    with pytest.raises(ConfigError, match="chunks"):
        ScriptedPolicy(arm(), [np.zeros((4, 3))])


def test_clocks():
    clock = VirtualClock(5)
    assert clock.advance(10) == 15 == clock.now_ns()
    clock.sleep_until(20)
    clock.sleep_until(3)
    assert clock.now_ns() == 20
    clock.set(1)
    assert clock.now_ns() == 1
    with pytest.raises(ConfigError, match="delta_ns"):
        clock.advance(-1)
    real = MonotonicClock()
    before = real.now_ns()
    real.sleep_until(before + 2_000_000)
    assert real.now_ns() >= before + 2_000_000
