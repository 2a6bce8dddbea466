"""Action tokens behind a prefix: what a token decoder may touch, and nothing else of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vla.models.heads import HybridHead, TokenHead
from vla.models.host import MOST_TOKENS
from vla.models.vla import Prefix, Vla

Ids = Tensor | Sequence[Sequence[int]]


class TokenSuffix:
    """Feed ids, get logits, roll back. Starts behind whatever of the suffix the cache already holds (`lead` entries:
    a hybrid head's noisy actions).

    length: tokens that the cache holds. room: how many it can hold. config: the head's.
    """

    def __init__(self, model: Vla, prefix: Prefix, head: str):
        module = model.heads[head]
        self.head: TokenHead = module.tokens if isinstance(module, HybridHead) else module
        self.model, self.prefix, self.config = model, prefix, model.config.head(head)
        self.expert = self.config.expert
        self.lead = prefix.cache.length - prefix.length
        self._start = prefix.cache.length
        self.host = model.host_suffix(prefix, head)

    @property
    def batch(self) -> int:
        return self.prefix.batch

    @property
    def device(self) -> torch.device:
        return self.prefix.device

    @property
    def start_id(self) -> int:
        return self.head.start_id

    @property
    def depth(self) -> int:
        return self.model.config.transformer.depth

    @property
    def length(self) -> int:
        return self.prefix.cache.length - self._start

    @property
    def room(self) -> int:
        return self.prefix.cache.capacity - self._start

    def logits(self, ids: Ids, both_ways: bool = False) -> Tensor:
        """Logits after each of Q new input tokens, written behind what the cache holds. int64[B, Q] -> [B, Q, V].

        ids may be lists: where a pass runs on the host, making a tensor of them would be a tenth of it. Causal among
        the new tokens unless both_ways. The cache advances by Q; roll back with `truncate`.
        """
        count = _count(ids)
        if self.host is not None and count <= MOST_TOKENS:
            return torch.from_numpy(self.host.read(self._on_host(ids, count, both_ways))[None])
        return self.head.logits(self.hidden(ids, both_ways))

    def embed(self, ids: Ids) -> Tensor:
        """What a pass over tokens begins with, for `through`: int64[B, Q] -> [B, Q, D]."""
        if self.host is not None and not isinstance(ids, Tensor):
            return torch.from_numpy(self.host.weights.embedding[ids])
        return self.head.embed(self._tensor(ids))

    def hidden(self, ids: Ids, both_ways: bool = False) -> Tensor:
        """As `logits`, before the read-out: [B, Q, D]."""
        count = _count(ids)
        if self.host is not None and count <= MOST_TOKENS:
            return torch.from_numpy(self._on_host(ids, count, both_ways)[None])
        x = self.head.embed(self._tensor(ids))
        x = self.model.extend(self.prefix, self.expert, x, self.lead + self.length, both_ways)
        self.prefix.cache.advance(count)
        return self.model.transformer.finish(self.expert, x)

    def _on_host(self, ids: Ids, count: int, both_ways: bool) -> np.ndarray:
        assert self.host is not None
        start = self.prefix.cache.length
        row = ids[0].tolist() if isinstance(ids, Tensor) else ids[0]
        hidden = self.host.hidden(self.host.weights.embedding[row], start - self.prefix.length, start, both_ways)
        self.prefix.cache.advance(count)
        return hidden

    def _tensor(self, ids: Ids) -> Tensor:
        return ids if isinstance(ids, Tensor) else torch.tensor(ids, device=self.device)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.prefix.cache.truncate(self._start + length)

    # ---- a part of the depth at a time, for early exits ----
    def through(self, x: Tensor, at: int, layers: range) -> Tensor:
        """Run x [B, Q, D], tokens number `at` and on, through some layers into the cache; lengths stay as they are."""
        if self.host is not None and x.shape[1] <= MOST_TOKENS:
            start = self._start + at
            return torch.from_numpy(self.host.through(x[0].numpy(), start - self.prefix.length, start, layers))[None]
        return self.model.extend(self.prefix, self.expert, x, self.lead + at, layers=layers)

    def advance(self, count: int) -> None:
        """Count tokens in that `through` has written at every layer."""
        self.prefix.cache.advance(count)

    def out(self, hidden: Tensor) -> Tensor:
        """What `hidden` gave -> logits: [B, Q, D] -> [B, Q, V]."""
        if self.host is not None and hidden.shape[1] <= MOST_TOKENS:
            return torch.from_numpy(self.host.read(hidden[0].numpy()))[None]
        return self.head.logits(hidden)

    def read(self, x: Tensor) -> Tensor:
        """Hidden states after any layer -> logits, by the one final norm and read-out: [B, Q, D] -> [B, Q, V]."""
        if self.host is not None and x.shape[1] <= MOST_TOKENS:
            return torch.from_numpy(self.host.read(self.host.finish(x[0].numpy())))[None]
        return self.head.logits(self.model.transformer.finish(self.expert, x))


def _count(ids: Ids) -> int:
    return ids.shape[1] if isinstance(ids, Tensor) else len(ids[0])


def best_tokens(logits: Tensor) -> list[list[int]]:
    """The most probable ones, [B, Q, V] -> B lists of Q; the one wait for the device that a greedy pass needs."""
    if logits.is_cpu and logits.dtype == torch.float32:  # on a few rows numpy is several times as fast
        out: list[list[int]] = logits.numpy().argmax(axis=-1).tolist()
        return out
    return logits.argmax(dim=-1).tolist()
