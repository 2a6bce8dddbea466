"""From streams with their own rates and jitter to samples at the policy's rate. numpy only; int64 nanoseconds.

    times      first sample + k periods; the last one leaves a whole period before the end
    images     the latest frame that is not later than the sample, and not older than `image_slop_s`
    states     linear between the two neighbours, which may be `state_gap_s` apart; grippers take the nearer one
    actions    the command in force when the sample's period ends: what the arm was told for this observation

Nothing is extrapolated or filled in: a sample that a stream does not cover is a Gap, with the name of the stream
and the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla.errors import ConfigError, explain
from vla.types import NS_PER_S

MAX_TURN_RAD = 1.0  # between neighbours; faster than any arm turns its tool in two periods
NEVER = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class Rules:
    """rate_hz: samples per second. image_slop_s, state_gap_s: None for two periods of the rate."""

    rate_hz: float
    image_slop_s: float | None = None
    state_gap_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("rate_hz", "image_slop_s", "state_gap_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(explain(name, "a positive number", value, "Give hertz or seconds."))

    @property
    def period_ns(self) -> int:
        return round(NS_PER_S / self.rate_hz)

    @property
    def slop_ns(self) -> int:
        return 2 * self.period_ns if self.image_slop_s is None else round(self.image_slop_s * NS_PER_S)

    @property
    def gap_ns(self) -> int:
        return 2 * self.period_ns if self.state_gap_s is None else round(self.state_gap_s * NS_PER_S)


@dataclass(frozen=True)
class Gap:
    """A sample that `stream` does not cover. at_ns: its time. age_ns: to the nearest value, NEVER if there is none."""

    stream: str
    at_ns: int
    age_ns: int


def sample_times(first_ns: int, stop_ns: int, rules: Rules) -> np.ndarray:
    """int64[T]: first_ns, first_ns + period ...; every sample's period ends by stop_ns."""
    return first_ns + rules.period_ns * np.arange(max(0, (stop_ns - first_ns) // rules.period_ns), dtype=np.int64)


def latest(stamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """int64[T]: place of the last of the sorted `stamps` that is not later than each time, -1 where there is none."""
    return np.searchsorted(stamps, times, side="right") - 1


def images(name: str, stamps: np.ndarray, times: np.ndarray, rules: Rules) -> np.ndarray | Gap:
    """int64[T]: place of each sample's frame in the sorted `stamps`, or the first sample that has none."""
    places = latest(stamps, times)
    ages = np.where(places < 0, NEVER, times - stamps[places] if len(stamps) else 0)
    late = np.flatnonzero(ages > rules.slop_ns)
    return places if not len(late) else Gap(name, int(times[late[0]]), int(ages[late[0]]))


def states(
    name: str,
    stamps: np.ndarray,
    values: np.ndarray,
    times: np.ndarray,
    rules: Rules,
    nearest: np.ndarray | None = None,
    rotation: np.ndarray | None = None,
) -> np.ndarray | Gap:
    """float64[T, D] from float64[N, D] at sorted `stamps`, or the first sample without neighbours.

    nearest: bool[D], columns that are not interpolated. rotation: bool[D], columns of an axis-angle vector; a line
    between two ways to write one rotation (they differ by a turn) would lead through rotations that never were, so
    beyond MAX_TURN_RAD they take the nearer one as well. At a stamp the value is exactly the one measured there.
    """
    low = latest(stamps, times)
    high = np.searchsorted(stamps, times, side="left")
    outside = (low < 0) | (high >= len(stamps))
    low, high = np.maximum(low, 0), np.minimum(high, len(stamps) - 1)
    width = stamps[high] - stamps[low] if len(stamps) else np.zeros(len(times), np.int64)
    bad = np.flatnonzero(outside | (width > rules.gap_ns))
    if len(bad):
        at = int(times[bad[0]])
        return Gap(name, at, int(np.abs(stamps - at).min()) if len(stamps) else NEVER)
    share = np.where(width > 0, (times - stamps[low]) / np.maximum(width, 1), 0.0)[:, None]
    jumps = np.zeros(values[low].shape, bool) if nearest is None else np.broadcast_to(nearest, values[low].shape).copy()
    if rotation is not None:
        turn = np.linalg.norm((values[high] - values[low])[:, rotation], axis=1)
        jumps[:, rotation] |= (turn > MAX_TURN_RAD)[:, None]
    between = values[low] * (1 - share) + values[high] * share
    return np.where(share == 0, values[low], np.where(jumps, np.where(share < 0.5, values[low], values[high]), between))
