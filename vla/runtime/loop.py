"""The one loop: due action -> tool limits -> inverse kinematics -> Gate -> Command. Simulation, ROS 2 and tests run it.

numpy only; policies are handed in, and so is the solver, except in `control_loop`, which loads the one of the
embodiment when its actions need one. `tick` does not log: it appends one row to a preallocated Trace.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vla.embodiment import Embodiment
from vla.errors import ConfigError, explain
from vla.policy import Policy, infer
from vla.runtime.gate import Decision, Gate, Reason, Verdict
from vla.runtime.limits import JointLimits, limit_tool, within_urdf
from vla.runtime.pace import factor_for, stretched, tool_factor
from vla.runtime.scheduler import DueAction, OverlappedScheduler, SequentialScheduler
from vla.runtime.trace import EpisodeRow, Trace
from vla.types import NS_PER_S, Command, ControlMode, Observation


class Solver(Protocol):
    """What the loop needs of `vla.runtime.kinematics.Kinematics`."""

    def solve(self, action: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Joint target float64[D] of an action float[A] that starts from the configuration `reference`."""
        ...

    def path(self, actions: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Joint positions float64[N, D] that actions float[N, A] ask for one after the other, at whatever speed; only
        needed where chunks are slowed down as a whole."""
        ...


@dataclass(frozen=True)
class CommandPath:
    """The last command, what is planned after it, and the stop: float64[N, D] each, the last row at rest.

    times_s: of the rows, after now; the last command is reached one period from now.
    """

    positions: np.ndarray
    velocities: np.ndarray
    accelerations: np.ndarray
    times_s: np.ndarray


class Arm(Protocol):
    """What run_episode needs of `sim.environment.Environment` (this package does not know the simulators)."""

    embodiment: Embodiment
    max_steps: int

    @property
    def instruction(self) -> str: ...

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]: ...

    def step(self, command: Command) -> tuple[Observation, float, bool, bool, dict[str, Any]]: ...

    def joint_state(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]: ...


class ControlLoop:
    """One arm's scheduler and gate, ticked at `embodiment.rate_hz`.

    last: (due action or None, gate decision) of the latest tick, for recorders and status messages.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        scheduler: SequentialScheduler | OverlappedScheduler,
        gate: Gate,
        kinematics: Solver | None = None,
        trace: Trace | None = None,
    ) -> None:
        if embodiment.action_space == "ee_delta" and kinematics is None:
            raise ConfigError(
                explain(
                    "kinematics", "a solver for ee_delta actions", "none", "Pass Kinematics(embodiment) to the loop."
                )
            )
        if embodiment.control_mode is ControlMode.OSC_DELTA and embodiment.action_space != "osc_delta":
            raise ConfigError(
                explain(
                    "action_space", "osc_delta for osc_delta control", embodiment.action_space, "Fix the embodiment."
                )
            )
        self.embodiment, self.scheduler, self.gate = embodiment, scheduler, gate
        self.kinematics, self.trace = kinematics, trace
        self.last: tuple[DueAction | None, Decision | None] = (None, None)
        self._heartbeat_ns: int | None = None
        self._stop_request = False
        self._hold = Reason.NONE
        self._pace_limits = None
        if embodiment.max_time_scale > 1.0 and embodiment.control_mode is not ControlMode.OSC_DELTA:
            self._pace_limits = JointLimits.of(embodiment)
        self._paced = -1  # number of the last chunk whose speed was looked at
        self._too_fast = False

    def reset(self, positions: np.ndarray, now_ns: int) -> None:
        """Begin at rest at measured joint positions float64[D]; forgets chunks, counters and stops."""
        self.scheduler.reset(now_ns)
        self.gate.reset(positions, now_ns)
        self._heartbeat_ns = None
        self._stop_request = self._too_fast = False
        self._hold = Reason.NONE
        self.last = (None, None)

    def heartbeat(self, now_ns: int) -> None:
        """The policy gave a sign of life."""
        self._heartbeat_ns = now_ns

    def clock_set(self, by_ns: int, now_ns: int) -> None:
        """The clock was set by `by_ns` to `now_ns`: due times are void, and the arm brakes before it goes on."""
        self.scheduler.clock_set(now_ns)
        self.gate.clock_set(by_ns)

    def request_stop(self, active: bool = True) -> None:
        """Operator stop: brake and hold while active; moving again takes a newer chunk."""
        self._stop_request = active

    def hold(self, reason: Reason) -> None:
        """A fault found outside the loop: brake and hold while it is not NONE, and say so."""
        self._hold = reason

    def tick(
        self, now_ns: int, positions: np.ndarray | None, velocities: np.ndarray | None, positions_stamp_ns: int | None
    ) -> Command:
        """One control period. positions, velocities: float64[D] measured, None before the first joint state.

        Never raises for bad inputs: they become a stop with a reason (`last`, `Command.note`). The velocities are
        part of the seam for limits on measured motion; the Gate's reference is its own command.
        """
        began = time.perf_counter()
        missed_before = self.scheduler.missed_actions
        due = self._paced_action(self.scheduler.due(now_ns))
        silent = self.gate.silent(now_ns, self._heartbeat_ns)
        doubt = silent or self._hold or self._stop_request
        if due is None and self.scheduler.waiting and self.last[1] is not None and not doubt:
            return self._command(now_ns, self.last[1])  # an extra tick within a slot: the command stands
        target, upstream, limited = self._target(due)
        decision = self.gate.step(
            now_ns,
            target,
            due_ns=0 if due is None else due.due_ns,
            chunk_number=-1 if due is None else due.chunk_number,
            positions=positions,
            positions_stamp_ns=positions_stamp_ns,
            heartbeat_ns=self._heartbeat_ns,
            fault=upstream,
        )
        if limited and decision.verdict is Verdict.PASS:
            decision = Decision(Verdict.RESHAPE, limited, decision.values)
        if due is not None and decision.verdict is Verdict.STOP:
            self.scheduler.not_executed()
        self.last = (due, decision)
        if self.trace is not None:
            measured = np.empty(0) if positions is None else positions
            missed = self.scheduler.missed_actions - missed_before
            self.trace.tick(now_ns, due, decision, measured, missed, (time.perf_counter() - began) * 1e6)
        return self._command(now_ns, decision)

    def _target(self, due: DueAction | None) -> tuple[np.ndarray | None, Reason, Reason]:
        """(target float64[D] or None, fault found on the way, cartesian limit that changed the action)."""
        if self._hold or self._stop_request:
            return None, self._hold or Reason.OPERATOR, Reason.NONE
        if due is None:
            return None, Reason.NONE if self.scheduler.chunks else Reason.WAITING, Reason.NONE
        action = np.asarray(due.action, np.float64)
        if action.shape != (self.embodiment.action_dim,) or not np.all(np.isfinite(action)):
            return None, Reason.ACTION_INVALID, Reason.NONE
        if self._too_fast:
            return None, Reason.CHUNK_TOO_FAST, Reason.NONE
        slowed = Reason.TIME_SCALED if self.scheduler.time_scale > 1.0 else Reason.NONE
        try:
            target, limited = self._solved(action, self.gate)
            return target, Reason.NONE, limited or slowed
        except Exception:  # a solver that fails must end in a brake, never in a dead control loop
            return None, Reason.KINEMATICS, Reason.NONE

    def _solved(self, action: np.ndarray, gate: Gate) -> tuple[np.ndarray, Reason]:
        """(joint target of an action float64[A] from the gate's last command, cartesian limit that changed it)."""
        if self.kinematics is None:
            return action, Reason.NONE
        action, limited = limit_tool(action, self.embodiment, self.embodiment.period_s, gate.tool())
        return self.kinematics.solve(action, gate.command), limited

    def _paced_action(self, due: DueAction | None) -> DueAction | None:
        """The first action of a chunk that is too fast makes the scheduler slow the whole chunk down."""
        if due is None or self._pace_limits is None or due.chunk_number == self._paced:
            return due
        self._paced, self._too_fast = due.chunk_number, False
        robot, command, actions = self.embodiment, self.gate.command, self.scheduler.remaining()
        if actions.shape[1] != robot.action_dim or not np.all(np.isfinite(actions)):
            return due  # the gate has a word for it
        try:
            factor, path = 1.0, actions.astype(np.float64)
            if self.kinematics is not None and robot.action_space == "ee_delta":
                factor = tool_factor(actions, robot)
                path = self.kinematics.path(actions, command)
            factor = max(factor, factor_for(np.vstack([command, path]), robot, self._pace_limits))
            factor = math.ceil(factor * len(actions) - 1e-9) / len(actions)
        except Exception:  # solving the action itself will fail in the same way, and brake
            return due
        if factor <= 1.0:
            return due
        if factor > robot.max_time_scale:
            self._too_fast = True
            return due
        return self.scheduler.slow_down(stretched(actions, command, robot, factor), factor)

    def command_path(self, horizon: int) -> CommandPath:
        """What the arm would do if nothing more came: the last command, at most `horizon` more actions of the chunk
        that runs, limited as they would be, and then the stop. For drivers that take trajectories."""
        gate, period_s = self.gate.fork(), self.embodiment.period_s
        rows = [(gate.command, *gate.rates())]
        decision = self.last[1]
        if decision is not None and decision.verdict is not Verdict.STOP:
            for action in self.scheduler.upcoming(horizon):
                try:
                    gate.ahead(self._solved(np.asarray(action, np.float64), gate)[0])
                except Exception:  # the stop begins earlier
                    break
                rows.append((gate.command, *gate.rates()))
        *stop, step_s = gate.stop_path()
        times = [period_s * (k + 1) for k in range(len(rows))]
        times += [times[-1] + step_s * (k + 1) for k in range(len(stop[0]))]
        planned = [np.array(column) for column in zip(*rows)]
        positions, velocities, accelerations = (np.vstack([a, b]) for a, b in zip(planned, stop))
        return CommandPath(positions, velocities, accelerations, np.array(times))

    def _command(self, now_ns: int, decision: Decision) -> Command:
        return Command(self.embodiment.control_mode, decision.values, now_ns, decision.reason.text)


