"""A V4L2 device or a video file as a camera's topic, for desks without a camera driver.

    ros2 launch launch/camera.launch.py source:=/dev/video2 robot:=so101 camera:=wrist

`--show-args` lists every argument; without ROS, `vla launch camera` takes the same ones.
"""

import sys
from pathlib import Path

from launch import LaunchDescription

sys.path.append(str(Path(__file__).resolve().parents[1]))  # in a checkout; an installed package is found anyway

from ros_nodes.launching import arguments, node


def generate_launch_description() -> LaunchDescription:
    return LaunchDescription([*arguments("camera"), node("camera", "camera")])
