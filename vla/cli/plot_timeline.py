"""`vla plot timeline`: when images were taken, inferences ran, chunks came and commands left, from a trace.mcap."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from vla.cli.plots import BAD, GREY
from vla.errors import ConfigError, DataError, explain
from vla.runtime.gate import Verdict
from vla.runtime.trace import Trace
from vla.types import NS_PER_S

COLOURS = ("#3066be", "#e08e30", "#2f9e62", "#8a4fbf")  # of chunks, in turn
EPILOG = """Each chunk has a colour: the image it came from; its inference, pale from asking to arrival and full for
what the policy took of that (at the end: where it ran is not recorded); the actions that were executed, and hatched
those that were past when it took over; the commands. Commands in red had no fresh action. Grey images nobody asked for.

examples:
  vla demo --episodes 3 --out outputs/demo
  vla plot timeline outputs/demo/trace.mcap --out timeline.png
  vla plot timeline outputs/demo/trace.mcap --episode 2 --start 1.5 --seconds 3 --out timeline.svg"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("trace", type=Path, metavar="TRACE", help="trace.mcap of a run")
    parser.add_argument("--episode", type=int, default=1, metavar="N", help="default: 1, the first")
    parser.add_argument("--start", type=float, default=0.0, metavar="S", help="seconds into it (default: 0)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="length of the window (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("timeline.png"), metavar="FILE", help=".png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    if args.out.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(explain("--out", "a name ending with .png, .svg or .pdf", args.out.name, "Rename it."))
    if not args.seconds > 0:
        raise ConfigError(explain("--seconds", "more than 0", args.seconds, "2 shows four or five chunks."))
    figure = draw(Trace.load_mcap(args.trace), args.episode, args.start, args.seconds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)
    print(args.out)
    return 0


def draw(trace: Trace, episode: int = 1, start_s: float = 0.0, seconds: float = 2.0) -> Any:
    """A matplotlib figure of `seconds` of an episode, counted from 1; DataError where the trace has nothing there."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MultipleLocator

    begin_ns, end_ns = _window(trace, episode)
    left_ns = begin_ns + round(start_s * NS_PER_S)
    right_ns = min(left_ns + round(seconds * NS_PER_S), end_ns)
    if left_ns >= end_ns:
        got = f"{(end_ns - begin_ns) / NS_PER_S:.1f} s"
        raise DataError(explain("--start", "a time within the episode", f"{start_s:g} of {got}", "Begin earlier."))
    cameras = list(dict.fromkeys(image.camera for image in trace.images)) or ["observation"]
    rows = {"command": 0.0, "chunk": 1.2, "inference": 2.4}
    rows |= {name: 3.3 + 0.8 * place for place, name in enumerate(reversed(cameras))}
    figure = Figure(figsize=(11, 2.9 + 0.5 * len(cameras)), layout="constrained")
    axis = figure.subplots()

    def at(stamp_ns: Any) -> Any:
        return (np.asarray(stamp_ns) - begin_ns) / NS_PER_S

    for image in trace.images:
        if left_ns <= image.stamp_ns <= right_ns:
            _ticks(axis, [at(image.stamp_ns)], rows[image.camera], GREY, 0.8)
    colours = _colours(trace)
    for i in range(trace.inferences):
        asked, came, stamp = (int(c[i]) for c in (trace.infer_start_ns, trace.infer_end_ns, trace.infer_stamp_ns))
        if came < left_ns or asked > right_ns:
            continue
        colour = colours.get(stamp, GREY)
        for camera in cameras if stamp >= 0 else ():
            _ticks(axis, [at(stamp)], rows[camera], colour, 2.2)
        y, own_s = rows["inference"], min(trace.infer_ms[i] * 1e-3, (came - asked) / NS_PER_S)
        axis.barh(y, at(came) - at(asked), left=at(asked), height=0.5, color=colour, alpha=0.3, lw=0)
        axis.barh(y, own_s, left=at(came) - own_s, height=0.5, color=colour, lw=0)
        axis.plot(at(came), rows["chunk"] + 0.65, "v", color=colour, markersize=6)
        if stamp >= 0:
            axis.plot([at(stamp), at(stamp)], [rows[cameras[0]] - 0.35, y], color=colour, lw=0.7, ls=":")
        axis.plot([at(came), at(came)], [y - 0.25, rows["chunk"] + 0.65], color=colour, lw=0.7, ls=":")
    _chunks(axis, trace, colours, at, rows["chunk"], left_ns, right_ns)
    ticks = trace.tick_ns[: trace.rows]
    shown = np.flatnonzero((ticks >= left_ns) & (ticks <= right_ns))
    for row in shown:
        idle = trace.chunk[row] < 0 or trace.verdict[row] == Verdict.STOP
        colour = BAD if idle else colours.get(int(trace.stamp_ns[row]), GREY)
        _ticks(axis, [at(ticks[row])], rows["command"], colour, 1.8)
    names = [f"image {name}" if trace.images and name in cameras else name for name in rows]
    axis.set_yticks(list(rows.values()), names)
    axis.set_ylim(-0.5, rows[cameras[0]] + 0.5)
    axis.set_xlim(float(at(left_ns)) - 0.01, float(at(right_ns)) + 0.01)
    axis.set_xlabel("seconds since the episode began")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_minor_locator(MultipleLocator(trace.embodiment.period_s))
    axis.grid(axis="x", which="minor", color=GREY, alpha=0.2, lw=0.5)
    axis.set_axisbelow(True)
    return figure


def _window(trace: Trace, episode: int) -> tuple[int, int]:
    """First tick and end of an episode; the whole trace counts as one where none was finished."""
    ticks = trace.tick_ns[: trace.rows]
    ends = sorted(row.stamp_ns for row in trace.episodes) or [int(ticks.max(initial=0))]
    if not 1 <= episode <= len(ends) or not len(ticks):
        raise DataError(explain("--episode", f"1 to {len(ends)}", episode, "This trace holds no other."))
    after = ends[episode - 2] if episode > 1 else -1
    own = ticks[(ticks > after) & (ticks <= ends[episode - 1])]
    if not len(own):
        raise DataError(explain(f"episode {episode}", "control ticks", "none", "Choose another episode."))
    return int(own[0]), int(own[-1])


def _colours(trace: Trace) -> dict[int, str]:
    """Observation stamp -> colour, in the order of the inferences."""
    stamps = dict.fromkeys(int(stamp) for stamp in trace.infer_stamp_ns[: trace.inferences] if stamp >= 0)
    return {stamp: COLOURS[place % len(COLOURS)] for place, stamp in enumerate(stamps)}


def _chunks(
    axis: Any, trace: Trace, colours: dict[int, str], at: Any, lane: float, left_ns: int, right_ns: int
) -> None:
    """What was executed of each chunk, by due times, and what was past before; odd and even chunks above each other."""
    period_ns = round(trace.embodiment.period_s * NS_PER_S)
    numbers = trace.chunk[: trace.rows]
    for number in np.unique(numbers[numbers >= 0]):
        own = np.flatnonzero(numbers == number)
        first_ns, last_ns = int(trace.due_ns[own[0]]), int(trace.due_ns[own[-1]]) + period_ns
        skipped = int(trace.index[own[0]])
        if last_ns < left_ns or first_ns - skipped * period_ns > right_ns:
            continue
        colour = colours.get(int(trace.stamp_ns[own[0]]), GREY)
        y = lane + (0.22 if number % 2 else -0.22)
        if skipped:
            axis.barh(y, at(first_ns) - at(first_ns - skipped * period_ns), left=at(first_ns - skipped * period_ns),
                      height=0.4, facecolor="none", edgecolor=colour, hatch="////", lw=0.6)  # fmt: skip
        axis.barh(y, at(last_ns) - at(first_ns), left=at(first_ns), height=0.4, color=colour, lw=0)
        middle = (max(first_ns, left_ns) + min(last_ns, right_ns)) / 2
        if left_ns < middle < right_ns:
            indices = f"{skipped}–{int(trace.index[own[-1]])}"
            axis.text(at(middle), y, indices, ha="center", va="center", color="white", fontsize=8)


def _ticks(axis: Any, times: list[Any], y: float, colour: str, width: float) -> None:
    axis.vlines(times, y - 0.3, y + 0.3, color=colour, lw=width)
