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

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import DecodedTokens, DecodeInput, Grammar, Hint, TokenDecoder, check_length, drafts
from vla.decoding.costs import best_length, check_agreement, pass_costs, usual_agreement
from vla.errors import ConfigError, explain
from vla.models.suffix import Array, TokenSuffix, best_tokens


class JacobiDecoder(TokenDecoder):
    """Exact greedy decoding in windows, causal mask.

    window: tokens per pass; 1 is greedy itself, 0 the length that pays most with the pass costs of this device, if a
    guess behind right ones is right with probability `agreement`, None for `usual_agreement`. warm: the first guess is
    the previous chunk, shifted by the actions executed since; same output, fewer passes.
    Notes: "window".
    """

    def __init__(self, window: int = 0, warm: bool = False, agreement: float | None = None, head: str = ""):
        super().__init__(head)
        if window < 0:
            raise ConfigError(explain("decoder.window", "0 or more", window, "0 chooses it from the cost of passes."))
        check_agreement(agreement)
        self.window, self.warm, self.agreement = window, warm, agreement

    def check(self, bundle: Bundle) -> None:
        super().check(bundle)
        check_length(bundle, "decoder.window", self.window, "0 chooses it from the cost of passes.")

    def hints(self, given: DecodeInput, head: str) -> list[Hint]:
        guesses = drafts(given, head) if self.warm else [()] * given.batch
        length = self.window or best_length(given.pass_costs(head), self.agrees(given.grammar(head)))
        return [Hint(seed, draft, length=length) for seed, draft in zip(given.seeds, guesses)]

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        window = self.window or hints[0].length or best_length(pass_costs(suffix), self.agrees(grammar))
        out = jacobi(suffix, grammar, [hint.draft for hint in hints], window)
        out.notes["window"] = float(window)
        return out

    def agrees(self, grammar: Grammar) -> float:
        return usual_agreement(self.agreement, grammar.lengths)


def jacobi(
    suffix: TokenSuffix,
    grammar: Grammar,
    guesses: Sequence[Sequence[int]],
    window: int,
    most: int = 0,
    both_ways: bool = False,
) -> DecodedTokens:
    """Update all tokens of a window at once, again and again; those whose inputs were right leave it (Santilli et al.).

    guesses: per sample, the first ones, from the first token on. most: 0, and the window slides on as tokens leave; or
    the passes after which those left stand as they are, and the next window, a block of its own, begins behind them.
    What stands unsettled is fed again with the next block: no entry of a discarded guess stays in the cache. both_ways:
    the window is not causal, and nothing leaves it until nothing changes; it has to be the whole chunk, for what its
    tokens have seen of later guesses stays in their entries.
    """
    ids: list[list[int]] = [[] for _ in guesses]
    remaining = [grammar.values] * len(guesses)
    known = [[suffix.start_id] for _ in guesses]  # what stands and is not in the cache
    # What a cold draft starts from hardly matters as long as it is a token that the model has seen there.
    ahead = [[*guess, *[0] * (window - len(guess))] for guess in guesses]
    rows: list[tuple[Array, int]] = []
    end = tries = passes = 0
    while any(remaining):
        base, fed = suffix.length, len(known[0])
        done = base + fed - 1  # tokens that stand
        if done == end or not most:
            end, tries = done + window, 0
        # Room for the whole window may be missing only when every sample is about to end.
        width = min(end, suffix.room, done + max(remaining)) - done
        inputs = [[*row, *guess[: width - 1]] for row, guess in zip(known, ahead)]
        left = [grammar.before_each(r, guess[: width - 1]) for r, guess in zip(remaining, ahead)]
        logits = suffix.logits(inputs, both_ways)
        logits = grammar.constrain(logits if fed == 1 else logits[:, -width:], left)
        updates = best_tokens(logits)
        passes, tries = passes + 1, tries + 1
        # The cache has one length: the others wait for the slowest sample.
        settled = min(_settled(*sample, both_ways) for sample in zip(updates, ahead, left))
        count = width if tries == most else settled
        suffix.truncate(done + settled)
        rows.append((logits, count))
        for sample, update in enumerate(updates):
            remaining[sample] = grammar.append(ids[sample], remaining[sample], update[:count])
            known[sample] = [*known[sample], *update[:count]][fed - 1 + settled :]
            rest = [*update[count:], *ahead[sample][width:]]
            ahead[sample] = rest + update[-1:] * (window - len(rest))
    return DecodedTokens.of(ids, passes, [logits[:, :count] for logits, count in rows])


def _settled(update: Sequence[int], guess: Sequence[int], left: Sequence[int], both_ways: bool) -> int:
    """How many tokens of `update` came from right inputs only. left: values still to come before each of them: a sample
    of a batch that has ended agrees with anything."""
    if both_ways:
        return len(update) if update == guess[: len(update)] else 0
    count = 1
    while count < len(update) and (update[count - 1] == guess[count - 1] or not left[count - 1]):
        count += 1
    return count
