"""The policy node: cameras, joint states and an instruction in, action chunks and a heartbeat out.

    ros2 launch launch/policy.launch.py bundle:=tabletop

`--show-args` lists every argument; without ROS, `vla launch policy` takes the same ones.
"""

import sys
from pathlib import Path

from launch import LaunchDescription

sys.path.append(str(Path(__file__).resolve().parents[1]))  # in a checkout; an installed package is found anyway

from ros_nodes.launching import arguments, node


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*arguments("policy"), node("policy", "policy")])
