"""The control loop on recorded observations, at its own times: what a policy would have done, and when.

An episode of a recording becomes a Reel: observations at the control rate, and what was commanded for each. `Arm` plays
it to `run_episode`, which simulation and tests run as well; inference takes the time of a latency trace on the reel's
clock. The arm follows its commands exactly, because the recording cannot answer them.

A trace of `vla demo` (trace.mcap) makes reels, too: it holds the actions themselves, but its pictures are JPEG, and
only every other one. What comes of it is close, and not bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ros_nodes.bag import Bag
from ros_nodes.episodes import Body, Samples, Skip, Span, samples, spans
from ros_nodes.joints import merged
from ros_nodes.pictures import decompress
from ros_nodes.recording import Recording
from ros_nodes.replay import ANSWERED_OTHERWISE, Answer, Outcome, answers, difference
from vla.data import resample
from vla.data.resample import NEVER, Gap, Rules
from vla.embodiment import Embodiment
from vla.errors import DataError, explain
from vla.policy import InferContext, InferResult, Policy, PolicyWrapper
from vla.runtime.loop import Delay, control_loop, run_episode
from vla.runtime.scheduler import OverlappedScheduler, SequentialScheduler
from vla.runtime.trace import Trace
from vla.types import NS_PER_S, ActionChunk, Command, ControlMode, Observation

Delays = Callable[[int], Callable[[int], Delay]]  # seed of an episode -> inference number -> delay
COMMAND_TOLERANCE = 1e-3  # of actions made of commands: the solver is exact to some 1e-5, a gripper's ramp is not
Pictures = Callable[[], Iterator[dict[str, np.ndarray]]]


@dataclass(frozen=True)
class Reel:
    """K samples of one episode, one control period apart.

    times: int64[K]. joints: float64[K, D] where the arm starts. state: float32[K, S]. actions: float32[K, A], NaN
    where there was none. pictures: anew for each call, {camera: uint8[H, W, 3]} per sample. asked: what is known of the
    recorded inferences: (stamp of the observation, committed float32[C, A] or None), in order; delays: what each took.
    chunks: float32[T, A], what came of each, () where that was not recorded. said: actions are those of the policy, not
    made of commands.
    """

    name: str
    number: int
    seed: int
    instruction: str
    times: np.ndarray
    joints: np.ndarray
    state: np.ndarray
    actions: np.ndarray
    pictures: Pictures
    asked: Sequence[tuple[int, np.ndarray | None]] = ()
    delays: tuple[Delay, ...] = ()
    chunks: tuple[np.ndarray, ...] = ()
    said: bool = False


def reels_of_bag(bag: Bag, robot: Embodiment, clock: str = "stamps", resize: bool = False, whole: bool = False,
                 measured: bool = False, instruction: str = "") -> tuple[list[Reel], list[str]]:  # fmt: skip
    """The episodes of a recording (see ros_nodes.episodes), and what is left out. Without marks, an episode is what the
    requests say, else the whole recording. DataError when nothing was commanded."""
    recording = Recording(bag, robot, clock, resize, needs_commands=False)
    found, body = answers(bag)[0] if {"/vla/request", "/vla/chunk"} <= set(bag.topics) else [], Body.of(robot)
    if not (found or measured or recording.commands.commanded.all()):
        remedy = "Record the robot's command topic, or pass --measured to compare with where the joints went."
        raise DataError(explain(str(bag.path), "commands of all joints to compare with", "none of some", remedy))
    if whole or not (recording.marks or found):
        chosen: list[Span | Skip] = list(spans(recording, whole=True))
    else:
        chosen = spans(recording) if recording.marks else _asked_spans(found, recording)
    reels: list[Reel] = []
    left: list[str] = []
    for span in chosen:
        if isinstance(span, Span):
            firsts = [a.chunk.stamp_ns for a in found if span.start_ns <= a.chunk.stamp_ns < span.stop_ns]
            span = replace(span, start_ns=min(firsts, default=span.start_ns))
        made = span if isinstance(span, Skip) else samples(
            recording, span, Rules(robot.rate_hz), body, instruction, measured, from_first_command=not found
        )  # fmt: skip
        if isinstance(made, Skip):
            left.append(f"episode {span.number}: {made.reason}")
            continue
        actions = np.full((len(made.times), robot.action_dim), np.nan, np.float32)
        actions = actions if made.actions is None else made.actions
        mine = [a for a in found if made.span.start_ns <= a.chunk.stamp_ns < made.span.stop_ns]
        asked = [(a.chunk.stamp_ns, a.request.committed) for a in mine]
        chunks = tuple(a.chunk.positions.astype(np.float32) for a in mine)
        delays = tuple(Delay(max(0, a.log_ns - a.asked_ns)) for a in mine)
        frames = _as_observed(made, mine, recording, body)

        def pictures(frames: Mapping[str, np.ndarray] = frames) -> Iterator[dict[str, np.ndarray]]:
            streams = {name: recording.frames(name, places) for name, places in frames.items()}
            for _ in next(iter(frames.values())):
                yield {name: next(stream) for name, stream in streams.items()}

        seed = mine[0].request.seed if mine else 0
        start = made.joints if robot.control_mode is not ControlMode.OSC_DELTA else np.zeros((1, robot.action_dim))
        reels.append(
            Reel(bag.name, made.span.number, seed, made.instruction, made.times, start, made.state, actions,
                 pictures, asked, delays, chunks)
        )  # fmt: skip
    return reels, left


def _as_observed(made: Samples, mine: Sequence[Answer], recording: Recording, body: Body) -> dict[str, np.ndarray]:
    """The frames of the samples; where a chunk says which messages its observation was made of (ChunkId.offsets_ns),
    those, and their joint states in made.state: not interpolated, as the policy had them."""
    frames = {name: places.copy() for name, places in made.frames.items()}
    for answer in mine:
        stamp_ns, offsets = answer.chunk.stamp_ns, answer.identity.offsets_ns
        k = int(np.searchsorted(made.times, stamp_ns))
        count = len(recording.joints)
        if len(offsets) != count + len(frames) - 1 or k >= len(made.times) or made.times[k] != stamp_ns:
            continue
        joints = [_place(s.stamps, stamp_ns + offset) for s, offset in zip(recording.joints, offsets)]
        seen = zip(frames, (0, *offsets[count:]))
        places = [_place(recording.tracks[name].stamps, stamp_ns + offset) for name, offset in seen]
        if min(*joints, *places) < 0:
            continue
        values = merged((s.topic, s.values[place]) for s, place in zip(recording.joints, joints))
        made.state[k] = values if body.state is None else body.state(values)
        for name, place in zip(frames, places):
            frames[name][k] = place
    return frames


def _place(stamps: np.ndarray, stamp_ns: int) -> int:
    """Where the ascending stamps have exactly this one, -1 where they do not."""
    place = int(np.searchsorted(stamps, stamp_ns))
    return place if place < len(stamps) and stamps[place] == stamp_ns else -1


def _asked_spans(found: Sequence[Answer], recording: Recording) -> list[Span | Skip]:
    """One span per episode that a policy was asked in: from its first observation to the next episode's."""
    firsts: dict[int, int] = {}
    for answer in found:
        firsts.setdefault(answer.request.episode, answer.chunk.stamp_ns)
    starts = list(firsts.values())
    lasts = [max(a.log_ns for a in found if a.request.episode == number) for number in firsts]
    stops = [*starts[1:], recording.stop_ns]
    ends = [min(stop, last + 2 * NS_PER_S) for stop, last in zip(stops, lasts)]
    return [Span(number, start, end) for number, (start, end) in enumerate(zip(starts, ends))]


