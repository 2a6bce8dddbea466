"""Write LeRobotDataset v3.0: episodes one by one as shards, then all of them merged into the published layout.

A shard is a folder that appears whole or not at all:

    <work>/<id>/episode.json     {"task", "length", "extra"}
    <work>/<id>/arrays.npz       one array [T, ...] per feature that is no video, and pixel histograms
    <work>/<id>/<feature>.mp4    one clip per camera

so any number of processes may write shards, a killed one loses the episode it was at and nothing else, and `merge`
depends on the shards and their order alone. Format: huggingface/lerobot, docs "LeRobotDataset v3.0".
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.data import video
from vla.data.lerobot import IMAGE_PREFIX
from vla.data.statistics import image_histogram, stats_from_histogram, stats_of
from vla.embodiment import Embodiment
from vla.errors import DataError, explain
from vla.files import replacing

VERSION = "v3.0"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
MEGABYTE = 1 << 20
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
IMAGE_NAMES = ("height", "width", "channels")


@dataclass(frozen=True)
class Feature:
    """dtype: "video" (frames uint8[H, W, 3]) or a numpy dtype name. shape: of one frame. names: of the last axis."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "names": list(self.names) if self.names is not None else None,
        }


@dataclass(frozen=True)
class DatasetSpec:
    """What is the same for every episode. A file grows to its size limit, then the next one is opened."""

    fps: int
    features: Mapping[str, Feature]
    robot_type: str
    codec: str = "h264"
    data_file_mb: float = 100
    video_file_mb: float = 200
    chunk_files: int = 1000

    @classmethod
    def of(cls, robot: Embodiment, codec: str = "h264", **more: Feature) -> DatasetSpec:
        """What demonstrations of a robot have: its cameras, its state, its actions, and `more`."""
        features = {
            f"{IMAGE_PREFIX}{camera.name}": Feature("video", (camera.height, camera.width, 3), IMAGE_NAMES)
            for camera in robot.cameras
        }
        features["observation.state"] = Feature("float32", (robot.state_dim,), robot.state_names)
        features["action"] = Feature("float32", (robot.action_dim,), robot.action_names)
        return cls(round(robot.rate_hz), features | more, robot.name, codec)

    @property
    def cameras(self) -> tuple[str, ...]:
        return tuple(key for key, feature in self.features.items() if feature.dtype == "video")

    @property
    def numeric(self) -> tuple[str, ...]:
        return tuple(key for key, feature in self.features.items() if feature.dtype != "video")


def write_shard(
    folder: Path, spec: DatasetSpec, task: str, arrays: Mapping[str, np.ndarray], extra: Mapping[str, Any] | None = None
) -> None:
    """Write one episode. arrays: every feature of the spec, [T, *shape]. Replaces nothing: an existing shard stays."""
    length = _check_episode(spec, arrays)
    if folder.exists():
        return
    try:
        with replacing(folder) as temporary:
            temporary.mkdir()
            chosen = video.codec(spec.codec)
            stored = {key: np.ascontiguousarray(arrays[key], spec.features[key].dtype) for key in spec.numeric}
            for key in spec.cameras:
                video.encode(temporary / f"{key}.mp4", arrays[key], spec.fps, chosen)
                stored[f"histogram/{key}"] = image_histogram(arrays[key])
            np.savez(temporary / "arrays.npz", **stored)  # type: ignore[arg-type]  # numpy 2.x stub
            record = {"task": task, "length": length, "extra": dict(extra or {})}
            (temporary / "episode.json").write_text(json.dumps(record))
    except OSError:
        if not folder.exists():  # else another process finished the same episode first: equally good
            raise


