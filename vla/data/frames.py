"""FrameStore: all frames of a data set decoded once, resized, in memory-mapped files beside it.

Decoding video at random places costs milliseconds a frame; a memory map costs microseconds and lives in the page cache,
so that training on a few CPU cores waits for the model, not for the data. Size on disk: frames x height x width x 3.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from vla.data.lerobot import LeRobotDataset
from vla.data.transforms import resize
from vla.errors import DataError, explain

_SPAN = 2048  # frames that one thread decodes in a row
_BATCH = 32  # frames resized together


class FrameStore(Mapping[str, np.ndarray]):
    """{camera: uint8[N, height, width, 3], read-only memory map}; frame i is row i of the data set.

    sizes: {camera: (height, width)}; cameras that are left out are not stored. The files lie in
    `<cache or data set + ".frames">/<fingerprint>/` and are made when they are not there, atomically.
    on_progress(done, total) counts frames.
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        sizes: Mapping[str, tuple[int, int]],
        cache: str | Path | None = None,
        workers: int = 2,
        on_progress: Callable[[int, int], None] | None = None,
    ):
        base = Path(cache) if cache is not None else dataset.path.with_name(dataset.path.name + ".frames")
        self.folder = base / dataset.fingerprint[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._arrays: dict[str, np.ndarray] = {}
        for camera, (height, width) in sizes.items():
            path = self.folder / f"{camera}_{height}x{width}.npy"
            if not path.exists():
                _build(dataset, camera, height, width, path, workers, on_progress)
            self._arrays[camera] = np.load(path, mmap_mode="r")
            expected = (len(dataset), height, width, 3)
            if self._arrays[camera].shape != expected:
                raise DataError(
                    explain(str(path), f"shape {expected}", self._arrays[camera].shape, "Remove this file.")
                )

    def __getitem__(self, camera: str) -> np.ndarray:
        return self._arrays[camera]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _build(
    dataset: LeRobotDataset,
    camera: str,
    height: int,
    width: int,
    path: Path,
    workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    total = len(dataset)
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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        target = np.lib.format.open_memmap(temporary, "w+", np.uint8, (total, height, width, 3))

        def fill(start: int) -> int:
            stop = min(start + _SPAN, total)
            batch: list[np.ndarray] = []
            at = start
            for frame in dataset.frames(camera, start, stop):
                batch.append(frame)
                if len(batch) == _BATCH or at + len(batch) == stop:
                    target[at : at + len(batch)] = resize(np.stack(batch), height, width)
                    at += len(batch)
                    batch.clear()
            return stop - start

        done = 0
        # threads, not processes: decoding releases the GIL, and the map is shared
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for count in pool.map(fill, range(0, total, _SPAN)):
                done += count
                if on_progress:
                    on_progress(done, total)
        target.flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
