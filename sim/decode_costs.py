"""What one decoder costs per observation: time, passes, FLOPs, time outside of the model, flips in bf16.

All decoders run on the same observations, those of greedy episodes, with the context each had there (the actions
executed), but with its own last chunk as the one that is running. They take turns on every observation, so that a slow
moment of the machine hits all, and in an order drawn anew for each, so that none always finds the caches that another
one left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from policies.parts import Parts
from policies.vla_policy import VlaPolicy
from sim.decode_entries import ENTRIES, Entry
from sim.evaluate import EpisodeRecord, EvalConfig, Report, evaluate
from vla.checkpoints.bundle import Bundle
from vla.decoding.anytime import AnytimeDecoder
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.decoding.base import Decoded, DecodeInput, Decoder
from vla.decoding.costs import pass_costs
from vla.errors import DataError
from vla.models.heads import TokenHead
from vla.models.pruning import eigen_flops, prefix_flops
from vla.models.suffix import TokenSuffix
from vla.models.vla import Vla
from vla.policy import DecodeReport, InferContext, InferResult, Policy, PolicyWrapper
from vla.types import Observation

Seen = Sequence[tuple[Observation, InferContext]]

ORDER_SEED = 0  # of the order in which entries take turns
_WARM_UP = 3  # observations
_FLOP_CHUNKS = 6  # observations that FLOPs are counted on: counting takes a hundred times as long as running
_FLIP_CHUNKS = 20  # observations that flips are counted on: passes in bf16 run in torch, one by one
# What counts as the model's own time in decoding.
_MODEL: dict[type, tuple[str, ...]] = {
    TokenSuffix: ("logits", "hidden", "through", "read", "out", "embed"),
    TokenHead: ("embed", "guesses"),
    Vla: ("extend", "velocity", "noise", "parallel_actions"),
}
_COUNTS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._linalg_eigh: lambda matrices, *args, out_val=None, **kwargs: (
        matrices.shape[:-2].numel() * eigen_flops(matrices.shape[-1])
    ),
}


@dataclass(frozen=True)
class Cost:
    """What one decoder took per observation. On a GPU times are of work that is done, not of its launch.

    total_ms: image and text handling, prefix and decoding. pass_ms: the part of decode_ms inside passes over tokens.
    between_ms: the part of decode_ms between two passes. actions: normalised, [T, A] each. repaired: tokens or values
    that had to be mended, all chunks together. flops: per chunk. prefix_flops: of those, what the prefix takes in the
    transformer. flips: share of chunks in which bf16 makes an exact decoder differ from greedy, None where not counted.
    notes: what the decoder noted, mean over the chunks where it did.
    """

    total_ms: np.ndarray
    decode_ms: np.ndarray
    pass_ms: np.ndarray
    between_ms: np.ndarray
    passes: np.ndarray
    tokens: np.ndarray
    repaired: int
    ids: list[tuple[int, ...]]
    actions: list[np.ndarray]
    flops: float
    prefix_flops: float = 0.0
    flips: float | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pace:
    """What episodes tell of an entry's inferences. executed: actions executed per inference; a chunk that stands again
    has fewer left. reused: share of inferences that ran no model. reuse_ms: what each of those took."""

    executed: float
    reused: float = 0.0
    reuse_ms: tuple[float, ...] = ()

    def mixed(self, forward_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Times of all inferences, from those of real forwards: float64[n], and how much each of them counts."""
        reuse_ms = self.reuse_ms or (0.0,)
        ran = np.full(len(forward_ms), (1 - self.reused) / len(forward_ms))
        rest = np.full(len(reuse_ms), self.reused / len(reuse_ms))
        return (
            (np.concatenate((forward_ms, reuse_ms)), np.concatenate((ran, rest))) if self.reused else (forward_ms, ran)
        )

    def of(self, report: Report) -> Pace:
        """The same with the counts of further episodes in the place of its own."""
        inferences = max(1, sum(e.inferences for e in report.episodes))
        reused = self.reused if report.reused is None else report.reused / inferences
        return replace(self, executed=sum(e.executed for e in report.episodes) / inferences, reused=reused)


