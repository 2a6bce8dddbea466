"""`vla eval`: success of a policy on unseen seeds, in process, with the controls that show it sees and listens."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vla.cli.job import add_override_arguments, run_job

EXAMPLES = """  vla eval policy=tabletop episodes=200
  vla eval policy=outputs/train/bundle episodes=50 seed=1000500"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser, "eval", EXAMPLES)


def run(args: argparse.Namespace) -> int:
    def load() -> Callable[..., Any]:
        from sim.evaluate import evaluate

        return evaluate

    return run_job(args, "eval", load)
