"""Normalisation has one home: tokenizers, models and heads see normalised values, everything outside physical units.

Quantile form of openpi: x' = 2 (x - q01) / (q99 - q01) - 1, not clipped. numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.data.statistics import FeatureStats
from vla.errors import StatisticsError, explain

# A dimension that moves less than this (rad, m) is constant: dividing by its range would blow up noise.
MIN_RANGE = 1e-4


@dataclass(frozen=True)
class Normalizer:
    """q01, q99: float64[D] in physical units. center: float64[D], what a dimension without range stands at."""

    q01: np.ndarray
    q99: np.ndarray
    center: np.ndarray

    def __post_init__(self) -> None:
        for name in ("q01", "q99", "center"):
            value = getattr(self, name)
            if value.shape != self.q01.shape or value.ndim != 1 or not np.all(np.isfinite(value)):
                raise StatisticsError(
                    explain(name, f"finite float[{len(self.q01)}]", value, "Recompute the statistics of the data set.")
                )

    @classmethod
    def from_stats(cls, stats: FeatureStats) -> Normalizer:
        return cls(stats.q01, stats.q99, stats.q50)

    @property
    def dim(self) -> int:
        return len(self.q01)

    @property
    def active(self) -> np.ndarray:
        """bool[D]: dimensions with a range; the others normalise to zero."""
        return (self.q99 - self.q01) > MIN_RANGE

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """float[..., D] physical -> float32[..., D] normalised."""
        self._check(values)
        span = np.where(self.active, self.q99 - self.q01, 1.0)
        scaled = 2.0 * (np.asarray(values, np.float64) - self.q01) / span - 1.0
        return np.where(self.active, scaled, 0.0).astype(np.float32)

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """float[..., D] normalised -> float32[..., D] physical."""
        self._check(values)
        span = self.q99 - self.q01
        physical = (np.asarray(values, np.float64) + 1.0) * span / 2.0 + self.q01
        return np.where(self.active, physical, self.center).astype(np.float32)

    def _check(self, values: np.ndarray) -> None:
        if values.shape[-1] != self.dim:
            raise StatisticsError(
                explain(
                    "normalisation",
                    f"{self.dim} dimensions",
                    values.shape[-1],
                    "Use the statistics of this embodiment.",
                )
            )

    def to_dict(self) -> dict[str, list[float]]:
        return {"q01": self.q01.tolist(), "q99": self.q99.tolist(), "center": self.center.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Normalizer:
        missing = [name for name in ("q01", "q99", "center") if name not in data]
        if missing:
            raise StatisticsError(
                explain(
                    "normalisation", "q01, q99 and center", f"no {missing}", "The bundle is damaged; export it again."
                )
            )
        return cls(*(np.asarray(data[name], np.float64) for name in ("q01", "q99", "center")))
