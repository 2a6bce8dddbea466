"""Temporal ensembling around a policy: published weights, equal moments, one memory per robot, and reuse inside."""

from dataclasses import replace

import numpy as np
import pytest

from policies.ensembling_policy import EnsemblingPolicy
from policies.reuse_policy import ReusePolicy
from tests.decoding.test_reuse import PERIOD_NS, ROBOT, TOKENS, Slots, observation, scheduled
from vla.decoding.chunks import Ensembling
from vla.decoding.reuse import ReuseRule
from vla.errors import ConfigError
from vla.policy import DecodeReport, InferContext, InferResult, Policy, infer
from vla.types import ActionChunk

T = 8


class Says:
    """A policy that says given chunks, a stream per place in the batch, and keeps the contexts it was given."""

    embodiment, horizon = ROBOT, T

    def __init__(self, *streams: np.ndarray):
        self.streams, self.told = [list(stream) for stream in streams], []

    def reset(self, seed: int) -> None: ...

    def infer_batch(self, observations, contexts):
        self.told.append(list(contexts))
        return [
            InferResult(ActionChunk(stream.pop(0), context.start_ns, 0.05), DecodeReport(kept_tokens=TOKENS))
            for stream, context in zip(self.streams, contexts)
        ]


def stream(seed: int = 0, count: int = 6) -> np.ndarray:
    chunks = np.random.default_rng(seed).normal(size=(count, T, 3)).astype(np.float32)
    chunks[:, :, 2] = np.sign(chunks[:, :, 2])
    return chunks


def after(result: InferResult, executed: int, **changes) -> InferContext:
    start_ns = result.chunk.due_ns(executed)
    return InferContext(previous=result.chunk, executed=executed, **{"start_ns": start_ns, **changes})


def run(policy, executed, seen=None) -> list[InferResult]:
    """One robot; executed: actions run before each inference but the first."""
    seen = seen or observation()
    results = [infer(policy, seen, InferContext(start_ns=PERIOD_NS))]
    for count in executed:
        results.append(infer(policy, seen, after(results[-1], count)))
    return results


# ---- what is fused ----
@pytest.mark.parametrize("decay", [0.01, 0.5, -0.5])
def test_each_action_is_the_published_mean_of_all_that_was_said_of_its_moment(decay) -> None:
    chunks, executed = stream(), (2, 1, 3, 2, 4)
    policy = EnsemblingPolicy(Says(chunks), Ensembling(decay))
    assert isinstance(policy, Policy) and policy.horizon == T and policy.embodiment is ROBOT
    begins = np.concatenate(([0], np.cumsum(executed)))
    for index, result in enumerate(run(policy, executed)):
        for place in range(T):
            moment = begins[index] + place
            said = [chunks[i][moment - begins[i]] for i in range(index + 1) if moment - begins[i] < T]
            weights = np.array([np.exp(-decay * i) for i in range(len(said))])  # the oldest has i = 0
            mean = (weights[:, None] * said).sum(axis=0) / weights.sum()
            np.testing.assert_allclose(result.chunk.actions[place, :2], mean[:2], atol=1e-6)
            assert result.chunk.actions[place, 2] == said[-1][2]
        assert result.chunk.start_ns == PERIOD_NS * (1 + begins[index]) and len(result.chunk) == T


def test_the_published_weights_fall_from_the_oldest_on() -> None:
    chunks = np.zeros((3, T, 3), np.float32)
    chunks[:, :, 0] = np.array([1, 10, 100])[:, None]
    last = run(EnsemblingPolicy(Says(chunks)), (1, 1))[-1].chunk.actions[:, 0]
    old, middle, new = np.exp(-0.01 * np.arange(3))
    np.testing.assert_allclose(last[0], (old + 10 * middle + 100 * new) / (old + middle + new), rtol=1e-6)
    np.testing.assert_allclose(last[T - 2], (10 * old + 100 * middle) / (old + middle), rtol=1e-6)
    assert last[T - 1] == 100


def test_chunks_that_agree_stay_as_they_are() -> None:
    moments = stream(count=1).repeat(4, axis=1)[0]  # what is due when
    chunks = [moments[begin : begin + T] for begin in (0, 3, 6, 9)]
    for result, chunk in zip(run(EnsemblingPolicy(Says(chunks)), (3, 3, 3)), chunks):
        np.testing.assert_array_equal(result.chunk.actions, chunk)


def test_a_gripper_is_never_between_what_the_chunks_say() -> None:
    chunks = stream(3)
    chunks[:, :, 2] = np.random.default_rng(1).choice([0.0, 0.02, 0.08], (6, T))
    for result, chunk in zip(run(EnsemblingPolicy(Says(chunks)), (2,) * 5), chunks):
        np.testing.assert_array_equal(result.chunk.actions[:, 2], chunk[:, 2])


