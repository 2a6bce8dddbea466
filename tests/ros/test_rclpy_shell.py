"""What only rclpy has: lifecycle, parameters, names, services. Actions: test_rclpy_actions.py. Skipped without ROS."""

from __future__ import annotations

import signal
import sys
import time
import types
import weakref
from typing import Any

import numpy as np
import pytest
from rclpy_side import Arm, Ros, wait
from shells import Graph, needs_rclpy

from ros_nodes.messages import OK, Clock, Image, JointState, Status, Text, Values, chunk_to_trajectory, encode
from ros_nodes.node import (
    CHUNK,
    CLOCK,
    CONTROL,
    CONTROL_STATUS,
    DIAGNOSTICS,
    HEARTBEAT,
    REQUEST,
    SENSOR,
    STATE,
    Effects,
    Endpoint,
    Job,
    Now,
    Periodic,
    Send,
)
from ros_nodes.request import ChunkId, Request
from ros_nodes.settings import COMMAND, NODES, NodeKind
from vla.resources import load_embodiment
from vla.types import ActionChunk

pytestmark = [pytest.mark.ros, needs_rclpy]
ROBOT = load_embodiment("tabletop")
CAMERA = Endpoint("/camera/image_raw", Image.type_name, SENSOR)
COMMANDS = Endpoint(ROBOT.command_topic, Values.type_name)


# ---- lifecycle and parameters ----
def test_the_life_of_a_node(found: Graph, ros: Ros) -> None:
    found.listen(CONTROL_STATUS)
    found.operator.start()
    process = found.start("command", embodiment="tabletop", autostart=False)
    heard = found.heard[CONTROL_STATUS.topic]
    assert ros.state("vla_command") == "unconfigured" and ros.node.count_publishers("/vla/status") == 0
    for _ in range(2):  # a freed node can be made again
        assert ros.change("vla_command", "configure") and ros.state("vla_command") == "inactive"
        time.sleep(0.6)
        assert not heard
        assert ros.change("vla_command", "activate")
        found.hear(CONTROL_STATUS.topic)
        assert ros.change("vla_command", "deactivate") and ros.state("vla_command") == "inactive"
        heard.clear()
        time.sleep(0.6)
        assert len(heard) <= 1  # one may have been under way
        assert ros.change("vla_command", "cleanup")
        wait(lambda: ros.node.count_publishers("/vla/status") == 0, "the publisher is gone")
        heard.clear()
    assert found.end(process) == (0, "")


def test_parameters_are_described_checked_and_fixed_while_configured(found: Graph, ros: Ros) -> None:
    from rcl_interfaces.srv import DescribeParameters, SetParameters
    from rclpy.parameter import Parameter

    process = found.start("command", embodiment="nowhere", autostart=False)
    names = [setting.name for setting in COMMAND]
    described = ros.call(
        DescribeParameters, "/vla_command/describe_parameters", DescribeParameters.Request(names=names)
    )
    for setting, descriptor in zip(COMMAND, described.descriptors):
        assert setting.help in descriptor.description
        ranges = [*descriptor.integer_range, *descriptor.floating_point_range]
        if setting.kind in ("int", "float"):
            assert (ranges[0].from_value, ranges[0].to_value) == (setting.low, setting.high)

    def put(name: str, value: Any) -> tuple[bool, str]:
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        answer = ros.call(SetParameters, "/vla_command/set_parameters", request).results[0]
        return answer.successful, answer.reason

    assert not ros.change("vla_command", "configure") and ros.state("vla_command") == "unconfigured"
    assert not put("lead", 5000)[0]
    assert put("embodiment", "tabletop")[0] and ros.change("vla_command", "configure")
    for name, value in (("embodiment", "libero"), ("use_sim_time", True)):
        fixed, reason = put(name, value)
        assert not fixed and f"{name} is read at configure" in reason and "cleanup first" in reason
    assert ros.change("vla_command", "cleanup") and put("lead", 3)[0] and put("use_sim_time", True)[0]
    code, errors = found.end(process)
    assert code == 0 and "'nowhere' is unknown" in errors


@pytest.mark.parametrize("node", NODES)
def test_every_number_has_a_range_that_is_kept(ros: Ros, node: str) -> None:
    from rclpy.parameter import Parameter

    from ros_nodes.rclpy_shell import NodeShell

    shell = NodeShell(NODES[node], context=ros.context)
    try:
        for setting in NODES[node].settings:
            for beyond in (setting.low - 1, setting.high + 1) if setting.kind in ("int", "float") else ():
                value = int(beyond) if setting.kind == "int" else float(beyond)
                (answer,) = shell.set_parameters([Parameter(setting.name, value=value)])
                assert not answer.successful and answer.reason, (setting.name, value)
                assert shell.get_parameter(setting.name).value == setting.default
    finally:
        shell.destroy_node()


