"""Action tokens behind a prefix: what a token decoder may touch, and nothing else of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vla.models.heads import HybridHead, TokenHead
from vla.models.host import MOST_TOKENS, HostSuffix
from vla.models.vla import Prefix, Vla

Ids = Tensor | Sequence[Sequence[int]]
Array = Tensor | np.ndarray  # of a pass: numpy's where it ran on the host, see `TokenSuffix.logits`


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

    def logits(self, ids: Ids, both_ways: bool = False) -> Array:
        """Logits after each of Q new input tokens, written behind what the cache holds. int64[B, Q] -> [B, Q, V].

        ids in lists make numpy's arrays where the pass runs on the host, which everything behind it then takes as they
        are: to make tensors of both would be a tenth of the pass. Ids in a tensor make tensors. Causal among the new
        tokens unless both_ways. The cache advances by Q; roll back with `truncate`.
        """
        return self.out(self.hidden(ids, both_ways))

    def embed(self, ids: Ids) -> Array:
        """What a pass over tokens begins with, for `through`: int64[B, Q] -> [B, Q, D]."""
        if isinstance(ids, Tensor):
            return self.head.embed(ids)
        if self.host is not None:
            return self.host.weights.embedding[ids]
        # Not torch.tensor(device=...): that waits until the pass before is done.
        return self.head.embed(torch.tensor(ids).to(self.device, non_blocking=True))

    def hidden(self, ids: Ids, both_ways: bool = False) -> Array:
        """As `logits`, before the read-out: [B, Q, D]."""
        x = self.embed(ids)
        count, start = x.shape[1], self.prefix.cache.length
        if host := self._host_for(count):
            rows = host.hidden(host_array(x)[0], start - self.prefix.length, start, both_ways)
            hidden = like(x, rows[None])
        else:
            x = self.model.extend(self.prefix, self.expert, tensor_of(x), start - self.prefix.length, both_ways)
            hidden = self.model.transformer.finish(self.expert, x)
        self.prefix.cache.advance(count)
        return hidden

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.prefix.cache.truncate(self._start + length)

    # ---- a part of the depth at a time, for early exits ----
    def through(self, x: Array, at: int, layers: range) -> Array:
        """Run x [B, Q, D], tokens number `at` and on, through some layers into the cache; lengths stay as they are."""
        if host := self._host_for(x.shape[1]):
            start = self._start + at
            return like(x, host.through(host_array(x)[0], start - self.prefix.length, start, layers)[None])
        return self.model.extend(self.prefix, self.expert, tensor_of(x), self.lead + at, layers=layers)

    def advance(self, count: int) -> None:
        """Count tokens in that `through` has written at every layer."""
        self.prefix.cache.advance(count)

    def out(self, hidden: Array) -> Array:
        """What `hidden` gave -> logits: [B, Q, D] -> [B, Q, V]."""
        if host := self._host_for(hidden.shape[1]):
            return like(hidden, host.read(host_array(hidden)[0])[None])
        return self.head.logits(tensor_of(hidden))

    def read(self, x: Array) -> Array:
        """Hidden states after any layer -> logits, by the one final norm and read-out: [B, Q, D] -> [B, Q, V]."""
        if host := self._host_for(x.shape[1]):
            return like(x, host.read(host.finish(host_array(x)[0]))[None])
        return self.head.logits(self.model.transformer.finish(self.expert, tensor_of(x)))

    def _host_for(self, count: int) -> HostSuffix | None:
        return self.host if count <= MOST_TOKENS else None


# ---- arrays of either kind ----
def tensor_of(x: Array) -> Tensor:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def host_array(x: Array) -> np.ndarray:
    """float32 that lies on the host already."""
    return x if isinstance(x, np.ndarray) else x.numpy()


def like(x: Array, made: np.ndarray) -> Array:
    """What was made of x, as x is."""
    return made if isinstance(x, np.ndarray) else torch.from_numpy(made)


def joined(parts: Sequence[Array]) -> Array:
    """[B, n, ...] each -> [B, n in all, ...]; of numpy's if all are, or if none is on another device."""
    if any(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate([host_array(part) for part in parts], axis=1)
    return torch.cat([tensor_of(part) for part in parts], dim=1)


def best_tokens(logits: Array) -> list[list[int]]:
    """The most probable ones, [B, Q, V] -> B lists of Q; the one wait for the device that a greedy pass needs."""
    if isinstance(logits, Tensor) and logits.is_cpu and logits.dtype == torch.float32:
        logits = logits.numpy()  # on a few rows numpy is several times as fast
    best: list[list[int]] = logits.argmax(-1).tolist()
    return best
