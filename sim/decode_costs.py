"""What one decoder costs per observation: time, passes, FLOPs, time outside of the model, flips in bf16.

All decoders run on the same observations, those of greedy episodes, with the context each had there (the chunk that was
running, the actions executed), one decoder after the other on every observation, so that a slow moment of the machine
hits all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from policies.vla_policy import VlaPolicy
from sim.decode_entries import Entry
from sim.evaluate import EvalConfig, evaluate
from vla.checkpoints.bundle import Bundle
from vla.decoding.anytime import AnytimeDecoder
from vla.decoding.base import Decoded, DecodeInput
from vla.decoding.costs import pass_costs
from vla.errors import DataError
from vla.models.heads import TokenHead
from vla.models.suffix import TokenSuffix
from vla.models.vla import Vla
from vla.policy import InferContext, InferResult, Policy, PolicyWrapper
from vla.types import Observation

_FLOP_CHUNKS = 6  # observations that FLOPs are counted on: counting takes a hundred times as long as running
_FLIP_CHUNKS = 20  # observations that flips are counted on: passes in bf16 run in torch, one by one
# What counts as the model's own time in decoding.
_MODEL: dict[type, tuple[str, ...]] = {
    TokenSuffix: ("logits", "hidden", "through", "read", "out", "embed"),
    TokenHead: ("embed", "guesses"),
    Vla: ("extend", "velocity", "noise", "parallel_actions"),
}


@dataclass(frozen=True)
class Cost:
    """What one decoder took per observation. On a GPU times are of work that is done, not of its launch.

    total_ms: image and text handling, prefix and decoding. pass_ms: the part of decode_ms inside passes over
    tokens. actions: normalised, [T, A] each. flops: per chunk, prefix included. flips: share of chunks in which bf16
    makes an exact decoder differ from greedy, None where not counted. window: tokens per pass, of decoders that say so.
    """

    total_ms: np.ndarray
    decode_ms: np.ndarray
    pass_ms: np.ndarray
    passes: np.ndarray
    tokens: np.ndarray
    repaired: int
    ids: list[tuple[int, ...]]
    actions: list[np.ndarray]
    flops: float
    flips: float | None = None
    window: int = 0


class Recording(PolicyWrapper):
    """A policy that keeps what it was shown, up to `most` times, and counts which inferences ran no model and how long
    those took."""

    def __init__(self, policy: Policy, most: int = 0):
        super().__init__(policy)
        self._most = most
        self.seen: list[tuple[Observation, InferContext]] = []
        self.inferences = 0
        self.reuse_ms: list[float] = []

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        if len(self.seen) < self._most:
            self.seen += zip(observations, contexts)
        results = super().infer_batch(observations, contexts)
        self.inferences += len(results)
        for result in results:
            if result.report.reused:
                self.reuse_ms.append(result.report.times_ms["total"])
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
    rows: dict[str, list[tuple[InferResult, np.ndarray, float]]] = {entry.name: [] for entry in entries}
    kept = policy.decoder, policy.selection
    try:
        with _timed_passes(policy.device) as passes:
            for index, (observation, context) in enumerate([*seen[:3], *seen]):
                for entry in entries:
                    entry.policy(policy)
                    before = passes.ms
                    result = policy.infer_batch([observation], [context])[0]
                    if index >= 3:
                        actions = policy.bundle.action_normalizer.normalize(result.chunk.actions)
                        rows[entry.name].append((result, actions, passes.ms - before))
                tick()
        flops = {entry.name: _flops(policy, entry, seen[:_FLOP_CHUNKS]) for entry in entries}
        flips = _flips(policy, entries, seen[:_FLIP_CHUNKS])
    finally:
        policy.decoder, policy.selection = kept
    return {
        name: Cost(
            np.array([r.report.times_ms["total"] for r, _, _ in results]),
            np.array([r.report.times_ms["decode"] for r, _, _ in results]),
            np.array([ms for _, _, ms in results]),
            np.array([r.report.passes for r, _, _ in results]),
            np.array([len(r.report.ids) for r, _, _ in results]),
            sum(r.report.repaired > 0 for r, _, _ in results),
            [r.report.ids for r, _, _ in results],
            [actions for _, actions, _ in results],
            flops[name],
            flips.get(name),
            int(results[-1][0].report.notes.get("window", 0)),
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


@contextmanager
def _timed_passes(device: torch.device) -> Iterator[Any]:
    """Adds up, in `ms`, the time spent in the model behind the prefix: the rest of decoding is the decoder's own.

    A GPU is waited for before and after each pass, and behind the prefix, so that decoding begins when it is done.
    """

    class Watch:
        ms = 0.0

    watch, inside = Watch(), [False]

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
                watch.ms += (now() - begin) * 1e3

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


def _flips(
    policy: VlaPolicy, entries: Sequence[Entry], seen: Sequence[tuple[Observation, InferContext]]
) -> dict[str, float]:
    """Of exact entries: the share of chunks whose tokens are not greedy's when the model computes in bf16, where passes
    of different lengths round differently and near-ties fall the other way."""

    def tokens(entry: Entry) -> list[tuple[int, ...]]:
        entry.policy(policy)
        with _in_torch(), torch.autocast(policy.device.type, torch.bfloat16):
            return [policy.infer_batch([observation], [context])[0].report.ids for observation, context in seen]

    said = {entry.name: tokens(entry) for entry in entries if entry.exact}
    return {
        entry.name: float(np.mean([a != b for a, b in zip(said[entry.name], said[entry.reference])]))
        for entry in entries
        if entry.exact and entry.reference in said
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


@dataclass(frozen=True)
class Reuse:
    """share: of inferences that ran no model. ms: what each of those took, at least one of them if there is a share."""

    share: float = 0.0
    ms: tuple[float, ...] = ()

    def mixed(self, forward_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Times of all inferences, from those of real forwards: float64[n], and how much each of them counts."""
        ran = np.full(len(forward_ms), (1 - self.share) / len(forward_ms))
        rest = np.full(len(self.ms), self.share / max(1, len(self.ms)))
        return np.concatenate((forward_ms, self.ms)), np.concatenate((ran, rest))


