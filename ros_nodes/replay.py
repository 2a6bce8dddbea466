"""A recording run again: the same cores and the same loop on what was recorded, and the first action that differs.

Two ways:

    requests   the recording has /vla/request and /vla/chunk: every answered request is put to the policy core again,
               with the messages that the policy had, in their order, and its chunk is compared bit for bit. The
               observation is the one that the recorded chunk names by its stamp.
    schedule   without them, or with other latencies: the control loop runs on the recorded observations at its own
               times (ros_nodes/reenact.py), and its due actions are compared with what was commanded.

In both the observations do not answer: after the first difference the recording shows what the *recorded* actions did.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ros_nodes.bag import Bag
from ros_nodes.messages import CompressedImage, Image, JointState, Message, Status, Text, Trajectory, decode
from ros_nodes.node import CHUNK, HEARTBEAT, REQUEST, Effects, Job, Now, Send
from ros_nodes.policy_node import PolicyCore
from ros_nodes.request import ChunkId, Request
from vla.embodiment import Embodiment
from vla.errors import DataError, TransportError, explain
from vla.runtime.scheduler import request_seed
from vla.types import NS_PER_S

ANSWERED_OTHERWISE = "policy: it was asked the same, and answered otherwise"
_STAMPS_KEPT = 1000  # per topic, of what was given
FACTS = ("bundle", "parts", "torch", "device")  # of the heartbeat's values: what decides a chunk, beside its inputs


@dataclass(frozen=True)
class Difference:
    """The first action that differs. at_ns: its due time. chunk, action: which. name: of the dimension that differs
    most. recorded, replayed: its values, None where there was no action. size: their distance."""

    episode: int
    chunk: int
    action: int
    at_ns: int
    name: str
    recorded: float | None
    replayed: float | None
    size: float


@dataclass
class Outcome:
    """What a replay found.

    way: requests or schedule. compared: actions. different: of these. missing: what could not be replayed, and why.
    causes: what is known to be unlike the recorded run. notes: what limits the comparison.
    times_ns: int64[N], due times of the executed actions; recorded, replayed: float32[N, A], NaN for none.
    """

    way: str
    names: tuple[str, ...]
    compared: int = 0
    different: int = 0
    first: Difference | None = None
    missing: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    times_ns: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    recorded: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    replayed: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))

    @property
    def same(self) -> bool:
        """Everything was replayed and nothing differs."""
        return self.compared > 0 and not self.different and not self.missing

    def errors(self) -> dict[str, dict[str, float]]:
        """{action name: {max, rms}} of recorded against replayed, over actions that both have."""
        out = {}
        for column, name in enumerate(self.names):
            gap = np.abs(self.recorded[:, column].astype(np.float64) - self.replayed[:, column])
            gap = gap[np.isfinite(gap)]
            out[name] = {
                "max": float(gap.max(initial=0.0)),
                "rms": float(np.sqrt(np.mean(gap**2))) if len(gap) else 0.0,
            }
        return out

    def to_dict(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "way": self.way,
            "compared": self.compared,
            "different": self.different,
            "first": None if self.first is None else vars(self.first),
            "causes": self.causes,
            "missing": self.missing,
            "notes": self.notes,
            "errors": self.errors(),
        }


@dataclass(frozen=True)
class Answer:
    """A recorded request and the chunk that answered it. asked_ns, begin_ns, log_ns: when it was asked for, when its
    inference must have begun, and when it came."""

    request: Request
    chunk: Trajectory
    identity: ChunkId
    asked_ns: int
    begin_ns: int
    log_ns: int


def answers(bag: Bag) -> tuple[list[Answer], int]:
    """All answered requests in the order of their chunks, and how many requests have no chunk in the recording."""
    asked: dict[tuple[int, int], tuple[int, Request]] = {}
    found: list[Answer] = []
    total = 0
    for topic, log_ns, data in bag.messages([REQUEST.topic, CHUNK.topic]):
        try:
            message = decode(bag.topics[topic].type_name, data)
            if topic == REQUEST.topic and isinstance(message, Text):
                request = Request.read(message)
                asked[request.episode, request.number] = (log_ns, request)
                total += 1
            elif topic == CHUNK.topic and isinstance(message, Trajectory):
                identity = ChunkId.read(message.frame_id)
                said = asked.get((identity.episode, identity.request))
                if said is not None:
                    begin_ns = log_ns - identity.infer_us * 1000
                    found.append(Answer(said[1], message, identity, said[0], begin_ns, log_ns))
        except TransportError:  # hostile bytes were recorded as well; the policy did not act on them either
            continue
    return found, max(0, total - len(found))


class _Feed:
    """Gives a policy core the recorded messages, each once and in their order.

    A chunk names the messages that its observation was made of (its stamp, and ChunkId.offsets_ns). Those that the core
    would prefer to them had not reached the policy yet: they wait until the request is answered. Pictures that were
    recorded compressed are handed on as pictures. Raises DataError when a topic that the core hears is not there.
    """

    def __init__(self, bag: Bag, core: PolicyCore):
        self._bag, self._core = bag, core
        self._topics: dict[str, str] = {}  # in the recording -> as the core knows it
        pictures = []
        for endpoint in core.subscriptions:
            topic = endpoint.topic
            if topic == REQUEST.topic:
                continue
            if topic not in bag.topics and f"{topic}/compressed" in bag.topics:
                self._topics[f"{topic}/compressed"] = topic
            elif topic in bag.topics:
                self._topics[topic] = topic
            else:
                known = ", ".join(sorted(bag.topics))
                raise DataError(explain(topic, "a recorded topic", f"only {known}", "The policy cannot do without."))
            if endpoint.type_name in (Image.type_name, CompressedImage.type_name):
                pictures.append(topic)
        self.compressed = [topic for topic, known in self._topics.items() if topic != known]
        states = [e.topic for e in core.subscriptions if e.type_name == JointState.type_name]
        self._sources = (pictures[0], *states, *pictures[1:])  # in the order of stamp and offsets
        self._messages = self._decoded()
        self._ahead: deque[tuple[str, int, Message]] = deque()  # given next
        self._held: list[tuple[str, int, Message]] = []  # too new for the request that is being answered
        self._chunks: list[Trajectory] = []
        self._given: dict[str, deque[int]] = {topic: deque(maxlen=_STAMPS_KEPT) for topic in self._sources}
        self.now_ns = 0

    def _decoded(self) -> Iterator[tuple[str, int, Message]]:
        for topic, log_ns, data in self._bag.messages(self._topics):
            try:
                message = decode(self._bag.topics[topic].type_name, data)
                if isinstance(message, CompressedImage) and topic in self.compressed:
                    message = Image(message.stamp_ns, message.frame_id, "rgb8", message.rgb())
            except TransportError:  # the policy did not take it either
                continue
            yield self._topics[topic], log_ns, message

    def chosen(self, answer: Answer) -> dict[str, int]:
        """{topic: stamp} of the messages that the recorded observation was made of, as far as it is known."""
        stamp_ns = answer.chunk.stamp_ns
        offsets = (0, *answer.identity.offsets_ns)
        return dict(zip(self._sources, (stamp_ns + offset for offset in offsets)))

    def until(self, log_ns: int, chosen: Mapping[str, int], enough: Callable[[], bool] = lambda: False) -> None:
        """Give what was received up to log_ns, or until it is enough; what would be preferred to `chosen` waits."""
        self._ahead.extendleft(reversed(self._held))
        self._held = []
        while self._ahead or self._fetch():
            topic, at_ns, message = self._ahead.popleft()
            if at_ns > log_ns:
                self._ahead.appendleft((topic, at_ns, message))
                return
            if topic in self._given and isinstance(message, (Image, CompressedImage, JointState)):
                if self._preferred(topic, message.stamp_ns, chosen):
                    self._held.append((topic, at_ns, message))
                    continue
                self._given[topic].append(message.stamp_ns)
            self.now_ns = max(self.now_ns, at_ns)
            self.perform(self._core.on_message(topic, message, self.now()))
            if enough():
                return

    def _preferred(self, topic: str, stamp_ns: int, chosen: Mapping[str, int]) -> bool:
        """The newest frame of the first camera decides; of the others, those that are nearest to it."""
        if topic not in chosen:
            return False
        if topic == self._sources[0]:
            return stamp_ns > chosen[topic]
        lead_ns = chosen[self._sources[0]]
        return stamp_ns != chosen[topic] and abs(stamp_ns - lead_ns) <= abs(chosen[topic] - lead_ns)

    def reach(self, log_ns: int, chosen: Mapping[str, int]) -> list[str]:
        """Give messages until all of `chosen` are among them; those that never come."""

        def absent() -> list[str]:
            return [topic for topic, stamp_ns in chosen.items() if stamp_ns not in self._given[topic]]

        if absent():
            self.until(log_ns, chosen, lambda: not absent())
        return absent()

    def _fetch(self) -> bool:
        item = next(self._messages, None)
        if item is not None:
            self._ahead.append(item)
        return item is not None

    def ask(self, request: Request) -> None:
        self.perform(self._core.on_message(REQUEST.topic, request.text(), self.now()))

    def perform(self, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, Trajectory):
                self._chunks.append(effect.message)
            elif isinstance(effect, Job):
                try:
                    value: Any = effect.run()
                except Exception as error:  # as the shell's worker hands it on
                    value = error
                self.perform(self._core.on_result(effect.name, value, self.now()))

    def answered(self) -> bool:
        return bool(self._chunks)

    def taken(self) -> Trajectory | None:
        """The chunk that came since the last call."""
        chunk = self._chunks[-1] if self._chunks else None
        self._chunks.clear()
        return chunk

    def now(self) -> Now:
        return Now(self.now_ns, self.now_ns, self.now_ns)


def replay_requests(
    bag: Bag,
    core: PolicyCore,
    robot: Embodiment,
    seed: int | None = None,
    facts: Mapping[str, str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Put every answered request of the recording to the policy of `core` again. robot: the policy's. seed: instead of
    the recorded ones. facts: what is replayed with, see FACTS. DataError for a recording without requests and chunks.
    """
    found, unanswered = answers(bag)
    if not found:
        remedy = "Record them with `vla record`, or replay on the loop's own schedule."
        raise DataError(explain(str(bag.path), f"{REQUEST.topic} and the chunks that answer", "none", remedy))
    outcome = Outcome("requests", robot.action_names)
    feed = _Feed(bag, core)
    numbers: dict[int, int] = {}  # of a chunk when it was recorded -> now
    rows: list[tuple[Answer, np.ndarray]] = []
    early: list[str] = []
    for done, answer in enumerate(found):
        if on_progress:
            on_progress(done, len(found))
        request = answer.request
        if request.previous >= 0 and request.previous not in numbers:
            early.append(f"memory: request {request.number} of episode {request.episode} goes on from a chunk that is "
                         "not in the recording, or was not replayed")  # fmt: skip
        if seed is not None:
            request = replace(request, seed=seed, infer_seed=request_seed(seed, request.number))
        chosen = feed.chosen(answer)
        feed.until(answer.begin_ns, chosen)
        absent = feed.reach(answer.log_ns, chosen)
        feed.now_ns = max(feed.now_ns, answer.begin_ns)
        chunk = None
        if not absent:
            feed.ask(replace(request, previous=numbers.get(request.previous, -1)))
            if not feed.answered():
                feed.until(answer.log_ns, chosen, feed.answered)
            chunk = feed.taken()
        if chunk is None or not _same_observation(chunk, answer):
            outcome.missing.append(_unanswered(answer, core, feed, absent))
            continue
        numbers[answer.identity.number] = ChunkId.read(chunk.frame_id).number
        rows.append((answer, chunk.positions.astype(np.float32)))
        _compare(outcome, answer, len(rows) - 1, rows[-1][1], robot)
    if on_progress:
        on_progress(len(found), len(found))
    _executed(outcome, rows, robot)
    outcome.causes = causes(bag, facts or {}, outcome)
    if seed is not None and any(answer.request.seed != seed for answer in found):
        outcome.causes.insert(0, f"seed: recorded {found[0].request.seed}, replayed {seed}")
    if outcome.different and not all(answer.identity.offsets_ns for answer in found):
        outcome.causes.append("the chunks do not say which joint states they came from, so perhaps others")
    if outcome.different and early:
        outcome.causes.append(early[0])
    if outcome.different and not outcome.causes and not outcome.missing:
        largest = max(error["max"] for error in outcome.errors().values())
        outcome.causes.append(
            f"numerical: the same bundle, parts and inputs, {largest:.3g} at most (another CPU or library?)"
        )
    if feed.compressed:
        outcome.notes.append(f"recorded compressed, so perhaps not what the policy saw: {', '.join(feed.compressed)}")
    if unanswered:
        outcome.notes.append(f"{unanswered} requests have no chunk in the recording")
    if bag.incomplete:
        outcome.notes.append(bag.incomplete)
    return outcome


