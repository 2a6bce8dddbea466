"""A policy whose chunks are the mean of what it said, now and before, of the same moments. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vla.decoding.chunks import Ensembling, ensembled
from vla.policy import InferContext, InferResult, Policy, PolicyWrapper
from vla.types import Observation


@dataclass
class _Robot:
    """One robot's memory. given: actions of the chunk it was given last. said: what the inner policy itself said of
    those moments and later ones, oldest first; the first action of each is due with the first of `given`."""

    given: np.ndarray
    said: list[np.ndarray]
    instruction: str


class EnsemblingPolicy(PolicyWrapper):
    """Temporal ensembling (ACT, Zhao et al. 2023) around `policy`: `ensembled` over the new chunk and what the earlier
    ones, as they were before any mean, say of its moments. Grippers are the newest chunk's.

    Which moments are the same is counted from what was executed, as the scheduler does. Actions that the context has
    committed come back as they were committed. There is one memory per place in a batch. It counts only for the robot
    whose running chunk came from it: with another chunk in the context, another instruction or none, or when the
    running chunk has ended, the new chunk comes out as it came in.

    The inner policy is told its own last chunk as the previous one, not the mean that is executed instead: drafts are
    then what it would say, and a ReusePolicy inside knows its chunk again. What that one reuses says nothing new: what
    is left of the last mean stands, and no forward counts twice. So of the two this is the outer one.
    """

    def __init__(self, policy: Policy, rule: Ensembling | None = None):
        super().__init__(policy)
        self.rule = rule or Ensembling()
        self._robots: dict[int, _Robot] = {}

    def reset(self, seed: int) -> None:
        self._robots.clear()
        super().reset(seed)

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        known = [self._known(*asked) for asked in enumerate(zip(observations, contexts))]
        told = [_in_own_words(context, robot) for context, robot in zip(contexts, known)]
        ran = self.policy.infer_batch(observations, told)
        results = []
        for place, (observation, context, robot, result) in enumerate(zip(observations, contexts, known, ran)):
            actions, said = self._fused(robot, context, result)
            self._robots[place] = _Robot(actions, said, observation.instruction)
            results.append(replace(result, chunk=replace(result.chunk, actions=actions)))
        return results

    def _known(self, place: int, asked: tuple[Observation, InferContext]) -> _Robot | None:
        """The memory of this place, if the chunk that runs there came from it and has not ended."""
        observation, context = asked
        robot, previous = self._robots.get(place), context.previous
        if (
            robot is None
            or previous is None
            or previous.end_ns <= (context.start_ns or observation.stamp_ns)
            or observation.instruction != robot.instruction
            or not np.array_equal(previous.actions, robot.given)
        ):
            return None
        return robot

    def _fused(
        self, robot: _Robot | None, context: InferContext, result: InferResult
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The actions to give, and what was said of their moments."""
        chunk, done = result.chunk, context.executed
        left = [actions[done:] for actions in robot.said if len(actions) > done] if robot is not None else []
        if robot is None or not left:
            return chunk.actions, [chunk.actions]
        if result.report.reused:
            return robot.given[done:].copy(), left
        said = [*left, chunk.actions]
        moments = [replace(chunk, actions=actions) for actions in said]
        actions = ensembled(moments, chunk.start_ns, self.rule.decay, self.embodiment.grippers).actions
        if context.committed is not None:
            actions[: len(context.committed)] = context.committed[: len(actions)]
        return actions, said


def _in_own_words(context: InferContext, robot: _Robot | None) -> InferContext:
    if robot is None or context.previous is None:
        return context
    return replace(context, previous=replace(context.previous, actions=robot.said[-1]))
