"""Files that appear whole or not at all. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from vla.errors import ConfigError, explain


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to (a file, or a folder to make); it becomes `path` when the block ends.

    If the block raises, nothing of it stays and `path` is as it was. A folder cannot replace one that holds anything.
    The name begins with a dot, so that listings of the folder do not take it for content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; it is on the disk when this returns."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def exclusive(folder: str | Path, key: str) -> Iterator[None]:
    """Hold `folder`, which exists, for this process; ConfigError if another one holds it. Ends with the process.

    key: the argument that named the folder, for the message.
    """
    with (Path(folder) / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                explain(key, "a folder that no other run is writing to", str(folder),
                        "Wait for that run or end it, or choose another folder.")
            ) from None  # fmt: skip
        yield
