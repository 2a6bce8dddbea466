"""The relay that docs/ros2.md shows, between a gripper's topic from the wheel and its action on a machine with ROS."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shells import ROOT, Graph, needs_rclpy, ros_environment

from ros_nodes.messages import Values, encode
from ros_nodes.node import Endpoint
from ros_nodes.outputs import Outputs
from vla.resources import load_embodiment

PANDA = load_embodiment("panda")
(TWIN,) = Outputs(PANDA, actions=False).twins


def relay() -> str:
    """The code of the page."""
    (code,) = re.findall(r"^```python\n(import rclpy.*?)^```$", (ROOT / "docs/ros2.md").read_text(), re.M | re.S)
    return str(code)


def test_the_page_is_about_the_topic_and_the_action_of_the_panda() -> None:
    code = relay()
    compile(code, "docs/ros2.md", "exec")
    ((action, _),) = Outputs(PANDA).actions
    assert f'ACTION = "{action}"' in code and 'ACTION + "/commands"' in code and action + "/commands" == TWIN


@pytest.mark.ros
@needs_rclpy
@pytest.mark.skipif(importlib.util.find_spec("control_msgs") is None, reason="control_msgs is not installed here")
def test_each_new_position_becomes_one_goal(found: Graph, tmp_path: Path) -> None:
    import rclpy
    from control_msgs.action import GripperCommand
    from rclpy.action import ActionServer
    from rclpy.executors import SingleThreadedExecutor

    goals: list[float] = []

    def execute(handle: Any) -> Any:
        goals.append(handle.request.command.position)
        handle.succeed()
        return GripperCommand.Result()

    context = rclpy.Context()
    rclpy.init(context=context, domain_id=found.domain)
    node, executor = rclpy.create_node("hand", context=context), SingleThreadedExecutor(context=context)
    executor.add_node(node)
    ended = threading.Event()
    thread = threading.Thread(target=lambda: [executor.spin_once(0.05) for _ in iter(ended.is_set, True)])
    thread.start()
    commands = found.publisher(Endpoint(TWIN, Values.type_name))
    found.operator.start()
    script = tmp_path / "relay.py"
    script.write_text(relay())
    process = subprocess.Popen([sys.executable, str(script)], env=ros_environment(found.domain))

    def say(position: float, until: int) -> None:
        def there() -> bool:
            commands.publish(encode(Values(np.array([position]))))
            return len(goals) >= until

        found.wait(there, f"goal {until}")

    try:
        found.wait(lambda: commands.readers > 0, "the relay")
        commands.publish(encode(Values(np.array([0.02]))))  # no server yet: not lost, it comes again
        server = ActionServer(node, GripperCommand, TWIN.removesuffix("/commands"), execute)
        say(0.04, 1)
        for _ in range(20):
            commands.publish(encode(Values(np.array([0.04]))))
        say(0.0, 2)
        assert goals == [0.04, 0.0]
        server.destroy()
    finally:
        process.kill()
        process.wait()
        ended.set()
        thread.join()
        node.destroy_node()
        context.shutdown()
