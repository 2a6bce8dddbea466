"""How a node is started on the wheel from its command line, and how that ends: errors made on purpose in one line,
others with their traceback."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ros_nodes.shell import EXIT_LIMIT_S
from vla.errors import VlaError


def run(main: Callable[[], object]) -> int:
    """Exit code of `main()`: what it returns, 0 for nothing, 1 after printing a VlaError."""
    try:
        return int(main() or 0)  # type: ignore[call-overload]
    except VlaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@contextmanager
def _ends_at_once() -> Iterator[list[int]]:
    """Until the shell has handlers of its own, SIGINT and SIGTERM end the process with code 0: a node that is being
    built has nothing to close yet. Gives the signals that came."""
    told: list[int] = []

    def end(number: int, frame: Any) -> None:
        told.append(number)
        faulthandler.dump_traceback_later(EXIT_LIMIT_S, exit=True)
        for again in (signal.SIGINT, signal.SIGTERM):  # from the terminal, and once more from launch
            signal.signal(again, signal.SIG_IGN)
        raise SystemExit(0)

    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is end:
                signal.signal(number, handler)


def on_wheel(kind: str, arguments: Sequence[str] | None = None) -> int:
    """Run the node `kind` of ros_nodes/settings.py with a command line; its exit code."""
    from ros_nodes import settings, wheel_shell

    node = settings.NODES[kind]
    module = importlib.import_module(node.module)
    parser = argparse.ArgumentParser(node.module.split(".")[-1], description=(module.__doc__ or "").split("\n\n")[0])
    settings.add_arguments(parser, node.settings)
    wheel_shell.add_arguments(parser)
    options = parser.parse_args(arguments, argparse.Namespace(actions=False))
    with _ends_at_once() as told:
        core = module.build(options)
        if told:  # Python drops what is raised in a destructor
            return 0
        wheel_shell.run(core, options)
    return int(module.report(core)) if hasattr(module, "report") else 0
