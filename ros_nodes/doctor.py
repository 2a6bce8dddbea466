"""Is a live graph as a robot's description says, and do its sensors show what a policy was trained on? No middleware.

`Live` hears messages and remembers what it takes to judge them; `check` and `check_content` turn that into findings,
one line each. ros_nodes/listening.py brings the messages. Nothing is ever published.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ros_nodes.episodes import Body
from ros_nodes.joints import JointTopic, joint_topics, merged
from ros_nodes.messages import CompressedImage, Image, JointState, Message
from ros_nodes.names import Names
from ros_nodes.node import Endpoint, Now, Quality, pictures_of
from ros_nodes.outputs import Outputs
from vla.data import content as known
from vla.data.content import DataContent
from vla.data.transforms import fits
from vla.embodiment import Camera, Embodiment
from vla.errors import TransportError, nearest
from vla.types import NS_PER_S

OK, DOUBT, WRONG = "ok", "doubt", "wrong"
_PICTURES = Quality(reliable=False, depth=30)
_STREAM = Quality(reliable=False, depth=500)  # a best-effort reader meets every writer
_KEPT = 40  # pictures of a camera, for their content: enough for a median
_MOST_STATES = 500  # of which the policy's state is made: kinematics take a while
_MIN_RATE, _FEW = 0.5, 0.9  # of the rate that is needed: wrong below the first, doubtful below the second
_AHEAD_S = 0.02  # stamps may lie this far in the future: another clock, well synchronised
_ALIVE = "/_action/status"  # what every action server publishes
_BEYOND = 0.05  # rad or m outside of a joint's limits: play, and limits that were rounded


@dataclass(frozen=True)
class Finding:
    """One check. state: OK; DOUBT, worth a look; WRONG."""

    name: str
    state: str
    expected: str
    got: str
    remedy: str = ""


@dataclass(frozen=True)
class Topic:
    """What the graph says of a topic: how many publishers and subscribers of which type, ours left out."""

    publishers: Counter[str] = field(default_factory=Counter)
    subscribers: Counter[str] = field(default_factory=Counter)


@dataclass
class Stream:
    """Messages of one topic. came_ns: when each came, on the steady clock. ages_ns: graph time then, less its stamp."""

    came_ns: list[int] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)
    ages_ns: list[int] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)

    def note(self, stamp_ns: int, now: Now) -> None:
        self.came_ns.append(now.received_ns or now.steady_ns)
        self.stamps.append(stamp_ns)
        self.ages_ns.append(now.came_ns - stamp_ns)

    @property
    def rate_hz(self) -> float:
        """Messages per second between the first and the last one."""
        span = self.came_ns[-1] - self.came_ns[0] if len(self.came_ns) > 1 else 0
        return (len(self.came_ns) - 1) * NS_PER_S / span if span > 0 else 0.0


@dataclass
class Told:
    """What came on one topic of joint states. rows: stamp, positions float64[J]. missing: names that messages did not
    have; heard_names: what one of these had instead."""

    reader: JointTopic
    rows: list[tuple[int, np.ndarray]] = field(default_factory=list)
    missing: Counter[tuple[str, ...]] = field(default_factory=Counter)
    heard_names: tuple[str, ...] = ()

    def take(self, message: JointState) -> None:
        self.missing[tuple(self.reader.missing(message))] += 1
        try:
            self.rows.append((message.stamp_ns, self.reader.positions(message, finite=False)))
        except TransportError:
            self.heard_names = message.names

    def finite(self) -> tuple[np.ndarray, np.ndarray]:
        """Stamps int64[N], ascending, and positions float64[N, J] of the rows that are finite."""
        rows = sorted((row for row in self.rows if np.all(np.isfinite(row[1]))), key=lambda row: row[0])
        return np.array([stamp for stamp, _ in rows], np.int64), np.array([row for _, row in rows], np.float64)


class Live:
    """Hears the sensors of a robot. compressed: cameras on `<topic>/compressed`.

    subscriptions: what to listen to. streams: {topic: what came}. sizes: {camera: (height, width) of its pictures}.
    """

    def __init__(self, robot: Embodiment, compressed: bool = False):
        self.robot = robot
        found = [pictures_of(camera.topic, compressed, _PICTURES) for camera in robot.cameras]
        self.cameras = {endpoint.topic: camera for endpoint, camera in zip(found, robot.cameras)}
        self.joints = {t.topic: Told(t) for t in joint_topics(robot, robot.action_space == "osc_delta")}
        told = [replace(joints.reader.endpoint, quality=_STREAM) for joints in self.joints.values()]
        self.subscriptions: tuple[Endpoint, ...] = (*found, *told)
        self.streams = {endpoint.topic: Stream() for endpoint in self.subscriptions}
        self.sizes: dict[str, Counter[tuple[int, int]]] = {camera.name: Counter() for camera in robot.cameras}
        self.encodings: dict[str, Counter[str]] = {camera.name: Counter() for camera in robot.cameras}
        self._pictures = {camera.name: _Sample() for camera in robot.cameras}

    def on_message(self, topic: str, message: Message, now: Now) -> None:
        if isinstance(message, (Image, CompressedImage)) and topic in self.cameras:
            name = self.cameras[topic].name
            try:
                self.sizes[name][message.size] += 1
            except TransportError as error:
                self.on_reject(topic, str(error))
                return
            self.streams[topic].note(message.stamp_ns, now)
            self.encodings[name][message.encoding if isinstance(message, Image) else message.format] += 1
            self._pictures[name].offer(message)
        elif isinstance(message, JointState) and topic in self.joints:
            self.streams[topic].note(message.stamp_ns, now)
            self.joints[topic].take(message)

    def on_reject(self, topic: str, reason: str) -> None:
        if topic in self.streams:
            self.streams[topic].rejected[reason] += 1

    # ---- what it makes of them ----
    def states(self) -> tuple[np.ndarray, np.ndarray]:
        """Stamps int64[N], ascending, and states float64[N, S] of the finite joint states: of the first topic, and of
        the others what is nearest."""
        told, state = [(joints.reader, *joints.finite()) for joints in self.joints.values()], Body.of(self.robot).state
        stamps = told[0][1] if all(len(stamps) for _, stamps, _ in told) else np.empty(0, np.int64)
        stamps = stamps[:: -(-len(stamps) // _MOST_STATES) or 1]
        rows = [merged((reader, known[np.argmin(np.abs(s - at))]) for reader, s, known in told) for at in stamps]
        made = [row if state is None else state(row) for row in rows]
        return stamps, np.array(made, np.float64).reshape(len(made), self.robot.state_dim)

    def pictures(self, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """Stamps int64[N] and pictures uint8[N, H, W, 3] of the camera's most frequent size; those that cannot be
        decoded are left out."""
        stamps, found = [], []
        for message in self._pictures[camera].kept:
            try:
                if message.size == self.sizes[camera].most_common(1)[0][0]:
                    found.append(message.rgb())
                    stamps.append(message.stamp_ns)
            except TransportError:
                continue
        return np.array(stamps, np.int64), np.array(found, np.uint8)


class _Sample:
    """Some pictures of a stream of unknown length, evenly: when it is full, every second goes."""

    def __init__(self) -> None:
        self.kept: deque[Image | CompressedImage] = deque()
        self._every, self._count = 1, 0

    def offer(self, message: Image | CompressedImage) -> None:
        if self._count % self._every == 0:
            self.kept.append(message)
        self._count += 1
        if len(self.kept) >= _KEPT:
            self.kept = deque(list(self.kept)[::2])
            self._every *= 2


# ---- the graph ----
def check(
    live: Live, graph: Mapping[str, Topic], slop_s: float = 0.02, max_age_s: float = 0.5, names: Names | None = None,
    actions: bool = True,
) -> list[Finding]:  # fmt: skip
    """All that a robot's description says of its topics. graph: every topic that was found. slop_s, max_age_s: of the
    policy node. names: that our topics have in this graph. actions: see Outputs."""
    names, outputs = names or Names(), Outputs(live.robot, actions=actions)
    out: list[Finding] = []
    for topic, camera in live.cameras.items():
        name, stream = f"camera {camera.name}", live.streams[topic]
        out.append(_present(name, live, topic, graph, names))
        if stream.came_ns:
            out.append(_format(name, camera, live))
            out.append(_rate(f"{name} rate", stream, live.robot.rate_hz))
            out.append(_stamps(f"{name} stamps", stream, max_age_s))
    # Any picture must find a joint state within slop on either side.
    needed_hz = max(live.robot.rate_hz, 1 / (2 * slop_s) if slop_s else 0.0)
    for topic, told in live.joints.items():
        name, stream = told.reader.label, live.streams[topic]
        out.append(_present(name, live, topic, graph, names))
        if stream.came_ns:
            out.append(_names(told))
            out.append(_rate(f"{name} rate", stream, needed_hz))
            out.append(_stamps(f"{name} stamps", stream, max_age_s))
        if told.rows:
            out += _positions(live.robot, told)
    out += _together(live, slop_s)
    out += [_command(names(endpoint.topic), endpoint.type_name, graph) for endpoint in outputs.endpoints]
    return out + [_server(names(f"{name}{_ALIVE}"), kind, graph) for name, kind in outputs.actions]


def _present(name: str, live: Live, ours: str, graph: Mapping[str, Topic], names: Names) -> Finding:
    wanted, topic = next(e.type_name for e in live.subscriptions if e.topic == ours), names(ours)
    expected, found, stream = f"{wanted} on {topic}", graph.get(topic, Topic()).publishers, live.streams[ours]
    others = sorted(kind for kind in found if kind != wanted)
    if stream.rejected:
        reason, count = stream.rejected.most_common(1)[0]
        return Finding(name, WRONG, expected, f"{count} unusable: {reason}", "Correct its source.")
    if others:
        remedy = "Pass --compressed." if CompressedImage.type_name in others else "Correct the topic or its source."
        return Finding(name, WRONG, expected, f"{', '.join(others)} there", remedy)
    if not found and not stream.came_ns:
        alike = [t for t, seen in graph.items() if wanted in seen.publishers]
        if names(f"{ours}/compressed") in graph and not ours.endswith("/compressed"):
            remedy = "Only compressed pictures are there: pass --compressed."
        else:
            remedy = (
                f"Start its driver, or correct the topic. {nearest(topic, alike)}" if alike else "Start its driver."
            )
        return Finding(name, WRONG, expected, "no publisher", remedy)
    if not stream.came_ns:
        return Finding(name, WRONG, expected, "a publisher, and no message", "Look at the driver's log.")
    if found.total() > 1:
        return Finding(name, WRONG, expected, f"{found.total()} publishers", "End all but one of them.")
    return Finding(name, OK, expected, f"{len(stream.came_ns)} messages")


def _format(name: str, camera: Camera, live: Live) -> Finding:
    expected, sizes = f"{camera.height}x{camera.width}, or larger in that proportion", live.sizes[camera.name]
    kinds = ", ".join(live.encodings[camera.name])
    got = ", ".join(f"{height}x{width}" for height, width in sizes)
    if sizes and all(fits(*size, camera) for size in sizes):
        return Finding(f"{name} pictures", OK, expected, f"{got}, {kinds}")
    remedy = "Set the camera to this size, or correct the robot's file and train for it."
    return Finding(f"{name} pictures", WRONG, expected, f"{got}, {kinds}", remedy)


def _rate(name: str, stream: Stream, needed_hz: float) -> Finding:
    rate = stream.rate_hz
    gap = max(np.diff(stream.came_ns), default=0) / NS_PER_S
    state = WRONG if rate < _MIN_RATE * needed_hz else DOUBT if rate < _FEW * needed_hz else OK
    remedy = "" if state == OK else "Raise its rate; see whether the network or the machine is too busy."
    return Finding(name, state, f"{needed_hz:g} Hz or more", f"{rate:.1f} Hz, longest gap {gap * 1e3:.0f} ms", remedy)


def _stamps(name: str, stream: Stream, max_age_s: float) -> Finding:
    expected = f"ascending, {-_AHEAD_S * 1e3:.0f} to {max_age_s * 1e3:.0f} ms old"
    age = float(np.median(stream.ages_ns)) / NS_PER_S
    steps = np.diff(stream.stamps)
    got, clock = (
        f"{age * 1e3:.1f} ms old",
        "Synchronise the clocks (chrony, PTP), or pass --use-sim-time if /clock runs.",
    )
    if not any(stream.stamps):
        return Finding(name, WRONG, expected, "no stamps", "Let the driver stamp its messages.")
    if np.any(steps < 0):
        got = f"backwards by {-steps.min() / NS_PER_S:.3f} s, {int((steps < 0).sum())} times"
        return Finding(name, WRONG, expected, got, "One source, and a clock that is never set back.")
    if len(steps) and not np.any(steps):
        return Finding(name, WRONG, expected, "always the same stamp", "The driver repeats one message: restart it.")
    if not -_AHEAD_S <= age <= max_age_s:
        got = f"{-age:.3f} s in the future" if age < 0 else f"{age:.3f} s old"
        return Finding(name, WRONG, expected, got, clock)
    return Finding(name, OK, expected, got)


def _names(told: Told) -> Finding:
    name, expected = told.reader.label.replace("joint states", "joint names"), " ".join(told.reader.names)
    absent = [names for names in told.missing if names]
    if not absent:
        if not told.rows:
            return Finding(name, WRONG, expected, "names without positions", "Let the driver fill them.")
        return Finding(name, OK, expected, "all, by name")
    lost = sorted({name for names in absent for name in names})
    share = sum(count for names, count in told.missing.items() if names) / told.missing.total()
    have = " ".join(told.heard_names) or "none"
    got = f"{' '.join(lost)} missing in {100 * share:.0f} % of messages, which have {have}"
    if share < 1:
        remedy = "Several sources share the topic: merge them (joint_state_broadcaster, joint_state_publisher)."
    else:
        remedy = f"Correct the names in the robot's file. {nearest(lost[0], told.heard_names)}"
    return Finding(name, WRONG, expected, got, remedy)


def _positions(robot: Embodiment, told: Told) -> list[Finding]:
    """Finite, and within the joints' limits; a state vector has none."""
    name, table = told.reader.label.replace("joint states", "joint positions"), np.stack([row for _, row in told.rows])
    if not np.all(np.isfinite(table)):
        bad = [said for said, column in zip(told.reader.names, table.T) if not np.all(np.isfinite(column))]
        return [Finding(name, WRONG, "finite", f"NaN or infinity in {' '.join(bad)}", "Fix the driver.")]
    out, limits = [], {joint.name: joint for joint in robot.joints}
    for at, value in zip(told.reader.joints, np.median(table, axis=0).tolist()):
        if (joint := limits.get(at)) is None:
            continue
        if joint.lower - _BEYOND <= value <= joint.upper + _BEYOND:
            continue
        gripper = known.is_gripper(joint.name)
        causes = known.explanations(value, joint.lower, joint.upper, _BEYOND, not gripper, gripper)
        remedy = f"Perhaps {' or '.join(causes)}." if causes else "Calibrate it, or correct the limits."
        expected = f"{joint.lower:g} to {joint.upper:g}"
        out.append(
            Finding(f"joint {joint.name}", WRONG, expected, f"{value:.4g}", remedy.replace(" trained", " meant"))
        )
    if not out:
        expected = "within the limits" if set(told.reader.joints) <= set(limits) else "finite"
        out.append(Finding(name, OK, expected, "all of them"))
    return out


