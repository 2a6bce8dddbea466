"""Heads: what turns hidden states of the suffix into logits (or, later, noise and velocity). A head never loops."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AutoregressiveHead(nn.Module):
    """Action tokens in and out: an embedding (with one extra entry, the start token) and a linear read-out.

    width: of the expert that runs the suffix. vocab_size: of the action tokenizer.
    """

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.logits = nn.Linear(width, vocab_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.logits.weight, std=0.02)
        nn.init.zeros_(self.logits.bias)

    @property
    def start_id(self) -> int:
        return self.vocab_size

    def embed(self, ids: Tensor) -> Tensor:
        """int64[B, K] -> [B, K, D]"""
        return self.embedding(ids)

    def shift(self, ids: Tensor) -> Tensor:
        """Training inputs for targets `ids`: the start token, then all but the last. int64[B, K] -> int64[B, K]"""
        start = torch.full_like(ids[:, :1], self.start_id)
        return torch.cat((start, ids[:, :-1].clamp(min=0)), dim=1)


class RegressionHead(nn.Module):
    """A two-layer read-out of one token: [B, D] -> [B, size]. Auxiliary targets; not used when acting."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
