"""Flow matching: noise is carried to actions along the velocities that a flow head gives (pi0, Black et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import Decoded, DecodeInput, find_head, gaussian, generators, predictions
from vla.errors import ConfigError, explain


class FlowDecoder:
    """Euler's method from noise at time 1 to actions at time 0, in steps of equal length. pi0 takes 10.

    steps: passes behind the prefix, at least 1. head: name of the flow head, "" for the first.
    Not exact: there is no greedy decoding of a continuous head. What holds instead is that every pass behind the cached
    prefix gives what one uncached pass over the whole sequence gives, so the actions do too.
    """

    exact = False

    def __init__(self, steps: int = 10, head: str = ""):
        if steps < 1:
            raise ConfigError(explain("decoder.steps", "at least 1", steps, "pi0 takes 10."))
        self.steps, self.head = steps, head

    def check(self, bundle: Bundle) -> None:
        find_head(bundle, self.head, "flow")

    @torch.inference_mode()
    def decode(self, given: DecodeInput) -> Decoded:
        velocity = predictions(given, find_head(given.bundle, self.head, "flow"), given.bundle.model.velocity)
        actions = euler(velocity, gaussian(given, generators(given)), self.steps)
        return Decoded(actions.cpu().numpy(), self.steps)


def euler(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Follow d noisy / d time = velocity(noisy, time) from `noise` at time 1 to time 0, in `steps` equal steps."""
    noisy = noise
    for left in range(steps, 0, -1):
        noisy = noisy - velocity(noisy, left / steps) / steps
    return noisy
