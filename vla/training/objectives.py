"""One function per loss. All take model outputs and normalised targets, and return a scalar."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vla.models.heads import signal_shares
from vla.training.dataset import IGNORE


def action_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over action tokens. logits: [B, K, V]; labels: int64[B, K], IGNORE without a loss."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


def token_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of action tokens whose most likely id is the label."""
    counted = labels != IGNORE
    return ((logits.argmax(dim=-1) == labels) & counted).sum() / counted.sum()


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of a read-out. prediction: [B, n]; target: [B, ...] of n values per sample, NaN for none."""
    target = target.flatten(1).float()
    counted = ~target.isnan()
    error = (prediction.float() - target.nan_to_num()).abs()  # a NaN behind `where` would still poison the gradient
    return torch.where(counted, error, 0.0).sum() / counted.sum().clamp(min=1)


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, same shapes."""
    return F.mse_loss(prediction.float(), target.float())


def divergence(target: Tensor, guess: Tensor) -> Tensor:
    """Mean over tokens of KL(target || guess), both logits [B, K, V]. CEED-VLA sums over a chunk's tokens: its weight
    for this loss is 1/K of the one meant here."""
    wanted = target.float().log_softmax(dim=-1)
    return F.kl_div(guess.float().log_softmax(dim=-1), wanted, reduction="none", log_target=True).sum(dim=-1).mean()


def noised(actions: Tensor, noise: Tensor, step: Tensor, steps: int) -> Tensor:
    """Actions after `step` steps of diffusion. actions, noise: [B, T, A], step: int64[B]."""
    share = signal_shares(steps, actions.device)[step][:, None, None]
    return share.sqrt() * actions + (1 - share).sqrt() * noise


def finite(loss: Tensor, step: int) -> Tensor:
    """The loss, or FloatingPointError when training has diverged."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss: expected a finite value, got {loss.item()} at step {step}. Lower lr.")
    return loss
