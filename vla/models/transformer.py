"""One transformer for every recipe: several experts of different width share one attention.

The prefix (images, text, state) runs on expert 0, the backbone; a suffix may run on a smaller expert 1 that reads the
backbone's keys and values (the form of pi0, Black et al. 2024, section IV). With one expert it is an ordinary
decoder. Shaped for Gemma- and Llama-like weights: RMSNorm, rotary positions, grouped heads, gated MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vla.models.kv_cache import KVCache, PrefixMemory


@dataclass(frozen=True)
class ExpertConfig:
    """width: D of this expert's stream. mlp_width: hidden width of its gated MLP.

    condition_width: 0, or the width of a conditioning vector that modulates the norms (the time of a flow).
    """

    width: int
    mlp_width: int
    condition_width: int = 0


@dataclass(frozen=True)
class TransformerConfig:
    experts: tuple[ExpertConfig, ...]
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    activation: str = "silu"  # "silu" (Llama) or "gelu_tanh" (Gemma)


class RMSNorm(nn.Module):
    """Root-mean-square norm with (1 + weight) scaling, optionally modulated: returns (normed, gate or None)."""

    def __init__(self, width: int, eps: float, condition_width: int = 0):
        super().__init__()
        self.eps = eps
        self.width = width
        self.weight = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero", torch.zeros(()), persistent=False)
        self.register_buffer("floor", torch.tensor(math.sqrt(width * eps)), persistent=False)
        self.modulation = nn.Linear(condition_width, 3 * width) if condition_width else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled():
            # The same in half the calls; on one token a call costs more than what it computes.
            # sqrt(mean(x^2) + eps) * sqrt(width) = hypot(|x|, sqrt(width * eps))
            length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)
            normed = torch.addcdiv(self.zero, torch.addcmul(x, x, self.weight), length, value=math.sqrt(self.width))
        else:
            normed = F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)
        if self.modulation is None or condition is None:
            return normed, None
        scale, shift, gate = self.modulation(condition)[:, None].chunk(3, dim=-1)
        return normed * (1 + scale) + shift, 1 + gate


class ExpertLayer(nn.Module):
    """The weights that one expert owns in one layer: projections into the shared attention, and its MLP."""

    def __init__(self, expert: ExpertConfig, config: TransformerConfig):
        super().__init__()
        inner, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.attention_norm = RMSNorm(expert.width, config.norm_eps, expert.condition_width)
        self.qkv = nn.Linear(expert.width, inner + 2 * kv, bias=False)
        self.out = nn.Linear(inner, expert.width, bias=False)
        self.mlp_norm = RMSNorm(expert.width, config.norm_eps, expert.condition_width)
        self.gate_up = nn.Linear(expert.width, 2 * expert.mlp_width, bias=False)
        self.down = nn.Linear(expert.mlp_width, expert.width, bias=False)
        self.gelu = config.activation == "gelu_tanh"
        residual = 0.02 / math.sqrt(2 * config.depth)
        for linear, std in ((self.qkv, 0.02), (self.gate_up, 0.02), (self.out, residual), (self.down, residual)):
            nn.init.normal_(linear.weight, std=std)

    def mlp(self, x: Tensor, condition: Tensor | None) -> Tensor:
        normed, modulation = self.mlp_norm(x, condition)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        hidden = (F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)) * up
        update = self.down(hidden)
        return x + (update if modulation is None else update * modulation)


class Transformer(nn.Module):
    """Layers of experts under one attention.

    forward(streams, positions, mask, ...) -> streams after the chosen layers, final norm not applied (see `finish`).
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        if config.heads % config.kv_heads:
            raise ValueError(f"heads: expected a multiple of kv_heads={config.kv_heads}, got {config.heads}")
        self.config = config
        self.layers = nn.ModuleList(
            nn.ModuleList(ExpertLayer(expert, config) for expert in config.experts) for _ in range(config.depth)
        )
        self.final_norms = nn.ModuleList(
            RMSNorm(expert.width, config.norm_eps, expert.condition_width) for expert in config.experts
        )
        # The same modules as plain lists: looking them up in a ModuleList is a good part of a one-token pass.
        self._experts = [list(layer) for layer in self.layers]
        half = config.head_dim // 2
        frequencies = config.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        weight = self.layers[0][0].qkv.weight
        return KVCache(
            self.config.depth, batch, self.config.kv_heads, capacity, self.config.head_dim,
            dtype or weight.dtype, weight.device,
        )  # fmt: skip

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, and sin with the sign of the first half flipped, for int positions [B, Q]: [B, 1, Q, head_dim]."""
        angles = positions[:, None, :, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def forward(
        self,
        streams: Sequence[Tensor | None],
        positions: Tensor | tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | PrefixMemory | None = None,
        write_index: int = 0,
        layers: range | None = None,
        condition: Tensor | None = None,
        fill_only: bool = False,
    ) -> list[Tensor | None]:
        """Run `layers` over the concatenation of the streams, in expert order.

        streams: one [B, Q_e, D_e] per expert, or None for an expert that is not in this pass. positions: int[B, Q],
        Q the sum of Q_e. mask: bool[B, Q, K], K the keys seen: Q without a cache, else what the cache returns for
        this write (see KVCache.write); None means every query sees every key. Many passes over the same places take
        what `rotary` made of the positions and what `additive` made of the mask. cache, write_index: where the Q new
        entries go. layers: default all. condition: [B, C] for experts with adaptive norms. fill_only: only the cache
        is wanted; the last of the layers stops at its keys and values, and the streams come out as they entered it.
        """
        present = [i for i, x in enumerate(streams) if x is not None]
        hidden = [x for x in streams if x is not None]
        sizes = [x.shape[1] for x in hidden]
        config, (cos, sin) = self.config, self.rotary(positions) if isinstance(positions, Tensor) else positions
        bias = mask
        if mask is not None:
            bias = self._spread(additive(mask, hidden[0].dtype) if mask.dtype == torch.bool else mask)
        layers = range(config.depth) if layers is None else layers
        for index in layers:
            layer = self._experts[index]
            projected, gates = [], []
            for expert, x in zip(present, hidden):
                normed, gate = layer[expert].attention_norm(x, condition)
                projected.append(layer[expert].qkv(normed))
                gates.append(gate)
            joined = projected[0] if len(projected) == 1 else torch.cat(projected, dim=1)
            batch, count, _ = joined.shape
            heads = joined.view(batch, count, -1, config.head_dim).transpose(1, 2)  # [B, heads + 2 kv, Q, head_dim]
            turned_heads, v = heads.split((config.heads + config.kv_heads, config.kv_heads), dim=1)
            q, k = rotate(turned_heads, cos, sin).split((config.heads, config.kv_heads), dim=1)
            if cache is not None:
                k, v = cache.write(index, k, v, write_index)
            if fill_only and index == layers[-1]:
                break
            mixed = attend(q, k, v, bias).transpose(1, 2).flatten(2)  # [B, Q, heads * head_dim]
            parts = mixed.split(sizes, dim=1) if len(sizes) > 1 else (mixed,)
            for slot, (expert, part) in enumerate(zip(present, parts)):
                update = layer[expert].out(part)
                gate = gates[slot]
                hidden[slot] = layer[expert].mlp(hidden[slot] + (update if gate is None else update * gate), condition)
        out: list[Tensor | None] = [None] * len(self.config.experts)
        for expert, x in zip(present, hidden):
            out[expert] = x
        return out

    def finish(self, expert: int, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Final norm of one expert's stream, before a head."""
        return self.final_norms[expert](x, condition)[0]

    def _spread(self, bias: Tensor) -> Tensor:
        """[B, Q, K] -> the shape that `attend` takes on this device, made once for all layers."""
        if bias.device.type != "cpu":
            return bias[:, None]
        batch, count, keys = bias.shape
        if batch == count == 1:
            return bias  # broadcasts by itself: the path of cached decoding
        groups = self.config.heads // self.config.kv_heads
        shape = (batch, self.config.kv_heads, groups, count, keys)
        return bias[:, None, None].expand(shape).reshape(batch * self.config.kv_heads, groups * count, keys)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """bool[...], True where a query may look, -> 0 there and -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Grouped attention: q [B, heads, Q, d], k and v [B, kv_heads, K, d] -> [B, heads, Q, d].

    On a CPU the fused kernel's backward pass is several times slower than plain products at these sizes, and its call
    costs more than three small ones, so that path is written out: query heads of one group are folded into rows, and
    no key is copied.
    """
    if k.dtype != q.dtype:
        k, v = k.to(q.dtype), v.to(q.dtype)
    groups = q.shape[1] // k.shape[1]
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=groups > 1)
    batch, heads, count, width = q.shape
    rows = q.reshape(batch * k.shape[1], groups * count, width)
    keys, values = k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    if bias is None:
        scores = torch.bmm(rows, keys) * width**-0.5
    else:
        scores = torch.baddbmm(bias, rows, keys, alpha=width**-0.5)  # [B * kv_heads, groups * Q, K]
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values).view(batch, heads, count, width)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-split layout (that of Llama and Gemma checkpoints in transformers); sin is signed."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
