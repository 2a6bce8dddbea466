"""Simulator node: a simulated arm behind the topics of a real one. The only module here that imports `sim`.

    python -m ros_nodes.sim_node --env tabletop
    python -m ros_nodes.sim_node --env libero_object --task 3 --policy expert --use-sim-time

It runs on its own time and never waits for commands. An environment that can be advanced in slices (tabletop) runs on
wall time: 10 ms of physics at a time with the newest command, joint states after each, images at the control rate.
Others (LIBERO, whose pictures take long on a CPU) step one control period of simulated time at a stated share of wall
time; /clock and all stamps are then simulated time.

Episodes: a JSON object on /sim/reset {"episode", "seed", "task"?, "instruction"?, "swap"?, "goal"?, "init_state"?} is
answered on /sim/status, and the instruction is published, latched. Object poses and simulator state never leave this
process: with `--policy expert` the privileged expert runs inside it and speaks on the policy's topics.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from ros_nodes import entry
from ros_nodes.messages import (
    OK,
    Clock,
    Image,
    JointState,
    Message,
    Status,
    Text,
    Values,
    chunk_to_trajectory,
)
from ros_nodes.node import (
    CHUNK,
    CLOCK,
    HEARTBEAT,
    HEARTBEAT_PERIOD_NS,
    INSTRUCTION,
    JOINT_STATES,
    REQUEST,
    RESET,
    SENSOR,
    SIM_STATUS,
    STATE,
    STATE_VECTOR,
    Effect,
    Effects,
    Endpoint,
    Job,
    Now,
    Periodic,
    Send,
)
from ros_nodes.request import ChunkId, Request
from vla.embodiment import Embodiment
from vla.errors import ConfigError, TransportError, VlaError, explain, nearest
from vla.types import NS_PER_S, ActionChunk, Command, ControlMode, Observation

SLICE_S = 0.01
MAX_CATCH_UP = 5  # slices run at once after a delay; beyond it the arm loses time, which is counted
SETTLE_NS = 100_000_000  # after a reset: commands meant for the last episode may still be on their way
STEP_GAP_NS = 15_000_000
STATUS_PERIOD_NS = 500_000_000
_OPTIONS: dict[str, type] = {"task": str, "instruction": str, "swap": bool, "goal": str, "init_state": int}
_RESET_KEYS = ("episode", "seed", *_OPTIONS)
_RESULT_KEYS = ("moved", "object", "family")


class SimCore:
    """environment: of the contract in sim/environment.py. expert: answers requests in place of a policy node.

    real_time_factor: simulated seconds per wall second; anything but 1, and any environment that cannot be advanced in
    slices, runs on simulated time, which starts at 1 s and never jumps.
    """

    name = "vla_sim"

    def __init__(self, environment: Any, expert: Any = None, real_time_factor: float = 1.0):
        if not 0 < real_time_factor <= 1:
            raise ConfigError(explain("rtf", "more than 0, at most 1", real_time_factor, "1 is wall time."))
        self._env, self._expert = environment, expert
        self._robot: Embodiment = environment.embodiment
        self._sliced = hasattr(environment, "advance")
        self.simulated_time = not self._sliced or real_time_factor != 1.0
        self._factor = real_time_factor
        self._slice_s = SLICE_S if self._sliced else self._robot.period_s
        self._slice_ns = round(self._slice_s * NS_PER_S)
        self._per_control = max(1, round(self._robot.period_s / self._slice_s))
        self._command_topic = self._robot.command_topic or "/arm_controller/commands"
        self.subscriptions = (
            Endpoint(self._command_topic, Values.type_name),
            RESET,
            *((REQUEST,) if expert is not None else ()),
        )
        self.publications = (
            *(Endpoint(camera.topic, Image.type_name, SENSOR) for camera in self._robot.cameras),
            replace(JOINT_STATES, quality=STATE),
            CLOCK,
            INSTRUCTION,
            SIM_STATUS,
            *((replace(STATE_VECTOR, quality=STATE),) if self._robot.control_mode is ControlMode.OSC_DELTA else ()),
            *((CHUNK, HEARTBEAT) if expert is not None else ()),
        )
        self._slices = Periodic(round(self._slice_ns / real_time_factor))
        self._beat = Periodic(HEARTBEAT_PERIOD_NS)
        self._reports = Periodic(STATUS_PERIOD_NS)
        self._stamp_ns = NS_PER_S if self.simulated_time else 0
        self._count = self._set_ns = 0
        # Operational-space deltas add up, so each is applied once, in order; a joint position stands until the next.
        self._commands: deque[np.ndarray] = deque(maxlen=2 if self._robot.control_mode is ControlMode.OSC_DELTA else 1)
        self._observation, self._info = environment.reset(seed=0)
        self._status: dict[str, Any] = {"state": "idle", "episode": -1}
        self._steps = self._received = self._refused = self._chunks = 0
        self._request: Request | None = None  # to the expert
        self._wanted: dict[str, int] = {}  # episode and seed of the last reset that was asked for
        self._next_reset: Text | None = None
        self._busy = False  # the environment is in the hands of the worker thread
        self._started: tuple[int, int] | None = None  # (stamp, steady) of the first slice, for the measured factor
        self._elapsed = (0, 0)

    @property
    def next_tick_ns(self) -> int:
        wanted = [self._reports.next_ns] if self._busy else [self._reports.next_ns, self._slices.next_ns]
        return min([*wanted, self._beat.next_ns] if self._expert is not None else wanted)

    # ---- messages in ----
    def on_message(self, topic: str, message: Message, now: Now) -> Effects:
        if topic == self._command_topic and isinstance(message, Values):
            self._on_command(message.data)
        elif topic == RESET.topic and isinstance(message, Text):
            return self._on_reset(message, now)
        elif topic == REQUEST.topic and isinstance(message, Text):
            return self._on_request(message)
        return ()

    def on_reject(self, topic: str, reason: str, now: Now) -> Effects:
        self._refused += 1
        return ()

    def on_result(self, name: str, value: Any, now: Now) -> Effects:
        """A step or a reset of an environment that is too slow for this thread has ended."""
        self._busy = False
        if isinstance(value, Exception) and not isinstance(value, VlaError):
            raise value  # a broken simulator: end with its traceback rather than pretend
        if name == "reset":
            effects = self._began(value, now)
        else:
            self._observation, self._info = (
                value if not isinstance(value, Exception) else (self._observation, self._info)
            )
            effects = self._publish()
            # What was just published gets through before the next step; simulated time stands meanwhile.
            self._slices.next_ns = max(self._slices.next_ns, now.steady_ns + STEP_GAP_NS)
        if self._next_reset is None:
            return effects
        message, self._next_reset = self._next_reset, None
        return (*effects, *self._on_reset(message, now))

    def _on_command(self, values: np.ndarray) -> None:
        self._received += 1
        if self._status["state"] != "running" or self._stamp_ns < self._status["start_ns"]:
            return
        if values.shape != (len(self._robot.command_names),) or not np.all(np.isfinite(values)):
            self._refused += 1
            return
        self._commands.append(values)

    def _on_reset(self, message: Text, now: Now) -> Effects:
        if self._busy:
            self._next_reset = message
            return ()
        self._wanted = {}
        try:
            wanted = message.object()
            self._wanted["episode"] = _integer(wanted, "episode")
            self._wanted["seed"] = seed = _integer(wanted, "seed")
            for key in wanted:
                if key not in _RESET_KEYS:
                    raise TransportError(f"{RESET.topic}: unknown key {key[:40]!r}. {nearest(key[:40], _RESET_KEYS)}")
            options = {k: _option(wanted, k) for k in _OPTIONS if wanted.get(k) is not None}
        except TransportError as error:
            return self._began(error, now)
        if not self._sliced:
            self._busy = True
            return (Job("reset", lambda: self._reset(seed, options)),)
        try:
            value: Any = self._reset(seed, options)
        except VlaError as error:
            value = error
        return self._began(value, now)

    def _reset(self, seed: int, options: dict[str, Any]) -> tuple[Observation, dict[str, Any]]:
        observation, info = self._env.reset(seed=seed, options=options)
        if self._expert is not None:
            self._expert.reset()
        if not self._sliced:  # the first picture builds the GL context, which holds up all threads for a while
            for camera in self._robot.camera_names:
                observation.images[camera]
        return observation, info

    def _began(self, value: Any, now: Now) -> Effects:
        """The environment stands at the start of the episode, or says (an exception) why it does not."""
        episode, seed = self._wanted.get("episode", -1), self._wanted.get("seed", -1)
        if isinstance(value, Exception):
            self._status = {"state": "error", "episode": episode, "error": str(value)}
            return (self._report(),)
        self._observation, self._info = value
        self._commands.clear()
        self._steps = 0
        if self._stamp_ns == 0:
            self._stamp_ns = now.stamp_ns
        # The episode starts on the image grid: control ticks and pictures then share their times, as in process.
        control_ns = self._per_control * self._slice_ns
        to_grid = -self._count % self._per_control * self._slice_ns
        settle = 0 if self.simulated_time else -(-SETTLE_NS // control_ns) * control_ns
        self._status = {
            "state": "running",
            "episode": episode,
            "seed": seed,
            "instruction": self._env.instruction,
            "start_ns": self._stamp_ns + to_grid + settle,
        }
        return Send(INSTRUCTION.topic, Text(self._env.instruction)), self._report()

    def _on_request(self, message: Text) -> Effects:
        try:
            self._request = Request.read(message)
        except TransportError:
            self._refused += 1
        return self._answer()

    def _answer(self) -> list[Send]:
        """The expert's one action for the state as it is now, once that is as new as the request asks for."""
        request = self._request
        if request is None or self._busy or self._stamp_ns < request.start_ns:
            return []
        self._request = None
        if request.episode != self._status["episode"] or self._status["state"] != "running":
            return []
        action = np.asarray(self._expert.action(), np.float32)[None]
        chunk = ActionChunk(action, self._stamp_ns, self._robot.period_s)
        chunk_id = ChunkId(request.episode, request.number, self._chunks).text()
        self._chunks += 1
        return [Send(CHUNK.topic, chunk_to_trajectory(chunk, self._robot.action_names, chunk_id))]

    # ---- time ----
    def tick(self, now: Now) -> Effects:
        if self._stamp_ns == 0:
            self._stamp_ns, self._set_ns = now.stamp_ns - self._slice_ns, now.set_ns
        if not self.simulated_time and now.set_ns != self._set_ns:
            self._on_clock_set(now.set_ns - self._set_ns)
        effects: list[Effect] = []
        if self._expert is not None and self._beat.due(now.steady_ns):
            numbers = {"chunks": str(self._chunks), "queue": str(int(self._request is not None))}
            effects.append(Send(HEARTBEAT.topic, Status(OK, "expert", "ready", numbers, self._robot.name)))
        if not self._busy:
            count = self._slices.due(now.steady_ns)
            effects += self._advance_slices(count) if self._sliced else self._begin_step() if count else ()
        if self._started is None:
            self._started = (self._stamp_ns, now.steady_ns)
        self._elapsed = (self._stamp_ns - self._started[0], now.steady_ns - self._started[1])
        if self._reports.due(now.steady_ns):
            effects.append(self._report())
        return effects

    def _on_clock_set(self, by_ns: int) -> None:
        """Stamps keep to wall time."""
        self._set_ns += by_ns
        self._stamp_ns += by_ns
        if "start_ns" in self._status:
            self._status["start_ns"] += by_ns
        if self._started is not None:
            self._started = (self._started[0] + by_ns, self._started[1])

    def _advance_slices(self, count: int) -> list[Send]:
        effects: list[Send] = []
        for _ in range(min(count, MAX_CATCH_UP)):
            values = self._commands.popleft() if self._commands else None
            command = None if values is None else Command(self._robot.control_mode, values, self._stamp_ns)
            self._env.advance(command, self._slice_s)
            effects += self._publish()
        if not self.simulated_time:
            # What could not be caught up is lost to the physics but not to the clock: stamps keep to wall time.
            lost = max(0, count - MAX_CATCH_UP)
            self._stamp_ns += lost * self._slice_ns
            self._count += lost
        return effects

    def _begin_step(self) -> Effects:
        """One control period of a slow environment, pictures included, on the worker thread: it also owns the GL
        context, and this thread goes on to listen and to give signs of life."""
        if self._status["state"] != "running":
            return self._publish(pictures=False)
        values = self._commands.popleft() if self._commands else None
        command = self._robot.stop() if values is None else Command(self._robot.control_mode, values, self._stamp_ns)
        self._busy = True
        return (Job("step", lambda: self._step(command)),)

    def _step(self, command: Command) -> tuple[Observation, dict[str, Any]]:
        observation, _, _, _, info = self._env.step(command)
        for camera in self._robot.camera_names:
            observation.images[camera]  # rendered now, while this thread has the environment
        return observation, info

    def _publish(self, pictures: bool = True) -> list[Send]:
        """Everything that a slice makes known."""
        self._stamp_ns += self._slice_ns
        self._count += 1
        effects = [Send(CLOCK.topic, Clock(self._stamp_ns)), *self._answer()]
        names, positions, velocities = self._env.joint_state()
        effects.append(Send(JOINT_STATES.topic, JointState(self._stamp_ns, tuple(names), positions, velocities)))
        if self._count % self._per_control == 0:
            effects += self._sensors(pictures) + self._progress()
        return effects

    def _sensors(self, pictures: bool) -> list[Send]:
        if self._sliced:
            self._observation = self._env.observe()
        observation: Observation = self._observation
        out = []
        if self._robot.control_mode is ControlMode.OSC_DELTA:
            state = JointState(self._stamp_ns, self._robot.state_names, observation.state.astype(np.float64))
            out.append(Send(STATE_VECTOR.topic, state))
        for camera in self._robot.cameras if pictures else ():
            out.append(Send(camera.topic, Image(self._stamp_ns, camera.name, "rgb8", observation.images[camera.name])))
        return out

    def _progress(self) -> list[Send]:
        """Once per control period: has the episode ended?"""
        if self._status["state"] != "running" or self._stamp_ns <= self._status["start_ns"]:
            return []
        self._steps += 1
        info = self._env.info() if self._sliced else self._info
        success = bool(info["success"])
        if not success and self._steps < self._env.max_steps:
            return []
        result = {key: info[key] for key in _RESULT_KEYS if key in info}
        self._status |= {"state": "done", "success": success, **result}
        return [self._report()]

    def _report(self) -> Send:
        values = {"success": False, "done": self._status["state"] == "done", "steps": self._steps, **self._status}
        return Send(SIM_STATUS.topic, Text.of(**values, rtf=round(self.measured_factor, 4), stamp_ns=self._stamp_ns))

    @property
    def measured_factor(self) -> float:
        """Simulated seconds per wall second so far; 1 on wall time unless the machine cannot keep up."""
        simulated, wall = self._elapsed
        return simulated / wall if wall > 0 else self._factor

    def close(self, now: Now) -> Effects:
        self._env.close()
        return ()

    def summary(self) -> dict[str, Any]:
        return {
            "commands": self._received,
            "refused": self._refused,
            "slices": self._count,
            "slices_late": self._slices.skipped,
            "rtf": self.measured_factor,
        }


def _integer(data: dict[str, Any], key: str) -> int:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise TransportError(explain(f"{RESET.topic} {key}", "a whole number from 0", repr(value)[:40], "Send both."))
    return value


def _option(data: dict[str, Any], key: str) -> Any:
    if type(data[key]) is not _OPTIONS[key]:
        got = repr(data[key])[:40]
        raise TransportError(explain(f"{RESET.topic} {key}", _OPTIONS[key].__name__, got, "Leave it out."))
    return data[key]


def build(options: argparse.Namespace) -> SimCore:
    """The core that SIM of ros_nodes/settings.py describes; options.use_sim_time becomes false, it is the clock."""
    from sim.environment import make

    environment = make(options.env, **({"task": options.task} if options.task else {}))
    expert = None
    if options.policy == "expert":
        from sim.control import make_expert

        expert = make_expert(options.env, environment)
    options.use_sim_time = False
    return SimCore(environment, expert, options.rtf or (1.0 if hasattr(environment, "advance") else 0.25))


def main(arguments: list[str] | None = None) -> int:
    return entry.on_wheel("sim", arguments)


if __name__ == "__main__":
    sys.exit(entry.run(main))
