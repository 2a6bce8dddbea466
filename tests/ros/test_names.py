"""Namespaces and remappings: how names are resolved, and that both shells give a node the same ones in the graph."""

from __future__ import annotations

import time

import numpy as np
import pytest
from shells import SHELLS, Graph, graph

from ros_nodes import messages as m
from ros_nodes.launching import LAUNCHES, wheel_command
from ros_nodes.names import Names, spoken
from ros_nodes.node import (
    CHUNK,
    CLOCK,
    CONTROL,
    CONTROL_STATUS,
    DIAGNOSTICS,
    HEARTBEAT,
    INSTRUCTION,
    JOINT_STATES,
    Endpoint,
    Quality,
)
from ros_nodes.wire import Participant, Subscription
from tests.ros.driver import ROBOT
from vla.cli.launch import Processes
from vla.errors import ConfigError

GRAPH = Endpoint("ros_discovery_info", m.GraphInfo.type_name, Quality(depth=100, latched=True))


def test_names_follow_a_nodes_namespace_and_remappings() -> None:
    plain, left = Names(), Names.of("left", ["joint_states:=/arm/joints", "/left/vla/chunk:=chunk", "/a:=/b"])
    assert [plain(topic) for topic in ("/a", "/vla/chunk", "/clock")] == ["/a", "/vla/chunk", "/clock"]
    assert left("/joint_states") == "/arm/joints" and left("/vla/chunk") == "/left/chunk" and left("/a") == "/left/a"
    assert left(CLOCK.topic) == CLOCK.topic and left(DIAGNOSTICS.topic) == DIAGNOSTICS.topic, "of the whole graph"
    assert Names.of("/two/arms", [])("/a") == "/two/arms/a" and Names.of("", ["/a:=/b"])("/a") == "/b"
    assert left.full("vla_command") == "/left/vla_command" and left.full() == "/left" and plain.full() == "/"
    assert spoken(left.full("vla_command")) == "/left/vla_command" and spoken(plain.full("gate")) == "gate"


def test_rules_for_the_node_itself() -> None:
    names = Names.of("left", ["__ns:=/right", "a:=b", "__node:=gate", "__node:=other"])
    assert (names.full(), names.node, names("/a"), names.remaps) == ("/right", "gate", "/right/b", (("a", "b"),))
    assert Names.of("left", []).node == ""


@pytest.mark.parametrize("rule", ["/a=/b", "/a:=", ":=/a", "/a:=/b c", "__node:=/left/gate", "/a/:=/b"])
def test_a_rule_that_is_none_is_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match="remap: expected FROM:=TO"):
        Names.of("", [rule])


@pytest.mark.parametrize("namespace", ["a b", "left/", "/left//arm", "2"])
def test_a_namespace_that_is_none_is_refused(namespace: str) -> None:
    with pytest.raises(ConfigError, match="namespace: expected a name such as left"):
        Names.of(namespace, [])


def nodes_of(participant: Participant) -> set[str]:
    """Full names of the nodes in the participant's graph, as `ros2 node list` reads them."""
    found: dict[bytes, set[str]] = {}

    def take(data: bytes, _: int) -> None:
        info = m.decode(m.GraphInfo.type_name, data)
        assert isinstance(info, m.GraphInfo)
        found[info.participant] = {f"{n.namespace.rstrip('/')}/{n.name}" for n in info.nodes}

    reader = participant._reader(GRAPH.topic, GRAPH.type_name, GRAPH.quality)
    subscription, end = Subscription(reader, GRAPH.topic, take), time.monotonic() + 2.0
    while time.monotonic() < end:
        subscription._drain()
        time.sleep(0.05)
    return set().union(*found.values())


