"""What only rclpy has: lifecycle, parameters, names, services, actions. Skipped where ROS is not sourced."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from shells import Graph, needs_rclpy

from ros_nodes.messages import OK, Clock, Image, JointState, Status, Text, Values, chunk_to_trajectory, encode
from ros_nodes.node import (
    CHUNK,
    CLOCK,
    CONTROL,
    CONTROL_STATUS,
    DIAGNOSTICS,
    HEARTBEAT,
    JOINT_STATES,
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
from vla.resources import config_dir, load_embodiment
from vla.types import ActionChunk

pytestmark = [pytest.mark.ros, needs_rclpy]
ROBOT = load_embodiment("tabletop")
CAMERA = Endpoint("/camera/image_raw", Image.type_name, SENSOR)
COMMANDS = Endpoint(ROBOT.command_topic, Values.type_name)
ANSWER_S = 60.0


class Ros:
    """A ROS node of the test, spinning in a thread, in the domain of a graph."""

    def __init__(self, domain: int):
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=domain)
        self.node = rclpy.create_node("tester", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self._ended = False
        self._thread = threading.Thread(target=self._spin)
        self._thread.start()

    def _spin(self) -> None:
        while not self._ended:
            self.executor.spin_once(timeout_sec=0.05)

    def call(self, kind: Any, name: str, request: Any) -> Any:
        client = self.node.create_client(kind, name)
        assert client.wait_for_service(ANSWER_S), f"no service {name}"
        return self.result(client.call_async(request))

    def result(self, future: Any) -> Any:
        deadline = time.monotonic() + ANSWER_S
        while not future.done():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return future.result()

    def change(self, node: str, transition: str) -> bool:
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState

        request = ChangeState.Request(transition=Transition(label=transition))
        return bool(self.call(ChangeState, f"/{node}/change_state", request).success)

    def state(self, node: str) -> str:
        from lifecycle_msgs.srv import GetState

        return str(self.call(GetState, f"/{node}/get_state", GetState.Request()).current_state.label)

    def trigger(self, name: str) -> tuple[bool, str]:
        from std_srvs.srv import Trigger

        answer = self.call(Trigger, name, Trigger.Request())
        return answer.success, answer.message

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self.node.destroy_node()
        self.context.shutdown()


@pytest.fixture
def ros(found: Graph) -> Iterator[Ros]:
    made = Ros(found.domain)
    yield made
    made.close()


def wait(condition: Callable[[], bool], what: str, limit_s: float = ANSWER_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


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


# ---- services and actions ----
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


class Arm:
    """Joint states of an arm that rests at home, 50 times a second."""

    def __init__(self, found: Graph):
        self._publisher, self._ended = found.publisher(JOINT_STATES), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        names = tuple(joint.name for joint in ROBOT.joints)
        while not self._ended.wait(0.02):
            self._publisher.publish(encode(JointState(time.time_ns(), names, np.array(ROBOT.home))))

    def __enter__(self) -> Arm:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.skipif(importlib.util.find_spec("vla_interfaces") is None, reason="vla_interfaces is not built here")
def test_an_instruction_is_executed_until_time_or_cancel(found: Graph, ros: Ros) -> None:
    from action_msgs.msg import GoalStatus
    from rclpy.action import ActionClient
    from vla_interfaces.action import ExecuteInstruction

    found.listen(CONTROL_STATUS)
    found.publisher(JOINT_STATES)
    found.operator.start()
    process = found.start("command", embodiment="tabletop")
    found.hear(CONTROL_STATUS.topic)
    client = ActionClient(ros.node, ExecuteInstruction, "/vla/execute")
    assert client.wait_for_server(ANSWER_S)
    said: list[Any] = []

    def send(**fields: Any) -> Any:
        said.clear()
        goal = ExecuteInstruction.Goal(**fields)
        return ros.result(client.send_goal_async(goal, feedback_callback=lambda m: said.append(m.feedback)))

    with Arm(found):
        assert not send(instruction="  ").accepted
        handle = send(instruction="push the red cube", seed=3)
        assert handle.accepted
        wait(lambda: any(f.phase == "running" for f in said), "feedback of a running episode")
        assert not send(instruction="another one").accepted
        ros.result(handle.cancel_goal_async())
        ended = ros.result(handle.get_result_async())
        assert ended.status == GoalStatus.STATUS_CANCELED and ended.result.message == "cancelled"
        handle = send(instruction="push the red cube", time_limit_s=0.5)
        ended = ros.result(handle.get_result_async())
        assert ended.status == GoalStatus.STATUS_ABORTED and ended.result.message == "the time is up"
        assert 0.5 <= ended.result.duration_s < 10
        # An operator says that the task is done.
        handle = send(instruction="push the red cube")
        wait(lambda: any(f.phase == "running" for f in said), "feedback of a running episode")
        found.say(CONTROL, Text.of(op="done", success=True))
        ended = ros.result(handle.get_result_async())
        assert ended.status == GoalStatus.STATUS_SUCCEEDED and ended.result.success
        # What else the node says of itself does not end a goal; deactivation does.
        handle = send(instruction="push the red cube")
        assert ros.trigger("/vla/save")[0]
        wait(lambda: any(f.phase == "running" for f in said), "feedback of a running episode")
        assert ros.change("vla_command", "deactivate")
        ended = ros.result(handle.get_result_async())
        assert ended.status == GoalStatus.STATUS_ABORTED
        assert ended.result.message == "vla_command was deactivated"
        refused = send(instruction="push the red cube")
        assert ros.result(refused.get_result_async()).result.message == "vla_command is not active"
        assert ros.change("vla_command", "cleanup")
    code, errors = found.end(process)
    assert code == 0 and errors.count("[WARN]") == 1 and "expected a sentence" in errors


@pytest.mark.skipif(importlib.util.find_spec("vla_interfaces") is None, reason="vla_interfaces is not built here")
def test_two_instructions_at_once_are_one(ros: Ros, monkeypatch: pytest.MonkeyPatch) -> None:
    import rclpy
    from rclpy.action import GoalResponse
    from vla_interfaces.action import ExecuteInstruction

    from ros_nodes import rclpy_actions

    node = rclpy.create_node("server", context=ros.context)
    server = rclpy_actions.InstructionServer(node, ExecuteInstruction, lambda topic, message: (False, "no"), None)
    goal = ExecuteInstruction.Goal(instruction="push the red cube")
    handle = types.SimpleNamespace(request=goal, abort=lambda: None)
    try:
        for _ in range(2):  # what ran is over: another one may
            assert [server._on_goal(goal) for _ in range(2)] == [GoalResponse.ACCEPT, GoalResponse.REJECT]
            with pytest.raises(StopIteration):
                server._execute(handle).send(None)
        assert server._on_goal(goal) == GoalResponse.ACCEPT  # it never begins: its client went away
        monkeypatch.setattr(rclpy_actions, "_BEGIN_LIMIT_S", 0.0)
        assert server._on_goal(goal) == GoalResponse.ACCEPT
    finally:
        server.destroy()
        node.destroy_node()


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


@pytest.mark.skipif(importlib.util.find_spec("control_msgs") is None, reason="control_msgs is not installed here")
def test_trajectories_go_to_an_action_server(found: Graph, ros: Ros, tmp_path: Path) -> None:
    from control_msgs.action import FollowJointTrajectory
    from rclpy.action import ActionServer, GoalResponse
    from rclpy.callback_groups import ReentrantCallbackGroup

    robot = yaml.safe_load((config_dir() / "embodiment" / "tabletop.yaml").read_text())
    robot.pop("command_topic")
    robot["robot_model"] = str(config_dir() / "embodiment" / "models" / "tabletop_arm.xml")
    robot["outputs"] = [{"topic": "/arm/follow_joint_trajectory", "kind": "follow_joint_trajectory"}]
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(robot))
    goals: list[Any] = []
    mood = "follows"

    def execute(handle: Any) -> Any:
        goals.append(handle.request.trajectory)
        result = FollowJointTrajectory.Result()
        if mood == "aborts":
            result.error_code, result.error_string = FollowJointTrajectory.Result.PATH_TOLERANCE_VIOLATED, "joint1"
        handle.succeed() if mood == "follows" else handle.abort()
        return result

    def says(words: str) -> Callable[[Any], bool]:
        return lambda message: words in message.statuses[0].message

    def hears_no_more(words: str) -> None:
        found.heard[DIAGNOSTICS.topic].clear()
        found.hear(DIAGNOSTICS.topic, lambda m: not says(words)(m))

    found.listen(CONTROL_STATUS)
    found.listen(DIAGNOSTICS)
    found.publisher(JOINT_STATES)
    found.operator.start()
    process = found.start("command", embodiment=str(path))
    found.hear(CONTROL_STATUS.topic)
    with Arm(found):
        found.say(CONTROL, Text.of(op="go", episode=1, seed=1))
        found.hear(DIAGNOSTICS.topic, says("no action server"))
        server = ActionServer(
            ros.node, FollowJointTrajectory, "/arm/follow_joint_trajectory", execute,
            goal_callback=lambda _: GoalResponse.REJECT if mood == "refuses" else GoalResponse.ACCEPT,
            callback_group=ReentrantCallbackGroup(),
        )  # fmt: skip
        wait(lambda: len(goals) >= 5, "goals")
        hears_no_more("no action server")
        mood = "aborts"
        found.hear(DIAGNOSTICS.topic, says("aborted the goal (path tolerance violated, joint1)"))
        mood = "refuses"
        found.hear(DIAGNOSTICS.topic, says("refused the goal"))
        mood = "follows"
        hears_no_more("the goal")
    names = tuple(joint.name for joint in ROBOT.joints)
    for goal in goals:
        assert tuple(goal.joint_names) == names and not np.any(goal.points[-1].velocities)
    assert found.end(process) == (0, "")
    server.destroy()


@pytest.mark.skipif(importlib.util.find_spec("control_msgs") is None, reason="control_msgs is not installed here")
def test_a_goal_that_ends_for_the_next_one_was_followed(ros: Ros) -> None:
    """Some drivers call that an abort; what left its tolerances counts, even when a newer goal is on its way."""
    import rclpy
    from action_msgs.msg import GoalStatus

    from ros_nodes.rclpy_actions import GoalClient

    node = rclpy.create_node("client", context=ros.context)
    client = GoalClient(node, "/arm/follow", "control_msgs/action/FollowJointTrajectory", None)
    said: list[str] = []

    def answered(number: int, accepted: bool = True) -> Any:
        """What is heard of a goal; returns how it ends."""
        client._sent = max(client._sent, number)
        results: list[Any] = []
        result = types.SimpleNamespace(add_done_callback=results.append)
        handle = types.SimpleNamespace(accepted=accepted, get_result_async=lambda: result)
        client._answered(lambda _, why: said.append(why), number, types.SimpleNamespace(result=lambda: handle))

        def end(status: int, code: int = 0) -> None:
            ended = types.SimpleNamespace(status=status, result=types.SimpleNamespace(error_code=code, error_string=""))
            results[0](types.SimpleNamespace(result=lambda: ended))

        return end

    try:
        first, second, third = answered(1), answered(2), answered(3)
        first(GoalStatus.STATUS_CANCELED)
        second(GoalStatus.STATUS_ABORTED, -1)
        assert not said
        third(GoalStatus.STATUS_ABORTED)
        assert said == ["/arm/follow: the controller aborted the goal"]
        answered(3)  # sent before that was known
        assert len(said) == 1
        fourth = answered(4)
        assert said[1:] == [""]
        answered(5)
        fourth(GoalStatus.STATUS_ABORTED, -4)
        assert said[2:] == ["/arm/follow: the controller aborted the goal (path tolerance violated)"]
        answered(6, accepted=False)
        assert "refused" in said[3]
    finally:
        client.destroy()
        node.destroy_node()


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