def _together(live: Live, slop_s: float) -> list[Finding]:
    """Whether the policy would find observations: of how many pictures of the first camera."""
    if not live.cameras:
        return []
    first, *others = (live.streams[topic] for topic in live.cameras)
    sources = [np.sort(s.stamps) for s in (*others, *(live.streams[topic] for topic in live.joints))]
    if not first.stamps or any(not len(stamps) for stamps in sources):
        return []
    stamps = np.array(first.stamps)
    # What lies at the ends of the time that was heard may have its partner outside.
    inner = (stamps >= max(s[0] for s in sources)) & (stamps <= min(s[-1] for s in sources))
    if not inner.any():
        return [Finding("observations", WRONG, "stamps of one time", "none in common", "Synchronise the clocks.")]
    far = np.max([_distance(other, stamps[inner]) for other in sources], axis=0)
    share = float(np.mean(far <= slop_s * NS_PER_S))
    got = f"{100 * share:.0f} % of pictures, the others up to {far.max() / 1e6:.0f} ms from it"
    state = WRONG if share < _MIN_RATE else DOUBT if share < _FEW else OK
    remedy = "" if state == OK else "Trigger the cameras together, or raise the policy node's slop."
    return [Finding("observations", state, f"all sensors within {slop_s * 1e3:g} ms of the first camera", got, remedy)]


