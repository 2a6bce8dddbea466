"""A static key-value cache: allocated once, written in place, rolled back by length."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, [depth, B, kv_heads, capacity, head_dim].

    `lengths[layer]` (host integers) say how much of each layer is filled: layers may differ, as early exit needs.
    Rolling back is lowering a length; stale entries behind it are never read. Writing several tokens at an explicit
    index (a host integer, or an int64[Q] tensor for captured graphs) never changes a length by itself: call `advance`.
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
        self.lengths = [0] * depth

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def length(self) -> int:
        """Filled length of the first layer (all layers, unless an early exit left deeper ones behind)."""
        return self.lengths[0]

    def write(self, layer: int, keys: Tensor, values: Tensor, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, kv_heads, Q, head_dim] at `index`; return what a query may read.

        With a host index the read is a view up to the last written entry; with a tensor index it is the whole
        capacity (fixed shapes), and the caller's mask says what counts.
        """
        kept_keys, kept_values = self._layers[layer]
        if isinstance(index, int):
            count = keys.shape[2]
            end = index + count
            if end > self.capacity:
                raise IndexError(f"cache: expected at most {self.capacity} tokens, got {end}. Allocate a larger cache.")
            kept_keys.narrow(2, index, count).copy_(keys)
            kept_values.narrow(2, index, count).copy_(values)
            return kept_keys.narrow(2, 0, end), kept_values.narrow(2, 0, end)
        kept_keys.index_copy_(2, index, keys.to(kept_keys.dtype))
        kept_values.index_copy_(2, index, values.to(kept_values.dtype))
        return kept_keys, kept_values

    def picked(self, places: Tensor, layers: int, room: int) -> KVCache:
        """A new cache with the entries at `places`, int64[B, n], of the first `layers` layers, and room for more.

        Lengths are 0, as before the first `advance`.
        """
        depth, batch, kv_heads, _, head_dim = self.keys.shape
        count = places.shape[1]
        out = KVCache(depth, batch, kv_heads, count + room, head_dim, self.keys.dtype, self.keys.device)
        index = places[None, :, None, :, None].expand(layers, -1, kv_heads, -1, head_dim)
        out.keys[:layers, :, :, :count] = self.keys[:layers].gather(3, index)
        out.values[:layers, :, :, :count] = self.values[:layers].gather(3, index)
        return out

    def advance(self, count: int, layers: Iterable[int] | None = None) -> None:
        for layer in range(len(self.lengths)) if layers is None else layers:
            self.lengths[layer] += count

    def truncate(self, length: int, layers: Iterable[int] | None = None) -> None:
        """Roll back to `length` entries."""
        for layer in range(len(self.lengths)) if layers is None else layers:
            self.lengths[layer] = min(self.lengths[layer], length)


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

    def write(self, layer: int, keys: Tensor, values: Tensor, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """As KVCache.write; the index is ignored."""
        if self._before is None:
            self._layers.append((keys, values))
            return keys, values
        before_keys, before_values = self._before[layer]
        return torch.cat((before_keys, keys), dim=2), torch.cat((before_values, values), dim=2)
