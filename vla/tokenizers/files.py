"""Reading, writing and hashing the plain data that tokenizers are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vla.errors import BundleError, DataError, explain


def canonical_sha256(data: Any) -> str:
    """sha256 over JSON with sorted keys and no spaces: the same for equal data, whoever wrote it."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file; a missing, truncated or other file is a DataError that carries `remedy`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(explain(str(path), "a file", "nothing there", remedy)) from None
    except (OSError, ValueError) as error:
        raise DataError(explain(str(path), "a JSON object", f"{type(error).__name__}: {error}", remedy)) from error
    if not isinstance(data, dict):
        raise DataError(explain(str(path), "a JSON object", type(data).__name__, remedy))
    return data


def check_keys(data: Mapping[str, Any], expected: Iterable[str], what: str) -> None:
    """Exactly the expected keys, else BundleError naming what is missing and what is unknown."""
    expected = set(expected)
    missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
    if missing or unknown:
        raise BundleError(
            explain(what, f"keys {sorted(expected)}", f"missing {missing}, unknown {unknown}", "Save it again.")
        )
