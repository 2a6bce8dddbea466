"""Episodes of an evaluation shared out to processes, and put together again."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np

from sim.evaluate import EvalConfig, Report
from sim.workers import end_with_parent

_MOST = 50  # episodes that a process runs before it reports


def shares(config: EvalConfig, out: Path, most: int = _MOST) -> list[EvalConfig]:
    """The seeds of `config` in consecutive shares of at most `most` episodes, with a folder of `out` each."""
    seeds = np.array_split(np.arange(config.episodes), -(-config.episodes // most))
    return [
        replace(config, episodes=len(part), seed=config.seed + int(part[0]), out=str(out / f"part{i}"))
        for i, part in enumerate(seeds)
    ]


def run_shares(
    run: Callable[[EvalConfig], Report],
    parts: Sequence[EvalConfig],
    workers: int,
    on_episodes: Callable[[int], None] = lambda count: None,
) -> list[Report]:
    """`run` on each share, in at most `workers` processes, or in this one for 0; reports in the order of `parts`."""
    if workers < 1:
        done = []
        for part in parts:
            done.append(run(part))
            on_episodes(len(done[-1].episodes))
        return done
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(parts)), context, end_with_parent) as pool:
        futures = [pool.submit(run, part) for part in parts]
        for future in as_completed(futures):
            on_episodes(len(future.result().episodes))
        return [future.result() for future in futures]


def merged(reports: Sequence[Report]) -> Report:
    """Shares of one run as one report, episodes in the order of their seeds."""
    episodes = sorted((episode for report in reports for episode in report.episodes), key=lambda e: e.seed)
    return Report(reports[0].identity, tuple(episodes))
