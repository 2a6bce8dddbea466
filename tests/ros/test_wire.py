"""The DDS wheel: exchange between processes, node graph, and what goes wrong with ports, domains and wheels."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ros_nodes import messages as m
from ros_nodes import wire
from ros_nodes.graph import free_domain
from ros_nodes.node import LATCHED, SENSOR, STATE, Quality
from ros_nodes.types import dds_type, type_hash
from vla.errors import TransportError

ROOT = Path(__file__).resolve().parents[2]

ECHO = """
import sys
from ros_nodes import messages as m
from ros_nodes.node import LATCHED, SENSOR, STATE
from ros_nodes.wire import Participant
import threading
done = threading.Event()
with Participant("echo", domain=int(sys.argv[1])) as p:
    back = {t: p.publisher("/back" + t, k, q) for t, k, q in [
        ("/image", m.Image.type_name, SENSOR), ("/joints", m.JointState.type_name, STATE),
        ("/text", m.Text.type_name, LATCHED)]}
    def echo(topic, kind):
        def receive(data, now_ns):
            message = m.decode(kind, data)
            back[topic].publish(m.encode(message))
            if topic == "/text" and message.data == "end":
                done.set()
        return receive
    for topic, kind, quality in [("/image", m.Image.type_name, SENSOR), ("/joints", m.JointState.type_name, STATE),
                                 ("/text", m.Text.type_name, LATCHED)]:
        p.subscribe(topic, kind, quality, echo(topic, kind))
    p.start()
    done.wait(30)
