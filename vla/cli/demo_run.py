"""One run over the ROS graph: start the nodes, run the episodes, stop them, gather what was measured."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ros_nodes.graph import Graph, robot_of
from vla.cli.recorder import Recorder
from vla.cli.results import Episode, Event, RunRecord
from vla.errors import DataError, SimulationError
from vla.resources import load_embodiment
from vla.runtime.trace import Trace
from vla.types import NS_PER_S

# What a run writes; removed before the next one into the same folder, so that results of two runs never mix.
OUTPUTS = ("summary.json", "run.json", "report.html", "episodes.mp4", "trace.mcap", "control.json")
OUTPUT_FOLDERS = {"logs": "*.log", "stats": "*.json"}


@dataclass(frozen=True)
class Plan:
    """What `vla demo` was asked for. task: None for the environment's own choice. rtf: None for its default.

    parts: what a bundle is run with, by name, see policies.parts. device: where it runs.
    """

    env: str
    policy: str
    task: str | None
    episodes: int
    seed: int
    out: Path
    rtf: float | None = None
    domain: int | None = None
    realtime: bool = False
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    device: str = "cpu"


class Run:
    """Use as a context: `with Run(plan) as run: for episode in run.episodes(): ...`; afterwards `run.record()`."""

    def __init__(self, plan: Plan):
        self.plan = plan
        clear(plan.out)
        self._began = time.monotonic()
        self._ended: float | None = None
        self._done: list[Episode] = []
        self._marks: list[tuple[int, float]] = []  # graph time (ns) and seconds of the run, to convert the former
        self.interrupted = False
        watched = plan_cameras(plan.env)
        self.recorder = Recorder(watched, plan.out)
        self.graph = Graph(
            plan.env, plan.policy, out=plan.out, task=plan.task, real_time_factor=plan.rtf, domain=plan.domain,
            watch=watched, on_image=self.recorder.on_image, restart=("policy",), realtime=plan.realtime,
            parts=plan.parts, device=plan.device,
        )  # fmt: skip

    def __enter__(self) -> Run:
        self.graph.start()
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = time.monotonic()
        self.recorder.end(str(self.graph.sim_status().get("instruction", "")), None, 0, None)
        self.graph.stop()

    def episodes(self) -> Iterator[Episode]:
        """Run them, one seed after the other; SimulationError when the simulator refuses a reset."""
        for index in range(self.plan.episodes):
            self.recorder.begin(index)
            outcome = self.graph.run_episode(self.plan.seed + index)
            if outcome.error:
                raise SimulationError(outcome.error)
            status = self.graph.sim_status()
            start_ns, end_ns, end_s = int(status.get("start_ns", 0)), int(status["stamp_ns"]), self._now_s()
            self.recorder.end(outcome.instruction, outcome.success, start_ns, end_ns)
            # Resetting takes its time: the motion began as long ago as it lasted, on the graph's own clock.
            start_s = end_s - (end_ns - start_ns) / NS_PER_S / self._factor(status)
            self._marks += [(start_ns, start_s), (end_ns, end_s)]
            note = "" if outcome.success or outcome.moved in (None, outcome.target) else f"moved the {outcome.moved}"
            episode = Episode(
                index, outcome.seed, outcome.task or self.plan.task or "", outcome.instruction, outcome.success,
                outcome.steps, start_s, end_s, note,
            )  # fmt: skip
            self._done.append(episode)
            yield episode

    @property
    def finished(self) -> int:
        """Episodes that came to their end."""
        return len(self._done)

    def _now_s(self) -> float:
        return time.monotonic() - self._began

    def _factor(self, status: dict[str, Any]) -> float:
        return float(status.get("rtf") or 1.0) if self.graph.simulated_time else 1.0

    def _seconds(self, stamps_ns: np.ndarray | list[int]) -> np.ndarray:
        """Graph time to seconds of the run, between and beyond the starts and ends of the episodes."""
        stamps = np.asarray(stamps_ns, np.float64)
        if not self._marks:
            return np.zeros(stamps.shape)
        known_ns, known_s = np.array(self._marks, np.float64).T
        out = np.interp(stamps, known_ns, known_s)
        return np.where(stamps > known_ns[-1], known_s[-1] + (stamps - known_ns[-1]) / NS_PER_S, out)

    def record(self) -> RunRecord:
        """Everything that was measured. Only after the context: the nodes write their numbers at their end."""
        plan, robot = self.plan, self.graph.embodiment
        report = self.graph.report()
        stats = {name: _read(plan.out / "stats" / f"{name}.json") for name in ("sim", "policy", "command")}
        record = RunRecord(
            env=plan.env,
            task=plan.task or "",
            policy=plan.policy,
            rate_hz=robot.rate_hz,
            seed=plan.seed,
            command_names=robot.command_names,
            episodes=self._done,
            requested=plan.episodes,
            wall_s=(self._ended or time.monotonic()) - self._began,
            control_hz=float(report.get("control_hz") or 0.0),
            due_actions=int(report.get("due_actions", 0)),
            missed_actions=int(report.get("missed_actions", 0)),
            late_actions=int(report.get("late_actions", 0)),
            transport_ms=np.asarray(self.graph.transport_ms()),
            gate=dict(report.get("gate", {})),
            gate_reasons=dict(report.get("stop_reasons", {})),
            dropped=_dropped(stats),
            peak_rss_mb=float(report.get("peak_rss_mb") or 0.0),
            rss_mb={name: float(s["peak_rss_mb"]) for name, s in stats.items() if "peak_rss_mb" in s},
            real_time_factor=float(report.get("rtf") or 1.0),
            bundle_hash=_bundle_hash(plan.policy),
            interrupted=self.interrupted,
            parts=plan.parts,
        )
        trace = self._trace()
        if trace is not None:
            rows, inferences = slice(0, trace.rows), slice(0, trace.inferences)
            record.commands = np.column_stack([self._seconds(trace.tick_ns[rows]), trace.command[rows]])
            if plan.policy != "expert":  # it answers inside the simulator: nobody measured how long it took
                starts_s = self._seconds(trace.infer_start_ns[inferences])
                record.inference = np.column_stack([starts_s, trace.infer_ms[inferences]])
            for stop in report.get("stops", []):
                record.events.append(Event(float(self._seconds([stop["stamp_ns"]])[0]), "gate", _words(stop)))
        for at_s, node, code in self.graph.restarts:
            how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
            record.events.append(Event(at_s - self._began, node, f"process {how}, started again"))
        record.events.sort(key=lambda event: event.at_s)
        return record

    def add_pictures(self, every: int = 2) -> Path | None:
        """Put camera pictures into the trace, so that one file shows all; returns its path, None when there is none."""
        trace = self._trace()
        if trace is None:
            return None
        for camera, stamp_ns, jpeg in self.recorder.pictures(every):
            trace.add_image(camera, stamp_ns, jpeg)
        return trace.save_mcap(self.plan.out / "trace.mcap")

    def _trace(self) -> Trace | None:
        try:
            return Trace.load_mcap(self.plan.out / "trace.mcap")
        except DataError:  # a node that was killed leaves none
            return None


def plan_cameras(env: str) -> tuple[str, ...]:
    """The cameras that are filmed: the first two of the robot."""
    return load_embodiment(robot_of(env)).camera_names[:2]


def clear(out: Path) -> None:
    """Remove what an earlier run left in `out`; other files there are nobody's business."""
    for name in OUTPUTS:
        (out / name).unlink(missing_ok=True)
    for folder, pattern in OUTPUT_FOLDERS.items():
        for file in (out / folder).glob(pattern):
            file.unlink()


def _words(stop: dict[str, Any]) -> str:
    silence = f", {stop['silence_ms']:.0f} ms since the last heartbeat" if stop.get("silence_ms") else ""
    return f"episode {int(stop['episode']) + 1}: stop, {stop['reason']}{silence}"


def _dropped(stats: dict[str, dict[str, Any]]) -> dict[str, int]:
    """{topic -> node: messages lost by DDS, overwritten before they were read, refused or not sent}."""
    out: dict[str, int] = {}
    for node, values in stats.items():
        for kind in ("lost", "overrun", "rejected", "failed"):
            for topic, count in values.get(kind, {}).items():
                if count:
                    key = f"{topic} -> {node} ({kind})"
                    out[key] = out.get(key, 0) + int(count)
    return out


def _bundle_hash(policy: str) -> str | None:
    from vla.resources import BUNDLE_MARKER, bundle_path, is_address

    if policy in ("expert", "hold") or is_address(policy):
        return None
    return str(_read(bundle_path(policy) / BUNDLE_MARKER).get("hashes", {}).get("content", "")) or None


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return data
    except (OSError, ValueError):
        return {}
