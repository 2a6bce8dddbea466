"""Parallel decoding: a whole chunk in one pass (OpenVLA-OFT, Kim et al. 2025)."""

from __future__ import annotations

import torch

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import Decoded, DecodeInput, find_head


class ParallelDecoder:
    """One pass over learned queries; the same actions for every seed.

    head: name of the parallel head, "" for the first. Not exact: there is no greedy decoding of a continuous head. What
    holds instead is that the pass behind the cached prefix gives what an uncached one gives.
    """

    exact = False

    def __init__(self, head: str = ""):
        self.head = head

    def check(self, bundle: Bundle) -> None:
        find_head(bundle, self.head, "parallel")

    @torch.inference_mode()
    def decode(self, given: DecodeInput) -> Decoded:
        head = find_head(given.bundle, self.head, "parallel")
        return Decoded(given.bundle.model.parallel_actions(given.prefix, head).float().cpu().numpy(), 1)
