"""What a policy would do while an operator drives, and how far that is from what the operator does. No middleware.

`Shadow` is the shell of a policy core whose words reach nobody: it hands on what the sensors say, asks for a chunk
every few periods, and keeps the answers. At the end each action of a chunk is compared with what the operator did at
the time that action was due: the commands that were in force, made into actions as in ros_nodes/episodes.py, or where
nobody commands, where the joints went.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from ros_nodes.doctor import DOUBT, OK, WRONG, Finding
from ros_nodes.episodes import Body
from ros_nodes.joints import JointTopic, joint_topics
from ros_nodes.messages import JointState, Message, Text, Trajectory, Values
from ros_nodes.node import CHUNK, INSTRUCTION, REQUEST, Effects, Endpoint, Job, Now, Quality, Send
from ros_nodes.outputs import Outputs
from ros_nodes.policy_node import PolicyCore
from ros_nodes.recording import POSITIONS
from ros_nodes.request import Request
from vla.data import resample
from vla.data.actions import Commands, CommandSet, Sent, actions_of
from vla.embodiment import Embodiment
from vla.errors import TransportError

_SPACING = 4  # control periods between two questions
_STREAM = Quality(reliable=False, depth=500)
MIN_CHUNKS = 10
_STILL = {"rad": 0.02, "m": 0.005}  # root mean square of an operator's motion that says something; else this share:
_STILL_SHARE = 0.1
AGAINST, ALONG = -0.3, 0.5  # cosine of two motions: below and above it they are opposite, alike
_SCALE = 3.0  # alike, but this much larger or smaller
_DEGREES = 180 / np.pi


class Shadow:
    """policy: a core of its own, which nobody else drives. instruction: instead of what comes on /vla/instruction.

    run: takes the jobs of the core; `on_result` wants what they return. chunks: (start, actions float32[T, A]) so far.
    """

    def __init__(self, policy: PolicyCore, run: Callable[[Job], object], instruction: str = ""):
        self.policy, self._run = policy, run
        self.robot: Embodiment = policy.embodiment
        self._ours = {endpoint.topic for endpoint in policy.subscriptions}
        self._period_ns = round(self.robot.period_s * 1e9)
        self._sinks: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {}
        for sink in self.robot.sinks:
            if sink.kind in POSITIONS:
                names = sink.joints or self.robot.command_names
                places = np.array([self.robot.command_names.index(name) for name in names])
                self._sinks[sink.topic] = (places, sink.names or names)
        heard = [e for e in policy.subscriptions if e.topic != REQUEST.topic]
        told = [replace(e, quality=_STREAM) for e in Outputs(self.robot).endpoints if e.topic in self._sinks]
        self.subscriptions: tuple[Endpoint, ...] = (*heard, *told)
        self.chunks: list[tuple[int, np.ndarray]] = []
        self._sent: dict[str, list[Sent]] = {topic: [] for topic in self._sinks}
        self._joints = {t.topic: t for t in joint_topics(self.robot, self.robot.action_space == "osc_delta")}
        self._newest = np.full(sum(len(topic.joints) for topic in self._joints.values()), np.nan)
        self._rows: dict[int, np.ndarray] = {}  # stamp -> positions, or the state vector, the newest of each topic
        self._given, self._asked, self._waiting = instruction, 0, False
        self.now = Now(0, 0)  # of the last call

    # ---- messages ----
    def on_message(self, topic: str, message: Message, now: Now) -> None:
        self.now = now
        if topic in self._sinks:
            self._on_command(topic, message, now)
        if isinstance(message, JointState) and topic in self._joints:
            self._on_joints(self._joints[topic], message)
        if topic in self._ours and not (topic == INSTRUCTION.topic and self._given):
            self._perform(self.policy.on_message(topic, message, now), now)

    def on_reject(self, topic: str, reason: str) -> None:
        if topic in self._ours:
            self.policy.on_reject(topic, reason, self.now)

    def tick(self, now: Now) -> None:
        """Ask, when it is time to."""
        self.now = now
        if now.steady_ns >= self.policy.next_tick_ns:
            self.policy.tick(now)  # it notes what it lacks; its heartbeat goes nowhere
        if self._waiting or not now.stamp_ns:
            return
        if not self._asked and self._given:
            self._perform(self.policy.on_message(INSTRUCTION.topic, Text(self._given), now), now)
        after_ns = self.chunks[-1][0] + _SPACING * self._period_ns if self.chunks else 0
        request = Request(0, 0, self._asked, max(after_ns, now.stamp_ns - self._period_ns), self._asked)
        self._asked, self._waiting = self._asked + 1, True
        self._perform(self.policy.on_message(REQUEST.topic, request.text(), now), now)

    def on_result(self, name: str, value: object, now: Now) -> None:
        self._waiting = False
        self._perform(self.policy.on_result(name, value, now), now)

    def _perform(self, effects: Effects, now: Now) -> None:
        for effect in effects:
            if isinstance(effect, Job):
                self._run(effect)
            elif isinstance(effect, Send) and effect.topic == CHUNK.topic and isinstance(effect.message, Trajectory):
                self.chunks.append((effect.message.stamp_ns, effect.message.positions.astype(np.float32)))

    def _on_joints(self, joints: JointTopic, message: JointState) -> None:
        with suppress(TransportError):  # the policy says what is wrong with it
            self._newest[joints.places] = joints.positions(message)
            if np.all(np.isfinite(self._newest)):
                self._rows[message.stamp_ns] = self._newest.copy()

    def _on_command(self, topic: str, message: Message, now: Now) -> None:
        (_, names), came_ns = self._sinks[topic], now.came_ns
        times, rows = np.array([came_ns]), np.empty((0, 0))
        if isinstance(message, Values) and message.data.shape == (len(names),):
            rows = message.data[None]
        elif isinstance(message, Trajectory) and set(names) <= set(message.names) and len(message.positions):
            rows = message.positions[:, [message.names.index(name) for name in names]]
            times = (message.stamp_ns or came_ns) + np.array(message.times_ns, np.int64)
        if len(rows) and np.all(np.isfinite(rows)):
            self._sent[topic].append(Sent(came_ns, times, rows))

    # ---- the comparison ----
    def report(self) -> Comparison:
        """Chunks against what was done, for all actions whose time has passed."""
        streams = [(self._sinks[topic][0], Commands(sent)) for topic, sent in self._sent.items() if sent]
        stamps = np.array(sorted(self._rows), np.int64)
        positions = np.array([self._rows[stamp] for stamp in stamps.tolist()])
        return compare(self.robot, self.chunks, stamps, positions, CommandSet(streams, len(self.robot.command_names)))


@dataclass(frozen=True)
class Dimension:
    """One action. error_mean, error_p95: of its absolute error, in `unit`. moved: root mean square of the operator's
    motion; alike: cosine of both motions; scale: how much larger the policy's is. NaN where the operator did not move.

    Motion is what was gone since the chunk began, deltas added up; of a gripper, how far from half open it is.
    """

    name: str
    unit: str
    error_mean: float
    error_p95: float
    moved: float
    alike: float
    scale: float
    verdict: str
    words: str


@dataclass(frozen=True)
class Comparison:
    """commanded: against an operator's commands; otherwise against where the joints went. chunks, actions: how many
    could be compared."""

    commanded: bool
    chunks: int
    actions: int
    dimensions: tuple[Dimension, ...]


def compare(
    robot: Embodiment, chunks: Sequence[tuple[int, np.ndarray]], stamps: np.ndarray, positions: np.ndarray,
    commands: CommandSet,
) -> Comparison:  # fmt: skip
    """chunks: (due time of action 0, float32[T, A]). stamps int64[N], ascending, and positions float64[N, D]: measured
    joints in command order. commands: of some or all of them; joints without one count as measured."""
    period_ns, body = round(robot.period_s * 1e9), Body.of(robot)
    commanded, vector = bool(commands.commanded.any()), body.state is None
    first = commands.complete_ns if commanded else None
    ours, theirs = [], []
    used = 0
    for start_ns, said in chunks if len(stamps) else ():
        times = start_ns + period_ns * np.arange(len(said), dtype=np.int64)
        fits = (times >= stamps[0]) & (times + period_ns <= stamps[-1]) & ((first is None) | (times > (first or 0)))
        count = int(np.argmin(fits)) if not fits.all() else len(fits)
        if not count or (vector and not commanded):
            continue
        at, there = times[:count], _joints(stamps, positions, times[0])
        ends = [_told(commands, stamps, positions, moment, vector) for moment in (at, at + period_ns)]
        did = actions_of(robot, ends[0], ends[1], body.forward).astype(np.float64)
        used += 1
        ours.append((said[:count].astype(np.float64), _motion(robot, said[:count], there)))
        theirs.append((did, _motion(robot, did, there)))
    if not used:
        return Comparison(commanded, 0, 0, ())
    (said, mine), (did, his) = (tuple(np.concatenate(part) for part in zip(*rows)) for rows in (ours, theirs))
    error = np.abs(said - did)
    dimensions = tuple(
        _dimension(name, unit, error[:, i], mine[:, i], his[:, i])
        for i, (name, unit) in enumerate(zip(robot.action_names, robot.action_units))
    )
    return Comparison(commanded, used, len(said), dimensions)


def _told(
    commands: CommandSet, stamps: np.ndarray, positions: np.ndarray, times: np.ndarray, vector: bool
) -> np.ndarray:
    """float64[T, D]: what was commanded up to each time; where nobody commands, where the joints were."""
    measured = np.array([_joints(stamps, positions, time) for time in times])
    if not commands.commanded.any():
        return measured
    out = commands.before(times)
    if not vector:
        out[:, ~commands.commanded] = measured[:, ~commands.commanded]
    return out


def _joints(stamps: np.ndarray, positions: np.ndarray, time_ns: int) -> np.ndarray:
    return np.asarray(positions[max(0, int(resample.latest(stamps, np.array([time_ns]))[0]))])


def _motion(robot: Embodiment, actions: np.ndarray, there: np.ndarray) -> np.ndarray:
    """float64[T, A], see Dimension. there: joints where the chunk begins."""
    actions = np.asarray(actions, np.float64)
    absolute = robot.action_space == "joint_position"
    out = actions - there if absolute else np.cumsum(actions, axis=0)
    for place in robot.grippers:
        joint = robot.joints[place] if absolute else None
        out[:, place] = actions[:, place] - (0.0 if joint is None else (joint.lower + joint.upper) / 2)
    return out


def _dimension(name: str, unit: str, error: np.ndarray, mine: np.ndarray, his: np.ndarray) -> Dimension:
    moved, my_size = float(np.sqrt((his**2).mean())), float(np.sqrt((mine**2).mean()))
    figures = (float(error.mean()), float(np.quantile(error, 0.95)), moved)
    if moved < _STILL.get(unit, _STILL_SHARE):
        return Dimension(name, unit, *figures, np.nan, np.nan, OK, "the operator hardly moved it")
    alike = float((mine * his).mean() / (moved * my_size)) if my_size > 0 else 0.0
    scale = my_size / moved
    if alike < AGAINST:
        return Dimension(name, unit, *figures, alike, scale, WRONG, "opposite to the operator: a sign, or a frame")
    if alike < ALONG:
        return Dimension(name, unit, *figures, alike, scale, DOUBT, "has little to do with the operator's")
    if not 1 / _SCALE <= scale <= _SCALE:
        words = f"{scale:.3g} times the operator's"
        if min(abs(np.log(scale * factor)) for factor in (_DEGREES, 1 / _DEGREES)) < np.log(2):
            words += ": degrees for radians?"
        return Dimension(name, unit, *figures, alike, scale, WRONG, words)
    return Dimension(name, unit, *figures, alike, scale, OK, "with the operator")


_REMEDY = {
    WRONG: "Do not let it move the arm: correct the driver or the robot's file.",
    DOUBT: "Longer, or with the task the policy was trained for.",
}


def findings(shadow: Shadow) -> list[Finding]:
    """The comparison as checks, one for whether there is enough of it and one per action."""
    made = shadow.report()
    against = "an operator's commands" if made.commanded else "where the joints went (no commands on a topic)"
    enough = made.chunks >= MIN_CHUNKS
    got = f"{made.chunks} of {len(shadow.chunks)}, {made.actions} actions, against {against}"
    remedy = "" if enough else f"Policy: {shadow.policy.status(shadow.now).message}. Or listen longer: --seconds."
    out = [Finding("chunks", OK if enough else WRONG, f"{MIN_CHUNKS} or more to compare", got, remedy)]
    for d in made.dimensions:
        numbers = f"error {d.error_mean:.3g} {d.unit}, p95 {d.error_p95:.3g} {d.unit}"
        if np.isfinite(d.alike):
            numbers += f"; cosine {d.alike:.2f}, {d.scale:.2g} times as far"
        line = Finding(f"action {d.name}", d.verdict, "with the operator", f"{numbers}; {d.words}", "")
        out.append(replace(line, remedy=_REMEDY.get(d.verdict, "")))
    return out