class Recording(PolicyWrapper):
    """A policy that keeps what it was shown, up to `most` times, and how long inferences took that ran no model."""

    def __init__(self, policy: Policy, most: int = 0):
        super().__init__(policy)
        self._most = most
        self.seen: list[tuple[Observation, InferContext]] = []
        self.reuse_ms: list[float] = []

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        if len(self.seen) < self._most:
            self.seen += zip(observations, contexts)
        results = super().infer_batch(observations, contexts)
        for result in results:
            if result.report.reused:
                self.reuse_ms.append(result.report.times_ms["total"])
        return results


def observations(policy: VlaPolicy, config: EvalConfig, count: int) -> tuple[Seen, Pace]:
    """`count` observations of the policy's own episodes, with their contexts, and the pace of these episodes."""
    recording = Recording(policy, count)
    episodes: list[EpisodeRecord] = []
    while len(recording.seen) < count:
        if len(episodes) >= 50 * count:
            raise DataError("bench: the episodes end before the policy is asked. Check env and policy.")
        one = replace(config, episodes=1, seed=config.seed + len(episodes), out="")
        episodes += evaluate(recording, one).episodes
    return recording.seen[:count], Pace(0.0).of(Report({}, tuple(episodes)))


@dataclass
class PassWatch:
    """Milliseconds inside passes, and between them, since `reset`."""

    ms: float = 0.0
    between_ms: float = 0.0
    end: float | None = None  # of the last one

    def count(self, begin: float, end: float) -> None:
        """One pass, in seconds of one clock."""
        self.ms += (end - begin) * 1e3
        self.between_ms += 0.0 if self.end is None else (begin - self.end) * 1e3
        self.end = end

    def reset(self) -> None:
        self.ms, self.between_ms, self.end = 0.0, 0.0, None


class _Run:
    """One entry on its way through the observations: what it remembers, what it was told, and what it took."""

    def __init__(self, policy: VlaPolicy, entry: Entry):
        self.parts = replace(entry, reuse="").parts  # of entries that reuse chunks the cost of a real forward counts
        self._policy, self._around = policy, self.parts.around(policy)
        self._last: InferResult | None = None
        self.told: list[tuple[Observation, InferContext]] = []
        self.took: list[tuple[InferResult, PassWatch]] = []

    def step(self, observation: Observation, context: InferContext, passes: PassWatch) -> None:
        self._policy.decoder, self._policy.selection = self.parts.decoder, self.parts.pruning
        if self._last is not None:
            context = _running(context, self._last)
        passes.reset()
        result = self._around.infer_batch([observation], [context])[0]
        self._last = result
        self.told.append((observation, context))
        self.took.append((result, replace(passes)))

    def cost(self, bundle: Bundle, flops: float, flips: float | None) -> Cost:
        reports = [result.report for result, _ in self.took]
        noted = {key for report in reports for key in report.notes}
        return Cost(
            np.array([report.times_ms["total"] for report in reports]),
            np.array([report.times_ms["decode"] for report in reports]),
            np.array([passes.ms for _, passes in self.took]),
            np.array([passes.between_ms for _, passes in self.took]),
            np.array([report.passes for report in reports]),
            np.array([len(report.ids) for report in reports]),
            sum(report.repaired for report in reports),
            [report.ids for report in reports],
            [bundle.action_normalizer.normalize(result.chunk.actions) for result, _ in self.took],
            flops,
            prefix_flops(bundle.config, self.parts.pruning),
            flips,
            {key: float(np.mean([r.notes[key] for r in reports if key in r.notes])) for key in sorted(noted)},
        )


def _running(context: InferContext, last: InferResult) -> InferContext:
    """`context` as it would be if the chunk that is running there, and what of it is committed, were `last`."""
    if context.previous is None:
        return context
    actions, committed = last.chunk.actions, context.committed
    if committed is not None:
        committed = actions[context.executed : context.executed + len(committed)]
    previous = replace(context.previous, actions=actions)
    return replace(context, previous=previous, committed=committed)


