"""Hears topics of a live graph for a while, on the wheel or with rclpy, and says who else is on them. Sends nothing."""

from __future__ import annotations

import functools
import importlib.util
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from ros_nodes.doctor import Topic
from ros_nodes.messages import Clock, Message, decode
from ros_nodes.names import Names
from ros_nodes.node import CLOCK, Endpoint, Now
from ros_nodes.shell import GraphClock
from vla.errors import ConfigError, TransportError, explain

NODE = "vla_doctor"
_IDLE_S = 0.05
Receive = Callable[[str, bytes, int], None]


class Hearer(Protocol):
    """What messages go to, on the caller's thread."""

    def on_message(self, topic: str, message: Message, now: Now) -> object: ...

    def on_reject(self, topic: str, reason: str) -> object: ...


@dataclass(frozen=True)
class Place:
    """Which graph. shell: "rclpy", "wheel", or "" for rclpy where it can be imported, else the wheel. network: of the
    wheel, see ros_nodes.wire.domain_config. names: that our topics have there."""

    shell: str = ""
    domain: int | None = None
    network: str = "loopback"
    distro: str = "jazzy"
    use_sim_time: bool = False
    names: Names = field(default_factory=Names)

    @property
    def chosen(self) -> str:
        has_rclpy = importlib.util.find_spec("rclpy") is not None
        if self.shell == "rclpy" and not has_rclpy:
            raise ConfigError(explain("--shell", "wheel", "rclpy, which is not on the path", "Source ROS 2 first."))
        return self.shell or ("rclpy" if has_rclpy else "wheel")


def listen(
    place: Place, endpoints: Sequence[Endpoint], seconds: float, hearer: Hearer,
    tick: Callable[[Now], object] | None = None,
) -> dict[str, Topic]:  # fmt: skip
    """Hand `hearer` what comes on `endpoints` within `seconds`; who was there at the end, by the topic's name there.

    tick: called every _IDLE_S or more often, on the same thread. Returns early on KeyboardInterrupt.
    """
    heard = [*endpoints, *([CLOCK] if place.use_sim_time else [])]
    clock, box, kinds = GraphClock(place.use_sim_time), _Box(heard), {e.topic: e.type_name for e in heard}
    distro = distro_of(place)
    with (_on_rclpy if place.chosen == "rclpy" else _on_wheel)(place, heard, box.put) as graph:
        end = time.monotonic() + seconds
        with suppress(KeyboardInterrupt):  # what was heard so far is judged
            while time.monotonic() < end:
                if (item := box.get()) is not None:
                    topic, data, received_ns = item
                    _deliver(hearer, clock, topic, kinds[topic], data, received_ns, distro)
                if tick is not None:
                    tick(clock.now())
        return graph()


def _deliver(
    hearer: Hearer, clock: GraphClock, topic: str, kind: str, data: bytes, received_ns: int, distro: str
) -> None:
    try:
        message = decode(kind, data, distro)
    except TransportError as error:
        hearer.on_reject(topic, str(error))
        return
    if isinstance(message, Clock) and topic == CLOCK.topic:
        if clock.simulated:
            clock.follow(message.stamp_ns)
        return
    hearer.on_message(topic, message, clock.now(received_ns))


class _Box:
    """Messages on their way from the receiving thread; of each topic the newest, as many as its depth."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._turns: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._items = {e.topic: deque[tuple[bytes, int]](maxlen=e.quality.depth) for e in endpoints}

    def put(self, topic: str, data: bytes, received_ns: int) -> None:
        self._items[topic].append((data, received_ns))
        self._turns.put(topic)

    def get(self) -> tuple[str, bytes, int] | None:
        try:
            topic = self._turns.get(timeout=_IDLE_S)
            return topic, *self._items[topic].popleft()
        except (queue.Empty, IndexError):  # an IndexError: a newer message took its place, and has its own turn
            return None


def _collected(found: Iterator[tuple[str, str, bool]]) -> dict[str, Topic]:
    out: dict[str, Topic] = {}
    for topic, kind, writes in found:
        seen = out.setdefault(topic, Topic())
        (seen.publishers if writes else seen.subscribers)[kind] += 1
    return out


@contextmanager
def _on_wheel(
    place: Place, endpoints: Sequence[Endpoint], receive: Receive
) -> Iterator[Callable[[], dict[str, Topic]]]:
    from ros_nodes.wire import Participant

    with Participant(NODE, domain=place.domain, network=place.network, distro=place.distro) as participant:
        for e in endpoints:
            participant.subscribe(place.names(e.topic), e.type_name, e.quality, functools.partial(receive, e.topic))
        participant.start()
        yield lambda: _collected(iter(participant.endpoints()))


@contextmanager
def _on_rclpy(
    place: Place, endpoints: Sequence[Endpoint], receive: Receive
) -> Iterator[Callable[[], dict[str, Topic]]]:
    import rclpy
    from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

    from ros_nodes.rclpy_actions import interface
    from ros_nodes.rclpy_shell import qos

    context = rclpy.Context()
    rclpy.init(context=context, domain_id=place.domain)
    node = rclpy.create_node(NODE, context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)

    def stamped(topic: str, data: bytes) -> None:
        receive(topic, data, time.monotonic_ns())

    def spin() -> None:
        with suppress(ExternalShutdownException):
            executor.spin()

    def found() -> Iterator[tuple[str, str, bool]]:
        for topic, _ in node.get_topic_names_and_types():
            for infos, writes in (
                (node.get_publishers_info_by_topic(topic), True), (node.get_subscriptions_info_by_topic(topic), False),
            ):  # fmt: skip
                yield from ((topic, info.topic_type, writes) for info in infos if info.node_name != NODE)

    thread = threading.Thread(target=spin, name="listen", daemon=True)
    try:
        for e in endpoints:
            take = functools.partial(stamped, e.topic)
            node.create_subscription(interface(e.type_name), place.names(e.topic), take, qos(e.quality), raw=True)
        thread.start()
        yield lambda: _collected(found())
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown(context=context)
        thread.join(5.0)


def distro_of(place: Place) -> str:
    """Whose messages the graph speaks: with rclpy, those of the ROS that is sourced."""
    from ros_nodes.messages import DISTROS

    sourced = os.environ.get("ROS_DISTRO", "")
    return sourced if place.chosen == "rclpy" and sourced in DISTROS else place.distro
