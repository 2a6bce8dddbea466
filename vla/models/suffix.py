"""Action tokens behind a prefix: what a token decoder may touch, and nothing else of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from vla.models.heads import HybridHead, TokenHead
from vla.models.host import MOST_TOKENS, HostSuffix
from vla.models.vla import Prefix, Vla


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
        weights = model.host_weights(head) if prefix.batch == 1 and prefix.device.type == "cpu" else None
        self.host = None if weights is None else HostSuffix(weights, prefix.cache, prefix.rotary, prefix.bias)

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

    def logits(self, ids: Tensor, both_ways: bool = False) -> Tensor:
        """Logits after each of Q new input tokens, written behind what the cache holds. int64[B, Q] -> [B, Q, V].

        Causal among the new tokens unless both_ways. The cache advances by Q; roll back with `truncate`.
        """
        if self.host is not None and ids.shape[1] <= MOST_TOKENS:
            return torch.from_numpy(self.host.read(self._on_host(ids, both_ways)))[None]
        return self.head.logits(self.hidden(ids, both_ways))

    def hidden(self, ids: Tensor, both_ways: bool = False) -> Tensor:
        """As `logits`, before the read-out: [B, Q, D]."""
        if self.host is not None and ids.shape[1] <= MOST_TOKENS:
            return torch.from_numpy(self._on_host(ids, both_ways))[None]
        x = self.model.extend(self.prefix, self.expert, self.head.embed(ids), self.lead + self.length, both_ways)
        self.prefix.cache.advance(ids.shape[1])
        return self.model.transformer.finish(self.expert, x)

    def _on_host(self, ids: Tensor, both_ways: bool):
        assert self.host is not None
        start = self.prefix.cache.length
        hidden = self.host.hidden(ids[0].tolist(), start - self.prefix.length, start, both_ways)
        self.prefix.cache.advance(ids.shape[1])
        return hidden

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

    def read(self, x: Tensor) -> Tensor:
        """Hidden states after any layer -> logits, by the one final norm and read-out: [B, Q, D] -> [B, Q, V]."""
        if self.host is not None and x.shape[1] <= MOST_TOKENS:
            return torch.from_numpy(self.host.read(self.host.finish(x[0].numpy())))[None]
        return self.head.logits(self.model.transformer.finish(self.expert, x))
