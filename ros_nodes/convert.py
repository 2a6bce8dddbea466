"""rosbag2 recordings of a robot to a LeRobotDataset v3.0.

A recording that lacks a topic, or has it with another type, is left out by name; so is an episode with a hole in it.
Nothing is half-converted. Episodes are shards (vla/data/lerobot_writer.py): a run that was killed goes on where it was,
and what is in the data set depends on the recordings and the settings alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ros_nodes.bag import Bag
from ros_nodes.episodes import Body, Samples, Skip, samples, spans
from ros_nodes.recording import Recording
from vla.data.lerobot import IMAGE_PREFIX
from vla.data.lerobot_writer import DatasetSpec, merge, write_shard
from vla.data.resample import Rules
from vla.embodiment import Embodiment
from vla.errors import ConfigError, DataError, VlaError, explain
from vla.files import exclusive, write_text

Progress = Callable[[str, int, int], None]  # (recording, episodes done, episodes of it)


@dataclass(frozen=True)
class Settings:
    """What decides the content of a data set, beside the recordings. See ros_nodes.recording, ros_nodes.episodes and
    vla.data.resample. instruction: instead of the recorded ones. measured: joints whose commands are on no topic take
    their measured positions. codec: of videos.
    """

    whole: bool = False
    clock: str = "stamps"
    resize: bool = False
    instruction: str = ""
    measured: bool = False
    image_slop_s: float | None = None
    state_gap_s: float | None = None
    codec: str = "h264"

    def rules(self, robot: Embodiment) -> Rules:
        return Rules(robot.rate_hz, self.image_slop_s, self.state_gap_s)


@dataclass(frozen=True)
class Left:
    """What was left out: a recording (episode -1) or one of its episodes."""

    recording: str
    episode: int
    reason: str

    @property
    def text(self) -> str:
        return f"{self.recording}{'' if self.episode < 0 else f', episode {self.episode}'}: {self.reason}"


@dataclass
class Report:
    """What `convert` did. notes: what is in the data set and worth a look, such as frames that stand twice."""

    path: str
    episodes: int = 0
    frames: int = 0
    skipped: list[Left] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spec_of(robot: Embodiment, settings: Settings) -> DatasetSpec:
    """The features of the data set: cameras, observation.state and action."""
    if robot.rate_hz != round(robot.rate_hz):
        raise ConfigError(
            explain(
                f"{robot.name}.rate_hz",
                "a whole number",
                robot.rate_hz,
                "A LeRobotDataset has whole frames per second.",
            )
        )
    return DatasetSpec.of(robot, settings.codec)


def convert(
    bags: Sequence[str | Path],
    robot: Embodiment,
    out: str | Path,
    settings: Settings | None = None,
    strict: bool = False,
    on_progress: Progress | None = None,
) -> Report:
    """Make the data set `out` of recordings, in the order given; continues an interrupted run.

    strict: anything that would be left out is a DataError, and no data set is made. DataError also when nothing at all
    can be converted. ConfigError for an `out` that holds something else.
    """
    settings, out = settings or Settings(), Path(out)
    paths = _distinct(bags)
    spec, work = spec_of(robot, settings), out.with_name(out.name + ".work")
    identity = {"robot": robot.to_dict(), "settings": asdict(settings)}
    if out.exists():
        return _finished(out, identity, paths)
    (work / "episodes").mkdir(parents=True, exist_ok=True)
    with exclusive(work, "--out"):
        _claim(work, identity)
        body, report = Body.of(robot), Report(str(out))
        shards: list[Path] = []
        for path in paths:
            try:
                shards += _convert_one(path, robot, settings, spec, body, work, report, on_progress)
            except VlaError as error:
                report.skipped.append(Left(path.name, -1, str(error)))
        if strict and report.skipped:
            raise DataError(f"--strict: {len(report.skipped)} left out. " + "; ".join(x.text for x in report.skipped))
        if not shards:
            reasons = "; ".join(left.text for left in report.skipped) or "no recordings"
            raise DataError(explain(str(out), "at least one episode", f"none ({reasons})", "Correct what is named."))
        episodes = [json.loads((shard / "episode.json").read_text())["extra"] for shard in shards]
        meta = {
            "embodiment": robot.to_dict(),
            "collection": {
                **identity,
                "recordings": _names(paths),
                "episodes": episodes,
                "skipped": [asdict(left) for left in report.skipped],
                "notes": report.notes,
            },
        }
        merge(shards, out, spec, meta)
        shutil.rmtree(work, ignore_errors=True)
    return report


def _convert_one(
    path: Path,
    robot: Embodiment,
    settings: Settings,
    spec: DatasetSpec,
    body: Body,
    work: Path,
    report: Report,
    on_progress: Progress | None,
) -> list[Path]:
    """Shards of one recording; what is left out of it goes to the report."""
    with Bag(path) as bag:
        _require_robot(bag, robot)
        recording = Recording(bag, robot, settings.clock, settings.resize, not settings.measured)
        found = spans(recording, settings.whole)
        if not found:
            remedy = "Give --whole to take the recording as one episode, or record with start and stop."
            raise DataError(explain("/vla/record", "start and stop", "neither", remedy))
        notes = [f"{bag.name}: {note}" for note in (bag.incomplete, *recording.notes) if note]
        key, shards = bag.fingerprint, []
        for done, span in enumerate(found):
            if on_progress:
                on_progress(bag.name, done, len(found))
            made = span if isinstance(span, Skip) else samples(
                recording, span, settings.rules(robot), body, settings.instruction, settings.measured
            )  # fmt: skip
            if isinstance(made, Skip):
                report.skipped.append(Left(bag.name, made.number, made.reason))
                continue
            shard = work / "episodes" / f"{key}-{made.span.number:04d}"
            try:
                if not shard.exists():
                    _write(shard, spec, recording, made, work)
            except DataError as error:  # a picture that cannot be decoded
                report.skipped.append(Left(bag.name, made.span.number, str(error)))
                continue
            shards.append(shard)
            report.episodes += 1
            report.frames += len(made.times)
            notes += [
                f"{bag.name}, episode {made.span.number}: camera {camera} shows {count} frames twice"
                for camera, count in made.repeated.items()
                if count
            ]
        if on_progress:
            on_progress(bag.name, len(found), len(found))
        report.notes += notes
        return shards


def _require_robot(bag: Bag, robot: Embodiment) -> None:
    """Refuse what our recorder noted to be of another robot."""
    if "embodiment" in bag.facts:
        recorded = Embodiment.from_dict(json.loads(bag.facts["embodiment"]))
        recorded.require_same(robot, f"recorded robot {recorded.name!r} and --robot {robot.name!r}", "Name that robot.")


def _write(shard: Path, spec: DatasetSpec, recording: Recording, made: Samples, work: Path) -> None:
    """One episode. Pictures go through a file in the working folder: minutes of them do not fit the memory."""
    assert made.actions is not None
    arrays: dict[str, np.ndarray] = {"observation.state": made.state, "action": made.actions}
    scratch = []
    try:
        for name, places in made.frames.items():
            camera = recording.robot.camera(name)
            path = work / f".{shard.name}.{name}.npy"
            scratch.append(path)
            shape = (len(places), camera.height, camera.width, 3)
            pictures = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
            for row, picture in enumerate(recording.frames(name, places)):
                pictures[row] = picture
            arrays[f"{IMAGE_PREFIX}{name}"] = pictures
        extra = {
            "recording": recording.bag.name,
            "episode": made.span.number,
            "instruction": made.instruction,
            "start_ns": int(made.times[0]),
            "steps": len(made.times),
            "repeated": made.repeated,
        }
        write_shard(shard, spec, made.instruction, arrays, extra)
    finally:
        for path in scratch:
            path.unlink(missing_ok=True)


def _distinct(bags: Sequence[str | Path]) -> list[Path]:
    paths = [Path(bag) for bag in bags]
    seen = {path.resolve() for path in paths}
    if not paths or len(seen) != len(paths):
        raise ConfigError(explain("recordings", "one or more, each once", [str(path) for path in paths], "Name them."))
    return paths


def _names(paths: Sequence[Path]) -> list[str]:
    return [path.name for path in paths]


def _claim(work: Path, identity: Mapping[str, Any]) -> None:
    """Make sure that what an interrupted run left in the working folder was made with the same settings."""
    for left in (work / "episodes").glob(".*"):
        shutil.rmtree(left, ignore_errors=True)  # what a killed run was writing
    for left in work.glob(".*.npy"):
        left.unlink()
    record = work / "config.json"
    if record.exists() and any((work / "episodes").iterdir()):
        _require_same(work, json.loads(record.read_text()), identity)
    else:
        write_text(record, json.dumps(identity, indent=1))


def _require_same(where: Path, stored: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    mine = json.loads(json.dumps(identity))
    differing = [
        f"{part}.{key}" for part in mine for key in mine[part] if mine[part][key] != stored.get(part, {}).get(key)
    ]
    if differing:
        raise ConfigError(
            explain("--out", "a conversion with the same settings", f"others in {where}: {', '.join(differing)}",
                    "Choose another --out, or remove that folder.")
        )  # fmt: skip


def _finished(out: Path, identity: Mapping[str, Any], paths: Sequence[Path]) -> Report:
    """The report of a conversion that is already complete."""
    record = out / "meta/collection.json"
    stored = json.loads(record.read_text()) if record.exists() else {}
    if stored.get("recordings") != _names(paths):
        raise ConfigError(
            explain("--out", "a free path, or a data set of the same recordings", f"another folder at {out}",
                    "Choose another --out.")
        )  # fmt: skip
    _require_same(out, stored, identity)
    episodes = stored["episodes"]
    frames = sum(int(episode["steps"]) for episode in episodes)
    return Report(str(out), len(episodes), frames, [Left(**left) for left in stored["skipped"]], stored["notes"])