def _same_observation(chunk: Trajectory, answer: Answer) -> bool:
    offsets = answer.identity.offsets_ns
    return chunk.stamp_ns == answer.chunk.stamp_ns and offsets in ((), ChunkId.read(chunk.frame_id).offsets_ns)


def _unanswered(answer: Answer, core: PolicyCore, feed: _Feed, absent: Sequence[str]) -> str:
    """Why the policy gave no chunk; what it still waits for is forgotten."""
    request = answer.request
    stamps = feed.chosen(answer)
    why = "observation missing: " + ", ".join(f"{topic} stamped {stamps[topic]}" for topic in absent)
    if not absent:
        said = core.status(feed.now()).message
        why = f"observation missing: it cannot be put together as it was ({said})"
        feed.ask(replace(request, start_ns=2**62))
    return f"request {request.number} of episode {request.episode}: {why}"


def _compare(outcome: Outcome, answer: Answer, place: int, replayed: np.ndarray, robot: Embodiment) -> None:
    """Count what differs, bit for bit; a chunk of another length differs in the actions that one of them lacks."""
    recorded = answer.chunk.positions.astype(np.float32)
    length, width = max(len(recorded), len(replayed)), robot.action_dim
    both = np.full((2, length, width), np.nan, np.float32)
    both[0, : len(recorded)], both[1, : len(replayed)] = recorded, replayed
    unequal = np.any(both[0].view(np.int32) != both[1].view(np.int32), axis=1)
    outcome.compared += length
    outcome.different += int(unequal.sum())
    if outcome.first is None and np.any(unequal):
        row = int(np.flatnonzero(unequal)[0])
        period_ns = round(robot.period_s * NS_PER_S)
        outcome.first = difference(
            robot,
            answer.request.episode,
            place,
            row,
            answer.chunk.stamp_ns + row * period_ns,
            both[0, row],
            both[1, row],
        )


