"""Success of a policy in simulation, in process, with the controls that show it sees and listens.

Every episode runs through the one control loop (`vla.runtime.loop.run_episode`), on simulated time, so a result repeats
bit for bit. Seeds are those that no demonstration may have. After every episode the report is on disk: a run that was
killed continues where it was.

Controls, each a run over the same seeds:
    none       the measurement itself
    blank      all images black: what proprioception and luck alone achieve
    shuffled   the instruction of another scene of the same family: what ignoring language achieves
    swapped    the very same scene, asked for another of its objects; `followed` counts that the object asked for moved
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from policies.parts import Parts
from sim import latency
from sim.control import ExpertPolicy, make_expert
from sim.environment import EVAL_SEED_START, make
from vla.errors import ConfigError, DataError, explain, nearest
from vla.files import write_text
from vla.policy import InferContext, InferResult, Policy, PolicyWrapper
from vla.resources import bundle_path, is_address
from vla.runtime.loop import ControlLoop, Delay, control_loop, run_episode
from vla.runtime.motion import motion
from vla.runtime.scheduler import OverlappedScheduler, SequentialScheduler
from vla.runtime.summary import percentiles, wilson_95
from vla.runtime.trace import Trace
from vla.types import Observation

CONTROLS = ("none", "blank", "shuffled", "swapped")
SCHEDULERS = ("overlapped", "sequential")
_SHUFFLE_DISTANCE = 500_000  # seeds of other scenes lie this far from the evaluated ones


@dataclass(frozen=True)
class EvalConfig:
    """Arguments of `measure` and `evaluate`.

    policy: a bundle folder, the name of a shipped bundle, the ws:// address of `vla serve`, or "expert". decoder: of a
    bundle, None for greedy.
    pruning, reuse, ensembling: see policies.parts.Parts, None for none. controls: which of CONTROLS, in order.
    env: name in sim.environment.ENVIRONMENTS. task: one of its tasks, or "all" (they take turns by seed).
    episodes: how many, with seeds seed, seed + 1, ...
    scheduler, execute, lead: see vla.runtime.scheduler. latency_s: simulated time from observation to chunk; it hides
    behind the running chunk when it is at most lead periods. latency: a trace to replay instead, see sim.latency, ""
    for none; latency_scale: how many times as slow. out: folder of the reports, <control>.json each ("" keeps
    them in memory). env_options: further arguments of the environment. device, threads: of the policy
    (0 threads: all).
    demonstration_seeds: allow seeds that training may have seen.
    """

    policy: str = "tabletop"
    decoder: Any = None
    pruning: Any = None
    reuse: Any = None
    ensembling: Any = None
    controls: tuple[str, ...] = ("none",)
    env: str = "tabletop"
    task: str = "all"
    episodes: int = 200
    seed: int = EVAL_SEED_START
    scheduler: str = "overlapped"
    execute: int = 8
    lead: int = 2
    latency_s: float = 0.05
    latency: str = ""
    latency_scale: float = 1.0
    out: str = ""
    env_options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 1
    demonstration_seeds: bool = False

    def __post_init__(self) -> None:
        for control in self.controls:
            _check_control(control)
        if self.scheduler not in SCHEDULERS:
            raise ConfigError(f"eval.scheduler: {self.scheduler!r} is unknown. {nearest(self.scheduler, SCHEDULERS)}")
        if self.episodes < 1:
            raise ConfigError(explain("eval.episodes", "at least 1", self.episodes, "Give a positive number."))
        if self.seed < EVAL_SEED_START and not self.demonstration_seeds:
            raise ConfigError(
                explain(
                    "eval.seed",
                    f"{EVAL_SEED_START} or more",
                    self.seed,
                    "Smaller seeds are for demonstrations; set demonstration_seeds=true to measure on them anyway.",
                )
            )

    @property
    def parts(self) -> Parts:
        return Parts(self.decoder, self.pruning, self.reuse, self.ensembling)

    def identity(self, policy_id: str, control: str) -> dict[str, Any]:
        """What decides every single episode: neither how many there are, nor where the report goes."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data |= {"env_options": dict(self.env_options), "policy": policy_id, "control": control}
        data |= self.parts.describe()
        data["latency"] = latency.read(self.latency).fingerprint if self.latency else None
        data["latency_scale"] = self.latency_scale if self.latency else None
        for key in ("episodes", "out", "demonstration_seeds", "controls", "device", "threads"):
            del data[key]
        return data


