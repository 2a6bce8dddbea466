"""The recorder: topics of a robot into rosbag2 recordings, episodes marked on /vla/record.

    ros2 launch launch/record.launch.py robot:=tabletop wait:=true

`--show-args` lists every argument; without ROS, `vla launch record` takes the same ones.
"""

import sys
from pathlib import Path

from launch import LaunchDescription

sys.path.append(str(Path(__file__).resolve().parents[1]))  # in a checkout; an installed package is found anyway

from ros_nodes.launching import arguments, node


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*arguments("record"), node("record", "recorder")])
