"""A static key-value cache: allocated once, written in place, rolled back by length."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, [depth, B, kv_heads, capacity, head_dim].

    `length` says how much of every layer is filled; entries behind it may have gone through some layers only.
    Rolling back is lowering a length; stale entries behind it are never read. Writing several tokens at an explicit
    index never changes a length by itself: call `advance`.
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (depth, batch, kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        # Views of the same memory, one per layer: picking them anew in every pass costs more than the copy.
        self._layers = list(zip(self.keys.unbind(0), self.values.unbind(0)))
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Write [B, kv_heads, Q, head_dim] at `index`; return what a query may read, a view up to the last of them."""
        kept_keys, kept_values = self._layers[layer]
        count = keys.shape[2]
        end = index + count
        if end > self.capacity:
            raise IndexError(f"cache: expected at most {self.capacity} tokens, got {end}. Allocate a larger cache.")
        kept_keys.narrow(2, index, count).copy_(keys)
        kept_values.narrow(2, index, count).copy_(values)
        return kept_keys.narrow(2, 0, end), kept_values.narrow(2, 0, end)

    def picked(self, places: Tensor, layers: int, room: int) -> KVCache:
        """A new cache with the entries at `places`, int64[B, n], of the first `layers` layers, and room for more.

        Its length is 0, as before the first `advance`.
        """
        depth, batch, kv_heads, _, head_dim = self.keys.shape
        count = places.shape[1]
        out = KVCache(depth, batch, kv_heads, count + room, head_dim, self.keys.dtype, self.keys.device)
        index = places[None, :, None, :, None].expand(layers, -1, kv_heads, -1, head_dim)
        out.keys[:layers, :, :, :count] = self.keys[:layers].gather(3, index)
        out.values[:layers, :, :, :count] = self.values[:layers].gather(3, index)
        return out

    def advance(self, count: int) -> None:
        self.length += count

    def truncate(self, length: int) -> None:
        """Roll back to `length` entries."""
        self.length = min(self.length, length)


class PrefixMemory:
    """Keys and values of a prefix, kept as they come, for training suffixes behind it: nothing is written in place, so
    gradients flow. The first pass fills it; behind `behind()` later ones are joined to it."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]] | None = None):
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._before = layers

    def behind(self) -> PrefixMemory:
        return PrefixMemory(self._layers)

    def picked(self, places: Tensor, layers: int, room: int) -> PrefixMemory:
        """As KVCache.picked; there is always room."""
        out = PrefixMemory()
        for pair in self._layers[:layers]:
            keys, values = (x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in pair)
            out._layers.append((keys, values))
        return out

    def write(self, layer: int, keys: Tensor, values: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """As KVCache.write; the index is ignored."""
        if self._before is None:
            self._layers.append((keys, values))
            return keys, values
        before_keys, before_values = self._before[layer]
        return torch.cat((before_keys, keys), dim=2), torch.cat((before_values, values), dim=2)