@dataclass(frozen=True)
class EpisodeRecord:
    """One episode of a report. target: the object that was asked for, moved: the one that was displaced most. motion:
    see vla.runtime.motion. reused: answered inferences that ran no model. Reports of the first release have neither."""

    seed: int
    task: str
    family: str
    instruction: str
    success: bool
    steps: int
    target: str | None
    moved: str | None
    inferences: int
    inference_p95_ms: float | None
    gate: dict[str, int]
    executed: int
    missed: int
    motion: dict[str, Any] | None = None
    reused: int | None = None

    @property
    def followed(self) -> bool | None:
        """The object that moved is the one asked for; None where the environment does not say."""
        return None if self.target is None else self.moved == self.target


@dataclass(frozen=True)
class Rate:
    """successes out of trials, with the 95 % Wilson score interval."""

    successes: int
    trials: int

    @property
    def rate(self) -> float:
        return self.successes / self.trials if self.trials else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_95(self.successes, self.trials)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "successes": self.successes,
            "trials": self.trials,
            "rate": round(self.rate, 4),
            "wilson_95": [round(low, 4), round(high, 4)],
        }


@dataclass(frozen=True)
class Report:
    """All episodes of one run. identity: what they were made with."""

    identity: Mapping[str, Any]
    episodes: tuple[EpisodeRecord, ...] = ()

    @property
    def success(self) -> Rate:
        return Rate(sum(e.success for e in self.episodes), len(self.episodes))

    @property
    def followed(self) -> Rate | None:
        """How often the object that moved was the one asked for."""
        known = [e.followed for e in self.episodes if e.followed is not None]
        return Rate(sum(known), len(known)) if known else None

    @property
    def reused(self) -> int | None:
        """Answered inferences that ran no model; None where an episode does not say."""
        counts = [e.reused for e in self.episodes]
        return None if None in counts else sum(filter(None, counts))

    def families(self) -> dict[str, Rate]:
        """Success per task family, in alphabetical order."""
        out = {}
        for family in sorted({e.family for e in self.episodes}):
            own = [e.success for e in self.episodes if e.family == family]
            out[family] = Rate(sum(own), len(own))
        return out

    def to_dict(self) -> dict[str, Any]:
        p95 = [e.inference_p95_ms for e in self.episodes if e.inference_p95_ms is not None]
        return {
            "identity": dict(self.identity),
            "success": self.success.to_dict(),
            "families": {name: rate.to_dict() for name, rate in self.families().items()},
            "followed": self.followed.to_dict() if self.followed else None,
            "episode_inference_p95_ms": percentiles(p95, (50, 95)),
            "inferences": sum(e.inferences for e in self.episodes),
            "reused": self.reused,
            "episodes": [asdict(e) for e in self.episodes],
        }

    def table(self) -> str:
        """Success per family and overall, with intervals, as text."""
        rows = [*self.families().items(), ("all", self.success)]
        if self.followed:
            rows.append(("object followed", self.followed))
        lines = [f"{'':16} {'success':>9} {'rate':>7}  95 % interval"]
        for name, rate in rows:
            low, high = rate.interval
            share = f"{rate.successes}/{rate.trials}"
            lines.append(f"{name:16} {share:>9} {100 * rate.rate:6.1f}%  {100 * low:.1f} to {100 * high:.1f} %")
        if self.reused:
            lines.append(f"reused chunks: {self.reused} of {sum(e.inferences for e in self.episodes)} inferences")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """As JSON, atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def read(cls, path: Path) -> Report:
        try:
            data = json.loads(path.read_text())
            return cls(data["identity"], tuple(EpisodeRecord(**record) for record in data["episodes"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                explain(str(path), "a report of `vla eval`", f"{type(error).__name__}: {error}", "Remove this file.")
            ) from error


def evaluate(
    policy: Policy,
    config: EvalConfig,
    control: str = "none",
    policy_id: str = "",
    environment: Any = None,
    on_episode: Callable[[Report], None] | None = None,
    progress: bool = False,
) -> Report:
    """Run the episodes that the report in `config.out` does not have yet, and return all of them.

    A scripted expert runs as it was written to: asked every period, answering at once.
    policy_id: identifies the policy in the report, for example a bundle hash. environment: one to reuse (it stays
    open), otherwise one is made and closed. Raises EmbodimentMismatch when the policy is for another robot, ConfigError
    when `out` holds the report of another run.
    """
    _check_control(control)
    if isinstance(policy, ExpertPolicy):  # one action from the present state: no other schedule suits it
        config = replace(config, scheduler="sequential", execute=1, latency_s=0.0, latency="")
    path = Path(config.out) / f"{control}.json" if config.out else None
    report = _begun(path, config, json.loads(json.dumps(config.identity(policy_id, control))))
    env = environment if environment is not None else make(config.env, **config.env_options)
    try:
        env.embodiment.require_same(policy.embodiment, f"environment {config.env} and policy")
        tasks = _tasks(config, tuple(env.tasks))
        loop = control_loop(env.embodiment, _scheduler(config), Trace(env.embodiment, env.max_steps))
        replayed = latency.read(config.latency).scaled(config.latency_scale) if config.latency else None
        seen: Policy = BlankImages(policy) if control == "blank" else PlainImages(policy)
        if isinstance(policy, ExpertPolicy):  # it reads the simulator anyway, and never pays for rendering
            seen = policy
        done = {record.seed for record in report.episodes}
        todo = [seed for seed in range(config.seed, config.seed + config.episodes) if seed not in done]
        for seed in _bar(todo, f"eval {config.env} ({control})", progress):
            task = tasks[(seed - config.seed) % len(tasks)]
            delays = None if replayed is None else replayed.of(seed)
            record = _run(env, seen, loop, seed, task, control, config.latency_s, delays)
            report = replace(report, episodes=tuple(sorted((*report.episodes, record), key=lambda e: e.seed)))
            if path:
                report.write(path)
            if on_episode:
                on_episode(_asked_for(report, config))
        return _asked_for(report, config)
    finally:
        if environment is None:
            env.close()


def measure(config: EvalConfig, progress: bool = False) -> dict[str, Report]:
    """Load `config.policy` and run all `config.controls`, as `vla eval` does: {control: report}."""
    environment = make(config.env, **config.env_options)
    try:
        policy, policy_id = load_policy(config, environment)
        return {
            control: evaluate(policy, config, control, policy_id, environment, progress=progress)
            for control in config.controls
        }
    finally:
        environment.close()


def load_policy(config: EvalConfig, environment: Any) -> tuple[Policy, str]:
    """The policy that `config.policy` names, and what identifies it in a report."""
    if config.policy == "expert":
        return ExpertPolicy(make_expert(config.env, environment), environment.embodiment), "expert"
    if is_address(config.policy):
        from policies.remote.attach import attached

        policy, remote = attached(config.policy, environment.embodiment, config.parts)
        return policy, remote.identity
    policy, inner = config.parts.load(bundle_path(config.policy), config.device, config.threads or None)
    return policy, inner.bundle.fingerprint


def _run(
    env: Any,
    policy: Policy,
    loop: ControlLoop,
    seed: int,
    task: str,
    control: str,
    latency_s: float,
    delays: Callable[[int], Delay] | None,
) -> EpisodeRecord:
    assert loop.trace is not None
    loop.trace.clear()
    instruction = _foreign_instruction(env, seed, task) if control == "shuffled" else None
    arm = _Swapped(env) if control == "swapped" else env
    facts: dict[str, Any] = {}
    result = run_episode(
        arm,
        policy,
        loop,
        seed,
        task=task,
        latency_s=latency_s,
        delays=delays,
        on_step=lambda observation, command, info: facts.update(target=info.get("object")),
        instruction=instruction,
    )
    return EpisodeRecord(
        seed=seed,
        task=task,
        family=result.family,
        instruction=result.instruction,
        success=result.success,
        steps=result.steps,
        target=facts.get("target"),
        moved=result.moved,
        inferences=len(result.inference_ms),
        inference_p95_ms=percentiles(result.inference_ms, (95,))["p95"],
        gate=result.gate,
        executed=result.executed,
        missed=result.missed,
        motion=motion(loop.trace).to_dict(),
        reused=sum(map(bool, loop.trace.infer_reused[: loop.trace.inferences])),
    )


def _foreign_instruction(env: Any, seed: int, task: str) -> str:
    """What another scene of the same family asks for; never the words of this one."""
    env.reset(seed=seed, options={"task": task})
    own = env.instruction
    for distance in range(_SHUFFLE_DISTANCE, _SHUFFLE_DISTANCE + 50):
        env.reset(seed=seed + distance, options={"task": task})
        if env.instruction != own:
            return str(env.instruction)
    raise ConfigError(
        explain(
            "eval.controls",
            "a task with several instructions",
            f"only {own!r} for {task!r}",
            "The shuffled control needs task families whose instructions differ; use blank.",
        )
    )


class _Swapped:
    """An environment that is always asked for another object of the same scene."""

    def __init__(self, env: Any):
        self._env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._env.reset(seed=seed, options={**(options or {}), "swap": True})


class PlainImages(PolicyWrapper):
    """A policy that is shown pixels and nothing behind them.

    Lazy images hold the environment that renders them, and with it the simulator's state; the policy gets copies.
    """

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        return super().infer_batch([self._plain(observation) for observation in observations], contexts)

    def _plain(self, observation: Observation) -> Observation:
        history = tuple(replace(frame, images=self._shown(frame.images)) for frame in observation.history)
        return replace(observation, images=self._shown(observation.images), history=history)

    def _shown(self, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: np.array(images[name]) for name in self.embodiment.camera_names}


class BlankImages(PlainImages):
    """A policy whose eyes are shut: every image is black, the rest is as it is."""

    def _shown(self, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        cameras = self.embodiment.cameras
        return {camera.name: np.zeros((camera.height, camera.width, 3), np.uint8) for camera in cameras}


def _check_control(control: str) -> None:
    if control not in CONTROLS:
        raise ConfigError(f"eval.controls: {control!r} is unknown. {nearest(control, CONTROLS)}")


def _begun(path: Path | None, config: EvalConfig, identity: dict[str, Any]) -> Report:
    if path is None or not path.exists():
        return Report(identity)
    report = Report.read(path)
    differing = [key for key in identity if identity[key] != report.identity.get(key)]
    if differing:
        pairs = ", ".join(f"{key}={report.identity.get(key)!r} there, {identity[key]!r} now" for key in differing)
        raise ConfigError(
            explain("eval.out", "the report that was begun there", f"{pairs} ({path})", "Choose another `out`.")
        )
    return report


def _asked_for(report: Report, config: EvalConfig) -> Report:
    """Without the episodes of a longer run before; its file keeps them."""
    last = config.seed + config.episodes
    return replace(report, episodes=tuple(e for e in report.episodes if config.seed <= e.seed < last))


def _tasks(config: EvalConfig, known: tuple[str, ...]) -> tuple[str, ...]:
    if config.task == "all":
        return tuple(task for task in known if task != "all")
    if config.task not in known:
        raise ConfigError(f"task: {config.task!r} is not one of {config.env}. {nearest(config.task, known)}")
    return (config.task,)


def _scheduler(config: EvalConfig) -> SequentialScheduler | OverlappedScheduler:
    if config.scheduler == "sequential":
        return SequentialScheduler(config.execute)
    return OverlappedScheduler(config.execute, config.lead)


def _bar(todo: list[int], title: str, show: bool) -> Iterable[int]:
    if not show:
        return todo
    from rich.progress import track

    return track(todo, description=title)