def _distance(stamps: np.ndarray, to: np.ndarray) -> np.ndarray:
    """int64[T]: from each time to the nearest of the sorted stamps."""
    right = np.searchsorted(stamps, to).clip(max=len(stamps) - 1)
    left = (right - 1).clip(min=0)
    return np.minimum(np.abs(stamps[right] - to), np.abs(stamps[left] - to))


def _command(topic: str, type_name: str, graph: Mapping[str, Topic]) -> Finding:
    name, expected = f"commands {topic}", f"a controller that takes {type_name}"
    found = graph.get(topic, Topic())
    others = sorted(kind for kind in found.subscribers if kind != type_name)
    if others:
        return Finding(name, WRONG, expected, f"one of {', '.join(others)}", "Correct `outputs` in the robot's file.")
    if not found.subscribers:
        return Finding(name, WRONG, expected, "nobody listens", "Start the controller, or correct the topic.")
    if found.publishers:
        got = f"{found.publishers.total()} others send commands"
        return Finding(name, DOUBT, expected, got, "End them before the gate starts.")
    return Finding(name, OK, expected, "it listens")


def _server(topic: str, kind: str, graph: Mapping[str, Topic]) -> Finding:
    name, there = topic.removesuffix(_ALIVE), graph.get(topic, Topic()).publishers
    got = "it is there" if there else "none"
    remedy = "" if there else "Start its server, or correct `outputs` in the robot's file."
    return Finding(f"action {name}", OK if there else WRONG, f"a server of {kind}", got, remedy)


