"""Demonstrations: a scripted expert drives an environment, successes become a LeRobotDataset v3.0.

Episodes are identified by their seed. What is kept depends on the seeds alone: not on the number of workers, nor on how
often the run was killed and started again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sim.control import make_expert
from sim.demonstrate import Noise, run_expert
from sim.environment import EVAL_SEED_START, make
from sim.workers import end_with_parent
from vla.data.lerobot_writer import DatasetSpec, Feature, merge, write_shard
from vla.embodiment import Embodiment
from vla.errors import ConfigError, DataError, VlaError, explain, nearest
from vla.files import exclusive, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectConfig:
    """Arguments of `collect`.

    env: name in sim.environment.ENVIRONMENTS. task: one of its tasks, or "all" (they take turns, `turn` episodes each).
    episodes: successes to keep. seed: the first one; every attempt takes the next. out: folder of the data set.
    pairs: lay every scene out twice, and ask for another of its objects the second time; where the arm has to go then
    follows from the words alone, and a policy cannot learn it by remembering scenes.
    workers: processes. env_options: further arguments of the environment. codec: name in vla.data.video.CODECS.
    """

    out: str
    env: str = "tabletop"
    task: str = "all"
    episodes: int = 500
    seed: int = 0
    workers: int = 2
    turn: int = 1
    pairs: bool = False
    codec: str = "h264"
    noise: Noise = field(default_factory=Noise)
    env_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.workers < 1 or self.turn < 1:
            raise ConfigError(
                explain(
                    "collect",
                    "episodes, workers and turn of at least 1",
                    f"episodes={self.episodes} workers={self.workers} turn={self.turn}",
                    "Give positive numbers.",
                )
            )
        if not 0 <= self.seed < EVAL_SEED_START:
            raise ConfigError(
                explain(
                    "collect.seed",
                    f"0 to {EVAL_SEED_START - 1}",
                    self.seed,
                    "Seeds from there on are for evaluation: a policy must not have seen its test.",
                )
            )

    def identity(self) -> dict[str, Any]:
        """What decides the content of the data set: everything but the number of workers and the place."""
        data = asdict(self)
        del data["workers"], data["out"]
        data["env_options"] = dict(self.env_options)
        return data


@dataclass(frozen=True)
class CollectReport:
    path: str
    episodes: int
    frames: int
    attempts: int
    wall_s: float


def spec_of(embodiment: Embodiment, codec: str) -> DatasetSpec:
    """The features that demonstrations of this embodiment have."""
    return DatasetSpec.of(embodiment, codec, perturbed=Feature("bool", (1,)))


# ---- worker processes ----
_worker: dict[str, Any] = {}


def _start_worker(config: CollectConfig) -> None:
    end_with_parent()
    environment = make(config.env, **config.env_options)
    _worker.update(config=config, environment=environment, expert=make_expert(config.env, environment))


def _attempt(seed: int, task: str, work: str) -> tuple[int, int]:
    """Run one seed and store it. Returns (seed, frames), 0 frames for a failure."""
    config, environment = _worker["config"], _worker["environment"]
    scene, options = _scene(config, seed)
    done = run_expert(environment, _worker["expert"], scene, task, config.noise, options=options)
    if done is None:
        _mark_failed(Path(work), seed)
        return seed, 0
    arrays, facts = done
    write_shard(
        _shard(Path(work), seed), spec_of(environment.embodiment, config.codec), facts["instruction"], arrays, facts
    )
    return seed, facts["steps"]


def _scene(config: CollectConfig, attempt: int) -> tuple[int, dict[str, Any]]:
    """Seed and reset options of an attempt: attempts are numbered from config.seed on; with pairs, two share a seed."""
    number = attempt - config.seed
    if not config.pairs:
        return attempt, {}
    return config.seed + number // 2, {"swap": True} if number % 2 else {}


def _shard(work: Path, seed: int) -> Path:
    return work / "episodes" / f"{seed:09d}"


def _failure(work: Path, seed: int) -> Path:
    return work / "failed" / f"{seed:09d}"


def _mark_failed(work: Path, seed: int) -> None:
    _failure(work, seed).touch()


def _stored_frames(work: Path, seed: int) -> int | None:
    """Frames of a seed that an earlier run finished (0: the expert failed), None when it is still to do."""
    if _failure(work, seed).exists():
        return 0
    record = _shard(work, seed) / "episode.json"
    return int(json.loads(record.read_text())["length"]) if record.exists() else None


# ---- the whole run ----
def collect(config: CollectConfig, progress: bool = True) -> CollectReport:
    """Collect `config.episodes` successes into `config.out`; continues an interrupted run; returns what was made.

    Raises ConfigError for a seed, task or environment that does not exist, and for an `out` of another collection.
    """
    began = time.perf_counter()
    out = Path(config.out)
    work = out.with_name(out.name + ".work")
    if out.exists():
        return _finished(out, config)
    environment = make(config.env, **config.env_options)
    try:
        embodiment = environment.embodiment
        tasks = tuple(task for task in environment.tasks if task != "all")
    finally:
        environment.close()
    if config.task != "all":
        if config.task not in tasks:
            raise ConfigError(f"task: {config.task!r} is not one of {config.env}. {nearest(config.task, tasks)}")
        tasks = (config.task,)
    work.mkdir(parents=True, exist_ok=True)
    with exclusive(work, "out"):
        _claim(work, config)
        with _bar(progress) as advance:
            kept, attempts, frames = _run_seeds(config, tasks, work, advance)
        log.info("merging %d episodes", len(kept))
        shards = [_shard(work, seed) for seed in kept]
        episodes = [json.loads((shard / "episode.json").read_text())["extra"] for shard in shards]
        meta = {
            "embodiment": embodiment.to_dict(),
            "collection": {"config": config.identity(), "attempts": attempts, "episodes": episodes},
        }
        merge(shards, out, spec_of(embodiment, config.codec), meta)
        shutil.rmtree(work, ignore_errors=True)
    return CollectReport(str(out), len(kept), frames, attempts, time.perf_counter() - began)


def _run_seeds(
    config: CollectConfig, tasks: tuple[str, ...], work: Path, advance: Callable[[int, int, int, int], None]
) -> tuple[list[int], int, int]:
    """Attempt seeds in order until enough succeed. Returns (kept seeds, attempts, frames)."""
    limit = 20 + 3 * config.episodes  # an expert that fails more often than this is broken
    results: dict[int, int] = {}
    pending: dict[concurrent.futures.Future[tuple[int, int]], int] = {}
    kept: list[int] = []
    following, settled, frames = config.seed, config.seed, 0
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # workers are the parallelism; inherited by the spawned processes
    pool = concurrent.futures.ProcessPoolExecutor(
        config.workers, multiprocessing.get_context("spawn"), _start_worker, (config,)
    )
    try:
        while True:
            while settled in results and len(kept) < config.episodes:
                if results[settled] > 0:
                    kept.append(settled)
                    frames += results[settled]
                settled += 1
                advance(len(kept), config.episodes, settled - config.seed, frames)
            if len(kept) == config.episodes:
                return kept, settled - config.seed, frames
            if settled - config.seed >= limit or settled >= EVAL_SEED_START:
                raise DataError(
                    explain(
                        "collect",
                        f"{config.episodes} successes in {limit} attempts",
                        f"{len(kept)} successes",
                        "Look at the expert, or lower noise.level_max.",
                    )
                )
            ahead = settled + max(4 * config.workers, config.turn)
            while following < min(ahead, EVAL_SEED_START) and len(pending) < 2 * config.workers:
                stored = _stored_frames(work, following)
                if stored is not None:
                    results[following] = stored
                else:
                    turn = config.turn * (2 if config.pairs else 1)
                    task = tasks[((following - config.seed) // turn) % len(tasks)]
                    pending[pool.submit(_attempt, following, task, str(work))] = following
                following += 1
            done, _ = concurrent.futures.wait(
                pending, timeout=0 if settled in results else None, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                del pending[future]
                seed, length = future.result()
                results[seed] = length
    except BrokenProcessPool as error:
        raise DataError(
            f"collect: a worker process died (out of memory, or killed) with {len(kept)} episodes done. "
            "Run the same command again to continue, with fewer workers if memory was short."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _claim(work: Path, config: CollectConfig) -> None:
    """Make the working folder, or make sure that the one there belongs to the same collection."""
    (work / "episodes").mkdir(parents=True, exist_ok=True)
    (work / "failed").mkdir(exist_ok=True)
    for left in (work / "episodes").glob(".*"):
        shutil.rmtree(left, ignore_errors=True)  # episodes that a killed run was writing
    record = work / "config.json"
    if record.exists():
        # a longer or shorter run over the same seeds may continue: episodes do not depend on how many there are
        _require_same(record, json.loads(record.read_text()) | {"episodes": config.episodes}, config)
        return
    write_text(record, json.dumps(config.identity(), indent=2))


def _finished(out: Path, config: CollectConfig) -> CollectReport:
    """The report of a collection that is already complete."""
    record = out / "meta/collection.json"
    if not record.exists():
        raise ConfigError(
            explain("out", "a free path, or this collection", f"another folder at {out}", "Choose another `out`.")
        )
    stored = json.loads(record.read_text())
    _require_same(out, stored["config"], config)
    frames = sum(int(episode["steps"]) for episode in stored["episodes"])
    return CollectReport(str(out), len(stored["episodes"]), frames, int(stored["attempts"]), 0.0)


def _require_same(where: Path, stored: Mapping[str, Any], config: CollectConfig) -> None:
    mine = json.loads(json.dumps(config.identity()))
    differing = [key for key in mine if mine[key] != stored.get(key)]
    if differing:
        pairs = ", ".join(f"{key}={stored.get(key)!r} there, {mine[key]!r} now" for key in differing)
        raise ConfigError(
            explain("out", "the collection that was begun there", f"{pairs} ({where})", "Choose another `out`.")
        )


class _bar:
    """A progress bar as a context: `advance(kept, wanted, attempts, frames)`."""

    def __init__(self, show: bool):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("collect"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} episodes, {task.fields[attempts]} attempts"),
            TextColumn("{task.fields[rate]:.0f} frames/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not show or not Console().is_terminal,
        )
        self._task = self._progress.add_task("collect", total=1, attempts=0, rate=0.0)
        self._began = time.perf_counter()
        self._logged = 0

    def __enter__(self) -> Callable[[int, int, int, int], None]:
        self._progress.start()
        return self._advance

    def _advance(self, kept: int, wanted: int, attempts: int, frames: int) -> None:
        rate = frames / max(time.perf_counter() - self._began, 1e-6)
        self._progress.update(self._task, completed=kept, total=wanted, attempts=attempts, rate=rate)
        if not self._progress.console.is_terminal and kept >= self._logged + max(1, wanted // 20):
            self._logged = kept
            log.info("%d of %d episodes, %d attempts, %.0f frames/s", kept, wanted, attempts, rate)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def main(arguments: list[str] | None = None) -> int:
    """`python -m sim.collect`: the same with plain flags."""
    parser = argparse.ArgumentParser(prog="sim.collect", description="Collect demonstrations of a scripted expert.")
    parser.add_argument("--env", default="tabletop")
    parser.add_argument("--task", default="all")
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turn", type=int, default=1)
    parser.add_argument("--pairs", action="store_true", help="every scene twice, asked for another object")
    parser.add_argument("--codec", default="h264")
    parser.add_argument("--out", required=True)
    parser.add_argument("--no-noise", action="store_true", help="execute what the expert says")
    flags = vars(parser.parse_args(arguments))
    noise = Noise(fraction=0.0) if flags.pop("no_noise") else Noise()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        report = collect(CollectConfig(noise=noise, **flags))
    except VlaError as error:
        log.error("%s", error)
        return 1
    log.info("%s: %d episodes, %d frames, %d attempts, %.0f s", *asdict(report).values())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
