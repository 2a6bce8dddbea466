"""A ROS 2 node on the DDS wheel: participant, topics as CDR bytes, node graph. No ROS installation.

The `cyclonedds` wheel is pinned: bytes go through two functions of its private C layer, because its own serialiser
takes 43 ms for a 640x480 image where writing the CDR takes 0.05 ms. `Participant` proves at start that both still do
what this file relies on, by sending a message to itself.

    with Participant("camera_node") as participant:
        publisher = participant.publisher("/camera/image_raw", Image.type_name, SENSOR)
        participant.subscribe("/joint_states", JointState.type_name, STATE, on_bytes)
        participant.start()
        publisher.publish(encode(image))

Only loopback is used unless `network` says otherwise. Participants of one process share the domain's settings.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType
from typing import Any

from ros_nodes.messages import GraphInfo, GraphNode, Text, encode
from ros_nodes.node import LATCHED, STATE, Quality
from vla.errors import TransportError, explain

PINNED = "11.0.1"
MAX_DOMAIN = 232  # 7400 + 250 * domain + offsets must stay below 65536
MAX_PARTICIPANTS = 60
_MAX_BLOCKING_NS = 20_000_000  # a reliable KEEP_LAST writer does not block; this bounds the write if it ever would
_WAIT_NS = 200_000_000
_JOIN_S = 5.0
_TAKE = 16
_TAKES = 8  # in a row from one topic: a flood on it must not keep the receive thread from the others
_TRANSITS_KEPT = 4000
_MOST_ENDPOINTS = 10_000

try:
    from cyclonedds.builtin import BuiltinDataReader, BuiltinTopicDcpsPublication, BuiltinTopicDcpsSubscription
    from cyclonedds.core import (
        DDSException,
        GuardCondition,
        InstanceState,
        Policy,
        Qos,
        ReadCondition,
        SampleState,
        ViewState,
        WaitSet,
    )
    from cyclonedds.domain import Domain, DomainParticipant
    from cyclonedds.pub import DataWriter
    from cyclonedds.sub import DataReader
    from cyclonedds.topic import Topic

    # The private functions live here; `self_test` guards against a wheel that changed them.
    from cyclonedds._clayer import ddspy_take, ddspy_write  # isort: skip

    from ros_nodes.types import dds_type, type_hash
except ImportError as error:
    raise TransportError(
        f"the DDS wheel cannot be imported ({error}). Install it with: pip install cyclonedds=={PINNED}"
    ) from error

_ANY = SampleState.Any | ViewState.Any | InstanceState.Any
_NEW = SampleState.NotRead | ViewState.Any | InstanceState.Any


def _qos(quality: Quality, user_data: str = "") -> Qos:
    policies = [
        Policy.Reliability.Reliable(_MAX_BLOCKING_NS) if quality.reliable else Policy.Reliability.BestEffort,
        Policy.History.KeepLast(quality.depth),
        Policy.Durability.TransientLocal if quality.latched else Policy.Durability.Volatile,
        Policy.DataRepresentation(use_cdrv0_representation=True),
    ]
    if quality.latched:
        policies.append(Policy.DurabilityService(0, Policy.History.KeepLast(quality.depth), -1, -1, -1))
    if user_data:
        policies.append(Policy.Userdata(user_data.encode()))
    return Qos(*policies)


def domain_id(value: int | str | None = None) -> int:
    """`value`, else ROS_DOMAIN_ID, else 0. TransportError outside 0..232."""
    key, raw = ("ROS_DOMAIN_ID", os.environ.get("ROS_DOMAIN_ID", "").strip() or "0")
    if value is not None:
        key, raw = "domain", str(value)
    try:
        number = int(raw)
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_DOMAIN:
        raise TransportError(
            explain(key, f"a number in 0..{MAX_DOMAIN}", raw, "UDP ports end at 65535; pick a smaller one.")
        )
    return number


def domain_config(network: str, max_participants: int = MAX_PARTICIPANTS) -> str | None:
    """Cyclone DDS settings. network: "loopback", "auto" (every setting as CYCLONEDDS_URI or the default has it), or the
    name of one network interface."""
    if network == "auto":
        return None
    if network == "loopback":
        # Without multicast, peers find each other by trying every participant index on the address of the peer.
        interface = "<NetworkInterface name='lo' multicast='false'/>"
        discovery = "<Peers><Peer Address='127.0.0.1'/></Peers>"
        multicast = "<AllowMulticast>false</AllowMulticast>"
    else:
        interface, discovery, multicast = f"<NetworkInterface name='{network}'/>", "", ""
    return (
        f"<CycloneDDS><Domain id='any'><General><Interfaces>{interface}</Interfaces>{multicast}</General>"
        f"<Discovery><ParticipantIndex>auto</ParticipantIndex>"
        f"<MaxAutoParticipantIndex>{max_participants}</MaxAutoParticipantIndex>{discovery}</Discovery>"
        "<Internal><SocketReceiveBufferSize min='default'/></Internal>"
        "<Tracing><Verbosity>none</Verbosity></Tracing></Domain></CycloneDDS>"
    )


@dataclass
class _OpenDomain:
    network: str
    entity: Any  # None when Cyclone DDS makes it from its own settings
    users: int = 0


_domains: dict[int, _OpenDomain] = {}
_domains_lock = threading.Lock()


def _enter_domain(number: int, network: str, max_participants: int) -> None:
    """Open the domain for this process, or share it; all of its participants use one network."""
    with _domains_lock:
        if number not in _domains:
            config = domain_config(network, max_participants)
            try:
                _domains[number] = _OpenDomain(network, Domain(number, config) if config else None)
            except DDSException as error:
                first = 7400 + 250 * number + 10
                last = first + 2 * max_participants + 1
                raise TransportError(
                    f"domain {number}: expected a free UDP port in {first}..{last} on {network!r}, got {error}. "
                    "Stop other participants of this domain, set another ROS_DOMAIN_ID, or check the interface's name."
                ) from error
        domain = _domains[number]
        if domain.network != network:
            expected = f"{domain.network!r}, as this process already uses"
            raise TransportError(explain("network", expected, repr(network), "Use one network per domain."))
        domain.users += 1


def _leave_domain(number: int) -> None:
    """The last participant closes the domain: left to the interpreter's exit, its threads would outlive their world."""
    with _domains_lock:
        domain = _domains[number]
        domain.users -= 1
        if domain.users == 0:
            del _domains[number]
            if domain.entity is not None:
                domain.entity._delete(domain.entity._ref)


