"""Many askers, one policy: requests that wait at the same moment share one `infer_batch`. numpy only."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from vla.data.transforms import fitted
from vla.embodiment import Embodiment
from vla.errors import ObservationError, TransportError, explain
from vla.policy import InferContext, InferResult, Policy
from vla.types import Observation


@dataclass(frozen=True)
class Answer:
    """result of one request. wait_ms: from arrival to the start of its batch. infer_ms: of that batch. batch: its
    size."""

    result: InferResult
    wait_ms: float
    infer_ms: float
    batch: int


@dataclass(frozen=True)
class _Waiting:
    observation: Observation
    context: InferContext
    since: float
    answer: asyncio.Future[Answer]


class Batcher:
    """Runs `policy` on a thread of its own, one batch at a time; belongs to one event loop.

    While a batch runs, others wait and make the next one. Where the policy is idle, a request waits up to wait_s for
    company, but not longer than until everyone who could ask has asked (`askers()`): one robot alone never waits.
    """

    def __init__(self, policy: Policy, max_batch: int, wait_s: float, askers: Callable[[], int]):
        self._policy, self._max, self._wait_s, self._askers = policy, max_batch, wait_s, askers
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "infer")

    async def ask(self, observation: Observation, context: InferContext) -> Answer:
        """The answer of the batch that this lands in; what the policy raised for this very observation is raised."""
        if self._closed:
            raise _closing()
        item = _Waiting(observation, context, time.perf_counter(), asyncio.get_running_loop().create_future())
        self._waiting.append(item)
        self._arrived.set()
        return await item.answer

    async def run(self) -> None:
        """Until cancelled; then whoever still waits is told so. A batch that runs then ends on its thread, unheard."""
        loop = asyncio.get_running_loop()
        batch: list[_Waiting] = []
        try:
            while True:
                batch = await self._next()
                started = time.perf_counter()
                asked = [(item.observation, item.context) for item in batch]
                found = await loop.run_in_executor(self._thread, infer_each, self._policy, asked)
                spent_ms = (time.perf_counter() - started) * 1e3
                for item, result in zip(batch, found):
                    if item.answer.done():  # its client has gone
                        continue
                    if isinstance(result, Exception):
                        item.answer.set_exception(result)
                    else:
                        waited_ms = (started - item.since) * 1e3
                        item.answer.set_result(Answer(result, waited_ms, spent_ms, len(batch)))
        finally:
            self._closed = True
            self._thread.shutdown(wait=False)
            for item in (*batch, *self._waiting):
                if not item.answer.done():
                    item.answer.set_exception(_closing())

    async def _next(self) -> list[_Waiting]:
        """At least one request, at most max_batch, oldest first."""
        while True:
            self._waiting = deque(item for item in self._waiting if not item.answer.done())
            self._arrived.clear()
            if not self._waiting:
                await self._arrived.wait()
                continue
            patience_s = self._waiting[0].since + self._wait_s - time.perf_counter()
            if len(self._waiting) >= min(self._max, self._askers()) or patience_s <= 0:
                return [self._waiting.popleft() for _ in range(min(self._max, len(self._waiting)))]
            with contextlib.suppress(asyncio.TimeoutError):  # not the builtin one before Python 3.11
                await asyncio.wait_for(self._arrived.wait(), patience_s)


def infer_each(policy: Policy, asked: Sequence[tuple[Observation, InferContext]]) -> list[InferResult | Exception]:
    """One result or one exception per request: whoever asks badly spoils nobody else's batch."""
    ready: list[tuple[Observation, InferContext] | Exception] = []
    for observation, context in asked:
        try:
            ready.append((_fitted(observation, policy.embodiment).check(), context))
        except Exception as error:
            ready.append(error)
    good = [item for item in ready if not isinstance(item, Exception)]
    results = iter(_infer(policy, good))
    return [item if isinstance(item, Exception) else next(results) for item in ready]


def _infer(policy: Policy, asked: Sequence[tuple[Observation, InferContext]]) -> list[InferResult | Exception]:
    if not asked:
        return []
    try:
        results = policy.infer_batch([o for o, _ in asked], [c for _, c in asked])
        if len(results) != len(asked):
            raise RuntimeError(f"the policy gave {len(results)} results for {len(asked)} observations")
        return [_checked(result) for result in results]
    except Exception as error:
        return [error] if len(asked) == 1 else [_infer(policy, [item])[0] for item in asked]


def _checked(result: InferResult) -> InferResult | Exception:
    if np.all(np.isfinite(result.chunk.actions)):
        return result
    return ObservationError(explain("chunk", "finite actions", "NaN or infinity", "Check the bundle."))


def _fitted(observation: Observation, robot: Embodiment) -> Observation:
    """Images at their camera's size, as far as they fit; the policy refuses the others by name."""
    return replace(observation, images={name: fitted(i, robot.camera(name)) for name, i in observation.images.items()})


def _closing() -> TransportError:
    return TransportError(explain("policy server", "one that runs", "one that is stopping", "Connect again later."))
