"""Suffix passes of one sample on a CPU, in numpy: what `Transformer.run` computes, several times sooner.

A pass over one action token of a small expert is a fraction of a millisecond of arithmetic under a hundred calls. numpy
answers a call in less than half of the time torch takes. It also lets go of the interpreter less often, which counts in
a node whose other threads receive.

Weights lie in panels of a few columns. To multiply a few rows with a whole matrix BLAS first copies the matrix into a
layout of its own, which costs several times what one row does; a small matrix it takes as it lies. In panels, 8 rows
cost about 1.6 times one row where they cost 5 times as much.
The cache is torch's own memory, so both may be used in turn; weights are copied, and copied again when they change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from torch import Tensor, nn

from vla.models.heads import TokenHead
from vla.models.kv_cache import KVCache
from vla.models.transformer import Transformer

# Passes over more tokens are left to torch, whose products of large matrices are the faster ones.
MOST_TOKENS = 32

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


@dataclass(frozen=True)
class _Layer:
    """What one expert owns in one layer; norms as their scales."""

    attention_norm: np.ndarray
    qkv: _Linear
    out: _Linear
    mlp_norm: np.ndarray
    gate_up: _Linear
    down: _Linear


class HostWeights:
    """float32 copies of what one expert and its head own. `serves` says whether a model can be run this way."""

    @staticmethod
    def serves(transformer: Transformer, expert: int) -> bool:
        layer = transformer.layers[0][expert]
        weight = layer.qkv.weight
        return layer.attention_norm.modulation is None and weight.device.type == "cpu" and weight.itemsize == 4

    def __init__(self, transformer: Transformer, expert: int, head: TokenHead):
        self.config = transformer.config
        self.layers = [
            _Layer(
                _scale(layer[expert].attention_norm.weight),
                _Linear(layer[expert].qkv),
                _Linear(layer[expert].out),
                _scale(layer[expert].mlp_norm.weight),
                _Linear(layer[expert].gate_up),
                _Linear(layer[expert].down),
            )
            for layer in transformer.layers
        ]
        self.final_norm = _scale(transformer.final_norms[expert].weight)
        self.embedding = _view(head.embedding.weight).copy()
        self.logits = _Linear(head.logits)
        own = [*(layer[expert] for layer in transformer.layers), transformer.final_norms[expert], head]
        # Tensors made in inference mode count no writes, and cannot be trained either.
        self._sources = [weight for module in own for weight in module.parameters() if not weight.is_inference()]
        self._versions = [weight._version for weight in self._sources]

    @property
    def current(self) -> bool:
        """Whether no weight was written since the copy."""
        return self._versions == [weight._version for weight in self._sources]


class HostSuffix:
    """Passes behind one prefix, batch 1. rotary, bias: as in `Prefix`."""

    def __init__(self, weights: HostWeights, cache: KVCache, rotary: tuple[Tensor, Tensor], bias: Tensor):
        self.weights = weights
        self._keys, self._values = _view(cache.keys)[:, 0], _view(cache.values)[:, 0]
        self._cos, self._sin = (_view(t)[0, 0][:, None] for t in rotary)  # [S, 1, head_dim]
        self._bias = _view(bias)[0]  # [S, P + S]

    def read(self, hidden: np.ndarray) -> np.ndarray:
        """float32[Q, D] -> logits float32[Q, V]"""
        return self.weights.logits(hidden)

    def hidden(self, ids: list[int], first: int, start: int, both_ways: bool = False) -> np.ndarray:
        """ids: Q tokens, the first of them number `first` of the suffix, written from cache entry `start` on.

        Normed hidden states float32[Q, D]. both_ways: the Q tokens see each other in both directions.
        """
        w = self.weights
        return self.finish(self.through(w.embedding[ids], first, start, range(len(w.layers)), both_ways))

    def finish(self, x: np.ndarray) -> np.ndarray:
        """The final norm, float32[Q, D]."""
        return self._norm(x, self.weights.final_norm)

    def through(self, x: np.ndarray, first: int, start: int, layers: range, both_ways: bool = False) -> np.ndarray:
        """As `hidden`, from states float32[Q, D], through some consecutive layers, without the final norm."""
        w, c = self.weights, self.weights.config
        count, end, turned = len(x), start + len(x), c.heads + c.kv_heads
        half, groups, scale = c.head_dim // 2, c.heads // c.kv_heads, np.float32(c.head_dim**-0.5)
        cos, sin = self._cos[first : first + count], self._sin[first : first + count]
        rows = slice(first + count - 1, first + count) if both_ways else slice(first, first + count)
        bias = self._bias[rows, :end]
        part = slice(layers.start, layers.stop)
        for layer, kept_keys, kept_values in zip(w.layers[part], self._keys[part], self._values[part]):
            heads = layer.qkv(self._norm(x, layer.attention_norm)).reshape(count, -1, c.head_dim)
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
            x = x + layer.out(mixed)
            hidden = layer.gate_up(self._norm(x, layer.mlp_norm))
            width = hidden.shape[1] // 2
            x = x + layer.down(self._activate(hidden[:, :width]) * hidden[:, width:])
        return x

    def _norm(self, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        squares = np.einsum("qd,qd->q", x, x)[:, None]
        return x * scale / np.sqrt(squares * np.float32(1 / x.shape[1]) + np.float32(self.weights.config.norm_eps))

    def _activate(self, gate: np.ndarray) -> np.ndarray:
        if self.weights.config.activation == "gelu_tanh":
            return gate * expit(np.float32(2 * (2 / np.pi) ** 0.5) * (gate + np.float32(0.044715) * gate**3))
        return gate * expit(gate)


def _view(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().numpy()
    return array


def _scale(weight: Tensor) -> np.ndarray:
    return 1 + _view(weight)
