"""Shared fixtures: a small data set and a small bundle, made once per session by the product itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tabletop demonstrations."""
    from sim.collect import CollectConfig, collect

    path = tmp_path_factory.mktemp("data") / "tabletop"
    collect(CollectConfig(out=str(path), episodes=6, workers=1))
    return path


def tiny_config(data: Path, out: Path, **changes: object):
    """A training run of seconds: one layer, 32 wide, two small cameras."""
    from vla.models.transformer import ExpertConfig, TransformerConfig
    from vla.models.vision import CameraEncoderConfig
    from vla.training.recipes import HeadRecipe, ModelRecipe, TokenizerRecipe, TrainConfig

    recipe = ModelRecipe(
        cameras=(
            CameraEncoderConfig("agentview", 32, 4, (8, 16), points=2),
            CameraEncoderConfig("wrist", 32, 4, (8, 16)),
        ),
        transformer=TransformerConfig((ExpertConfig(32, 64),), 2, 4, 2, 8),
        text_vocab=512,
    )
    settings: dict[str, object] = {
        "model": recipe, "heads": {"fast": HeadRecipe("tokens", TokenizerRecipe("fast", 128, 5.0), 16, 32)},
        "steps": 6, "batch_size": 8, "look_steps": 2, "warmup_steps": 2,
        "precision": "fp32", "device": "cpu", "val_fraction": 0.34, "log_every": 1, "val_every": 3,
        "val_batches": 1, "checkpoint_every": 3, "threads": 1,
    }  # fmt: skip
    return TrainConfig(str(data), str(out), **{**settings, **changes})


@pytest.fixture(scope="session")
def tiny_bundle(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an almost untrained model: right in form, useless in action."""
    from vla.training.trainer import train

    out = tmp_path_factory.mktemp("run")
    train(tiny_config(tiny_dataset, out))
    return out / "bundle"
