"""What the control loop saw, decided and sent: preallocated rows, one MCAP file. numpy and mcap only.

`tick` and `inference` copy numbers into preallocated arrays and do nothing else; they are called inside the control
period. Files are written after the fact. The MCAP opens in Foxglove: JSON channels with schemas, one per topic below,
and compressed camera images as foxglove.CompressedImage.

    /vla/action       the action that was due           /vla/joint_states  measured positions
    /vla/command      what the Gate let through         /vla/inference     one message per chunk
    /vla/gate         verdict and reason                /vla/episode       one message per episode
    /vla/images/NAME  camera images, if any were added
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mcap.reader import make_reader
from mcap.writer import CompressionType, Writer

from vla.embodiment import Embodiment
from vla.errors import ConfigError, DataError, explain
from vla.files import replacing
from vla.policy import DecodeReport
from vla.runtime.gate import Decision, Reason, Verdict
from vla.runtime.scheduler import DueAction
from vla.types import NS_PER_S

_META = "vla_trace"
_FORMAT = 1
_EPISODE_GAP_NS = 2 * NS_PER_S  # longer than any pause within an episode
_TIME = {"type": "object", "properties": {"sec": {"type": "integer"}, "nsec": {"type": "integer"}}}
_NUMBERS = {"type": "array", "items": {"type": ["number", "null"]}}


@dataclass(frozen=True)
class EpisodeRow:
    """One finished episode, as it is stored in the trace and counted in the summary."""

    seed: int
    task: str
    instruction: str
    success: bool
    steps: int
    stamp_ns: int


@dataclass(frozen=True)
class ImageRow:
    camera: str
    stamp_ns: int
    data: bytes
    format: str


def _zeros(shape: int | tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
    """Written once, so that the memory is there from the start and not taken page by page in the control loop."""
    return np.full(shape, 0, dtype)


class Trace:
    """Rows of one run. `capacity` ticks; what comes after is counted in `dropped_rows`, never reallocated.

    Columns (numpy arrays, valid up to `rows`): tick_ns, due_ns, action [A], command [D], measured [D], verdict, reason,
    chunk, index (-1 where no action was due), stamp_ns (observation the action came from, -1 if not known), late_ns,
    cost_us (time the tick took).
    Inference columns (up to `inferences`): infer_stamp_ns (observation), infer_start_ns, infer_end_ns (asked and
    answered, on the loop's clock), infer_ms (what the policy took), infer_passes, infer_repaired, infer_accepted,
    infer_confidence (nan if not known), and as lists infer_notes (what the decoder told, by name) and infer_reused (why
    the last chunk stood, "" for a real forward); see DecodeReport.
    """

    def __init__(self, embodiment: Embodiment, capacity: int = 1 << 16, inference_capacity: int | None = None) -> None:
        if capacity < 1:
            raise ConfigError(explain("capacity", "at least 1 row", capacity, "Reserve one row per control tick."))
        self.embodiment = embodiment
        self.capacity = capacity
        self.inference_capacity = capacity if inference_capacity is None else inference_capacity
        joints = len(embodiment.command_names)
        self.rows = self.inferences = self.dropped_rows = 0
        self.tick_ns = _zeros(capacity, np.int64)
        self.due_ns = _zeros(capacity, np.int64)
        self.action = _zeros((capacity, embodiment.action_dim))
        self.command = _zeros((capacity, joints))
        self.measured = _zeros((capacity, joints))
        self.verdict = _zeros(capacity, np.uint8)
        self.reason = _zeros(capacity, np.uint8)
        self.chunk = _zeros(capacity, np.int32)
        self.index = _zeros(capacity, np.int32)
        self.stamp_ns = np.full(capacity, -1, np.int64)
        self.late_ns = _zeros(capacity, np.int64)
        self.cost_us = _zeros(capacity, np.float32)
        self.missed = _zeros(capacity, np.int32)
        slots = self.inference_capacity
        self.infer_stamp_ns = _zeros(slots, np.int64)
        self.infer_start_ns = _zeros(slots, np.int64)
        self.infer_end_ns = _zeros(slots, np.int64)
        self.infer_ms = _zeros(slots, np.float64)
        self.infer_passes = _zeros(slots, np.int32)
        self.infer_repaired = _zeros(slots, np.int32)
        self.infer_accepted = _zeros(slots, np.bool_)
        self.infer_confidence = np.full(slots, np.nan)
        self.infer_notes: list[Mapping[str, float]] = [{}] * slots
        self.infer_reused = [""] * slots
        self.episodes: list[EpisodeRow] = []
        self.images: list[ImageRow] = []
        self._shift_ns = self._last_ns = 0

    # ---- recording ----
    def clear(self) -> None:
        """Forget all rows, images and episodes; the memory stays."""
        self.rows = self.inferences = self.dropped_rows = 0
        self.episodes.clear()
        self.images.clear()
        self._shift_ns = self._last_ns = 0

    def begin(self, now_ns: int) -> None:
        """An episode begins. Simulated clocks start anew each time; later stamps are moved behind the last one."""
        if self.rows:
            self._shift_ns = max(0, self._last_ns + _EPISODE_GAP_NS - now_ns)

    def tick(
        self, now_ns: int, due: DueAction | None, decision: Decision, measured: np.ndarray, missed: int, cost_us: float
    ) -> None:
        """Append one control tick. missed: slots that passed without an action since the last tick."""
        row = self.rows
        if row >= self.capacity:
            self.dropped_rows += 1
            return
        stamp_ns = self._last_ns = now_ns + self._shift_ns
        self.tick_ns[row] = stamp_ns
        if due is None:
            self.due_ns[row] = stamp_ns
            self.action[row] = np.nan
            self.chunk[row] = self.index[row] = -1
            self.late_ns[row], self.stamp_ns[row] = 0, -1
        else:
            self.due_ns[row] = due.due_ns + self._shift_ns
            self.action[row] = due.action if due.action.shape == self.action.shape[1:] else np.nan
            self.chunk[row] = due.chunk_number
            self.index[row] = due.index
            self.late_ns[row] = now_ns - due.due_ns
            self.stamp_ns[row] = self._shifted(due.stamp_ns)
        self.command[row] = decision.values
        self.measured[row] = measured if np.shape(measured) == self.measured.shape[1:] else np.nan
        self.verdict[row] = decision.verdict
        self.reason[row] = decision.reason
        self.missed[row] = missed
        self.cost_us[row] = cost_us
        self.rows = row + 1

    def inference(
        self,
        start_ns: int,
        end_ns: int,
        took_ms: float,
        report: DecodeReport | None = None,
        accepted: bool = True,
        stamp_ns: int = -1,
    ) -> None:
        """Append one inference: asked and answered on the loop's clock, what the policy took of that, and the stamp of
        the observation, -1 if not known."""
        row = self.inferences
        if row >= self.inference_capacity:
            self.dropped_rows += 1
            return
        shift = self._shift_ns
        self.infer_start_ns[row], self.infer_end_ns[row], self.infer_ms[row] = start_ns + shift, end_ns + shift, took_ms
        self.infer_stamp_ns[row] = self._shifted(stamp_ns)
        if report is not None:
            self.infer_passes[row], self.infer_repaired[row] = report.passes, report.repaired
        self.infer_confidence[row] = np.nan if report is None else report.confidence
        self.infer_notes[row], self.infer_reused[row] = ({}, "") if report is None else (report.notes, report.reused)
        self.infer_accepted[row] = accepted
        self.inferences = row + 1

    def _shifted(self, stamp_ns: int) -> int:
        return stamp_ns if stamp_ns < 0 else stamp_ns + self._shift_ns

    def add_episode(self, episode: EpisodeRow) -> None:
        self.episodes.append(replace(episode, stamp_ns=episode.stamp_ns + self._shift_ns))

    def add_image(self, camera: str, stamp_ns: int, data: bytes, format: str = "jpeg") -> None:
        """Keep one compressed image ("jpeg" or "png" bytes) for the file. Not for the control period."""
        self.images.append(ImageRow(camera, stamp_ns + self._shift_ns, data, format))

    # ---- file ----
    def save_mcap(self, path: str | Path) -> Path:
        """Write everything to one MCAP file, atomically, messages in order of time."""
        path = Path(path)
        with replacing(path) as temporary, temporary.open("wb") as stream:
            self._write(stream)
        return path

    def _write(self, stream: Any) -> None:
        writer = Writer(stream, compression=CompressionType.ZSTD)
        writer.start(profile="", library="vla-stack")
        meta = {
            "format": str(_FORMAT),
            "embodiment": json.dumps(self.embodiment.to_dict()),
            "dropped_rows": str(self.dropped_rows),
        }
        writer.add_metadata(_META, meta)
        channels: dict[str, int] = {}
        for sequence, (stamp_ns, topic, body) in enumerate(self._messages()):
            if topic not in channels:
                name, properties = _schema(topic)
                data = json.dumps({"type": "object", "properties": properties}).encode()
                schema = writer.register_schema(name=name, encoding="jsonschema", data=data)
                channels[topic] = writer.register_channel(topic=topic, message_encoding="json", schema_id=schema)
            data = json.dumps({"timestamp": _time(stamp_ns), **body}, allow_nan=False).encode()
            writer.add_message(channels[topic], log_time=stamp_ns, publish_time=stamp_ns, data=data, sequence=sequence)
        writer.finish()

    def _messages(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(stamp_ns, topic, body) in order of time; a tick's messages stay together."""
        counts = (self.rows, self.inferences, len(self.episodes), len(self.images))
        episode_ns = np.array([episode.stamp_ns for episode in self.episodes], np.int64)
        image_ns = np.array([image.stamp_ns for image in self.images], np.int64)
        stamps = np.concatenate([self.tick_ns[: self.rows], self.infer_end_ns[: self.inferences], episode_ns, image_ns])
        starts = np.cumsum((0, *counts))
        for entry in np.argsort(stamps, kind="stable"):
            kind = int(np.searchsorted(starts, entry, side="right")) - 1
            row, stamp_ns = int(entry - starts[kind]), int(stamps[entry])
            if kind == 0:
                yield from self._tick_messages(row)
            elif kind == 1:
                yield stamp_ns, "/vla/inference", self._inference_message(row)
            elif kind == 2:
                yield stamp_ns, "/vla/episode", asdict(self.episodes[row])
            else:
                yield stamp_ns, f"/vla/images/{self.images[row].camera}", _image_message(self.images[row])

    def _tick_messages(self, row: int) -> list[tuple[int, str, dict[str, Any]]]:
        stamp_ns = int(self.tick_ns[row])
        names = list(self.embodiment.command_names)
        out: list[tuple[int, str, dict[str, Any]]] = []
        if self.chunk[row] >= 0:
            body = {
                "names": list(self.embodiment.action_names),
                "values": _numbers(self.action[row]),
                "due_ns": int(self.due_ns[row]),
                "late_ms": float(self.late_ns[row]) * 1e-6,
                "chunk": int(self.chunk[row]),
                "index": int(self.index[row]),
                "stamp_ns": int(self.stamp_ns[row]),
            }
            out.append((stamp_ns, "/vla/action", body))
        out.append((stamp_ns, "/vla/command", {"names": names, "values": _numbers(self.command[row])}))
        out.append((stamp_ns, "/vla/joint_states", {"names": names, "values": _numbers(self.measured[row])}))
        verdict, reason = Verdict(int(self.verdict[row])), Reason(int(self.reason[row]))
        gate = {
            "verdict": verdict.name.lower(),
            "verdict_code": int(verdict),
            "reason": reason.text,
            "reason_code": int(reason),
            "missed": int(self.missed[row]),
            "cost_us": float(self.cost_us[row]),
        }
        out.append((stamp_ns, "/vla/gate", gate))
        return out

    def _inference_message(self, row: int) -> dict[str, Any]:
        return {
            "stamp_ns": int(self.infer_stamp_ns[row]),
            "start_ns": int(self.infer_start_ns[row]),
            "end_ns": int(self.infer_end_ns[row]),
            "wall_ms": float(self.infer_ms[row]),
            "passes": int(self.infer_passes[row]),
            "repaired": int(self.infer_repaired[row]),
            "accepted": bool(self.infer_accepted[row]),
            "confidence": _number(self.infer_confidence[row]),
            "notes": {name: _number(value) for name, value in self.infer_notes[row].items()},
            "reused": self.infer_reused[row],
        }

    @classmethod
    def load_mcap(cls, path: str | Path) -> Trace:
        """Read what save_mcap wrote. DataError when the file is truncated, or another kind of MCAP."""
        path = Path(path)
        remedy = "Give a trace.mcap written by a run of this project, or record it again."
        try:
            with path.open("rb") as stream:
                reader = make_reader(stream)
                summary = reader.get_summary()
                meta = next((dict(m.metadata) for m in reader.iter_metadata() if m.name == _META), None)
                if summary is None or summary.statistics is None or meta is None or meta.get("format") != str(_FORMAT):
                    got = "none" if meta is None else f"format {meta.get('format')}"
                    raise DataError(explain(str(path), f"metadata {_META!r} of format {_FORMAT}", got, remedy))
                counts = summary.statistics.channel_message_counts
                by_topic = {channel.topic: counts.get(key, 0) for key, channel in summary.channels.items()}
                embodiment = Embodiment.from_dict(json.loads(meta["embodiment"]))
                trace = cls(embodiment, max(1, by_topic.get("/vla/gate", 0)), max(1, by_topic.get("/vla/inference", 0)))
                trace.dropped_rows = int(meta["dropped_rows"])
                trace.action[:] = np.nan
                trace.chunk[:] = trace.index[:] = -1
                for _, channel, message in reader.iter_messages(log_time_order=False):
                    trace._read(channel.topic, message.log_time, json.loads(message.data))
        except FileNotFoundError as error:
            raise DataError(explain(str(path), "a trace file", "no such file", remedy)) from error
        except DataError:
            raise
        except Exception as error:  # the reader raises many kinds for a damaged file
            raise DataError(
                explain(str(path), "a complete MCAP file", f"{type(error).__name__}: {error}", remedy)
            ) from error
        trace.due_ns[: trace.rows] = np.where(
            trace.chunk[: trace.rows] < 0, trace.tick_ns[: trace.rows], trace.due_ns[: trace.rows]
        )
        return trace

    def _read(self, topic: str, stamp_ns: int, body: dict[str, Any]) -> None:
        """One message into the current row; /vla/gate comes last in a tick and closes it."""
        row = self.rows
        if topic == "/vla/action":
            self.action[row], self.due_ns[row] = _values(body), body["due_ns"]
            self.chunk[row], self.index[row] = body["chunk"], body["index"]
            self.late_ns[row] = stamp_ns - body["due_ns"]
            self.stamp_ns[row] = body.get("stamp_ns", -1)  # traces of the first release have none
        elif topic == "/vla/command":
            self.command[row] = _values(body)
        elif topic == "/vla/joint_states":
            self.measured[row] = _values(body)
        elif topic == "/vla/gate":
            self.tick_ns[row], self.missed[row], self.cost_us[row] = stamp_ns, body["missed"], body["cost_us"]
            self.verdict[row], self.reason[row] = body["verdict_code"], body["reason_code"]
            self.rows = row + 1
        elif topic == "/vla/inference":
            i = self.inferences
            self.infer_start_ns[i], self.infer_end_ns[i] = body["start_ns"], body["end_ns"]
            self.infer_stamp_ns[i] = body.get("stamp_ns", -1)
            self.infer_ms[i], self.infer_passes[i] = body["wall_ms"], body["passes"]
            self.infer_repaired[i], self.infer_accepted[i] = body["repaired"], body["accepted"]
            # Traces of the first release have none of these.
            told = body.get("confidence")
            self.infer_confidence[i] = np.nan if told is None else told
            self.infer_notes[i] = {name: np.nan if v is None else v for name, v in body.get("notes", {}).items()}
            self.infer_reused[i] = body.get("reused", "")
            self.inferences = i + 1
        elif topic == "/vla/episode":
            body.pop("timestamp")
            self.episodes.append(EpisodeRow(**body))
        elif topic.startswith("/vla/images/"):
            data = base64.b64decode(body["data"])
            self.images.append(ImageRow(topic.removeprefix("/vla/images/"), stamp_ns, data, body["format"]))


def _time(stamp_ns: int) -> dict[str, int]:
    return {"sec": stamp_ns // NS_PER_S, "nsec": stamp_ns % NS_PER_S}


def _number(value: float) -> float | None:
    """JSON has no NaN: null stands for it."""
    return float(value) if np.isfinite(value) else None


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values]


def _values(body: dict[str, Any]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in body["values"]], np.float64)


