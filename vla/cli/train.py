"""`vla train`: a policy bundle from a data set, on CPU or GPU with the same command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from vla.cli.job import add_override_arguments, run_job

EXAMPLES = """  vla train data=data/tabletop out=outputs/train
  vla train data=data/tabletop steps=20000 batch_size=256 device=cuda
  vla train data=data/tabletop rollout_every=2000 --rollout-episodes 20
  vla train data=data/tabletop out=outputs/train        again: a killed run continues on the same loss curve
  tensorboard --logdir outputs/train"""

# In-loop rollouts steer the training, so they use other scenes than `vla eval`, which judges the result.
ROLLOUT_SEED = 2_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_override_arguments(parser, "train", EXAMPLES)
    parser.add_argument("--rollout-env", metavar="ENV", help="environment of rollouts (default: the robot's name)")
    parser.add_argument("--rollout-episodes", metavar="N", type=int, default=20, help="per rollout (default: 20)")


def run(args: argparse.Namespace) -> int:
    def load() -> Callable[..., Any]:
        from vla.training.trainer import train

        def start(config: Any, progress: bool) -> Any:
            with _Progress(config.steps, progress) as log:
                return train(config, log, _rollout(args.rollout_env, args.rollout_episodes))

        return start

    return run_job(args, "train", load)


def _rollout(env: str | None, episodes: int) -> Callable[[Any, int], dict[str, float]]:
    """The trainer knows no simulator: it is handed this."""

    def measure(bundle: Any, step: int) -> dict[str, float]:
        from policies.vla_policy import VlaPolicy
        from sim.evaluate import EvalConfig, evaluate

        config = EvalConfig(env=env or bundle.embodiment.name, episodes=episodes, seed=ROLLOUT_SEED)
        report = evaluate(VlaPolicy(bundle), config)
        families = {f"success_{name}": rate.rate for name, rate in report.families().items()}
        return {"success": report.success.rate, **families}

    return measure


class _Progress:
    """Rows of the trainer as a progress bar on a terminal, as JSON lines elsewhere; rare events as lines in both."""

    def __init__(self, steps: int, on_terminal: bool):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("train {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[row]}"),
            TimeRemainingColumn(), console=self._console, disable=not on_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, row="")
        self._on_terminal = on_terminal

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self._bar.start()
        return self._log

    def _log(self, row: dict[str, Any]) -> None:
        if not self._on_terminal:
            print(json.dumps({key: _rounded(value) for key, value in row.items()}), file=sys.stderr, flush=True)
            return
        if row.get("event") == "step":
            words = f"loss {row['loss']:.4f}, {row['samples_per_s']:.0f} samples/s"
            self._bar.update(self._task, completed=row["step"], row=words)
        else:
            self._console.print(", ".join(f"{key} {_rounded(value)}" for key, value in row.items()))

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
