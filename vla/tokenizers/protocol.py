"""What every action tokenizer fulfils. numpy only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class ActionTokenizer(Protocol):
    """Normalised actions to ids and back, with no state between calls.

    token_lengths: int64[vocab_size], how many of the T * A values of a chunk each token stands for; 0 marks a token
    that must not be generated on its own. A list of ids is complete exactly when its lengths sum to T * A.
    """

    vocab_size: int
    token_lengths: np.ndarray

    def encode(self, actions: np.ndarray) -> list[int]:
        """float32[T, A], normalised -> ids whose lengths sum to T * A. NaN or a wrong shape is a DataError."""
        ...

    def decode(self, ids: list[int], horizon: int, action_dim: int) -> np.ndarray:
        """Any ids -> finite, bounded float32[T, A], normalised."""
        ...

    def decode_report(self, ids: list[int], horizon: int, action_dim: int) -> tuple[np.ndarray, int]:
        """As `decode`, and how many tokens or values had to be repaired for the ids to be a chunk; 0 for valid ids."""
        ...

    def valid_next(self, remaining: int) -> np.ndarray:
        """bool[vocab_size]: tokens that may follow when `remaining` of the T * A values are still to come."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain data that rebuilds the tokenizer, through `vla.tokenizers.action_tokenizer_from_dict`."""
        ...

    def fingerprint(self) -> str:
        """sha256 of the plain data: a checkpoint stores it, since a wrong tokenizer decodes to nonsense silently."""
        ...

    def save(self, path: str | Path) -> None: ...


def valid_table(tokenizer: ActionTokenizer, values: int) -> np.ndarray:
    """bool[values + 1, vocab_size]: row r is `valid_next(r)`; a decoder uploads it once and indexes by what remains."""
    return np.stack([tokenizer.valid_next(remaining) for remaining in range(values + 1)])