class Publisher:
    """Writes CDR bytes to one topic. Any thread may publish."""

    def __init__(self, writer: Any, topic: str):
        self.topic, self.sent = topic, 0
        self._writer = writer

    def publish(self, data: bytes | bytearray) -> None:
        """data: encapsulation header and CDR, padded to 4 bytes. TransportError when DDS refuses it."""
        code = ddspy_write(self._writer._ref, bytes(data))
        if code < 0:
            raise TransportError(
                explain(self.topic, "bytes that DDS takes", f"error {code}", "Encode a message of the topic's type.")
            )
        self.sent += 1

    @property
    def readers(self) -> int:
        """Matched subscriptions, of any process."""
        return _count(self._writer.get_matched_subscriptions)


def _count(matched: Callable[[], Sequence[Any]]) -> int:
    while True:
        try:
            return len(matched())
        except IndexError:  # cyclonedds asks twice, how many and which: one more came in between
            continue


class Subscription:
    """One reader and its callback `(bytes, receive_ns)`; receive_ns is CLOCK_MONOTONIC when the bytes were taken.

    transit_ns: from the write call of the publisher to the take here, of the newest messages; what the wire adds. It
    compares wall clocks, so it means something on one machine only.
    """

    def __init__(self, reader: Any, topic: str, callback: Callable[[bytes, int], None]):
        self.topic, self.received, self.failed = topic, 0, ""
        self._transits = array("q", bytes(8 * _TRANSITS_KEPT))  # all of it from the start: a node shall not grow
        self._reader, self._callback = reader, callback

    @property
    def transit_ns(self) -> list[int]:
        """In no order."""
        return list(self._transits[: self.received])

    @property
    def writers(self) -> int:
        """Matched publications, of any process."""
        return _count(self._reader.get_matched_publications)

    @property
    def lost(self) -> int:
        """Samples that DDS knows it never delivered."""
        return int(self._reader.get_sample_lost_status().total_count)

    def _drain(self) -> None:
        for _ in range(_TAKES):
            samples = ddspy_take(self._reader._ref, _ANY, _TAKE)
            if isinstance(samples, int):
                return
            now_ns, wall_ns = time.monotonic_ns(), time.time_ns()
            for data, info in samples:
                if info.valid_data:
                    self._transits[self.received % _TRANSITS_KEPT] = wall_ns - info.source_timestamp
                    self.received += 1
                    try:
                        self._callback(data, now_ns)
                    except Exception as error:  # one bad message must not end the thread that all topics share
                        self.failed = f"{type(error).__name__}: {error}"
            if len(samples) < _TAKE:
                return