def test_cleanup_frees_the_model(ros: Ros, found: Graph) -> None:
    from rclpy.lifecycle import TransitionCallbackReturn
    from rclpy.parameter import Parameter

    from ros_nodes.rclpy_shell import NodeShell

    given = [Parameter("policy", value="tabletop")]
    shell = NodeShell(NODES["policy"], context=ros.context, parameter_overrides=given)
    try:
        for _ in range(2):
            assert shell.trigger_configure() == TransitionCallbackReturn.SUCCESS
            assert shell.trigger_activate() == TransitionCallbackReturn.SUCCESS
            model = weakref.ref(shell.core._policy.bundle.model)  # type: ignore[union-attr]
            assert model() is not None and ros.node.count_publishers(HEARTBEAT.topic) == 1
            assert shell.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
            assert model() is not None
            assert shell.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
            assert model() is None and shell.core is None
    finally:
        shell.trigger_shutdown()
        shell.destroy_node()


def test_names_are_relative_and_qos_can_be_overridden(found: Graph, ros: Ros) -> None:
    from rclpy.qos import ReliabilityPolicy

    status = Endpoint("/left/gate_status", CONTROL_STATUS.type_name)
    for endpoint in (status, DIAGNOSTICS):
        found.listen(endpoint)
    found.operator.start()
    names = ("-r", "__ns:=/left", "-r", "vla/status:=gate_status")
    overrides = ("-p", "qos_overrides./left/vla/chunk.subscription.reliability:=best_effort")
    process = found.start("command", *names, *overrides, embodiment="tabletop")
    found.hear(status.topic)
    found.hear(DIAGNOSTICS.topic)
    (chunks,) = ros.node.get_subscriptions_info_by_topic("/left/vla/chunk")
    (joints,) = ros.node.get_subscriptions_info_by_topic("/left/joint_states")
    assert chunks.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT
    assert joints.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT  # hears drivers of sensor data, too
    assert found.end(process) == (0, "")


def test_simulated_time_is_followed(found: Graph) -> None:
    found.listen(CONTROL_STATUS)
    clock = found.publisher(Endpoint(CLOCK.topic, CLOCK.type_name, STATE))
    found.operator.start()
    process = found.start("command", embodiment="tabletop", use_sim_time=True)
    found.wait(lambda: clock.readers > 0, "a reader of /clock")
    clock.publish(encode(Clock(7_000_000_000)))
    found.hear(CONTROL_STATUS.topic, lambda m: m.object()["stamp_ns"] == 7_000_000_000)
    assert found.end(process) == (0, "")


def test_a_signal_that_comes_twice_means_one_thing(found: Graph) -> None:
    """Ctrl-C reaches a node from the terminal, and once more from launch."""
    found.listen(CONTROL_STATUS)
    found.operator.start()
    process = found.start("command", embodiment="tabletop")
    found.hear(CONTROL_STATUS.topic)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    assert found.end(process) == (0, "")


# ---- services ----
def test_services_say_what_their_topics_say(found: Graph, ros: Ros) -> None:
    from std_srvs.srv import SetBool

    found.listen(CONTROL_STATUS)
    found.operator.start()
    process = found.start("command", embodiment="tabletop")
    found.hear(CONTROL_STATUS.topic)
    assert ros.trigger("/vla/stop") == (True, "")
    assert ros.call(SetBool, "/vla/estop", SetBool.Request(data=True)).success
    resumed, reason = ros.trigger("/vla/resume")
    assert not resumed and "Release the emergency stop" in reason
    assert ros.call(SetBool, "/vla/estop", SetBool.Request(data=False)).success
    assert ros.trigger("/vla/resume") == (True, "")
    assert ros.change("vla_command", "deactivate")
    assert ros.trigger("/vla/stop") == (False, "vla_command is not active")
    assert found.end(process) == (0, "")


