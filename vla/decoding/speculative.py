"""Speculative decoding: a cheap draft proposes tokens, one pass of the model verifies all of them.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023. A draft token x that was drawn
from q is accepted with probability min(1, p(x) / q(x)); the first rejected one is drawn again from norm(max(p - q, 0)),
and behind a draft that was accepted as a whole one more token comes from p. What comes out is distributed as if drawn
from p. Greedily, a token is accepted as long as it is the most probable one. The grammar constrains p and q alike.
With a share `a` of good draft tokens, a pass settles (1 - a^(length + 1)) / (1 - a) tokens on average.

A draft that was not drawn (the previous chunk, guesses of a head) is a point mass: accepting x with p(x), else drawing
from p without x, is the same as drawing from p and looking whether x came. So it is done, one draw per token in their
order, and the tokens are those that AutoregressiveDecoder draws with the same seed.

Samples of a batch share one cache length, so each pass moves it on by what its slowest sample settled. The others keep
what they have settled and never draw it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vla.checkpoints.bundle import Bundle
from vla.decoding.base import DecodedTokens, DecodeInput, Grammar, Hint, Notes, TokenDecoder, check_length, drafts
from vla.decoding.costs import best_length, check_agreement, pass_costs, usual_agreement
from vla.decoding.early_exit import exit_of
from vla.errors import ConfigError, explain, nearest
from vla.models.suffix import Array, TokenSuffix, best_tokens, joined, tensor_of

DRAFTS = ("previous", "shallow", "head")


class SpeculativeDecoder(TokenDecoder):
    """Exact at temperature 0; above it, distributed as AutoregressiveDecoder's draws.

    draft: "previous", the previous chunk's tokens, shifted by the actions executed since; after a rejection it goes on
    where it again begins a token at the same value of the chunk. "shallow", the first `layers` layers with the same
    read-out (0: the layer the head was trained to exit at); the deep ones verify, and nothing is computed twice.
    "head", another token head of the bundle over the same tokens, `draft_head`. length: draft tokens per pass, at most
    (gamma); 0 for as many as pay most with the pass costs of this device, a draft token being free and right with
    probability `agreement`, None for `usual_agreement`; that may be no token at all. Draws from a draft's own
    distributions depend on `length`, so 0, which no seed repeats, is refused there. passes: those that verify, of the
    whole model. Notes: "window", tokens of a pass, length + 1; "accepted", mean number of draft tokens accepted per
    pass, by sample; "layers" that ran, those of the draft included.
    """

    def __init__(
        self, draft: str = "previous", length: int = 0, temperature: float = 0.0, layers: int = 0, draft_head: str = "",
        agreement: float | None = None, head: str = "",
    ):  # fmt: skip
        super().__init__(head)
        if draft not in DRAFTS:
            raise ConfigError(f"decoder.draft: unknown choice {draft!r}. {nearest(draft, DRAFTS)}")
        if length < 0:
            raise ConfigError(explain("decoder.length", "0 or more", length, "0 chooses it from the cost of passes."))
        check_agreement(agreement)
        if temperature < 0:
            raise ConfigError(explain("decoder.temperature", "0 or more", temperature, "Use 0 for greedy decoding."))
        if not length and temperature and draft != "previous":
            wanted = f"at least 1 with draft={draft} at a temperature: draws depend on it"
            raise ConfigError(explain("decoder.length", wanted, length, "0 would make them depend on measured times."))
        if layers < 0 or (layers and draft != "shallow"):
            wanted = "0 for the head's exit, or more" if draft == "shallow" else f"0 with draft={draft}"
            raise ConfigError(explain("decoder.layers", wanted, layers, "Only draft=shallow runs a part of the depth."))
        if bool(draft_head) != (draft == "head"):
            wanted = "the name of a token head" if draft == "head" else f"'' with draft={draft}"
            raise ConfigError(explain("decoder.draft_head", wanted, repr(draft_head), "It belongs to draft=head."))
        self.draft, self.length, self.temperature = draft, length, temperature
        self.layers, self.draft_head, self.agreement = layers, draft_head, agreement
        self.exact = temperature == 0

    def check(self, bundle: Bundle) -> None:
        head = self.head_in(bundle)
        check_length(bundle, "decoder.length", self.length, "0 chooses it from the cost of passes.")
        if self.draft == "shallow":
            exit_of(bundle.config.head(head), bundle.config.transformer.depth, self.layers, "decoder.layers")
        if self.draft == "head":
            _check_draft_head(bundle, head, self.draft_head)

    def hints(self, given: DecodeInput, head: str) -> list[Hint]:
        guesses = drafts(given, head) if self.draft == "previous" else [()] * given.batch
        length = (
            self.length + 1 if self.length else best_length(given.pass_costs(head), self.agrees(given.grammar(head)))
        )
        return [Hint(seed, draft, length=length) for seed, draft in zip(given.seeds, guesses)]

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        choice = Drawn(self.temperature, [hint.seed for hint in hints]) if self.temperature else Greedy()
        return self._generate(suffix, grammar, hints, choice)

    def _generate(
        self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint], choice: Greedy | Drawn
    ) -> DecodedTokens:
        drafter: Drafter
        if self.draft == "previous":
            drafter = Previous(suffix, grammar, hints)
        elif self.draft == "shallow":
            drafter = Shallow(suffix, grammar, choice, exit_of(suffix.config, suffix.depth, self.layers))
        else:
            drafter = Small(suffix, grammar, choice, self.draft_head)
        length = self.length or (hints[0].length or best_length(pass_costs(suffix), self.agrees(grammar))) - 1
        out = speculate(suffix, grammar, drafter, choice, length, len(hints))
        out.notes["window"] = float(length + 1)
        return out

    def agrees(self, grammar: Grammar) -> float:
        return usual_agreement(self.agreement, grammar.lengths)


class RelaxedDecoder(SpeculativeDecoder):
    """Greedy, but a draft token also stands when its bin is near: at most `distance` bins from the most probable one.

    Spec-VLA (Wang et al., EMNLP 2025): a neighbouring bin is nearly the same action, so more of a draft is accepted,
    and an action may be off by `distance` bins where the rest was decided knowing it. The paper's distances belong to
    its models: measure. draft, layers, draft_head: as SpeculativeDecoder's; length too, but at least 1: tokens depend
    on it, and must not on measured times.
    """

    tokenizer = "bins"  # neighbouring ids of other tokens are different actions

    def __init__(
        self, distance: int = 3, draft: str = "previous", length: int = 8, layers: int = 0, draft_head: str = "",
        head: str = "",
    ):  # fmt: skip
        super().__init__(draft, length, 0.0, layers, draft_head, head=head)
        if distance < 1:
            raise ConfigError(explain("decoder.distance", "at least 1 bin", distance, "Use speculative for 0."))
        if not length:
            wanted = "at least 1: which near tokens stand depends on it"
            raise ConfigError(explain("decoder.length", wanted, length, "0 would make them depend on measured times."))
        self.distance = distance
        self.exact = False

    def check(self, bundle: Bundle) -> None:
        super().check(bundle)
        head = self.head_in(bundle)
        most = bundle.config.head(head).vocab - 1  # the first and the last bin lie so far apart
        if self.distance > most:
            expected = f"at most {most}: head {head!r} has {most + 1} bins"
            raise ConfigError(explain("decoder.distance", expected, self.distance, "Lower it; 3 is the default."))

    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        return self._generate(suffix, grammar, hints, Greedy(self.distance))


def _check_draft_head(bundle: Bundle, head: str, draft_head: str) -> None:
    own = bundle.action_tokenizers[head].fingerprint()
    fitting = [
        other.name
        for other in bundle.config.heads
        if other.kind == "tokens" and other.name != head and bundle.action_tokenizers[other.name].fingerprint() == own
    ]
    if draft_head not in fitting:
        remedy = (
            f"Choose one of {', '.join(fitting)}."
            if fitting
            else f"Train a narrow second head with the tokenizer of {head!r}, or use draft=shallow."
        )
        expected = f"another token head with the tokenizer of {head!r}"
        raise ConfigError(explain("decoder.draft_head", expected, repr(draft_head), remedy))


# ---- which token follows ----
class Greedy:
    """The most probable token; a draft token stands when it is that one, or at most `distance` ids away."""

    def __init__(self, distance: int = 0):
        self.distance = distance

    def rows(self, logits: Array) -> Any:
        """Constrained logits [B, Q, V] -> what `draw` and `judge` take, at [sample][place]; waits for the device."""
        return best_tokens(logits)

    def draw(self, row: Any, sample: int) -> tuple[int, Tensor | None]:
        """A draft token, and the distribution it was drawn from, if any."""
        return row, None

    def judge(self, row: Any, sample: int, guess: int | None, chances: Tensor | None) -> int:
        """The token that stands where `guess` was proposed (None: nothing was)."""
        return row if guess is None or abs(guess - row) > self.distance else guess


class Drawn:
    """Draws at a temperature above 0, every sample with a generator of its own. Methods as Greedy's."""

    def __init__(self, temperature: float, seeds: Sequence[int]):
        self.temperature = temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def rows(self, logits: Array) -> Any:
        return (tensor_of(logits) / self.temperature).softmax(dim=-1).cpu()

    def draw(self, row: Any, sample: int) -> tuple[int, Tensor | None]:
        return int(torch.multinomial(row, 1, generator=self._generators[sample])), row

    def judge(self, row: Any, sample: int, guess: int | None, chances: Tensor | None) -> int:
        if guess is None or chances is None:
            return self.draw(row, sample)[0]
        if torch.rand((), generator=self._generators[sample]) < row[guess] / chances[guess]:
            return guess
        rest = (row - chances).clamp(min=0)
        return self.draw(rest if rest.sum() > 0 else row, sample)[0]  # p = q but for rounding leaves nothing


