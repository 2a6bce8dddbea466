"""The Policy protocol: what every thing that acts fulfils. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from vla.embodiment import Embodiment
from vla.types import ActionChunk, Observation


@dataclass(frozen=True)
class InferContext:
    """What decoders and schedulers need beside the observation.

    previous: the chunk that is being executed, if any.
    executed: how many of its actions were executed when the observation was taken.
    committed: float32[C, A], actions that will be executed while this inference runs (they cannot change any more).
    start_ns: due time that the first action of the new chunk shall have. seed: randomness of this inference.
    episode_seed: what reset() would be given for this robot, where one policy serves several; None: its own last reset.
    """

    previous: ActionChunk | None = None
    executed: int = 0
    committed: np.ndarray | None = None
    start_ns: int = 0
    seed: int = 0
    episode_seed: int | None = None


@dataclass(frozen=True)
class DecodeReport:
    """How a chunk came about.

    ids: action token ids, () for continuous heads. passes: model passes after the prefix.
    repaired: tokens or coefficients that had to be repaired for the ids to be a valid chunk.
    confidence: mean probability of the emitted tokens, 1.0 where it has no meaning.
    kept_tokens: places in the prefix of the visual tokens that were kept, or scored as worth it; None when nobody
    chose among them.
    times_ms: {"preprocess", "prefix", "decode", "total"}, milliseconds.
    notes: further numbers that a decoder tells, such as the layers it ran.
    reused: the reason why the last chunk stood instead of a forward pass, "" for a real forward.
    """

    ids: tuple[int, ...] = ()
    passes: int = 0
    repaired: int = 0
    confidence: float = 1.0
    kept_tokens: np.ndarray | None = None
    times_ms: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    reused: str = ""


@dataclass(frozen=True)
class InferResult:
    """chunk: actions in physical units with due times. report: how they came about."""

    chunk: ActionChunk
    report: DecodeReport = field(default_factory=DecodeReport)


@runtime_checkable
class Policy(Protocol):
    """Observations in, action chunks out. Deterministic after reset(seed) for equal observations and contexts."""

    @property
    def embodiment(self) -> Embodiment:
        """The robot it was made for."""
        ...

    @property
    def horizon(self) -> int:
        """T: actions per chunk."""
        ...

    def reset(self, seed: int) -> None:
        """Forget everything about earlier episodes."""
        ...

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        """One result per observation, in order; contexts[i] belongs to observations[i].

        Raises ObservationError for an observation that does not fit the embodiment.
        """
        ...


class PolicyWrapper:
    """A policy around another one: what a subclass leaves out is the inner one's."""

    def __init__(self, policy: Policy):
        self.policy = policy

    @property
    def embodiment(self) -> Embodiment:
        return self.policy.embodiment

    @property
    def horizon(self) -> int:
        return self.policy.horizon

    def reset(self, seed: int) -> None:
        self.policy.reset(seed)

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        return self.policy.infer_batch(observations, contexts)


def infer(policy: Policy, observation: Observation, context: InferContext | None = None) -> InferResult:
    """One observation through `infer_batch`."""
    return policy.infer_batch([observation], [context or InferContext()])[0]
