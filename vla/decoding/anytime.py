"""Anytime decoding of FAST tokens: when the time is up, what was decoded so far is a chunk.

FAST (Pertsch et al., arXiv 2501.09747, section 4) writes the lowest frequencies first: all dimensions at frequency 0,
then all at frequency 1, and so on. Its decode fills what is missing with zeros, so a list cut anywhere is a low-passed
chunk: smooth, over the whole horizon. The transform is orthonormal, so the error of a cut is the energy of the
coefficients cut off, and every further token makes it smaller or leaves it.

What is missing may also come from the last chunk, shifted by the actions executed since: where the arm is going seldom
changes from one chunk to the next, and a chunk of few frequencies goes nowhere.

What must be there is frequency 0, the mean of every dimension. A dimension without it would decode to 0 in normalised
units, the middle of its range: an absolute target far from the arm, a gripper half open. So the deadline counts only
from A decoded values on, which are A tokens at most.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vla.configs import Unbounded
from vla.decoding.autoregressive import one_by_one
from vla.decoding.base import Decoded, DecodedTokens, DecodeInput, Grammar, Hint, TokenDecoder
from vla.errors import ConfigError, explain, nearest
from vla.models.suffix import TokenSuffix, best_tokens
from vla.tokenizers.fast import synthesis

clock = time.perf_counter
RESTS = ("previous", "zeros")


class AnytimeDecoder(TokenDecoder):
    """Greedy decoding of FAST tokens until all are there, or `deadline_ms` after the inference began.

    No pass begins after the deadline once frequency 0 is complete: the answer comes at most one pass late. Samples of a
    batch are answered together, so the first deadline among them ends all, as soon as all have frequency 0. The ids are
    a prefix of greedy's; a cut list is not a damaged one, and missing values do not count as repaired.
    rest: what stands for the missing frequencies, "previous", those of the last chunk where there is one, or "zeros".
    Notes: "cut", values that were not decoded, by sample.
    """

    exact = False
    tokenizer = "fast"

    def __init__(self, deadline_ms: Unbounded = 50.0, rest: str = "previous", head: str = ""):
        super().__init__(head)
        if rest not in RESTS:
            raise ConfigError(f"decoder.rest: unknown choice {rest!r}. {nearest(rest, RESTS)}")
        if not deadline_ms > 0:
            raise ConfigError(explain("decoder.deadline_ms", "above 0", deadline_ms, "50 is one step at 20 Hz."))
        self.deadline_ms, self.rest = deadline_ms, rest

    def hints(self, given: DecodeInput, head: str) -> list[Hint]:
        return [Hint(seed, deadline=given.started + self.deadline_ms / 1e3) for seed in given.seeds]

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        deadline = min(hint.deadline for hint in hints)
        enough = grammar.values - suffix.model.config.action_dim

        def proceed(remaining: list[int]) -> bool:
            return any(remaining) and (max(remaining) > enough or clock() < deadline)

        ids: list[list[int]] = [[] for _ in hints]
        rows = one_by_one(suffix, grammar, ids, best_tokens, proceed)
        cut = [float(grammar.before_each(grammar.values, row)[-1]) for row in ids]
        return DecodedTokens.of(ids, len(rows), rows, {"cut": cut})

    def decode(self, given: DecodeInput) -> Decoded:
        out = super().decode(given)
        grammar = given.grammar(self.head_in(given.bundle))
        missing = [grammar.before_each(grammar.values, ids)[-1] for ids in out.ids]
        out = replace(out, repaired=[repaired - cut for repaired, cut in zip(out.repaired, missing)])
        if self.rest == "previous" and any(missing):
            for actions, previous, cut in zip(out.actions, given.previous, missing):
                if previous is not None and cut:
                    actions += last_frequencies(previous, cut)
        return out


def last_frequencies(actions: np.ndarray, count: int) -> np.ndarray:
    """What the last `count` DCT coefficients, in the order of FAST, add to a chunk: float32[T, A] -> float32[T, A]"""
    matrix = synthesis(len(actions))
    coefficients = matrix.T @ actions
    coefficients.ravel()[: actions.size - count] = 0.0
    return (matrix @ coefficients).astype(np.float32)
