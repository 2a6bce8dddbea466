"""What a demo run measured, as plain data; `summary.json` and the report are made from this and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla.files import write_text
from vla.runtime.summary import percentiles, wilson_95


@dataclass(frozen=True)
class Episode:
    """success: the environment said so before max_steps. start_s, end_s: since the start of the run, wall time."""

    index: int
    seed: int
    family: str
    instruction: str
    success: bool
    steps: int
    start_s: float
    end_s: float
    note: str = ""


@dataclass(frozen=True)
class Event:
    """Something worth a line in the report: a stop of the gate, a silent heartbeat, a restarted process."""

    at_s: float
    source: str
    text: str


@dataclass
class RunRecord:
    """One run over the graph. Times in seconds since the start of the run, durations in milliseconds.

    inference: [N, 2], start time and duration (ms). commands: [M, 1 + D], time and values.
    dropped: {topic: messages lost by DDS, overwritten before they were read, or refused}.
    peak_rss_mb: of all processes together at one time; rss_mb: peak of each.
    real_time_factor: simulated over wall time, 1.0 where the simulator keeps up.
    parts: what the bundle was run with, by name, see policies.parts.
    """

    env: str
    task: str
    policy: str
    rate_hz: float
    seed: int
    command_names: tuple[str, ...] = ()
    episodes: list[Episode] = field(default_factory=list)
    requested: int = 0
    wall_s: float = 0.0
    control_hz: float = 0.0
    due_actions: int = 0
    missed_actions: int = 0
    late_actions: int = 0  # executed, but more than half a period after they were due
    inference: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    transport_ms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    commands: np.ndarray = field(default_factory=lambda: np.zeros((0, 1)))
    gate: dict[str, int] = field(default_factory=lambda: {"pass": 0, "reshape": 0, "stop": 0})
    gate_reasons: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    peak_rss_mb: float = 0.0
    rss_mb: dict[str, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    real_time_factor: float = 1.0
    bundle_hash: str | None = None
    interrupted: bool = False
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def successes(self) -> int:
        return sum(episode.success for episode in self.episodes)

    @property
    def success_rate(self) -> float:
        return self.successes / len(self.episodes) if self.episodes else 0.0

    def summary(self) -> dict[str, Any]:
        """The content of summary.json. Percentiles are null where nothing was measured."""
        low, high = wilson_95(self.successes, len(self.episodes))
        return {
            "episodes": len(self.episodes),
            "successes": self.successes,
            "success_rate": round(self.success_rate, 4),
            "wilson_95": [round(low, 4), round(high, 4)],
            "control_hz": round(self.control_hz, 3),
            "due_actions": self.due_actions,
            "missed_actions": self.missed_actions,
            "inference_ms": percentiles(self.inference[:, 1] if len(self.inference) else ()),
            "transport_ms": percentiles(self.transport_ms, (50, 95)),
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            "gate": {key: int(self.gate.get(key, 0)) for key in ("pass", "reshape", "stop")},
            "seeds": [episode.seed for episode in self.episodes],
            "bundle_hash": self.bundle_hash,
        }

    def details(self) -> dict[str, Any]:
        """The content of run.json: what the summary leaves out, without the long arrays."""
        return {
            "env": self.env,
            "task": self.task,
            "policy": self.policy,
            "parts": {group: list(words) for group, words in self.parts.items()},
            "rate_hz": self.rate_hz,
            "first_seed": self.seed,
            "requested_episodes": self.requested,
            "interrupted": self.interrupted,
            "wall_s": round(self.wall_s, 2),
            "real_time_factor": round(self.real_time_factor, 3),
            "episodes": [_rounded(asdict(episode)) for episode in self.episodes],
            "late_actions": self.late_actions,
            "gate_reasons": self.gate_reasons,
            "dropped_messages": self.dropped,
            "process_peak_rss_mb": {name: round(value, 1) for name, value in self.rss_mb.items()},
            "events": [_rounded(asdict(event)) for event in self.events],
        }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}


def write_results(record: RunRecord, out: Path) -> None:
    """summary.json and run.json into `out`."""
    write_text(out / "summary.json", json.dumps(record.summary(), indent=2) + "\n")
    write_text(out / "run.json", json.dumps(record.details(), indent=2) + "\n")


def by_family(episodes: Sequence[Episode]) -> dict[str, tuple[int, int]]:
    """{family: (successes, episodes)}, in order of first appearance."""
    out: dict[str, tuple[int, int]] = {}
    for episode in episodes:
        good, total = out.get(episode.family, (0, 0))
        out[episode.family] = (good + episode.success, total + 1)
    return out
