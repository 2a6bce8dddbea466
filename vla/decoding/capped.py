"""Jacobi decoding with a cap on the passes, and its bidirectional form: faster, and not what greedy decoding gives.

CEED-VLA (Song et al. 2025): a model that was distilled to jump along its own Jacobi trajectories is nearly settled
after a few passes over the whole block, so decoding stops there ("early exit", one global number sigma). PD-VLA lets
the tokens of a block see each other in both directions; greedy decoding is then no fixed point that could be reached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import DecodedTokens, DecodeInput, Grammar, Hint, TokenDecoder, confidences, drafts, find_head
from vla.errors import ConfigError, explain
from vla.models.suffix import TokenSuffix


class CappedJacobiDecoder(TokenDecoder):
    """Whole-block Jacobi iteration that ends when nothing changes, or after `passes` passes (sigma).

    both_ways: the block is not causal. warm: start from the previous chunk. Tokens that the iteration left standing
    against the grammar cannot occur with one value per token, which is what `check` asks for.
    """

    exact = False

    def __init__(self, passes: int = 8, both_ways: bool = False, warm: bool = False, head: str = ""):
        super().__init__(head)
        if passes < 1:
            raise ConfigError(explain("decoder.passes", "at least 1", passes, "8 is a common cap."))
        self.passes, self.both_ways, self.warm = passes, both_ways, warm

    def check(self, bundle: Bundle) -> None:
        head = find_head(bundle, self.head, "tokens")
        if set(bundle.action_tokenizers[head].token_lengths.tolist()) != {1}:
            raise ConfigError(
                explain("decoder.head", "tokens of one value each (bins)", f"{head!r}", "Use jacobi for FAST tokens.")
            )

    def hints(self, given: DecodeInput, head: str) -> list[Hint]:
        guesses = drafts(given, head) if self.warm else [()] * given.batch
        return [Hint(seed, draft) for seed, draft in zip(given.seeds, guesses)]

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        start = torch.tensor([list(hint.draft) or [0] * grammar.values for hint in hints], device=suffix.device)
        block, logits, passes = jacobi(suffix, start, self.passes, self.both_ways)
        ids = block.tolist()
        return DecodedTokens(ids, passes, confidences(logits.float(), ids))


def jacobi(
    suffix: TokenSuffix,
    block: torch.Tensor,
    most: int,
    both_ways: bool = False,
    iterates: list[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Update all tokens of a block at once until none changes, at most `most` times.

    block: int64[B, K], the first guess. Returns the last block, the logits [B, K, V] it came from and the passes.
    iterates: gets the first guess and every block after it.
    """
    first = torch.full_like(block[:, :1], suffix.start_id)
    if iterates is not None:
        iterates.append(block)
    logits, passes, settled = torch.empty(0), 0, False
    while passes < most and not settled:
        passes += 1
        suffix.truncate(0)
        logits = suffix.logits(torch.cat((first, block[:, :-1]), dim=1), both_ways)
        update = logits.argmax(dim=-1)
        settled = bool((update == block).all())
        block = update
        if iterates is not None and not settled:
            iterates.append(block)
    return block, logits, passes
