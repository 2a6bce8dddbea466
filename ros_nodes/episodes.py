"""Episodes of a recording: where they begin and end, and their samples at the policy's rate (vla/data/resample.py).

An episode runs from `start` to `stop` on /vla/record; with `whole`, from the first message to the last. It is taken
whole or not at all: one sample that a stream does not cover, an instruction that changes, a NaN, and it is a Skip with
the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ros_nodes.joints import merged
from ros_nodes.recording import Recording
from vla.data import resample
from vla.data.actions import CommandSet, Forward, actions_of
from vla.data.resample import NEVER, Gap, Rules
from vla.embodiment import Embodiment
from vla.errors import VlaError
from vla.types import NS_PER_S, check_instruction


@dataclass(frozen=True)
class Span:
    """Episode `number` of its recording, from start_ns to stop_ns."""

    number: int
    start_ns: int
    stop_ns: int


@dataclass(frozen=True)
class Skip:
    """An episode, or with number -1 a recording, that is left out, and why."""

    number: int
    reason: str


@dataclass(frozen=True)
class Samples:
    """T samples of one episode.

    times: int64[T]. frames: {camera: int64[T], place in Recording.tracks[camera]}. joints: float64[T, D], all of
    Recording.joints in the robot's order. state: float32[T, S]. actions: float32[T, A], None when not all joints are
    commanded. repeated: {camera: samples that show the same frame as the one before}.
    """

    span: Span
    instruction: str
    times: np.ndarray
    frames: dict[str, np.ndarray]
    joints: np.ndarray
    state: np.ndarray
    actions: np.ndarray | None
    repeated: dict[str, int]


@dataclass(frozen=True)
class Body:
    """What an embodiment needs beside its numbers: joints to state vector, and joints to tool pose for ee_delta.

    state: None when the recording holds the state vector itself.
    """

    state: Callable[[np.ndarray], np.ndarray] | None
    forward: Forward | None = None

    @classmethod
    def of(cls, robot: Embodiment) -> Body:
        """By the embodiment; loads its kinematic model only when something follows from it."""
        if robot.action_space == "osc_delta":
            return cls(None)
        if robot.action_space != "ee_delta" and robot.state_is_joints:
            return cls(robot.joint_state_vector)
        from vla.runtime.kinematics import Kinematics

        kinematics = Kinematics(robot)
        return cls(kinematics.state, kinematics.forward)


def spans(recording: Recording, whole: bool = False) -> list[Span | Skip]:
    """All episodes of a recording, those that cannot be one as Skip."""
    if whole:
        return [Span(0, recording.start_ns, recording.stop_ns)]
    out: list[Span | Skip] = []
    begun: int | None = None
    for at_ns, word in recording.marks:
        if word == "start":
            if begun is not None:
                out.append(Skip(len(out), f"begun again {_seconds(at_ns - begun)} after its start, without a stop"))
            begun = at_ns
        elif begun is not None:
            discarded = Skip(len(out), "discarded by the operator")
            out.append(Span(len(out), begun, at_ns) if word == "stop" else discarded)
            begun = None
    if begun is not None:
        out.append(Skip(len(out), "it has no stop: the recording ends before"))
    return out


def samples(
    recording: Recording,
    span: Span,
    rules: Rules,
    body: Body,
    instruction: str = "",
    measured: bool = False,
    from_first_command: bool = True,
) -> Samples | Skip:
    """The samples of one episode. instruction: instead of the recorded one. measured: joints that no topic commands
    take their newest measured position, as if that had been the command. from_first_command: samples before it are left
    out; otherwise their actions are NaN.
    """

    def skip(reason: str) -> Skip:
        return Skip(span.number, reason)

    # What was commanded before the start may be of another episode, and the arm put elsewhere since.
    robot, commands = recording.robot, recording.commands.since(span.start_ns)
    said = [(at, text) for at, text in recording.instructions if at < span.stop_ns]
    stamps = [s.stamps for s in recording.joints] + [track.stamps for track in recording.tracks.values()]
    begins = [span.start_ns, *(_first(stream, span.start_ns) for stream in stamps)]
    complete_ns = commands.complete_ns
    if from_first_command:
        begins.append(NEVER if complete_ns is None else complete_ns + 1)
    if not instruction:
        begins.append(said[0][0] if said else NEVER)
    lead = next(iter(recording.tracks.values())).stamps
    first_ns = _first(lead, max(begins)) if max(begins) < NEVER else NEVER  # on a frame of the first camera
    if first_ns == NEVER or first_ns >= span.stop_ns:
        uncommanded = from_first_command and complete_ns is None
        return skip(_missing(recording, span, uncommanded, bool(instruction or said)))
    times = resample.sample_times(first_ns, span.stop_ns, rules)
    # The recorder stopped between two joint states: a sample after the last one ends the episode, and is no hole.
    newest_ns = min(int(signal.stamps[-1]) for signal in recording.joints)
    if span.stop_ns - newest_ns <= rules.gap_ns:
        times = times[times <= newest_ns]
    if not len(times):
        return skip(f"shorter than one period: {_seconds(span.stop_ns - first_ns)} after everything was there")

    words = {instruction} if instruction else {recording.said(int(time)) for time in (times[0], times[-1])}
    words |= set() if instruction else {text for at, text in said if at > times[0]}
    if len(words) != 1:
        return skip(f"the instruction changes: {' / '.join(sorted(words))}")
    try:
        text = check_instruction(words.pop())
    except VlaError as error:
        return skip(str(error))

    found: dict[str, np.ndarray | Gap] = {
        name: resample.images(f"camera {name}", track.stamps, times, rules) for name, track in recording.tracks.items()
    }
    columns = robot.state_names if body.state is None else robot.command_names
    nearest = np.array(["gripper" in name or "finger" in name for name in columns])
    turning = np.array([body.state is None and name.endswith(("_rx", "_ry", "_rz")) for name in columns])
    for s in recording.joints:
        kinds = nearest[s.topic.places], turning[s.topic.places]
        found[s.topic.label] = resample.states(s.topic.label, s.stamps, s.values, times, rules, *kinds)
    gaps = [value for value in found.values() if isinstance(value, Gap)]
    if gaps:
        return skip("; ".join(_say(gap, span) for gap in gaps))
    arrays = {name: value for name, value in found.items() if not isinstance(value, Gap)}
    joints = merged((signal.topic, arrays.pop(signal.topic.label)) for signal in recording.joints)
    if not np.all(np.isfinite(joints)):
        row = int(np.flatnonzero(~np.isfinite(joints).all(axis=1))[0])
        return skip(f"joint states: NaN or infinity {_seconds(times[row] - span.start_ns)} after the start")
    state = joints.astype(np.float32) if body.state is None else np.stack([body.state(row) for row in joints])
    told = None
    if complete_ns is not None and (measured or commands.commanded.all()):
        told = np.full((len(times), robot.action_dim), np.nan, np.float32)
        commanded = times > complete_ns
        told[commanded] = _actions(recording, commands, times[commanded], rules, body)
        if not np.all(np.isfinite(told[commanded])):
            return skip("commands: NaN or infinity")
    repeated = {name: int(np.sum(np.diff(places) == 0)) for name, places in arrays.items()}
    return Samples(span, text, times, arrays, joints, state, told, repeated)


def _actions(recording: Recording, commands: CommandSet, times: np.ndarray, rules: Rules, body: Body) -> np.ndarray:
    """float32[T, A]; joints without commands take their newest measured position."""
    ends = []
    for at in (times, times + rules.period_ns):
        values = commands.before(at)
        if not commands.commanded.all() and body.state is not None:
            newest = merged((s.topic, s.values[np.maximum(resample.latest(s.stamps, at), 0)]) for s in recording.joints)
            values[:, ~commands.commanded] = newest[:, ~commands.commanded]
        ends.append(values)
    return actions_of(recording.robot, ends[0], ends[1], body.forward)


def _first(stamps: np.ndarray, at_ns: int) -> int:
    """The first of the ascending stamps from `at_ns` on, NEVER when there is none."""
    place = int(np.searchsorted(stamps, at_ns, side="left"))
    return int(stamps[place]) if place < len(stamps) else NEVER


def _missing(recording: Recording, span: Span, uncommanded: bool, spoken: bool) -> str:
    """Which streams an episode lacks altogether."""
    streams = {f"camera {name}": track.stamps for name, track in recording.tracks.items()}
    streams |= {signal.topic.label: signal.stamps for signal in recording.joints}
    lacking = [name for name, stamps in streams.items() if _first(stamps, span.start_ns) >= span.stop_ns]
    if uncommanded:
        lacking.append("commands")
    if not spoken:
        lacking.append("instruction (pass --instruction TEXT)")
    return f"nothing of {', '.join(lacking) or 'all streams at once'} in its {_seconds(span.stop_ns - span.start_ns)}"


def _say(gap: Gap, span: Span) -> str:
    where = f"{_seconds(gap.at_ns - span.start_ns)} after the start"
    if gap.age_ns == NEVER:
        return f"{gap.stream}: nothing {where}"
    return f"{gap.stream}: nothing for {_seconds(gap.age_ns)}, {where}"


def _seconds(duration_ns: int) -> str:
    return f"{duration_ns / NS_PER_S:.3f} s"
