"""Decoders over one policy: what each costs, whether it says what greedy says, and what it does to success.

Costs are measured on the observations of greedy episodes, with the context each had there (the chunk that was running,
the actions executed), one decoder after the other on every observation, so that a slow moment of the machine hits all.
Exact decoders need no episodes of their own: their actions are those of greedy decoding of the same head. The others
run the same seeds as greedy, and the difference is paired.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from policies.reuse_policy import ReusePolicy
from policies.vla_policy import VlaPolicy
from sim.evaluate import EpisodeRecord, EvalConfig, Report, evaluate
from sim.workers import end_with_parent
from vla import configs
from vla.checkpoints.bundle import Bundle
from vla.configs import describe
from vla.decoding.base import Decoded, DecodeInput, Decoder
from vla.errors import ConfigError, DataError
from vla.models.suffix import TokenSuffix
from vla.models.vla import Vla
from vla.policy import InferContext, InferResult, Policy
from vla.runtime.summary import percentiles, wilson_95
from vla.types import Observation

CURVE = (1, 2, 4, 8, 16, 32, 64, 112)
_FLOP_CHUNKS = 6  # observations that FLOPs are counted on: counting takes a hundred times as long as running
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Entry:
    """One line of the benchmark. name: as printed. config: name in configs/decoder. options: key=value.

    reference: name of the entry that this one is compared with, "" for a reference itself. pruning, reuse: names in
    configs/pruning and configs/reuse, "" for none.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()
    reference: str = ""
    pruning: str = ""
    reuse: str = ""

    def decoder(self) -> Decoder:
        made: Decoder = configs.load("decoder", self.config, self.options)
        return made

    def selection(self) -> Any:
        return configs.load("pruning", self.pruning) if self.pruning else None

    @property
    def exact(self) -> bool:
        return self.decoder().exact and not self.pruning and not self.reuse

    def policy(self, policy: VlaPolicy) -> Policy:
        """`policy` set to this entry, behind the reuse rule if there is one."""
        policy.decoder, policy.selection = self.decoder(), self.selection()
        return ReusePolicy(policy, configs.load("reuse", self.reuse)) if self.reuse else policy

    def describe(self) -> dict[str, Any]:
        return {
            **describe(self.decoder()),
            "pruning": describe(self.selection()) if self.pruning else None,
            "reuse": describe(configs.load("reuse", self.reuse)) if self.reuse else None,
        }


# Every decoder on the form it was published for, and the heads side by side.
ENTRIES = (
    Entry("greedy bins", "autoregressive", ("head=bins",)),
    Entry("jacobi bins, 4", "jacobi", ("head=bins", "window=4"), "greedy bins"),
    Entry("jacobi bins, 8", "jacobi", ("head=bins", "window=8"), "greedy bins"),
    Entry("jacobi bins, 16", "jacobi", ("head=bins", "window=16"), "greedy bins"),
    Entry("jacobi bins, whole block", "jacobi", ("head=bins", "window=112"), "greedy bins"),
    Entry("jacobi bins, 8, warm", "jacobi", ("head=bins", "window=8", "warm=true"), "greedy bins"),
    Entry("speculative bins, previous chunk", "speculative", ("head=bins",), "greedy bins"),
    Entry("speculative bins, shallow", "speculative_shallow", ("head=bins",), "greedy bins"),
    Entry("blockwise bins", "blockwise", ("head=bins",), "greedy bins"),
    Entry("relaxed bins", "relaxed", ("head=bins",), "greedy bins"),
    Entry("early exit bins", "early_exit", ("head=bins",), "greedy bins"),
    Entry("capped bins, 8 passes", "capped", ("head=bins",), "greedy bins"),
    Entry("capped bins, 2 passes per 16", "capped", ("head=bins", "passes=2", "window=16"), "greedy bins"),
    Entry("bidirectional bins", "jacobi_bidirectional", ("head=bins",), "greedy bins"),
    Entry("greedy FAST", "autoregressive", ("head=fast",)),
    Entry("jacobi FAST, 4", "jacobi", ("head=fast", "window=4"), "greedy FAST"),
    Entry("speculative FAST, previous chunk", "speculative", ("head=fast",), "greedy FAST"),
    Entry("anytime FAST", "anytime", ("head=fast",), "greedy FAST"),
    Entry("pruned FAST", "autoregressive", ("head=fast",), "greedy FAST", "flashvla"),
    Entry("reused FAST", "autoregressive", ("head=fast",), "greedy FAST", "score", "flashvla"),
    Entry("pruned and reused FAST", "autoregressive", ("head=fast",), "greedy FAST", "flashvla", "flashvla"),
    Entry("flow, 10 steps", "flow", (), "greedy bins"),
    Entry("flow, 4 steps", "flow", ("steps=4",), "greedy bins"),
    Entry("diffusion, 4 steps", "diffusion", (), "greedy bins"),
    Entry("hybrid tokens", "ensemble", ("mode=tokens",), "greedy bins"),
    Entry("hybrid ensemble", "ensemble", (), "greedy bins"),
    Entry("parallel", "parallel", (), "greedy bins"),
)


