"""The rclpy side of a test: a node that spins in a thread, and an arm at rest. rclpy is imported where it is used."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from shells import Graph

from ros_nodes.messages import JointState, encode
from ros_nodes.node import JOINT_STATES
from vla.resources import load_embodiment

ROBOT = load_embodiment("tabletop")
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


def wait(condition: Callable[[], bool], what: str, limit_s: float = ANSWER_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


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