def costs(
    policy: VlaPolicy,
    entries: Sequence[Entry],
    seen: Seen,
    tick: Callable[[], None] = lambda: None,
    seed: int = ORDER_SEED,
) -> dict[str, Cost]:
    """Every entry on every observation, in an order that `seed` draws for each of them. The first observations, which
    warm up, are run twice and counted once.

    Of entries that reuse chunks this is the cost of a real forward; how many there are only episodes can tell.
    """
    order, runs = np.random.default_rng(seed), {}
    kept = policy.decoder, policy.selection
    try:
        with _timed_passes(policy.device) as passes:
            for part in (seen[:_WARM_UP], seen):
                runs = {entry.name: _Run(policy, entry) for entry in entries}
                for observation, context in part:
                    for place in order.permutation(len(entries)):
                        runs[entries[place].name].step(observation, context, passes)
                    tick()
        flops = {name: _flops(policy, run.parts, run.told[:_FLOP_CHUNKS]) for name, run in runs.items()}
        flips = _flips(policy, entries, {name: run.told[:_FLIP_CHUNKS] for name, run in runs.items()})
    finally:
        policy.decoder, policy.selection = kept
    return {name: run.cost(policy.bundle, flops[name], flips.get(name)) for name, run in runs.items()}


def _flops(policy: VlaPolicy, parts: Parts, seen: Seen) -> float:
    policy.decoder, policy.selection = parts.decoder, parts.pruning
    with _in_torch(), _Flops() as counter:
        for observation, context in seen:
            policy.infer_batch([observation], [context])
    return counter.total / len(seen)


class _Flops(TorchDispatchMode):
    """Adds up what torch's table says of each operation, and the eigendecompositions of pruning, which it leaves out.
    (FlopCounterMode fails on parameters in inference mode.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = _COUNTS.get(func._overloadpacket)
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


@contextmanager
def _timed_passes(device: torch.device) -> Iterator[PassWatch]:
    """Watches the model behind the prefix: the rest of decoding is the decoder's own.

    A GPU is waited for before and after each pass, and behind the prefix, so that decoding begins when it is done.
    """

    watch, inside = PassWatch(), [False]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:  # `logits` may call `hidden`
                return method(*args, **kwargs)
            inside[0], begin = True, now()
            try:
                return method(*args, **kwargs)
            finally:
                inside[0] = False
                watch.count(begin, now())

        return run

    def finished(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = method(*args, **kwargs)
            now()
            return out

        return run

    usual = {(of, name): getattr(of, name) for of, names in _MODEL.items() for name in names}
    usual[Vla, "prefix"] = Vla.prefix
    for (of, name), method in usual.items():
        setattr(of, name, finished(method) if name == "prefix" else timed(method))
    try:
        yield watch
    finally:
        for (of, name), method in usual.items():
            setattr(of, name, method)


def _flips(policy: VlaPolicy, entries: Sequence[Entry], told: Mapping[str, Seen]) -> dict[str, float]:
    """Of exact entries: the share of chunks whose tokens are not greedy's when the model computes in bf16, where passes
    of different lengths round differently and near-ties fall the other way. told: by name, to all of them."""

    def tokens(entry: Entry, seen: Seen) -> list[tuple[int, ...]]:
        policy.decoder, policy.selection = entry.parts.decoder, entry.parts.pruning
        with _in_torch(), torch.autocast(policy.device.type, torch.bfloat16):
            return [policy.infer_batch([observation], [context])[0].report.ids for observation, context in seen]

    exact = [entry for entry in entries if entry.exact and entry.reference]
    # Greedy decoding looks at no chunk that is running, so it may be told what another one was.
    asked = {entry.reference: told[entry.name] for entry in exact}
    said = {entry.name: tokens(entry, asked[entry.name]) for entry in ENTRIES if entry.name in asked}
    return {
        entry.name: float(np.mean([a != b for a, b in zip(tokens(entry, told[entry.name]), said[entry.reference])]))
        for entry in exact
        if entry.reference in said
    }


class _Probe:
    """A decoder that measures passes behind the prefix it is given, and answers zeros."""

    exact = False

    def __init__(self, head: str, repeats: int):
        self.head, self.repeats = head, repeats
        self.curve: dict[int, float] = {}

    def check(self, bundle: Bundle) -> None: ...

    def decode(self, given: DecodeInput) -> Decoded:
        self.curve = pass_costs(TokenSuffix(given.bundle.model, given.prefix, self.head), self.repeats)
        config = given.bundle.config
        return Decoded(np.zeros((given.batch, config.horizon, config.action_dim), np.float32), 0)


def pace(policy: VlaPolicy, entry: Entry, config: EvalConfig, episodes: int = 20) -> Pace:
    """In episodes, because a reuse changes what comes after it."""
    kept = policy.decoder, policy.selection
    recording = Recording(entry.policy(policy))
    try:
        report = evaluate(recording, replace(config, episodes=episodes, out=""))
    finally:
        policy.decoder, policy.selection = kept
    return Pace(0.0, 0.0, tuple(recording.reuse_ms)).of(report)


def cost_curve(
    policy: VlaPolicy, head: str, seen: tuple[Observation, InferContext], repeats: int = 30
) -> dict[int, float]:
    """{tokens per pass: median milliseconds} of one head behind a prefix: what decoders choose windows from."""
    probe = _Probe(head, repeats)
    kept, policy.decoder = policy.decoder, probe
    try:
        policy.infer_batch([seen[0]], [seen[1]])
    finally:
        policy.decoder = kept
    return probe.curve


@dataclass(frozen=True)
class Cut:
    """Anytime decoding with one deadline, over all observations. ms: mean until the chunk was there. cut: share of the
    chunk's values that were not decoded. rms: of the difference to the complete chunks, normalised units."""

    deadline_ms: float
    ms: float
    cut: float
    rms: float


