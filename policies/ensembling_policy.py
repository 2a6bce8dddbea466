"""A policy whose chunks are the mean of what it said, now and before, of the same moments. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from policies.robot_memory import RememberingPolicy, RobotMemory
from vla.decoding.chunks import Ensembling, ensembled
from vla.policy import InferContext, InferResult, Policy
from vla.types import Observation


@dataclass
class _Robot(RobotMemory):
    """said: what the inner policy itself said of the moments of `actions` and later ones, oldest first; each begins
    where `actions` does."""

    said: list[np.ndarray]


class EnsemblingPolicy(RememberingPolicy[_Robot]):
    """Temporal ensembling (ACT, Zhao et al. 2023) around `policy`: `ensembled` over the new chunk and what the earlier
    ones, as they were before any mean, say of its moments. Grippers are the newest chunk's.

    Which moments are the same is counted from what was executed, as the scheduler does. Actions that the context has
    committed come back as they were committed. Where the memory does not count (see RememberingPolicy), or when the
    running chunk has ended, the new chunk comes out as it came in.

    The inner policy is told its own last chunk as the previous one, not the mean that is executed instead: drafts are
    then what it would say, and a ReusePolicy inside knows its chunk again. What that one reuses says nothing new: what
    is left of the last mean stands, and no forward counts twice. So of the two this is the outer one.
    """

    def __init__(self, policy: Policy, rule: Ensembling | None = None):
        super().__init__(policy)
        self.rule = rule or Ensembling()

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        known = [self._known(*asked) for asked in enumerate(zip(observations, contexts))]
        told = [_in_own_words(context, robot) for context, robot in zip(contexts, known)]
        ran = self.policy.infer_batch(observations, told)
        results = []
        for place, (observation, context, robot, result) in enumerate(zip(observations, contexts, known, ran)):
            actions, said = self._fused(robot, context, result)
            self._robots[place] = _Robot(actions, observation.instruction, said)
            results.append(replace(result, chunk=replace(result.chunk, actions=actions)))
        return results

    def _known(self, place: int, asked: tuple[Observation, InferContext]) -> _Robot | None:
        """The memory of this place, if the chunk that runs there came from it and has not ended."""
        observation, context = asked
        robot, previous = self.remembered(place, observation, context), context.previous
        if previous is None or previous.end_ns <= (context.start_ns or observation.stamp_ns):
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
            return robot.actions[done:].copy(), left
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
