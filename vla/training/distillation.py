"""Consistency distillation of a token head: what its teacher says, and where a student stands on its way there.

CEED-VLA (Song et al. 2025) and CLLM (Kou et al. 2024) store the teacher's Jacobi trajectories. Here the teacher's fixed
points are stored and the iterates are the student's own, made anew at every step: they stay those that its decoding
goes through, however far it has come, and a frame costs one chunk of tokens instead of one per pass. Fixed points are
those of the images as they are: with `image_shift` a student walks towards them from shifted ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla.decoding.base import Grammar
from vla.decoding.jacobi import jacobi
from vla.files import replacing
from vla.models.suffix import TokenSuffix
from vla.models.vla import Vla
from vla.training.dataset import TrainingData

_BATCH = 64
_WINDOW = 8  # tokens per block while looking for the fixed point, which it does not change


class FixedPoints:
    """ids: uint16[N, K], greedy decoding of N frames. frames: int64[N], ascending."""

    def __init__(self, frames: np.ndarray, ids: np.ndarray):
        self.frames, self.ids = frames, ids

    def take(self, frames: np.ndarray) -> np.ndarray:
        """int64[B] -> int64[B, K]"""
        return self.ids[np.searchsorted(self.frames, frames)].astype(np.int64)


def collect(
    model: Vla,
    head: str,
    grammar: Grammar,
    data: TrainingData,
    frames: np.ndarray,
    folder: Path,
    key: str,
    on_progress: Callable[[int, int], None],
) -> FixedPoints:
    """Decode `frames` (ascending). Finished batches stay in `folder`: a killed run goes on.

    key: what the fixed points depend on beside the frames: the teacher's bundle and head, and the data set.
    """
    digest = hashlib.sha256(json.dumps([key, head, _BATCH, frames.tolist()]).encode()).hexdigest()[:12]
    folder = folder / f"greedy-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(frames), _BATCH):
        path = folder / f"{start:08d}.npy"
        if not path.exists():
            batch = data.batch(frames[start : start + _BATCH])
            given = {name: torch.from_numpy(value).to(device) for name, value in vars(batch).items() if name in _SEEN}
            given["images"] = {name: torch.from_numpy(image).to(device) for name, image in batch.images.items()}
            with torch.inference_mode():
                suffix = _suffix(model, head, given, grammar.values)
                ids = jacobi(suffix, grammar, [()] * suffix.batch, _WINDOW).ids
            with replacing(path) as temporary, temporary.open("wb") as stream:
                np.save(stream, np.array(ids, np.uint16))
        parts.append(np.load(path))
        on_progress(min(start + _BATCH, len(frames)), len(frames))
    return FixedPoints(frames, np.concatenate(parts))


def way(seed: list[int], passes: int, values: int) -> tuple[int, int]:
    """Where on its way a student is asked, the same for a whole batch: passes done, 0 to `passes` - 1, and the first
    token that it guesses, those before being right, as where decoding goes block by block: 0 half of the time."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(passes)), int(rng.integers(values)) if rng.random() < 0.5 else 0


@torch.no_grad()
def iterate(
    model: Vla, head: str, grammar: Grammar, given: dict[str, Any], settled: Tensor, done: int, begin: int
) -> Tensor:
    """The tokens after `done` Jacobi passes of `model` over a chunk whose first `begin` tokens are guessed right.

    given: images, text, text_valid and state, as tensors. settled: int64[B, K]. Returns int64[B, K].
    """
    places = torch.arange(settled.shape[1], device=settled.device)
    guess = torch.where(places < begin, settled, 0)
    if not done:
        return guess
    suffix = _suffix(model, head, given, grammar.values)
    return torch.tensor(jacobi(suffix, grammar, guess.tolist(), grammar.values, done).ids, device=settled.device)


_SEEN = ("text", "text_valid", "state")


def _suffix(model: Vla, head: str, given: dict[str, Any], room: int) -> TokenSuffix:
    segments = model.prefix_segments(given["images"], *(given[name] for name in _SEEN))
    return TokenSuffix(model, model.prefix(segments, room), head)