def test_committed_actions_come_back_as_they_were_committed() -> None:
    chunks = stream()
    policy, plain = EnsemblingPolicy(Says(chunks)), EnsemblingPolicy(Says(chunks))
    first = infer(policy, observation(), InferContext(start_ns=PERIOD_NS))
    infer(plain, observation(), InferContext(start_ns=PERIOD_NS))
    committed = first.chunk.actions[3:5].copy()
    bound = infer(policy, observation(), after(first, 3, committed=committed)).chunk.actions
    free = infer(plain, observation(), after(first, 3)).chunk.actions
    np.testing.assert_array_equal(bound[:2], committed)
    np.testing.assert_array_equal(bound[2:], free[2:])
    assert not np.array_equal(free[:2], committed)


# ---- what is forgotten ----
@pytest.mark.parametrize(
    "changed", ["all executed", "long ago", "another chunk", "no chunk", "instruction", "reset", "nothing"]
)
def test_a_chunk_that_shares_no_moment_or_no_thread_comes_out_as_it_came_in(changed) -> None:
    chunks = stream()
    policy = EnsemblingPolicy(Says(chunks))
    last = run(policy, (2, 2))[-1]
    seen, context = observation(), after(last, 2)
    if changed == "all executed":
        context = after(last, T)
    elif changed == "long ago":  # what was not executed is no plan for now
        context = after(last, 2, start_ns=last.chunk.end_ns)
    elif changed == "another chunk":
        context = replace(context, previous=replace(last.chunk, actions=last.chunk.actions + 1))
    elif changed == "no chunk":
        context = InferContext(start_ns=9 * PERIOD_NS)
    elif changed == "instruction":
        seen = observation(instruction="pull")
    elif changed == "reset":
        policy.reset(0)
    result = infer(policy, seen, context)
    assert np.array_equal(result.chunk.actions, chunks[3]) == (changed != "nothing")
    again = infer(policy, seen, after(result, 2))  # and from there it goes on with what is new alone
    mean = (chunks[3][2:] + np.exp(-0.01) * chunks[4][: T - 2]) / (1 + np.exp(-0.01))
    assert np.allclose(again.chunk.actions[: T - 2, :2], mean[:, :2], atol=1e-6) == (changed != "nothing")


def test_each_place_in_a_batch_is_what_it_is_alone() -> None:
    seen, streams = [observation(1), observation(2, "pull")], (stream(1), stream(2))
    alone = [run(EnsemblingPolicy(Says(s)), (2, 3, 1), o) for s, o in zip(streams, seen)]
    policy = EnsemblingPolicy(Says(*streams))
    results = policy.infer_batch(seen, [InferContext(start_ns=PERIOD_NS)] * 2)
    for step, executed in enumerate((2, 3, 1), 1):
        results = policy.infer_batch(seen, [after(result, executed) for result in results])
        for place in range(2):
            np.testing.assert_array_equal(results[place].chunk.actions, alone[place][step].chunk.actions)
    changed = policy.infer_batch([seen[0], observation(2, "turn")], [after(result, 2) for result in results])
    assert not np.array_equal(changed[0].chunk.actions, streams[0][4])
    np.testing.assert_array_equal(changed[1].chunk.actions, streams[1][4])  # the other one's memory is untouched


def test_the_inner_policy_hears_of_its_own_chunk() -> None:
    inner = Says(stream())
    results = run(EnsemblingPolicy(inner), (2, 2))
    previous = inner.told[2][0].previous
    np.testing.assert_array_equal(previous.actions, stream()[1])
    assert previous.start_ns == results[1].chunk.start_ns
    assert not np.array_equal(previous.actions, results[1].chunk.actions)


# ---- in time, and with reuse ----
@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("reuse", [False, True])
def test_every_action_runs_in_its_slot(late, reuse) -> None:
    """Through the real schedulers: chunks that all say when they are due say it still when they are averaged."""
    inner, begin, fused = Slots(), 7, []
    policy = EnsemblingPolicy(ReusePolicy(inner, ReuseRule(most=1, least=2)) if reuse else inner)
    _, executed = scheduled(policy, late, begin, lambda result: fused.append(len(policy._robots[0].said) > 1))
    assert sum(fused) > 8 and len(executed) == 60 - late
    settled = begin + 4 + late + 16  # the first chunk, which waited, has no say any more
    assert [said for slot, said in executed if slot >= settled] == pytest.approx(range(settled, begin + 60), abs=1e-4)
    if reuse:
        assert len(inner.asked) < 10


def test_what_is_reused_says_nothing_new() -> None:
    """Two forwards, a reuse, a forward: the reuse is what is left of the last mean, and no forward counts twice."""
    chunks = stream(count=3)
    chunks[:, :, :2] += 10  # one direction
    chunks[:, :, 2] = 1
    policy = EnsemblingPolicy(ReusePolicy(Says(chunks), ReuseRule(angle_deg=90)))
    results = run(policy, (2, 2, 2))
    assert [bool(result.report.reused) for result in results] == [False, False, True, False]
    np.testing.assert_array_equal(results[2].chunk.actions, results[1].chunk.actions[2:])
    weights = np.exp(-0.01 * np.arange(3))
    said = np.stack([chunks[0][6], chunks[1][4], chunks[2][0]])
    np.testing.assert_allclose(results[3].chunk.actions[0], weights @ said / weights.sum(), rtol=1e-6)


def test_settings_out_of_range_are_refused() -> None:
    for decay in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"ensembling\.decay"):
            Ensembling(decay)
