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
    """ids: per sample. passes: model passes after the prefix. confidence: mean top-1 probability, per sample."""

    ids: list[list[int]]
    passes: int
    confidence: list[float]


class Grammar:
    """Which tokens may come next, as tables on the device.

    Every action token stands for a number of the T * A values of a chunk; a chunk is complete when they add up, so no
    end token is needed and every generated list decodes without repair.
    """

    def __init__(self, tokenizer: ActionTokenizer, horizon: int, action_dim: int, device: torch.device | str = "cpu"):
        self.values = horizon * action_dim
        self.lengths = torch.tensor(np.array(tokenizer.token_lengths), dtype=torch.long, device=device)
        self.valid = torch.tensor(valid_table(tokenizer, self.values), device=device)  # [values + 1, V]


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
        batch, device = len(seeds), prefix.next_position.device
        generators = [torch.Generator().manual_seed(seed) for seed in seeds] if self.temperature else []
        remaining = torch.full((batch,), grammar.values, dtype=torch.long, device=device)
        token = torch.full((batch, 1), model.head.start_id, dtype=torch.long, device=device)
        emitted: list[Tensor] = []
        open_counts: list[Tensor] = []
        top: list[Tensor] = []
        while True:
            logits = model.suffix_logits(prefix, token)[:, -1].float()
            is_open = remaining > 0
            # A finished sample of a batch keeps its row alive with any token; its ids are cut afterwards.
            allowed = grammar.valid[remaining] | ~is_open[:, None]
            logits = logits.masked_fill(~allowed, -torch.inf)
            probabilities = logits.softmax(dim=-1)
            token = self._choose(logits, generators)
            emitted.append(token[:, 0])
            open_counts.append(is_open)
            top.append(probabilities.gather(1, token)[:, 0])
            remaining = (remaining - grammar.lengths[token[:, 0]]).clamp(min=0)
            if not bool((remaining > 0).any()):
                break
        ids, mask = torch.stack(emitted, dim=1).cpu(), torch.stack(open_counts, dim=1).cpu()
        probability = torch.stack(top, dim=1).cpu()
        return DecodedTokens(
            [row[keep].tolist() for row, keep in zip(ids, mask)],
            len(emitted),
            [float(row[keep].mean()) for row, keep in zip(probability, mask)],
        )

    def _choose(self, logits: Tensor, generators: list[torch.Generator]) -> Tensor:
        """[B, V] -> int64[B, 1]"""
        if not generators:
            return logits.argmax(dim=-1, keepdim=True)
        weights = (logits / self.temperature).softmax(dim=-1).cpu()
        drawn = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(weights, generators)]
        return torch.stack(drawn).to(logits.device)
