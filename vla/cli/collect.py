"""`vla collect`: demonstrations of a scripted expert, as a LeRobotDataset."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vla.cli.job import add_override_arguments, run_job

EXAMPLES = """  vla collect out=data/tabletop episodes=500
  vla collect out=data/spatial env=libero_spatial workers=4 episodes=200"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser, "collect", EXAMPLES)


def run(args: argparse.Namespace) -> int:
    def load() -> Callable[..., Any]:
        from sim.collect import collect

        return collect

    return run_job(args, "collect", load)