# ---- content ----
def check_content(live: Live, content: DataContent | None) -> list[Finding]:
    """Whether pictures and states are like those of the policy's training data."""
    if content is None:
        remedy = "vla calibrate content --policy BUNDLE --data DATASET"
        return [Finding("content", DOUBT, "what the training data looks like", "the bundle has none", remedy)]
    stamps, states = live.states()
    if not len(states):
        return [Finding("content", WRONG, "joint states", "none that can be used", "See joint states.")]
    out = _values(known.values(content, states))
    if any(f.state == WRONG for f in out):  # what a picture should be like follows from the state
        return [*out, Finding("camera content", DOUBT, "a state as trained", "not judged", "Correct the state first.")]
    return out + [_seen(live, content, name, stamps, states) for name in live.sizes]


def _values(values: Sequence[known.Value]) -> list[Finding]:
    out = []
    for value in values:
        r = value.range
        expected, got = f"{r.min:.4g} to {r.max:.4g}, as trained", f"{value.value:.4g}"
        if not value.inside:
            start = f"{r.first_min:.4g} to {r.first_max:.4g}"
            remedy = f"Perhaps {' or '.join(value.causes)}." if value.causes else (
                f"Put the arm where episodes began ({start}) and ask again; else its zero is off.")  # fmt: skip
            out.append(Finding(f"state {value.name}", WRONG, expected, got, remedy))
        elif value.flipped:
            expected = f"{r.first_min:.4g} to {r.first_max:.4g}, where episodes began"
            out.append(
                Finding(f"state {value.name}", DOUBT, expected, got, "Closed or flipped? Open it and ask again.")
            )
    return out or [Finding("state", OK, "within the training data", f"all {len(values)} values")]


