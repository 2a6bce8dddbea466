"""Runs a node core as a lifecycle node of rclpy, for machines with ROS 2.

    python -m ros_nodes.rclpy_shell policy --ros-args -p policy:=tabletop
    ros2 run vla_stack command_node --ros-args -p embodiment:=tabletop

configure builds the core (the policy loads and warms up), activate lets it receive and publish, deactivate brings what
it moves to rest, holds and ends the episode, cleanup frees it. With `autostart` (the default) a node configures and
activates itself. Jobs, inference among them, run on a worker thread; the executor goes on meanwhile. SIGINT and SIGTERM
end with code 0, the arm held. Messages pass as CDR bytes through ros_nodes/messages.py, as on the wheel: one codec, and
rclpy's slower conversion of every field stays out of the way. Topics are relative names, so namespaces and remappings
apply; /clock and /diagnostics are those of the whole graph.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import json
import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rclpy
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions, QoSPolicyKind
from rclpy.signals import SignalHandlerOptions
from rclpy.utilities import remove_ros_args

from ros_nodes import settings
from ros_nodes.heap import one_arena
from ros_nodes.messages import DISTROS, Flag, Raw, Text, encode
from ros_nodes.names import relative, spoken
from ros_nodes.node import (
    CONTROL,
    EMERGENCY_STOP,
    RECORD,
    Effects,
    Goal,
    NodeCore,
    Now,
    Quality,
    Send,
)
from ros_nodes.rclpy_actions import GoalClient, InstructionServer, interface
from ros_nodes.shell import EXIT_LIMIT_S, JOB_END_S, SWITCH_INTERVAL_S, GraphClock, Worker, hold, read, settle
from vla.errors import TransportError, VlaError
from vla.files import write_text

_OVERRIDABLE = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
PATIENCE_S = 3.0  # Ctrl-C reaches a node from the terminal and again from launch: within this, both mean one thing
_SHORTEST_NS = 20_000  # of the timer: rcl takes no period of zero
# Services say what a message on their twin topic would: {topic: {service: message}}.
SERVICES: Mapping[str, Mapping[str, Text]] = {
    CONTROL.topic: {f"vla/{op}": Text.of(op=op) for op in ("stop", "resume", "save")},
    RECORD.topic: {f"vla/record/{word}": Text(word) for word in ("start", "stop", "discard")},
}


def qos(quality: Quality) -> QoSProfile:
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=quality.depth,
        reliability=ReliabilityPolicy.RELIABLE if quality.reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if quality.latched else DurabilityPolicy.VOLATILE,
    )


def descriptor(setting: settings.Setting) -> ParameterDescriptor:
    """Description and range; texts may also be given as what YAML makes of them, such as `task: 3`."""
    out = ParameterDescriptor(description=setting.described, dynamic_typing=setting.kind in ("text", "words", "list"))
    if setting.kind == "int":
        out.integer_range = [IntegerRange(from_value=int(setting.low), to_value=int(setting.high), step=1)]
    elif setting.kind == "float":
        out.floating_point_range = [FloatingPointRange(from_value=setting.low, to_value=setting.high, step=0.0)]
    return out


class NodeShell(LifecycleNode):  # type: ignore[misc]
    """kind: of ros_nodes/settings.py. further arguments: those of rclpy's Node. failure: why the last transition did
    not happen."""

    def __init__(self, kind: settings.NodeKind, **node_arguments: Any):
        super().__init__(kind.name, **node_arguments)
        self._kind, self.failure = kind, ""
        for setting in (*kind.settings, *settings.RCLPY):
            self.declare_parameter(setting.name, setting.default, descriptor(setting))
        self.add_on_set_parameters_callback(self._on_set)
        for setting in kind.settings:  # what was given at the start has not been looked at yet
            setting.read(self.get_parameter(setting.name).value)
        self.core: NodeCore | None = None
        self._entities: list[tuple[Callable[[Any], object], Any]] = []  # made for the core, and how they are destroyed
        self._topics: dict[str, Any] = {}
        self._lock = threading.RLock()  # the core is single-threaded, whatever executor this node is in
        self._group = MutuallyExclusiveCallbackGroup()
        self._results: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._guard = self.create_guard_condition(self._on_results, self._group)
        self._active = self.job_stuck = self.finalized = False
        self.counts: dict[str, dict[str, int]] = {"sent": {}, "received": {}, "rejected": {}, "failed": {}}

    # ---- parameters ----
    def _on_set(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        known = {setting.name: setting for setting in (*self._kind.settings, *settings.RCLPY)}
        for parameter in parameters:
            if parameter.name not in known and parameter.name != "use_sim_time":
                continue
            if self.core is not None:
                reason = f"{parameter.name} is read at configure: ros2 lifecycle set {self.get_name()} cleanup first"
                return SetParametersResult(successful=False, reason=reason)
            try:
                if parameter.name in known:
                    known[parameter.name].read(parameter.value)
            except VlaError as error:
                return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _options(self) -> Any:
        values = {setting.name: self.get_parameter(setting.name).value for setting in self._kind.settings}
        options = settings.options(self._kind.settings, values)
        options.actions, options.use_sim_time = True, self.get_parameter("use_sim_time").value
        distro = os.environ.get("ROS_DISTRO", "")
        options.distro = distro if distro in DISTROS else "jazzy"
        return options

    # ---- transitions ----
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            options = self._options()
            core = importlib.import_module(self._kind.module).build(options)
            with self._lock:
                self._attach(core, options)
        except VlaError as error:
            self._fail(str(error))
            return TransitionCallbackReturn.FAILURE
        except Exception:  # rclpy would swallow it
            self._fail(traceback.format_exc())
            return TransitionCallbackReturn.ERROR
        self.failure = ""
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        result = super().on_activate(state)  # publishers first
        settle(self.core)
        with self._lock:
            if self.core is not None and hasattr(self.core, "release"):
                self.core.release()
            self._active, self._armed_ns = True, -1
            self._arm()
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._hold(self._leave)
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._detach()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._hold()
        self._detach()
        self.finalized = True
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._detach()
        return super().on_error(state)

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.get_logger().error(reason)
        self._free()

    def _hold(self, leave: Callable[[NodeCore], None] | None = None) -> None:
        """Bring the core to rest, then let it neither receive nor publish. leave: what is done between."""
        with self._lock:
            if not self._active:
                return
            assert self.core is not None
            try:
                hold(self.core, self._perform, self._now)
                if leave is not None:
                    leave(self.core)
            finally:
                self._active = False
                self._timer.cancel()

    def _leave(self, core: NodeCore) -> None:
        """Nothing goes on by itself when the node is activated again."""
        if self._instructions is not None:
            self._instructions.abandon(f"{self.get_name()} was deactivated")
        if hasattr(core, "leave"):
            self._perform(core.leave(self._now()))

    def _attach(self, core: NodeCore, options: Any) -> None:
        core.name = spoken(self.get_fully_qualified_name())
        self._distro, self._graph_clock = options.distro, GraphClock(options.use_sim_time)
        overrides = {"qos_overriding_options": QoSOverridingOptions(_OVERRIDABLE)}
        for e in core.publications:
            publisher = self.create_lifecycle_publisher(
                interface(e.type_name), relative(e.topic), qos(e.quality), **overrides
            )
            self._topics[e.topic] = self._keep(self.destroy_lifecycle_publisher, publisher)
        for e in core.subscriptions:
            receive = functools.partial(self._on_bytes, e.topic, e.type_name, e.raw)
            subscription = self.create_subscription(
                interface(e.type_name), relative(e.topic), receive, qos(e.quality), callback_group=self._group,
                raw=True, **overrides,
            )  # fmt: skip
            self._keep(self.destroy_subscription, subscription)
        topics = {e.topic for e in core.subscriptions}
        for topic, services in SERVICES.items():
            for name, message in services.items() if topic in topics else ():
                answer = functools.partial(self._on_trigger, topic, message)
                self._serve("std_srvs/srv/Trigger", name, answer)
        if EMERGENCY_STOP.topic in topics:
            self._serve("std_srvs/srv/SetBool", relative(EMERGENCY_STOP.topic), self._on_estop)
        self._goals: dict[str, GoalClient] = {}
        for name, kind in getattr(core, "actions", ()):
            client = GoalClient(self, name, kind, self._group, self._on_refused)
            self._goals[name] = self._keep(lambda c: c.destroy(), client)
        self._instructions: InstructionServer | None = None
        if CONTROL.topic in topics and (server := InstructionServer.make(self, self._tell, self._group)):
            self._instructions = server
            self._keep(lambda s: s.destroy(), server)
        self._timer = self.create_timer(1.0, self._on_timer, self._group, Clock(clock_type=ClockType.STEADY_TIME))
        self._timer.cancel()
        self._keep(self.destroy_timer, self._timer)
        self._worker = Worker(core.name, self._on_done)
        self._worker.start()
        self.core = core

    def _keep(self, destroy: Callable[[Any], object], entity: Any) -> Any:
        self._entities.append((destroy, entity))
        return entity

    def _serve(self, kind: str, name: str, answer: Callable[[Any, Any], Any]) -> None:
        service = self.create_service(interface(kind), name, answer, callback_group=self._group)
        self._keep(self.destroy_service, service)

    def _detach(self) -> None:
        """Close and free the core, with everything made for it."""
        with self._lock:
            if self.core is None:
                return
            core = self.core
            self.job_stuck = self._worker.end(JOB_END_S)
            try:
                self._perform(core.close(self._now()))
            finally:
                self._write_stats()
                self._free()
                self.core = None
        del core
        gc.unfreeze()
        gc.collect()

    def _free(self) -> None:
        while self._entities:
            destroy, entity = self._entities.pop()
            destroy(entity)
        self._topics.clear()

    # ---- messages, timer, results: on the executor's thread ----
    def _now(self, received_ns: int = 0) -> Now:
        if self._graph_clock.simulated:
            self._graph_clock.follow(self.get_clock().now().nanoseconds)
        return self._graph_clock.now(received_ns)

    def _on_bytes(self, topic: str, type_name: str, raw: bool, data: bytes) -> None:
        with self._lock:
            if not self._active or self.core is None:
                return
            self._count("received", topic)
            now = self._now(time.monotonic_ns())
            if raw:
                self._perform(self.core.on_message(topic, Raw(type_name, data), now))
            else:
                try:
                    message = read(type_name, data, self._distro)
                except TransportError as error:
                    self._count("rejected", topic)
                    self._perform(self.core.on_reject(topic, str(error), now))
                else:
                    self._perform(self.core.on_message(topic, message, now))
            self._arm()

    def _on_timer(self) -> None:
        with self._lock:
            if self._active and self.core is not None:
                if time.monotonic_ns() >= self.core.next_tick_ns:
                    self._perform(self.core.tick(self._now()))
                for client in self._goals.values():
                    client.look()
                self._armed_ns = -1
                self._arm()

    def _arm(self) -> None:
        """Have the timer go off when the core wants its next tick."""
        if not self._active or self.core is None or self.core.next_tick_ns == self._armed_ns:
            return
        self._armed_ns = self.core.next_tick_ns
        self._timer.timer_period_ns = max(self._armed_ns - time.monotonic_ns(), _SHORTEST_NS)
        self._timer.reset()

    def _on_done(self, name: str, value: Any) -> None:
        """On the worker thread."""
        self._results.put((name, value))
        self._guard.trigger()

    def _on_results(self) -> None:
        with self._lock:
            while not self._results.empty():
                name, value = self._results.get()
                if self.core is not None:
                    self._perform(self.core.on_result(name, value, self._now()))
            self._arm()

    def _perform(self, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                try:
                    data = bytes(encode(effect.message, self._distro))
                except TransportError:
                    self._count("failed", effect.topic)
                    continue
                self._topics[effect.topic].publish(data)
                self._count("sent", effect.topic)
                if self._instructions is not None:
                    self._instructions.notice(effect)
            elif isinstance(effect, Goal):
                self._goals[effect.action].send(effect.goal)
            else:
                self._worker.put(effect)

    def _on_refused(self, action: str, reason: str) -> None:
        """A driver does not follow its goals, or, with "", does again."""
        with self._lock:
            if self.core is not None:
                self._perform(self.core.on_reject(action, reason, self._now()))
                self._arm()

    # ---- services and the action: each says what a message on its twin topic would ----
    def _tell(self, topic: str, message: Text | Flag) -> tuple[bool, str]:
        """Hand the core a message as if it had come on `topic`; (done, why not)."""
        with self._lock:
            if not self._active or self.core is None:
                return False, f"{self.get_name()} is not active"
            self._perform(self.core.on_message(topic, message, self._now(time.monotonic_ns())))
            self._arm()
            reason = self.core.refusal(topic) if hasattr(self.core, "refusal") else ""
            return not reason, reason

    def _on_trigger(self, topic: str, message: Text, request: Any, response: Any) -> Any:
        response.success, response.message = self._tell(topic, message)
        return response

    def _on_estop(self, request: Any, response: Any) -> Any:
        response.success, response.message = self._tell(EMERGENCY_STOP.topic, Flag(bool(request.data)))
        return response

    # ---- statistics ----
    def _count(self, kind: str, topic: str) -> None:
        self.counts[kind][topic] = self.counts[kind].get(topic, 0) + 1

    def _write_stats(self) -> None:
        path = str(self.get_parameter("stats").value)
        if path and self.core is not None:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            facts = {"node": self.core.name, **self.counts, "cpu_s": usage.ru_utime + usage.ru_stime}
            facts |= {"peak_rss_mb": usage.ru_maxrss / 1024, "summary": self.core.summary()}
            write_text(Path(path), json.dumps(facts, indent=1))


class _Process:
    """One node in this process: its executor in a thread, the main thread for signals."""

    def __init__(self, node: NodeShell):
        self._node, self._ended, self._error = node, False, ""
        self._told_s: float | None = None
        # Of all ways to wait, this one may be woken from a signal handler: an Event's lock is not reentrant.
        self._end: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._wake = node.create_guard_condition(lambda: None)

    def run(self) -> int:
        """The exit code, after SIGINT, SIGTERM, or a start or a core that failed."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        thread = threading.Thread(target=self._spin, name="executor")
        thread.start()
        self._end.get()
        self._ended = True
        self._wake.trigger()
        thread.join()
        try:
            if not self._node.finalized:
                self._node.trigger_shutdown()
        except Exception:
            self._error = self._error or traceback.format_exc()
        for number in (signal.SIGINT, signal.SIGTERM):  # nothing is left to end but the interpreter
            signal.signal(number, signal.SIG_IGN)
        if self._error:
            print(f"error: {self._error}", file=sys.stderr)
        if self._node.job_stuck:
            print(f"error: a job went on for {JOB_END_S:g} s after the end was asked for", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        return 1 if self._error else 0

    def _spin(self) -> None:
        executor = SingleThreadedExecutor()
        executor.add_node(self._node)
        try:
            if self._node.get_parameter("autostart").value:
                for transition in (self._node.trigger_configure, self._node.trigger_activate):
                    if transition() != TransitionCallbackReturn.SUCCESS:
                        self._error = self._node.failure or "the node did not start"
                        return
            while not self._ended:
                executor.spin_once()
        except Exception:
            self._error = traceback.format_exc()
        finally:
            executor.remove_node(self._node)
            self._end.put(None)

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._told_s is None:
            self._told_s = now
            faulthandler.dump_traceback_later(EXIT_LIMIT_S, exit=True)
            self._end.put(None)
        elif now - self._told_s > PATIENCE_S:  # ends even an end that hangs
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def main(kind: str | None = None, arguments: Sequence[str] | None = None) -> int:
    """Run one node of ros_nodes/settings.py until it is told to end; the exit code. arguments: its kind, unless `kind`
    says it, and ROS arguments."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if kind is None and words and words[0] in settings.NODES:
        kind = words.pop(0)
    rest = [word for word in remove_ros_args(["", *words])[1:] if word not in ("-h", "--help")]
    if kind is None or rest or {"-h", "--help"} & set(words):
        print(_usage(kind, rest), file=sys.stderr)
        return 0 if kind and not rest else 2
    one_arena()
    rclpy.init(args=["", *words], signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = NodeShell(settings.NODES[kind])
    except (VlaError, ParameterException) as error:
        print(f"error: {error}", file=sys.stderr)
        rclpy.shutdown()
        return 1
    try:
        return _Process(node).run()
    finally:
        node.destroy_node()
        rclpy.shutdown()


def _usage(kind: str | None, unknown: Sequence[str]) -> str:
    if kind is None:
        return f"usage: rclpy_shell {{{','.join(settings.NODES)}}} [--ros-args ...]"
    lines = [f"unknown: {' '.join(unknown)}"] if unknown else []
    lines += [f"usage: {kind}_node --ros-args -p NAME:=VALUE ...", "parameters:"]
    lines += [f"  {s.name}: {s.described}" for s in (*settings.NODES[kind].settings, *settings.RCLPY)]
    return "\n".join(lines)


policy_node, command_node, sim_node, camera_node, recorder_node = (
    functools.partial(main, kind) for kind in settings.NODES
)


if __name__ == "__main__":
    sys.exit(main())