# ---- where drafts come from ----
@dataclass
class Proposal:
    """Draft tokens of one sample. chances: of each, float32[V] on the host it was drawn from; None: a point mass."""

    tokens: list[int] = field(default_factory=list)
    chances: list[Tensor | None] = field(default_factory=list)


class Drafter(Protocol):
    """drawn: its tokens were drawn from distributions. layers: that ran so far, drafting and verifying."""

    drawn: bool
    layers: int

    def propose(self, tokens: list[list[int]], left: list[int], counts: list[int]) -> list[Proposal]:
        """tokens: per sample, settled so far, the start token first. left: values still to come. counts: how many
        draft tokens are wanted, at most. A drafter may stop early, but not because of what it drew."""
        ...

    def verify(self, rows: list[list[int]]) -> Array:
        """[B][Q], what comes behind the cache -> logits [B, Q, V]; the cache advances by Q."""
        ...


class Previous:
    """The tokens of a hint, taken up wherever one of them begins at the value that comes next."""

    drawn = False

    def __init__(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]):
        self.suffix, self.grammar, self.layers = suffix, grammar, 0
        self._drafts = [hint.draft for hint in hints]
        self._begins = [self._places(hint.draft) for hint in hints]

    def _places(self, draft: Sequence[int]) -> dict[int, int]:
        """{values before: index} of the tokens that stand for any."""
        begins, before = {}, 0
        for index, token in enumerate(draft):
            if self.grammar.lengths[token]:
                begins[before] = index
            before += self.grammar.lengths[token]
        return begins

    def propose(self, tokens: list[list[int]], left: list[int], counts: list[int]) -> list[Proposal]:
        out = []
        for draft, begins, remaining, count in zip(self._drafts, self._begins, left, counts):
            index = begins.get(self.grammar.values - remaining, len(draft))
            out.append(Proposal(allowed(self.grammar, remaining, draft[index : index + count])))
        return out

    def verify(self, rows: list[list[int]]) -> Array:
        self.layers += self.suffix.depth
        return self.suffix.logits(rows)


