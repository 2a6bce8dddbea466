"""The launch files, started by ROS's own launch system. Skipped where ROS is not sourced."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import pytest
from shells import ROOT, Graph, needs_rclpy, ros_environment

from ros_nodes.messages import Image, Text
from ros_nodes.node import CONTROL_STATUS, HEARTBEAT, RECORD_STATUS, RESET, SENSOR, Endpoint

pytestmark = [pytest.mark.ros, needs_rclpy]
CAMERA = Endpoint("/camera/image_raw", Image.type_name, SENSOR)


def film(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=20)
        stream.width, stream.height = 64, 48
        for value in range(20):
            picture = np.full((48, 64, 3), 10 * value, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


def ros2_launch(file: str, domain: int, *words: str) -> subprocess.Popen[str]:
    code = (
        "import sys; from launch import LaunchDescription, LaunchService; from launch.actions import *; "
        "from launch.launch_description_sources import *; "
        "service = LaunchService(); "
        "service.include_launch_description(LaunchDescription([IncludeLaunchDescription("
        "PythonLaunchDescriptionSource(sys.argv[1]), "
        "launch_arguments=[tuple(w.split(':=', 1)) for w in sys.argv[2:]])])); sys.exit(service.run())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT / "launch" / file), *words], cwd="/", env=ros_environment(domain),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


LAUNCHED: dict[str, tuple[Endpoint, dict[str, str]]] = {  # what each launch file is given, and what it then says
    "policy": (HEARTBEAT, {"bundle": "tabletop"}),
    "record": (RECORD_STATUS, {"robot": "tabletop", "out": "{folder}/recordings", "wait": "true"}),
    "camera": (CAMERA, {"source": "{folder}/desk.mp4", "loop": "true"}),
}


def end(launch: subprocess.Popen[str], nodes: int) -> None:
    """Ctrl-C, and every node ends cleanly."""
    launch.send_signal(signal.SIGINT)
    out = "".join(launch.communicate(timeout=90))
    assert launch.returncode == 0 and out.count("process has finished cleanly") == nodes, out


def kill(launches: Iterable[subprocess.Popen[str]]) -> None:
    for process in launches:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(importlib.util.find_spec("launch_ros") is None, reason="launch_ros is not installed here")
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launch_file_runs_its_node_and_ends_it(found: Graph, name: str, tmp_path: Path) -> None:
    endpoint, given = LAUNCHED[name]
    film(tmp_path / "desk.mp4")
    found.listen(endpoint)
    found.operator.start()
    words = [f"{key}:={value.format(folder=tmp_path)}" for key, value in given.items()]
    launch = ros2_launch(f"{name}.launch.py", found.domain, *words)
    found.processes.append(launch)
    try:
        found.hear(endpoint.topic)
        end(launch, nodes=1)
    finally:
        kill([launch])


@pytest.mark.skipif(importlib.util.find_spec("launch_ros") is None, reason="launch_ros is not installed here")
def test_the_launch_files_drive_the_simulator(found: Graph) -> None:
    """The shipped policy, the gate and the simulator, from the real launch files: an episode, and clean ends."""
    for endpoint in (CONTROL_STATUS, HEARTBEAT):
        found.listen(endpoint)
    found.publisher(RESET)
    found.operator.start()
    launches = {
        "robot": ros2_launch("robot.launch.py", found.domain, "bundle:=tabletop", "robot:=tabletop"),
        "sim": ros2_launch("sim.launch.py", found.domain, "env:=tabletop"),
    }
    found.processes += launches.values()  # one that dies is noticed
    try:
        found.hear(HEARTBEAT.topic)
        found.hear(CONTROL_STATUS.topic)
        found.say(RESET, Text.of(episode=1, seed=1_000_101))
        found.hear(CONTROL_STATUS.topic, lambda m: m.object()["episode"] == 1 and m.object()["due"] > 10)
        end(launches["robot"], nodes=2)
        end(launches["sim"], nodes=1)
    finally:
        kill(launches.values())
