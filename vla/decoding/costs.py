"""What a pass over so many tokens takes on this device, and the block length that follows from it.

On a GPU a pass over 64 tokens takes about what one token takes. On a CPU, in numpy, 8 tokens take twice as long as one
on a small expert and 1.4 to 1.8 times as long on one of 8 M parameters. A long block settles more tokens per pass and
pays for those that it does not settle, so its best length is a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from functools import lru_cache

import numpy as np

from vla.errors import ConfigError, explain
from vla.models.suffix import TokenSuffix, best_tokens

LENGTHS = (1, 2, 4, 8, 16, 32, 64, 112)


def pass_costs(suffix: TokenSuffix, repeats: int = 7) -> dict[int, float]:
    """{tokens: median milliseconds of a pass over them and of choosing the best}, as far as there is room.

    Behind half of the tokens that fit, where they leave the room: a pass costs more the further decoding has come, and
    this is what it costs on average. `suffix` is as it was afterwards.
    """
    begin, costs = suffix.length, {}
    half = (suffix.room - begin) // 2
    suffix.logits([[suffix.start_id] * half] * suffix.batch)
    for count in LENGTHS:
        if begin + count > suffix.room:
            break
        at = begin + min(half, suffix.room - begin - count)
        suffix.truncate(at)
        ids = [[suffix.start_id] * count] * suffix.batch
        times = []
        for _ in range(repeats + 2):
            started = time.perf_counter()
            best_tokens(suffix.logits(ids))
            times.append((time.perf_counter() - started) * 1e3)
            suffix.truncate(at)
        costs[count] = float(np.median(times[2:]))
    suffix.truncate(begin)
    return costs


def settled_per_pass(length: int | np.ndarray, agreement: float) -> np.ndarray:
    """Tokens that a pass over `length` settles on average, when a guess behind right ones is right with probability
    `agreement`: (1 - a^length) / (1 - a) (Leviathan et al. 2023, equation 1, with length = gamma + 1)."""
    a = min(agreement, 1 - 1e-6)
    return np.asarray((1 - a ** np.asarray(length, float)) / (1 - a))


def best_length(costs: Mapping[int, float], agreement: float) -> int:
    """The length of a block with the most settled tokens per millisecond; costs between measured lengths are
    interpolated."""
    return _best_length(tuple(costs.items()), agreement)


@lru_cache(maxsize=64)  # asked before every chunk
def _best_length(costs: tuple[tuple[int, float], ...], agreement: float) -> int:
    counts, known = zip(*costs)
    lengths = np.arange(1, max(counts) + 1)
    ms = np.interp(lengths, counts, known)
    return int(lengths[np.argmax(settled_per_pass(lengths, agreement) / ms)])


def check_agreement(agreement: float | None) -> None:
    """ConfigError for what `usual_agreement` does not take."""
    if agreement is not None and not 0 <= agreement <= 1:
        raise ConfigError(explain("decoder.agreement", "0..1 or null", agreement, "vla bench decode prints it."))


def usual_agreement(agreement: float | None, token_lengths: Collection[int]) -> float:
    """`agreement`, or for None what it is for tokens of one value each, as bins are, and for others, FAST's, which are
    seldom guessed right. In long blocks guesses are right more often, having been through more passes: these two make
    the choice of a length right and are not what is measured."""
    if agreement is not None:
        return agreement
    return 0.85 if set(token_lengths) == {1} else 0.2


def agreement_of(settled: float, length: int) -> float:
    """The agreement at which passes over `length` settle so many tokens each: `settled_per_pass` solved for it."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if settled_per_pass(length, middle) < settled else (low, middle)
    return low
