"""Autoregressive decoding: one token per pass, greedy or sampled, constrained to valid action tokens."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from vla.decoding.base import DecodedTokens, Grammar, Hint, TokenDecoder, probabilities
from vla.errors import ConfigError, explain
from vla.models.suffix import TokenSuffix, best_tokens


class AutoregressiveDecoder(TokenDecoder):
    """The reference decoder. temperature 0 is greedy; else ids are drawn with each sample's own seed."""

    def __init__(self, temperature: float = 0.0, head: str = ""):
        super().__init__(head)
        if temperature < 0:
            raise ConfigError(explain("decoder.temperature", "0 or more", temperature, "Use 0 for greedy decoding."))
        self.temperature = temperature
        self.exact = temperature == 0

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        generators = [torch.Generator().manual_seed(hint.seed) for hint in hints] if self.temperature else []
        ids: list[list[int]] = [[] for _ in hints]
        remaining = [grammar.values] * len(hints)
        tokens = [suffix.start_id] * len(hints)
        rows: list[Tensor] = []
        while any(remaining):
            logits = grammar.constrain(suffix.logits([[token] for token in tokens])[:, -1], remaining)
            tokens = self._choose(logits, generators)
            rows.append(logits)
            for sample, chosen in enumerate(tokens):
                if remaining[sample]:
                    ids[sample].append(chosen)
                    remaining[sample] = max(0, remaining[sample] - grammar.lengths[chosen])
        likely = probabilities(torch.stack(rows, dim=1), ids)
        return DecodedTokens(ids, len(rows), [fmean(row) for row in likely], probabilities=likely)

    def _choose(self, logits: Tensor, generators: list[torch.Generator]) -> list[int]:
        """[B, V] -> a token for each; the pass's one wait for the device."""
        if not generators:
            return [row[0] for row in best_tokens(logits[:, None])]
        weights = (logits / self.temperature).softmax(dim=-1).cpu()
        return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in zip(weights, generators)]
