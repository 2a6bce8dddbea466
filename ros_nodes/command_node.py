"""Command node: scheduler and gate in a process of their own, without torch.

    python -m ros_nodes.command_node --embodiment tabletop --out runs/trace

Each control period it asks the policy for a chunk when the scheduler wants one, turns the due action into a joint
command through the control loop (tool limits, inverse kinematics, gate) and publishes it as the robot's driver takes it
(ros_nodes/outputs.py). The policy's heartbeat is timed by its arrival on this machine's monotonic clock: after 120 ms
of silence the arm brakes, even if actions are still due, and goes on when the policy is back.

It also brakes, and says why, when joint states are late, jump, lose a joint or are not finite; when a camera is silent
or shows the same picture while the arm moves (the policy's heartbeat tells); when two policies answer; when the clock
is set or jumps back; when a driver refuses or aborts a trajectory goal; when the deadman switch is released, where one
is asked for; and at /vla/estop, until the operator resumes.
What is noticed between two control periods is acted upon at once. Every reason is on /diagnostics and in the trace.
Collisions with itself or with the room are not its business: that is a planner's.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ros_nodes import entry, reports
from ros_nodes.messages import Flag, JointState, Message, Status, Text, Trajectory, trajectory_to_chunk
from ros_nodes.node import (
    CHUNK,
    CONTROL,
    CONTROL_STATUS,
    DEADMAN,
    DIAGNOSTICS,
    EMERGENCY_STOP,
    HEARTBEAT,
    IDLE_BEATS,
    REQUEST,
    SIM_STATUS,
    Effect,
    Effects,
    Job,
    Now,
    Periodic,
    Send,
)
from ros_nodes.outputs import Outputs, sent_as
from ros_nodes.reports import Faults, Stops
from ros_nodes.request import ChunkId, Request, seconds, whole
from ros_nodes.watch import Watch
from vla.embodiment import Embodiment
from vla.errors import TransportError, VlaError, nearest
from vla.files import write_text
from vla.policy import InferResult
from vla.runtime.gate import Reason, Verdict
from vla.runtime.loop import ControlLoop, control_loop
from vla.runtime.scheduler import OverlappedScheduler, SequentialScheduler
from vla.runtime.summary import late_actions, stop_reasons, summarize
from vla.runtime.trace import EpisodeRow, Trace
from vla.types import NS_PER_S

POLL_NS = 10_000_000  # how often the watchdog looks between control periods
STATUS_PERIOD_NS = 200_000_000
OPERATIONS = ("go", "stop", "resume", "done", "save")
_MOVING = ("running", "ending")


class CommandCore:
    """loop: scheduler, gate, kinematics and trace of one arm.

    slot_wait_s: a request made at the start of a control period may be answered this long into it before the period
    goes on without. 0 for policies that infer while the last chunk runs; for policies that plan one action at a time
    (scripted experts) it must cover their answer. deadman: move only while /vla/deadman says true, at least every
    100 ms. estop_required: move only when /vla/estop was heard to say false. camera_timeout_s: how late the next
    picture of a camera may be, counted from when it should have come; heartbeats that tell no stamps of pictures are
    not held to it. horizon_s, actions: see ros_nodes/outputs.py.
    """

    name = "vla_command"

    def __init__(
        self,
        loop: ControlLoop,
        out: Path | None = None,
        slot_wait_s: float = 0.0,
        deadman: bool = False,
        estop_required: bool = False,
        camera_timeout_s: float = 0.14,
        horizon_s: float = 0.1,
        actions: bool = True,
    ):
        self._loop, self._out = loop, out
        self._robot: Embodiment = loop.embodiment
        self._period_ns = round(NS_PER_S / self._robot.rate_hz)
        self._wait_ns = round(slot_wait_s * NS_PER_S)
        self._outputs = Outputs(self._robot, horizon_s, actions)
        self._watch = Watch(self._robot, deadman, estop_required, camera_timeout_s)
        ours = (CHUNK, HEARTBEAT, SIM_STATUS, CONTROL, EMERGENCY_STOP, DEADMAN)
        self.subscriptions = (*self._watch.subscriptions, *ours)
        self.publications = (*self._outputs.endpoints, REQUEST, CONTROL_STATUS, DIAGNOSTICS)
        self.actions, self.must_be_heard = self._outputs.actions, self._outputs.twins
        self._lasting = {*dict(self.actions), *self.must_be_heard}  # what is wrong there stands
        self.next_tick_ns = 0
        self._slots = Periodic(self._period_ns)
        self._reports = Periodic(STATUS_PERIOD_NS)
        self._policy_says = ""
        self._idle_beats = 0  # since the open request was sent
        self._episode: dict[str, Any] | None = None
        self._success = False  # of the last episode
        self._limit_ns = 0  # how long this one may take; 0 for any time
        # idle, armed (an episode is announced), running, ending (done, go or the time limit in motion: brake)
        self._phase = "idle"
        self._after: tuple[int, int, str, int] | None = None  # the episode that begins when the arm has come to rest
        self._last_ns = 0
        self._set_ns = 0  # of the graph's clock, as far as it is dealt with
        self._requests = 0
        self._asked: tuple[int, int] | None = None  # (number, stamp) of the open request
        self._open_until: int | None = None  # steady time until which this period waits for its chunk
        self._policy_number = -1
        self._faults = Faults()
        self._refusals: dict[str, str] = {}  # by topic: why its last message was not followed
        self._saving = False
        self._last_reason: Reason | None = None
        self._stops = Stops()
        self._commands = 0

    # ---- messages in ----
    def on_message(self, topic: str, message: Message, now: Now) -> Effects:
        self._follow_clock(now)
        effects: Effects = ()
        if isinstance(message, JointState):
            self._watch.on_joints(topic, message)
        elif isinstance(message, Trajectory):
            self._on_chunk(message, now)
        elif isinstance(message, Status):
            self._on_heartbeat(message, now)
        elif isinstance(message, Flag):
            self._on_flag(topic, message.data, now)
        elif isinstance(message, Text):
            handle = self._on_episode if topic == SIM_STATUS.topic else self._on_control
            effects = self._guarded(topic, message, handle, now)
        return (*effects, *self._control(now))

    def on_reject(self, topic: str, reason: str, now: Now) -> Effects:
        if topic in self._outputs.arms:
            self._watch.driver(topic, reason, now)
            self.next_tick_ns = now.steady_ns  # not in the midst of sending: what brakes would go out before it
            return ()
        if topic in self._lasting:
            self._faults.stand(topic, reason)
        else:
            self._faults.reject(topic, reason, now)
        if topic == EMERGENCY_STOP.topic:  # whoever sent it meant something, and it can only have been one thing
            self._on_flag(topic, True, now)
        return self._control(now)

    def on_result(self, name: str, value: Any, now: Now) -> Effects:
        self._saving = False
        self._faults.pop(name, None)
        if isinstance(value, Exception):
            self._faults[name] = f"{type(value).__name__}: {value}"
        return (Send(CONTROL_STATUS.topic, Text.of(saved=str(value), episode=self._episode_number())),)

    def _guarded(self, topic: str, message: Text, handle: Any, now: Now) -> Effects:
        self._refusals.pop(topic, None)
        try:
            return handle(message.object(), now)
        except (TransportError, KeyError, TypeError, ValueError, OverflowError) as error:
            self._refusals[topic] = f"{type(error).__name__}: {error}"[:400]
            self._faults.reject(topic, self._refusals[topic], now)
            return ()

    def _on_heartbeat(self, message: Status, now: Now) -> None:
        """A sign of life. A policy that is back from a silence, or says several times in a row that it has nothing to
        do, does not know of our request: restarted, or the message was lost. It is asked again at once."""
        away, self._policy_says = self._watch.beat(now), message.message[:400]
        self._idle_beats = self._idle_beats + 1 if message.values.get("queue") == "0" else 0
        if away:
            self._loop.scheduler.new_sender()
            self._watch.new_sender()
        if self._asked is not None and self._idle_beats >= (1 if away else IDLE_BEATS):
            self._loop.scheduler.withdraw()
            self._asked = None
        self._watch.pictures(message, now)

    def _on_flag(self, topic: str, value: bool, now: Now) -> None:
        if topic == EMERGENCY_STOP.topic:
            self._watch.estop(value)
        elif topic == DEADMAN.topic:
            self._watch.deadman(value, now.received_ns)

    def resume(self) -> None:
        """Ends an operator's stop and an emergency stop that is no longer pressed; TransportError for one that is."""
        self._watch.resume()
        self._loop.request_stop(False)

    def _on_chunk(self, message: Trajectory, now: Now) -> None:
        try:
            identity = ChunkId.read(message.frame_id)
            chunk = trajectory_to_chunk(message, self._robot.action_names, self._period_ns)
        except (TransportError, VlaError) as error:
            self._faults["chunk"] = str(error)
            return
        if self._phase != "running" or identity.episode != self._episode_number():
            return
        if self._watch.stranger(identity.number, now):
            return
        if self._asked is None or identity.request != self._asked[0]:
            self._faults["chunk"] = "a chunk that answers no open request: is a second policy running?"
            return
        report = identity.report
        refused = self._loop.scheduler.submit(InferResult(chunk, report), now.stamp_ns, identity.number)
        if self._loop.trace is not None:
            self._loop.trace.inference(
                self._asked[1], now.stamp_ns, identity.infer_us * 1e-3, report, not refused, chunk.start_ns
            )
        if refused:
            self._faults["chunk"] = f"chunk refused: {refused}"
            return
        self._faults.pop("chunk", None)
        self._asked, self._policy_number = None, identity.number
        self._watch.heard(identity.number)
        if self._open_until is not None:
            self._open_until = 0

    def _on_episode(self, data: dict[str, Any], now: Now) -> Effects:
        number = whole(data, "episode")
        if data["state"] == "running" and number != self._episode_number():
            self._begin(number, whole(data, "seed"), str(data.get("instruction", "")), 0, whole(data, "start_ns"))
        elif data["state"] == "done" and number == self._episode_number():
            self._finish(bool(data["success"]), whole(data, "steps"), str(data.get("family", "")), now)
            return (self._status(now),)
        return ()

    def _on_control(self, data: dict[str, Any], now: Now) -> Effects:
        operation = str(data.get("op", ""))
        if operation == "go":
            limit_ns = round(seconds(data, "time_limit_s") * NS_PER_S)
            after = whole(data, "episode"), whole(data, "seed"), str(data.get("instruction", "")), limit_ns
            if self._brake_first():
                self._after = after
            else:
                self._begin(*after, start_ns=now.stamp_ns)
        elif operation == "stop":
            self._loop.request_stop()
        elif operation == "resume":
            self.resume()
        elif operation == "done":
            steps = whole(data, "steps") if "steps" in data else 0
            self._finish(bool(data.get("success", False)), steps, "", now, brakes=True)
        elif operation == "save":
            saving, self._saving = self._saving, True
            return () if saving else (Job("save", self.save),)
        else:
            raise TransportError(f"op {operation[:40]!r} is unknown. {nearest(operation[:40], OPERATIONS)}")
        return (self._status(now),)

    # ---- episodes ----
    def _begin(self, number: int, seed: int, instruction: str, limit_ns: int, start_ns: int) -> None:
        self._limit_ns = limit_ns
        self._episode = {"episode": number, "seed": seed, "instruction": instruction, "start_ns": start_ns}
        self._phase, self._asked, self._open_until, self._requests, self._after = "armed", None, None, 0, None
        self._watch.begin()

    def _start_if_ready(self, now: Now) -> None:
        """With joint states of this episode, of an arm that is announced to be at rest or was brought there: the loop
        begins, its periods counted from the episode's start."""
        assert self._episode is not None
        start_ns = self._episode["start_ns"]
        joints = self._watch.joints
        if now.stamp_ns < start_ns or joints is None or joints[0] < start_ns - self._period_ns:
            return
        self._loop.reset(joints[1], now.stamp_ns)
        if self._loop.trace is not None:
            self._loop.trace.begin(now.stamp_ns)
        self._slots = Periodic(self._period_ns, start_ns)
        self._slots.due(now.stamp_ns - self._period_ns)  # periods before the first joint state are not ours to miss
        self._slots.skipped = 0
        self._phase, self._last_ns = "running", now.stamp_ns

    def _start_ns(self) -> int:
        return 0 if self._episode is None else int(self._episode["start_ns"])

    def _brake_first(self) -> bool:
        """An arm in motion comes to rest before anything else; whether there is one."""
        if self.held:
            return False
        self._phase, self._asked, self._open_until = "ending", None, None
        self._loop.request_stop()
        return True

    def _finish(self, success: bool, steps: int, task: str, now: Now, brakes: bool = False) -> None:
        """brakes: nobody but this node stops the arm, as the simulator does with its own."""
        self._success, self._after = success, None
        if self._episode is not None and self._phase == "running" and self._loop.trace is not None:
            seed, words = self._episode["seed"], self._episode["instruction"]
            self._loop.trace.add_episode(EpisodeRow(seed, task, words, success, steps, now.stamp_ns))
        if not (brakes and self._brake_first()):
            self._phase = "idle"

    def _episode_number(self) -> int | None:
        return None if self._episode is None else int(self._episode["episode"])

    # ---- control ----
    def tick(self, now: Now) -> Effects:
        effects = list(self._control(now))
        if self._reports.due(now.steady_ns):
            effects += [self._status(now), self._diagnostics(now)]
        # Woken at the next control period, and often enough in between to notice silence.
        next_ns = self._slots.next_ns if self._phase in _MOVING else now.stamp_ns + POLL_NS
        next_ns = self._start_ns() if self._phase == "armed" else next_ns
        to_slot = next_ns - now.stamp_ns
        self.next_tick_ns = now.steady_ns + min(max(to_slot, POLL_NS // 50), POLL_NS)
        self.next_tick_ns = min(self.next_tick_ns, self._watch.next_ns(now))
        return effects

    def _follow_clock(self, now: Now) -> None:
        """When the wall clock was set, what was stamped and planned before it moves along, and a running arm brakes."""
        by_ns, self._set_ns = now.set_ns - self._set_ns, now.set_ns
        if not by_ns:
            return
        self._watch.clock_set(by_ns)
        if self._episode is not None:
            self._episode["start_ns"] += by_ns
        if self._phase in _MOVING:
            self._slots.next_ns += by_ns
            self._last_ns += by_ns
            self._asked = self._open_until = None
            self._loop.clock_set(by_ns, now.stamp_ns)

    def _control(self, now: Now) -> Effects:
        self._follow_clock(now)
        if self._phase == "ending" and self.held:
            after, self._phase = self._after, "idle"
            if after is None:
                return (self._status(now),)
            self._begin(*after, start_ns=max(now.stamp_ns, self._slots.next_ns))  # this period has had its command
        if self._phase == "armed":
            self._start_if_ready(now)
        if self._phase not in _MOVING:
            return ()
        if self._phase == "running" and 0 < self._limit_ns <= now.stamp_ns - self._start_ns():
            self._finish(False, 0, "", now, brakes=True)
            if self._phase == "idle":
                return (self._status(now),)
        if now.stamp_ns < self._last_ns:  # time ran backwards: a new grid; the gate stops the arm for it
            self._slots = Periodic(self._period_ns, now.stamp_ns)
        self._last_ns = now.stamp_ns
        if self._open_until is not None:
            if now.steady_ns < self._open_until:
                return ()
            self._open_until = None
            return self._act(now)
        if self._slots.due(now.stamp_ns):
            request = self._ask(now)
            if request and self._wait_ns:
                self._open_until = now.steady_ns + self._wait_ns
                return request
            return (*request, *self._act(now))
        # A doubt is acted upon when it is noticed, not at the next period.
        if self._watch.doubt(now) not in (Reason.NONE, self._watch.acted):
            return self._act(now)
        return ()

    def _ask(self, now: Now) -> Effects:
        scheduler = self._loop.scheduler
        if self._phase == "ending" or not scheduler.should_infer(now.stamp_ns):
            return ()
        assert self._episode is not None
        # Sensors of this very period, when they share its grid; of half a period before, when they do not.
        oldest_ns = now.stamp_ns - self._period_ns // 2
        context = scheduler.context(now.stamp_ns, self._episode["seed"], oldest_ns)
        number, seed = self._requests, self._episode["seed"]
        self._requests, self._asked, self._idle_beats = number + 1, (number, now.stamp_ns), 0
        request = Request.of(context, self._episode["episode"], seed, number, oldest_ns, self._policy_number)
        return (Send(REQUEST.topic, request.text()),)

    def _act(self, now: Now) -> Effects:
        """One tick of the loop and its command."""
        if (silence_ns := self._watch.silence_ns(now)) is not None:
            self._loop.heartbeat(now.stamp_ns - silence_ns)
        stamp, positions, velocities = self._watch.joints or (None, None, None)
        self._loop.hold(self._watch.act(now))
        command = self._loop.tick(now.stamp_ns, positions, velocities, stamp)
        self._commands += 1
        effects: list[Effect] = [*self._outputs.of(command.values, positions, self._loop, now)]
        decision = self._loop.last[1]
        if decision is not None and decision.reason is not self._last_reason:
            self._last_reason = decision.reason
            if decision.verdict is Verdict.STOP and decision.reason is not Reason.WAITING:
                silence_ns = self._watch.silence_ns(now)
                self._stops.note(self._episode_number(), decision.reason, silence_ns, now.stamp_ns)
                effects += [self._status(now), self._diagnostics(now)]
        return effects

    # ---- reports ----
    def _status(self, now: Now) -> Send:
        episode = self._episode_number() if self._after is None else self._after[0]
        facts = dict(phase=self._phase, success=self._success, episode=episode, commands=self._commands)
        return reports.status(self._loop, facts, now)

    def _diagnostics(self, now: Now) -> Send:
        decision = self._loop.last[1] if self._phase in _MOVING else None
        faults = self._faults.shown(now) | self._watch.faults(now, self._phase == "running")
        values = {**faults, "policy": self._policy_says, "phase": self._phase}
        return reports.diagnostics(self.name, self._robot.name, decision, faults, values, now)

    def refusal(self, topic: str) -> str:
        """Why the last message on `topic` was not followed, "" when it was; for shells with services."""
        return self._refusals.get(topic, "")

    # ---- before the shell falls silent ----
    def hold(self, now: Now) -> Effects:
        """Begin to brake; `held` once at rest."""
        self._watch.ending = True
        return self._control(now)

    def leave(self, now: Now) -> Effects:
        """The shell falls silent and may speak again: the episode is over, and another one takes an operator."""
        self._watch.ending = False
        if self._phase == "idle":
            return ()
        self._finish(False, 0, "", now)
        return (self._status(now),)

    @property
    def held(self) -> bool:
        return self._phase not in _MOVING or (self._loop.gate.at_rest and self._outputs.at_rest)

    # ---- results ----
    def save(self) -> str:
        """Write trace.mcap and control.json into the output folder; returns its path ("": nothing to save)."""
        trace = self._loop.trace
        if self._out is None or trace is None:
            return ""
        # before the trace: small, and what a run cut short is judged by
        write_text(self._out / "control.json", json.dumps({**summarize(trace), **self.summary()}, indent=1))
        trace.save_mcap(self._out / "trace.mcap")
        return str(self._out)

    def close(self, now: Now) -> Effects:
        self.save()
        return ()

    def summary(self) -> dict[str, Any]:
        trace = self._loop.trace
        return {
            "commands": self._commands,
            "late_actions": 0 if trace is None else late_actions(trace),
            "stop_reasons": {} if trace is None else stop_reasons(trace),
            "stops": self._stops,
        }


def build_core(
    embodiment: Embodiment,
    out: Path | None = None,
    execute: int = 8,
    lead: int = 2,
    sequential: bool = False,
    slot_wait_s: float = 0.0,
    capacity: int = 1 << 18,
    max_tracking_error: float = 0.2,
    **watch: Any,
) -> CommandCore:
    """The command core of one arm, with its loop, gate and trace. lead: periods that inference may take. capacity: rows
    of the trace, 0 for none. max_tracking_error: see Gate. watch: further keyword arguments of CommandCore."""
    scheduler = SequentialScheduler(execute) if sequential else OverlappedScheduler(execute, lead)
    trace = Trace(embodiment, capacity, max(1, capacity // 8)) if capacity else None
    return CommandCore(control_loop(embodiment, scheduler, trace, max_tracking_error), out, slot_wait_s, **watch)


def build(options: argparse.Namespace) -> CommandCore:
    """The core that COMMAND of ros_nodes/settings.py describes. options.actions: see CommandCore."""
    from vla.resources import load_embodiment

    robot = load_embodiment(options.embodiment)
    changes: dict[str, Any] = {"urdf": options.urdf} if options.urdf else {}
    if options.robot_model:
        changes["robot_model"] = str(Path(options.robot_model).resolve())
    robot = sent_as(replace(robot, **changes), options.output, options.output_topic, options.driver_timeout)
    return build_core(
        robot, Path(options.out) if options.out else None, options.execute, options.lead,
        options.sequential, options.slot_wait, 1 << 18 if options.out else 0, options.max_tracking_error,
        deadman=options.deadman,
        estop_required=options.estop_required, camera_timeout_s=options.camera_timeout, actions=options.actions,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    return entry.on_wheel("command", arguments)


if __name__ == "__main__":
    sys.exit(entry.run(main))
