"""`vla convert`: rosbag2 recordings to a LeRobotDataset v3.0 that `vla train` takes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EPILOG = """An episode is what lies between `start` and `stop` on /vla/record; one ended by `discard` is left out.
Samples are taken at the robot's rate: the latest picture that is not later, joint states interpolated (grippers: the
nearest), and as action the command in force when the sample's period ends. A recording that lacks a topic or has it
with another type, and an episode with a hole, is named and left out. Exit code 0: everything is in; 1: something was
left out.

examples:
  vla convert recordings/* --robot tabletop --out data/mine
  vla convert day1.mcap --robot so101 --out data/day1 --whole --instruction "fold the towel"
  vla convert recordings/* --robot panda --out data/mine --strict --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("bags", nargs="+", type=Path, metavar="BAG", help="rosbag2 folder, .mcap or .db3 file")
    parser.add_argument("--robot", required=True, help="embodiment: a shipped name or a YAML file")
    parser.add_argument("--out", required=True, type=Path, metavar="DATASET", help="folder of the data set to make")
    parser.add_argument("--whole", action="store_true", help="each recording is one episode, from end to end")
    parser.add_argument("--instruction", default="", metavar="TEXT", help="instead of the recorded instructions")
    parser.add_argument(
        "--clock",
        choices=("stamps", "aligned", "received"),
        default="stamps",
        help="stamps (default): as they are; aligned: shift each topic to the recorder's clock; received: ignore them",
    )
    parser.add_argument("--resize", action="store_true", help="scale pictures of another size than the robot's")
    parser.add_argument("--slop", type=float, metavar="S", help="oldest usable picture (default: two periods)")
    parser.add_argument("--gap", type=float, metavar="S", help="largest gap of joint states (default: two periods)")
    parser.add_argument(
        "--measured", action="store_true", help="joints commanded on no topic: take where they went as the command"
    )
    parser.add_argument("--codec", default="h264", help="of the videos, see vla.data.video (default: h264)")
    parser.add_argument("--strict", action="store_true", help="make nothing if anything would be left out")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    from ros_nodes.convert import Settings, convert
    from vla.resources import load_embodiment

    settings = Settings(
        args.whole, args.clock, args.resize, args.instruction, args.measured, args.slop, args.gap, args.codec
    )
    with _bar(len(args.bags)) as progress:
        report = convert(args.bags, load_embodiment(args.robot), args.out, settings, args.strict, progress)
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        for left in report.skipped:
            print(f"left out: {left.text}", file=sys.stderr)
        for note in report.notes:
            print(f"note: {note}", file=sys.stderr)
        print(f"{report.path}: {report.episodes} episodes, {report.frames} frames, {len(report.skipped)} left out")
    return 1 if report.skipped else 0


@contextmanager
def _bar(bags: int) -> Iterator[Callable[[str, int, int], None] | None]:
    """`advance(recording, episodes done, episodes of it)` on a terminal, None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f} episodes"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, seen = bar.add_task("convert", total=1), []

        def advance(name: str, done: int, total: int) -> None:
            if name not in seen:
                seen.append(name)
            bar.update(task, description=f"{name} ({len(seen)} of {bags})", completed=done, total=max(1, total))

        yield advance
