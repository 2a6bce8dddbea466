"""Autoregressive decoding: one token per pass, greedy or sampled, constrained to valid action tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vla.decoding.base import DecodedTokens, Grammar, Hint, TokenDecoder
from vla.errors import ConfigError, explain
from vla.models.suffix import Array, TokenSuffix, best_tokens, tensor_of


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

        def draw(logits: Array) -> list[list[int]]:
            weights = (tensor_of(logits)[:, 0] / self.temperature).softmax(dim=-1).cpu()
            return [[int(torch.multinomial(row, 1, generator=own))] for row, own in zip(weights, generators)]

        ids: list[list[int]] = [[] for _ in hints]
        rows = one_by_one(suffix, grammar, ids, draw if self.temperature else best_tokens)
        return DecodedTokens.of(ids, len(rows), rows)


def one_by_one(
    suffix: TokenSuffix,
    grammar: Grammar,
    ids: list[list[int]],
    choose: Callable[[Array], list[list[int]]],
    proceed: Callable[[list[int]], bool] = any,
) -> list[Array]:
    """Put tokens behind `ids`, one per pass and sample, until all chunks are complete.

    ids: per sample, what comes first, lists of one length; the suffix is empty. choose: constrained logits [B, 1, V] ->
    the token of each sample, in a list of its own; the pass's one wait for the device. proceed: asked before each pass,
    with the values that each sample has still to come. Returns the constrained logits of every pass.
    """
    remaining = [grammar.before_each(grammar.values, row)[-1] for row in ids]
    tokens = [[suffix.start_id, *row] for row in ids]
    rows: list[Array] = []
    while proceed(remaining):
        logits = suffix.logits(tokens)
        logits = grammar.constrain(logits if len(tokens[0]) == 1 else logits[:, -1:], [[left] for left in remaining])
        tokens = choose(logits)
        rows.append(logits)
        remaining = [grammar.append(*sample) for sample in zip(ids, remaining, tokens)]
    return rows
