"""Autoregressive decoding: one token per pass, greedy or sampled, constrained to valid action tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vla.errors import ConfigError, explain
from vla.models.vla import Prefix, Vla
from vla.tokenizers import ActionTokenizer, valid_table


@dataclass(frozen=True)
class DecodedTokens:
    """ids: per sample. passes: model passes after the prefix. confidence: mean probability of the ids, per sample."""

    ids: list[list[int]]
    passes: int
    confidence: list[float]


class Grammar:
    """Which tokens may come next. Every action token stands for a number of the T * A values of a chunk; a chunk is
    complete when they add up, so no end token is needed and every generated list decodes without repair.

    values: T * A. lengths: values per token, on the host, int[V]. bias: float[values + 1, V] on the device, row r what
    to add to the logits when r values are still to come: 0 for tokens that fit, -inf for others. Row 0 allows all: a
    finished sample of a batch keeps its place with any token, which is cut afterwards.
    """

    def __init__(self, tokenizer: ActionTokenizer, horizon: int, action_dim: int, device: torch.device | str = "cpu"):
        self.values = horizon * action_dim
        self.lengths: list[int] = np.asarray(tokenizer.token_lengths).tolist()
        valid = valid_table(tokenizer, self.values)
        valid[0] = True
        self.bias = torch.where(torch.from_numpy(valid), 0.0, -torch.inf).to(device)

    def constrain(self, logits: Tensor, remaining: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """logits [B, ..., V] and the values still to come before each -> float32, with -inf where nothing fits."""
        if len(remaining) == 1 and isinstance(remaining[0], int):  # a view costs a fraction of an indexed copy
            return logits.float() + self.bias[remaining[0]]
        return logits.float() + self.bias[torch.tensor(remaining, device=self.bias.device)]

    def before_each(self, remaining: int, tokens: Sequence[int]) -> list[int]:
        """Values still to come before each of `tokens`, and after the last: len(tokens) + 1 numbers."""
        out = [remaining]
        for token in tokens:
            out.append(max(0, out[-1] - self.lengths[token]))
        return out


class TokenDecoder(Protocol):
    """Turns a prefix into complete action token lists. One class per acceleration; none owns weights."""

    def decode(self, model: Vla, prefix: Prefix, grammar: Grammar, seeds: Sequence[int]) -> DecodedTokens: ...


class AutoregressiveDecoder:
    """The reference decoder. temperature 0 is greedy; else ids are drawn with each sample's own seed."""

    def __init__(self, temperature: float = 0.0):
        if temperature < 0:
            raise ConfigError(explain("decoder.temperature", "0 or more", temperature, "Use 0 for greedy decoding."))
        self.temperature = temperature

    @torch.inference_mode()
    def decode(self, model: Vla, prefix: Prefix, grammar: Grammar, seeds: Sequence[int]) -> DecodedTokens:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds] if self.temperature else []
        ids: list[list[int]] = [[] for _ in seeds]
        remaining = [grammar.values] * len(seeds)
        token = torch.full((len(seeds), 1), model.head.start_id, dtype=torch.long, device=prefix.device)
        rows: list[Tensor] = []
        while any(remaining):
            logits = grammar.constrain(model.suffix_logits(prefix, token)[:, -1], remaining)
            token = self._choose(logits, generators)
            rows.append(logits)
            for sample, chosen in enumerate(token[:, 0].tolist()):  # the pass's one wait for the device
                if remaining[sample]:
                    ids[sample].append(chosen)
                    remaining[sample] = max(0, remaining[sample] - grammar.lengths[chosen])
        return DecodedTokens(ids, len(rows), confidences(torch.stack(rows, dim=1), ids))

    def _choose(self, logits: Tensor, generators: list[torch.Generator]) -> Tensor:
        """[B, V] -> int64[B, 1]"""
        if not generators:
            return logits.argmax(dim=-1, keepdim=True)
        weights = (logits / self.temperature).softmax(dim=-1).cpu()
        drawn = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(weights, generators)]
        return torch.stack(drawn).to(logits.device)


def confidences(logits: Tensor, ids: Sequence[Sequence[int]]) -> list[float]:
    """Mean probability of the chosen tokens, per sample, from constrained logits [B, n, V]; shorter lists are cut."""
    width = logits.shape[1]
    chosen = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], device=logits.device)
    top = logits.softmax(dim=-1).gather(2, chosen[..., None])[..., 0].cpu()
    return [float(row[: len(kept)].mean()) for row, kept in zip(top, ids)]