"""


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def test_two_processes_exchange_images_states_and_text() -> None:
    domain = free_domain()
    got: dict[str, list[m.Message]] = {"/back/image": [], "/back/joints": [], "/back/text": []}
    kinds = {"/back/image": m.Image, "/back/joints": m.JointState, "/back/text": m.Text}
    with wire.Participant("asker", domain=domain) as p:
        images = p.publisher("/image", m.Image.type_name, SENSOR)
        joints = p.publisher("/joints", m.JointState.type_name, STATE)
        text = p.publisher("/text", m.Text.type_name, LATCHED)
        subscriptions = {}
        for topic, kind in kinds.items():
            quality = SENSOR if kind is m.Image else STATE
            take = lambda data, _, t=topic, k=kind: got[t].append(m.decode(k.type_name, data))  # noqa: E731
            subscriptions[topic] = p.subscribe(topic, kind.type_name, quality, take)
        p.start()
        text.publish(m.encode(m.Text("before anyone listened")))
        process = subprocess.Popen([sys.executable, "-c", ECHO, str(domain)], cwd=ROOT)
        try:
            assert until(
                lambda: all(x.readers for x in (images, joints)) and all(s.writers for s in subscriptions.values())
            )
            pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
            for i in range(20):
                joints.publish(m.encode(m.JointState(i, ("a", "b"), np.array([i, -i], np.float64))))
                if i % 5 == 0:
                    images.publish(m.encode(m.Image(i, "cam", "bgr8", pixels)))
                time.sleep(0.01)
            assert until(lambda: len(got["/back/joints"]) == 20 and len(got["/back/image"]) >= 1)
            assert [x.stamp_ns for x in got["/back/joints"]] == list(range(20))
            assert np.array_equal(got["/back/image"][0].pixels, pixels)
            assert until(lambda: any(x.data == "before anyone listened" for x in got["/back/text"]))
            transits = np.array(subscriptions["/back/joints"].transit_ns)
            assert len(transits) == 20 and np.all(transits > 0)
            text.publish(m.encode(m.Text("end")))
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_the_node_graph_is_announced_as_ros_tools_read_it() -> None:
    domain = free_domain()
    with wire.Participant("listener", domain=domain) as p:
        heard: list[m.GraphInfo] = []
        take = lambda data, _: heard.append(m.decode(m.GraphInfo.type_name, data))  # noqa: E731
        subscription = p.subscribe("/unused", m.Text.type_name, STATE, lambda *_: None)
        # Deep, as ROS's own reader: the topic has no key, so depth 1 would hold one participant in all.
        reader = p._reader("ros_discovery_info", m.GraphInfo.type_name, Quality(depth=100, latched=True))
        graph = wire.Subscription(reader, "ros_discovery_info", take)
        p.start()
        with wire.Participant("talker", namespace="/arm", domain=domain) as other:
            publisher = other.publisher("/joints", m.JointState.type_name, STATE)
            other.start()
            guid = publisher._writer.guid.bytes

            def named() -> list[m.GraphNode]:
                graph._drain()
                return [n for info in heard for n in info.nodes if n.name == "talker"]

            assert until(lambda: bool(named()))
            node = named()[-1]
            assert (node.namespace, node.writers, node.readers) == ("/arm", (guid,), ())
            assert bytes(subscription._reader.guid.bytes) in {g for i in heard for n in i.nodes for g in n.readers}
        assert until(lambda: (graph._drain(), heard[-1].nodes == ())[1])  # leaving is announced too


def test_types_carry_ros_names_and_published_hashes() -> None:
    image = dds_type(m.Image.type_name)
    assert image.__idl_typename__.replace(".", "::") == "sensor_msgs::msg::dds_::Image_"
    # as announced by a stock Jazzy
    assert type_hash(m.Image.type_name) == "RIHS01_d31d41a9a4c4bc8eae9be757b0beed306564f7526c88ea6a4588fb9582527d47"
    with pytest.raises(TransportError, match="Did you mean 'sensor_msgs/msg/Image'"):
        dds_type("sensor_msgs/msg/Imgae")


@pytest.mark.parametrize(("value", "why"), [("two", "0..232"), ("233", "0..232"), ("-1", "0..232")])
def test_bad_domain_is_refused(monkeypatch: pytest.MonkeyPatch, value: str, why: str) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", value)
    with pytest.raises(TransportError, match=f"^ROS_DOMAIN_ID.*{why}"):
        wire.domain_id()
    assert wire.domain_id(7) == 7
    with pytest.raises(TransportError, match=r"^domain: expected a number in 0\.\.232, got 500"):  # not the variable's
        wire.domain_id(500)


def test_domain_of_the_environment_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "42")
    assert wire.domain_id() == 42
    monkeypatch.setenv("ROS_DOMAIN_ID", "")
    assert wire.domain_id() == 0


def test_ports_in_use_are_named() -> None:
    domain = free_domain()
    with contextlib.ExitStack() as stack:
        for port in range(7400 + 250 * domain + 10, 7400 + 250 * domain + 16):
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).bind(("0.0.0.0", port))
        with pytest.raises(TransportError, match=r"free UDP port in \d+\.\.\d+.*ROS_DOMAIN_ID"):
            wire.Participant("late", domain=domain, max_participants=2)


def test_unknown_interface_is_an_error() -> None:
    with pytest.raises(TransportError, match="no_such_interface"):
        wire.Participant("lost", domain=free_domain(), network="no_such_interface")


def test_one_process_uses_one_network_per_domain() -> None:
    domain = free_domain()
    with (
        wire.Participant("first", domain=domain),
        pytest.raises(TransportError, match="'loopback'"),
        wire.Participant("second", domain=domain, network="eth0"),
    ):
        pass


def test_loopback_settings_name_no_other_interface() -> None:
    config = wire.domain_config("loopback")
    assert config is not None and "name='lo'" in config and "<AllowMulticast>false" in config
    assert wire.domain_config("auto") is None


def test_another_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PINNED", "0.0.0")
    with pytest.raises(TransportError, match=r"pip install cyclonedds==0\.0\.0"):
        wire.Participant("any", domain=free_domain())


def test_self_test_notices_a_changed_private_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "ddspy_take", lambda *_: [(b"\0" * 16, None)])
    with pytest.raises(TransportError, match="cyclonedds raw access"):
        wire.Participant("any", domain=free_domain())


@pytest.mark.parametrize("topic", ["joints", "/joints/", ""])
def test_topics_are_absolute(topic: str) -> None:
    with (
        wire.Participant("any", domain=free_domain()) as p,
        pytest.raises(TransportError, match="absolute name"),
    ):
        p.publisher(topic, m.Text.type_name)


def test_a_failing_callback_does_not_end_the_receive_thread() -> None:
    with wire.Participant("any", domain=free_domain()) as p:
        arrived = threading.Event()

        def take(data: bytes, _: int) -> None:
            if m.decode(m.Text.type_name, data).data == "bad":
                raise RuntimeError("handler broke")
            arrived.set()

        publisher = p.publisher("/text", m.Text.type_name)
        subscription = p.subscribe("/text", m.Text.type_name, STATE, take)
        p.start()
        publisher.publish(m.encode(m.Text("bad")))
        publisher.publish(m.encode(m.Text("good")))
        assert arrived.wait(10) and "handler broke" in subscription.failed


def test_a_reader_that_comes_while_readers_are_counted_is_no_error() -> None:
    """cyclonedds first asks how many there are, then which, and raises IndexError when it hears of more."""
    answers = iter([IndexError("invalid index"), [1, 2, 3]])

    def matched() -> list[int]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert wire._count(matched) == 3
