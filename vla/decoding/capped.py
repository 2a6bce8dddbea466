"""Jacobi decoding with a cap on the passes, and its bidirectional form: faster, and not what greedy decoding gives.

CEED-VLA (Song et al. 2025): a model that was distilled to jump along its own Jacobi trajectories is nearly settled
after a few passes over a block, so decoding stops there ("early exit", one global number sigma). PD-VLA lets the
tokens of a block see each other in both directions; greedy decoding is then no fixed point that could be reached.
"""

from __future__ import annotations

from collections.abc import Sequence

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import DecodedTokens, DecodeInput, Grammar, Hint, TokenDecoder, check_length, drafts
from vla.decoding.jacobi import jacobi
from vla.errors import ConfigError, explain
from vla.models.suffix import TokenSuffix


class CappedJacobiDecoder(TokenDecoder):
    """Jacobi iteration block by block; a block ends when nothing changes, or after `passes` passes (sigma).

    window: tokens per block, 0 for the whole chunk at once. Where a long pass costs many short ones, as on a CPU,
    short blocks are the faster ones. both_ways: a block is not causal. warm: start from the previous chunk.
    """

    exact = False
    tokenizer = "bins"  # tokens that were left standing must make a chunk whatever they are, hence one value each

    def __init__(self, passes: int = 8, window: int = 0, both_ways: bool = False, warm: bool = False, head: str = ""):
        super().__init__(head)
        if passes < 1:
            raise ConfigError(explain("decoder.passes", "at least 1", passes, "8 is a common cap."))
        if window < 0:
            raise ConfigError(explain("decoder.window", "0 or more", window, "0 takes the whole chunk as one block."))
        self.passes, self.window, self.both_ways, self.warm = passes, window, both_ways, warm

    def check(self, bundle: Bundle) -> None:
        super().check(bundle)
        check_length(bundle, "decoder.window", self.window, "0 takes them all.")

    def hints(self, given: DecodeInput, head: str) -> list[Hint]:
        guesses = drafts(given, head) if self.warm else [()] * given.batch
        return [Hint(seed, draft) for seed, draft in zip(given.seeds, guesses)]

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        guesses = [hint.draft or [0] * grammar.values for hint in hints]
        return jacobi(suffix, grammar, guesses, self.window or grammar.values, self.passes, self.both_ways)
