"""Read LeRobotDataset v3.0, ours or one written by the `lerobot` package. pyarrow and PyAV, no pandas, no torch.

    meta/info.json                                  features, fps, totals, path patterns
    meta/stats.json                                 statistics of every feature
    meta/tasks.parquet                              task_index, with the task text as a pandas index
    meta/episodes/chunk-*/file-*.parquet            per episode: tasks, length, where its rows and frames are
    data/chunk-*/file-*.parquet                     one row per frame, many episodes per file
    videos/<feature>/chunk-*/file-*.mp4             one stream per camera, many episodes per file

Sources: docs "LeRobotDataset v3.0" of huggingface/lerobot. What is missing, truncated or does not add up is a DataError
that names the file, what was expected and the remedy; `vla/data/lerobot_writer.py` writes the format.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla.data import video
from vla.data.statistics import Statistics
from vla.embodiment import Embodiment
from vla.errors import DataError, explain, nearest

IMAGE_PREFIX = "observation.images."
_AGAIN = "Copy the data set again, or collect it again."


@dataclass(frozen=True)
class Episode:
    """index: number of the episode. start, stop: its rows in the data set. tasks: its instructions.

    data_file: the parquet file of its rows. videos: {camera: (file, number of its first frame in that file)}.
    """

    index: int
    start: int
    stop: int
    tasks: tuple[str, ...]
    data_file: Path
    videos: Mapping[str, tuple[Path, int]]

    @property
    def length(self) -> int:
        return self.stop - self.start


class LeRobotDataset:
    """A data set on disk. Tables load on first use, frames are decoded on request; nothing is written.

    Cameras go by their short names: "agentview" is the feature "observation.images.agentview".
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(
                explain(str(path), "a LeRobotDataset folder", "no such folder", "Check the path, or collect.")
            )
        self.info = self._json("meta/info.json")
        version = str(self.info.get("codebase_version", "none"))
        if not version.startswith("v3."):
            raise DataError(
                explain(
                    f"{self.path / 'meta/info.json'}: codebase_version",
                    "v3.0",
                    version,
                    "Convert it with the `lerobot` package (convert_dataset_v21_to_v30).",
                )
            )
        missing = [key for key in ("fps", "features", "total_frames", "data_path") if key not in self.info]
        if missing:
            raise DataError(explain(str(self.path / "meta/info.json"), "the keys of v3.0", f"no {missing}", _AGAIN))
        self.fps = float(self.info["fps"])
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.stats = Statistics.read(self.path / "meta/stats.json")

    def __len__(self) -> int:
        """Frames in all episodes."""
        return self.episodes[-1].stop

    # ---- meta data ----
    @property
    def cameras(self) -> tuple[str, ...]:
        """Short names, in the order of info.json."""
        kinds = ("video", "image")
        return tuple(key.removeprefix(IMAGE_PREFIX) for key, value in self.features.items() if value["dtype"] in kinds)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Task texts by task_index."""
        path = self.path / "meta/tasks.parquet"
        table = _read_table(path)
        text = next(
            (name for name in ("task", "__index_level_0__", *_pandas_index(table)) if name in table.column_names), ""
        )
        if not text or "task_index" not in table.column_names:
            raise DataError(explain(str(path), "task_index and task texts", table.column_names, _AGAIN))
        pairs = sorted(zip(table["task_index"].to_pylist(), table[text].to_pylist()))
        if [index for index, _ in pairs] != list(range(len(pairs))):
            raise DataError(explain(str(path), "task_index 0, 1, 2, ...", [index for index, _ in pairs], _AGAIN))
        return tuple(str(task) for _, task in pairs)

    @cached_property
    def episodes(self) -> tuple[Episode, ...]:
        """All episodes in order; they cover the frames without a gap."""
        paths = sorted((self.path / "meta/episodes").glob("*/*.parquet"))
        if not paths:
            raise DataError(explain(str(self.path / "meta/episodes"), "parquet files", "none", _AGAIN))
        rows: list[dict[str, Any]] = []
        for path in paths:
            wanted = [name for name in _schema_names(path) if not name.startswith("stats/")]
            rows += _read_table(path, wanted).to_pylist()
        rows.sort(key=lambda row: row["episode_index"])
        out = tuple(self._episode(row) for row in rows)
        expected = 0
        for position, episode in enumerate(out):
            if episode.index != position or episode.start != expected or episode.stop <= episode.start:
                raise DataError(
                    explain(
                        f"{self.path / 'meta/episodes'}: episode {episode.index}",
                        f"number {position} from frame {expected} on",
                        f"frames {episode.start} to {episode.stop}",
                        _AGAIN,
                    )
                )
            expected = episode.stop
        if not out or expected != self.info["total_frames"]:
            raise DataError(
                explain(str(self.path / "meta/episodes"), f"{self.info['total_frames']} frames", expected, _AGAIN)
            )
        return out

    def embodiment(self) -> Embodiment:
        """The embodiment that the demonstrations were made with (meta/embodiment.json, written by `vla collect`)."""
        return Embodiment.from_dict(self._json("meta/embodiment.json"))

    def collection(self) -> dict[str, Any]:
        """How the data was collected: config, attempts, and per episode its seed, task, family and noise level."""
        return self._json("meta/collection.json")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and bytes of all files: equal data sets have equal fingerprints."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.path.rglob("*") if path.is_file()):
            digest.update(path.relative_to(self.path).as_posix().encode() + b"\0")
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    # ---- numbers ----
    def column(self, feature: str) -> np.ndarray:
        """All frames of a feature that is no image: [N] or, for a vector, [N, D]. Kept after the first call."""
        if feature not in self.features or self.features[feature]["dtype"] in ("video", "image"):
            raise DataError(f"{self.path}: no numeric feature {feature!r}. {nearest(feature, self._numeric())}")
        if feature not in self._columns:
            parts, files = [], list(dict.fromkeys(episode.data_file for episode in self.episodes))
            for path in files:
                parts.append(_to_numpy(_read_table(path, [feature])[feature]))
            values = np.concatenate(parts)
            if len(values) != len(self):
                raise DataError(explain(f"{files[0].parent}", f"{len(self)} rows", f"{len(values)} rows", _AGAIN))
            self._columns[feature] = values
        return self._columns[feature]

    def instruction(self, frame: int) -> str:
        """Task text of a frame."""
        return self.tasks[int(self.column("task_index")[frame])]

    @cached_property
    def episode_of(self) -> np.ndarray:
        """int64[N]: number of the episode of every frame."""
        return np.repeat(np.arange(len(self.episodes)), [episode.length for episode in self.episodes])

    # ---- images ----
    def image_shape(self, camera: str) -> tuple[int, int]:
        """Height and width of a camera's frames as stored. `names` says whether channels come first."""
        feature = self.features[self._key(camera)]
        shape = [int(size) for size in feature["shape"]]
        return (shape[1], shape[2]) if shape[0] in (1, 3) and shape[2] != 3 else (shape[0], shape[1])

    def frames(self, camera: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Decode frames start..stop-1, in order: uint8[H, W, 3] each, across episodes and files."""
        key = self._key(camera)
        while start < stop:
            if not 0 <= start < len(self):
                raise DataError(explain("frame", f"0 to {len(self) - 1}", start, "Ask for frames that exist."))
            # join episodes that follow each other in one file: one seek instead of one per episode
            number = int(self.episode_of[start])
            first = self.episodes[number]
            until = min(stop, first.stop)
            if self.features[key]["dtype"] == "image":
                yield from self._stored_images(key, first, start, until)
                start = until
                continue
            path, offset = first.videos[key]
            begin = offset + start - first.start
            while until < stop and self.episodes[number + 1].videos[key] == (path, offset + until - first.start):
                number += 1
                until = min(stop, self.episodes[number].stop)
            yield from video.decode(path, begin, begin + until - start, self.fps)
            start = until

    def frame(self, camera: str, index: int) -> np.ndarray:
        """One frame, uint8[H, W, 3]."""
        return next(self.frames(camera, index, index + 1))

    # ---- inside ----
    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {}

    def _numeric(self) -> list[str]:
        return [key for key, value in self.features.items() if value["dtype"] not in ("video", "image")]

    def _key(self, camera: str) -> str:
        for key in (camera, IMAGE_PREFIX + camera):
            if key in self.features and self.features[key]["dtype"] in ("video", "image"):
                return key
        raise DataError(f"{self.path}: no camera {camera!r}. {nearest(camera, self.cameras)}")

    def _episode(self, row: Mapping[str, Any]) -> Episode:
        try:
            videos = {}
            for key, feature in self.features.items():
                if feature["dtype"] == "video":
                    place = {
                        "chunk_index": row[f"videos/{key}/chunk_index"],
                        "file_index": row[f"videos/{key}/file_index"],
                    }
                    path = self.path / self.info["video_path"].format(video_key=key, **place)
                    videos[key] = (path, round(row[f"videos/{key}/from_timestamp"] * self.fps))
            data = self.info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
            return Episode(
                int(row["episode_index"]),
                int(row["dataset_from_index"]),
                int(row["dataset_to_index"]),
                tuple(row["tasks"]),
                self.path / data,
                videos,
            )
        except KeyError as error:
            raise DataError(
                explain(str(self.path / "meta/episodes"), "the columns of v3.0", f"no column {error}", _AGAIN)
            ) from error

    def _stored_images(self, key: str, episode: Episode, start: int, stop: int) -> Iterator[np.ndarray]:
        """Features of dtype "image": encoded pictures inside the parquet rows."""
        from PIL import Image

        table = _read_table(episode.data_file, ["index", key])
        order = {int(index): row for row, index in enumerate(table["index"].to_pylist())}
        for index in range(start, stop):
            if index not in order:
                raise DataError(explain(str(episode.data_file), f"frame {index}", "no such row", _AGAIN))
            stored = table[key][order[index]].as_py()
            yield np.asarray(Image.open(io.BytesIO(stored["bytes"])).convert("RGB"))

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise DataError(explain(str(path), "a file of the data set", "no such file", _AGAIN)) from error
        except ValueError as error:
            raise DataError(explain(str(path), "JSON", f"unreadable text ({error})", _AGAIN)) from error
        if not isinstance(value, dict):
            raise DataError(explain(str(path), "a JSON object", type(value).__name__, _AGAIN))
        return value


def _schema_names(path: Path) -> list[str]:
    try:
        return list(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    # read file by file: a folder would be taken for a partitioned data set, with columns made of folder names
    try:
        table = pq.ParquetFile(path).read(columns)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    lost = [name for name in columns or () if name not in table.column_names]
    if lost:
        raise DataError(explain(str(path), f"columns {columns}", f"no {lost}", _AGAIN))
    return table


def _unreadable(path: Path, error: Exception) -> DataError:
    got = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__} (truncated?)"
    return DataError(explain(str(path), "a complete parquet file", got, _AGAIN))


def _pandas_index(table: pa.Table) -> list[str]:
    described = (table.schema.metadata or {}).get(b"pandas")
    names = json.loads(described).get("index_columns", []) if described else []
    return [name for name in names if isinstance(name, str)]


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """[N] of numbers, or [N, D] of (fixed-size) lists."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # pyarrow returns one chunk as a ChunkedArray in some versions
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    depth = 0
    count = len(array)
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type) or pa.types.is_large_list(array.type):
        array, depth = array.flatten(), depth + 1
    values = array.to_numpy(zero_copy_only=False)
    return np.array(values) if depth == 0 else np.array(values).reshape(count, -1)
