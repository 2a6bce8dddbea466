"""Action and text tokenizers. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vla.errors import BundleError, nearest
from vla.tokenizers.bins import BinTokenizer
from vla.tokenizers.fast import FastTokenizer
from vla.tokenizers.protocol import ActionTokenizer, valid_table

__all__ = ["ActionTokenizer", "BinTokenizer", "FastTokenizer", "action_tokenizer_from_dict", "valid_table"]

_KINDS: dict[str, Callable[[Mapping[str, Any]], ActionTokenizer]] = {
    "fast": FastTokenizer.from_dict,
    "bins": BinTokenizer.from_dict,
}


def action_tokenizer_from_dict(data: Mapping[str, Any]) -> ActionTokenizer:
    """Rebuild what `to_dict` wrote. An unknown kind is a BundleError."""
    kind = str(data.get("kind"))
    if kind not in _KINDS:
        raise BundleError(f"tokenizer.kind: unknown kind {kind!r}. {nearest(kind, _KINDS)}")
    return _KINDS[kind](data)
