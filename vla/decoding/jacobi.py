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

from vla.decoding.base import DecodedTokens, DecodeInput, Grammar, Hint, TokenDecoder, confidences, drafts
from vla.errors import ConfigError, explain
from vla.models.suffix import TokenSuffix


class JacobiDecoder(TokenDecoder):
    """Exact greedy decoding in windows, causal mask. window: tokens per pass, at least 1 (which is greedy itself).

    warm: the first guess is the previous chunk, shifted by the actions executed since; same output, fewer passes.
    """

    def __init__(self, window: int = 16, warm: bool = False, head: str = ""):
        super().__init__(head)
        if window < 1:
            raise ConfigError(explain("decoder.window", "at least 1", window, "16 suits two CPU cores."))
        self.window, self.warm = window, warm

    def hints(self, given: DecodeInput, head: str) -> list[Hint]:
        guesses = drafts(given, head) if self.warm else [()] * given.batch
        return [Hint(seed, draft) for seed, draft in zip(given.seeds, guesses)]

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        batch = len(hints)
        ids: list[list[int]] = [[] for _ in hints]
        remaining = [grammar.values] * batch
        last = [suffix.start_id] * batch
        # What a cold draft starts from hardly matters as long as it is a token that the model has seen there.
        guesses = [[*hint.draft, *[0] * self.window] for hint in hints]
        rows: list[Tensor] = []
        passes = 0
        while any(remaining):
            base = suffix.length
            # Room for the whole window may be missing only when every sample is about to end.
            width = min(self.window, suffix.room - base)
            inputs = [[token, *guess[: width - 1]] for token, guess in zip(last, guesses)]
            left = [grammar.before_each(r, guess[: width - 1]) for r, guess in zip(remaining, guesses)]
            logits = grammar.constrain(suffix.logits(torch.tensor(inputs, device=suffix.device)), left)
            updates = logits.argmax(dim=-1).tolist()
            passes += 1
            # Position j is settled when all guesses before it were right. A sample of a batch that has ended agrees
            # with anything; the others wait for the slowest, since the cache has one length.
            count = min(_settled(update, guess, before) for update, guess, before in zip(updates, guesses, left))
            suffix.truncate(base + count)
            rows.append(logits[:, :count])
            for sample, update in enumerate(updates):
                for token in update[:count]:
                    if remaining[sample]:
                        ids[sample].append(token)
                        remaining[sample] = max(0, remaining[sample] - grammar.lengths[token])
                last[sample] = update[count - 1]
                behind = guesses[sample][width:] if hints[sample].draft else []
                guesses[sample] = update[count:] + behind + update[-1:] * self.window
        return DecodedTokens(ids, passes, confidences(torch.cat(rows, dim=1), ids))


def _settled(update: Sequence[int], draft: Sequence[int], left: Sequence[int]) -> int:
    """How many tokens of `update` came from right inputs only; left: values still to come before each of them."""
    count = 1
    while count < len(update) and (update[count - 1] == draft[count - 1] or not left[count - 1]):
        count += 1
    return count