def topics_of(found: Graph) -> set[str]:
    """Topics of the others that a user of this package would see; what rclpy adds for itself is none of them."""
    own = ("/rosout", "/parameter_events")
    topics = {topic for topic, _, _ in found.operator.endpoints()}
    return {topic for topic in topics if topic not in own and not topic.endswith("transition_event")}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_node_in_a_namespace(shell: str) -> None:
    """Relative names are moved, remapped ones go where the rule says, the graph's own stay; the node is heard there."""
    status, control = "/left/gate_status", "/operator/control"
    with graph(shell) as found:
        found.listen(CONTROL_STATUS, status)
        found.listen(DIAGNOSTICS)
        for endpoint, name in ((CONTROL, control), (CONTROL, CONTROL.topic), (CLOCK, CLOCK.topic)):
            found.publisher(endpoint, name)
        joints, elsewhere = (found.publisher(JOINT_STATES, f"{place}/joint_states") for place in ("/left", ""))
        found.operator.start()
        rules = ("__ns:=/left", "vla/status:=gate_status", f"vla/control:={control}", "__node:=gate")
        words = [word for rule in rules for word in ("-r", rule)]
        process = found.start("command", *words, embodiment="tabletop", use_sim_time=True)
        found.hear(status)
        assert found.hear(DIAGNOSTICS.topic).statuses[0].name == "/left/gate"
        names = Names.of("", list(rules))
        core = {e.topic for e in (CHUNK, HEARTBEAT, CONTROL, CONTROL_STATUS, DIAGNOSTICS, CLOCK, JOINT_STATES)}
        found.wait(lambda: {names(topic) for topic in core} <= topics_of(found), "the node's topics", 10)
        stray = [t for t in topics_of(found) if not t.startswith("/left/")]
        assert sorted(stray) == sorted([control, CLOCK.topic, DIAGNOSTICS.topic])
        assert "/left/gate" in nodes_of(found.operator)
        # What is said outside does not reach it, what is said inside does.
        found.wait(lambda: joints.readers > 0 and found.publisher(CLOCK).readers > 0, "readers")
        found.say(CONTROL, m.Text.of(op="go", episode=7, seed=1), control)
        found.hear(status, lambda text: text.object()["episode"] == 7)
        assert not elsewhere.readers and not found.publisher(CONTROL).readers
        for step in range(100):
            stamp_ns = 10**12 + 10**7 * step
            found.publisher(CLOCK).publish(m.encode(m.Clock(stamp_ns)))
            joints.publish(m.encode(m.JointState(stamp_ns, ROBOT.command_names, np.array(ROBOT.home))))
            time.sleep(0.01)
        found.hear(status, lambda text: text.object()["phase"] == "running")
        assert found.end(process) == (0, "")


def test_two_arms_are_launched_side_by_side_on_the_wheel() -> None:
    launch, arms = LAUNCHES["robot"], ("left", "right")
    with graph("wheel") as found:
        for arm in arms:
            for endpoint in (HEARTBEAT, CONTROL_STATUS):
                found.listen(endpoint, f"/{arm}{endpoint.topic}")
        found.listen(DIAGNOSTICS)
        found.publisher(INSTRUCTION, f"/left{INSTRUCTION.topic}")
        found.operator.start()
        told = {"bundle": "hold", "robot": "tabletop", "domain": str(found.domain)}
        commands = {
            f"/{arm}/vla_{n}": wheel_command(launch, n, {**told, "namespace": arm})
            for arm in arms
            for n in launch.parts
        }
        processes = Processes(commands)
        try:
            for name in commands:
                processes._start(name)
            for topic in found.heard:
                found.hear(topic)
            assert set(commands) <= nodes_of(found.operator)
            for arm in arms:  # on the topic that they share, one is not taken for the other
                found.hear(DIAGNOSTICS.topic, lambda said, arm=arm: said.statuses[0].name == f"/{arm}/vla_command")
            found.say(INSTRUCTION, m.Text("push the red cube"), f"/left{INSTRUCTION.topic}")
            found.hear(f"/left{HEARTBEAT.topic}", lambda status: "no instruction" not in status.message)
            right = found.heard[f"/right{HEARTBEAT.topic}"]
            assert "no instruction" in right[-1].message, "what is said to one arm is not said to the other"
        finally:
            assert set(processes._end().values()) == {0}