def reels_of_trace(trace: Trace, name: str) -> list[Reel]:
    """The episodes of a run's trace. DataError when it holds no pictures to observe."""
    robot, body, rules = trace.embodiment, Body.of(trace.embodiment), Rules(trace.embodiment.rate_hz)
    cameras = {c: sorted((i for i in trace.images if i.camera == c), key=_stamp) for c in robot.camera_names}
    empty = [camera for camera, images in cameras.items() if not images]
    if empty or body.state is None:
        got = f"none of {', '.join(empty)}" if empty else "no state vector"
        remedy = "Only `vla demo` adds pictures. To replay a run, record it with `vla record`."
        raise DataError(explain(name, "a trace with pictures and joint states", got, remedy))
    reels, begin = [], 0
    for number, row in enumerate(trace.episodes):
        end = int(np.searchsorted(trace.tick_ns[: trace.rows], row.stamp_ns, side="right"))
        ticks = trace.tick_ns[begin:end]
        lead = np.array([image.stamp_ns for image in next(iter(cameras.values()))])
        first = int(np.searchsorted(lead, ticks[0])) if len(ticks) else len(lead)
        if first < len(lead):
            times = resample.sample_times(int(lead[first]), row.stamp_ns, rules)
            reels += _trace_reel(trace, name, number, slice(begin, end), times, cameras, body)
        begin = end
    if not reels:
        raise DataError(explain(name, "an episode with pictures throughout", "none", "Record it with `vla record`."))
    return reels


