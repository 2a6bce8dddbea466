"""`vla replay`: the same loop on recorded inputs, and the first action that differs."""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla.errors import ConfigError, DataError, explain

if TYPE_CHECKING:
    from ros_nodes.replay import Outcome

EPILOG = """A recording with /vla/request and /vla/chunk is replayed request by request and compared bit for bit.
Without them, or with --latency or --own-schedule, the control loop runs on the recorded observations at its own times,
and its actions are compared with what was commanded. Exit code 0: the same; 1: something differs or could not be
replayed.

examples:
  vla replay recordings/run1 --policy tabletop                   bit for bit?
  vla replay crash.mcap --policy outputs/train/bundle --decoder jacobi window=4 --plot crash.html
  vla replay crash.mcap --policy tabletop --latency slow.json    what if inference took this long?
  vla replay outputs/demo/trace.mcap --policy tabletop           a demo's own trace: close, its pictures are JPEG"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ros_nodes import settings

    parser.epilog = EPILOG
    parser.add_argument("recording", type=Path, metavar="RECORDING", help="rosbag2 folder, .mcap or .db3; a trace.mcap")
    settings.add_arguments(parser, settings.POLICY)
    parser.add_argument("--seed", type=int, metavar="S", help="of the episodes, instead of the recorded ones")
    parser.add_argument(
        "--latency", metavar="TRACE", help="JSON list of milliseconds per inference, or another source of sim.latency"
    )
    parser.add_argument("--own-schedule", action="store_true", help="ask when the loop would, not when it did")
    parser.add_argument("--execute", type=int, default=8, help="own schedule: actions of a chunk to run (default: 8)")
    parser.add_argument(
        "--lead", type=int, default=2, help="own schedule: periods that inference may take (default: 2)"
    )
    parser.add_argument("--sequential", action="store_true", help="own schedule: ask when all actions are executed")
    parser.add_argument(
        "--tolerance", type=float, help="own schedule: largest difference that is none (default: 0; of commands: 0.001)"
    )
    parser.add_argument("--whole", action="store_true", help="own schedule: the recording is one episode")
    parser.add_argument("--measured", action="store_true", help="own schedule: compare with where the joints went")
    parser.add_argument("--instruction", default="", metavar="TEXT", help="own schedule: instead of the recorded one")
    parser.add_argument("--clock", choices=("stamps", "aligned", "received"), default="stamps", help="see vla convert")
    parser.add_argument("--resize", action="store_true", help="scale pictures of another size than the robot's")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="recorded against replayed actions, .png or .html")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    if args.plot is not None and args.plot.suffix not in (".png", ".html"):
        raise ConfigError(explain("--plot", "a name that ends with .png or .html", args.plot, "Choose one."))
    with _bar() as progress:
        outcome = replay(args, progress)
    if args.plot is not None:
        plot(outcome, args.plot)
    if args.json:
        print(json.dumps(outcome.to_dict(), indent=1))
    else:
        show(outcome)
        if args.plot is not None:
            print(args.plot)
    return 0 if outcome.same else 1


def replay(args: argparse.Namespace, progress: Callable[[int, int], None] | None = None) -> Outcome:
    """What the arguments of `add_arguments` ask for."""
    from ros_nodes.bag import Bag
    from ros_nodes.policies import facts_of
    from ros_nodes.replay import ANSWERED_OTHERWISE, causes, replay_requests

    own = args.own_schedule or args.latency is not None
    trace = _trace(args.recording)
    if trace is not None:
        return _of_trace(args, trace, progress)
    with Bag(args.recording) as bag:
        counts = {
            topic: bag.topics[topic].messages if topic in bag.topics else 0 for topic in ("/vla/request", "/vla/chunk")
        }
        facts = facts_of(args.policy, _parts(args), args.device)
        if all(counts.values()) and not own:
            from ros_nodes.policy_node import build

            core = build(args)
            return replay_requests(bag, core, core.embodiment, args.seed, facts, progress)
        from ros_nodes.reenact import reels_of_bag

        policy = _policy(args)
        reels, left = reels_of_bag(
            bag, policy.embodiment, args.clock, args.resize, args.whole, args.measured, args.instruction
        )
        if not reels:
            raise DataError(explain(str(bag.path), "an episode to replay", "; ".join(left) or "none", "See --help."))
        outcome = _reenact(args, reels, policy, progress)
        outcome.missing += left
        if counts["/vla/chunk"]:  # what is known of the recorded policy says more than that it answered otherwise
            known = causes(bag, facts, outcome)
            outcome.causes = known + [why for why in outcome.causes if not (known and why == ANSWERED_OTHERWISE)]
        return outcome


def _of_trace(args: argparse.Namespace, trace: Any, progress: Callable[[int, int], None] | None) -> Outcome:
    from ros_nodes.reenact import reels_of_trace

    policy = _policy(args)
    trace.embodiment.require_same(policy.embodiment, f"{args.recording} and policy {args.policy!r}")
    outcome = _reenact(args, reels_of_trace(trace, str(args.recording)), policy, progress)
    outcome.notes.append("a demo's trace: every other picture, as JPEG, so small differences mean nothing")
    return outcome


def _reenact(args: argparse.Namespace, reels: Any, policy: Any, progress: Any) -> Outcome:
    from ros_nodes.reenact import reenact
    from sim import latency
    from vla.runtime.scheduler import OverlappedScheduler, SequentialScheduler

    def scheduler() -> SequentialScheduler | OverlappedScheduler:
        if args.sequential:
            return SequentialScheduler(args.execute)
        return OverlappedScheduler(args.execute, args.lead)

    delays = None if args.latency is None else latency.read(args.latency).of
    return reenact(reels, policy, scheduler, delays, args.seed, args.tolerance, progress)


def _parts(args: argparse.Namespace) -> Any:
    from policies import parts

    return parts.Parts.named(parts.named_in(args))


def _policy(args: argparse.Namespace) -> Any:
    from ros_nodes.policies import load_policy

    return load_policy(args.policy, args.embodiment or None, args.threads, _parts(args), args.device)


def _trace(path: Path) -> Any:
    """The trace of a run, if the file is one; None for everything else."""
    from mcap.reader import make_reader

    from vla.runtime.trace import Trace

    if path.suffix != ".mcap" or not path.is_file():
        return None
    try:
        with path.open("rb") as stream:
            profile = make_reader(stream).get_header().profile
    except Exception:  # a damaged file: the reader of recordings says what can be had of it
        return None
    return None if profile == "ros2" else Trace.load_mcap(path)


# ---- words and pictures ----
def show(outcome: Outcome) -> None:
    """The outcome in a few lines."""
    verdict = "the same" if outcome.same else f"{outcome.different} of {outcome.compared} actions differ"
    how = "request by request, bit for bit" if outcome.way == "requests" else "on the loop's own schedule"
    print(f"{verdict} ({outcome.compared} actions, {how})")
    first = outcome.first
    if first is not None:
        chunk = f"chunk {first.chunk}, action {first.action}" if first.chunk >= 0 else f"period {first.action}"
        values = [f"{value:.9g}" if value is not None else "no action" for value in (first.recorded, first.replayed)]
        print(f"first: episode {first.episode}, {chunk}, {first.name}: recorded {values[0]}, replayed {values[1]}")
        for cause in outcome.causes or ["no reason known"]:
            print(f"why: {cause}")
        for name, error in outcome.errors().items():
            print(f"  {name:<16} max {error['max']:.3g}   rms {error['rms']:.3g}")
    for missing in outcome.missing[:10]:
        print(f"not replayed: {missing}", file=sys.stderr)
    if len(outcome.missing) > 10:
        print(f"not replayed: {len(outcome.missing) - 10} more", file=sys.stderr)
    for note in outcome.notes:
        print(f"note: {note}", file=sys.stderr)


def figure_of(outcome: Outcome) -> Any:
    """One panel per action dimension: recorded, replayed, and their difference shaded."""
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    from vla.cli.plots import BAD, GREY, LINE

    count = max(1, len(outcome.names))
    figure = Figure(figsize=(10, 1.2 + 1.35 * count), layout="constrained")
    axes = np.atleast_1d(figure.subplots(count, 1, sharex=True))
    seconds = (outcome.times_ns - outcome.times_ns[0]) / 1e9 if len(outcome.times_ns) else np.empty(0)
    breaks = np.flatnonzero(np.diff(seconds) > 1.0) + 1  # a line across the pause between episodes would lie
    for column, (axis, name) in enumerate(zip(axes, outcome.names)):
        if len(seconds):
            x = np.insert(seconds, breaks, np.nan)
            theirs, mine = (np.insert(side[:, column], breaks, np.nan) for side in (outcome.recorded, outcome.replayed))
            axis.fill_between(x, theirs, mine, color=BAD, alpha=0.25, lw=0)
            axis.plot(x, theirs, color=GREY, lw=1.6, label="recorded")
            axis.plot(x, mine, color=LINE, lw=0.9, label="replayed")
        if outcome.first is not None and len(seconds):
            axis.axvline((outcome.first.at_ns - outcome.times_ns[0]) / 1e9, color=BAD, lw=0.8, ls="--")
        axis.set_ylabel(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    if outcome.names and len(seconds):
        axes[0].legend(fontsize=7, ncol=2, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    axes[-1].set_xlabel("seconds; dashed: the first action that differs", fontsize=8)
    return figure


def plot(outcome: Outcome, path: Path) -> None:
    """Write `figure_of` as PNG, or with the outcome in words as one HTML page."""
    from vla.files import replacing, write_text

    figure = figure_of(outcome)
    if path.suffix == ".png":
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        return
    from vla.cli.plots import _svg

    words = html.escape(json.dumps(outcome.to_dict(), indent=1))
    write_text(path, f"<!doctype html><meta charset=utf-8><title>replay</title>{_svg(figure)}<pre>{words}</pre>\n")


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("replay"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replay", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
