"""Actions of the rclpy shell: goals for a robot's action servers, and the server of our own ExecuteInstruction.

A goal goes out anew whenever the command node decides, in place of the one before, which the server preempts. The type
of our own action is generated from ros_nodes/interfaces, a package of its own because Python packages cannot generate
types; where it was not built the server is left out, and /vla/instruction with /vla/control do the same.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from action_msgs.msg import GoalStatus
from rclpy.action import ActionClient, ActionServer, CancelResponse, GoalResponse
from rclpy.callback_groups import CallbackGroup, ReentrantCallbackGroup
from rclpy.serialization import deserialize_message
from rclpy.task import Future

from ros_nodes.messages import Flag, Message, Text, Trajectory, Values, encode
from ros_nodes.node import CONTROL, CONTROL_STATUS, INSTRUCTION, Send
from vla.errors import ConfigError, ObservationError, explain
from vla.types import check_instruction

EXECUTE = "vla/execute"
_STOP_LIMIT_S = 3.0  # how long a cancelled goal may take to come to rest
_BEGIN_LIMIT_S = 1.0  # an accepted goal that has not begun by then never will: its client went away meanwhile
# Of FollowJointTrajectory's error codes, those that no newer goal is the cause of.
_TOLERANCES = {-4: "path tolerance violated", -5: "goal tolerance violated"}


@functools.cache
def interface(name: str) -> Any:
    """The Python class of `package/msg/Name`, or of a srv or action; ConfigError when its package is not installed."""
    package, kind, item = name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.{kind}"), item)
    except (ImportError, AttributeError) as error:
        distro = os.environ.get("ROS_DISTRO", "DISTRO")
        remedy = f"apt install ros-{distro}-{package.replace('_', '-')}, and source ROS again."
        raise ConfigError(explain(name, f"the ROS package {package}", str(error), remedy)) from error


class GoalClient:
    """Sends goals to one action server: control_msgs FollowJointTrajectory or GripperCommand.

    A goal that the server ends because of the next one counts as followed, whether it says cancelled or aborted; one
    that left its tolerances does not, whenever that is heard.
    """

    def __init__(self, node: Any, name: str, type_name: str, group: CallbackGroup):
        self._name, self._type, self._fault = name, interface(type_name), ""
        self._waiting: Message | None = None
        self._sent = 0  # goals; the number of the newest
        self._aborted = 0  # the newest that was; what was sent before says nothing of the server since
        self._client = ActionClient(node, self._type, name.lstrip("/"), callback_group=group)

    def send(self, goal: Message, refused: Callable[[str, str], None]) -> None:
        """goal: a Trajectory, or Values (position, max_effort). refused: called with the name and why when goals begin
        to be refused, and whenever one is aborted; with "" when they are taken again."""
        self._waiting = None
        if not self._client.server_is_ready():
            # A gripper's goal is said once and stays true; a trajectory is stale by the next one.
            self._waiting = goal if isinstance(goal, Values) else None
            self._note(f"{self._name}: no action server; is the controller running?", refused)
            return
        message = self._type.Goal()
        if isinstance(goal, Trajectory):
            joint_trajectory = type(message.trajectory)
            message.trajectory = deserialize_message(bytes(encode(goal)), joint_trajectory)
        else:
            assert isinstance(goal, Values)
            message.command.position, message.command.max_effort = (float(value) for value in goal.data)
        self._sent += 1
        answer = self._client.send_goal_async(message)
        answer.add_done_callback(functools.partial(self._answered, refused, self._sent))

    def retry(self, refused: Callable[[str, str], None]) -> None:
        """Send what still waits for its server."""
        if self._waiting is not None and self._client.server_is_ready():
            self.send(self._waiting, refused)

    def _answered(self, refused: Callable[[str, str], None], number: int, answer: Future) -> None:
        handle = answer.result()
        if handle is None:
            return
        if not handle.accepted:
            self._note(f"{self._name}: the controller refused the goal", refused)
            return
        if number > self._aborted:
            self._note("", refused)
        handle.get_result_async().add_done_callback(functools.partial(self._ended, refused, number))

    def _ended(self, refused: Callable[[str, str], None], number: int, answer: Future) -> None:
        ended = answer.result()
        if ended is None or ended.status != GoalStatus.STATUS_ABORTED:
            return
        code, words = getattr(ended.result, "error_code", 0), getattr(ended.result, "error_string", "")
        if number < self._sent and code not in _TOLERANCES:
            return
        if getattr(ended.result, "stalled", False):
            words = f"stalled at {ended.result.position:.4g}"
        why = ", ".join(filter(None, (_TOLERANCES.get(code, f"code {code}" if code else ""), words)))
        self._aborted, self._fault = self._sent, ""
        self._note(f"{self._name}: the controller aborted the goal" + f" ({why})" * bool(why), refused)

    def _note(self, fault: str, refused: Callable[[str, str], None]) -> None:
        if fault != self._fault:
            self._fault = fault
            refused(self._name, fault)

    def destroy(self) -> None:
        self._client.destroy()


class InstructionServer:
    """vla/execute: one goal at a time. tell: hands the core a message as if it had come on a topic, and says whether
    that was done and why not."""

    def __init__(self, node: Any, action: Any, tell: Callable[[str, Text | Flag], tuple[bool, str]], group: Any):
        from ros_nodes.rclpy_shell import qos

        self._node, self._action, self._tell = node, action, tell
        self._episodes = itertools.count(1 << 20)  # far from those of a simulator
        self._status: dict[str, Any] = {}
        self._abandoned = ""
        self._changed = Future()
        self._lock = threading.Lock()  # goals may come on any thread of the executor
        self._busy = False
        self._claimed_s = -math.inf  # when the goal was accepted that has not begun yet
        # Both of these publish and answer while a goal runs, so they cannot be in the core's exclusive group.
        self._words = node.create_publisher(
            interface("std_msgs/msg/String"), INSTRUCTION.topic.lstrip("/"), qos(INSTRUCTION.quality)
        )
        self._server = ActionServer(
            node, action, EXECUTE, self._execute, goal_callback=self._on_goal,
            cancel_callback=lambda handle: CancelResponse.ACCEPT, callback_group=ReentrantCallbackGroup(),
        )  # fmt: skip

    @classmethod
    def make(
        cls, node: Any, tell: Callable[[str, Text | Flag], tuple[bool, str]], group: CallbackGroup
    ) -> InstructionServer | None:
        """None, with a line in the log, where vla_interfaces was not built."""
        try:
            action = interface("vla_interfaces/action/ExecuteInstruction")
        except ConfigError:
            node.get_logger().info(
                f"{EXECUTE} is not served: vla_interfaces is not built, see docs/how-to/on-your-robot.md"
            )
            return None
        return cls(node, action, tell, group)

    def notice(self, effect: Send) -> None:
        """The core publishes something."""
        if effect.topic == CONTROL_STATUS.topic and isinstance(effect.message, Text):
            status = effect.message.object()
            if "phase" in status:  # else it says where a trace was saved
                self._status = status
                self._wake()

    def abandon(self, reason: str) -> None:
        """Nobody will go on with the goal that runs: it is aborted."""
        self._abandoned = reason
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, Future()
        changed.set_result(None)

    def _on_goal(self, goal: Any) -> GoalResponse:
        try:
            check_instruction(goal.instruction)
        except ObservationError as error:
            self._node.get_logger().warning(f"{EXECUTE}: {error}")
            return GoalResponse.REJECT
        with self._lock:
            now = time.monotonic()
            if self._busy or now - self._claimed_s < _BEGIN_LIMIT_S:
                return GoalResponse.REJECT
            self._claimed_s = now
        return GoalResponse.ACCEPT

    async def _execute(self, handle: Any) -> Any:
        with self._lock:
            self._busy, self._claimed_s = True, -math.inf
        try:
            return await self._run(handle)
        finally:
            self._busy = False

    async def _run(self, handle: Any) -> Any:
        goal, begin, self._abandoned = handle.request, time.monotonic(), ""
        episode = next(self._episodes)
        self._words.publish(interface("std_msgs/msg/String")(data=goal.instruction))
        seed = int(goal.seed) % 2**62
        done, reason = self._tell(
            CONTROL.topic, Text.of(op="go", episode=episode, seed=seed, instruction=goal.instruction)
        )
        if not done:
            handle.abort()
            return self._result(False, reason, begin)
        while True:
            await self._changed
            status = self._status
            if self._abandoned:
                handle.abort()
                return self._result(False, self._abandoned, begin)
            if status.get("episode") != episode:
                handle.abort()
                return self._result(False, "another episode began", begin)
            if status["phase"] == "idle":
                success = bool(status.get("success"))
                handle.succeed() if success else handle.abort()
                return self._result(success, "done" if success else "ended without success", begin)
            handle.publish_feedback(self._feedback(status, begin))
            late = 0 < goal.time_limit_s <= time.monotonic() - begin
            if handle.is_cancel_requested or late:
                return await self._stop(handle, "the time is up" if late else "cancelled", begin)

    async def _stop(self, handle: Any, reason: str, begin: float) -> Any:
        """Brake, and end the episode at rest."""
        self._tell(CONTROL.topic, Text.of(op="stop"))
        end = time.monotonic() + _STOP_LIMIT_S
        while not self._abandoned and not self._node.core.held and time.monotonic() < end:
            await self._changed
        self._tell(CONTROL.topic, Text.of(op="done", success=False))
        handle.canceled() if handle.is_cancel_requested else handle.abort()
        return self._result(False, reason, begin)

    def _feedback(self, status: dict[str, Any], begin: float) -> Any:
        feedback = self._action.Feedback()
        feedback.phase, feedback.verdict, feedback.reason = (str(status[key]) for key in ("phase", "verdict", "reason"))
        feedback.chunks, feedback.due_actions = int(status["chunks"]), int(status["due"])
        feedback.missed_actions, feedback.elapsed_s = int(status["missed"]), time.monotonic() - begin
        return feedback

    def _result(self, success: bool, message: str, begin: float) -> Any:
        result = self._action.Result()
        result.success, result.message, result.duration_s = success, message, time.monotonic() - begin
        result.chunks = int(self._status.get("chunks", 0))
        return result

    def destroy(self) -> None:
        self._server.destroy()
        self._node.destroy_publisher(self._words)
