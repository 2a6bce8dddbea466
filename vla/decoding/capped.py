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
    """Jacobi iteration block by block; a block ends when nothing changes, or after `passes` passes (sigma); 0 for as
    many as a block has tokens.

    window: tokens per block, 0 for the whole chunk at once. Where a long pass costs many short ones, as on a CPU,
    short blocks are the faster ones. both_ways: the chunk, as one block, is not causal. warm: start from the previous
    chunk.
    """

    exact = False
    tokenizer = "bins"  # tokens that were left standing must make a chunk whatever they are, hence one value each

    def __init__(self, passes: int = 8, window: int = 0, both_ways: bool = False, warm: bool = False, head: str = ""):
        super().__init__(head)
        if passes < 0:
            raise ConfigError(explain("decoder.passes", "0 or more", passes, "8 is a common cap, 0 the block's size."))
        if window < 0:
            raise ConfigError(explain("decoder.window", "0 or more", window, "0 takes the whole chunk as one block."))
        if both_ways and window:
            remedy = "Tokens that saw later guesses would stay in the cache for the next block."
            raise ConfigError(explain("decoder.window", "0 with both_ways", window, remedy))
        self.passes, self.window, self.both_ways, self.warm = passes, window, both_ways, warm

    def check(self, bundle: Bundle) -> None:
        super().check(bundle)
        check_length(bundle, "decoder.window", self.window, "0 takes them all.")

    def hints(self, given: DecodeInput, head: str) -> list[Hint]:
        guesses = drafts(given, head) if self.warm else [()] * given.batch
        return [Hint(seed, draft) for seed, draft in zip(given.seeds, guesses)]

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        guesses = [hint.draft or [0] * grammar.values for hint in hints]
        window = self.window or grammar.values
        return jacobi(suffix, grammar, guesses, window, self.passes or window, self.both_ways)
