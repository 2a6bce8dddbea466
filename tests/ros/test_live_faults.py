"""Faults of cameras, joint states and policies as running nodes meet them, in both shells: the arm brakes, /diagnostics
says why, and it goes on by itself when they end. On an exact clock they are in test_command_core.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from shells import SHELLS

from ros_nodes import messages as m
from ros_nodes.graph import Graph
from ros_nodes.node import DIAGNOSTICS, JOINT_STATES, SENSOR, Endpoint
from ros_nodes.wire import Participant
from tests.ros.test_faults import begin, in_motion, swinging
from vla.runtime.gate import Reason

Edit = Callable[[m.Message], m.Message | None]
WRIST, JOINTS = "/camera/wrist/image_raw", JOINT_STATES.topic
PASSED_ON = (Endpoint(WRIST, m.Image.type_name, SENSOR), JOINT_STATES)


class Between:
    """Passes on what the simulator publishes under `/sim`; `edit[topic]` changes a message, or swallows it: None."""

    def __init__(self, domain: int) -> None:
        self.edit: dict[str, Edit] = {}
        self._participant = Participant("between", domain=domain)
        for endpoint in PASSED_ON:
            self._pass(endpoint)
        self._participant.start()

    def _pass(self, endpoint: Endpoint) -> None:
        publisher = self._participant.publisher(endpoint.topic, endpoint.type_name, endpoint.quality)

        def receive(data: bytes, _: int) -> None:
            edit = self.edit.get(endpoint.topic)
            if edit is None:
                publisher.publish(data)
            elif (message := edit(m.decode(endpoint.type_name, data))) is not None:
                publisher.publish(m.encode(message))

        self._participant.subscribe("/sim" + endpoint.topic, endpoint.type_name, endpoint.quality, receive)

    @contextmanager
    def fault(self, topic: str, edit: Edit) -> Iterator[None]:
        self.edit[topic] = edit
        try:
            yield
        finally:
            del self.edit[topic]

    def close(self) -> None:
        self._participant.close()


@pytest.fixture(scope="module", params=SHELLS)
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Graph, Between]]:
    graph = swinging(tmp_path_factory.mktemp("live"), request.param)
    for endpoint in PASSED_ON:
        graph._commands["sim"] += ["-r", f"{endpoint.topic}:=/sim{endpoint.topic}"]
    between = Between(graph.domain)
    try:
        with graph:
            yield graph, between
    finally:
        between.close()
    assert {name: process.returncode for name, process in graph.processes.items()} == dict.fromkeys(graph.processes, 0)


def said(graph: Graph) -> str:
    """What the command node says on /diagnostics now."""
    seen = graph._seen.get(DIAGNOSTICS.topic, (0, None))[1]
    assert isinstance(seen, m.Diagnostics)
    return "; ".join(" ".join((s.message, *s.values.values())) for s in seen.statuses if s.name == "vla_command")


def stops_for(graph: Graph, reason: Reason, words: str) -> None:
    def stopped() -> bool:
        status = graph.control_status()
        return status["verdict"] == "stop" and status["reason"] == reason.text

    graph.wait_for(stopped, 3, f"a stop: {reason.text}")
    graph.wait_for(lambda: reason.text in said(graph) and words in said(graph), 3, f"{words!r} on /diagnostics")


def goes_on(graph: Graph) -> None:
    graph.wait_for(lambda: in_motion(graph), 5, "motion again")
    assert all(process.poll() is None for process in graph.processes.values())


def silent() -> Edit:
    return lambda message: None


def frozen() -> Edit:
    """The picture of now for ever, under new stamps."""
    kept: list[m.Image] = []

    def edit(message: m.Message) -> m.Message:
        assert isinstance(message, m.Image)
        kept.append(message)
        return replace(kept[0], stamp_ns=message.stamp_ns)

    return edit


def smaller() -> Edit:
    def edit(message: m.Message) -> m.Message:
        assert isinstance(message, m.Image)
        return replace(message, pixels=np.ascontiguousarray(message.pixels[::2, ::2]))

    return edit


def moved(by: float) -> Edit:
    """The second joint, rad; NaN for a position that is none."""

    def edit(message: m.Message) -> m.Message:
        assert isinstance(message, m.JointState)
        return replace(message, positions=message.positions + by * (np.arange(len(message.names)) == 1))

    return edit


def without_a_joint() -> Edit:
    def edit(message: m.Message) -> m.Message:
        assert isinstance(message, m.JointState)
        kept = [i for i in range(len(message.names)) if i != 1]
        return m.JointState(message.stamp_ns, tuple(message.names[i] for i in kept), message.positions[kept])

    return edit


FAULTS = {
    "a camera dies": (WRIST, silent, Reason.CAMERA, "wrist"),
    "a camera repeats an old frame": (WRIST, frozen, Reason.CAMERA, "wrist: the same picture"),
    "a camera changes its size": (WRIST, smaller, Reason.CAMERA, "64x64"),
    "joint states stop": (JOINTS, silent, Reason.JOINT_STATE_STALE, ""),
    "joint states lose a joint": (JOINTS, without_a_joint, Reason.JOINT_STATE_INVALID, "joint2"),
    "joint states carry NaN": (JOINTS, lambda: moved(np.nan), Reason.JOINT_STATE_INVALID, "joint2"),
    "joint states jump": (JOINTS, lambda: moved(0.4), Reason.JOINT_STATE_JUMP, ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_sensors_say(name: str, live: tuple[Graph, Between]) -> None:
    topic, edit, reason, words = FAULTS[name]
    graph, between = live
    begin(graph)
    with between.fault(topic, edit()):
        stops_for(graph, reason, words)
    goes_on(graph)


def test_a_second_policy(live: tuple[Graph, Between]) -> None:
    graph, _ = live
    graph._commands["second"] = graph._commands["policy"]
    begin(graph)
    graph.launch("second")
    second = graph.processes["second"]
    try:
        stops_for(graph, Reason.SECOND_POLICY, "end one of them")
    finally:
        second.terminate()
        assert second.wait(20) == 0
        del graph.processes["second"], graph._commands["second"]
    begin(graph)
