"""A recording as the signals of one robot: what was seen, where the joints were, what was commanded, what was said.

Clocks. Pictures and joint states carry stamps of the machine that took them; commands, marks and instructions carry
none, and for these the time of reception counts. `clock` says how the two meet:

    stamps     stamps as they are; refused when they are not of the recorder's clock (see CLOCK_RANGE_S)
    aligned    each topic's stamps are shifted so that its fastest message took no time
    received   times of reception for everything: for drivers that do not stamp, or stamp wrongly
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ros_nodes.bag import Bag
from ros_nodes.joints import JointTopic, joint_topics
from ros_nodes.messages import (
    CompressedImage,
    Image,
    JointState,
    Message,
    Text,
    Trajectory,
    Values,
    decode,
    from_stamp,
)
from ros_nodes.node import INSTRUCTION, RECORD
from ros_nodes.recorder_node import read_mark
from vla.data.actions import Commands, CommandSet, Sent
from vla.data.transforms import fits, resize
from vla.embodiment import Camera, Embodiment
from vla.errors import ConfigError, DataError, TransportError, explain, nearest
from vla.types import NS_PER_S

CLOCKS = ("stamps", "aligned", "received")
# Received minus stamped, median of a topic: earlier than it was stamped, or later than any camera takes, is a message
# of another clock.
CLOCK_RANGE_S = (-0.02, 0.5)
MAX_BACK_S = 0.1  # stamps that go back further than this are a clock that jumped
POSITIONS = ("positions", "trajectory")  # kinds of outputs that put joint positions on a topic
COMMAND_TYPES = (Values.type_name, Trajectory.type_name, JointState.type_name)


@dataclass(frozen=True)
class Signal:
    """Joints of one topic. stamps: int64[N], ascending. values: float64[N, J]."""

    topic: JointTopic
    stamps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Track:
    """Frames of one camera. stamps: int64[N], ascending. message: int64[N], which of the topic's messages each is.
    log_ns: int64[M], times of reception of all its messages, in the order of the recording."""

    camera: Camera
    topic: str
    type_name: str
    stamps: np.ndarray
    message: np.ndarray
    log_ns: np.ndarray


class Recording:
    """The signals of `robot` in an open bag.

    resize_frames: frames of another size than the embodiment says are scaled instead of refused. needs_commands: joints
    whose commands are on no topic are a reason to refuse. Raises DataError that names every topic that is missing, of
    another type or unusable, all of them at once.

    tracks: {camera: Track}. joints: a Signal per topic of joint states, together all of `Embodiment.command_names`, or
    the state vector for robots that publish it. commands: of the joints that are commanded on topics. instructions,
    marks: in order of time. start_ns, stop_ns: of all of it. notes: what was ignored.
    """

    def __init__(
        self,
        bag: Bag,
        robot: Embodiment,
        clock: str = "stamps",
        resize_frames: bool = False,
        needs_commands: bool = True,
    ) -> None:
        if clock not in CLOCKS:
            raise ConfigError(f"clock: {clock!r} is unknown. {nearest(clock, CLOCKS)}")
        self.bag, self.robot = bag, robot
        self._clock, self._resize = clock, resize_frames
        self._problems: dict[str, str] = {}
        self._logs: dict[str, list[int]] = {}
        self._stamps: dict[str, list[int]] = {}
        self._rows: dict[str, list[np.ndarray]] = {}
        self._sent: dict[str, list[Sent]] = {}
        self.instructions: list[tuple[int, str]] = []
        self.marks: list[tuple[int, str]] = []
        self.notes: list[str] = []
        self.start_ns, self.stop_ns = 2**63 - 1, -(2**63)

        self._joints = {topic.topic: topic for topic in joint_topics(robot, robot.action_space == "osc_delta")}
        handlers: dict[str, Callable[[str, int, bytes], None]] = {
            INSTRUCTION.topic: self._on_text,
            RECORD.topic: self._on_text,
        }
        cameras = {camera.name: self._camera_topic(camera) for camera in robot.cameras}
        handlers |= {topic: self._on_frame for topic in cameras.values()}
        for topic in self._joints:
            if self._find(topic, (JointState.type_name,)):
                handlers[topic] = self._on_joints
        self._sinks: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {}
        for sink in robot.sinks:
            names = sink.joints or robot.command_names
            if sink.kind not in POSITIONS:
                if needs_commands:
                    self._problem(sink.topic, f"{sink.kind} is no position on a topic. Pass --measured for {names}.")
            elif (needs_commands or self._has(sink.topic)) and self._find(sink.topic, COMMAND_TYPES):
                places = np.array([robot.command_names.index(name) for name in names])
                self._sinks[sink.topic], handlers[sink.topic] = (places, sink.names or names), self._on_command
        self._stop_if_unusable()

        self._sizes = {topic: robot.camera(name) for name, topic in cameras.items()}
        for topic, log_ns, data in bag.messages(handlers):
            self.start_ns, self.stop_ns = min(self.start_ns, log_ns), max(self.stop_ns, log_ns)
            try:
                handlers[topic](topic, log_ns, data)
            except TransportError as error:
                self._problem(topic, str(error))
        self._stop_if_unusable()
        self.tracks = {name: self._track(robot.camera(name), topic) for name, topic in cameras.items()}
        self.joints = [self._signal(topic) for topic in self._joints]
        streams = [(places, Commands(self._sent.get(topic, []))) for topic, (places, _) in self._sinks.items()]
        self.commands = CommandSet(streams, len(robot.command_names))
        self._stop_if_unusable()

    # ---- which topics ----
    def _has(self, topic: str) -> bool:
        return topic in self.bag.topics and self.bag.topics[topic].messages > 0

    def _camera_topic(self, camera: Camera) -> str:
        """The camera's own topic, else the compressed one beside it."""
        compressed = f"{camera.topic}/compressed"
        if self._has(compressed) and not self._has(camera.topic):
            self._find(compressed, (CompressedImage.type_name,))
            return compressed
        self._find(camera.topic, (Image.type_name, CompressedImage.type_name), f" (nor on {compressed})")
        return camera.topic

    def _find(self, topic: str, kinds: Sequence[str], also: str = "") -> bool:
        """Whether the bag has messages of one of these types there; notes why not."""
        if topic not in self.bag.topics:
            self._problem(topic, f"no such topic{also}; there are {', '.join(sorted(self.bag.topics)) or 'none'}")
        elif not self.bag.topics[topic].messages:
            self._problem(topic, f"no messages{also}")
        elif self.bag.topics[topic].type_name not in kinds:
            got = self.bag.topics[topic].type_name or "several types"
            self._problem(topic, f"expected {' or '.join(kinds)}, got {got}")
        else:
            return True
        return False

    def _problem(self, topic: str, what: str) -> None:
        self._problems.setdefault(topic, what)  # the first one of a topic says enough

    def _stop_if_unusable(self) -> None:
        if self._problems:
            raise DataError("; ".join(f"{topic}: {what}" for topic, what in self._problems.items()))

    # ---- messages ----
    def _decoded(self, topic: str, data: bytes) -> Message:
        return decode(self.bag.topics[topic].type_name, data)

    def _note(self, topic: str, log_ns: int, stamp_ns: int) -> None:
        self._logs.setdefault(topic, []).append(log_ns)
        self._stamps.setdefault(topic, []).append(stamp_ns)

    def _on_frame(self, topic: str, log_ns: int, data: bytes) -> None:
        if self.bag.topics[topic].type_name == CompressedImage.type_name:
            try:  # decompressed only when it is wanted; every stamped message begins with its stamp
                self._note(topic, log_ns, from_stamp(*struct.unpack_from("<iI", data, 4)))
            except struct.error as error:
                raise TransportError(f"a message of {len(data)} bytes") from error
            return
        message = self._decoded(topic, data)
        assert isinstance(message, Image)
        self._check_size(topic, message.pixels)
        self._note(topic, log_ns, message.stamp_ns)

    def _check_size(self, topic: str, pixels: np.ndarray) -> None:
        camera, (height, width) = self._sizes[topic], pixels.shape[:2]
        if (height, width) != (camera.height, camera.width) and not self._resize:
            expected = f"{camera.height}x{camera.width} as {self.robot.name} says"
            remedy = "Pass --resize to scale them."
            if not fits(height, width, camera):
                remedy += " A policy node will refuse this camera: for a robot, state its own size in the robot's file."
            raise TransportError(explain("image", expected, f"{height}x{width}", remedy))

    def _on_joints(self, topic: str, log_ns: int, data: bytes) -> None:
        message, joints = self._decoded(topic, data), self._joints[topic]
        assert isinstance(message, JointState)
        if set(message.names).isdisjoint(joints.names):  # of another arm
            return
        self._rows.setdefault(topic, []).append(joints.positions(message, finite=False))
        self._note(topic, log_ns, message.stamp_ns)

    def _on_command(self, topic: str, log_ns: int, data: bytes) -> None:
        message, names = self._decoded(topic, data), self._sinks[topic][1]
        times, positions = np.array([log_ns]), np.empty((0, 0))
        if isinstance(message, Values):
            if message.data.shape != (len(names),):
                raise TransportError(explain("data", f"values of {list(names)}", len(message.data), "Check the robot."))
            positions = message.data[None]
        elif isinstance(message, (Trajectory, JointState)):
            missing = [name for name in names if name not in message.names]
            if missing or not len(message.positions):
                raise TransportError(
                    explain("joint names", f"positions of {list(names)}", f"none of {missing}", "Check the robot.")
                )
            positions = np.atleast_2d(message.positions)[:, [message.names.index(name) for name in names]]
            if isinstance(message, Trajectory):
                # It runs from its stamp on; a stamp of zero means at once.
                stamped = message.stamp_ns > 0 and self._clock == "stamps"
                start_ns = message.stamp_ns if stamped else log_ns
                times = start_ns + np.array(message.times_ns, np.int64)
        self._sent.setdefault(topic, []).append(Sent(log_ns, times, positions))

    def _on_text(self, topic: str, log_ns: int, data: bytes) -> None:
        if self.bag.topics[topic].type_name != Text.type_name:
            raise TransportError(f"expected {Text.type_name}, got {self.bag.topics[topic].type_name}")
        message = self._decoded(topic, data)
        assert isinstance(message, Text)
        if topic == INSTRUCTION.topic:
            self.instructions.append((log_ns, message.data))
            return
        try:
            self.marks.append((log_ns, read_mark(message.data)))
        except TransportError as error:  # a slip of the operator is no reason to lose the rest
            self.notes.append(f"ignored: {error}")

    # ---- signals ----
    def _times(self, topic: str) -> np.ndarray:
        """int64[N]: when each message was true, by the chosen clock, in the order of the recording."""
        log_ns, stamps = np.array(self._logs[topic], np.int64), np.array(self._stamps[topic], np.int64)
        if self._clock == "received":
            return log_ns
        if np.any(stamps <= 0):
            self._problem(topic, "messages without a stamp. Pass --clock received, or let the driver stamp them.")
            return log_ns
        back_ns = int(np.max(-np.diff(stamps), initial=0))
        if back_ns > MAX_BACK_S * NS_PER_S:
            self._problem(topic, f"its stamps jump back by {back_ns / NS_PER_S:.3f} s: its clock was set")
        lag_ns = log_ns - stamps
        if self._clock == "aligned":
            return stamps + lag_ns.min()
        typical_s = float(np.median(lag_ns)) / NS_PER_S
        if not CLOCK_RANGE_S[0] <= typical_s <= CLOCK_RANGE_S[1]:
            self._problem(
                topic,
                f"received {typical_s:.3f} s after it was stamped: the clocks differ. Synchronise them, or pass "
                "--clock aligned (shift the stamps) or --clock received.",
            )
        return stamps

    def _track(self, camera: Camera, topic: str) -> Track:
        times = self._times(topic)
        stamps, message = np.unique(times[::-1], return_index=True)  # of two with one stamp, the later one counts
        log_ns = np.array(self._logs[topic], np.int64)
        return Track(camera, topic, self.bag.topics[topic].type_name, stamps, len(times) - 1 - message, log_ns)

    def _signal(self, topic: str) -> Signal:
        joints = self._joints[topic]
        if topic not in self._rows:
            self._problem(topic, f"expected positions of {list(joints.names)}, got none of them")
            return Signal(joints, np.empty(0, np.int64), np.empty((0, len(joints.names))))
        stamps, place = np.unique(self._times(topic)[::-1], return_index=True)
        return Signal(joints, stamps, np.stack(self._rows[topic])[::-1][place])

    # ---- pictures ----
    def frames(self, camera: str, places: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """uint8[H, W, 3] at the embodiment's size for each of `places` (of Track.stamps; ascending ones are cheap).

        Raises DataError for a picture that cannot be decoded.
        """
        track = self.tracks[camera]
        wanted = track.message[np.asarray(places, np.int64)]
        if not len(wanted):
            return
        # Messages come in the order of their reception, so a window of times holds a run of them; stamps may be in
        # another order, so pictures wait here until their turn.
        first, last = int(wanted.min()), int(wanted.max())
        ordered = not self.bag.incomplete
        start, stop = (int(track.log_ns[first]), int(track.log_ns[last]) + 1) if ordered else (None, None)
        number = int(np.searchsorted(track.log_ns, track.log_ns[first], side="left")) if ordered else 0
        uses, ready, turn = Counter(wanted.tolist()), dict[int, np.ndarray](), 0
        for _, _, data in self.bag.messages([track.topic], start, stop):
            if uses[number]:
                ready[number] = self._picture(track, data)
            number += 1
            while turn < len(wanted) and int(wanted[turn]) in ready:
                place = int(wanted[turn])
                yield ready[place]
                turn += 1
                uses[place] -= 1
                if not uses[place]:
                    del ready[place]
        if turn < len(wanted):
            raise DataError(explain(track.topic, f"{len(wanted)} pictures", turn, "The recording changed; try again."))

    def _picture(self, track: Track, data: bytes) -> np.ndarray:
        try:
            message = decode(track.type_name, data)
            assert isinstance(message, (Image, CompressedImage))
            rgb = message.rgb()
            self._check_size(track.topic, rgb)
        except TransportError as error:
            raise DataError(f"{track.topic}: {error}") from error
        return np.ascontiguousarray(resize(rgb, track.camera.height, track.camera.width))

    def said(self, at_ns: int) -> str:
        """The newest instruction that is not later than `at_ns`, "" when there is none."""
        words = ""
        for log_ns, text in self.instructions:
            if log_ns > at_ns:
                break
            words = text
        return words
