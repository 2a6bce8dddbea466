"""What command node and policy node say to each other beside the actions.

A request is JSON in a std_msgs/String, versioned. It carries what a decoder needs to know about execution (see
vla.policy.InferContext), so that the policy node needs no view of the robot's commands. Numbers survive unchanged:
float32 -> JSON -> float32 is exact. The answer is a JointTrajectory whose frame_id is a ChunkId.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from ros_nodes.messages import Text
from vla.errors import TransportError, explain
from vla.policy import DecodeReport, InferContext

VERSION = 1
MAX_COMMITTED = 256
MAX_ID_CHARS = 400
CONFIDENCE = "_confidence"  # a note of this name is DecodeReport's; decoders have one of their own
_REASON_CHARS = 60


@dataclass(frozen=True, eq=False)
class Request:
    """episode, seed: of the episode; a new one resets the policy. number: running, per episode.

    start_ns: oldest stamp an observation may have. previous: number of the chunk that runs (as the policy numbered it),
    -1 for none; previous_start_ns: due time of its action 0. executed, committed (float32[C, A] or None): see
    InferContext. infer_seed: randomness of this one inference.
    """

    episode: int
    seed: int
    number: int
    start_ns: int
    infer_seed: int = 0
    previous: int = -1
    previous_start_ns: int = 0
    executed: int = 0
    committed: np.ndarray | None = None

    @classmethod
    def of(cls, context: InferContext, episode: int, seed: int, number: int, start_ns: int, previous: int) -> Request:
        """From the scheduler's context; `previous` is the policy's number of the chunk that context.previous is."""
        return cls(
            episode, seed, number, start_ns, context.seed, -1 if context.previous is None else previous,
            0 if context.previous is None else context.previous.start_ns, context.executed, context.committed,
        )  # fmt: skip

    def text(self) -> Text:
        committed = None if self.committed is None else [[float(x) for x in row] for row in self.committed]
        return Text.of(
            v=VERSION, episode=self.episode, seed=self.seed, number=self.number, start_ns=self.start_ns,
            infer_seed=self.infer_seed, previous=self.previous, previous_start_ns=self.previous_start_ns,
            executed=self.executed, committed=committed,
        )  # fmt: skip

    @classmethod
    def read(cls, message: Text) -> Request:
        """Inverse of `text`. TransportError for another version, a missing key or a wrong kind of value."""
        data = message.object()
        if data.get("v") != VERSION:
            raise TransportError(
                explain("request.v", VERSION, data.get("v"), "Run command and policy node of one release.")
            )
        numbers = {key: whole(data, key, "request.") for key in _KEYS}
        raw = data.get("committed")
        committed = None
        if raw is not None:
            try:
                committed = np.array(raw, np.float32)
            except (TypeError, ValueError, OverflowError) as error:
                raise TransportError(
                    explain("request.committed", "rows of numbers", str(raw)[:40], "Rows must be equally long.")
                ) from error
            if committed.ndim != 2 or len(committed) > MAX_COMMITTED or not np.all(np.isfinite(committed)):
                raise TransportError(
                    explain("request.committed", f"finite float32[C <= {MAX_COMMITTED}, A]", committed.shape, "Fix it.")
                )
        return cls(**numbers, committed=committed)


_KEYS = ("episode", "seed", "number", "start_ns", "infer_seed", "previous", "previous_start_ns", "executed")


def whole(data: dict[str, Any], key: str, prefix: str = "") -> int:
    """data[key] of a JSON object, a 64-bit integer; TransportError for anything else. prefix: of the key in it."""
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        got = repr(value)[:40] if key in data else "nothing"
        raise TransportError(explain(prefix + key, "a 64-bit integer", got, f"Send {prefix + key}, a whole number."))
    return value


def seconds(data: dict[str, Any], key: str) -> float:
    """data[key] of a JSON object, 0 where it is not; TransportError for what is no time."""
    value = data.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise TransportError(explain(key, "seconds, 0 or more", repr(value)[:40], f"Send a number as {key}, or none."))
    return float(value)


@dataclass(frozen=True)
class ChunkId:
    """Which request a chunk answers, and what it took; travels as `v1/episode/request/number/us/passes/repaired`,
    then, commas between, the offsets and the notes as name=value, and at the end, percent-encoded, why it was reused.

    number: running number of the policy process. infer_us: wall time of the inference. offsets_ns: of each topic of
    joint states and of each camera after the first, against the chunk's stamp: which messages the observation was made
    of. () where that is not known. notes, reused: see DecodeReport, whose confidence is a note here. Notes have six
    digits on the way, and what does not fit is left out.
    """

    episode: int
    request: int
    number: int
    infer_us: int = 0
    passes: int = 0
    repaired: int = 0
    offsets_ns: tuple[int, ...] = ()
    notes: tuple[tuple[str, float], ...] = ()
    reused: str = ""

    @property
    def report(self) -> DecodeReport:
        """What the trace keeps of it; confidence NaN where the policy told none."""
        notes = dict(self.notes)
        confidence = notes.pop(CONFIDENCE, math.nan)
        return DecodeReport(
            passes=self.passes, repaired=self.repaired, confidence=confidence, notes=notes, reused=self.reused
        )

    def text(self) -> str:
        numbers = (self.episode, self.request, self.number, self.infer_us, self.passes, self.repaired)
        text = "/".join(["v1", *map(str, numbers), ",".join(map(str, self.offsets_ns))]).rstrip("/")
        between, why = "/" if self.offsets_ns else "//", quote(self.reused[:_REASON_CHARS], safe=" ")
        most = MAX_ID_CHARS - len(why) - 3
        for name, value in self.notes:
            note = f"{between}{name}={value:.6g}"
            if not name.isidentifier() or len(text) + len(note) > most:
                continue
            text, between = text + note, ","
        why = "/" * (9 - text.count("/")) + why
        return text + why if self.reused and len(text) + len(why) <= MAX_ID_CHARS else text

    @classmethod
    def read(cls, text: str) -> ChunkId:
        """Inverse of `text`, or TransportError."""
        version, *rest = text[:MAX_ID_CHARS].split("/")
        try:
            numbers = [int(item) for item in rest[:6]]
            offsets = tuple(int(item) for item in filter(None, ",".join(rest[6:7]).split(",")))
            pairs = [item.partition("=") for item in filter(None, ",".join(rest[7:8]).split(","))]
            notes = tuple((name, float(value)) for name, _, value in pairs)
            reused = unquote("".join(rest[8:9]))
        except ValueError:
            numbers = []
        if version != "v1" or len(numbers) != 6 or len(rest) > 9 or not rest[-1]:
            raise TransportError(
                explain("chunk frame_id", "v1/ and six whole numbers", repr(text[:60]), "Run nodes of one release.")
            )
        episode, request, number, infer_us, passes, repaired = numbers
        return cls(episode, request, number, infer_us, passes, repaired, offsets, notes, reused)
