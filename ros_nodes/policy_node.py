"""Policy node: cameras, joint states and an instruction in; action chunks and a heartbeat out.

    python -m ros_nodes.policy_node --policy tabletop

It answers requests of the command node: the newest synchronised observation that is not older than the request asks
for goes to the policy, on a worker thread, which also decodes its pictures where they come compressed. Inputs that
cannot be used (a camera too small or of another proportion, a damaged picture, NaN, a missing joint, no instruction)
give no chunk; the heartbeat says why, and the node goes on. The heartbeat is sent by the thread that also receives, 20
times a second, and stays silent while one inference hangs for longer than `hang_limit_s`; docs/ros2.md says what its
values are.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ros_nodes import entry
from ros_nodes.joints import joint_topics, merged
from ros_nodes.messages import (
    ERROR,
    OK,
    WARN,
    CompressedImage,
    Diagnostics,
    Image,
    JointState,
    Message,
    Status,
    Text,
    chunk_to_trajectory,
)
from ros_nodes.node import (
    CHUNK,
    CONTROL_STATUS,
    DIAGNOSTICS,
    HEARTBEAT,
    HEARTBEAT_PERIOD_NS,
    INSTRUCTION,
    PICTURE_KEY,
    REQUEST,
    SENSOR,
    SPACING_KEY,
    STAMP_KEY,
    Effects,
    Job,
    Now,
    Periodic,
    Send,
    pictures_of,
)
from ros_nodes.reports import Faults
from ros_nodes.request import CONFIDENCE, ChunkId, Request
from vla.data.transforms import fits, fitted
from vla.embodiment import Embodiment
from vla.errors import ObservationError, TransportError, VlaError, explain
from vla.policy import InferContext, InferResult, Policy, infer
from vla.runtime.scheduler import observed_later
from vla.types import NS_PER_S, ActionChunk, Observation, check_instruction

COMMAND_SILENT_NS = 1_000_000_000
REPORT_PERIOD_NS = 200_000_000
_FRAMES_KEPT = 8  # per camera: enough to find one that fits the other cameras
_STATES_KEPT = 64  # 0.13 s at 500 Hz
_LATENCIES_KEPT = 20_000
_CHUNKS_SHOWN = 400  # the newest ones make the heartbeat's percentiles and shares
_PERCENTILES = (50, 95, 99)
_T = TypeVar("_T")
Picture = Image | CompressedImage
NOTE_KEY = "note."  # in the heartbeat: what the decoder tells of the last chunk


class _Unreadable(TransportError):
    """A compressed picture that turns out to be damaged when it is decoded."""

    def __init__(self, camera: str, reason: str):
        super().__init__(f"{camera}: {reason}")
        self.camera = camera


class _Chunk(NamedTuple):
    """first_action_ms: from the request's arrival to the chunk's departure, the wait for sensors included."""

    latency_ms: float
    first_action_ms: float
    passes: int
    reused: bool


class PolicyCore:
    """policy: what infers. state: joint positions float64[D], in command order, to float32[S]; None when the robot
    publishes its state vector on /state (embodiments without a kinematic model).

    slop_s: largest distance of any stamp from the first camera's in one observation, so two of the others may lie twice
    as far apart. max_age_s: oldest usable observation. compressed: hear sensor_msgs/CompressedImage on `<camera
    topic>/compressed`; topics that end so are heard so anyway. hang_limit_s: an inference that takes longer silences
    the heartbeat. first_number: of this process's chunks; far from those of any other policy, so that the command node
    can tell them apart. facts: what decides a chunk beside its inputs; the heartbeat says it, so that a recording knows
    (see ros_nodes.policies.facts_of).
    """

    name = "vla_policy"

    def __init__(
        self,
        policy: Policy,
        state: Callable[[np.ndarray], np.ndarray] | None,
        slop_s: float = 0.02,
        max_age_s: float = 0.5,
        hang_limit_s: float = 0.5,
        first_number: int = 0,
        facts: Mapping[str, str] | None = None,
        compressed: bool = False,
    ):
        self._facts = dict(facts or {})
        self._policy, self._state_of = policy, state
        self._robot: Embodiment = policy.embodiment
        self._slop_ns, self._max_age_ns = round(slop_s * NS_PER_S), round(max_age_s * NS_PER_S)
        self._hang_ns = round(hang_limit_s * NS_PER_S)
        self._period_ns = round(self._robot.period_s * NS_PER_S)
        pictures = [pictures_of(camera.topic, compressed) for camera in self._robot.cameras]
        self._cameras = {endpoint.topic: camera for endpoint, camera in zip(pictures, self._robot.cameras)}
        self._joints = {topic.topic: topic for topic in joint_topics(self._robot, state is None)}
        joints = [topic.endpoint for topic in self._joints.values()]
        self.subscriptions = (*pictures, *joints, INSTRUCTION, REQUEST, replace(CONTROL_STATUS, raw=True))
        self.publications = (CHUNK, HEARTBEAT, DIAGNOSTICS)
        self._beat, self._reports = Periodic(HEARTBEAT_PERIOD_NS), Periodic(REPORT_PERIOD_NS)
        self._commanded_ns: int | None = None  # steady time of the command node's last word, whatever it was
        self._frames: dict[str, deque[tuple[int, Picture]]] = {
            camera.name: deque(maxlen=_FRAMES_KEPT) for camera in self._robot.cameras
        }
        self._states: dict[str, deque[tuple[int, np.ndarray]]] = {
            topic: deque(maxlen=_STATES_KEPT) for topic in self._joints
        }
        self._instruction = ""
        self._faults = Faults()
        self._faults["instruction"] = "no instruction yet on /vla/instruction"
        self._waiting: Request | None = None
        self._waiting_since_ns = self._asked_ns = 0  # steady times: of the request that waits, of the one that runs
        self._running: tuple[Request, int] | None = None
        self._offsets_ns: tuple[int, ...] = ()  # of the observation that is being answered, see ChunkId
        self._episode: int | None = None
        self._previous: tuple[int, InferResult] | None = None
        self._chunks, self._first_number = 0, first_number
        self._latencies_ms: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._recent: deque[_Chunk] = deque(maxlen=_CHUNKS_SHOWN)
        self._last: dict[str, str] = {}
        self._reused: deque[tuple[int, str]] = deque(maxlen=_LATENCIES_KEPT)
        self._refused = 0

    @property
    def embodiment(self) -> Embodiment:
        return self._robot

    @property
    def message_bytes(self) -> int:
        """Of the pictures that are kept, and of those that DDS and the shell may hold."""
        picture_bytes = [3 * camera.height * camera.width for camera in self._robot.cameras]
        return (_FRAMES_KEPT + 2 * SENSOR.depth) * sum(picture_bytes)

    @property
    def next_tick_ns(self) -> int:
        return self._beat.next_ns

    # ---- messages in ----
    def on_message(self, topic: str, message: Message, now: Now) -> Effects:
        if isinstance(message, (Image, CompressedImage)):
            self._on_image(topic, message)
        elif isinstance(message, JointState):
            self._on_state(topic, message)
        elif topic == CONTROL_STATUS.topic:
            self._commanded_ns = now.steady_ns
            return ()
        elif topic == INSTRUCTION.topic and isinstance(message, Text):
            self._on_instruction(message.data)
        elif topic == REQUEST.topic and isinstance(message, Text):
            try:
                request = Request.read(message)
                if self._waiting is None:
                    self._waiting_since_ns = now.steady_ns
                self._waiting = request
            except TransportError as error:
                self._faults.reject(topic, str(error), now)
        return self._try_to_infer(now)

    def on_reject(self, topic: str, reason: str, now: Now) -> Effects:
        self._faults.reject(topic, reason, now)
        return ()

    def _on_image(self, topic: str, message: Picture) -> None:
        camera, fault = self._cameras[topic], ""
        try:
            height, width = message.size
            if not fits(height, width, camera):
                expected = f"{camera.height}x{camera.width}, or larger in that proportion"
                fault = explain(topic, expected, f"{height}x{width}", "Set the camera to the policy's size.")
        except TransportError as error:
            fault = f"{topic}: {error}"
        if fault:
            self._frames[camera.name].clear()
            self._faults[camera.name] = fault
            return
        self._faults.pop(camera.name, None)
        self._frames[camera.name].append((message.stamp_ns, message))

    def _on_state(self, topic: str, message: JointState) -> None:
        try:
            self._states[topic].append((message.stamp_ns, self._joints[topic].positions(message)))
            self._faults.pop(topic, None)
        except TransportError as error:
            self._states[topic].clear()  # an older, good state would hide that the source broke
            self._faults[topic] = str(error)

    def _on_instruction(self, text: str) -> None:
        try:
            self._instruction = check_instruction(text)
            self._faults.pop("instruction", None)
        except ObservationError as error:
            self._instruction = ""
            self._faults["instruction"] = str(error)

    # ---- inference ----
    def _try_to_infer(self, now: Now) -> Effects:
        if self._waiting is None or self._running is not None or not self._instruction:
            return ()
        request = self._waiting
        found = self._observation(request.start_ns, now)
        if found is None:
            return ()
        self._waiting, self._running, self._asked_ns = None, (request, now.steady_ns), self._waiting_since_ns
        self._faults.pop("observation", None)
        return (Job("infer", lambda: self._infer(request, *found)),)

    def _observation(self, not_before_ns: int, now: Now) -> tuple[Observation, dict[str, Picture]] | None:
        """The newest picture of the first camera with frames and state within `slop` of it, the pictures beside it as
        they came; None, with the reason noted, when there is none."""
        first, *others = self._frames.values()
        for stamp, picture in reversed(first):
            if stamp < not_before_ns:
                break
            found = [_closest(frames, stamp, self._slop_ns) for frames in others]
            states = [_closest(items, stamp, self._slop_ns) for items in self._states.values()]
            if any(f is None for f in (*found, *states)):
                continue
            if abs(now.stamp_ns - stamp) > self._max_age_ns:
                age_s = (now.stamp_ns - stamp) / NS_PER_S
                self._faults["clock"] = explain(
                    "observation stamp", f"within {self._max_age_ns / NS_PER_S:g} s of now", f"{age_s:.3f} s old",
                    "Synchronise the clocks of sensors and policy.",
                )  # fmt: skip
                return None
            self._faults.pop("clock", None)
            frames = [f for f in found if f is not None]
            pictures = dict(zip(self._frames, (picture, *(frame for _, frame in frames))))
            near = [s for s in states if s is not None]
            self._offsets_ns = tuple(at - stamp for at, _ in (*near, *frames))
            values = merged(zip(self._joints.values(), (row for _, row in near)))
            state = self._state_of(values) if self._state_of is not None else values.astype(np.float32)
            return Observation({}, state, self._instruction, stamp), pictures
        return None

    def _infer(
        self, request: Request, observation: Observation, pictures: Mapping[str, Picture]
    ) -> tuple[InferResult, float]:
        """On the worker thread, one at a time: only it touches the policy and the memory of the last chunk."""
        begin = time.perf_counter()
        observation = replace(observation, images=_decoded(pictures, self._robot))
        if request.episode != self._episode:
            self._policy.reset(request.seed)
            self._episode, self._previous = request.episode, None
        previous: ActionChunk | None = None
        if self._previous is not None and self._previous[0] == request.previous:
            last = self._previous[1]
            previous = ActionChunk(last.chunk.actions, request.previous_start_ns, last.chunk.period_s)
        context = InferContext(previous, request.executed, request.committed, observation.stamp_ns, request.infer_seed)
        context = observed_later(context, (observation.stamp_ns - request.start_ns) // self._period_ns)
        result = infer(self._policy, observation.check(), context)
        if not np.all(np.isfinite(result.chunk.actions)):
            raise ObservationError(explain("chunk", "finite actions", "NaN or infinity", "Check the bundle."))
        result = replace(result, chunk=ActionChunk(result.chunk.actions, observation.stamp_ns, result.chunk.period_s))
        return result, (time.perf_counter() - begin) * 1e3

    def on_result(self, name: str, value: Any, now: Now) -> Effects:
        assert self._running is not None
        request, _ = self._running
        self._running = None
        if isinstance(value, _Unreadable):
            self._frames[value.camera].clear()
            self._faults["picture"] = str(value)
            if self._waiting is None:  # the next whole picture answers it
                self._waiting, self._waiting_since_ns = request, self._asked_ns
            return self._try_to_infer(now)
        self._faults.pop("picture", None)
        if isinstance(value, Exception):
            self._refused += 1
            self._faults["inference"] = (
                f"{type(value).__name__}: {value}" if not isinstance(value, VlaError) else str(value)
            )
            return self._try_to_infer(now)
        self._faults.pop("inference", None)
        result, latency_ms = value
        number = self._first_number + self._chunks
        self._previous = (number, result)
        self._latencies_ms.append(latency_ms)
        report = result.report
        first_action_ms = (now.steady_ns - self._asked_ns) / 1e6
        self._recent.append(_Chunk(latency_ms, first_action_ms, report.passes, bool(report.reused)))
        self._last = {
            "passes": str(report.passes), "repaired": str(report.repaired), "tokens": str(len(report.ids)),
            "confidence": f"{report.confidence:.3f}", "reused": report.reused, **_figures(self._recent),
            **{f"{NOTE_KEY}{name}": f"{value:.6g}" for name, value in report.notes.items()},
        }  # fmt: skip
        chunk_id = ChunkId(
            request.episode, request.number, number, round(latency_ms * 1e3), report.passes, report.repaired,
            self._offsets_ns, ((CONFIDENCE, report.confidence), *report.notes.items()), report.reused,
        )  # fmt: skip
        if report.reused:
            self._reused.append((self._chunks, report.reused))
        self._chunks += 1
        message = chunk_to_trajectory(result.chunk, self._robot.action_names, chunk_id.text())
        return (Send(CHUNK.topic, message), *self._try_to_infer(now))

    # ---- heartbeat ----
    def tick(self, now: Now) -> Effects:
        self._beat.due(now.steady_ns)
        hangs = self._running is not None and now.steady_ns - self._running[1] > self._hang_ns
        if self._waiting is not None and self._running is None and self._instruction:
            self._note_missing(self._waiting, now)
        status = self.status(now)
        effects = [] if hangs else [Send(HEARTBEAT.topic, status)]
        if self._reports.due(now.steady_ns):
            effects.append(Send(DIAGNOSTICS.topic, Diagnostics(now.stamp_ns, (self._report(status, hangs, now),))))
        return effects

    def _report(self, status: Status, hangs: bool, now: Now) -> Status:
        """What /diagnostics says: the heartbeat, and of whom it cannot tell anything."""
        faults = []
        if hangs and self._running is not None:
            faults.append(f"an inference has been running for {(now.steady_ns - self._running[1]) / NS_PER_S:.1f} s")
        if self._commanded_ns is not None and now.steady_ns - self._commanded_ns > COMMAND_SILENT_NS:
            silent_s = (now.steady_ns - self._commanded_ns) / NS_PER_S
            faults.append(f"no word of the command node on {CONTROL_STATUS.topic} for {silent_s:.0f} s")
        if not faults:
            return status
        said = [] if status.level == OK else [status.message]
        return replace(status, level=ERROR if hangs else max(WARN, status.level), message="; ".join(faults + said))

    def _note_missing(self, request: Request, now: Now) -> None:
        """A request that still waits for sensors after max_age_s: the heartbeat says for which."""
        if now.steady_ns - self._waiting_since_ns < self._max_age_ns:
            return
        told = {self._joints[topic].label: items for topic, items in self._states.items()}
        sources: dict[str, deque[tuple[int, Any]]] = {**self._frames, **told}
        silent = [name for name, items in sources.items() if not items or items[-1][0] < request.start_ns]
        first, *others = sources
        got = f"nothing new of {silent}" if silent else "stamps further apart"
        expected = f"{others} within {self._slop_ns / NS_PER_S:g} s of {first}"
        self._faults["observation"] = explain("observation", expected, got, "Check their topics and clocks.")

    def status(self, now: Now) -> Status:
        """What the heartbeat says now."""
        fault = "; ".join(self._faults.shown(now).values())[:400]
        level = OK if not fault else ERROR if "inference" in self._faults else WARN
        return Status(
            level, self.name, fault or "ready", {**self._facts, **self._numbers(), **self._last}, self._robot.name
        )

    def _numbers(self) -> dict[str, str]:
        queue = int(self._waiting is not None) + int(self._running is not None)
        numbers = {"queue": str(queue), "chunks": str(self._chunks), "failed": str(self._refused)}
        for name, frames in self._frames.items():
            if frames:
                stamp_ns, picture = frames[-1]
                numbers[STAMP_KEY + name] = str(stamp_ns)
                if len(frames) >= _FRAMES_KEPT // 2:
                    numbers[SPACING_KEY + name] = str(int(np.median(np.diff([at for at, _ in frames]))))
                content = picture.data if isinstance(picture, CompressedImage) else picture.rgb()[::8, ::8].tobytes()
                numbers[PICTURE_KEY + name] = f"{zlib.crc32(content):08x}"
        return numbers

    def close(self, now: Now) -> Effects:
        return ()

    def summary(self) -> dict[str, Any]:
        """reused: which chunks, counted from 0, are what was left of the one before, and why."""
        return {
            "chunks": self._chunks,
            "failed": self._refused,
            "reused": list(self._reused),
            "inference_ms": [round(x, 3) for x in self._latencies_ms],
        }


def _decoded(pictures: Mapping[str, Picture], robot: Embodiment) -> dict[str, np.ndarray]:
    """{camera: uint8[H, W, 3] RGB}, at the camera's size"""
    images = {}
    for name, picture in pictures.items():
        try:
            images[name] = fitted(picture.rgb(), robot.camera(name))
        except TransportError as error:
            raise _Unreadable(name, str(error)) from error
    return images