class Shallow:
    """The first layers of the same model; verifying runs the others over all tokens at once."""

    def __init__(self, suffix: TokenSuffix, grammar: Grammar, choice: Greedy | Drawn, shallow: int):
        self.suffix, self.grammar, self.choice, self.shallow = suffix, grammar, choice, shallow
        self.drawn, self.layers = isinstance(choice, Drawn), 0
        self._states: list[Array] = []  # of what went through the shallow layers since the cache advanced

    def propose(self, tokens: list[list[int]], left: list[int], counts: list[int]) -> list[Proposal]:
        self._states = []
        return stepwise(
            [row[self.suffix.length :] for row in tokens], left, counts, self.grammar, self.choice,
            lambda ids: self.suffix.read(self._enter(ids)[:, -1:]),
        )  # fmt: skip

    def verify(self, rows: list[list[int]]) -> Array:
        suffix, entered = self.suffix, sum(state.shape[1] for state in self._states)
        self._enter([row[entered:] for row in rows])
        x = suffix.through(joined(self._states), suffix.length, range(self.shallow, suffix.depth))
        self.layers += suffix.depth - self.shallow
        suffix.advance(len(rows[0]))
        return suffix.read(x)

    def _enter(self, ids: list[list[int]]) -> Array:
        """[B][n], the next ones -> their states after the shallow layers."""
        at = self.suffix.length + sum(state.shape[1] for state in self._states)
        self._states.append(self.suffix.through(self.suffix.embed(ids), at, range(self.shallow)))
        self.layers += self.shallow
        return self._states[-1]


