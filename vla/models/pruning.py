"""Visual tokens that leave a prefix after some layers, and what a prefix costs. Two ways to let them go.

TokenSelection: pruning by information contribution (FlashVLA, arXiv 2505.21200; TokenCarve), of any trained model.
After `layer` layers the visual rows of the hidden states, H [N, d] = U S V^T, say how much each token contributes
(FlashVLA takes the last layer's attention output for H; this is its whole output, as in TokenCarve's code):
score(x) = sum over i <= r of |u_xi s_i|, the L1 norm of the token in the first r principal axes. No attention map is
needed. Only U S matters, and H H^T = U S^2 U^T, so an eigendecomposition of the N x N Gram matrix gives it, far sooner
than an SVD. r is the effective rank of Roy and Vetterli (2007), rounded up: exp of the entropy of s_i / sum s. It needs
no threshold, and cuts the axes whose singular values are rounding noise; the paper says "effective rank" and no more.

What the suffix sees. The paper drops tokens for later layers only, so its first layers keep the entries of all tokens.
Here the entries of dropped tokens leave every layer: prefix and suffix then have one length, one mask and one table of
rotary positions, no pass behind the prefix has to know of pruning, and each of them is cheaper. The entries that
remain in the first layers were still computed among all tokens, and every survivor keeps its rotary position; what is
lost beyond the paper's form is the suffix's own look at dropped tokens in the first `layer` layers. With all tokens
kept nothing changes, bit for bit.

RegisterConfig: Victor (Wen et al. 2024, arXiv 2410.14072), which a model is trained with. Learned registers stand
behind the visual tokens; after `layer` layers all visual tokens leave, and registers, points, text and state go on with
the positions they have. Until then registers see everything, and visual tokens are seen by registers and each other
only: all that text, state and suffixes learn of the grids comes through a register, which has read the words. So no
pass behind the prefix misses a dropped entry, in training as in decoding, and entries leave every layer here too. (In a
causal language model, as the paper's, text behind the registers can still look at visual tokens in the first layers.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vla.errors import ConfigError, explain

if TYPE_CHECKING:
    from vla.models.vla import ModelConfig


@dataclass(frozen=True)
class RegisterConfig:
    """Learned tokens that take over from the visual ones. Plain data: part of a model.

    count: R (the paper: 8). layer: K, layers that run with visual tokens, from 1 to the depth; at the depth none ever
    leaves, and registers are R more tokens of an ordinary prefix.
    """

    count: int = 8
    layer: int = 2

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(explain("model.registers", "at least 1", self.count, "The paper uses 8; 0 for none."))
        if self.layer < 1:
            raise ConfigError(explain("model.register_layer", "at least 1", self.layer, "Registers have to look once."))


@dataclass(frozen=True)
class TokenSelection:
    """Which visual tokens stay. Text, state and points always do.

    layer: layers that see all tokens, at least 1, below the depth (the paper: 2). keep: how many stay, or, as a float
    up to 1.0, which share; over all cameras together, the same number for every sample. drop: False only scores them.
    """

    layer: int = 2
    keep: float = 0.5
    drop: bool = True

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ConfigError(explain("pruning.layer", "at least 1", self.layer, "The paper uses 2."))
        if self.keep <= 0 or (isinstance(self.keep, float) and self.keep > 1):
            expected = "a number of tokens, or a share above 0.0 up to 1.0"
            raise ConfigError(explain("pruning.keep", expected, self.keep, "0.5 keeps half of them."))

    def count(self, tokens: int) -> int:
        """k: how many of `tokens` visual tokens stay."""
        return max(1, round(self.keep * tokens)) if isinstance(self.keep, float) else int(self.keep)

    def check(self, config: ModelConfig) -> None:
        """ConfigError when this model cannot be pruned so."""
        depth, tokens = config.transformer.depth, config.visual_tokens
        if config.registers is not None:
            got = f"{config.registers.count} registers"
            remedy = "Its visual tokens leave already: run it without pruning, and without reuse, which asks for it."
            raise ConfigError(explain("pruning", "a model without registers", got, remedy))
        if self.layer >= depth:
            raise ConfigError(explain("pruning.layer", f"below the depth, {depth}", self.layer, "Prune sooner."))
        if self.count(tokens) > tokens:
            remedy = "Keep fewer; 1.0 keeps all."
            raise ConfigError(explain("pruning.keep", f"at most {tokens} visual tokens", self.keep, remedy))

    def choose(self, hidden: Tensor, places: Tensor, valid: Tensor) -> Tensor:
        """Places of the kept tokens, int64[B, k], ascending.

        hidden: [B, P, D] after `layer` layers. places: int64[N], where the visual tokens stand. valid: bool[B, P];
        padding counts for nothing and goes first.
        """
        seen = valid[:, places]
        scores = contributions(hidden[:, places] * seen[..., None]).masked_fill(~seen, -1.0)
        best = scores.topk(self.count(len(places)), dim=1).indices
        return places[best.sort(dim=1).values]


def survivors(kept: Tensor | None, places: Tensor, valid: Tensor) -> Tensor:
    """Places of the tokens that stay, int64[B, P'], ascending: all P but the visual ones, at `places`, not in `kept`.

    valid: bool[B, P], for the shape; padding stays.
    """
    stays = torch.ones_like(valid)
    stays[:, places] = False
    count = valid.shape[1] - len(places)  # known on the host: no wait for the device
    if kept is not None:
        stays.scatter_(1, kept, True)
        count += kept.shape[1]
    return stays.byte().argsort(dim=1, descending=True, stable=True)[:, :count]


def contributions(rows: Tensor) -> Tensor:
    """Information contribution of each row: [B, N, d] -> float32[B, N]."""
    rows = rows.float()
    values, axes = torch.linalg.eigh(rows @ rows.transpose(1, 2))
    sizes = values.clamp(min=0).sqrt()  # [B, N], singular values, ascending
    shares = sizes / sizes.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    rank = torch.special.entr(shares).sum(dim=1, keepdim=True).exp().ceil()
    places = torch.arange(sizes.shape[1], 0, -1, device=rows.device)  # of each value among the descending ones
    return (axes.abs() * torch.where(places <= rank, sizes, 0.0)[:, None]).sum(dim=2)


def eigen_flops(size: int) -> int:
    """Of the eigendecomposition of a symmetric [size, size] matrix, about (Golub and Van Loan, section 8.3)."""
    return 9 * size**3


def prefix_flops(config: ModelConfig, selection: TokenSelection | None = None) -> int:
    """Floating-point operations of one sample's prefix in the transformer, a multiply-add as two.

    Products of matrices only, as torch's FlopCounterMode counts them, and with a selection the eigendecomposition,
    which it does not. Image encoders are not in it: pruning leaves them as they are.
    """
    transformer = config.transformer
    expert, inner = transformer.experts[0], transformer.heads * transformer.head_dim
    wide = inner + 2 * transformer.kv_heads * transformer.head_dim
    visual, leave = config.visual_tokens, config.visual_layers if selection is None else selection.layer
    length = sum(camera.tokens for camera in config.cameras) + config.text_length + 1
    length += config.registers.count if config.registers is not None else 0
    total = 0
    for layer in range(transformer.depth):
        if layer == leave:
            if selection is not None:
                total += 2 * visual**2 * expert.width + eigen_flops(visual)
            if selection is None or selection.drop:
                length -= visual - (0 if selection is None else selection.count(visual))
        total += 2 * length * expert.width * wide
        if layer < transformer.depth - 1:  # the last layer stops at its keys and values
            total += 4 * length**2 * inner + 2 * length * inner * expert.width
            total += 6 * length * expert.width * expert.mlp_width
    return total
