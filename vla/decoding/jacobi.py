"""Jacobi decoding: many tokens per pass, and exactly what greedy decoding gives.

Greedy decoding solves y_i = argmax p(y | y_<i, x) for every i. Jacobi iteration (Santilli et al., ACL 2023; PD-VLA)
guesses a window of tokens, updates all of them in one causal pass, and repeats. A position whose inputs are already
right gives the right token, so every pass settles at least one, and the result is greedy's token by token (in exact
arithmetic; a bf16 near-tie may fall the other way).

Settled tokens leave the window at once and it slides on, rather than waiting until a whole block has converged: the
cache keeps their entries, which were computed from right inputs only, and drops the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vla.decoding.autoregressive import DecodedTokens, Grammar
from vla.errors import ConfigError, explain
from vla.models.vla import Prefix, Vla


class JacobiDecoder:
    """Exact greedy decoding in windows, causal mask. window: tokens per pass, at least 1 (which is greedy itself)."""

    def __init__(self, window: int = 16):
        if window < 1:
            raise ConfigError(explain("decoder.window", "at least 1", window, "16 suits two CPU cores."))
        self.window = window

    @torch.inference_mode()
    def decode(self, model: Vla, prefix: Prefix, grammar: Grammar, seeds: Sequence[int]) -> DecodedTokens:
        batch, device = len(seeds), prefix.next_position.device
        width = min(self.window, grammar.values)
        remaining = torch.full((batch,), grammar.values, dtype=torch.long, device=device)
        last = torch.full((batch, 1), model.head.start_id, dtype=torch.long, device=device)
        # What a draft starts from hardly matters as long as it is a token that the model has seen there.
        draft = torch.zeros((batch, width), dtype=torch.long, device=device)
        settled: list[Tensor] = []
        opened: list[Tensor] = []
        top: list[Tensor] = []
        passes = 0
        while True:
            base = prefix.cache.length
            # Room for the whole window may be missing only when every sample is about to end.
            width = min(width, prefix.cache.capacity - base)
            logits = model.suffix_logits(prefix, torch.cat((last, draft[:, : width - 1]), dim=1)).float()
            passes += 1
            left = _left_before(remaining, draft[:, :width], grammar)
            allowed = grammar.valid[left] | (left == 0)[..., None]
            logits = logits.masked_fill(~allowed, -torch.inf)
            update = logits.argmax(dim=-1)
            confidence = logits.softmax(dim=-1).gather(2, update[..., None])[..., 0]
            # Position j is settled when all drafts before it were right. A sample of a batch that has ended agrees with
            # anything; the others wait for the slowest, since the cache has one length.
            right = (update == draft[:, :width]) | (left == 0)
            count = 1 + int(right[:, : width - 1].cumprod(dim=1).sum(dim=1).min())
            settled.append(update[:, :count])
            opened.append(left[:, :count] > 0)
            top.append(confidence[:, :count])
            prefix.cache.truncate(base + count)
            remaining = _left_before(remaining, update[:, :count], grammar, after=True)
            if not bool((remaining > 0).any()):
                break
            last = update[:, count - 1 : count]
            draft = torch.cat((update[:, count:], update[:, -1:].expand(-1, draft.shape[1] - width + count)), dim=1)
        ids, mask = torch.cat(settled, dim=1).cpu(), torch.cat(opened, dim=1).cpu()
        probability = torch.cat(top, dim=1).cpu()
        return DecodedTokens(
            [row[keep].tolist() for row, keep in zip(ids, mask)],
            passes,
            [float(row[keep].mean()) for row, keep in zip(probability, mask)],
        )


def _left_before(remaining: Tensor, ids: Tensor, grammar: Grammar, after: bool = False) -> Tensor:
    """How many values are still to come before each of the tokens `ids` [B, W], or after all of them: [B, W] or [B]."""
    used = grammar.lengths[ids].cumsum(dim=1)
    if after:
        return (remaining - used[:, -1]).clamp(min=0)
    used = torch.cat((torch.zeros_like(used[:, :1]), used[:, :-1]), dim=1)
    return (remaining[:, None] - used).clamp(min=0)
