"""How a node is started on the wheel from its command line, and how that ends: errors made on purpose in one line,
others with their traceback."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from ros_nodes.heap import one_arena
from vla.errors import VlaError


def run(main: Callable[[], object]) -> int:
    """Exit code of `main()`: what it returns, 0 for nothing, 1 after printing a VlaError."""
    try:
        return int(main() or 0)  # type: ignore[call-overload]
    except VlaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def end_at_once() -> None:
    """From now on SIGINT and SIGTERM end the process with code 0, until its shell has handlers of its own: a node that
    is being loaded has nothing to close yet."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))  # an exception might be dropped, in a destructor for one


def on_wheel(kind: str, arguments: Sequence[str] | None = None) -> int:
    """Run the node `kind` of ros_nodes/settings.py with a command line; its exit code."""
    from ros_nodes import settings, wheel_shell

    one_arena()
    node = settings.NODES[kind]
    module = importlib.import_module(node.module)
    parser = argparse.ArgumentParser(node.module.split(".")[-1], description=(module.__doc__ or "").split("\n\n")[0])
    settings.add_arguments(parser, node.settings)
    wheel_shell.add_arguments(parser)
    options = parser.parse_args(arguments, argparse.Namespace(actions=False))
    core = module.build(options)
    wheel_shell.run(core, options)
    return int(module.report(core)) if hasattr(module, "report") else 0
