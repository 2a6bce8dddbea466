"""Uniform bins, the OpenVLA convention (Kim et al., OpenVLA, arXiv 2406.09246, section 3.2). numpy only.

256 edges cut [-1, 1] into 255 intervals. A value, clipped to [-1, 1], gets the index of the last edge not above it, so
there are 256 ids: 255 intervals and the single point 1.0, which decodes to the centre of the last interval. The error
inside [-1, 1] is at most half an interval, 1 / 255. Ids count up from 0; placing them at the end of a language model's
vocabulary (OpenVLA: vocab_size - 1 - id) is the head's matter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.errors import ConfigError, DataError, explain
from vla.files import write_text
from vla.tokenizers.files import canonical_sha256, check_keys, read_json

FORMAT_VERSION = 1
_FILE = "bins.json"


class BinTokenizer:
    """One token per value, action after action. Immutable."""

    def __init__(self, vocab_size: int = 256):
        if vocab_size < 2:
            raise ConfigError(explain("vocab_size", "an integer >= 2", vocab_size, "OpenVLA uses 256."))
        self.vocab_size = int(vocab_size)
        self._edges = np.linspace(-1.0, 1.0, self.vocab_size)
        centres = (self._edges[:-1] + self._edges[1:]) / 2.0
        # By id: the last one is the point 1.0, which lies in the last interval.
        self._values = np.concatenate((centres, centres[-1:])).astype(np.float32)
        self.token_lengths = np.ones(self.vocab_size, np.int64)
        self.token_lengths.setflags(write=False)

    def encode(self, actions: np.ndarray) -> list[int]:
        """float32[T, A], normalised -> T * A ids, row by row; values outside [-1, 1] are clipped. DataError for NaN."""
        actions = np.asarray(actions)
        if actions.ndim != 2 or 0 in actions.shape:
            raise DataError(
                explain("actions", "float32[T, A], T and A >= 1", f"shape {actions.shape}", "Pass one chunk.")
            )
        if not np.all(np.isfinite(actions)):
            raise DataError(explain("actions", "finite values", "NaN or infinity", "Check the normaliser."))
        inside = np.minimum(np.maximum(actions, -1.0), 1.0)
        return (self._edges.searchsorted(inside, side="right") - 1).ravel().tolist()

    def decode(self, ids: Sequence[int], horizon: int, action_dim: int) -> np.ndarray:
        """Any ids -> float32[T, A] in (-1, 1); see `decode_report`."""
        return self.decode_report(ids, horizon, action_dim)[0]

    def decode_report(self, ids: Sequence[int], horizon: int, action_dim: int) -> tuple[np.ndarray, int]:
        """float32[T, A], normalised, and the repairs: a long list is cut, missing and unknown ids become 0."""
        if horizon < 1 or action_dim < 1:
            raise ConfigError(
                explain("horizon, action_dim", "integers >= 1", (horizon, action_dim), "Pass the chunk shape.")
            )
        size = horizon * action_dim
        values = np.zeros(size, np.float32)
        given = np.asarray(ids[:size], np.int64)
        known = given.view(np.uint64) < self.vocab_size  # below 0 is far above
        values[: len(given)][known] = self._values[given[known]]
        repaired = abs(len(ids) - size) + len(given) - int(np.count_nonzero(known))
        return values.reshape(horizon, action_dim), repaired

    def valid_next(self, remaining: int) -> np.ndarray:
        """bool[vocab_size]: every bin until the chunk is complete."""
        return np.full(self.vocab_size, remaining > 0)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bins", "format_version": FORMAT_VERSION, "vocab_size": self.vocab_size}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BinTokenizer:
        check_keys(data, ("kind", "format_version", "vocab_size"), "tokenizer")
        if data["kind"] != "bins" or data["format_version"] != FORMAT_VERSION:
            got = f"{data['kind']} version {data['format_version']}"
            raise DataError(explain("tokenizer", f"bins version {FORMAT_VERSION}", got, "Save it again."))
        return cls(data["vocab_size"])

    def fingerprint(self) -> str:
        """sha256 of `to_dict`."""
        return canonical_sha256(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write `bins.json` into a folder, atomically."""
        write_text(Path(path) / _FILE, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> BinTokenizer:
        return cls.from_dict(read_json(Path(path) / _FILE, "Point to a folder that save() wrote."))
