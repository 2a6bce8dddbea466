"""Starts nodes in either shell, so that one test serves both. Where ROS is not sourced, those of rclpy are skipped."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ros_nodes import graph as demo
from ros_nodes import settings
from ros_nodes.graph import free_domain
from ros_nodes.joints import joint_topics
from ros_nodes.messages import JointState, Message, decode, encode
from ros_nodes.node import Endpoint
from ros_nodes.wire import Participant
from vla.embodiment import Embodiment

ROOT = Path(__file__).resolve().parents[2]
HAS_RCLPY = importlib.util.find_spec("rclpy") is not None
needs_rclpy = pytest.mark.skipif(not HAS_RCLPY, reason="rclpy is not importable here: source a ROS 2 installation")
SHELLS = (pytest.param("wheel"), pytest.param("rclpy", marks=[pytest.mark.ros, needs_rclpy]))
START_S = 120.0
LOOPBACK = (
    "<CycloneDDS><Domain><General><Interfaces><NetworkInterface name='lo'/></Interfaces><AllowMulticast>false"
    "</AllowMulticast></General><Discovery><ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>60"
    "</MaxAutoParticipantIndex><Peers><Peer Address='127.0.0.1'/></Peers></Discovery></Domain></CycloneDDS>"
)

ONLY_HERE = {"CYCLONEDDS_URI": LOOPBACK, "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}  # whichever DDS ROS runs on


def ros_environment(domain: int) -> dict[str, str]:
    """For processes of ROS: the same domain and loopback as the wheel's."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    own = {"ROS_DOMAIN_ID": str(domain), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ONLY_HERE, **own}


def command(shell: str, node: str, domain: int, *ros_words: str, **values: Any) -> list[str]:
    """The command line of `node` with these settings in one of the shells. ros_words: both take -r RULE."""
    kind = settings.NODES[node]
    if shell == "wheel":
        sim_time = ["--use-sim-time"] if values.pop("use_sim_time", False) else []
        words = []
        for s in kind.settings:
            if s.name in values:  # as typed: the node shall judge it
                words += s.words(values[s.name]) if s.kind == "flag" else [s.option, *str(values[s.name]).split()]
        return [sys.executable, "-m", kind.module, *words, *sim_time, *ros_words, "--domain", str(domain)]
    words = [word for name, value in values.items() for word in ("-p", f"{name}:={_yaml(value)}")]
    return [sys.executable, "-m", "ros_nodes.rclpy_shell", node, "--ros-args", *words, *ros_words]


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Graph:
    """Nodes of one shell in a domain of their own, and an operator on the wheel who hears and says."""

    def __init__(self, shell: str):
        self.shell, self.domain = shell, free_domain()
        self.operator = Participant("operator", domain=self.domain)
        self.heard: dict[str, list[Message]] = {}
        self._publishers: dict[str, Any] = {}
        self._changed = threading.Condition()
        self.processes: list[subprocess.Popen[str]] = []

    def listen(self, endpoint: Endpoint, topic: str = "") -> None:
        name = topic or endpoint.topic
        self.heard[name] = []

        def receive(data: bytes, _: int) -> None:
            with self._changed:
                self.heard[name].append(decode(endpoint.type_name, data))
                self._changed.notify_all()

        self.operator.subscribe(name, endpoint.type_name, endpoint.quality, receive)

    def publisher(self, endpoint: Endpoint, topic: str = "") -> Any:
        name = topic or endpoint.topic
        if name not in self._publishers:
            self._publishers[name] = self.operator.publisher(name, endpoint.type_name, endpoint.quality)
        return self._publishers[name]

    def say(self, endpoint: Endpoint, message: Message, topic: str = "") -> None:
        publisher = self.publisher(endpoint, topic)
        self.wait(lambda: publisher.readers > 0, f"a reader of {topic or endpoint.topic}")
        publisher.publish(encode(message))

    def start(self, node: str, *ros_words: str, **values: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command(self.shell, node, self.domain, *ros_words, **values), cwd=ROOT, env=ros_environment(self.domain),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float = START_S) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            for process in self.processes:
                if process.poll() not in (None, 0):
                    raise AssertionError(f"a node ended while waiting for {what}: {process.communicate()}")
            assert time.monotonic() < deadline, f"no {what}"
            with self._changed:
                self._changed.wait(0.05)

    def hear(self, topic: str, matches: Callable[[Any], bool] = lambda message: True, limit_s: float = START_S) -> Any:
        """The first message of `topic`, from now on or before, that matches."""

        def find() -> Any:
            with self._changed:
                return next((m for m in self.heard[topic] if matches(m)), None)

        self.wait(lambda: find() is not None, f"message on {topic}", limit_s)
        return find()

    def end(self, process: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[int, str]:
        """Exit code and stderr after a signal, without what ROS logs at level info."""
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        return process.returncode, "\n".join(line for line in errors.splitlines() if "[INFO]" not in line)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self.operator.close()


class RclpyDemo(demo.Graph):
    """The graph of `vla demo` with its nodes in the rclpy shell; its operator stays on the wheel."""

    def _process(self, name: str) -> tuple[list[str], dict[str, str]]:
        _, environment = super()._process(name)
        module, *words = self._commands[name]
        node, kind = next((node, kind) for node, kind in settings.NODES.items() if kind.module == module)
        parser = argparse.ArgumentParser()
        parser.add_argument("--use-sim-time", action="store_true")
        parser.add_argument("-r", action="append", default=[])
        settings.add_arguments(parser, kind.settings)
        told = {key: value for key, value in vars(parser.parse_args(words)).items() if value != parser.get_default(key)}
        rules = [word for rule in told.pop("r", ()) for word in ("-r", rule)]
        values = {key: " ".join(value) if isinstance(value, list) else value for key, value in told.items()}
        values["stats"] = str(self.out / "stats" / f"{name}.json")
        return command("rclpy", node, self.domain, *rules, **values), {**environment, **ros_environment(self.domain)}


DEMOS = {"wheel": demo.Graph, "rclpy": RclpyDemo}


@contextmanager
def beside(run: Callable[[threading.Event], None]) -> Iterator[None]:
    """`run` in a thread of its own while the block lasts; the event says when to end."""
    ended = threading.Event()
    thread = threading.Thread(target=run, args=(ended,))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def drivers(found: Graph, robot: Embodiment) -> Iterator[set[str]]:
    """Joint states of a robot that rests at home, 100 times a second; topics in the set are silent."""
    silent, home = set[str](), np.array(robot.home)
    told = [(topic, found.publisher(topic.endpoint)) for topic in joint_topics(robot)]

    def run(ended: threading.Event) -> None:
        while not ended.wait(0.01):
            for topic, publisher in told:
                if topic.topic not in silent:
                    publisher.publish(encode(JointState(time.time_ns(), topic.names, home[topic.places])))

    with beside(run):
        yield silent


@contextmanager
def graph(shell: str) -> Iterator[Graph]:
    made = Graph(shell)
    try:
        yield made
    finally:
        made.close()
