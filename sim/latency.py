"""Latency as data: what inferences took once, replayed on the simulated clock of an episode.

Same trace, same seed, same schedule: on any machine, however busy, each chunk arrives at the same simulated nanosecond.
(The chunk itself is as repeatable as its policy: floating point may differ between kinds of CPU.)

A trace comes from a run (`trace.mcap`, which `vla demo` writes), from a JSON file of milliseconds, from a shipped file
of configs/traces, or is drawn from a distribution with a seed, for what-if:

    outputs/demo/trace.mcap     measured on this machine
    latency.json                [31.5, 28.0, ...] or {"inference_ms": [...], "transport_ms": [...]}
    two_cores                   a shipped one
    lognormal:p50=30,p95=60,seed=1      also constant:ms=50 and uniform:low=20,high=80,seed=1
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from vla.errors import ConfigError, DataError, explain, nearest
from vla.files import write_text
from vla.resources import config_dir
from vla.runtime.loop import Delay
from vla.runtime.summary import percentiles
from vla.runtime.trace import Trace
from vla.types import NS_PER_S

DRAWS = 4096  # of a distribution, before it repeats
_NS_PER_MS = 1_000_000
_RESOLUTION_NS = 1000  # draws are rounded to it: the last bit of a logarithm may differ between C libraries
_REMEDY = "Record one with `vla demo --out DIR` and give DIR/trace.mcap; see docs/realtime.md."


@dataclass(frozen=True)
class LatencyTrace:
    """Delays of consecutive inferences; after the last one the first one again. name: where they come from."""

    delays: tuple[Delay, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.delays:
            raise DataError(explain(self.name or "latency", "at least one inference", "none", _REMEDY))
        if min(min(delay.inference_ns, delay.transport_ns) for delay in self.delays) < 0:
            raise DataError(explain(self.name or "latency", "delays of zero or more", "a negative one", _REMEDY))

    def of(self, seed: int) -> Callable[[int], Delay]:
        """Inference number -> delay, for the episode of this seed. Episodes begin at places of the trace that only
        their seeds decide: neither their order nor the schedule changes what they meet."""
        start = int(np.random.SeedSequence(seed).generate_state(1)[0]) % len(self.delays)
        return lambda number: self.delays[(start + number) % len(self.delays)]

    def scaled(self, factor: float) -> LatencyTrace:
        """Everything `factor` times as slow. ConfigError for a factor below 0."""
        if not 0 <= factor < inf:
            raise ConfigError(explain("latency_scale", "0 or more", factor, "1 replays the trace as it is."))
        delays = [Delay(round(d.inference_ns * factor), round(d.transport_ns * factor)) for d in self.delays]
        return LatencyTrace(tuple(delays), self.name)

    def periods(self, period_s: float, percent: float = 99) -> int:
        """Control periods that cover this percentage of the inferences, at least 1: the `lead` to schedule with."""
        total_ns = np.percentile([delay.total_ns for delay in self.delays], percent)
        return max(1, int(np.ceil(total_ns / (period_s * NS_PER_S))))

    @property
    def fingerprint(self) -> str:
        """Of the delays, not of their name."""
        numbers = [[delay.inference_ns, delay.transport_ns] for delay in self.delays]
        return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Milliseconds from observation to chunk, and where they come from."""
        total = [delay.total_ns / _NS_PER_MS for delay in self.delays]
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "inferences": len(total),
            "total_ms": {**percentiles(total), "max": round(max(total), 3)},
        }

    def write(self, path: str | Path) -> None:
        """As a JSON file that `read` reads to the nanosecond."""
        lists = {
            "about": self.name,
            "inference_ms": [delay.inference_ns / _NS_PER_MS for delay in self.delays],
            "transport_ms": [delay.transport_ns / _NS_PER_MS for delay in self.delays],
        }
        write_text(Path(path), json.dumps(lists) + "\n")


def read(source: str) -> LatencyTrace:
    """What `source` names: a file, a shipped trace, or a distribution (see above). ConfigError for an unknown name or a
    setting that cannot be, DataError for a file that holds no latencies."""
    kind, colon, settings = source.partition(":")
    path = Path(source)
    if path.suffix == ".mcap":
        return of_run(Trace.load_mcap(path), source)
    if path.suffix == ".json":
        return _of_json(path, source)
    if colon or kind in DISTRIBUTIONS:
        return _drawn(source, kind, settings)
    shipped = {file.stem: file for file in sorted((config_dir() / "traces").glob("*.json"))}
    if source not in shipped:
        raise ConfigError(f"latency: {source!r} is unknown. {nearest(source, [*shipped, *DISTRIBUTIONS])} {_REMEDY}")
    return _of_json(shipped[source], source)


