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

from vla.decoding.autoregressive import DecodedTokens, Grammar, confidences
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
        ids: list[list[int]] = [[] for _ in seeds]
        remaining = [grammar.values] * len(seeds)
        last = [model.head.start_id] * len(seeds)
        # What a draft starts from hardly matters as long as it is a token that the model has seen there.
        drafts = [[0] * self.window for _ in seeds]
        rows: list[Tensor] = []
        passes = 0
        while any(remaining):
            base = prefix.cache.length
            # Room for the whole window may be missing only when every sample is about to end.
            width = min(self.window, prefix.cache.capacity - base)
            inputs = [[token, *draft[: width - 1]] for token, draft in zip(last, drafts)]
            left = [grammar.before_each(r, draft[: width - 1]) for r, draft in zip(remaining, drafts)]
            logits = model.suffix_logits(prefix, torch.tensor(inputs, device=prefix.device))
            logits = grammar.constrain(logits, left)
            updates = logits.argmax(dim=-1).tolist()
            passes += 1
            # Position j is settled when all drafts before it were right. A sample of a batch that has ended agrees with
            # anything; the others wait for the slowest, since the cache has one length.
            count = min(_settled(update, draft, before) for update, draft, before in zip(updates, drafts, left))
            prefix.cache.truncate(base + count)
            rows.append(logits[:, :count])
            for sample, update in enumerate(updates):
                for token in update[:count]:
                    if remaining[sample]:
                        ids[sample].append(token)
                        remaining[sample] = max(0, remaining[sample] - grammar.lengths[token])
                last[sample] = update[count - 1]
                drafts[sample] = (update[count:] + update[-1:] * self.window)[: self.window]
        return DecodedTokens(ids, passes, confidences(torch.cat(rows, dim=1), ids))


def _settled(update: Sequence[int], draft: Sequence[int], left: Sequence[int]) -> int:
    """How many tokens of `update` came from right inputs only; left: values still to come before each of them."""
    count = 1
    while count < len(update) and (update[count - 1] == draft[count - 1] or not left[count - 1]):
        count += 1
    return count
