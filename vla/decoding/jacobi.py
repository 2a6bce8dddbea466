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
from vla.decoding.costs import best_length, pass_costs
from vla.errors import ConfigError, explain
from vla.models.suffix import TokenSuffix, best_tokens


class JacobiDecoder(TokenDecoder):
    """Exact greedy decoding in windows, causal mask.

    window: tokens per pass; 1 is greedy itself, 0 the length that pays most with the pass costs of this device, if a
    guess behind right ones is right with probability `agreement`. Long windows see more agreement than short ones, as
    their guesses have been through more passes; the default is what makes the choice right, not what is measured.
    warm: the first guess is the previous chunk, shifted by the actions executed since; same output, fewer passes.
    Notes: "window".
    """

    def __init__(self, window: int = 0, warm: bool = False, agreement: float = 0.85, head: str = ""):
        super().__init__(head)
        if window < 0:
            raise ConfigError(explain("decoder.window", "0 or more", window, "0 chooses it from the cost of passes."))
        if not 0 <= agreement <= 1:
            raise ConfigError(explain("decoder.agreement", "0..1", agreement, "vla bench decode prints it."))
        self.window, self.warm, self.agreement = window, warm, agreement

    def hints(self, given: DecodeInput, head: str) -> list[Hint]:
        guesses = drafts(given, head) if self.warm else [()] * given.batch
        length = self.window or best_length(given.pass_costs(head), self.agreement)
        return [Hint(seed, draft, length=length) for seed, draft in zip(given.seeds, guesses)]

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        batch = len(hints)
        window = self.window or hints[0].length or best_length(pass_costs(suffix), self.agreement)
        ids: list[list[int]] = [[] for _ in hints]
        remaining = [grammar.values] * batch
        last = [suffix.start_id] * batch
        # What a cold draft starts from hardly matters as long as it is a token that the model has seen there.
        guesses = [[*hint.draft, *[0] * window] for hint in hints]
        rows: list[Tensor] = []
        passes = 0
        while any(remaining):
            base = suffix.length
            # Room for the whole window may be missing only when every sample is about to end.
            width = min(window, suffix.room - base)
            inputs = [[token, *guess[: width - 1]] for token, guess in zip(last, guesses)]
            left = [grammar.before_each(r, guess[: width - 1]) for r, guess in zip(remaining, guesses)]
            logits = grammar.constrain(suffix.logits(inputs), left)
            updates = best_tokens(logits)
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
                guesses[sample] = update[count:] + behind + update[-1:] * window
        return DecodedTokens(ids, passes, confidences(torch.cat(rows, dim=1), ids), {"window": float(window)})


def _settled(update: Sequence[int], draft: Sequence[int], left: Sequence[int]) -> int:
    """How many tokens of `update` came from right inputs only; left: values still to come before each of them."""
    count = 1
    while count < len(update) and (update[count - 1] == draft[count - 1] or not left[count - 1]):
        count += 1
    return count
