"""The one home of run summaries: the keys of summary.json, computed from a Trace. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from vla.runtime.gate import Reason, Verdict
from vla.runtime.trace import Trace
from vla.types import NS_PER_S

_Z95 = 1.959963984540054


def wilson_95(successes: int, episodes: int) -> tuple[float, float]:
    """95 % score interval of a success rate (Wilson 1927); (0, 1) when nothing was tried."""
    if episodes == 0:
        return 0.0, 1.0
    rate, z2 = successes / episodes, _Z95**2
    centre = (rate + z2 / (2 * episodes)) / (1 + z2 / episodes)
    half = _Z95 * sqrt(rate * (1 - rate) / episodes + z2 / (4 * episodes**2)) / (1 + z2 / episodes)
    return max(0.0, centre - half), min(1.0, centre + half)


def percentiles(values: Sequence[float] | np.ndarray, which: tuple[int, ...] = (50, 95, 99)) -> dict[str, float | None]:
    """{"p50": ..., ...}; None where nothing was measured."""
    array = np.asarray(values, np.float64)
    return {f"p{p}": round(float(np.percentile(array, p)), 3) if array.size else None for p in which}


def control_hz(trace: Trace) -> float | None:
    """Ticks per second while the loop ran. Left out are pauses in which an episode ended and clocks that jumped back;
    a stall within an episode counts, however long."""
    ticks = trace.tick_ns[: trace.rows]
    steps = np.diff(ticks)
    ends = np.searchsorted(np.sort([episode.stamp_ns for episode in trace.episodes]), ticks)
    steps = steps[(steps > 0) & (np.diff(ends) == 0)]
    return round(NS_PER_S / float(np.mean(steps)), 3) if steps.size else None


def gate_counts(trace: Trace) -> dict[str, int]:
    """Verdicts of all ticks; waiting for a first chunk is neither motion nor a stop and is not counted."""
    verdicts = trace.verdict[: trace.rows][trace.reason[: trace.rows] != Reason.WAITING]
    return {verdict.name.lower(): int(np.sum(verdicts == verdict)) for verdict in Verdict}


def stop_reasons(trace: Trace) -> dict[str, int]:
    """Reason text -> ticks, of all stops and reshapes that are counted in `gate_counts`."""
    reasons = trace.reason[: trace.rows]
    counted = reasons[(trace.verdict[: trace.rows] != Verdict.PASS) & (reasons != Reason.WAITING)]
    codes, counts = np.unique(counted, return_counts=True)
    return {Reason(int(code)).text: int(count) for code, count in zip(codes, counts)}


def late_actions(trace: Trace) -> int:
    """Actions executed more than half a period after they were due."""
    due = trace.chunk[: trace.rows] >= 0
    return int(np.sum(trace.late_ns[: trace.rows][due] > 0.5 * trace.embodiment.period_s * NS_PER_S))


def summarize(
    trace: Trace,
    *,
    transport_ms: Sequence[float] | np.ndarray = (),
    peak_rss_mb: float | None = None,
    bundle_hash: str = "",
) -> dict[str, Any]:
    """summary.json of a run. transport_ms: image to command latency added by the transport, one value per message.

    due_actions counts every slot that should have had an action: those executed and those missed.
    """
    episodes = len(trace.episodes)
    successes = sum(episode.success for episode in trace.episodes)
    missed = int(trace.missed[: trace.rows].sum())
    executed = int(np.sum(trace.chunk[: trace.rows] >= 0))
    return {
        "episodes": episodes,
        "successes": successes,
        "success_rate": round(successes / episodes, 4) if episodes else None,
        "wilson_95": [round(bound, 4) for bound in wilson_95(successes, episodes)],
        "control_hz": control_hz(trace),
        "due_actions": executed + missed,
        "missed_actions": missed,
        "inference_ms": percentiles(trace.infer_ms[: trace.inferences]),
        "transport_ms": percentiles(transport_ms, (50, 95)),
        "peak_rss_mb": peak_rss_mb,
        "gate": gate_counts(trace),
        "seeds": [episode.seed for episode in trace.episodes],
        "bundle_hash": bundle_hash,
    }