def anytime_curve(policy: VlaPolicy, head: str, seen: Seen, deadlines: Sequence[float] = ()) -> list[Cut]:
    """Error against time, with nothing in the place of what is missing. deadlines, ms: () for nine, from where the
    prefix is done to where greedy decoding of the same observations has mostly ended."""
    kept, out = policy.decoder, []
    values = policy.bundle.config.horizon * policy.bundle.config.action_dim

    def run(decoder: Decoder) -> tuple[list[DecodeReport], list[np.ndarray]]:
        policy.decoder = decoder
        results = [policy.infer_batch([observation], [context])[0] for observation, context in seen]
        chunks = [policy.bundle.action_normalizer.normalize(result.chunk.actions) for result in results]
        return [result.report for result in results], chunks

    try:
        reports, whole = run(AutoregressiveDecoder(head=head))
        if not deadlines:
            first = np.median([report.times_ms["preprocess"] + report.times_ms["prefix"] for report in reports])
            last = np.quantile([report.times_ms["total"] for report in reports], 0.95)
            deadlines = np.linspace(first, last, 9).round(1).tolist()
        for deadline in deadlines:
            reports, chunks = run(AnytimeDecoder(deadline, "zeros", head))
            errors = [float(np.mean((a - b) ** 2)) for a, b in zip(chunks, whole)]
            ms = float(np.mean([report.times_ms["total"] for report in reports]))
            cut = float(np.mean([report.notes["cut"] for report in reports])) / values
            out.append(Cut(deadline, round(ms, 2), round(cut, 4), round(float(np.sqrt(np.mean(errors))), 5)))
    finally:
        policy.decoder = kept
    return out


def half_cut(curve: Sequence[Cut]) -> float:
    """The deadline, ms, at which about half of the values are not decoded; the nearest one measured where none is."""
    cuts = np.maximum.accumulate([cut.cut for cut in reversed(curve)])  # noise may make it rise with the deadline
    return round(float(np.interp(0.5, cuts, [cut.deadline_ms for cut in reversed(curve)])), 1)
