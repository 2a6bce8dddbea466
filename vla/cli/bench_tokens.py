"""`vla bench tokens`: what a second of action costs, in tokens, and what is lost.

The scripted expert of the tabletop scene runs at each control rate by itself (nothing is interpolated). Its episodes
are cut into chunks of one second, normalised with the quantiles of the fitting episodes, and encoded with uniform bins,
with the public FAST+ and with a FAST fitted to them. Fitting and measuring use different seeds. 14 dimensions are two
arms side by side, each at its own task. The compression ratio is tokens of bins / tokens of FAST, as in the paper
(Pertsch et al., FAST, arXiv 2501.09747, table 1).

What the smoothness of the data allows shows in `nonzero`, the integers of a chunk that survive the rounding: runs of
zeros merge well, integers of changing value hardly do. `--pace 0.5` runs the same expert at half its speed, so that a
second holds half as much motion.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vla.data.normalize import Normalizer
from vla.errors import ConfigError, DataError, explain
from vla.tokenizers import ActionTokenizer, BinTokenizer, FastTokenizer

FAST_PLUS_VARIABLE = "VLA_FAST_PLUS"
# rate in Hz, dimensions -> compression ratio in the paper (BridgeV2, DROID, table bussing, T-shirt folding)
PAPER_RATIO = {(5, 7): 1.75, (15, 7): 3.6, (20, 7): 5.0, (50, 14): 13.2}
_STARTS_PER_CHUNK = 5  # how densely fitting episodes are cut into overlapping chunks
_PARTNERS = 4  # with how many other episodes each fitting episode is paired: two arms have more to learn
_SEARCH_FACTOR = 3  # attempts per wanted episode before the expert is called broken at a rate


@dataclass(frozen=True)
class Row:
    """One tokenizer at one rate and width; means over the test chunks.

    tokens: per one-second chunk. ratio: tokens of bins / tokens. paper: ratio in the paper, None where it has none.
    rms: reconstruction error, root mean square in normalised units over the dimensions that move. rms_mm: the same in
    millimetres over the translation dimensions. drift_mm: root mean square of the length of the error, summed over the
    chunk: how far the arm is off after one second. nonzero: integers that survive rounding, None for bins;
    nonzero_gripper: those of the gripper dimensions among them.
    """

    rate_hz: int
    dims: int
    tokenizer: str
    tokens: float
    ratio: float
    paper: float | None
    rms: float
    rms_mm: float
    drift_mm: float
    nonzero: float | None
    nonzero_gripper: float | None


@dataclass(frozen=True)
class Arm:
    """Expert episodes at one rate, physical units: float32[T_i, A] each.

    metres: bool[A], the translation dimensions. gripper: bool[A]. attempts: episodes that were run to get these.
    seconds: mean length.
    """

    fit: list[np.ndarray]
    test: list[np.ndarray]
    metres: np.ndarray
    gripper: np.ndarray
    attempts: int
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fit-episodes", type=int, default=120, metavar="N", help="episodes to fit on, per rate")
    parser.add_argument("--test-episodes", type=int, default=40, metavar="N", help="episodes to measure on, per rate")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens of the fitted FAST (paper: 1024)")
    parser.add_argument("--scale", type=float, default=10, help="integers per DCT unit of the fitted FAST (paper: 10)")
    parser.add_argument(
        "--fast-plus",
        type=Path,
        metavar="FOLDER",
        help=f"public FAST+ (tokenizer.json, processor_config.json); default: ${FAST_PLUS_VARIABLE}, else skipped",
    )
    parser.add_argument("--rates", type=int, nargs="+", default=[5, 15, 20, 50], metavar="HZ", help="control rates")
    parser.add_argument("--pace", type=float, default=1.0, help="share of the expert's usual speed (default 1)")
    parser.add_argument("--env", default="tabletop", help="environment with a scripted expert and a free rate")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")


def run(args: argparse.Namespace) -> int:
    if min(args.fit_episodes, args.test_episodes, *args.rates) < 1:
        raise ConfigError(explain("bench tokens", "positive episodes and rates", "a number below 1", "See --help."))
    if not 0 < args.pace <= 1:
        raise ConfigError(explain("--pace", "a number above 0, at most 1", args.pace, "0.5 is half the usual speed."))
    fast_plus = _fast_plus(args.fast_plus)
    rows: list[Row] = []
    runs: dict[int, dict[str, float]] = {}
    for rate in args.rates:
        arm = collect(args.env, rate, args.pace, args.fit_episodes, args.test_episodes, _progress(rate))
        kept = args.fit_episodes + args.test_episodes
        runs[rate] = {"kept": kept, "attempts": arm.attempts, "seconds": round(arm.seconds, 2)}
        for arms in (1, 2):
            rows += measure(rate, arms, arm, fast_plus, args.vocab_size, args.scale)
    if args.json:
        print(json.dumps({"pace": args.pace, "rows": [asdict(row) for row in rows], "expert": runs}, indent=2))
    else:
        print(table(rows))
        print("\nexpert episodes (kept of attempted, mean length):")
        for rate, facts in runs.items():
            print(f"  {rate:2d} Hz  {facts['kept']} of {facts['attempts']}, {facts['seconds']:.2f} s")
        if fast_plus is None:
            print(f"FAST+ was skipped: pass --fast-plus FOLDER or set {FAST_PLUS_VARIABLE}.")
    return 0


def collect(
    env: str,
    rate_hz: int,
    pace: float,
    fit_episodes: int,
    test_episodes: int,
    progress: Callable[[int, int], None],
) -> Arm:
    """Undisturbed, successful expert episodes at one rate, without rendering; fitting and test seeds are apart."""
    from sim.control import make_expert
    from sim.demonstrate import Noise, run_expert
    from sim.environment import EVAL_SEED_START, make

    environment = make(env, rate_hz=rate_hz)
    expert = make_expert(env, environment, pace=pace)
    still = Noise(fraction=0.0)
    total, attempts = fit_episodes + test_episodes, 0
    parts: list[list[np.ndarray]] = []
    try:
        for first_seed, wanted in ((0, fit_episodes), (EVAL_SEED_START, test_episodes)):
            episodes: list[np.ndarray] = []
            for seed in range(first_seed, first_seed + _SEARCH_FACTOR * wanted):
                if len(episodes) == wanted:
                    break
                attempts += 1
                result = run_expert(environment, expert, seed, "all", still, render=False)
                # shorter than a chunk: nothing to measure
                if result is not None and len(result[0]["action"]) >= rate_hz:
                    episodes.append(np.asarray(result[0]["action"], np.float32))
                    progress(sum(map(len, parts)) + len(episodes), total)
            if len(episodes) < wanted:
                raise DataError(
                    explain(f"{env} at {rate_hz} Hz", f"{wanted} successes", len(episodes), "Leave this rate out.")
                )
            parts.append(episodes)
        embodiment = environment.embodiment
    finally:
        environment.close()
    return Arm(
        fit=parts[0],
        test=parts[1],
        metres=np.array([unit == "m" for unit in embodiment.action_units]),
        gripper=np.array([name == "gripper" for name in embodiment.action_names]),
        attempts=attempts,
        seconds=float(np.mean([len(episode) / rate_hz for part in parts for episode in part])),
    )


def measure(
    rate_hz: int, arms: int, arm: Arm, fast_plus: FastTokenizer | None, vocab_size: int, scale: float
) -> list[Row]:
    """Rows of all tokenizers for chunks of one second, one arm or two side by side."""
    normalizer = side_by_side_normalizer(arm.fit, arms)
    fit = side_by_side(cut(arm.fit, rate_hz, max(1, rate_hz // _STARTS_PER_CHUNK)), arms, _PARTNERS)
    test = side_by_side(cut(arm.test, rate_hz, rate_hz), arms)
    tokenizers: dict[str, ActionTokenizer] = {"bins": BinTokenizer()}
    if fast_plus is not None:
        tokenizers["FAST+"] = fast_plus
    fitted = FastTokenizer.fit([normalizer.normalize(chunk) for chunk in fit], vocab_size=vocab_size, scale=scale)
    tokenizers["FAST fitted"] = fitted

    dims = test[0].shape[1]
    moves, half = normalizer.active, (normalizer.q99 - normalizer.q01) / 2
    metres, gripper = np.tile(arm.metres, arms), np.tile(arm.gripper, arms)
    rows = []
    for name, tokenizer in tokenizers.items():
        counts, square, square_m, drift, nonzero, nonzero_gripper = [], [], [], [], [], []
        for chunk in test:
            normalised = normalizer.normalize(chunk)
            ids = tokenizer.encode(normalised)
            decoded = tokenizer.decode(ids, rate_hz, dims)
            error = decoded.astype(np.float64) - normalised
            error_m = (error * half)[:, metres]
            counts.append(len(ids))
            square.append(np.mean(error[:, moves] ** 2))
            square_m.append(np.mean(error_m**2))
            drift.append(np.mean(np.sum(error_m.sum(0).reshape(arms, -1) ** 2, axis=1)))
            if isinstance(tokenizer, FastTokenizer):
                survive = np.count_nonzero(tokenizer.integers(normalised), axis=0)
                nonzero.append(survive.sum())
                nonzero_gripper.append(survive[gripper].sum())
        tokens = float(np.mean(counts))
        rows.append(
            Row(
                rate_hz=rate_hz,
                dims=dims,
                tokenizer=name,
                tokens=tokens,
                ratio=rate_hz * dims / tokens,
                paper=None if name == "bins" else PAPER_RATIO.get((rate_hz, dims)),
                rms=float(np.sqrt(np.mean(square))),
                rms_mm=float(1000 * np.sqrt(np.mean(square_m))),
                drift_mm=float(1000 * np.sqrt(np.mean(drift))),
                nonzero=float(np.mean(nonzero)) if nonzero else None,
                nonzero_gripper=float(np.mean(nonzero_gripper)) if nonzero else None,
            )
        )
    return rows


def cut(episodes: Sequence[np.ndarray], horizon: int, stride: int) -> list[list[np.ndarray]]:
    """Per episode its whole chunks float32[horizon, A], `stride` steps apart."""
    return [
        [episode[start : start + horizon] for start in range(0, len(episode) - horizon + 1, stride)]
        for episode in episodes
    ]


def side_by_side(chunks: Sequence[Sequence[np.ndarray]], arms: int, partners: int = 1) -> list[np.ndarray]:
    """One arm: all chunks. Two: chunk i of each episode beside chunk i of each of the next `partners` episodes."""
    if arms == 1:
        return [chunk for episode in chunks for chunk in episode]
    pairs = []
    for step in range(1, partners + 1):
        rolled = [*chunks[step:], *chunks[:step]]
        pairs += [both for left, right in zip(chunks, rolled) for both in zip(left, right)]
    return [np.concatenate(both, axis=1) for both in pairs]


def side_by_side_normalizer(episodes: Sequence[np.ndarray], arms: int) -> Normalizer:
    """Quantiles of one arm, repeated for each arm."""
    q01, q50, q99 = np.quantile(np.concatenate(episodes).astype(np.float64), [0.01, 0.5, 0.99], axis=0)
    return Normalizer(np.tile(q01, arms), np.tile(q99, arms), np.tile(q50, arms))


def table(rows: Sequence[Row]) -> str:
    """Markdown, aligned: readable in a terminal as it is."""
    head = ["Hz", "dims", "tokenizer", "tokens/s", "ratio", "paper", "RMS", "RMS mm", "drift mm", "nonzero", "gripper"]
    body = [
        [
            str(row.rate_hz),
            str(row.dims),
            row.tokenizer,
            f"{row.tokens:.1f}",
            f"{row.ratio:.2f}x",
            "" if row.paper is None else f"{row.paper:g}x",
            f"{row.rms:.4f}",
            f"{row.rms_mm:.3f}",
            f"{row.drift_mm:.2f}",
            "" if row.nonzero is None else f"{row.nonzero:.1f}",
            "" if row.nonzero_gripper is None else f"{row.nonzero_gripper:.1f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def _fast_plus(path: Path | None) -> FastTokenizer | None:
    if path is None:
        named = os.environ.get(FAST_PLUS_VARIABLE)
        path = Path(named) if named else None
    return None if path is None else FastTokenizer.load(path)


def _progress(rate_hz: int) -> Callable[[int, int], None]:
    """A counter on stderr, so that stdout stays clean for --json."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(
                f"\rexpert at {rate_hz} Hz: {done}/{total} episodes", end="\n" if done == total else "", file=sys.stderr
            )

    return show
