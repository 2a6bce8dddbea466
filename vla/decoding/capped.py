"""Jacobi decoding with a cap on the passes, and its bidirectional form: faster, and not what greedy decoding gives.

CEED-VLA (Song et al. 2025): a model that was distilled to jump along its own Jacobi trajectories is nearly settled
after a few passes over a block, so decoding stops there ("early exit", one global number sigma). PD-VLA lets the
tokens of a block see each other in both directions; greedy decoding is then no fixed point that could be reached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import DecodedTokens, DecodeInput, Grammar, Hint, TokenDecoder, confidences, drafts
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
        values = bundle.config.horizon * bundle.config.action_dim
        if self.window > values:
            raise ConfigError(
                explain("decoder.window", f"at most {values}, the tokens of a chunk", self.window, "0 takes them all.")
            )

    def hints(self, given: DecodeInput, head: str) -> list[Hint]:
        guesses = drafts(given, head) if self.warm else [()] * given.batch
        return [Hint(seed, draft) for seed, draft in zip(given.seeds, guesses)]

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        guess = torch.tensor([list(hint.draft) or [0] * grammar.values for hint in hints], device=suffix.device)
        block, logits, passes = jacobi(suffix, guess, self.passes, self.window, self.both_ways)
        ids = block.tolist()
        return DecodedTokens(ids, passes, confidences(logits.float(), ids))


def jacobi(
    suffix: TokenSuffix,
    guess: Tensor,
    most: int,
    window: int = 0,
    both_ways: bool = False,
    iterates: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Update all tokens of a block at once until none changes, at most `most` times; then the next block.

    guess: int64[B, K]. Returns the tokens [B, K], the logits [B, K, V] they came from, and the passes. iterates: gets
    the first guess of a block and every one after it. Causal tokens whose inputs were right in all samples leave the
    block at once (Santilli et al. 2023), so passes get shorter. What a block left unsettled is fed again with the next
    one: no entry of a discarded guess stays in the cache.
    """
    tokens = torch.full_like(guess[:, :1], suffix.start_id)  # what stands: the start token, then finished ones
    rows: list[Tensor] = []
    passes = 0
    for block in guess.split(window or guess.shape[1], dim=1):
        begin, tries = tokens.shape[1], 0
        if iterates is not None:
            iterates.append(block)
        while block.shape[1] and tries < most:
            logits = suffix.logits(torch.cat((tokens[:, suffix.length :], block[:, :-1]), dim=1), both_ways)
            logits = logits[:, -block.shape[1] :]
            update = logits.argmax(dim=-1)
            tries += 1
            if both_ways:
                settled = block.shape[1] if bool((update == block).all()) else 0
            else:  # one more than the guesses that were right, as every input of that one was
                settled = 1 + int((update == block)[:, :-1].cumprod(dim=1).sum(dim=1).min())
            rows.append(logits[:, :settled])
            tokens, block = torch.cat((tokens, update[:, :settled]), dim=1), update[:, settled:]
            suffix.truncate(tokens.shape[1] - 1)  # the last token that stands is fed again: its row is the first
            if iterates is not None:
                iterates.append(torch.cat((tokens[:, begin:], block), dim=1))
        passes += tries
        rows.append(logits[:, logits.shape[1] - block.shape[1] :])
        tokens = torch.cat((tokens, block), dim=1)
    return tokens[:, 1:], torch.cat(rows, dim=1), passes
