"""Policy and gate, against a real driver or against sim.launch.py.

    ros2 launch launch/robot.launch.py bundle:=tabletop robot:=tabletop

The driver, its controllers and the cameras are launched by their own packages. Nothing moves before an episode begins:
the action vla/execute, or `go` on /vla/control. `--show-args` lists every argument; without ROS, `vla launch robot`
takes the same ones.
"""

import sys
from pathlib import Path

from launch import LaunchDescription

sys.path.append(str(Path(__file__).resolve().parents[1]))  # in a checkout; an installed package is found anyway

from ros_nodes.launching import arguments, node


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*arguments("robot"), node("robot", "policy"), node("robot", "command")])
