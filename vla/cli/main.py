"""`vla`: the composition root. Each sub-command is a module with `add_arguments(parser)` and `run(args) -> int`.

Only the chosen module is imported, so `vla --help` answers at once. Exit codes: 0 success, 1 the job ran and its result
is not good enough, 2 wrong use or a broken installation (one message, no traceback), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EXIT_OK, EXIT_NOT_GOOD, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Command:
    """path: words on the command line. module: imported only when chosen. summary: one line for --help."""

    path: tuple[str, ...]
    module: str
    summary: str


COMMANDS = (
    Command(("demo",), "vla.cli.demo", "run a policy in simulation over real ROS 2 topics and write a report"),
    Command(("doctor",), "vla.cli.doctor", "what is missing on this machine, or wrong on a robot's topics"),
    Command(("info",), "vla.cli.info", "show what a trained bundle is, and check its files"),
    Command(("collect",), "vla.cli.collect", "record demonstrations of the scripted experts (Hydra overrides)"),
    Command(("train",), "vla.cli.train", "train a policy on a data set (Hydra overrides)"),
    Command(("eval",), "vla.cli.evaluate", "measure the success of a policy in process (Hydra overrides)"),
    Command(("serve",), "vla.cli.serve", "run a policy for robots that connect over a websocket"),
    Command(("launch",), "vla.cli.launch", "start nodes as `ros2 launch` does, with the same arguments, without ROS"),
    Command(("record",), "vla.cli.record", "record a robot's topics as rosbag2 MCAP, until Ctrl-C"),
    Command(("convert",), "vla.cli.convert", "make a data set of recordings"),
    Command(("replay",), "vla.cli.replay", "run the loop on a recording and name the first action that differs"),
    Command(("calibrate", "exit"), "vla.cli.calibrate_exit", "early exits of a decoder, fitted to a policy"),
    Command(("calibrate", "content"), "vla.cli.calibrate_content", "what training data looks like, into its bundle"),
    Command(("setup", "libero"), "vla.cli.setup_libero", "install the LIBERO and robosuite parts, point at the assets"),
    Command(("bench", "decode"), "vla.cli.bench_decode", "every decoder over one policy: passes, time, success"),
    Command(("bench", "tokens"), "vla.cli.bench_tokens", "tokens per second of action: bins, FAST+, FAST on our data"),
    Command(("bench", "schedulers"), "vla.cli.bench_schedulers", "schedules on one latency trace: pauses, success"),
    Command(("plot", "timeline"), "vla.cli.plot_timeline", "a trace as a picture: images, inference, chunks, commands"),
)
GROUPS = {
    "setup": "install optional parts",
    "calibrate": "fit settings to a policy",
    "bench": "measure one part",
    "plot": "draw what a run left",
}

EXAMPLES = """examples:
  vla demo                                     20 episodes over ROS 2 on loopback, results in outputs/demo
  vla demo --episodes 5 --seed 1000100         five other scenes
  vla demo --env libero_object --task 3 --policy expert
  vla doctor                                   what is missing on this machine, and how to get it
  vla info tabletop                            the policy that ships with the package
  vla collect out=data/tabletop                demonstrations
  vla train data=data/tabletop                 a policy of your own
  vla serve --policy tabletop                  the policy here, the robot elsewhere
  vla COMMAND --help                           everything a command takes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(_chosen(arguments))
    args = parser.parse_args(arguments)
    if not hasattr(args, "module"):
        # A group without its sub-command ("vla setup") shows that group's help, plain "vla" the whole.
        _parser(None).parse_args([*[word for word in arguments if word in GROUPS][:1], "--help"])
    try:
        return int(importlib.import_module(args.module).run(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `vla ... | head`: the reader has enough; keep the interpreter from complaining while it flushes.
        sys.stdout = None
        return EXIT_OK
    except Exception as error:
        if args.debug or not _is_ours(error):
            raise
        message = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(message) if getattr(args, "json", False) else f"vla: {error}", file=sys.stderr)
        return EXIT_ERROR


def _is_ours(error: Exception) -> bool:
    from vla.errors import VlaError

    return isinstance(error, VlaError)


def _chosen(arguments: Sequence[str]) -> Command | None:
    """The command named by the first words; options before it take no value, so they are skipped."""
    words = [word for word in arguments if not word.startswith("-")]
    for command in COMMANDS:
        if tuple(words[: len(command.path)]) == command.path:
            return command
    return None


def _parser(chosen: Command | None) -> argparse.ArgumentParser:
    common: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="vla",
        description="Vision-language-action control: collect, train, evaluate, and drive an arm over ROS 2.",
        epilog=EXAMPLES,
        **common,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    sub = parser.add_subparsers(title="commands", metavar="COMMAND")
    groups: dict[str, Any] = {}
    for command in COMMANDS:
        home = sub
        if len(command.path) == 2:
            group = command.path[0]
            if group not in groups:
                holder = sub.add_parser(group, help=GROUPS[group], description=GROUPS[group], **common)
                groups[group] = holder.add_subparsers(title="commands", metavar="COMMAND")
            home = groups[group]
        item = home.add_parser(command.path[-1], help=command.summary, description=_sentence(command.summary), **common)
        item.add_argument("--debug", action="store_true", help="show the traceback of an error")
        item.set_defaults(module=command.module)
        if command is chosen:
            importlib.import_module(command.module).add_arguments(item)
    return parser


def _sentence(summary: str) -> str:
    return summary[0].upper() + summary[1:] + "."


class _Version(argparse.Action):
    """Reads the package metadata only when --version is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"vla-stack {version('vla-stack')}")
        except PackageNotFoundError:
            print("vla-stack, run from a folder that is not installed")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