class Small:
    """Another head on the same prefix, in a cache of its own: two suffixes cannot share the places behind it."""

    def __init__(self, suffix: TokenSuffix, grammar: Grammar, choice: Greedy | Drawn, head: str):
        self.suffix, self.grammar, self.choice = suffix, grammar, choice
        self.drawn, self.layers = isinstance(choice, Drawn), 0
        prefix = suffix.prefix
        places = torch.arange(prefix.length, device=prefix.device).expand(prefix.batch, -1)
        cache = prefix.cache.picked(places, suffix.depth, suffix.room)
        cache.advance(prefix.length)
        self.small = TokenSuffix(suffix.model, replace(prefix, cache=cache), head)

    def propose(self, tokens: list[list[int]], left: list[int], counts: list[int]) -> list[Proposal]:
        small = self.small
        small.truncate(self.suffix.length)  # what it read of a draft that was rejected
        rows = [row[small.length :] for row in tokens]

        def step(ids: list[list[int]]) -> Array:
            self.layers += small.depth
            # The small head starts with its own start token: that it has the same number is what `check` sees to.
            return small.logits(ids)[:, -1:]

        return stepwise(rows, left, counts, self.grammar, self.choice, step)

    def verify(self, rows: list[list[int]]) -> Array:
        self.layers += self.suffix.depth
        return self.suffix.logits(rows)


def stepwise(
    rows: list[list[int]], left: list[int], counts: list[int], grammar: Grammar, choice: Greedy | Drawn,
    step: Callable[[list[list[int]]], Array],
) -> list[Proposal]:  # fmt: skip
    """Draft token by token. rows: per sample, known tokens that the drafting model has not read yet.

    step: the next [B][n] -> logits [B, 1, V] after the last of them. left, counts: see Drafter.propose.
    """
    rows, left, counts = [list(row) for row in rows], list(left), list(counts)
    out = [Proposal() for _ in rows]
    read = 0
    while any(counts):
        until = min(len(row) for row, count in zip(rows, counts) if count)
        # A sample that nothing is drafted for keeps its place with any token.
        ids = [_padded(row, until)[read:until] for row in rows]
        drafting = [bool(count) and len(row) == until for row, count in zip(rows, counts)]
        remaining = [[value if here else 0] for value, here in zip(left, drafting)]
        chosen = choice.rows(grammar.constrain(step(ids), remaining))
        read = until
        for sample, here in enumerate(drafting):
            if here:
                token, chances = choice.draw(chosen[sample][0], sample)
                rows[sample].append(token)
                out[sample].tokens.append(token)
                out[sample].chances.append(chances)
                left[sample] = max(0, left[sample] - grammar.lengths[token])
                counts[sample] = counts[sample] - 1 if left[sample] else 0
    return out


