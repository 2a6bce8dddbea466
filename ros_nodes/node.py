"""What a node is, without middleware: messages in, messages out, a clock. Shells (DDS wheel, rclpy) run it.

A core is single-threaded: its shell calls one method at a time. It declares topics; it returns what to send. Work that
takes longer than a few milliseconds is returned as a Job, which the shell runs on a worker thread and whose value comes
back through `on_result`. A test drives a core with plain calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ros_nodes.messages import (
    Clock,
    CompressedImage,
    Diagnostics,
    Flag,
    Image,
    JointState,
    Message,
    Status,
    Text,
    Trajectory,
)


# ---- quality of service ----
@dataclass(frozen=True)
class Quality:
    """QoS of one endpoint. KEEP_LAST always: a KEEP_ALL writer facing a frozen reader would stall its process."""

    reliable: bool = True
    depth: int = 10
    latched: bool = False  # transient local: late joiners get the last `depth` messages


SENSOR = Quality(reliable=False, depth=5)  # images; the ROS sensor-data profile
# Commands, chunks, joint states of a simulated arm. A best-effort writer never matches a reliable reader, and stock
# controllers read reliably, so what they may want is written reliably.
STATE = Quality(reliable=True, depth=50)
# Read side of joint states: drivers that publish them as sensor data (micro-ROS, SensorDataQoS) are heard as well as
# reliable ones. 50 deep: 0.1 s of 500 Hz outlast a busy machine.
STREAM = Quality(reliable=False, depth=50)
LATEST = Quality(reliable=False, depth=1)  # read side of what is only worth its newest value, such as /clock
LATCHED = Quality(reliable=True, depth=1, latched=True)  # instruction, episode status


@dataclass(frozen=True)
class Endpoint:
    """raw: of a subscription; the core gets the bytes as they came, as a Raw message, whatever is in them."""

    topic: str
    type_name: str
    quality: Quality = STATE
    raw: bool = False


def pictures_of(topic: str, compressed: bool = False, quality: Quality = SENSOR) -> Endpoint:
    """The endpoint of a camera's topic. By ROS's convention a name that ends with /compressed carries CompressedImage;
    compressed: the one of that name beside `topic`, unless it is one already."""
    topic += "/compressed" * (compressed and not topic.endswith("/compressed"))
    kind = CompressedImage if topic.endswith("/compressed") else Image
    return Endpoint(topic, kind.type_name, quality)


# ---- the topics of the graph that do not depend on the embodiment ----
INSTRUCTION = Endpoint("/vla/instruction", Text.type_name, LATCHED)
REQUEST = Endpoint("/vla/request", Text.type_name)  # command node -> policy: infer now
CHUNK = Endpoint("/vla/chunk", Trajectory.type_name)  # policy -> command node
HEARTBEAT = Endpoint("/vla/heartbeat", Status.type_name)  # policy -> command node, 20 Hz
CONTROL_STATUS = Endpoint("/vla/status", Text.type_name)  # command node: verdicts, counters
CONTROL = Endpoint("/vla/control", Text.type_name)  # operator -> command node: {"op": one of command_node.OPERATIONS}
# Operator -> command node. True stops the arm until the flag is false again *and* the operator resumes.
EMERGENCY_STOP = Endpoint("/vla/estop", Flag.type_name)
DEADMAN = Endpoint("/vla/deadman", Flag.type_name)  # true, again and again, while a hand is on the switch
RESET = Endpoint("/sim/reset", Text.type_name)  # operator -> simulator: {"episode", "seed", "task", ...}
SIM_STATUS = Endpoint("/sim/status", Text.type_name, LATCHED)
JOINT_STATES = Endpoint("/joint_states", JointState.type_name, STREAM)
# The proprioceptive state vector itself, as JointState with the state_names: for robots whose state cannot be
# computed from joint positions here, because no kinematic model ships with them.
STATE_VECTOR = Endpoint("/state", JointState.type_name, STREAM)
RECORD = Endpoint("/vla/record", Text.type_name)  # operator -> recorder: one of recorder_node.MARKS
RECORD_STATUS = Endpoint("/vla/record/status", Text.type_name, LATCHED)  # recorder: what it writes, what it lost
CLOCK = Endpoint("/clock", Clock.type_name, LATEST)
DIAGNOSTICS = Endpoint("/diagnostics", Diagnostics.type_name)

HEARTBEAT_PERIOD_NS = 50_000_000
# Without a sign of life for as long, the arm brakes: of the policy, of the joint states (by their stamps), of a deadman
# switch. Braking shall begin within 150 ms, on a busy machine too, and two heartbeats may be lost.
SILENCE_NS = 120_000_000
IDLE_BEATS = 3  # heartbeats in a row that say "nothing to do" while a request is open: it, or its answer, was lost


# Keys of the heartbeat's values, each before a camera's name: stamp and fingerprint of its newest picture, and the
# usual distance of its stamps.
STAMP_KEY, PICTURE_KEY, SPACING_KEY = "stamp_ns/", "picture/", "spacing_ns/"


# ---- time and effects ----
class Now(NamedTuple):
    """stamp_ns: the graph's time (ROS time; simulated when /clock is followed): stamps and due times.
    steady_ns: CLOCK_MONOTONIC of this machine: watchdogs and timers, which must run on when simulated time stands.
    received_ns: steady time at which the message arrived here, which may be earlier; 0 in timer calls.
    set_ns: by how much the wall clock was set since the start, forwards or back; what was stamped before lies so much
    further from stamp_ns than time has passed."""

    stamp_ns: int
    steady_ns: int
    received_ns: int = 0
    set_ns: int = 0

    @property
    def came_ns(self) -> int:
        """Graph time when the message came."""
        return self.stamp_ns - (self.steady_ns - self.received_ns if self.received_ns else 0)


class Send(NamedTuple):
    topic: str
    message: Message


class Job(NamedTuple):
    """`run()` on the worker thread; its value goes to `on_result(name, value)`, an exception to it as the value."""

    name: str
    run: Callable[[], Any]


class Goal(NamedTuple):
    """`goal` for the action server `action`, in place of the one before; only shells with action clients (rclpy).

    type_name: control_msgs/action/FollowJointTrajectory, whose goal here is a Trajectory, or
    control_msgs/action/GripperCommand, whose goal is Values of (position, max_effort)."""

    action: str
    type_name: str
    goal: Message


Effect = Send | Job | Goal
Effects = Sequence[Effect]


class NodeCore(Protocol):
    name: str  # what it calls itself in statuses; the shell puts its name in the graph here, see names.spoken

    @property
    def subscriptions(self) -> Sequence[Endpoint]: ...

    @property
    def publications(self) -> Sequence[Endpoint]: ...

    @property
    def next_tick_ns(self) -> int:
        """Steady time at which `tick` wants to be called; read after every call."""
        ...

    def on_message(self, topic: str, message: Message, now: Now) -> Effects:
        """now is the present, never earlier than that of the call before; now.received_ns is when the message came."""
        ...

    def on_reject(self, topic: str, reason: str, now: Now) -> Effects:
        """A message on `topic` was malformed or of an unsupported kind."""
        ...

    def on_result(self, name: str, value: Any, now: Now) -> Effects: ...

    def tick(self, now: Now) -> Effects: ...

    def close(self, now: Now) -> Effects:
        """Last words; called once, on every way out that lets code run."""
        ...

    def summary(self) -> dict[str, Any]:
        """Plain data about the run, for the statistics file of the shell."""
        ...


class Periodic:
    """Absolute deadlines of a fixed period: lateness never accumulates; periods slept through are counted, not run."""

    def __init__(self, period_ns: int, start_ns: int = 0):
        self.period_ns, self.next_ns, self.skipped = period_ns, start_ns, 0

    def due(self, now_ns: int) -> int:
        """Periods that ended since the last call: 0 not yet, 1 on time, more when late. Advances past `now_ns`."""
        if now_ns < self.next_ns:
            return 0
        if self.next_ns == 0:
            self.next_ns = now_ns
        count = (now_ns - self.next_ns) // self.period_ns + 1
        self.next_ns += count * self.period_ns
        self.skipped += count - 1
        return int(count)
