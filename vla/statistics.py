"""Numbers that a success rate or a latency is reported with. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval of a binomial proportion (Wilson 1927), 95 % by default; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def percentiles(values: Sequence[float] | np.ndarray, at: Sequence[int] = (50, 95, 99)) -> dict[str, float | None]:
    """{"p50": ..., ...}, linear between samples; None for each where nothing was measured."""
    if len(values) == 0:
        return {f"p{q}": None for q in at}
    found = np.percentile(np.asarray(values, np.float64), list(at))
    return {f"p{q}": round(float(v), 3) for q, v in zip(at, found)}