def control_loop(
    embodiment: Embodiment,
    scheduler: SequentialScheduler | OverlappedScheduler,
    trace: Trace | None = None,
    max_tracking_error: float = 0.2,
) -> ControlLoop:
    """The loop of this embodiment, with its kinematics and its gate: what the command node and every evaluation run."""
    if embodiment.control_mode is ControlMode.OSC_DELTA:
        return ControlLoop(embodiment, scheduler, Gate(embodiment), trace=trace)
    embodiment = within_urdf(embodiment)
    names = embodiment.command_names
    driven = [name for sink in embodiment.sinks if sink.kind == "velocities" for name in sink.joints or names]
    gated = dict[str, Any](
        carries_stop=all("trajectory" in sink.kind for sink in embodiment.sinks if sink.kind != "gripper_command"),
        driven=tuple(map(names.index, driven)),
        max_tracking_error=max_tracking_error,
    )
    if embodiment.action_space == "joint_position" and not embodiment.robot_model:
        return ControlLoop(embodiment, scheduler, Gate(embodiment, **gated), trace=trace)
    from vla.runtime.kinematics import Kinematics  # mujoco and mink load only where something has to be solved

    kinematics = Kinematics(embodiment)
    gate = Gate(embodiment, lambda q: kinematics.forward(q)[0], **gated)
    return ControlLoop(embodiment, scheduler, gate, kinematics, trace)


