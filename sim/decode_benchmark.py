"""Decoders over one policy: what each costs, whether it says what greedy says, and what it does to success.

Exact decoders need no episodes of their own: their actions are those of greedy decoding of the same head. The others
run the same seeds as greedy, and the difference is paired. Costs: sim/decode_costs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from policies.vla_policy import VlaPolicy
from sim.decode_costs import Cost, Pace
from sim.decode_entries import Entry
from sim.evaluate import EpisodeRecord, EvalConfig, Report, evaluate
from sim.shares import merged, run_shares, shares
from vla.decoding.costs import agreement_of
from vla.errors import DataError
from vla.runtime.summary import percentiles, wilson_95


# ---- success ----
def success(
    bundle: str, entry: Entry, config: EvalConfig, out: Path, workers: int, on_episodes: Callable[[int], None]
) -> Report:
    """All episodes of one entry, in parallel processes; what `out` already holds is not run again."""
    parts = shares(replace(config, policy=bundle), out)
    return merged(run_shares(partial(_part, bundle, entry), parts, workers, on_episodes))


def _part(bundle: str, entry: Entry, config: EvalConfig) -> Report:
    inner = VlaPolicy.from_bundle(bundle, device=config.device, threads=1)
    policy = entry.policy(inner)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    parts = entry.parts
    told = replace(config, decoder=parts.decoder, pruning=parts.pruning, reuse=parts.reuse, ensembling=parts.ensembling)
    return evaluate(policy, told, policy_id=inner.bundle.fingerprint)


@dataclass(frozen=True)
class Paired:
    """Success minus that of the reference on the same seeds, with the 95 % interval of Newcombe (1998), method 10.

    gained, lost: seeds that only the one or only the other solved.
    """

    n: int
    gained: int
    lost: int
    both: int
    neither: int

    @classmethod
    def of(cls, mine: Sequence[EpisodeRecord], theirs: Sequence[EpisodeRecord]) -> Paired:
        reference = {e.seed: e for e in theirs}
        if {e.seed for e in mine} != set(reference):
            raise DataError("paired difference: expected the same seeds in both runs. Run both with the same settings.")
        pairs = [(e.success, reference[e.seed].success) for e in mine]
        return cls(
            len(pairs), pairs.count((True, False)), pairs.count((False, True)), pairs.count((True, True)),
            pairs.count((False, False)),
        )  # fmt: skip

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        first, second = self.both + self.gained, self.both + self.lost
        p1, p2 = first / self.n, second / self.n
        (l1, u1), (l2, u2) = wilson_95(first, self.n), wilson_95(second, self.n)
        spread = first * (self.n - first) * second * (self.n - second)
        agreement = float(self.both * self.neither - self.gained * self.lost)
        if agreement > 0:  # his continuity correction
            agreement = max(0.0, agreement - self.n / 2)
        correlation = agreement / sqrt(spread) if spread else 0.0

        def half(a: float, b: float) -> float:
            return sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

        d = p1 - p2
        return d - half(p1 - l1, u2 - p2), d + half(u1 - p1, p2 - l2)

    @property
    def verdict(self) -> str:
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "inconclusive"

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "points": round(100 * self.difference, 2), "newcombe_95": [round(100 * low, 2), round(100 * high, 2)],
            "gained": self.gained, "lost": self.lost, "n": self.n, "verdict": self.verdict,
        }  # fmt: skip


# ---- rows ----
def row(
    entry: Entry,
    costs: Mapping[str, Cost],
    paces: Mapping[str, Pace],
    reports: Mapping[str, Report],
    moving: float = 1.0,
) -> dict[str, Any]:
    """One line of the results as plain data.

    costs, paces, reports: of all entries, by name; episodes are those of the entry itself, or of its reference where it
    equals that. What compares with a reference that was not measured is None. Inferences that run no model count in all
    but decode_ms, tokens and overheads; no observation is refreshed by them. moving: share of an action's values that
    ever move; where a token is a value, tokens per pass leave out the others, which nobody has to guess.
    """
    cost, base = costs[entry.name], costs.get(entry.reference or entry.name)
    own = reports.get(entry.name) or (reports.get(entry.reference) if entry.exact else None)
    pairs = {}
    if entry.name in reports:
        mine = reports[entry.name].episodes
        pairs = {
            name: {"to": name, **Paired.of(mine, reports[name].episodes).to_dict()}
            for name in entry.compared
            if name in reports
        }
    pace = paces[entry.name]
    runs = 1.0 - pace.reused
    all_ms, counts = pace.mixed(cost.total_ms)
    total_ms, spread_ms = float(all_ms @ counts), _percentiles(all_ms, counts, (50, 95))
    speed = {name: _actions_per_s(costs[name], paces[name]) for name in costs}
    config, window = entry.describe(), int(cost.notes.get("window", 0))  # tokens of a pass, where the decoder says so
    same = error = None
    if base is not None:
        error = float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(cost.actions, base.actions)]))
        if any(cost.ids) and any(base.ids):
            pieces = zip(cost.ids, base.ids, cost.actions, base.actions)
            same = float(np.mean([a == b and np.array_equal(x, y) for a, b, x, y in pieces]))
    spoken, passes = cost.tokens.any(), max(1, cost.passes.sum())
    counted = sum(len(ids) * (moving if len(ids) == x.size else 1) for ids, x in zip(cost.ids, cost.actions))
    agreement = agreement_of(cost.tokens.sum() / passes, window) if window > 1 and "agreement" in config else None
    in_passes = max(1e-9, cost.pass_ms.sum())
    return {
        "decoder": entry.name,
        "config": config,
        "exact": entry.exact,
        "passes_per_chunk": round(float(cost.passes.mean()) * runs, 3),
        "tokens_per_pass": round(float(counted / passes), 3) if spoken else None,
        "layers": _rounded(cost.notes.get("layers")),
        "averaged": _rounded(cost.notes.get("averaged")),
        "notes": {key: _rounded(value) for key, value in cost.notes.items() if key not in ("layers", "averaged")},
        "window": window or None,
        "agreement": _rounded(agreement),
        "ms_per_chunk": spread_ms,
        "decode_ms": percentiles(cost.decode_ms, (50, 95)),
        "first_action_ms": spread_ms,  # the loop takes a chunk as a whole
        "overhead": round(float(cost.decode_ms.sum() / in_passes - 1), 4) if spoken else None,
        "overhead_between": round(float(cost.between_ms.sum() / in_passes), 4) if spoken else None,
        "tokens_per_s": round(float(cost.tokens.sum() / (cost.decode_ms.sum() / 1e3)), 1) if spoken else None,
        "executed_per_inference": round(pace.executed, 3),
        "actions_per_s": round(speed[entry.name], 1),
        "refresh_hz": round(1e3 * runs / total_ms, 2),
        "flops_per_chunk": round(cost.flops * runs),
        "prefix_flops": round(cost.prefix_flops * runs),
        "repaired": cost.repaired,
        "reused": round(pace.reused, 4),
        "reuse_ms": round(float(np.mean(pace.reuse_ms)), 3) if pace.reuse_ms else 0.0,
        "reference": entry.reference or entry.name,
        "speedup": None if base is None else round(speed[entry.name] / speed[entry.reference or entry.name], 3),
        "speedups": {
            name: round(speed[entry.name] / speed[name], 3) for name in ("greedy bins", "greedy FAST") if name in speed
        },
        "same_chunks": _rounded(same),
        "bf16_flips": _rounded(cost.flips),
        "rms_to_reference": _rounded(error, 5),
        "n": len(own.episodes) if own else 0,
        "success_rate": round(own.success.rate, 4) if own else None,
        "wilson_95": [round(bound, 4) for bound in own.success.interval] if own else None,
        "episodes_of": None
        if own is None
        else "its own"
        if entry.name in reports
        else "its reference, which it equals",
        "paired_difference": pairs.pop((*entry.compared, "")[0], None),
        "further_differences": list(pairs.values()),
    }


def _actions_per_s(cost: Cost, pace: Pace) -> float:
    """Executed actions over inference time."""
    all_ms, counts = pace.mixed(cost.total_ms)
    return 1e3 * pace.executed / float(all_ms @ counts)


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(float(value), digits)


def _percentiles(values: np.ndarray, weights: np.ndarray, which: Sequence[int]) -> dict[str, float | None]:
    """As `percentiles`, which it is where all weigh the same; float64[n] each."""
    if (weights == weights[0]).all():
        return percentiles(values, tuple(which))
    order = np.argsort(values)
    reached = weights[order].cumsum() / weights.sum()
    places = np.searchsorted(reached, np.array(which) / 100 - 1e-9)
    return {f"p{p}": round(float(values[order][place]), 3) for p, place in zip(which, places)}
