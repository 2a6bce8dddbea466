"""Heads: what goes into a suffix and what is read off it. A head never loops; decoders do.

All of them answer from the same prefix. Kinds, and the published form each follows:
    tokens    action tokens one after the other (OpenVLA; FAST, Pertsch et al. 2025)
    flow      velocity of a block of noisy actions on an expert with adaptive norms (pi0, Black et al. 2024; pi0.5)
    parallel  all actions in one pass from learned queries, trained with L1 (OpenVLA-OFT, Kim et al. 2025)
    hybrid    noise of actions inside the sequence, then action tokens behind them (HybridVLA, Liu et al. 2025)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

KINDS = ("tokens", "flow", "parallel", "hybrid")


@dataclass(frozen=True)
class HeadConfig:
    """One head of a model. name: how decoders and losses call it. expert: which expert runs its tokens.

    vocab: of its action tokenizer (tokens, hybrid). lookahead: further heads that guess the tokens after the next
    (tokens). exit_layer: after how many layers training asked for the tokens too, 0 for none (tokens).
    noise_steps: length of the diffusion's schedule (hybrid). tokenizer: fingerprint of the action tokenizer that it was
    trained with, "" where nobody knows: another one of the same size gives other actions, and no error.
    """

    name: str
    kind: str
    expert: int
    vocab: int = 0
    lookahead: int = 0
    exit_layer: int = 0
    noise_steps: int = 100
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"heads.{self.name}.kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if (self.vocab > 0) != (self.kind in ("tokens", "hybrid")):
            expected = "above 0" if self.vocab == 0 else "0"
            raise ValueError(f"heads.{self.name}.vocab: expected {expected}, got {self.vocab}")


class TokenHead(nn.Module):
    """Action tokens in and out: an embedding (with one extra entry, the start token) and a linear read-out.

    width: of the expert that runs the suffix. vocab_size: of the action tokenizer. lookahead: heads that guess the
    second, third, ... token from now (blockwise decoding, Stern et al. 2018), residual layers before the same read-out.
    """

    def __init__(self, width: int, vocab_size: int, lookahead: int = 0):
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.logits = nn.Linear(width, vocab_size)
        self.lookahead = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)) for _ in range(lookahead)
        )
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

    def guesses(self, hidden: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, lookahead, V]: logits of the token after the next, and so on."""
        return torch.stack([self.logits(hidden + guess(hidden)) for guess in self.lookahead], dim=2)


class FlowHead(nn.Module):
    """Noisy actions in, velocities out; time enters as the condition of the expert's norms.

    forward: hidden [B, T, D] -> velocity [B, T, A], zero at the start of training.
    """

    def __init__(self, width: int, condition_width: int, action_dim: int):
        super().__init__()
        self.condition_width = condition_width
        self.embed = nn.Linear(action_dim, width)
        self.time = nn.Sequential(
            nn.Linear(condition_width, condition_width), nn.SiLU(), nn.Linear(condition_width, condition_width)
        )
        self.read = nn.Linear(width, action_dim)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)

    def condition(self, time: Tensor) -> Tensor:
        """time: float[B] in [0, 1] -> [B, condition_width]"""
        return self.time(sinusoid(time, self.condition_width).to(self.embed.weight.dtype))


class ParallelHead(nn.Module):
    """One learned query per action in, all actions out."""

    def __init__(self, width: int, horizon: int, action_dim: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.read = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, action_dim))


class HybridHead(nn.Module):
    """Diffusion inside the sequence: a marker, the timestep, T noisy actions and a closing marker, before the tokens.

    The closing marker keeps the last noisy action from being asked for the first token. In HybridVLA's release the
    state stands behind the first marker, an empty token behind the second, and the tokens end with a learned end
    token; here the state is in the prefix, and chunks have a known size. `noise` is read at the noisy
    actions and is zero at the start of training.
    """

    def __init__(self, width: int, action_dim: int, vocab_size: int, noise_steps: int):
        super().__init__()
        self.noise_steps = noise_steps
        self.tokens = TokenHead(width, vocab_size)
        self.markers = nn.Parameter(torch.randn(2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.action = nn.Sequential(nn.Linear(action_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.noise = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, action_dim))
        nn.init.zeros_(self.noise[2].weight)
        nn.init.zeros_(self.noise[2].bias)

    def embed(self, noisy: Tensor, step: Tensor) -> Tensor:
        """noisy: [B, T, A], step: int64[B] in 0..noise_steps - 1 -> [B, T + 3, D]"""
        weight = self.markers
        time = self.time(sinusoid(step.float() / self.noise_steps, weight.shape[1]).to(weight.dtype))
        begin, end = self.markers[:, None, None].expand(-1, len(noisy), 1, -1)
        return torch.cat((begin, time[:, None], self.action(noisy.to(weight.dtype)), end), dim=1)


class RegressionHead(nn.Module):
    """A two-layer read-out of one token: [B, D] -> [B, size]. Auxiliary targets; not used when acting."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def sinusoid(time: Tensor, width: int) -> Tensor:
    """float[B] in [0, 1] -> float32[B, width], wavelengths from 4 down to 0.004 of the interval (pi0, appendix B)."""
    count = width // 2
    periods = torch.logspace(math.log10(4.0), math.log10(4e-3), count, device=time.device)
    angles = time[:, None].float() * (2 * math.pi / periods)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def signal_shares(steps: int, device: torch.device | str = "cpu") -> Tensor:
    """float32[steps]: how much of the signal's variance is left after each diffusion step, the cosine schedule
    (Nichol and Dhariwal 2021; "squaredcos_cap_v2" in diffusers)."""
    edges = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    curve = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0).float().to(device)