def _figures(chunks: Collection[_Chunk]) -> dict[str, str]:
    """What the heartbeat says of the newest chunks together."""
    latency, first_action, passes, reused = np.array(chunks, np.float64).T
    out = {
        f"{key}_p{share}": f"{value:.2f}"
        for key, values in (("latency_ms", latency), ("first_action_ms", first_action))
        for share, value in zip(_PERCENTILES, np.percentile(values, _PERCENTILES))
    }
    return {**out, "passes_per_chunk": f"{passes.mean():.2f}", "reuse": f"{reused.mean():.3f}"}


def _closest(items: deque[tuple[int, _T]], stamp_ns: int, slop_ns: int) -> tuple[int, _T] | None:
    best = min(items, key=lambda item: abs(item[0] - stamp_ns), default=None)
    return best if best is not None and abs(best[0] - stamp_ns) <= slop_ns else None


def build(options: argparse.Namespace) -> PolicyCore:
    """The core that POLICY of ros_nodes/settings.py describes, its policy loaded and warm."""
    from policies import parts
    from ros_nodes.policies import facts_of, load_policy

    run_with = parts.Parts.named(parts.named_in(options))
    policy = load_policy(options.policy, options.embodiment or None, options.threads, run_with, options.device)
    state: Callable[[np.ndarray], np.ndarray] | None = None
    if policy.embodiment.state_is_joints:
        state = policy.embodiment.joint_state_vector
    elif policy.embodiment.action_space != "osc_delta":
        from vla.runtime.kinematics import Kinematics

        state = Kinematics(policy.embodiment).state
    return PolicyCore(
        policy, state, options.slop, options.max_age, options.hang_limit, secrets.randbits(40) << 10,
        facts_of(options.policy, run_with, options.device), options.compressed,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    return entry.on_wheel("policy", arguments)


if __name__ == "__main__":
    sys.exit(entry.run(main))