def of_run(trace: Trace, name: str = "") -> LatencyTrace:
    """What the inferences of a run took, on the clock of its control loop; refused chunks took their time too.

    Transport is what lies between asked and answered beside the policy's own time: messages both ways, and the wait for
    an image that is new enough.
    """
    rows = slice(0, trace.inferences)
    total_ns = trace.infer_end_ns[rows] - trace.infer_start_ns[rows]
    own_ns = np.minimum(np.round(trace.infer_ms[rows] * _NS_PER_MS).astype(np.int64), total_ns)
    return LatencyTrace(tuple(Delay(int(own), int(all_ - own)) for own, all_ in zip(own_ns, total_ns)), name)


def _of_json(path: Path, name: str) -> LatencyTrace:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        inference = data["inference_ms"] if isinstance(data, dict) else data
        transport = data.get("transport_ms", [0.0] * len(inference)) if isinstance(data, dict) else [0.0] * len(data)
        if isinstance(inference, dict):
            raise ValueError("percentiles; give the trace.mcap beside that summary")
        if len(inference) != len(transport):
            raise ValueError(f"{len(inference)} inferences and {len(transport)} transports")
        pairs = [(_nanoseconds(a), _nanoseconds(b)) for a, b in zip(inference, transport)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        expected = '[ms, ...] or {"inference_ms": [...], "transport_ms": [...]}'
        raise DataError(explain(str(path), expected, f"{type(error).__name__}: {error}", _REMEDY)) from error
    return LatencyTrace(tuple(Delay(*pair) for pair in pairs), name)


def _nanoseconds(ms: float) -> int:
    if isinstance(ms, bool) or not isfinite(ms) or ms < 0:
        raise ValueError(f"{ms!r} milliseconds")
    return round(ms * _NS_PER_MS)


def _constant(u: float, ms: float) -> float:
    return ms


def _uniform(u: float, low: float, high: float) -> float:
    return low + (high - low) * u


def _lognormal(u: float, p50: float, p95: float) -> float:
    return p50 * exp(log(p95 / p50) * NormalDist().inv_cdf(u) / NormalDist().inv_cdf(0.95))


# name: (quantile function of u in (0, 1), its settings in milliseconds, in rising order)
DISTRIBUTIONS: dict[str, tuple[Callable[..., float], tuple[str, ...]]] = {
    "constant": (_constant, ("ms",)),
    "uniform": (_uniform, ("low", "high")),
    "lognormal": (_lognormal, ("p50", "p95")),
}


def _drawn(source: str, kind: str, settings: str) -> LatencyTrace:
    if kind not in DISTRIBUTIONS:
        raise ConfigError(f"latency: {kind!r} is no distribution. {nearest(kind, DISTRIBUTIONS)}")
    quantile, keys = DISTRIBUTIONS[kind]
    example = f"{kind}:{','.join(f'{key}={30 * (place + 1)}' for place, key in enumerate(keys))},seed=0"
    try:
        given = dict(item.split("=", 1) for item in settings.split(",")) if settings else {}
        seed = int(given.pop("seed", "0"))
        values = {key: float(given.pop(key)) for key in keys}
        if given:
            raise ValueError(f"unknown {', '.join(given)}")
        ordered = list(values.values())
        if not 0 < ordered[0] <= ordered[-1] < inf or seed < 0:
            raise ValueError("out of range")
    except (ValueError, KeyError) as error:
        raise ConfigError(explain(f"latency {source!r}", example, f"{type(error).__name__}: {error}", "Correct it.")) \
            from error  # fmt: skip
    milliseconds = [quantile(u, **values) for u in _uniforms(seed, DRAWS)]
    steps = [round(ms * _NS_PER_MS / _RESOLUTION_NS) for ms in milliseconds]
    return LatencyTrace(tuple(Delay(step * _RESOLUTION_NS) for step in steps), source)


def _uniforms(seed: int, count: int) -> Sequence[float]:
    """In (0, 1). Of a SeedSequence, whose numbers are the same in every version of numpy; a Generator's need not be."""
    words = np.random.SeedSequence(seed).generate_state(count, np.uint64)
    return [(int(word >> np.uint64(11)) + 0.5) * 2.0**-53 for word in words]
