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

from ros_nodes.goals import GRIP_NS, SETTLE_NS, GoalWatch
from ros_nodes.messages import Flag, Message, Text, Trajectory, Values, encode
from ros_nodes.node import CONTROL, CONTROL_STATUS, INSTRUCTION, Send
from vla.errors import ConfigError, ObservationError, explain
from vla.types import check_instruction

EXECUTE = "vla/execute"
_STOP_LIMIT_S = 3.0  # how long a cancelled goal may take to come to rest
_BEGIN_LIMIT_S = 1.0  # an accepted goal that has not begun by then never will: its client went away meanwhile
_AGAIN_NS = 1_000_000_000  # between goals for a hand whose server does not answer


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
    """Sends goals to one action server, control_msgs FollowJointTrajectory or GripperCommand; what it makes of them is
    judged by ros_nodes/goals.py.

    refused: called with the name and why when goals begin not to be followed; with "" when they are again.
    """

    def __init__(self, node: Any, name: str, type_name: str, group: CallbackGroup, refused: Callable[[str, str], None]):
        self._name, self._type, self._refused = name, interface(type_name), refused
        self._watch, self._told = GoalWatch(name), ""
        self._hand: Values | None = None  # the newest goal of a gripper
        self._again_ns = 0  # when it may be sent again
        self._futures: dict[int, Future] = {}  # by number of the goal: its answer, then its result
        self._client = ActionClient(node, self._type, name.lstrip("/"), callback_group=group)

    def send(self, goal: Message) -> None:
        """goal: a Trajectory, or Values (position, max_effort)."""
        now_ns = time.monotonic_ns()
        if isinstance(goal, Values):
            self._hand, self._again_ns = goal, now_ns + _AGAIN_NS
        if not self._client.server_is_ready():
            self._watch.absent()
        else:
            message = self._type.Goal()
            if isinstance(goal, Trajectory):
                joint_trajectory = type(message.trajectory)
                message.trajectory = deserialize_message(bytes(encode(goal)), joint_trajectory)
                number = self._watch.send(now_ns, now_ns + goal.times_ns[-1] + SETTLE_NS)
            else:
                assert isinstance(goal, Values)
                message.command.position, message.command.max_effort = (float(value) for value in goal.data)
                number = self._watch.send(now_ns, now_ns + GRIP_NS)
            self._follow(number, self._client.send_goal_async(message), self._answered)
        self.look()

    def look(self) -> None:
        """Called again and again: silence is noticed, and a hand's goal sent anew that its server may not know. It is
        said once and stays true; a trajectory is stale by the next one."""
        now_ns = time.monotonic_ns()
        unheard = now_ns >= self._again_ns and self._watch.unheard(now_ns)
        if self._hand is not None and unheard and self._client.server_is_ready():
            self.send(self._hand)
            return
        for number in self._futures.keys() - self._watch.open:  # nobody waits for what they may still bring
            self._futures.pop(number).cancel()
        if (fault := self._watch.fault(now_ns)) != self._told:
            self._told = fault
            self._refused(self._name, fault)

    def _follow(self, number: int, future: Future, then: Callable[[int, Any], None]) -> None:
        """then(number, value), unless the future is cancelled."""

        def done(ended: Future) -> None:
            if (value := ended.result()) is not None:
                then(number, value)
                self.look()

        self._futures[number] = future
        future.add_done_callback(done)

    def _answered(self, number: int, handle: Any) -> None:
        self._watch.answered(number, handle.accepted)
        if handle.accepted:
            self._follow(number, handle.get_result_async(), self._ended)

    def _ended(self, number: int, ended: Any) -> None:
        result = ended.result
        words = f"stalled at {result.position:.4g}" if getattr(result, "stalled", False) else ""
        words = words or getattr(result, "error_string", "")
        self._watch.ended(number, ended.status == GoalStatus.STATUS_ABORTED, getattr(result, "error_code", 0), words)

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
