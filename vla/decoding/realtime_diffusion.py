"""Real-time chunking for diffusion: the actions already under way are painted into every step, and the rest is denoised
behind them.

DDIM's path to given actions y from noise e is known: sqrt(a) y + sqrt(1 - a) e with a share `a` of signal. Rows that
are held to it at every step ("replacement": Song et al., ICLR 2021, section 5; RePaint, Lugmayr et al. 2022) end at y,
and the others are denoised seeing them. Both are one change of the predicted noise: what it says of the clean actions
x0 becomes x0 + m (y - x0), where m is RTC's soft mask (`goals`), 1 for committed actions.

Not RTC's guidance, which pulls by the vector-Jacobian product through the denoiser: a hybrid head is causal, so its
estimate of an early action does not depend on later ones, and the product carries nothing from the committed actions to
the rest. What does is that later actions read them. On a causal denoiser of a known Gaussian, 4 steps of guidance end
farther from the conditional mean than 4 in-painted ones, and each costs a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import Decoded, DecodeInput, find_head, gaussian, generators, predictions
from vla.decoding.chunks import check_reach, goals, keep_committed
from vla.decoding.diffusion import DiffusionDecoder, ddim, ladder
from vla.models.heads import signal_shares


class RealTimeDiffusionDecoder:
    """DDIM of a hybrid head, in-painted. steps, head: as DiffusionDecoder's; a step costs one pass.

    The committed actions come back as they were committed. Behind them so many as `reach` says, None for as far as the
    old chunk goes, go over from it to the new one. Painting holds harder than guidance pulls: with all of them the
    shipped head loses 9 points of success, with 1 less than 2, and joins less smoothly. Grippers follow it where the
    mask is at least a half. Without a previous chunk it is DiffusionDecoder. Notes: "missed", by sample, largest
    distance, normalised, of what was painted in from the committed actions: rounding.
    """

    exact = False

    def __init__(self, steps: int = 4, reach: int | None = 1, head: str = ""):
        check_reach(reach)
        self.steps, self.reach, self.head = steps, reach, head
        self._free = DiffusionDecoder(steps, head)  # refuses what is out of range

    def check(self, bundle: Bundle) -> None:
        self._free.check(bundle)

    @torch.inference_mode()
    def decode(self, given: DecodeInput) -> Decoded:
        targets, masks, counts = goals(given, self.reach)
        if not masks.any():
            return self._free.decode(given)
        head, grippers = find_head(given.bundle, self.head, "hybrid"), list(given.bundle.embodiment.grippers)
        weights = np.repeat(masks[..., None], targets.shape[2], axis=2)
        weights[..., grippers] = weights[..., grippers] >= 0.5
        device, total = given.prefix.device, given.bundle.config.head(head).noise_steps
        target, mask = torch.from_numpy(targets).to(device), torch.from_numpy(weights).float().to(device)
        predict = predictions(given, head, given.bundle.model.noise)
        noise = gaussian(given, generators(given))
        actions = inpainted(predict, noise, target, mask, self.steps, total).cpu().numpy()
        return Decoded(actions, self.steps, notes={"missed": keep_committed(actions, targets, counts)})


def inpainted(
    predict: Callable[[Tensor, int], Tensor], noise: Tensor, target: Tensor, mask: Tensor, steps: int, total: int
) -> Tensor:
    """`ddim` to actions that agree with `target` as far as `mask` says; all [B, T, A], mask in 0..1."""
    shares = signal_shares(total).tolist()

    def held(noisy: Tensor, step: int) -> Tensor:
        share, predicted = shares[step], predict(noisy, step)
        clean = (noisy - (1 - share) ** 0.5 * predicted) / share**0.5
        return predicted - (share / (1 - share)) ** 0.5 * mask * (target - clean)

    # Pure noise enters at a step where some of the variance should be signal (see `ladder`): here a part is known.
    share = shares[ladder(steps, total)[0]]
    begun = noise + mask * (share**0.5 * target + (1 - share) ** 0.5 * noise - noise)
    return ddim(held, begun, steps, total)