def served(policy: VlaPolicy, entries: Sequence[Entry]) -> tuple[list[Entry], dict[str, str]]:
    """Which entries this bundle's heads serve, and why not the others."""
    good, refused = [], {}
    for entry in entries:
        try:
            entry.decoder().check(policy.bundle)
            if entry.pruning:
                entry.selection().check(policy.bundle.config)
            good.append(entry)
        except ConfigError as error:
            refused[entry.name] = str(error)
    return good, refused


# ---- costs ----
@dataclass(frozen=True)
class Cost:
    """What one decoder took per observation. total_ms: image and text handling, prefix and decoding. actions:
    normalised, [T, A] each. flops: per chunk, prefix included."""

    total_ms: np.ndarray
    decode_ms: np.ndarray
    passes: np.ndarray
    tokens: np.ndarray
    repaired: int
    ids: list[tuple[int, ...]]
    actions: list[np.ndarray]
    flops: float


class Recording:
    """A policy that keeps what it was shown, up to `most` times, and counts which inferences ran no model."""

    def __init__(self, policy: Policy, most: int = 0):
        self._policy, self._most = policy, most
        self.embodiment, self.horizon = policy.embodiment, policy.horizon
        self.seen: list[tuple[Observation, InferContext]] = []
        self.inferences = self.reused = 0

    def reset(self, seed: int) -> None:
        self._policy.reset(seed)

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        if len(self.seen) < self._most:
            self.seen += zip(observations, contexts)
        results = self._policy.infer_batch(observations, contexts)
        self.inferences += len(results)
        self.reused += sum(bool(result.report.reused) for result in results)
        return results


def observations(policy: VlaPolicy, config: EvalConfig, count: int) -> list[tuple[Observation, InferContext]]:
    """`count` observations of the policy's own episodes, with their contexts."""
    recording = Recording(policy, count)
    episodes = 0
    while len(recording.seen) < count:
        if episodes >= 50 * count:
            raise DataError("bench: the episodes end before the policy is asked. Check env and policy.")
        evaluate(recording, replace(config, episodes=1, seed=config.seed + episodes, out=""))
        episodes += 1
    return recording.seen[:count]


def costs(
    policy: VlaPolicy,
    entries: Sequence[Entry],
    seen: Sequence[tuple[Observation, InferContext]],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Cost]:
    """Every entry on every observation. The first observations, which warm up, are run twice and counted once.

    Of entries that reuse chunks this is the cost of a real forward; how many there are only episodes can tell.
    """
    rows: dict[str, list[tuple[InferResult, np.ndarray]]] = {entry.name: [] for entry in entries}
    kept = policy.decoder, policy.selection
    try:
        for index, (observation, context) in enumerate([*seen[:3], *seen]):
            for entry in entries:
                entry.policy(policy)
                result = policy.infer_batch([observation], [context])[0]
                if index >= 3:
                    rows[entry.name].append((result, policy.bundle.action_normalizer.normalize(result.chunk.actions)))
            tick()
        flops = {entry.name: _flops(policy, entry, seen[:_FLOP_CHUNKS]) for entry in entries}
    finally:
        policy.decoder, policy.selection = kept
    return {
        name: Cost(
            np.array([r.report.times_ms["total"] for r, _ in results]),
            np.array([r.report.times_ms["decode"] for r, _ in results]),
            np.array([r.report.passes for r, _ in results]),
            np.array([len(r.report.ids) for r, _ in results]),
            sum(r.report.repaired > 0 for r, _ in results),
            [r.report.ids for r, _ in results],
            [actions for _, actions in results],
            flops[name],
        )
        for name, results in rows.items()
    }


def _flops(policy: VlaPolicy, entry: Entry, seen: Sequence[tuple[Observation, InferContext]]) -> float:
    entry.policy(policy)
    with _in_torch(), _Flops() as counter:
        for observation, context in seen:
            policy.infer_batch([observation], [context])
    return counter.total / len(seen)


