"""Two answers of one hybrid head, fused where the tokens are sure (HybridVLA, Liu et al. 2025, collaborative ensemble).

The tokens do not see the denoised actions. As in the released inference, and as training prepared them for, the places
before them hold fresh noise at a random timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import (
    Decoded,
    DecodedTokens,
    DecodeInput,
    TokenDecoder,
    detokenized,
    exactly,
    find_head,
    gaussian,
    generators,
)
from vla.decoding.diffusion import DiffusionDecoder
from vla.errors import ConfigError, explain, nearest
from vla.models.suffix import TokenSuffix
from vla.tokenizers import BinTokenizer

MODES = ("ensemble", "tokens", "diffusion")


class EnsembleDecoder:
    """The mean of both answers where the confidence is above the threshold, else the diffusion's.

    threshold: 0 to 1, published 0.96; a sample's confidence is the mean probability of the greedy tokens of the first
    action, grippers left out. (Published for chunks of one action of seven values: the first six tokens. Later actions
    are executed later or never, so they have no say.) steps: of DDIM, see DiffusionDecoder. mode: "ensemble", or one of
    the two answers by itself: "tokens", "diffusion". inner: what finds the tokens, see `exactly`; it changes how long
    that takes and nothing else. head: name of the hybrid head, "" for the first.

    Grippers are the actions with "gripper" in their name. Their mean, normalised, is made -1 or 1 again, by its sign,
    where the release takes 0.5 as the threshold.
    Not exact: the tokens are greedy's, but behind noise, and the noise follows the seed.
    Notes: inner's, which say nothing of the noise; by sample "confidence"; "averaged", 1 where the mean of both was
    used, else 0.
    """

    exact = False

    def __init__(
        self, threshold: float = 0.96, steps: int = 4, mode: str = "ensemble", inner: str = "autoregressive",
        head: str = "",
    ):  # fmt: skip
        if not 0 <= threshold <= 1:
            raise ConfigError(explain("decoder.threshold", "0 to 1", threshold, "HybridVLA's is 0.96."))
        if mode not in MODES:
            raise ConfigError(f"decoder.mode: unknown mode {mode!r}. {nearest(mode, MODES)}")
        self.threshold, self.steps, self.mode, self.inner, self.head = threshold, steps, mode, inner, head
        self._diffusion, self._inner = DiffusionDecoder(steps, head), exactly(inner, head, "hybrid")

    def check(self, bundle: Bundle) -> None:
        self._diffusion.check(bundle)
        self._inner.check(bundle)
        head = find_head(bundle, self.head, "hybrid")
        tokenizer = bundle.action_tokenizers[head]
        if self.mode == "ensemble" and not isinstance(tokenizer, BinTokenizer):
            got = f"{type(tokenizer).__name__}, whose first tokens are not the first action"
            remedy = "Choose mode=tokens or mode=diffusion, or train the head with tokenizer.kind=bins."
            raise ConfigError(explain(f"tokenizer of {head}", "one token per value", got, remedy))

    @torch.inference_mode()
    def decode(self, given: DecodeInput) -> Decoded:
        if self.mode == "diffusion":
            return self._diffusion.decode(given)
        head = find_head(given.bundle, self.head, "hybrid")
        words = _words(given, head, self._inner)
        spoken = detokenized(given.bundle, head, words)
        if self.mode == "tokens":
            return spoken
        diffused = self._diffusion.decode(given)
        grippers = given.bundle.embodiment.grippers
        first = np.array([row[: given.bundle.config.action_dim] for row in words.probabilities])
        confidence = np.delete(first, grippers, axis=1).mean(axis=1)
        actions, averaged = fuse(diffused.actions, spoken.actions, confidence, self.threshold, grippers)
        return replace(
            spoken,
            actions=actions,
            passes=diffused.passes + spoken.passes,
            ids=[ids if used else () for ids, used in zip(spoken.ids, averaged)],
            confidence=confidence.tolist(),
            notes=spoken.notes | {"confidence": confidence.tolist(), "averaged": averaged.astype(float).tolist()},
        )


def fuse(
    diffused: np.ndarray, spoken: np.ndarray, confidence: np.ndarray, threshold: float, grippers: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """diffused, spoken: normalised float32[B, T, A]. confidence: float[B]. grippers: which actions are -1 or 1.

    Returns actions float32[B, T, A], and bool[B]: in which samples they are the mean of both.
    """
    mean = (diffused + spoken) / 2
    mean[..., grippers] = np.where(mean[..., grippers] > 0, 1.0, -1.0)
    averaged = confidence > threshold
    return np.where(averaged[:, None, None], mean, diffused), averaged


def _words(given: DecodeInput, head: str, inner: TokenDecoder) -> DecodedTokens:
    """Greedy tokens behind T + 3 entries of fresh noise at a random timestep."""
    model, prefix, draws = given.bundle.model, given.prefix, generators(given)
    gaussian(given, draws)  # the diffusion starts from these numbers: the same ones would not be fresh
    noisy = gaussian(given, draws)
    total = given.bundle.config.head(head).noise_steps
    step = torch.cat([torch.randint(total, (1,), generator=draw) for draw in draws]).to(prefix.device)
    model.noise(prefix, head, noisy, step)
    prefix.cache.advance(noisy.shape[1] + 3)
    hints = inner.hints(given, head)
    out = inner.generate(TokenSuffix(model, prefix, head), given.grammar(head), hints)
    prefix.cache.truncate(prefix.length)
    return replace(out, passes=out.passes + 1)
