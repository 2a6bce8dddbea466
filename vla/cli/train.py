"""`vla train`: a policy bundle from a data set, on CPU or GPU with the same command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from vla.cli.job import add_override_arguments, run_job

EXAMPLES = """  vla train data=data/tabletop out=outputs/train
  vla train data=data/tabletop steps=20000 batch_size=128 device=cuda
  vla train data=data/tabletop out=outputs/train        (again: continues where it was killed)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser, "train", EXAMPLES)


def run(args: argparse.Namespace) -> int:
    def load() -> Callable[..., Any]:
        from vla.training.trainer import train

        return train

    return run_job(args, "train", load)
