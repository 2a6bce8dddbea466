"""Suffix passes of one sample on a CPU, in numpy: what `Transformer.run` computes, several times sooner.

A pass over one action token of a small expert is a fraction of a millisecond of arithmetic under a hundred calls. numpy
answers a call in less than half of the time torch takes. It also lets go of the interpreter less often, which counts in
a node whose other threads receive. Passes over all actions of a chunk (flow, diffusion, parallel) gain by the panels.

Weights lie in panels of a few columns. To multiply a few rows with a whole matrix BLAS first copies the matrix into a
layout of its own, which costs several times what one row does; a small matrix it takes as it lies. In panels, 8 rows
cost about 1.6 times one row where they cost 5 times as much.
The cache is torch's own memory, so both may be used in turn; weights are copied, and copied again when they change.
What modulates norms follows from the time of a flow alone, and decoders take the same few times: each is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vla.models.heads import FlowHead, HybridHead, TokenHead
from vla.models.kv_cache import KVCache
from vla.models.transformer import RMSNorm, Transformer

# Passes over more tokens are left to torch, whose products of large matrices are the faster ones.
MOST_TOKENS = 32

MOST_TIMES = 64  # of one flow, to keep the norms of

_VERSION = attrgetter("_version")

_PANEL = 32  # columns; of 8 to 128 the best or near it, for 1 to 16 rows and widths of 128 to 2048


class _Linear:
    """float32[Q, in] -> float32[Q, out], with weights float32[panels, in, _PANEL]; the last panel is filled up."""

    def __init__(self, linear: nn.Linear):
        weight = _view(linear.weight)
        self.width = len(weight)
        filled = np.pad(weight, ((0, -self.width % _PANEL), (0, 0)))
        self.panels = np.ascontiguousarray(filled.reshape(-1, _PANEL, weight.shape[1]).swapaxes(1, 2))
        self.bias = None if linear.bias is None else _view(linear.bias).copy()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        out: np.ndarray = np.matmul(x, self.panels).swapaxes(0, 1).reshape(len(x), -1)[:, : self.width]
        return out if self.bias is None else out + self.bias


class _Norm(NamedTuple):
    """One norm at one time. gate: of what comes back from behind it. shift, gate: None where nothing modulates."""

    scale: np.ndarray
    shift: np.ndarray | None = None
    gate: np.ndarray | None = None


@dataclass(frozen=True)
class _Layer:
    """What one expert owns in one layer beside its norms."""

    qkv: _Linear
    out: _Linear
    gate_up: _Linear
    down: _Linear


class HostWeights:
    """float32 copies of what one expert and its head own. `serves` says whether a model can be run this way.

    embedding, logits: of heads that make tokens.
    """

    @staticmethod
    def serves(transformer: Transformer, expert: int) -> bool:
        return _on_host(transformer.layers[0][expert].qkv.weight)

    def __init__(self, transformer: Transformer, expert: int, head: nn.Module):
        self.config = transformer.config
        layers, self._head = [layer[expert] for layer in transformer.layers], head
        self.layers = [
            _Layer(_Linear(layer.qkv), _Linear(layer.out), _Linear(layer.gate_up), _Linear(layer.down))
            for layer in layers
        ]
        # In the order of a pass: of the attention and the MLP of each layer, and the final one.
        inner = [norm for layer in layers for norm in (layer.attention_norm, layer.mlp_norm)]
        self._norm_modules = [*inner, transformer.final_norms[expert]]
        self._norms: dict[float | None, list[_Norm]] = {}
        tokens = head.tokens if isinstance(head, HybridHead) else head
        if isinstance(tokens, TokenHead):
            self.embedding = _view(tokens.embedding.weight).copy()
            self.logits = _Linear(tokens.logits)
        own = [*layers, self._norm_modules[-1], head]
        # Tensors made in inference mode count no writes, and cannot be trained either.
        self._sources = [weight for module in own for weight in module.parameters() if not weight.is_inference()]
        self._versions = list(map(_VERSION, self._sources))
        self._first = layers[0].qkv.weight

    def norms(self, time: float | None) -> list[_Norm]:
        """Two of each layer and the final one. time: of a flow, None for experts whose norms nothing modulates."""
        norms = self._norms.get(time)
        if norms is None:
            condition = None
            if time is not None:
                assert isinstance(self._head, FlowHead)
                condition = self._head.condition(torch.tensor([time]))
            norms = [_norm(module, condition) for module in self._norm_modules]
            if len(self._norms) == MOST_TIMES:
                self._norms.clear()
            self._norms[time] = norms
        return norms

    @property
    def current(self) -> bool:
        """Whether no weight was written or moved since the copy."""
        return _on_host(self._first) and self._versions == list(map(_VERSION, self._sources))


class HostSuffix:
    """Passes behind one prefix, batch 1. rotary, bias: as in `Prefix`. time: see `HostWeights.norms`."""

    def __init__(
        self, weights: HostWeights, cache: KVCache, rotary: tuple[Tensor, Tensor], bias: Tensor,
        time: float | None = None,
    ):  # fmt: skip
        self.weights = weights
        self._norms = weights.norms(time)
        self._keys, self._values = _view(cache.keys)[:, 0], _view(cache.values)[:, 0]
        self._cos, self._sin = (_view(t)[0, 0][:, None] for t in rotary)  # [S, 1, head_dim]
        self._bias = _view(bias)[0]  # [S, P + S]

    def read(self, hidden: np.ndarray) -> np.ndarray:
        """float32[Q, D] -> logits float32[Q, V]"""
        return self.weights.logits(hidden)

    def hidden(self, x: np.ndarray, first: int, start: int, both_ways: bool = False) -> np.ndarray:
        """x: states float32[Q, D], the first of them number `first` of the suffix, written from cache entry `start` on.

        Normed hidden states float32[Q, D]. both_ways: the Q tokens see each other in both directions.
        """
        return self.finish(self.through(x, first, start, range(len(self.weights.layers)), both_ways))

    def finish(self, x: np.ndarray) -> np.ndarray:
        """The final norm, float32[Q, D]."""
        return self._normed(x, self._norms[-1])

    def through(self, x: np.ndarray, first: int, start: int, layers: range, both_ways: bool = False) -> np.ndarray:
        """As `hidden`, through some consecutive layers, without the final norm."""
        w, c = self.weights, self.weights.config
        count, end, turned = len(x), start + len(x), c.heads + c.kv_heads
        half, groups, scale = c.head_dim // 2, c.heads // c.kv_heads, np.float32(c.head_dim**-0.5)
        cos, sin = self._cos[first : first + count], self._sin[first : first + count]
        rows = slice(first + count - 1, first + count) if both_ways else slice(first, first + count)
        bias = self._bias[rows, :end]
        part = slice(layers.start, layers.stop)
        norms = self._norms[2 * layers.start : 2 * layers.stop]
        for layer, kept_keys, kept_values, attention_norm, mlp_norm in zip(
            w.layers[part], self._keys[part], self._values[part], norms[::2], norms[1::2]
        ):
            heads = layer.qkv(self._normed(x, attention_norm)).reshape(count, -1, c.head_dim)
            straight = heads[:, :turned]
            rolled = np.concatenate((straight[:, :, half:], straight[:, :, :half]), axis=2)
            straight = straight * cos + rolled * sin
            kept_keys[:, start:end] = straight[:, c.heads :].swapaxes(0, 1)
            kept_values[:, start:end] = heads[:, turned:].swapaxes(0, 1)
            queries = straight[:, : c.heads].reshape(count, c.kv_heads, groups, c.head_dim).transpose(1, 2, 0, 3)
            queries = queries.reshape(c.kv_heads, groups * count, c.head_dim) * scale
            scores = (queries @ kept_keys[:, :end].swapaxes(1, 2)).reshape(c.kv_heads, groups, count, end)
            scores += bias
            scores -= scores.max(axis=3, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=3, keepdims=True)
            mixed = scores.reshape(c.kv_heads, groups * count, end) @ kept_values[:, :end]
            mixed = mixed.reshape(c.kv_heads, groups, count, c.head_dim).transpose(2, 0, 1, 3).reshape(count, -1)
            x = _added(x, layer.out(mixed), attention_norm.gate)
            hidden = layer.gate_up(self._normed(x, mlp_norm))
            width = hidden.shape[1] // 2
            x = _added(x, layer.down(self._activate(hidden[:, :width]) * hidden[:, width:]), mlp_norm.gate)
        return x

    def _normed(self, x: np.ndarray, norm: _Norm) -> np.ndarray:
        squares = np.einsum("qd,qd->q", x, x)[:, None]
        eps = np.float32(self.weights.config.norm_eps)
        out: np.ndarray = x * norm.scale / np.sqrt(squares * np.float32(1 / x.shape[1]) + eps)
        return out if norm.shift is None else out + norm.shift

    def _activate(self, gate: np.ndarray) -> np.ndarray:
        # sigmoid(2 x) = (1 + tanh(x)) / 2, and numpy's tanh is several times as fast as any sigmoid at hand.
        half = gate * np.float32(0.5)
        bent = half
        if self.weights.config.activation == "gelu_tanh":
            bent = np.float32((2 / np.pi) ** 0.5) * (gate + np.float32(0.044715) * (gate * gate * gate))
        out: np.ndarray = np.tanh(bent)
        out *= half
        out += half
        return out


def _view(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = (tensor.detach() if tensor.requires_grad else tensor).numpy()
    return array


def _on_host(weight: Tensor) -> bool:
    return weight.is_cpu and weight.itemsize == 4


def _norm(module: RMSNorm, condition: Tensor | None) -> _Norm:
    scale = 1 + _view(module.weight)
    if module.modulation is None or condition is None:
        return _Norm(scale)
    more, shift, gate = (_view(part) for part in module.modulation(condition)[0].chunk(3))
    return _Norm(scale * (1 + more), shift, 1 + gate)


def _added(x: np.ndarray, update: np.ndarray, gate: np.ndarray | None) -> np.ndarray:
    return x + (update if gate is None else update * gate)