# ---- in motion ----
class Moving(Arm):
    """An arm that follows its commands, and a policy that moves it sideways, without pictures."""

    def __init__(self, found: Graph):
        super().__init__(found)
        for endpoint in (COMMANDS, REQUEST):
            found.listen(endpoint)
        self.commands, self._requests = found.heard[COMMANDS.topic], found.heard[REQUEST.topic]
        self._chunks, self._beats = found.publisher(CHUNK), found.publisher(HEARTBEAT)
        self._answered = 0

    def _run(self) -> None:
        actions = np.zeros((16, 7), np.float32)
        actions[:, 1], actions[:, 6] = 0.002, 1.0
        while not self._ended.wait(0.02):
            positions = self.commands[-1].data if self.commands else np.array(ROBOT.home)
            self._publisher.publish(encode(JointState(time.time_ns(), ROBOT.command_names, positions)))
            self._beats.publish(encode(Status(OK, "policy", "ready", {})))
            if len(self._requests) > self._answered:
                request = Request.read(self._requests[-1])
                chunk = ActionChunk(actions, request.start_ns + 1, ROBOT.period_s)
                identity = ChunkId(request.episode, request.number, self._answered).text()
                self._answered = len(self._requests)
                self._chunks.publish(encode(chunk_to_trajectory(chunk, ROBOT.action_names, identity)))


def test_deactivated_in_motion_it_brakes_and_moves_again_only_when_told(found: Graph, ros: Ros) -> None:
    found.listen(CONTROL_STATUS)
    arm = Moving(found)
    found.publisher(CONTROL)
    found.operator.start()
    process = found.start("command", embodiment="tabletop")
    found.hear(CONTROL_STATUS.topic)

    def until_it_moves(episode: int) -> None:
        found.say(CONTROL, Text.of(op="go", episode=episode, seed=1))
        begin = len(arm.commands)
        found.wait(lambda: len(arm.commands) > begin + 5 and np.ptp(moved(begin), axis=0).max() > 0.01, "motion")

    def moved(begin: int) -> np.ndarray:
        return np.array([message.data for message in arm.commands[begin:]])

    with arm:
        until_it_moves(1)
        assert ros.change("vla_command", "deactivate")
        found.hear(CONTROL_STATUS.topic, lambda m: m.object()["phase"] == "idle" and m.object()["episode"] == 1)
        time.sleep(0.3)
        count = len(arm.commands)
        assert not np.any(np.diff(moved(count - 2), axis=0)), "the last commands hold"
        assert ros.change("vla_command", "activate")
        time.sleep(1.0)
        assert len(arm.commands) == count, "nobody asked for it again"
        until_it_moves(2)
    assert found.end(process) == (0, "")


# ---- the executor ----
class Slow:
    """Ticks every 10 ms; a message starts a job of a second."""

    name = "slow"
    subscriptions = (Endpoint("/work", Text.type_name),)
    publications = (Endpoint("/done", Text.type_name),)

    def __init__(self) -> None:
        self.timer, self.ticks, self.calls = Periodic(10_000_000), [], []  # type: ignore[var-annotated]

    @property
    def next_tick_ns(self) -> int:
        return self.timer.next_ns

    def on_message(self, topic: str, message: Any, now: Now) -> Effects:
        return (Job("sleep", lambda: time.sleep(1.0)),)

    def on_reject(self, topic: str, reason: str, now: Now) -> Effects:
        return ()

    def on_result(self, name: str, value: Any, now: Now) -> Effects:
        return (Send("/done", Text("done")),)

    def tick(self, now: Now) -> Effects:
        self.timer.due(now.steady_ns)
        self.ticks.append(now.steady_ns)
        return ()

    def close(self, now: Now) -> Effects:
        return ()

    def summary(self) -> dict[str, Any]:
        return {}


def test_jobs_never_block_the_executor(found: Graph, ros: Ros, monkeypatch: pytest.MonkeyPatch) -> None:
    from ros_nodes.rclpy_shell import NodeShell

    core, module = Slow(), types.ModuleType("slow_module")
    module.build = lambda options: core  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slow_module", module)
    found.listen(Endpoint("/done", Text.type_name))
    found.publisher(Slow.subscriptions[0])
    found.operator.start()
    shell = NodeShell(NodeKind("slow", "slow_module", ()), context=ros.context)
    try:
        shell.trigger_configure()
        shell.trigger_activate()
        ros.executor.add_node(shell)
        found.say(Slow.subscriptions[0], Text("work"))
        begin = time.monotonic()
        assert ros.state("slow") == "active" and time.monotonic() - begin < 0.9
        found.hear("/done")
        during = np.diff(core.ticks) / 1e9
        assert len(core.ticks) > 50 and np.percentile(during, 90) < 0.1
    finally:
        ros.executor.remove_node(shell)
        shell.trigger_shutdown()
        shell.destroy_node()
