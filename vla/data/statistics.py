"""Statistics of features, in the words and shapes of LeRobotDataset v3.0. numpy only.

Per feature: min, max, mean, std, count, q01, q10, q50, q90, q99. Numbers: arrays [D], exact over all frames. Images:
[3][1][1] per channel in [0, 1], from additive histograms of 8-bit values, exact over the frames that were counted
(at most `IMAGE_FRAMES` evenly spaced ones per episode). The `lerobot` package averages the quantiles of episodes
instead, which is an approximation; both are read alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import StatisticsError, explain, nearest

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)
IMAGE_FRAMES = 16


def stats_of(values: np.ndarray) -> dict[str, list[float]]:
    """values: [N] or [N, D] -> {name: [D]} as plain lists (count: [1])."""
    table = np.asarray(values, np.float64).reshape(len(values), -1)
    out = {
        "min": table.min(0).tolist(),
        "max": table.max(0).tolist(),
        "mean": table.mean(0).tolist(),
        "std": table.std(0).tolist(),
        "count": [len(table)],
    }
    levels = np.quantile(table, list(QUANTILES.values()), axis=0)
    return out | {name: level.tolist() for name, level in zip(QUANTILES, levels)}


def image_histogram(frames: np.ndarray) -> np.ndarray:
    """frames: uint8[T, H, W, 3] -> int64[3, 256], over at most IMAGE_FRAMES evenly spaced frames."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), IMAGE_FRAMES)).astype(int))
    picked = np.asarray(frames)[chosen]
    return np.stack([np.bincount(picked[..., channel].ravel(), minlength=256) for channel in range(3)])


def stats_from_histogram(histogram: np.ndarray) -> dict[str, Any]:
    """int64[3, 256] -> {name: [3][1][1]}, values / 255; count is the number of pixels."""
    levels = np.arange(256) / 255.0
    total = histogram.sum(1, keepdims=True)
    weights = histogram / total
    mean = weights @ levels
    spread = np.sqrt(np.maximum(weights @ levels**2 - mean**2, 0.0))
    below = np.cumsum(histogram, 1) / total
    seen = histogram > 0
    out = {
        "min": levels[seen.argmax(1)],
        "max": levels[255 - seen[:, ::-1].argmax(1)],
        "mean": mean,
        "std": spread,
        **{name: levels[(below >= level).argmax(1)] for name, level in QUANTILES.items()},
    }
    return {name: value.reshape(3, 1, 1).tolist() for name, value in out.items()} | {"count": [int(total[0, 0])]}


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of one feature: float64 arrays of the feature's shape, images [3, 1, 1]. count: frames or pixels."""

    min: np.ndarray
    max: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q10: np.ndarray
    q50: np.ndarray
    q90: np.ndarray
    q99: np.ndarray
    count: int


class Statistics(Mapping[str, FeatureStats]):
    """{feature: FeatureStats}. Asking for what is not there raises StatisticsError, never a default."""

    def __init__(self, plain: Mapping[str, Mapping[str, Any]], source: str = "statistics"):
        self.plain = plain
        self.source = source

    @classmethod
    def read(cls, path: Path) -> Statistics:
        """Read meta/stats.json."""
        try:
            plain = json.loads(Path(path).read_text())
        except FileNotFoundError as error:
            raise StatisticsError(
                explain(
                    str(path),
                    "the statistics of the data set",
                    "no such file",
                    "Collect again, or convert the data set.",
                )
            ) from error
        except ValueError as error:
            raise StatisticsError(
                explain(str(path), "JSON", f"unreadable text ({error})", "Copy the data set again.")
            ) from error
        if not isinstance(plain, dict):
            raise StatisticsError(explain(str(path), "{feature: statistics}", type(plain).__name__, "Collect again."))
        return cls(plain, str(path))

    def __getitem__(self, feature: str) -> FeatureStats:
        if feature not in self.plain:
            raise StatisticsError(f"{self.source}: no statistics for {feature!r}. {nearest(feature, self.plain)}")
        entry = self.plain[feature]
        missing = [name for name in NAMES if name not in entry]
        if missing:
            raise StatisticsError(
                explain(f"{self.source}[{feature!r}]", list(NAMES), f"{missing} missing", "Recompute the statistics.")
            )
        arrays = {name: np.asarray(entry[name], np.float64) for name in NAMES if name != "count"}
        for name, value in arrays.items():
            if not np.all(np.isfinite(value)):
                raise StatisticsError(
                    explain(f"{self.source}[{feature!r}].{name}", "finite values", value.tolist(), "Recompute them.")
                )
        return FeatureStats(**arrays, count=int(np.ravel(entry["count"])[0]))

    def __contains__(self, feature: object) -> bool:
        return feature in self.plain

    def __iter__(self) -> Any:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)