def difference(
    robot: Embodiment, episode: int, chunk: int, action: int, at_ns: int, recorded: np.ndarray, replayed: np.ndarray
) -> Difference:
    """recorded, replayed: float32[A], NaN for an action that one side does not have."""
    gap = np.abs(recorded.astype(np.float64) - replayed)
    column = int(np.argmax(np.where(np.isnan(gap), -1.0, gap)))
    values = [None if np.isnan(side[column]) else float(side[column]) for side in (recorded, replayed)]
    size = float(gap[column]) if np.isfinite(gap[column]) else float("inf")
    return Difference(episode, chunk, action, at_ns, robot.action_names[column], values[0], values[1], size)


def _executed(outcome: Outcome, rows: list[tuple[Answer, np.ndarray]], robot: Embodiment) -> None:
    """The actions of each chunk up to the next chunk's first: what was executed, or nearly."""
    period_ns = round(robot.period_s * NS_PER_S)
    times, recorded, replayed = [], [], []
    for place, (answer, mine) in enumerate(rows):
        theirs = answer.chunk.positions.astype(np.float32)
        count = min(len(theirs), len(mine))
        if place + 1 < len(rows):
            ahead = (rows[place + 1][0].chunk.stamp_ns - answer.chunk.stamp_ns) // period_ns
            count = min(count, ahead) if ahead > 0 else count
        times.append(answer.chunk.stamp_ns + period_ns * np.arange(count))
        recorded.append(theirs[:count])
        replayed.append(mine[:count])
    if times:
        outcome.times_ns = np.concatenate(times)
        outcome.recorded, outcome.replayed = np.concatenate(recorded), np.concatenate(replayed)


