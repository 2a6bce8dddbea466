"""Recorder node: the topics of one robot, as they come on the wire, into a rosbag2 recording (see ros_nodes/bag.py).

    python -m ros_nodes.recorder_node --embodiment tabletop --out recordings
    python -m ros_nodes.recorder_node --embodiment tabletop --out recordings --wait
    ros2 topic pub --once /vla/record std_msgs/msg/String "data: start"

/vla/record takes one word: `start` and `stop` bracket an episode, `discard` ends one that shall not be used. Without
`--wait` everything from the beginning of this process to Ctrl-C is one recording with these marks in it; with it,
nothing is written until `start`, and every episode is a recording of its own. Ctrl-C ends an open episode and the
recording. The newest message of every latched topic is repeated at the beginning of each recording.

The disk. A worker thread writes; the queue in front of it is bounded. When it is full, pictures are dropped first, then
everything; drops are counted by topic, on /vla/record/status and in the recording. With less than `--min-free` left the
recording is completed and closed, and none begins. When a write fails, or the process is killed, what was written stays
under a name that ends with `.incomplete`, and can be read up to its last whole chunk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ros_nodes import entry
from ros_nodes.bag import INCOMPLETE, BagWriter
from ros_nodes.joints import joint_topics
from ros_nodes.messages import (
    ERROR,
    OK,
    WARN,
    Diagnostics,
    Message,
    Raw,
    Status,
    Text,
    decode,
    encode,
)
from ros_nodes.node import (
    CHUNK,
    CONTROL,
    CONTROL_STATUS,
    DEADMAN,
    DIAGNOSTICS,
    EMERGENCY_STOP,
    HEARTBEAT,
    INSTRUCTION,
    RECORD,
    RECORD_STATUS,
    REQUEST,
    SIM_STATUS,
    STATE_VECTOR,
    Effects,
    Endpoint,
    Job,
    Now,
    Periodic,
    Quality,
    Send,
    pictures_of,
)
from ros_nodes.outputs import Outputs
from vla.embodiment import Embodiment
from vla.errors import ConfigError, TransportError, explain, nearest
from vla.types import NS_PER_S, ControlMode

MARKS = ("start", "stop", "discard")
LARGE_BYTES = 1 << 16  # messages from here on are dropped first
SMALL_SHARE = 1.25  # small messages are kept until the queue is this much over its limit
REPORT_NS = 500_000_000
SPACE_CHECK_S = 1.0
CLOSE_WAIT_S = 20.0  # how long the end may wait for a write that hangs
# Deep enough for a second of the interpreter's absence; the newest survive.
_PICTURES = Quality(reliable=False, depth=30)
_STREAM = Quality(reliable=True, depth=500)
_SENSED = Quality(reliable=False, depth=500)  # drivers may publish it as sensor data


def read_mark(text: str) -> str:
    """The word on /vla/record, one of MARKS; JSON says it as {"op": word}. TransportError for anything else."""
    word = text.strip()
    if word.startswith("{"):
        word = str(Text(word).object().get("op", ""))
    if word not in MARKS:
        raise TransportError(f"{RECORD.topic}: {word[:40]!r} is unknown. {nearest(word[:40], MARKS)}")
    return word


def robot_topics(robot: Embodiment, compressed: bool = False) -> tuple[Endpoint, ...]:
    """What is recorded of a robot: cameras, joint states, commands, and everything our nodes say.

    compressed: sensor_msgs/CompressedImage on `<camera topic>/compressed` instead of pictures as they are.
    """
    cameras = (pictures_of(camera.topic, compressed, _PICTURES) for camera in robot.cameras)
    vector = (STATE_VECTOR,) if robot.control_mode is ControlMode.OSC_DELTA else ()
    states = (*(topic.endpoint for topic in joint_topics(robot)), *vector)
    ours = (
        INSTRUCTION, REQUEST, CHUNK, HEARTBEAT, CONTROL, CONTROL_STATUS, DIAGNOSTICS, RECORD, SIM_STATUS,
        EMERGENCY_STOP, DEADMAN,
    )  # fmt: skip
    streams = (
        *(replace(endpoint, quality=_SENSED) for endpoint in states),
        *(replace(endpoint, quality=_STREAM) for endpoint in Outputs(robot).endpoints),
    )
    return (*cameras, *streams, *ours)


class RecorderCore:
    """endpoints: what to record; /vla/record is always among them. out: folder of the recordings, name: what theirs
    begin with. wait: record episodes only. simulated: stamps are /clock's. queue_bytes: bound of the queue in memory.
    min_free_bytes: of the disk. facts: noted in every recording, strings.

    bags: recordings that are complete. left: folders of those that are not.
    """

    name = "vla_recorder"

    def __init__(
        self,
        endpoints: Collection[Endpoint],
        out: Path,
        name: str = "vla",
        wait: bool = False,
        simulated: bool = False,
        distro: str = "jazzy",
        compression: str = "none",
        queue_bytes: int = 256 << 20,
        min_free_bytes: int = 1 << 30,
        facts: dict[str, str] | None = None,
    ):
        unique = {endpoint.topic: endpoint for endpoint in (*endpoints, RECORD)}
        self._endpoints = tuple(unique.values())
        self.subscriptions = tuple(replace(endpoint, raw=True) for endpoint in self._endpoints)
        self.publications = (RECORD_STATUS, DIAGNOSTICS)
        self._out, self._name, self._wait, self._simulated = Path(out), name, wait, simulated
        self._distro, self._compression = distro, compression
        self._limit, self._min_free = queue_bytes, min_free_bytes
        self._facts = dict(facts or {})
        self._kept: dict[str, bytes] = {}  # newest message of each latched topic
        self._latched = {endpoint.topic for endpoint in self._endpoints if endpoint.quality.latched}
        self._reports = Periodic(REPORT_NS)
        self._recording = self._episode = False
        self._number = 0  # of recordings that were begun
        self._fault = self._refusal = ""
        self._early = 0  # messages before simulated time began
        self._received = 0
        self._reported = ("", 0)
        self.dropped: dict[str, int] = {}
        self._lost: dict[str, int] = {}  # the same, of this recording
        self.episodes = 0
        self.bags: list[Path] = []
        self.left: list[Path] = []
        # Between this thread and the worker: operations in order, and how many bytes they hold.
        self._queue: deque[tuple[str, Any]] = deque()
        self._queued_bytes = 0
        self._bytes_lock, self._write_lock = threading.Lock(), threading.Lock()
        self._busy = False
        self._writer: BagWriter | None = None  # the worker's, as what follows
        self._writing = 0  # number of the recording
        self._checked_s = 0.0
        self._failures: deque[tuple[int, str]] = deque()  # (number of the recording, why it ended), for this thread

    @property
    def next_tick_ns(self) -> int:
        return self._reports.next_ns

    # ---- messages in ----
    def on_message(self, topic: str, message: Message, now: Now) -> Effects:
        assert isinstance(message, Raw)
        # When it came, on the graph's clock; simulated time stands between two /clock messages.
        waited_ns = max(0, now.steady_ns - now.received_ns) if now.received_ns and not self._simulated else 0
        log_ns = now.stamp_ns - waited_ns
        mark = self._mark(message) if topic == RECORD.topic else ""
        if log_ns <= 0:
            self._early += 1
            self._keep(topic, message)
            return ()
        self._settle()
        if not self._recording and (mark == "start" or not (self._wait or self._number)):
            self._begin(log_ns)
        self._put(topic, log_ns, message.data)
        self._keep(topic, message)
        if mark:
            self._follow(mark)
        return self._work()

    def _keep(self, topic: str, message: Raw) -> None:
        if topic in self._latched:
            self._kept[topic] = message.data

    def _mark(self, message: Raw) -> str:
        try:
            text = decode(Text.type_name, message.data, self._distro)
            assert isinstance(text, Text)
            self._refusal = ""
            return read_mark(text.data)
        except TransportError as error:
            self._refusal = str(error)
            return ""

    def _follow(self, mark: str) -> None:
        if mark == "start":
            self._episode = True
        elif self._episode:
            self._episode = False
            self.episodes += mark == "stop"
            if self._wait:
                self._end(mark)

    def on_reject(self, topic: str, reason: str, now: Now) -> Effects:
        return ()

    def on_result(self, name: str, value: Any, now: Now) -> Effects:
        """The worker has written what there was."""
        self._busy = False
        if isinstance(value, Exception):
            raise value  # everything the disk can do is a result: this is a fault of ours
        self._settle()
        changed = (self.state, len(self.bags)) != self._reported
        return (*(self._report(now) if changed else ()), *self._work())

    # ---- recordings ----
    def _begin(self, log_ns: int) -> None:
        self._recording, self._fault, self._lost = True, "", {}
        self._number += 1
        self._queue.append(("open", (self._number, log_ns)))
        for topic, data in self._kept.items():
            self._put(topic, log_ns, data)

    def _put(self, topic: str, log_ns: int, data: bytes) -> None:
        if not self._recording:
            return
        limit = self._limit if len(data) >= LARGE_BYTES else self._limit * SMALL_SHARE
        with self._bytes_lock:
            if self._queued_bytes + len(data) > limit:
                for counts in (self.dropped, self._lost):
                    counts[topic] = counts.get(topic, 0) + 1
                return
            self._queued_bytes += len(data)
        self._received += 1
        self._queue.append(("write", (topic, log_ns, data)))

    def _end(self, why: str) -> None:
        self._recording = False
        self._queue.append(("close", why))

    def _settle(self) -> None:
        """Take note of recordings that the worker had to end."""
        while self._failures:
            number, self._fault = self._failures.popleft()
            if number == self._number:
                self._recording = self._episode = False

    def _work(self) -> Effects:
        if self._busy or not self._queue:
            return ()
        self._busy = True
        return (Job("write", self._drain),)

    # ---- on the worker thread ----
    def _drain(self) -> None:
        with self._write_lock:
            while self._queue:
                kind, value = self._queue.popleft()
                if kind == "write":
                    with self._bytes_lock:
                        self._queued_bytes -= len(value[2])
                self._attempt(getattr(self, f"_{kind}"), value)
            if self._writer is not None:
                self._attempt(self._writer.flush)

    def _attempt(self, act: Callable[..., object], *arguments: Any) -> None:
        """What the disk refuses ends the recording, whose folder keeps its incomplete name."""
        try:
            act(*arguments)
        except OSError as error:
            why = f"{type(error).__name__}: {error}"
            self._fail(explain("recording", "a disk that takes it", why, "Free or replace the disk, then start again."))
            if self._writer is not None:
                self.left.append(self._writer.abort())
                self._writer = None

    def _fail(self, why: str) -> None:
        self._failures.append((self._writing, why))

    def _open(self, value: tuple[int, int]) -> None:
        self._writing, log_ns = value
        self._out.mkdir(parents=True, exist_ok=True)
        if not self._has_space():
            return
        base = f"{self._name}_{time.strftime('%Y_%m_%d-%H_%M_%S', time.gmtime(log_ns / NS_PER_S))}"
        taken = {path.name.removesuffix(INCOMPLETE) for path in self._out.iterdir()}
        names = (base, *(f"{base}_{number}" for number in range(2, len(taken) + 3)))
        name = next(name for name in names if name not in taken)
        self._writer = BagWriter(self._out / name, self._endpoints, self._distro, self._compression)

    def _write(self, value: tuple[str, int, bytes]) -> None:
        if self._writer is None:  # this recording was given up
            return
        self._writer.write(*value)
        if time.monotonic() - self._checked_s > SPACE_CHECK_S and not self._has_space():
            self._close("disk full")

    def _has_space(self) -> bool:
        self._checked_s = time.monotonic()
        free = shutil.disk_usage(self._out).free
        if free >= self._min_free:
            return True
        expected = f"{self._min_free >> 20} MiB free"
        self._fail(explain(f"disk of {self._out}", expected, f"{free >> 20} MiB", "Free some, then start again."))
        return False

    def _close(self, why: str) -> None:
        if self._writer is None:
            return
        path = self._writer.close({**self._facts, "ended": why, "dropped": json.dumps(self._lost)})
        self._writer = None
        self.bags.append(path)

    # ---- reports ----
    def tick(self, now: Now) -> Effects:
        self._settle()
        if self._reports.due(now.steady_ns):
            return (*self._report(now), *self._work())
        return ()

    def status(self) -> Status:
        """What is on /diagnostics: an error when nothing can be recorded, a warning when messages were dropped."""
        fault = self._fault or self._refusal
        lost = sum(self.dropped.values())
        level = ERROR if self._fault else WARN if self._refusal or lost else OK
        text = fault or (f"{lost} messages dropped: the disk is too slow" if lost else self.state)
        values = {"state": self.state, "messages": str(self._received), "dropped": str(lost)}
        return Status(level, self.name, text, values)

    @property
    def state(self) -> str:
        """recording, waiting (for `start`, or for the first message) or stopped (see the fault)."""
        return "recording" if self._recording else "stopped" if self._fault else "waiting"

    def _report(self, now: Now) -> list[Send]:
        writer = self._writer
        self._reported = (self.state, len(self.bags))
        text = Text.of(
            state=self.state, episode=self._episode, episodes=self.episodes, messages=self._received,
            dropped=self.dropped, queued_mb=round(self._queued_bytes / 2**20, 1),
            bag=str(writer.path if writer is not None else self.bags[-1] if self.bags else ""),
            error=self._fault or self._refusal,
        )  # fmt: skip
        return [
            Send(RECORD_STATUS.topic, text),
            Send(DIAGNOSTICS.topic, Diagnostics(now.stamp_ns, (self.status(),))),
        ]

    # ---- the end ----
    def close(self, now: Now) -> Effects:
        if self._recording:
            if self._episode:  # Ctrl-C ends the episode, and the recording says so itself
                mark = encode(Text.of(op="stop", by="end of recording"), self._distro)
                self._put(RECORD.topic, max(now.stamp_ns, 1), bytes(mark))
                self.episodes += 1
            self._end("end of recording")
        if self._write_lock.acquire(timeout=CLOSE_WAIT_S):  # else the disk hangs: the folder stays incomplete
            self._write_lock.release()
            self._drain()
        self._settle()
        return ()

    def summary(self) -> dict[str, Any]:
        return {
            "messages": self._received,
            "dropped": dict(self.dropped),
            "before_clock": self._early,
            "episodes": self.episodes,
            "bags": [str(path) for path in self.bags],
            "incomplete": [str(path) for path in self.left],
            "fault": self._fault,
        }


# ---- command line ----
def parse_topic(text: str) -> Endpoint:
    """`/name:pkg/msg/Type` or `/name:pkg/msg/Type:best_effort`."""
    topic, _, rest = text.partition(":")
    kind, _, quality = rest.partition(":")
    if not topic.startswith("/") or kind.count("/") != 2 or quality not in ("", "best_effort", "latched"):
        raise ConfigError(
            explain("--topic", "/name:package/msg/Type, then :best_effort or :latched if need be", text, "Write so.")
        )
    return Endpoint(topic, kind, Quality(quality != "best_effort", 100, quality == "latched"))


def build(options: argparse.Namespace) -> RecorderCore:
    """The core that RECORDER of ros_nodes/settings.py describes."""
    from vla.resources import load_embodiment

    robot = load_embodiment(options.embodiment)
    topics = {e.topic: e for e in (*robot_topics(robot, options.compressed), *map(parse_topic, options.topic))}
    for topic in options.without:
        if topic not in topics:
            raise ConfigError(f"--without: {topic!r} is not recorded. {nearest(topic, topics)}")
        del topics[topic]
    return RecorderCore(
        topics.values(), Path(options.out), options.name or robot.name, options.wait, options.use_sim_time,
        options.distro, options.compression, round(options.queue * 2**20), round(options.min_free * 2**20),
        {"embodiment": json.dumps(robot.to_dict())},
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    return entry.on_wheel("recorder", arguments)


def report(core: RecorderCore) -> int:
    """Say what was recorded; 1 when something is missing of it."""
    for path in core.bags:
        print(path)
    for path in core.left:
        print(f"incomplete: {path}", file=sys.stderr)
    facts = core.summary()
    if facts["dropped"]:
        print(f"dropped: {facts['dropped']}", file=sys.stderr)
    if facts["fault"]:
        print(f"error: {facts['fault']}", file=sys.stderr)
    return 1 if core.left or facts["fault"] or not core.bags else 0


if __name__ == "__main__":
    sys.exit(entry.run(main))