def _check_episode(spec: DatasetSpec, arrays: Mapping[str, np.ndarray]) -> int:
    if set(arrays) != set(spec.features):
        raise DataError(
            explain("episode", sorted(spec.features), sorted(arrays), "Give exactly the features of the spec.")
        )
    lengths = {key: len(value) for key, value in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(
            explain("episode", "equal lengths of at least 1", lengths, "Record every feature at every step.")
        )
    for key, feature in spec.features.items():
        if tuple(np.shape(arrays[key])[1:]) != feature.shape:
            raise DataError(
                explain(
                    f"episode[{key!r}]", f"[T, {feature.shape}]", np.shape(arrays[key]), "Fix the spec or the data."
                )
            )
        if np.issubdtype(np.asarray(arrays[key]).dtype, np.floating) and not np.all(np.isfinite(arrays[key])):
            raise DataError(explain(f"episode[{key!r}]", "finite values", "NaN or infinity", "Discard the episode."))
    return next(iter(lengths.values()))


@dataclass
class _Files:
    """Numbering of data or video files: chunk and file index, a new file when the current one would pass the limit."""

    limit_mb: float
    chunk_files: int
    chunk: int = 0
    file: int = 0
    size: float = 0.0
    groups: list[tuple[int, int, list[Any]]] = field(default_factory=list)

    def place(self, item: Any, size: float) -> tuple[int, int, int]:
        """Returns (chunk, file, position of the item in its file)."""
        if self.groups and self.size + size > self.limit_mb * MEGABYTE:
            self.file += 1
            if self.file == self.chunk_files:
                self.chunk, self.file = self.chunk + 1, 0
            self.size = 0.0
            self.groups.append((self.chunk, self.file, []))
        if not self.groups:
            self.groups.append((self.chunk, self.file, []))
        self.size += size
        self.groups[-1][2].append(item)
        return self.chunk, self.file, len(self.groups[-1][2]) - 1


def merge(
    shards: Sequence[Path],
    out: Path,
    spec: DatasetSpec,
    extra_meta: Mapping[str, Any] | None = None,
    on_episode: Callable[[int], None] | None = None,
) -> None:
    """Make the data set `out` of shards, in the order given. `out` appears whole; it must not exist yet.

    extra_meta: {name: plain data}, written as meta/<name>.json. Statistics of numbers are exact over all frames,
    statistics of images are exact over the frames that `image_histogram` takes.
    """
    if out.exists():
        raise DataError(
            explain(str(out), "a path that is free", "an existing folder", "Choose another `out`, or remove it.")
        )
    if not shards:
        raise DataError(explain(str(out), "at least one episode", "none", "Collect demonstrations first."))
    with replacing(out) as temporary:
        temporary.mkdir()
        _merge_into(temporary, shards, spec, extra_meta or {}, on_episode)


def _merge_into(
    root: Path,
    shards: Sequence[Path],
    spec: DatasetSpec,
    extra_meta: Mapping[str, Any],
    on_episode: Callable[[int], None] | None,
) -> None:
    tasks: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    data = _Files(spec.data_file_mb, spec.chunk_files)
    videos = {key: _Files(spec.video_file_mb, spec.chunk_files) for key in spec.cameras}
    video_frames: dict[tuple[str, int, int], int] = {}
    columns: dict[str, list[np.ndarray]] = {key: [] for key in (*spec.numeric, *INDEX_FEATURES)}
    histograms = {key: np.zeros((3, 256), np.int64) for key in spec.cameras}
    start = 0
    for episode, shard in enumerate(shards):
        record, arrays = _read_shard(shard)
        length, task = int(record["length"]), str(record["task"])
        task_index = tasks.setdefault(task, len(tasks))
        table = {key: arrays[key] for key in spec.numeric}
        table |= {
            "timestamp": (np.arange(length) / spec.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, episode),
            "index": np.arange(start, start + length),
            "task_index": np.full(length, task_index),
        }
        chunk, file, _ = data.place(table, sum(value.nbytes for value in table.values()))
        row: dict[str, Any] = {
            "episode_index": episode,
            "tasks": [task],
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": start,
            "dataset_to_index": start + length,
        }
        for key in spec.cameras:
            clip = shard / f"{key}.mp4"
            chunk, file, _ = videos[key].place((clip, length), clip.stat().st_size)
            before = video_frames.get((key, chunk, file), 0)
            video_frames[key, chunk, file] = before + length
            row |= {
                f"videos/{key}/chunk_index": chunk,
                f"videos/{key}/file_index": file,
                f"videos/{key}/from_timestamp": before / spec.fps,
                f"videos/{key}/to_timestamp": (before + length) / spec.fps,
            }
            histogram = arrays[f"histogram/{key}"]
            histograms[key] += histogram
            row |= {f"stats/{key}/{name}": value for name, value in stats_from_histogram(histogram).items()}
        for key, values in table.items():
            columns[key].append(values)
            row |= {f"stats/{key}/{name}": value for name, value in stats_of(values).items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        rows.append(row)
        start += length
        if on_episode:
            on_episode(episode)

    for chunk, file, tables in data.groups:
        _write_table(
            root / DATA_PATH.format(chunk_index=chunk, file_index=file),
            pa.table({key: _column(np.concatenate([t[key] for t in tables]), _dtype(spec, key)) for key in columns}),
        )
    for key in spec.cameras:
        for chunk, file, clips in videos[key].groups:
            video.concatenate(
                root / VIDEO_PATH.format(video_key=key, chunk_index=chunk, file_index=file), clips, spec.fps
            )
    _write_table(root / EPISODES_PATH.format(chunk_index=0, file_index=0), pa.Table.from_pylist(rows))
    _write_table(root / "meta/tasks.parquet", _task_table(list(tasks)))
    stats = {key: stats_from_histogram(histograms[key]) for key in spec.cameras}
    stats |= {key: stats_of(np.concatenate(values)) for key, values in columns.items()}
    _write_json(root / "meta/stats.json", stats)
    for name, value in extra_meta.items():
        _write_json(root / f"meta/{name}.json", value)
    _write_json(root / "meta/info.json", _info(spec, len(rows), start, len(tasks)))


def _read_shard(shard: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        record = json.loads((shard / "episode.json").read_text())
        with np.load(shard / "arrays.npz", allow_pickle=False) as stored:
            return record, {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            explain(str(shard), "a complete episode", str(error), "Remove this folder and run the collection again.")
        ) from error


def _info(spec: DatasetSpec, episodes: int, frames: int, tasks: int) -> dict[str, Any]:
    chosen = video.codec(spec.codec)
    features: dict[str, Any] = {}
    for key, feature in spec.features.items():
        features[key] = feature.to_dict()
        if feature.dtype == "video":
            features[key]["info"] = {
                "video.height": feature.shape[0],
                "video.width": feature.shape[1],
                "video.codec": chosen.name,
                "video.pix_fmt": chosen.stored_pix_fmt,
                "video.is_depth_map": False,
                "video.fps": spec.fps,
                "video.channels": 3,
                "has_audio": False,
            }
    features |= {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in INDEX_FEATURES.items()}
    return {
        "codebase_version": VERSION,
        "robot_type": spec.robot_type,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "chunks_size": spec.chunk_files,
        "data_files_size_in_mb": spec.data_file_mb,
        "video_files_size_in_mb": spec.video_file_mb,
        "fps": spec.fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if spec.cameras else None,
        "features": features,
    }


def _dtype(spec: DatasetSpec, key: str) -> str:
    return INDEX_FEATURES[key] if key in INDEX_FEATURES else spec.features[key].dtype


def _column(values: np.ndarray, dtype: str) -> pa.Array:
    """[N] and [N, 1] become plain columns, [N, D] fixed-size lists, as the `lerobot` package stores them."""
    kind = pa.from_numpy_dtype(np.dtype(dtype))
    flat = pa.array(values.astype(dtype, copy=False).ravel(), kind)
    width = int(np.prod(values.shape[1:], dtype=int))
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)


def _task_table(tasks: list[str]) -> pa.Table:
    """Task text as a pandas index, as the `lerobot` package reads it: `tasks.loc[text].task_index`."""
    index = "__index_level_0__"
    columns = [
        {
            "name": "task_index",
            "field_name": "task_index",
            "pandas_type": "int64",
            "numpy_type": "int64",
            "metadata": None,
        },
        {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
    ]
    pandas = {"index_columns": [index], "column_indexes": [], "columns": columns, "pandas_version": "2.2.0"}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({b"pandas": json.dumps(pandas).encode()})


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))