def _image_message(image: ImageRow) -> dict[str, Any]:
    return {"frame_id": image.camera, "data": base64.b64encode(image.data).decode(), "format": image.format}


def _schema(topic: str) -> tuple[str, dict[str, Any]]:
    """(schema name, properties) of a topic; `foxglove.CompressedImage` is the name Foxglove knows images by."""
    number, integer, text = {"type": "number"}, {"type": "integer"}, {"type": "string"}
    vector = {"names": {"type": "array", "items": text}, "values": _NUMBERS}
    schemas: dict[str, tuple[str, dict[str, Any]]] = {
        "/vla/action": (
            "vla.Action",
            {
                **vector, "due_ns": integer, "late_ms": number, "chunk": integer, "index": integer, "stamp_ns": integer,
            },
        ),
        "/vla/command": ("vla.JointVector", vector),
        "/vla/joint_states": ("vla.JointVector", vector),
        "/vla/gate": (
            "vla.Gate",
            {
                "verdict": text, "verdict_code": integer, "reason": text, "reason_code": integer,
                "missed": integer, "cost_us": number,
            },
        ),
        "/vla/inference": (
            "vla.Inference",
            {
                "stamp_ns": integer, "start_ns": integer, "end_ns": integer, "wall_ms": number, "passes": integer,
                "repaired": integer, "accepted": {"type": "boolean"}, "confidence": {"type": ["number", "null"]},
                "reused": text,
                "notes": {"type": "object", "additionalProperties": {"type": ["number", "null"]}},
            },
        ),
        "/vla/episode": (
            "vla.Episode",
            {
                "seed": integer, "task": text, "instruction": text, "success": {"type": "boolean"}, "steps": integer,
                "stamp_ns": integer,
            },
        ),
    }  # fmt: skip
    if topic in schemas:
        name, properties = schemas[topic]
    else:
        name = "foxglove.CompressedImage"
        properties = {"frame_id": text, "data": {"type": "string", "contentEncoding": "base64"}, "format": text}
    return name, {"timestamp": _TIME, **properties}
