"""Floods, and bytes that are no message, over real DDS on every topic that a running node listens to."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from shells import SHELLS, beside

from ros_nodes import messages as m
from ros_nodes.graph import Graph
from ros_nodes.node import (
    CHUNK,
    CONTROL,
    CONTROL_STATUS,
    DEADMAN,
    DIAGNOSTICS,
    EMERGENCY_STOP,
    HEARTBEAT,
    INSTRUCTION,
    JOINT_STATES,
    RECORD,
    REQUEST,
    RESET,
    SENSOR,
    SIM_STATUS,
    Endpoint,
)
from ros_nodes.shell import read
from ros_nodes.wire import Participant, Publisher
from tests.ros.driver import ROBOT
from tests.ros.test_faults import begin, braked, in_motion, swinging
from vla.errors import TransportError
from vla.runtime.gate import Reason
from vla.runtime.trace import Trace

# Every topic that sim, policy, command or recorder node subscribes to, with a message that asks for nothing.
HARMLESS: dict[Endpoint, m.Message] = {
    **{
        Endpoint(c.topic, m.Image.type_name, SENSOR): m.Image(1, "", "rgb8", np.zeros((4, 4, 3), np.uint8))
        for c in ROBOT.cameras
    },
    JOINT_STATES: m.JointState(1, ("a", "b"), np.zeros(2)),
    INSTRUCTION: m.Text("push the red cube"),
    REQUEST: m.Text("{}"),
    CHUNK: m.Trajectory(1, ("a",), np.zeros((2, 1)), (0, 1)),
    HEARTBEAT: m.Status(m.OK, "", "", {"a": "b"}),
    SIM_STATUS: m.Text("{}"),
    CONTROL: m.Text("{}"),
    EMERGENCY_STOP: m.Flag(False),
    DEADMAN: m.Flag(True),
    Endpoint(ROBOT.command_topic, m.Values.type_name): m.Values(np.zeros(3)),
    RESET: m.Text("{}"),
    RECORD: m.Text("nothing"),
}


# Not heard by policy or command node, or of a type whose every broken message is dropped by Cyclone DDS itself.
UNNAMED = (RESET.topic, RECORD.topic, ROBOT.command_topic, JOINT_STATES.topic, CHUNK.topic, HEARTBEAT.topic)


@pytest.fixture(scope="module", params=SHELLS)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    folder: Path = tmp_path_factory.mktemp("floods")
    graph = swinging(folder, request.param)
    recorder = ["ros_nodes.recorder_node", "--embodiment", "tabletop", "--out", str(folder / "bags"), "--min-free", "0"]
    graph._commands["recorder"] = recorder
    with graph:
        yield graph
        graph.processes["recorder"].terminate()
        assert graph.processes["recorder"].wait(30) == 0
    assert {name: process.returncode for name, process in graph.processes.items()} == dict.fromkeys(graph.processes, 0)


@pytest.fixture
def publishers(graph: Graph) -> Iterator[dict[Endpoint, Publisher]]:
    """On all topics, as anyone in the graph may have them; afterwards every node must run, and an episode go on."""
    with Participant("intruder", domain=graph.domain) as intruder:
        made = {e: intruder.publisher(e.topic, e.type_name, e.quality) for e in HARMLESS}
        intruder.start()
        graph.wait_for(lambda: all(p.readers for p in made.values()), 90, "readers of all topics")
        begin(graph)
        yield made
    assert all(process.poll() is None for process in graph.processes.values())
    with Participant("hand", domain=graph.domain) as hand:  # some of it may have pressed the emergency stop
        release = hand.publisher(EMERGENCY_STOP.topic, EMERGENCY_STOP.type_name, EMERGENCY_STOP.quality)
        hand.start()
        graph.wait_for(lambda: release.readers > 0, 30, "a reader of the emergency stop")
        release.publish(m.encode(m.Flag(False)))
        goes_on(graph)
    graph.wait_for(lambda: (beat := graph.heartbeat()) is not None and beat.level == m.OK, 5, "a heartbeat that is ok")


def said(graph: Graph) -> str:
    """What the command node's diagnostics and the policy's heartbeat say now."""
    seen, beat = graph._seen.get(DIAGNOSTICS.topic, (0, None))[1], graph.heartbeat()
    statuses = [*(seen.statuses if isinstance(seen, m.Diagnostics) else ()), *([beat] if beat else [])]
    return "; ".join(" ".join((s.message, *s.values)) for s in statuses if s.name in ("vla_command", "vla_policy"))


def goes_on(graph: Graph) -> None:
    """The next episode is like any other: nobody was restarted."""
    for _ in range(3):  # the first may be among what was left of a flood
        graph.control("resume")
        number = graph.begin(1_000_000)
        end = time.monotonic() + 8
        while time.monotonic() < end:
            if graph.control_status().get("episode") == number and in_motion(graph):
                return
            time.sleep(0.05)
    raise AssertionError((said(graph), graph.control_status(), graph.sim_status()))


class Forger:
    """Sends RTPS DATA submessages in the name of a DDS writer, with whatever in them: what its own library refuses to
    write. RTPS 2.5, sections 8.3 (messages) and 9.6.2 (ports)."""

    def __init__(self, domain: int) -> None:
        self._ports = [7400 + 250 * domain + 11 + 2 * index for index in range(10)]
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._numbers: dict[bytes, int] = {}

    def send(self, publisher: Publisher, payload: bytes) -> None:
        guid = bytes(publisher._writer.guid.bytes)
        number = self._numbers[guid] = self._numbers.get(guid, publisher.sent) + 1
        filler = bytes(m.encode(m.Text("")))  # a packet too short to be read does not take its number
        for data in (payload, filler):
            body = struct.pack("<HH4s4siI", 0, 16, bytes(4), guid[12:], number >> 32, number & 0xFFFFFFFF) + data
            body += bytes(-len(body) % 4)
            packet = b"RTPS\x02\x01\x01\x10" + guid[:12] + struct.pack("<BBH", 0x15, 0x05, len(body)) + body
            for port in self._ports:
                self._socket.sendto(packet, ("127.0.0.1", port))


def test_garbage_on_every_topic(graph: Graph, publishers: dict[Endpoint, Publisher]) -> None:
    forger, rng = Forger(graph.domain), np.random.default_rng(0)
    # That what is forged arrives at all: a message in order has its effect.
    forger.send(publishers[CONTROL], bytes(m.encode(m.Text.of(op="stop"))))
    graph.wait_for(lambda: graph.control_status()["reason"] == Reason.OPERATOR.text, 5, "the forged stop")
    graph.control("resume")
    graph.wait_for(lambda: in_motion(graph), 5, "motion")
    for endpoint, publisher in publishers.items():
        whole = bytes(m.encode(HARMLESS[endpoint]))
        cut = [whole[:size] for size in range(0, len(whole), max(4, len(whole) // 40 * 4))]
        noise = [head + rng.bytes(size) for head in (b"", whole[:4]) for size in (1, 4, 40, 1000)]
        flipped = []
        for _ in range(20):
            data = bytearray(whole)
            data[rng.integers(4, len(data))] = rng.integers(256)
            flipped.append(bytes(data))
        for data in (*cut, *noise, *flipped):
            forger.send(publisher, data)
        if endpoint.topic not in UNNAMED:

            def named(topic: str = endpoint.topic, publisher: Publisher = publisher, few: bytes = cut[1]) -> bool:
                forger.send(publisher, few)  # again: a reader that had not met the writer yet has heard nothing so far
                return topic in said(graph)

            graph.wait_for(named, 5, f"{endpoint.topic} among the faults")


@pytest.mark.parametrize("together", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_floods(graph: Graph, publishers: dict[Endpoint, Publisher], together: bool) -> None:
    """As fast as one process can send, thousands of messages a second on an idle machine. The command node keeps its
    periods, by its own trace, whatever it then decides."""
    floods = [list(HARMLESS)] * 3 if together else [[e] for e in HARMLESS if e not in (RESET, RECORD)]
    for endpoints in floods:
        data = {e: m.encode(HARMLESS[e]) for e in endpoints}
        for _ in range(20):
            for endpoint in endpoints:
                for _ in range(25):
                    publishers[endpoint].publish(data[endpoint])
            time.sleep(0.001)  # the interpreter's other threads
        spoke = graph.heard_ns(CONTROL_STATUS.topic)
        graph.wait_for(lambda s=spoke: graph.heard_ns(CONTROL_STATUS.topic) > s, 5, "a word of the command node")
        if not in_motion(graph):
            goes_on(graph)
    (graph.out / "trace.mcap").unlink(missing_ok=True)
    graph.control("save")
    graph.wait_for(lambda: (graph.out / "trace.mcap").exists(), 10, "the trace")
    time.sleep(0.5)
    ticks = Trace.load_mcap(graph.out / "trace.mcap").tick_ns
    gaps = np.diff(ticks) / 1e6
    gaps = gaps[gaps < 2000]  # the trace keeps episodes at least so far apart
    assert np.percentile(gaps, 95) < 75 and gaps.max() < 250, np.sort(gaps)[-20:]


@contextmanager
def flood(publishers: dict[Endpoint, Publisher], *endpoints: Endpoint) -> Iterator[None]:
    data = {e: m.encode(HARMLESS[e]) for e in endpoints}

    def run(ended: threading.Event) -> None:
        while not ended.wait(0.001):
            for endpoint in endpoints:
                for _ in range(25):
                    publishers[endpoint].publish(data[endpoint])

    with beside(run):
        yield


def test_in_a_flood_a_policy_that_freezes_is_noticed_as_soon(
    graph: Graph, publishers: dict[Endpoint, Publisher]
) -> None:
    """What floods is refused message by message, by the node that is to notice."""
    policy = graph.processes["policy"].pid
    with flood(publishers, CONTROL, SIM_STATUS, DEADMAN):
        graph.wait_for(lambda: CONTROL.topic in said(graph) and in_motion(graph), 10, "motion in the flood")
        os.kill(policy, signal.SIGSTOP)
        try:
            graph.wait_for(lambda: braked(graph), 3, "the arm to brake")
            graph.wait_for(lambda: Reason.HEARTBEAT.text in said(graph), 3, "the reason on /diagnostics")
        finally:
            os.kill(policy, signal.SIGCONT)
    (graph.out / "control.json").unlink(missing_ok=True)
    graph.control("save")
    graph.wait_for(lambda: (graph.out / "control.json").exists(), 10, "the stops")
    stops = json.loads((graph.out / "control.json").read_text())["stops"]
    silent_ms = [stop["silence_ms"] for stop in stops if stop["reason"] == Reason.HEARTBEAT.text]
    assert silent_ms and 120 <= silent_ms[-1] < 220, stops[-3:]  # the bound of test_faults.py


def test_a_message_too_long_to_be_read_in_a_period_is_refused_unread() -> None:
    chunk = m.Trajectory(0, ("a",), np.zeros((20_000, 1)), tuple(range(20_000)))
    with pytest.raises(TransportError, match="at most 262144 bytes"):
        read(chunk.type_name, bytes(m.encode(chunk)), "jazzy")
    picture = m.Image(0, "", "rgb8", np.zeros((480, 640, 3), np.uint8))
    assert read(picture.type_name, bytes(m.encode(picture)), "jazzy").type_name == picture.type_name
