"""Jacobi trajectories of a token head on training frames: what consistency distillation learns to shorten."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vla.decoding.capped import jacobi
from vla.files import replacing
from vla.models.suffix import TokenSuffix
from vla.models.vla import Vla
from vla.training.dataset import TrainingData

_BATCH = 8  # a batch runs until its slowest sample is settled


class Trajectories:
    """ids: uint16[N, J, K], the iterates of N frames from the first guess on; passes: int64[N], index of the fixed
    point, which fills the rest. frames: int64[N], ascending."""

    def __init__(self, frames: np.ndarray, ids: np.ndarray, passes: np.ndarray):
        self.frames, self.ids, self.passes = frames, ids, passes

    def draw(self, frames: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One iterate before the fixed point, and the fixed point: int64[B, K] each. share: float[B] in [0, 1)."""
        rows = np.searchsorted(self.frames, frames)
        places = (share * np.maximum(1, self.passes[rows])).astype(np.int64)
        return self.ids[rows, places].astype(np.int64), self.ids[rows, self.passes[rows]].astype(np.int64)


def collect(
    model: Vla,
    head: str,
    data: TrainingData,
    frames: np.ndarray,
    folder: Path,
    key: str,
    on_progress: Callable[[int, int], None],
) -> Trajectories:
    """Decode `frames` (ascending) with whole-block Jacobi. Finished batches stay in `folder`: a killed run goes on.

    key: what the trajectories depend on beside the frames (the teacher's hash).
    """
    digest = hashlib.sha256(json.dumps([key, head, _BATCH, frames.tolist()]).encode()).hexdigest()[:12]
    folder = folder / f"trajectories-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    values = model.config.horizon * model.config.action_dim
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(frames), _BATCH):
        path = folder / f"{start:08d}.npy"
        if not path.exists():
            batch = data.batch(frames[start : start + _BATCH])
            images = {name: torch.from_numpy(image).to(device) for name, image in batch.images.items()}
            rest = (torch.from_numpy(item).to(device) for item in (batch.text, batch.text_valid, batch.state))
            with torch.inference_mode():
                prefix = model.prefix(model.prefix_segments(images, *rest), values)
                iterates: list[torch.Tensor] = []
                guess = torch.zeros((len(batch.state), values), dtype=torch.long, device=device)
                jacobi(TokenSuffix(model, prefix, head), guess, values + 1, iterates=iterates)
            with replacing(path) as temporary, temporary.open("wb") as stream:
                np.save(stream, torch.stack(iterates, dim=1).cpu().numpy().astype(np.uint16))
        parts.append(np.load(path))
        on_progress(min(start + _BATCH, len(frames)), len(frames))
    longest = max(part.shape[1] for part in parts)
    ids = np.concatenate([np.pad(part, ((0, 0), (0, longest - part.shape[1]), (0, 0)), "edge") for part in parts])
    changing = (ids[:, 1:] != ids[:, :-1]).any(axis=2)
    passes = np.where(changing.any(axis=1), changing.shape[1] - changing[:, ::-1].argmax(axis=1), 0)
    return Trajectories(frames, ids, passes)