@dataclass(frozen=True)
class Delay:
    """Simulated time of one inference. inference_ns: what the policy takes. transport_ns: all else between observation
    and chunk, both ways and waiting."""

    inference_ns: int
    transport_ns: int = 0

    @property
    def total_ns(self) -> int:
        return self.inference_ns + self.transport_ns


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode.

    moved: the object that was moved, if the environment says so (info["moved"]). inference_ms: wall time of each
    inference. gate: {"pass", "reshape", "stop"} ticks. executed, missed, late: actions. refused: chunks not taken.
    """

    seed: int
    task: str
    family: str
    instruction: str
    success: bool
    steps: int
    chunks: int
    inference_ms: tuple[float, ...]
    gate: dict[str, int]
    executed: int
    missed: int
    late: int
    refused: int
    moved: str | None = None


def run_episode(
    environment: Arm,
    policy: Policy,
    loop: ControlLoop,
    seed: int,
    task: str | None = None,
    latency_s: float = 0.0,
    delays: Callable[[int], Delay] | None = None,
    on_step: Callable[[Observation, Command, dict[str, Any]], None] | None = None,
    instruction: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> EpisodeResult:
    """Policy, loop and environment in one process, on the environment's simulated clock: repeats bit for bit.

    latency_s: simulated time from an observation to its chunk (the real computing time does not count). delays: the
    same for each inference by its number in the episode, instead of latency_s; a trace then tells these times.
    on_step(observation, command, info) is called before each command is executed; images may be rendered in it.
    instruction: overrides the environment's own. options: further ones of the environment's reset.
    Raises EmbodimentMismatch when policy and environment differ.
    """
    environment.embodiment.require_same(policy.embodiment, "environment and policy")
    environment.embodiment.require_same(loop.embodiment, "environment and control loop")
    given = {key: value for key, value in (("task", task), ("instruction", instruction)) if value is not None}
    observation, info = environment.reset(seed=seed, options={**(options or {}), **given} or None)
    policy.reset(seed)
    _, positions, velocities = environment.joint_state()
    now_ns = observation.stamp_ns
    loop.reset(positions, now_ns)
    scheduler, trace = loop.scheduler, loop.trace
    if trace is not None:
        trace.begin(now_ns)
    answer = None  # (result, asked_ns, ready_ns, took_ms)
    inference_ms: list[float] = []
    gate = {verdict.name.lower(): 0 for verdict in Verdict}
    steps, done = 0, False
    while not done and steps < environment.max_steps:
        if answer is None and scheduler.should_infer(now_ns):
            context = scheduler.context(now_ns, seed, observation.stamp_ns)
            began = time.perf_counter()
            result = infer(policy, observation.check(), context)
            took_ms = (time.perf_counter() - began) * 1e3
            inference_ms.append(took_ms)
            if delays is None:
                ready_ns = now_ns + round(latency_s * NS_PER_S)
            else:
                delay = delays(len(inference_ms) - 1)
                ready_ns, took_ms = now_ns + delay.total_ns, delay.inference_ns * 1e-6
            answer = (result, now_ns, ready_ns, took_ms)
        if answer is not None and now_ns >= answer[2]:
            result, asked_ns, ready_ns, took_ms = answer
            refused = scheduler.submit(result, now_ns)
            if trace is not None:
                trace.inference(asked_ns, ready_ns, took_ms, result.report, not refused, result.chunk.start_ns)
            answer = None
        loop.heartbeat(now_ns)
        command = loop.tick(now_ns, positions, velocities, now_ns)
        decision = loop.last[1]
        if decision is not None and decision.reason is not Reason.WAITING:
            gate[decision.verdict.name.lower()] += 1
        if on_step is not None:
            on_step(observation, command, info)
        observation, _, terminated, truncated, info = environment.step(command)
        _, positions, velocities = environment.joint_state()
        now_ns = observation.stamp_ns
        steps += 1
        done = terminated or truncated
    outcome = EpisodeResult(
        seed=seed,
        task=str(info.get("task", task or "")),
        family=str(info.get("family", "")),
        instruction=environment.instruction if instruction is None else instruction,
        success=bool(info["success"]),
        steps=steps,
        chunks=scheduler.chunks,
        inference_ms=tuple(inference_ms),
        gate=gate,
        executed=scheduler.due_actions,
        missed=scheduler.missed_actions,
        late=scheduler.late_actions,
        refused=sum(scheduler.refused.values()),
        moved=info.get("moved"),
    )
    if trace is not None:
        trace.add_episode(EpisodeRow(seed, outcome.task, outcome.instruction, outcome.success, steps, now_ns))
    return outcome
