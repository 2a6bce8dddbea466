"""Attention masks, built from the segments of a sequence. True means "may attend"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class MaskRule(str, Enum):
    """How the tokens of one segment see each other; all rules see every earlier segment that does not hide itself.

    PREFIX: bidirectional with every other PREFIX segment, wherever it stands (images, text, state).
    CAUSAL: left to right inside the segment. BLOCK: bidirectional inside the segment only.
    """

    PREFIX = "prefix"
    CAUSAL = "causal"
    BLOCK = "block"


@dataclass(frozen=True)
class Span:
    """One segment as the mask sees it. hidden_from: kinds of later segments that must not attend to it.

    branch: "" for the trunk that all see; segments of two branches neither see each other nor move each other's
    positions: each continues the trunk as if the others were not there. That is how several heads train in one pass.
    seen_by: kinds of the only segments that may attend to it, its own among them; () for no such limit.
    """

    kind: str
    length: int
    rule: MaskRule
    hidden_from: tuple[str, ...] = ()
    branch: str = ""
    seen_by: tuple[str, ...] = ()


def segment_mask(spans: Sequence[Span], valid: Tensor) -> Tensor:
    """bool[B, K, K]: which key (last axis) each query sees.

    spans: segments in sequence order, lengths summing to K. valid: bool[B, K], False for padding; padding is seen by
    nobody, but sees itself, so that no softmax row is empty.
    """
    total = sum(span.length for span in spans)
    if valid.shape[1] != total:
        raise ValueError(f"valid: expected [B, {total}] for these spans, got {tuple(valid.shape)}")
    device = valid.device
    mask = torch.zeros(total, total, dtype=torch.bool, device=device)
    starts = [sum(span.length for span in spans[:i]) for i in range(len(spans))]
    for q, (query, q0) in enumerate(zip(spans, starts)):
        rows = slice(q0, q0 + query.length)
        for k, (key, k0) in enumerate(zip(spans, starts)):
            cols = slice(k0, k0 + key.length)
            if key.branch not in ("", query.branch) or (key.seen_by and query.kind not in key.seen_by):
                continue
            if q == k:
                block = torch.ones(query.length, query.length, dtype=torch.bool, device=device)
                mask[rows, cols] = block.tril() if query.rule is MaskRule.CAUSAL else block
            elif query.rule is MaskRule.PREFIX and key.rule is MaskRule.PREFIX:
                mask[rows, cols] = True
            elif k < q:
                mask[rows, cols] = query.kind not in key.hidden_from
    itself = torch.eye(total, dtype=torch.bool, device=device)
    return (mask[None] & valid[:, None, :]) | itself[None]


def positions_of(valid: Tensor, spans: Sequence[Span] = ()) -> Tensor:
    """int64[B, K]: contiguous positions that skip padding, so cached decoding continues exactly where training did.

    spans: of the same K tokens, when there are branches; each counts on from the trunk before it.
    """
    if all(not span.branch for span in spans):
        return (valid.long().cumsum(dim=1) - 1).clamp(min=0)
    reached = {"": torch.zeros_like(valid[:, :1], dtype=torch.long)}
    pieces = []
    for span, piece in zip(spans, valid.long().split([span.length for span in spans], dim=1)):
        places = reached.get(span.branch, reached[""]) + piece.cumsum(dim=1)
        reached[span.branch] = places[:, -1:]
        pieces.append(places - 1)
    return torch.cat(pieces, dim=1).clamp(min=0)