def recorded_facts(bag: Bag) -> dict[str, str]:
    """What the policy said of itself in its heartbeats, see FACTS; {} where it did not."""
    for topic, _, data in bag.messages({HEARTBEAT.topic} & set(bag.topics)):
        try:
            message = decode(bag.topics[topic].type_name, data)
        except TransportError:
            continue
        if isinstance(message, Status) and any(key in message.values for key in FACTS):
            return {key: message.values[key] for key in FACTS if key in message.values}
    return {}


def causes(bag: Bag, facts: Mapping[str, str], outcome: Outcome) -> list[str]:
    """What is unlike the recorded run, in words."""
    theirs = recorded_facts(bag)
    out = []
    for key in FACTS:
        if key in theirs and key in facts and theirs[key] != facts[key]:
            out.append(_unlike(key, theirs[key], facts[key]))
    unknown = [key for key in FACTS if key not in theirs and key in facts]
    if unknown and outcome.different:
        out.append(f"not recorded, so perhaps another: {', '.join(unknown)}")
    return out


def _unlike(key: str, recorded: str, replayed: str) -> str:
    if key != "parts":
        return f"{key}: recorded {recorded}, replayed {replayed}"
    theirs, mine = json.loads(recorded), json.loads(replayed)
    changed = [group for group in {**theirs, **mine} if theirs.get(group) != mine.get(group)]
    words = [f"{group}: recorded {_say(theirs.get(group))}, replayed {_say(mine.get(group))}" for group in changed]
    return "; ".join(words)


def _say(part: Mapping[str, Any] | None) -> str:
    """A config as the call that it makes; `none chosen` for a part that was left at its default."""
    if part is None:
        return "none chosen"
    arguments = ", ".join(f"{key}={value!r}" for key, value in part.items() if key != "_target_")
    return f"{str(part.get('_target_', '')).rpartition('.')[2]}({arguments})"
