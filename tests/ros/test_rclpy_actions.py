"""Actions of the rclpy shell: vla/execute, and goals for a driver. Skipped where ROS is not sourced."""

from __future__ import annotations

import importlib
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rclpy_side import ANSWER_S, Arm, Ros, wait
from shells import Graph, needs_rclpy

from ros_nodes.messages import Text, Values
from ros_nodes.node import CONTROL, CONTROL_STATUS, DIAGNOSTICS, JOINT_STATES
from vla.resources import config_dir, load_embodiment
from vla.runtime.gate import Reason

pytestmark = [pytest.mark.ros, needs_rclpy]
ROBOT = load_embodiment("tabletop")


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


@pytest.mark.skipif(importlib.util.find_spec("control_msgs") is None, reason="control_msgs is not installed here")
def test_trajectories_go_to_an_action_server(found: Graph, ros: Ros, tmp_path: Path) -> None:
    from control_msgs.action import FollowJointTrajectory
    from rclpy.action import ActionServer, GoalResponse
    from rclpy.callback_groups import ReentrantCallbackGroup
    from rclpy.task import Future

    robot = yaml.safe_load((config_dir() / "embodiment" / "tabletop.yaml").read_text())
    robot.pop("command_topic")
    robot["robot_model"] = str(config_dir() / "embodiment" / "models" / "tabletop_arm.xml")
    robot["outputs"] = [{"topic": "/arm/follow_joint_trajectory", "kind": "follow_joint_trajectory"}]
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(robot))
    goals: list[Any] = []
    mood = "follows"

    def taken(_: Any) -> GoalResponse:
        while mood == "hangs":  # and with it the executor
            time.sleep(0.01)
        return GoalResponse.REJECT if mood == "refuses" else GoalResponse.ACCEPT

    async def execute(handle: Any) -> Any:
        goals.append(handle.request.trajectory)
        result = FollowJointTrajectory.Result()
        if mood == "never ends":
            await Future()
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
            goal_callback=taken, callback_group=ReentrantCallbackGroup(),
        )  # fmt: skip
        wait(lambda: len(goals) >= 5, "goals")
        hears_no_more("no action server")
        mood = "aborts"
        found.hear(DIAGNOSTICS.topic, says("aborted the goal (path tolerance violated, joint1)"))
        mood = "refuses"
        found.hear(DIAGNOSTICS.topic, says("refused the goal"))
        mood = "follows"
        hears_no_more("the goal")
        mood = "hangs"
        found.hear(DIAGNOSTICS.topic, says("the controller has not answered a goal for 0.5 s"))
        found.heard[CONTROL_STATUS.topic].clear()
        said = found.hear(CONTROL_STATUS.topic).object()
        assert (said["verdict"], said["reason"]) == ("stop", Reason.DRIVER.text)
        mood = "follows"
        hears_no_more("not answered")
        mood = "never ends"
        found.hear(DIAGNOSTICS.topic, says("the controller tells no result of a goal that should be over"))
        mood = "follows"
        hears_no_more("tells no result")
    names = tuple(joint.name for joint in ROBOT.joints)
    for goal in goals:
        assert tuple(goal.joint_names) == names and not np.any(goal.points[-1].velocities)
    assert found.end(process) == (0, "")
    server.destroy()


@pytest.mark.skipif(importlib.util.find_spec("control_msgs") is None, reason="control_msgs is not installed here")
def test_a_hands_goal_is_said_until_it_is_answered(found: Graph, ros: Ros, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once and stays true: to a server that comes late, and to one that did not answer."""
    from control_msgs.action import GripperCommand
    from rclpy.action import ActionServer, GoalResponse
    from rclpy.callback_groups import ReentrantCallbackGroup

    from ros_nodes import rclpy_actions

    monkeypatch.setattr(rclpy_actions, "_AGAIN_NS", 200_000_000)
    said: list[str] = []
    goals: list[float] = []
    asked = 0
    hangs = False

    def taken(_: Any) -> GoalResponse:
        nonlocal asked
        asked += 1
        while hangs:
            time.sleep(0.01)
        return GoalResponse.ACCEPT

    def execute(handle: Any) -> Any:
        goals.append(handle.request.command.position)
        handle.succeed()
        return GripperCommand.Result()

    other = Ros(found.domain)  # its executor goes on while the server's hangs
    kind = "control_msgs/action/GripperCommand"
    client = rclpy_actions.GoalClient(
        other.node, "/hand", kind, ReentrantCallbackGroup(), lambda _, why: said.append(why)
    )
    try:
        client.send(Values(np.array([0.02, 20.0])))
        assert said == ["/hand: no action server; is the controller running?"]
        timer = other.node.create_timer(0.05, client.look)
        server = ActionServer(ros.node, GripperCommand, "/hand", execute, goal_callback=taken)
        wait(lambda: goals == [0.02] and said[-1] == "", "the goal that waited")
        hangs = True
        client.send(Values(np.array([0.04, 20.0])))
        wait(lambda: "has not answered" in said[-1], "silence to be noticed")
        time.sleep(0.6)
        hangs = False
        wait(lambda: goals[-1] == 0.04 and said[-1] == "", "the answer")
        wait(lambda: asked >= 3, "the goal to be sent again")
        time.sleep(0.5)  # what came while it hung
        count = asked
        time.sleep(1.0)
        assert asked == count, "what was answered is not said again"
        timer.destroy()
        server.destroy()
    finally:
        client.destroy()
        other.close()
