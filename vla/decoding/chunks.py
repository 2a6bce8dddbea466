"""What one chunk takes over from the chunks before it, so that the arm does not jerk where they meet. numpy only.

`ensembled` averages what several chunks say of the same moments. `goals` says what a new chunk has to agree with: in
full with the actions that are executed while it is being inferred, and less and less with the rest of the old chunk.
`continued` makes any finished chunk agree, in the time domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vla.errors import ConfigError, explain
from vla.types import ActionChunk

if TYPE_CHECKING:  # it needs torch
    from vla.decoding.base import DecodeInput


@dataclass(frozen=True)
class Ensembling:
    """decay: of the weights in `ensembled`. 0 is the plain mean; above 0 older chunks weigh more, below 0 newer."""

    decay: float = 0.01

    def __post_init__(self) -> None:
        if not np.isfinite(self.decay):
            raise ConfigError(explain("ensembling.decay", "a finite number", self.decay, "ACT takes 0.01."))


def ensembled(
    chunks: Sequence[ActionChunk], start_ns: int, decay: float = 0.01, grippers: Sequence[int] = ()
) -> ActionChunk:
    """Temporal ensembling (ACT, Zhao et al. 2023, section IV-B): from `start_ns` to the end of the newest chunk, the
    mean of all that the chunks say of each moment, weighted exp(-decay * i), i = 0 for the oldest of those that do.

    chunks: oldest first, of one period, with due times of one clock; an action counts for the slot nearest to its due
    time. grippers: actions that the newest chunk decides alone. A mean of open and closed is neither, and between two
    chunks a vote with these weights would always be the older one's.
    ConfigError: no chunks, different periods, or a slot that none of them knows.
    """
    periods = {chunk.period_ns for chunk in chunks}
    if len(periods) != 1:
        raise ConfigError(explain("chunks", "at least one, all of one period", f"periods {periods}", "Resample them."))
    period_ns = periods.pop()
    count = round((chunks[-1].end_ns - start_ns) / period_ns)
    said = np.full((len(chunks), max(0, count), chunks[-1].actions.shape[1]), np.nan)
    for row, chunk in zip(said, chunks):
        first = round((start_ns - chunk.start_ns) / period_ns)  # index of the action of slot 0
        begin, end = max(0, -first), min(count, len(chunk) - first)
        if begin < end:
            row[begin:end] = chunk.actions[first + begin : first + end]
    known = ~np.isnan(said[..., 0])
    if count < 1 or not known.any(axis=0).all():
        got = f"{count} slots until the newest ends, {int(known.any(axis=0).sum())} of them known"
        raise ConfigError(explain("start_ns", "a time that the chunks reach", got, "Begin later, or keep more chunks."))
    exponents = np.where(known, -decay * (known.cumsum(axis=0) - 1), -np.inf)
    weights = np.exp(exponents - exponents.max(axis=0))
    actions = np.nansum(said * weights[..., None], axis=0) / weights.sum(axis=0)[:, None]
    newest = len(chunks) - 1 - known[::-1].argmax(axis=0)
    columns = list(grippers)
    actions[:, columns] = said[newest, np.arange(count)][:, columns]
    return ActionChunk(actions.astype(np.float32), start_ns, chunks[-1].period_s)


def soft_mask(committed: int, overlap: int, horizon: int) -> np.ndarray:
    """float64[T]: how much each new action has to agree with the old chunk (RTC, Black, Galliker and Levine 2025,
    equation 5). 1 for the `committed` actions, 0 from `overlap` on, where the old chunk ends, and in between
    c (e^c - 1) / (e - 1) with c falling in equal steps."""
    places = np.arange(horizon)
    slope = np.clip((overlap - places) / max(1, overlap - committed + 1), 0.0, 1.0)
    weights = slope * np.expm1(slope) / (np.e - 1)
    return np.where(places < committed, 1.0, np.where(places < overlap, weights, 0.0))


def check_reach(reach: int | None) -> None:
    """ConfigError for what `goals` does not take."""
    if reach is not None and reach < 0:
        remedy = "0 follows the committed actions only, null all of the old chunk."
        raise ConfigError(explain("decoder.reach", "0 or more, or null", reach, remedy))


def goals(given: DecodeInput, reach: int | None = None) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Per sample, what the new chunk has to agree with: normalised float32[B, T, A]; how much, `soft_mask` float64[B,
    T]; and how many of its first actions are committed. Without a previous chunk nothing is asked.

    reach: how many actions of the old chunk behind the committed ones have a say; None, as RTC has it, all. Both come
    from what was executed and what the scheduler has committed itself to, never from an estimated latency.
    """
    config, normalizer = given.bundle.config, given.bundle.action_normalizer
    targets = np.zeros((given.batch, config.horizon, config.action_dim), np.float32)
    masks, counts = np.zeros((given.batch, config.horizon)), [0] * given.batch
    for sample, (context, left) in enumerate(zip(given.contexts, given.previous)):
        if context.previous is None or left is None:
            continue
        counts[sample] = 0 if context.committed is None else min(config.horizon, len(context.committed))
        overlap = max(counts[sample], min(config.horizon, len(context.previous) - context.executed))
        if reach is not None:
            overlap = min(overlap, counts[sample] + reach)
        targets[sample], masks[sample] = left, soft_mask(counts[sample], overlap, config.horizon)
        if context.committed is not None:
            targets[sample, : counts[sample]] = normalizer.normalize(context.committed[: config.horizon])
    return targets, masks, counts


def keep_committed(actions: np.ndarray, targets: np.ndarray, counts: Sequence[int]) -> list[float]:
    """Write the committed actions of `goals` over the first of `actions` [B, T, A], as they were committed: a scheduler
    that stopped among them goes on with what it had promised. Returns the largest difference there was, by sample."""
    missed = []
    for action, target, count in zip(actions, targets, counts):
        missed.append(float(np.abs(action[:count] - target[:count]).max(initial=0)))
        action[:count] = target[:count]
    return missed


def continued(actions: np.ndarray, target: np.ndarray, mask: np.ndarray, grippers: Sequence[int] = ()) -> np.ndarray:
    """actions, target: float32[T, A]; mask: float[T] in 0..1 -> mask * target + (1 - mask) * actions; grippers, which
    have no values in between, come from the target where the mask is at least a half.

    With a mask of 1 for the first d actions and 0 behind them it is the projection onto the chunks that begin with
    those d actions, and nearest in the coefficients of an orthonormal DCT too, since that keeps distances. With
    `soft_mask` the difference of the two at d shrinks to (1 - mask[d]) of itself, and every value stays between them.
    """
    out = (mask[:, None] * target + (1 - mask[:, None]) * actions).astype(np.float32)
    for place in grippers:
        out[:, place] = np.where(mask >= 0.5, target[:, place], actions[:, place])
    return out
