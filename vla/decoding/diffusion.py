"""Diffusion inside the sequence: a hybrid head's noisy actions are denoised by DDIM (HybridVLA, Liu et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import Decoded, DecodeInput, find_head, gaussian, generators, predictions
from vla.errors import ConfigError, explain
from vla.models.heads import signal_shares


class DiffusionDecoder:
    """DDIM (Song et al. 2021) with eta 0 and no clipping; every pass writes the noisy actions anew behind the cached
    prefix. HybridVLA takes 4 of 100 steps.

    steps: passes behind the prefix, from 2 to the head's noise_steps: see `ladder`. head: name of the hybrid head, ""
    for the first. Not exact: there is no greedy decoding of a continuous head. What holds instead is that every pass
    behind the cached prefix gives what one uncached pass over the whole sequence gives, so the actions do too.
    """

    exact = False

    def __init__(self, steps: int = 4, head: str = ""):
        if steps < 2:
            remedy = "HybridVLA takes 4; a single one would be the last, which expects clean actions."
            raise ConfigError(explain("decoder.steps", "at least 2", steps, remedy))
        self.steps, self.head = steps, head

    def check(self, bundle: Bundle) -> None:
        most = bundle.config.head(find_head(bundle, self.head, "hybrid")).noise_steps
        if self.steps > most:
            remedy = "The head was trained with no more."
            raise ConfigError(explain("decoder.steps", f"at most {most}", self.steps, remedy))

    @torch.inference_mode()
    def decode(self, given: DecodeInput) -> Decoded:
        head = find_head(given.bundle, self.head, "hybrid")
        predict = predictions(given, head, given.bundle.model.noise)
        total = given.bundle.config.head(head).noise_steps
        actions = ddim(predict, gaussian(given, generators(given)), self.steps, total)
        return Decoded(actions.cpu().numpy(), self.steps)


def ladder(steps: int, total: int) -> list[int]:
    """Which of `total` diffusion steps are taken, noisiest first: 75, 50, 25, 0 for 4 of 100.

    The published ("leading") spacing: evenly from step 0 up. Pure noise then enters at step 75, where a seventh of the
    variance should be signal. It must not enter at the very last step instead ("trailing"): the cosine schedule leaves
    2e-7 of the variance there, so that, without clipping, the first estimate of the actions would hold the head's error
    two thousand times over.
    """
    return [place * total // steps for place in reversed(range(steps))]


def ddim(predict: Callable[[Tensor, int], Tensor], noise: Tensor, steps: int, total: int) -> Tensor:
    """Denoise `noise` in `steps` of `total` diffusion steps; predict(noisy, step) gives the noise in `noisy`."""
    shares = signal_shares(total).tolist()
    taken = ladder(steps, total)
    noisy = noise
    for step, share, after in zip(taken, (shares[i] for i in taken), [*(shares[i] for i in taken[1:]), 1.0]):
        predicted = predict(noisy, step)
        clean = (noisy - (1 - share) ** 0.5 * predicted) / share**0.5
        noisy = after**0.5 * clean + (1 - after) ** 0.5 * predicted
    return noisy