class _Flops(TorchDispatchMode):
    """Adds up what torch's table says of each operation. (FlopCounterMode fails on parameters in inference mode.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:  # inference mode leaves composite operations whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=out)
        return out


@contextmanager
def _in_torch() -> Iterator[None]:
    """Passes in numpy cannot be counted: run them in torch."""
    usual = Vla.host_weights
    Vla.host_weights = lambda self, head: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Vla.host_weights = usual  # type: ignore[method-assign]


class _Passes:
    """A decoder that times passes of each length behind the prefix it is given, and answers zeros."""

    exact = False

    def __init__(self, head: str, repeats: int):
        self.head, self.repeats = head, repeats
        self.curve: dict[int, float] = {}

    def check(self, bundle: Bundle) -> None: ...

    def decode(self, given: DecodeInput) -> Decoded:
        suffix = TokenSuffix(given.bundle.model, given.prefix, self.head)
        for count in CURVE:
            if count > suffix.room:
                break
            ids = torch.zeros((1, count), dtype=torch.long, device=suffix.device)
            times = []
            for _ in range(self.repeats + 3):
                begin = time.perf_counter()
                suffix.logits(ids).cpu()
                times.append((time.perf_counter() - begin) * 1e3)
                suffix.truncate(0)
            self.curve[count] = float(np.median(times[3:]))
        config = given.bundle.config
        return Decoded(np.zeros((given.batch, config.horizon, config.action_dim), np.float32), 0)


def reuse_share(policy: VlaPolicy, entry: Entry, config: EvalConfig, episodes: int = 20) -> float:
    """Share of inferences that run no model, in episodes: a reuse changes what comes after it."""
    kept = policy.decoder, policy.selection
    recording = Recording(entry.policy(policy))
    try:
        evaluate(recording, replace(config, episodes=episodes, out=""))
    finally:
        policy.decoder, policy.selection = kept
    return recording.reused / max(1, recording.inferences)


def cost_curve(
    policy: VlaPolicy, head: str, seen: tuple[Observation, InferContext], repeats: int = 30
) -> dict[int, float]:
    """{tokens per pass: median milliseconds} of one head behind a prefix: what decoders choose windows from."""
    probe = _Passes(head, repeats)
    kept, policy.decoder = policy.decoder, probe
    try:
        policy.infer_batch([seen[0]], [seen[1]])
    finally:
        policy.decoder = kept
    return probe.curve


# ---- success ----
def success(
    bundle: str, entry: Entry, config: EvalConfig, out: Path, workers: int, on_episodes: Callable[[int], None]
) -> Report:
    """All episodes of one entry, in parallel processes; what `out` already holds is not run again."""
    seeds = np.array_split(np.arange(config.episodes), max(1, min(workers, config.episodes)))
    parts = [
        replace(config, policy=bundle, episodes=len(part), seed=config.seed + int(part[0]), out=str(out / f"part{i}"))
        for i, part in enumerate(seeds)
    ]
    reports: list[Report] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(parts), context, end_with_parent) as pool:
        for future in as_completed([pool.submit(_part, bundle, entry, part) for part in parts]):
            reports.append(future.result())
            on_episodes(len(reports[-1].episodes))
    episodes = sorted((e for report in reports for e in report.episodes), key=lambda e: e.seed)
    return Report(reports[0].identity, tuple(episodes))


def _part(bundle: str, entry: Entry, config: EvalConfig) -> Report:
    inner = VlaPolicy.from_bundle(bundle, device=config.device, threads=1)
    policy = entry.policy(inner)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    rule = policy.rule if isinstance(policy, ReusePolicy) else None
    told = replace(config, decoder=inner.decoder, pruning=inner.selection, reuse=rule)
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
            "points": round(100 * self.difference, 2), "wilson_95": [round(100 * low, 2), round(100 * high, 2)],
            "gained": self.gained, "lost": self.lost, "n": self.n, "verdict": self.verdict,
        }  # fmt: skip


# ---- rows ----
def row(
    entry: Entry,
    cost: Cost,
    reference: Cost,
    execute: int,
    report: Report | None,
    base: Report | None,
    reused: float = 0.0,
) -> dict[str, Any]:
    """One line of the results as plain data. report: this decoder's episodes, base: those of its reference.

    reused: share of inferences that ran no model; they count as taking no time.
    """
    own = report if report is not None else base if entry.exact else None
    runs = 1.0 - reused
    seconds = cost.total_ms.mean() / 1e3 * runs
    same = [a == b for a, b in zip(cost.ids, reference.ids)] if any(cost.ids) else []
    spoken = cost.tokens.any()
    error = [float(np.sqrt(np.mean((a - b) ** 2))) for a, b in zip(cost.actions, reference.actions)]
    return {
        "decoder": entry.name,
        "config": entry.describe(),
        "exact": entry.exact,
        "passes_per_chunk": round(float(cost.passes.mean()) * runs, 3),
        "ms_per_chunk": percentiles(cost.total_ms, (50, 95)),
        "decode_ms": percentiles(cost.decode_ms, (50, 95)),
        "tokens_per_s": round(float(cost.tokens.sum() / (cost.decode_ms.sum() / 1e3)), 1) if spoken else None,
        "actions_per_s": round(execute / seconds, 1),
        "refresh_hz": round(1 / seconds, 2),
        "flops_per_chunk": round(cost.flops * runs),
        "repaired": cost.repaired,
        "reused": round(reused, 4),
        "reference": entry.reference or entry.name,
        "speedup": round(float(reference.total_ms.mean() / (cost.total_ms.mean() * runs)), 3),
        "same_chunks": round(float(np.mean(same)), 4) if same else None,
        "rms_to_reference": round(float(np.mean(error)), 5),
        "n": len(own.episodes) if own else 0,
        "success_rate": round(own.success.rate, 4) if own else None,
        "wilson_95": [round(bound, 4) for bound in own.success.interval] if own else None,
        "episodes_of": "its own" if report is not None else "its reference, which it equals" if own else None,
        "paired_difference": Paired.of(report.episodes, base.episodes).to_dict()
        if report is not None and base is not None and entry.reference
        else None,
    }