def _seen(live: Live, content: DataContent, name: str, stamps: np.ndarray, states: np.ndarray) -> Finding:
    line, expected = f"camera {name} content", "pictures like those of the training data"
    if name not in content.cameras:
        return Finding(line, DOUBT, expected, "the policy does not use it")
    taken, pictures = live.pictures(name)
    if not len(pictures):
        return Finding(line, WRONG, expected, "none that can be used", f"See camera {name}.")
    nearest_states = states[[int(np.argmin(np.abs(stamps - stamp))) for stamp in taken]]
    seen = known.look(content, name, pictures, nearest_states)
    got = f"misfit {seen.misfit:.2f}, up to {seen.limit:.2f} is usual"
    if seen.kind == known.BLANK:
        return Finding(line, WRONG, expected, "all of one colour", "Take off the cap, or restart its driver.")
    if seen.kind == known.UNLIKE:
        remedy = "Compare view, focus and light with the training data; was the camera moved?"
        return Finding(line, WRONG, expected, f"unlike any: {got}", remedy)
    if seen.kind == known.CHANGED:
        words = " or ".join(_say(name, *explanation) for explanation in seen.explanations[:3])
        return Finding(line, WRONG, expected, words, "Correct topics, mounting or encoding, in this order.")
    own = [view for other, view in seen.untold if other == name]
    note = f"; {', '.join(own[:3])}: cannot be told here" if own else ""
    return Finding(line, OK, expected, got + note)


def _say(camera: str, other: str, view: str) -> str:
    if other == camera:
        return view
    return f"what camera {other} showed" + ("" if view == known.AS_TRAINED else f", {view}")