def allowed(grammar: Grammar, remaining: int, tokens: Sequence[int]) -> list[int]:
    """The tokens up to the first that does not fit into what remains."""
    out: list[int] = []
    for token in tokens:
        if not 0 < grammar.lengths[token] <= remaining:
            break
        out.append(token)
        remaining -= grammar.lengths[token]
    return out


# ---- the loop ----
def speculate(
    suffix: TokenSuffix, grammar: Grammar, drafter: Drafter, choice: Greedy | Drawn, length: int, batch: int
) -> DecodedTokens:
    """Propose, verify, settle, until all chunks are complete; the cache then holds all tokens but the last of each."""
    tokens = [[suffix.start_id] for _ in range(batch)]
    left = [[grammar.values] for _ in range(batch)]  # values still to come after each token
    rows: list[tuple[Array, int]] = []
    accepted, judged = [0] * batch, [0] * batch

    def unfinished(sample: int) -> bool:
        return left[sample][-1] > 0

    while any(unfinished(s) or len(tokens[s]) > suffix.length + 1 for s in range(batch)):
        base = suffix.length
        width = min(length + 1, suffix.room - base)
        ahead = [len(row) - base for row in tokens]
        # Whoever draws its drafts waits for the others: what it proposes, and so what it draws, is as if it were alone.
        ready = [s for s in range(batch) if unfinished(s) and not (drafter.drawn and ahead[s] > 1)]
        counts = [max(0, min(width - ahead[s], left[s][-1] - 1)) if s in ready else 0 for s in range(batch)]
        proposals = drafter.propose(tokens, [row[-1] for row in left], counts)
        known = [row[base : base + width] for row in tokens]
        inputs = [[*row, *proposal.tokens] for row, proposal in zip(known, proposals)]
        wide = max(map(len, inputs))
        before = [
            [*past[base : base + width], *grammar.before_each(past[-1], proposal.tokens)[1:]]
            for past, proposal in zip(left, proposals)
        ]
        logits = grammar.constrain(
            drafter.verify([_padded(row, wide) for row in inputs]), [_padded(row, wide) for row in before]
        )
        verdicts = choice.rows(logits)
        for s in ready:
            proposal = proposals[s]
            for place in range(len(proposal.tokens) + 1):
                guess = proposal.tokens[place] if place < len(proposal.tokens) else None
                chances = proposal.chances[place] if place < len(proposal.chances) else None
                token = choice.judge(verdicts[s][ahead[s] - 1 + place], s, guess, chances)
                tokens[s].append(token)
                left[s].append(max(0, left[s][-1] - grammar.lengths[token]))
                accepted[s] += token == guess
                if token != guess or not left[s][-1]:
                    break
            judged[s] += 1
        # What this pass may leave in the cache: of an unfinished sample, all its tokens but the last. A finished one
        # agrees with anything behind its own.
        settled = [len(row) - 1 - base for row in tokens]
        slowest = [settled[s] for s in range(batch) if unfinished(s)]
        count = min(wide, *slowest) if slowest else min(wide, max(settled))
        suffix.truncate(base + count)
        rows.append((logits, count))
    ids = [row[1:] for row in tokens]
    notes: Notes = {"accepted": [a / j for a, j in zip(accepted, judged)], "layers": float(drafter.layers)}
    return DecodedTokens.of(ids, len(rows), [logits[:, :count] for logits, count in rows], notes)


def _padded(row: list[int], width: int) -> list[int]:
    """Zeros behind: any token, and for values still to come a row of the grammar that allows any."""
    return [*row, *[0] * (width - len(row))]
