"""Plots of a run as inline SVG. Each takes a RunRecord and returns one <svg> element; matplotlib without a display."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from vla.cli.results import RunRecord, by_family
from vla.runtime.summary import wilson_95

GOOD, BAD, WARN, LINE, GREY = "#2f9e62", "#d1495b", "#e0a030", "#3066be", "#8a929e"


def success_per_family(record: RunRecord) -> str:
    """Bars with 95 % Wilson intervals."""
    families = by_family(record.episodes)
    figure, axis = _figure(7.2, 0.9 + 0.45 * max(1, len(families)))
    for row, (_name, (good, total)) in enumerate(families.items()):
        rate, (low, high) = good / total, wilson_95(good, total)
        axis.barh(row, rate, color=GOOD, height=0.55)
        axis.errorbar(rate, row, xerr=[[rate - low], [high - rate]], color="#223", capsize=4, lw=1.2)
        axis.text(1.02, row, f"{good}/{total}", va="center", fontsize=9)
    axis.set_yticks(range(len(families)), list(families))
    axis.set_xlim(0, 1)
    axis.invert_yaxis()
    axis.set_xlabel("success rate, 95 % Wilson interval")
    return _svg(figure)


def timeline(record: RunRecord, seconds: float = 8.0) -> str:
    """A close-up: when each inference ran and when commands left, from the start of the longest episode."""
    figure, axis = _figure(9.0, 2.3)
    longest = max(record.episodes, key=lambda e: e.end_s - e.start_s, default=None)
    start = longest.start_s if longest else 0.0
    end = min(start + seconds, longest.end_s if longest else seconds)
    for at, took_ms in record.inference:
        if start <= at <= end:
            axis.barh(1, took_ms / 1e3, left=at, height=0.5, color=LINE)
    times = record.commands[:, 0]
    inside = times[(times >= start) & (times <= end)]
    axis.vlines(inside, -0.25, 0.25, color=GREY, lw=0.8)
    for event in record.events:
        if start <= event.at_s <= end:
            axis.axvline(event.at_s, color=BAD, lw=1)
    axis.set_yticks([0, 1], ["commands", "inference"])
    axis.set_ylim(-0.6, 1.6)
    axis.set_xlim(start, max(end, start + 0.1))
    axis.set_xlabel("seconds since the start of the run; stops and restarts in red")
    return _svg(figure)


def rates(record: RunRecord) -> str:
    """Distributions of the time between commands and of the inference time."""
    figure, (left, right) = _figure(9.0, 2.6, 2)
    # Between episodes nothing is due, so gaps of more than ten periods are not intervals of control.
    gaps = np.diff(record.commands[:, 0]) * 1e3
    gaps = gaps[gaps < 1e4 / record.rate_hz]
    _histogram(left, gaps, GREY, "ms between commands")
    left.axvline(1e3 / record.rate_hz, color=BAD, lw=1)
    took = record.inference[:, 1] if len(record.inference) else np.zeros(0)
    _histogram(right, took, LINE, "ms per inference")
    return _svg(figure)


def actions(record: RunRecord) -> str:
    """What was sent to the arm during the first episode, one line per commanded value."""
    figure, axis = _figure(9.0, 3.2)
    if record.episodes and len(record.commands):
        episode = record.episodes[0]
        times = record.commands[:, 0]
        inside = (times >= episode.start_s) & (times <= episode.end_s)
        values = record.commands[inside, 1:]
        for column in range(values.shape[1]):
            name = record.command_names[column] if column < len(record.command_names) else str(column)
            axis.plot(times[inside] - episode.start_s, values[:, column], lw=1.1, label=name)
        axis.legend(fontsize=7, ncol=1, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axis.set_xlabel("seconds since the start of the first episode")
    axis.set_ylabel("command")
    return _svg(figure)


def verdicts(record: RunRecord) -> str:
    """Share of pass, reshape and stop over all commands, one bar."""
    figure, axis = _figure(9.0, 1.1)
    total = sum(record.gate.values()) or 1
    left = 0.0
    for name, colour in (("pass", GOOD), ("reshape", WARN), ("stop", BAD)):
        share = record.gate.get(name, 0) / total
        axis.barh(0, share, left=left, color=colour, height=0.5, label=f"{name} {record.gate.get(name, 0)}")
        left += share
    axis.set_yticks([])
    axis.set_xlim(0, 1)
    axis.legend(fontsize=8, ncol=3, loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)
    return _svg(figure)


def _histogram(axis: Any, values: np.ndarray, colour: str, label: str) -> None:
    if len(values):
        axis.hist(values, bins=40, color=colour)
        axis.axvline(float(np.percentile(values, 95)), color="#223", lw=1, ls="--")
    axis.set_xlabel(f"{label} (dashed: p95)")
    axis.set_yticks([])


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vla"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
