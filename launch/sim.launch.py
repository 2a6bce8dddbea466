"""A simulated arm (MuJoCo tabletop, or LIBERO) behind the topics of a real one: the other side of robot.launch.py.

    ros2 launch launch/sim.launch.py env:=tabletop

`--show-args` lists every argument; without ROS, `vla launch sim` takes the same ones.
"""

import sys
from pathlib import Path

from launch import LaunchDescription

sys.path.append(str(Path(__file__).resolve().parents[1]))  # in a checkout; an installed package is found anyway

from ros_nodes.launching import arguments, node


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*arguments("sim"), node("sim", "sim")])