def reuse_share(policy: VlaPolicy, entry: Entry, config: EvalConfig, episodes: int = 20) -> Reuse:
    """In episodes, because a reuse changes what comes after it."""
    kept = policy.decoder, policy.selection
    recording = Recording(entry.policy(policy))
    try:
        evaluate(recording, replace(config, episodes=episodes, out=""))
    finally:
        policy.decoder, policy.selection = kept
    return Reuse(len(recording.reuse_ms) / max(1, recording.inferences), tuple(recording.reuse_ms))


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


def anytime_curve(
    policy: VlaPolicy, head: str, seen: Sequence[tuple[Observation, InferContext]], cost: Cost, points: int = 9
) -> list[Cut]:
    """Error against time: deadlines from where the prefix is done to where greedy decoding, whose `cost` is that of the
    same observations, has mostly ended."""
    first, last = np.median(cost.total_ms - cost.decode_ms), np.quantile(cost.total_ms, 0.95)
    kept, out = policy.decoder, []
    values = policy.bundle.config.horizon * policy.bundle.config.action_dim
    try:
        for deadline in np.linspace(first, last, points).round(1).tolist():
            policy.decoder = AnytimeDecoder(deadline, head)
            results = [policy.infer_batch([observation], [context])[0] for observation, context in seen]
            chunks = [policy.bundle.action_normalizer.normalize(result.chunk.actions) for result in results]
            errors = [float(np.mean((chunk - whole) ** 2)) for chunk, whole in zip(chunks, cost.actions)]
            ms, cut = (
                float(np.mean([value(result.report) for result in results]))
                for value in (lambda report: report.times_ms["total"], lambda report: report.notes["cut"] / values)
            )
            out.append(Cut(deadline, round(ms, 2), round(cut, 4), round(float(np.sqrt(np.mean(errors))), 5)))
    finally:
        policy.decoder = kept
    return out
