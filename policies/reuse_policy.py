"""A policy that lets the last chunk stand where a rule says that a forward pass would say the same. numpy only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from policies.robot_memory import RememberingPolicy, RobotMemory
from vla.decoding.reuse import Forward, ReuseMemory, ReuseRule
from vla.errors import ConfigError, explain
from vla.policy import DecodeReport, InferContext, InferResult, Policy
from vla.types import ActionChunk, Observation


@dataclass
class _Robot(RobotMemory):
    """instruction, confidence: of its last forward."""

    memory: ReuseMemory
    confidence: float


class ReusePolicy(RememberingPolicy[_Robot]):
    """`policy`, skipped where `rule` allows it (see vla.decoding.reuse). Reports of skipped steps say why (`reused`).

    A reused chunk is what is left of the chunk that is being executed, from the first action not executed when the
    observation was taken: shorter than the horizon, nothing is invented behind its end. Its first action is due when
    that of a new chunk would be.

    The inner policy has to report important visual tokens: a VlaPolicy with a TokenSelection (one with drop=False only
    scores). Where the memory does not count (see RememberingPolicy), the model runs. A skipped step checks state and
    instruction and looks at no image.
    """

    def __init__(self, policy: Policy, rule: ReuseRule | None = None):
        super().__init__(policy)
        self.rule = rule or ReuseRule()

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        """ConfigError when the inner policy reports no visual tokens; else as the inner policy."""
        reused = [self._reused(*asked) for asked in enumerate(zip(observations, contexts))]
        asked = [place for place, result in enumerate(reused) if result is None]
        ran = self.policy.infer_batch([observations[i] for i in asked], [contexts[i] for i in asked]) if asked else []
        for place, fresh in zip(asked, ran):
            self._remember(place, observations[place].instruction, fresh)
        results = iter(ran)
        for place, result in enumerate(reused):
            if result is not None:
                self._robots[place].memory.reused()
                self._robots[place].actions = result.chunk.actions
        return [next(results) if result is None else result for result in reused]

    def _reused(self, place: int, asked: tuple[Observation, InferContext]) -> InferResult | None:
        started = time.perf_counter()
        observation, context = asked
        robot, previous = self.remembered(place, observation, context), context.previous
        if robot is None or previous is None:
            return None
        committed = 0 if context.committed is None else len(context.committed)
        reason = robot.memory.reason(len(previous) - context.executed, committed)
        if not reason:
            return None
        observation.check()
        chunk = ActionChunk(
            previous.actions[context.executed :].copy(), context.start_ns or observation.stamp_ns, previous.period_s
        )
        spent = {"preprocess": 0.0, "prefix": 0.0, "decode": 0.0, "total": (time.perf_counter() - started) * 1e3}
        return InferResult(chunk, DecodeReport(confidence=robot.confidence, times_ms=spent, reused=reason))

    def _remember(self, place: int, instruction: str, result: InferResult) -> None:
        report = result.report
        if report.kept_tokens is None:
            remedy = "Give the policy a TokenSelection; with drop=False it scores them and drops none."
            raise ConfigError(explain("reuse", "a policy that reports important visual tokens", "none", remedy))
        memory = self._robots[place].memory if place in self._robots else ReuseMemory(self.rule)
        memory.ran(Forward.of(result.chunk.actions, report.kept_tokens, self.embodiment))
        self._robots[place] = _Robot(result.chunk.actions, instruction, memory, report.confidence)
