"""FrameStore: all frames of a data set decoded once, resized, in memory-mapped files beside it.

Decoding video at random places costs milliseconds a frame; a memory map costs microseconds and lives in the page cache,
so that training on a few CPU cores waits for the model, not for the data. Size on disk: frames x height x width x 3.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from vla.data.lerobot import LeRobotDataset
from vla.data.transforms import resize
from vla.errors import DataError, explain
from vla.files import replacing

_SPAN = 2048  # frames that one thread decodes in a row
_BATCH = 32  # frames resized together


class FrameStore(Mapping[str, np.ndarray]):
    """{camera: uint8[M, height, width, 3], read-only memory map} of M frames of a data set; see `take`.

    sizes: {camera: (height, width)}; cameras that are left out are not stored. rows: int[M], ascending, the rows of the
    data set to keep; all of them by default. The files lie in `<cache or data set + ".frames">/<fingerprint>/` and are
    made when they are not there, atomically. on_progress(done, total) counts frames.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        sizes: Mapping[str, tuple[int, int]],
        cache: str | Path | None = None,
        workers: int = 2,
        on_progress: Callable[[int, int], None] | None = None,
        rows: np.ndarray | None = None,
    ):
        self.rows = np.arange(len(dataset)) if rows is None else np.asarray(rows, np.int64)
        if np.any(np.diff(self.rows) <= 0) or len(self.rows) == 0 or self.rows[0] < 0 or self.rows[-1] >= len(dataset):
            raise DataError(explain("rows", f"ascending rows below {len(dataset)}", self.rows, "Sort them, once each."))
        selection = "" if rows is None else "_" + hashlib.sha256(self.rows.tobytes()).hexdigest()[:12]
        base = Path(cache) if cache is not None else dataset.path.with_name(dataset.path.name + ".frames")
        self.folder = base / dataset.fingerprint[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._arrays: dict[str, np.ndarray] = {}
        for camera, (height, width) in sizes.items():
            path = self.folder / f"{camera}_{height}x{width}{selection}.npy"
            if not path.exists():
                _build(dataset, camera, height, width, self.rows, path, workers, on_progress)
            self._arrays[camera] = np.load(path, mmap_mode="r")
            expected = (len(self.rows), height, width, 3)
            if self._arrays[camera].shape != expected:
                raise DataError(
                    explain(str(path), f"shape {expected}", self._arrays[camera].shape, "Remove this file.")
                )

    def __getitem__(self, camera: str) -> np.ndarray:
        return self._arrays[camera]

    def take(self, camera: str, rows: np.ndarray) -> np.ndarray:
        """Frames of data set rows int[B] -> uint8[B, height, width, 3]; DataError for a row that was not kept."""
        places = np.searchsorted(self.rows, rows).clip(max=len(self.rows) - 1)
        absent = self.rows[places] != rows
        if np.any(absent):
            raise DataError(explain("rows", "rows of this store", np.asarray(rows)[absent][:5], "Keep them as well."))
        return np.ascontiguousarray(self._arrays[camera][places])

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _build(
    dataset: LeRobotDataset,
    camera: str,
    height: int,
    width: int,
    rows: np.ndarray,
    path: Path,
    workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    total = len(rows)
    needed = total * height * width * 3
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            explain(
                str(path.parent),
                f"{needed >> 20} MiB of free disk",
                f"{free >> 20} MiB",
                "Choose smaller images, or free some.",
            )
        )
    with replacing(path) as temporary:
        target = np.lib.format.open_memmap(temporary, "w+", np.uint8, (total, height, width, 3))

        def fill(start: int) -> int:
            """Decode one span of the data set, store the rows of it that are kept, return how many."""
            stop = min(start + _SPAN, len(dataset))
            first, last = np.searchsorted(rows, (start, stop))
            wanted = set(rows[first:last].tolist())
            batch: list[np.ndarray] = []
            at = int(first)
            for row, frame in enumerate(dataset.frames(camera, start, stop) if wanted else (), start):
                if row not in wanted:
                    continue
                batch.append(frame)
                if len(batch) == _BATCH or at + len(batch) == last:
                    target[at : at + len(batch)] = resize(np.stack(batch), height, width)
                    at += len(batch)
                    batch.clear()
            return int(last - first)

        done = 0
        # threads, not processes: decoding releases the GIL, and the map is shared
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for count in pool.map(fill, range(0, len(dataset), _SPAN)):
                done += count
                if on_progress:
                    on_progress(done, total)
        target.flush()
