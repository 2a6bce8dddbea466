"""Blockwise parallel decoding: the head's own guesses of the tokens after the next are the draft.

Stern et al., "Blockwise Parallel Decoding for Deep Autoregressive Models", NeurIPS 2018. Further read-outs of a hidden
state (`TokenHead.guesses`) name the tokens that come after the next one. The pass that verifies them by the first
read-out also gives the hidden state that the following guesses are read from, so a block costs one pass (section 4,
"merged"), and what stands is greedy's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import DecodedTokens, Grammar, Hint, TokenDecoder
from vla.decoding.speculative import Greedy, Proposal, allowed, speculate
from vla.errors import ConfigError, explain
from vla.models.suffix import Array, TokenSuffix, best_tokens, tensor_of


class BlockwiseDecoder(TokenDecoder):
    """Exact greedy decoding. guesses: draft tokens per pass, at most; 0 for all that the head was trained to guess.

    The first pass has no guess to verify. Notes: as SpeculativeDecoder's.
    """

    def __init__(self, guesses: int = 0, head: str = ""):
        super().__init__(head)
        if guesses < 0:
            raise ConfigError(explain("decoder.guesses", "0 for all, or more", guesses, "Use 0."))
        self.guesses = guesses

    def check(self, bundle: Bundle) -> None:
        head = bundle.config.head(self.head_in(bundle))
        if head.lookahead < max(1, self.guesses):
            remedy = f"Train with heads.{head.name}.lookahead={max(3, self.guesses)}"
            remedy += f", or set guesses={head.lookahead}." if head.lookahead else "."
            expected = f"at least {max(1, self.guesses)} lookahead heads"
            raise ConfigError(explain(f"heads.{head.name}.lookahead", expected, head.lookahead, remedy))

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        most = self.guesses or len(suffix.head.lookahead)
        return speculate(suffix, grammar, Lookahead(suffix, grammar, most), Greedy(), most, len(hints))


class Lookahead:
    """Draft tokens read off the state that each sample's last token was decided from; see `speculative.Drafter`."""

    drawn = False

    def __init__(self, suffix: TokenSuffix, grammar: Grammar, most: int):
        self.suffix, self.grammar, self.most, self.layers = suffix, grammar, most, 0
        # Of the last pass, tokens number `_begin` and on: states [B, Q, D], or guesses int64[B, Q, most] read off all.
        self._begin, self._states = 0, torch.empty(0)
        # On a device reading more than is needed costs nothing, and waiting once more does.
        self.at_once = suffix.device.type != "cpu"

    def propose(self, tokens: list[list[int]], left: list[int], counts: list[int]) -> list[Proposal]:
        if not (self.layers and any(counts)):
            return [Proposal() for _ in tokens]
        width = self._states.shape[1]
        # Every unfinished sample decided in the last pass; of a finished one any state will do.
        places = [max(0, min(len(row) - 2 - self._begin, width - 1)) for row in tokens]
        states = torch.cat([self._states[s : s + 1, place : place + 1] for s, place in enumerate(places)])
        guesses = states[:, 0].tolist() if self.at_once else best_tokens(self._guessed(states)[:, 0])
        return [
            Proposal(allowed(self.grammar, remaining, row[:count]))
            for row, remaining, count in zip(guesses, left, counts)
        ]

    def verify(self, rows: list[list[int]]) -> Array:
        self.layers += self.suffix.depth
        self._begin, states = self.suffix.length, self.suffix.hidden(rows)
        if self.at_once:
            # Asked for before the logits of this pass: whoever has waited for those has waited for this copy too, and
            # that is what `speculate` does before it asks for guesses.
            self._states = self._guessed(tensor_of(states)).argmax(dim=-1).to("cpu", non_blocking=True)
        else:
            self._states = tensor_of(states)
        return self.suffix.out(states)

    def _guessed(self, states: Tensor) -> Tensor:
        """[B, Q, D] -> logits [B, Q, most, V]"""
        return self.suffix.head.guesses(states)[:, :, : self.most]