class Participant:
    """One ROS 2 node. Declare publishers and subscriptions, then `start()`; `close()` leaves the graph.

    name, namespace: as `ros2 node list` shows them. domain: None for ROS_DOMAIN_ID. network: see `domain_config`.
    distro: whose graph messages the peers speak. Raises TransportError when port, interface or wheel do not fit.
    """

    def __init__(
        self,
        name: str,
        namespace: str = "/",
        domain: int | None = None,
        network: str = "loopback",
        distro: str = "jazzy",
        max_participants: int = MAX_PARTICIPANTS,
    ):
        self.name, self.namespace, self.distro = name, namespace, distro
        self.domain = domain_id(domain)
        _check_wheel()
        _enter_domain(self.domain, network, max_participants)
        try:
            self._participant = DomainParticipant(self.domain, Qos(Policy.Userdata(b"enclave=/;")))
        except DDSException as error:
            _leave_domain(self.domain)
            raise TransportError(
                f"domain {self.domain}: no participant could be made ({error}). "
                "Stop other participants of this domain or set another ROS_DOMAIN_ID."
            ) from error
        self._topics: dict[tuple[str, str], Any] = {}
        self.publishers: list[Publisher] = []
        self.subscriptions: list[Subscription] = []
        self._waitset = WaitSet(self._participant)
        self._conditions: list[Any] = []
        self._wake = GuardCondition(self._participant)
        self._waitset.attach(self._wake)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._graph = self._writer("ros_discovery_info", GraphInfo.type_name, LATCHED)
        try:
            self.self_test()
        except TransportError:
            self.close()
            raise

    # ---- endpoints ----
    def publisher(self, topic: str, type_name: str, quality: Quality = STATE) -> Publisher:
        publisher = Publisher(self._writer(_mangle(topic), type_name, quality), topic)
        self.publishers.append(publisher)
        return publisher

    def subscribe(
        self, topic: str, type_name: str, quality: Quality, callback: Callable[[bytes, int], None]
    ) -> Subscription:
        """`callback` runs on the receive thread: keep it short. Only before `start()`."""
        if self._thread is not None:
            raise TransportError(f"{topic}: expected subscribe() before start(), got it after. Declare topics first.")
        subscription = Subscription(self._reader(_mangle(topic), type_name, quality), topic, callback)
        self.subscriptions.append(subscription)
        self._attach(subscription._reader)
        return subscription

    def start(self) -> None:
        """Announce the node and begin to receive."""
        self._graph_changed()
        if not self.subscriptions:
            return
        self._thread = threading.Thread(target=self._receive, name=f"{self.name}-receive", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop receiving and leave the graph. Safe to call twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._wake.set(True)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=_JOIN_S)
        ddspy_write(self._graph._ref, encode(GraphInfo(self._participant.guid.bytes, ()), self.distro))
        # With all its children, in the order DDS wants, while everything still stands: the Python objects may live on
        # in other hands, and what they call afterwards is an error code.
        self._participant._delete(self._participant._ref)
        _leave_domain(self.domain)

    def __enter__(self) -> Participant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def self_test(self) -> None:
        """Send a string to a reader of our own and compare the bytes; TransportError if the wheel's C layer changed."""
        sent = encode(Text("self-test"))
        topic = f"rt/_self_test_{os.getpid()}_{self.name}"
        writer, reader = self._writer(topic, Text.type_name, STATE), self._reader(topic, Text.type_name, STATE)
        got: Any = None
        try:
            deadline = time.monotonic() + 2.0
            while time.monotonic() < deadline and not isinstance(got, list):
                if ddspy_write(writer._ref, sent) < 0:
                    break
                got = ddspy_take(reader._ref, _ANY, 1)
                if not isinstance(got, list):
                    time.sleep(0.01)
            ok = isinstance(got, list) and bytes(got[0][0])[: len(sent)] == sent and bool(got[0][1].valid_data)
        except Exception as error:  # a changed private API can fail in any way
            ok, got = False, error
        if not ok:
            raise TransportError(
                explain("cyclonedds raw access", "a message sent to ourselves", repr(got)[:80], f"Install {PINNED}.")
            )
        del self._topics[(topic, Text.type_name)]

    def endpoints(self) -> list[tuple[str, str, bool]]:
        """(topic, type name, whether it writes) of what others have on ROS topics, as far as known by now."""
        out = []
        for topic, writes in ((BuiltinTopicDcpsPublication, True), (BuiltinTopicDcpsSubscription, False)):
            for sample in BuiltinDataReader(self._participant, topic).take(_MOST_ENDPOINTS):
                name, kind = sample.topic_name or "", (sample.type_name or "").replace("::dds_::", "::")
                if name.startswith("rt/") and sample.participant_key != self._participant.guid:
                    out.append((name[2:], kind.removesuffix("_").replace("::", "/"), writes))
        return out

    # ---- inside ----
    def _topic(self, name: str, type_name: str) -> Any:
        key = (name, type_name)
        if key not in self._topics:
            try:
                self._topics[key] = Topic(self._participant, name, dds_type(type_name, self.distro))
            except DDSException as error:
                raise TransportError(
                    explain(name, f"a topic of type {type_name}", str(error), "One topic has one type; check its name.")
                ) from error
        return self._topics[key]

    def _user_data(self, type_name: str) -> str:
        return f"typehash={type_hash(type_name, self.distro)};"

    def _writer(self, name: str, type_name: str, quality: Quality) -> Any:
        return DataWriter(self._participant, self._topic(name, type_name), _qos(quality, self._user_data(type_name)))

    def _reader(self, name: str, type_name: str, quality: Quality) -> Any:
        return DataReader(self._participant, self._topic(name, type_name), _qos(quality, self._user_data(type_name)))

    def _attach(self, reader: Any) -> None:
        condition = ReadCondition(reader, _NEW)
        self._waitset.attach(condition)
        self._conditions.append(condition)

    def _graph_changed(self) -> None:
        node = GraphNode(
            self.namespace,
            self.name,
            tuple(s._reader.guid.bytes for s in self.subscriptions),
            tuple(p._writer.guid.bytes for p in self.publishers),
        )
        ddspy_write(self._graph._ref, encode(GraphInfo(self._participant.guid.bytes, (node,)), self.distro))

    def _receive(self) -> None:
        while not self._closing.is_set():
            self._waitset.wait(_WAIT_NS)
            for subscription in self.subscriptions:
                subscription._drain()


def _mangle(topic: str) -> str:
    """ROS topic name to DDS topic name."""
    if not topic.startswith("/") or topic.endswith("/"):
        raise TransportError(
            explain("topic", "an absolute name such as /joint_states", repr(topic), "Write it in full.")
        )
    return "rt" + topic


def _check_wheel() -> None:
    found = metadata.version("cyclonedds")
    if found != PINNED:
        raise TransportError(
            explain("cyclonedds", PINNED, found, f"Its raw access is private: pip install cyclonedds=={PINNED}")
        )