def _trace_reel(
    trace: Trace, name: str, number: int, rows: slice, times: np.ndarray, cameras: Mapping[str, Any], body: Body
) -> list[Reel]:
    rules = Rules(trace.embodiment.rate_hz)
    places: dict[str, np.ndarray] = {}
    for camera, images in cameras.items():
        found = resample.images(camera, np.array([_stamp(image) for image in images], np.int64), times, rules)
        if isinstance(found, Gap):
            return []
        places[camera] = found
    # A tick and the picture it observes are a few milliseconds apart.
    nearest = rows.start + np.searchsorted(trace.tick_ns[rows], times - rules.period_ns // 4)
    nearest = np.minimum(nearest, rows.stop - 1)
    joints = trace.measured[nearest]
    if not len(times) or not np.all(np.isfinite(joints)) or body.state is None:
        return []
    there = np.abs(trace.tick_ns[nearest] - times) <= rules.period_ns // 2
    actions = np.where(there[:, None], trace.action[nearest], np.nan).astype(np.float32)
    inferences = slice(0, trace.inferences)
    stamps = trace.infer_stamp_ns[inferences]
    mine = np.flatnonzero((stamps >= times[0]) & (stamps <= times[-1]) & trace.infer_accepted[inferences])
    took = trace.infer_end_ns[inferences] - trace.infer_start_ns[inferences]

    def pictures() -> Iterator[dict[str, np.ndarray]]:
        for k in range(len(times)):
            frames = {camera: images[places[camera][k]] for camera, images in cameras.items()}
            yield {camera: decompress(frame.format, frame.data) for camera, frame in frames.items()}

    row, state = trace.episodes[number], np.stack([body.state(q) for q in joints])
    asked = [(int(stamps[i]), None) for i in mine]
    delays = tuple(Delay(max(0, int(took[i]))) for i in mine)
    return [
        Reel(name, number, row.seed, row.instruction, times, joints, state, actions, pictures, asked, delays, said=True)
    ]


def _stamp(image: Any) -> int:
    return int(image.stamp_ns)


class Arm:
    """A reel as the environment of `run_episode`: it shows what was recorded and goes exactly where it is told."""

    def __init__(self, robot: Embodiment, reel: Reel):
        self.embodiment, self.max_steps, self.instruction = robot, len(reel.times), reel.instruction
        self._reel = reel
        names = robot.command_names
        self._names, self._zeros = tuple(names), np.zeros(len(names))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Observation, dict[str, Any]]:
        self.index, self._pictures = 0, self._reel.pictures()
        self._positions = np.array(self._reel.joints[0], np.float64)
        self._observation = self._observe()
        return self._observation, {"success": False}

    def step(self, command: Command) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self._positions = np.array(command.values, np.float64)
        self.index += 1
        over = self.index >= len(self._reel.times)
        if not over:
            self._observation = self._observe()
        return self._observation, 0.0, over, False, {"success": False}

    def joint_state(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        return self._names, self._positions, self._zeros

    def _observe(self) -> Observation:
        k, reel = self.index, self._reel
        return Observation(next(self._pictures), reel.state[k], reel.instruction, int(reel.times[k]))


@dataclass
class _Recorded:
    """The recorded chunks as a policy: what the loop did with them, action by action. strayed: how they were not asked
    for as they had been, "" when they were. ended_ns: when it asked for more than there were: the run was over."""

    embodiment: Embodiment
    reel: Reel
    count: int = 0
    strayed: str = ""
    ended_ns: int | None = None

    @property
    def horizon(self) -> int:
        return len(self.reel.chunks[0])

    def reset(self, seed: int) -> None:
        self.count = 0

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        place = min(self.count, len(self.reel.chunks) - 1)
        if self.count > place and self.ended_ns is None:
            self.ended_ns = observations[0].stamp_ns
        stamps = (self.reel.asked[place][0], observations[0].stamp_ns)
        if (
            not self.strayed
            and self.ended_ns is None
            and abs(stamps[1] - stamps[0]) > round(self.embodiment.period_s * NS_PER_S) // 2
        ):
            seen = [f"{(stamp - int(self.reel.times[0])) / NS_PER_S:.3f} s" for stamp in stamps]
            self.strayed = f"chunk {self.count} was asked for at {seen[0]}, this loop asks at {seen[1]}"
        self.count += 1
        chunk = ActionChunk(self.reel.chunks[place], contexts[0].start_ns, self.embodiment.period_s)
        return [InferResult(chunk)]


class _Witness(PolicyWrapper):
    """A policy, and what it was asked."""

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self.asked: list[tuple[int, np.ndarray | None]] = []

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        self.asked += [(o.stamp_ns, c.committed) for o, c in zip(observations, contexts)]
        return super().infer_batch(observations, contexts)


def reenact(
    reels: Sequence[Reel],
    policy: Policy,
    scheduler: Callable[[], SequentialScheduler | OverlappedScheduler],
    delays: Delays | None = None,
    seed: int | None = None,
    tolerance: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Run the loop on every reel. delays: of inferences; None for the recorded ones where they are known, else none.

    Where chunks were recorded, the loop runs on them first, and its actions are what the policy's are compared with,
    bit for bit; if it does not ask for them as they were asked for, and where there are none, the commands are.
    tolerance: largest difference of an action that counts as none, in its unit; None for 0 and, against commands,
    COMMAND_TOLERANCE.
    """
    robot = policy.embodiment
    outcome = Outcome("schedule", robot.action_names)
    times, recorded, replayed = [], [], []
    for done, reel in enumerate(reels):
        if on_progress:
            on_progress(done, len(reels))
        episode_seed = reel.seed if seed is None else seed
        target, exact, schedule, over = reel.actions, False, "", np.zeros(len(reel.times), bool)
        if reel.chunks:
            source = _Recorded(robot, reel)
            rows = _run(reel, source, scheduler(), _delays(reel, None, 0), reel.seed)
            exact = not source.strayed
            over = reel.times >= (source.ended_ns or NEVER)
            target = rows if exact else target
        if not exact and reel.chunks:
            schedule = f"schedule: {source.strayed} (a stop, a late chunk, or another --execute and --lead)"
            outcome.notes.append(f"episode {reel.number}: compared with the commands, because of the {schedule}")
        witness, took = _Witness(policy), _delays(reel, delays, episode_seed)
        rows = _run(reel, witness, scheduler(), took, episode_seed)
        if (
            not (exact or reel.said) and robot.action_space == "ee_delta"
        ):  # the loop clips it, so the commands show no more
            rows[:, robot.grippers] = np.clip(rows[:, robot.grippers], -1, 1)
        target, rows = (np.where(over[:, None], np.float32(np.nan), side) for side in (target, rows))
        allowed = tolerance if tolerance is not None else 0.0 if exact else COMMAND_TOLERANCE
        differs = _compare(outcome, robot, reel, target, rows, allowed)
        if differs is not None:
            seen = [item for item in witness.asked if item[0] <= differs]
            outcome.causes += [schedule] if schedule else _why(reel, seen, robot, took)
        times.append(reel.times)
        recorded.append(target)
        replayed.append(rows)
    if on_progress:
        on_progress(len(reels), len(reels))
    if times:
        outcome.times_ns = np.concatenate(times)
        outcome.recorded, outcome.replayed = np.concatenate(recorded), np.concatenate(replayed)
    if seed is not None and any(reel.seed != seed for reel in reels if reel.asked):
        outcome.causes.insert(0, f"seed: recorded {reels[0].seed}, replayed {seed}")
    return outcome


def _run(
    reel: Reel,
    policy: Policy,
    scheduler: SequentialScheduler | OverlappedScheduler,
    delays: Callable[[int], Delay] | None,
    seed: int,
) -> np.ndarray:
    """float32[K, A]: the action that was due in each period, NaN where none was."""
    arm, rows = Arm(policy.embodiment, reel), np.full(reel.actions.shape, np.nan, np.float32)
    loop = control_loop(policy.embodiment, scheduler)

    def note(observation: Observation, command: Command, info: Any) -> None:
        if loop.last[0] is not None:
            rows[arm.index] = loop.last[0].action

    run_episode(arm, policy, loop, seed, delays=delays, on_step=note)
    return rows


def _delays(reel: Reel, delays: Delays | None, seed: int) -> Callable[[int], Delay] | None:
    if delays is not None:
        return delays(seed)
    if not reel.delays:
        return None
    return lambda number: reel.delays[min(number, len(reel.delays) - 1)]


def _compare(
    outcome: Outcome,
    robot: Embodiment,
    reel: Reel,
    target: np.ndarray,
    rows: np.ndarray,
    tolerance: float,
) -> int | None:
    """Samples from the first action of the replay on: before it, the arm waits for its first chunk. Returns the time of
    the outcome's first difference, if it is in this reel."""
    mine, theirs = np.isfinite(rows).all(axis=1), np.isfinite(target).all(axis=1)
    begun = np.cumsum(mine) > 0
    gap = np.abs(rows.astype(np.float64) - target)
    unequal = begun & ((mine != theirs) | np.any(gap > tolerance, axis=1))
    outcome.compared += int(np.sum(begun & (mine | theirs)))
    outcome.different += int(unequal.sum())
    if not np.any(mine):
        outcome.missing.append(f"episode {reel.number}: no action became due in {len(rows)} periods")
    if not np.any(unequal) or outcome.first is not None:
        return None
    k = int(np.flatnonzero(unequal)[0])
    outcome.first = difference(robot, reel.number, -1, k, int(reel.times[k]), target[k], rows[k])
    return int(reel.times[k])


def _why(
    reel: Reel, asked: Sequence[tuple[int, np.ndarray | None]], robot: Embodiment, took: Callable[[int], Delay] | None
) -> list[str]:
    """The first inference that was about another observation or other committed actions than the recorded one, or that
    took more or fewer control periods."""
    if not reel.asked:
        return ["no policy drove this recording: these are differences from its operator"]
    period_ns, start_ns = round(robot.period_s * NS_PER_S), int(reel.times[0])
    for number, (theirs, mine) in enumerate(zip(reel.asked, asked)):
        chunk = f"latency: chunk {number}"
        if abs(theirs[0] - mine[0]) > period_ns // 2:
            seen = [f"{(stamp - start_ns) / NS_PER_S:.3f} s" for stamp in (theirs[0], mine[0])]
            return [f"{chunk} came from the observation at {seen[0]}, now from the one at {seen[1]}"]
        if theirs[1] is not None and not _alike(theirs[1], mine[1]):
            counts = [0 if committed is None else len(committed) for committed in (theirs[1], mine[1])]
            return [f"{chunk} was asked for with other committed actions ({counts[0]}, now {counts[1]})"]
        lasted = reel.delays[number].total_ns, took(number).total_ns if took else 0
        if -(-lasted[0] // period_ns) != -(-lasted[1] // period_ns):
            return [f"{chunk} took {lasted[0] / 1e6:.1f} ms, now {lasted[1] / 1e6:.1f} ms"]
    return [ANSWERED_OTHERWISE]


def _alike(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return (a is None) == (b is None) and (
        a is None or b is None or (a.shape == b.shape and np.allclose(a, b, atol=1e-3))
    )
