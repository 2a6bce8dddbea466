"""Requests that wait together are one batch; nobody gets another's answer, nobody suffers from another's mistake."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest

from policies.remote.batching import Batcher, infer_each
from tests.remote.robots import ROBOT, Echo, observation
from vla.data.transforms import resize
from vla.errors import ObservationError, TransportError
from vla.policy import InferContext
from vla.types import ActionChunk


def run(
    work: Callable[[Batcher], Awaitable[None]], policy: Echo, max_batch: int = 8, wait_s: float = 0.2, askers: int = 3
) -> None:
    async def main() -> None:
        batcher = Batcher(policy, max_batch, wait_s, lambda: askers)
        running = asyncio.ensure_future(batcher.run())
        await asyncio.wait_for(work(batcher), 10)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())


def bad(value: float):
    return observation(0, state=np.full(ROBOT.state_dim, value, np.float32))


def test_those_who_ask_together_are_one_batch_and_each_gets_its_own() -> None:
    policy = Echo()

    async def work(batcher: Batcher) -> None:
        seen = [observation(i) for i in range(3)]
        answers = await asyncio.gather(*(batcher.ask(o, InferContext(start_ns=i)) for i, o in enumerate(seen)))
        for i, (answer, given) in enumerate(zip(answers, seen)):
            assert answer.batch == 3 and answer.wait_ms < 190  # all who could ask had asked
            assert answer.result.chunk.start_ns == i
            assert answer.result.chunk.actions[0, 0] == pytest.approx(given.images["agentview"].mean())

    run(work, policy)
    assert policy.batches == [3]


def test_the_wait_for_company_ends() -> None:
    policy = Echo()

    async def work(batcher: Batcher) -> None:
        answer = await batcher.ask(observation(), InferContext())
        assert 40 < answer.wait_ms < 5_000 and answer.batch == 1

    run(work, policy, wait_s=0.05)


def test_one_alone_never_waits() -> None:
    async def work(batcher: Batcher) -> None:
        answer = await asyncio.wait_for(batcher.ask(observation(), InferContext()), 5)
        assert answer.batch == 1

    run(work, Echo(), wait_s=60.0, askers=1)


def test_no_batch_is_larger_than_the_largest_and_the_oldest_goes_first() -> None:
    policy = Echo(delay_s=0.02)

    async def work(batcher: Batcher) -> None:
        await asyncio.gather(*(batcher.ask(observation(i), InferContext(seed=i)) for i in range(7)))

    run(work, policy, max_batch=3, askers=7, wait_s=0.05)
    assert policy.batches == [3, 3, 1]
    assert [c.seed for _, c in policy.given] == list(range(7))


def test_who_breaks_a_batch_breaks_it_alone() -> None:
    policy = Echo()

    async def work(batcher: Batcher) -> None:
        asked = (observation(1), bad(9.0), bad(np.nan), bad(-9.0), observation(2))
        found = await asyncio.gather(*(batcher.ask(o, InferContext()) for o in asked), return_exceptions=True)
        assert [type(item).__name__ for item in found] == [
            "Answer", "RuntimeError", "ObservationError", "ObservationError", "Answer",
        ]  # fmt: skip
        assert found[0].result.chunk.actions[0, 0] != found[4].result.chunk.actions[0, 0]
        assert (await batcher.ask(observation(), InferContext())).batch == 1  # and it goes on

    run(work, policy, askers=5)
    assert policy.batches[0] == 4  # the one with NaN never reached the policy


def test_nobody_infers_for_one_who_has_gone() -> None:
    policy = Echo()

    async def work(batcher: Batcher) -> None:
        gone = asyncio.ensure_future(batcher.ask(observation(1), InferContext(seed=1)))
        await asyncio.sleep(0)
        gone.cancel()
        await batcher.ask(observation(2), InferContext(seed=2))

    run(work, policy, wait_s=0.05)
    assert [c.seed for _, c in policy.given] == [2]


def test_who_waits_when_the_server_stops_is_told() -> None:
    async def main() -> None:
        batcher = Batcher(Echo(delay_s=0.2), 1, 0.0, lambda: 1)
        running = asyncio.ensure_future(batcher.run())
        asked = [asyncio.ensure_future(batcher.ask(observation(i), InferContext())) for i in range(2)]
        await asyncio.sleep(0.05)
        running.cancel()
        found = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)
        assert all(isinstance(item, TransportError) and "stopping" in str(item) for item in found)
        with pytest.raises(TransportError, match="stopping"):
            await batcher.ask(observation(), InferContext())

    asyncio.run(main())


class Wrong(Echo):
    def infer_batch(self, observations, contexts):
        if len(observations) > 1:
            return super().infer_batch(observations, contexts)[:1]
        (result,) = super().infer_batch(observations, contexts)
        return [replace(result, chunk=ActionChunk(np.full((8, 7), np.nan, np.float32), 0, 0.05))]


def test_a_policy_that_answers_too_little_or_nan_is_no_answer() -> None:
    asked = [(observation(i), InferContext()) for i in range(2)]
    assert all(isinstance(item, ObservationError) and "NaN" in str(item) for item in infer_each(Wrong(), asked))


def test_larger_images_in_proportion_are_averaged_others_left_alone() -> None:
    rng = np.random.default_rng(0)
    large, odd, small = (
        rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ((320, 320), (128, 160), (64, 64))
    )

    def given(**images: np.ndarray) -> dict[str, np.ndarray]:
        policy = Echo()
        infer_each(policy, [(replace(observation(), images={**observation().images, **images}), InferContext())])
        return policy.given[0][0].images

    seen = given(agentview=large, wrist=odd)
    assert np.array_equal(seen["agentview"], resize(large, 128, 128)) and seen["wrist"] is odd
    same = observation(3).images["wrist"]
    assert given(wrist=small)["wrist"] is small and given(wrist=same)["wrist"] is same
