"""What all decoders share: what they are given, what they give back, and the grammar of action tokens.

A decoder turns one prefix into chunks. It owns no weights, remembers nothing between calls, and refuses a bundle whose
heads it cannot serve. Adding one: docs/how-to/add-a-decoder.md.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from vla import configs
from vla.checkpoints.bundle import Bundle
from vla.decoding.costs import pass_costs
from vla.errors import ConfigError, explain
from vla.models.heads import HeadConfig
from vla.models.suffix import Array, TokenSuffix, joined
from vla.models.vla import Prefix
from vla.policy import InferContext
from vla.tokenizers import ActionTokenizer, BinTokenizer, FastTokenizer, valid_table

_TOKENS: dict[type, str] = {BinTokenizer: "bins", FastTokenizer: "fast"}

Notes = dict[str, float | list[float]]  # of a call, or by sample


class Grammar:
    """Which tokens may come next. Every action token stands for a number of the T * A values of a chunk; a chunk is
    complete when they add up, so no end token is needed and every generated list decodes without repair.

    values: T * A. lengths: values per token, on the host, int[V]. bias: float[values + 1, V] on the device, row r what
    to add to the logits when r values are still to come: 0 for tokens that fit, -inf for others. Row 0 allows all: a
    finished sample of a batch keeps its place with any token, which is cut afterwards.
    """

    def __init__(self, tokenizer: ActionTokenizer, horizon: int, action_dim: int, device: torch.device | str = "cpu"):
        self.values = horizon * action_dim
        self.lengths: list[int] = np.asarray(tokenizer.token_lengths).tolist()
        valid = valid_table(tokenizer, self.values)
        valid[0] = True
        # Tokens of one length that divides the values always fit, until the chunk is complete: bins need no table.
        self._free = len(set(self.lengths)) == 1 and self.lengths[0] > 0 and self.values % self.lengths[0] == 0
        self.bias = torch.where(torch.from_numpy(valid), 0.0, -torch.inf).to(device)
        self._rows = self.bias.unbind()  # of one token a view is taken, at a fraction of an indexed copy
        self._host = self.bias.numpy() if self.bias.is_cpu else None

    def constrain(self, logits: Array, remaining: Sequence[Sequence[int]]) -> Array:
        """logits [B, Q, V] and the values still to come before each -> float32, with -inf where nothing fits."""
        one = len(remaining) == len(remaining[0]) == 1
        if isinstance(logits, np.ndarray):
            if self._free:
                return logits
            assert self._host is not None
            masked: np.ndarray = logits + self._host[remaining[0][0] if one else remaining]
            return masked
        if self._free:
            return logits.float()
        if one:
            return logits.float() + self._rows[remaining[0][0]]
        # Not torch.tensor(device=...): that waits until the pass is done.
        rows = torch.tensor(remaining).to(self.bias.device, non_blocking=True)
        return logits.float() + embedding(rows, self.bias)

    def before_each(self, remaining: int, tokens: Sequence[int]) -> list[int]:
        """Values still to come before each of `tokens`, and after the last: len(tokens) + 1 numbers."""
        out, lengths = [remaining], self.lengths
        for token in tokens:
            remaining = max(0, remaining - lengths[token])
            out.append(remaining)
        return out

    def append(self, ids: list[int], remaining: int, tokens: Sequence[int]) -> int:
        """Put tokens behind `ids` until the chunk is complete; returns the values then to come."""
        for token in tokens:
            if not remaining:
                break
            ids.append(token)
            remaining = max(0, remaining - self.lengths[token])
        return remaining


@dataclass(frozen=True)
class Hint:
    """What a token decoder may know of one sample beside its prefix.

    seed: for draws. draft: how the tokens may come out, judging from the previous chunk; () when there was none.
    deadline: time.perf_counter() at which the answer is wanted, infinity for never. length: tokens per pass, where the
    device chooses it; 0 where nobody did.
    """

    seed: int = 0
    draft: tuple[int, ...] = ()
    deadline: float = float("inf")
    length: int = 0


@dataclass(frozen=True)
class DecodedTokens:
    """ids: per sample. passes: model passes after the prefix. confidence: mean probability of the ids, per sample.

    notes: further numbers for reports, of this call or, as a list, by sample; "layers" where a pass did not go through
    the whole depth.
    probabilities: of each id, where the decoder tells them.
    """

    ids: list[list[int]]
    passes: int
    confidence: list[float]
    notes: Notes = field(default_factory=dict)
    probabilities: list[list[float]] = field(default_factory=list)

    @classmethod
    def of(cls, ids: list[list[int]], passes: int, rows: Sequence[Array], notes: Notes | None = None) -> DecodedTokens:
        """rows: the constrained logits [B, n, V] that the ids were chosen from, together as many as the longest."""
        likely = probabilities(rows, ids)
        return cls(ids, passes, [sum(row) / len(row) for row in likely], notes or {}, likely)


@dataclass(frozen=True)
class Decoded:
    """actions: normalised float32[B, T, A]. ids: per sample, () for continuous heads. repaired: per sample, tokens or
    values that had to be mended. The rest as in DecodedTokens."""

    actions: np.ndarray
    passes: int
    ids: list[tuple[int, ...]] = field(default_factory=list)
    repaired: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    notes: Notes = field(default_factory=dict)

    def at(self, sample: int) -> tuple[tuple[int, ...], int, float, dict[str, float]]:
        """(ids, repaired, confidence, notes) of one sample, with what stands for them where a head has none."""
        return (
            self.ids[sample] if self.ids else (),
            self.repaired[sample] if self.repaired else 0,
            self.confidence[sample] if self.confidence else 1.0,
            {name: note[sample] if isinstance(note, list) else note for name, note in self.notes.items()},
        )


@dataclass
class DecodeInput:
    """One batch behind its prefix. bundle: the policy's. seeds, contexts: per sample. grammar: by head, made once.

    costs: what passes take, by head; whoever needs them first measures them (`pass_costs`), and the policy
    keeps them. started: time.perf_counter() when this inference began.
    """

    bundle: Bundle
    prefix: Prefix
    seeds: Sequence[int]
    contexts: Sequence[InferContext]
    grammar: Callable[[str], Grammar]
    started: float = field(default_factory=time.perf_counter)
    costs: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return len(self.seeds)

    def pass_costs(self, head: str) -> dict[int, float]:
        """{tokens: milliseconds of a pass over them} of a token head, measured once per policy with the batch that
        comes first: one sample where it is warmed up. Batches of other sizes take that curve and wait for none."""
        if head not in self.costs:
            self.costs[head] = pass_costs(TokenSuffix(self.bundle.model, self.prefix, head))
        return self.costs[head]

    @cached_property
    def previous(self) -> list[np.ndarray | None]:
        """What is left of each sample's previous chunk, normalised float32[T, A]: shifted by the actions executed
        since, the last action repeated; None without a previous chunk."""
        out: list[np.ndarray | None] = []
        for context in self.contexts:
            if context.previous is None:
                out.append(None)
                continue
            actions = self.bundle.action_normalizer.normalize(context.previous.actions)
            rows = np.minimum(np.arange(self.bundle.config.horizon) + context.executed, len(actions) - 1)
            out.append(actions[rows].astype(np.float32))
        return out


class Decoder(Protocol):
    """exact: gives what greedy decoding of the same head gives, token by token (in exact arithmetic)."""

    exact: bool

    def check(self, bundle: Bundle) -> None:
        """Raise ConfigError, with the remedy, when this bundle has not what the decoder needs."""
        ...

    def decode(self, given: DecodeInput) -> Decoded: ...


class TokenDecoder(ABC):
    """A decoder of action tokens. head: name of the head, "" for the first that makes them.

    tokenizer: the only kind of tokens that a decoder can do with, "bins" or "fast"; "" takes any. kind: of the heads
    that are looked for; see `exactly`.
    """

    exact = True
    tokenizer = ""
    kind = "tokens"

    def __init__(self, head: str = ""):
        self.head = head

    def check(self, bundle: Bundle) -> None:
        self.head_in(bundle)

    def head_in(self, bundle: Bundle) -> str:
        """The name of the head that is decoded; see `find_head`."""
        return find_head(bundle, self.head, self.kind, self.tokenizer)

    @abstractmethod
    def generate(self, suffix: TokenSuffix, grammar: Grammar, hints: Sequence[Hint]) -> DecodedTokens:
        """Complete token lists behind one prefix; the suffix is empty when it comes in."""

    def hints(self, given: DecodeInput, head: str) -> list[Hint]:
        """Overridden by decoders that want drafts or a deadline: making a draft costs an encoding."""
        return [Hint(seed) for seed in given.seeds]

    @torch.inference_mode()
    def decode(self, given: DecodeInput) -> Decoded:
        head = self.head_in(given.bundle)
        suffix = TokenSuffix(given.bundle.model, given.prefix, head)
        out = self.generate(suffix, given.grammar(head), self.hints(given, head))
        suffix.truncate(0)  # another decoder may use the prefix next
        return detokenized(given.bundle, head, out)


def exactly(inner: str, head: str, kind: str = "tokens") -> TokenDecoder:
    """The decoder inside another that only wants greedy's tokens of one head, however they are found.

    inner: a name in configs/decoder, then settings as KEY=VALUE, as behind --decoder. kind: "hybrid" where the caller
    has written the noisy actions that stand before the tokens. ConfigError for one that is not exact.
    """
    name, *options = inner.split() or [""]
    try:
        made = configs.load("decoder", name, options)
    except ConfigError as error:
        raise ConfigError(f"decoder.inner: {error}") from error
    if not isinstance(made, TokenDecoder) or not made.exact:
        remedy = "Take autoregressive, jacobi or speculative."
        raise ConfigError(explain("decoder.inner", "a decoder that gives greedy's tokens", repr(inner), remedy))
    made.head, made.kind = head, kind
    return made


def detokenized(bundle: Bundle, head: str, out: DecodedTokens) -> Decoded:
    """Tokens of a head as normalised actions."""
    config, tokenizer = bundle.config, bundle.action_tokenizers[head]
    pairs = [tokenizer.decode_report(ids, config.horizon, config.action_dim) for ids in out.ids]
    return Decoded(
        np.array([actions for actions, _ in pairs]), out.passes, [tuple(ids) for ids in out.ids],
        [repaired for _, repaired in pairs], out.confidence, out.notes,
    )  # fmt: skip


def drafts(given: DecodeInput, head: str) -> list[tuple[int, ...]]:
    """Each sample's previous chunk as tokens of `head`, shifted to now; () without one."""
    tokenizer = given.bundle.action_tokenizers[head]
    return [() if left is None else encoded_again(tokenizer, left) for left in given.previous]


def encoded_again(tokenizer: ActionTokenizer, actions: np.ndarray) -> tuple[int, ...]:
    """Tokens of normalised actions that came from tokens.

    The last two bins decode to one value, which `encode` reads as the last but one. The last one is meant: it is where
    every clipped value goes, so nearly all open grippers.
    """
    ids = tokenizer.encode(actions)
    if isinstance(tokenizer, BinTokenizer):
        last = tokenizer.vocab_size - 1
        ids = [last if token == last - 1 else token for token in ids]
    return tuple(ids)


def find_head(bundle: Bundle, name: str, kind: str, tokenizer: str = "") -> str:
    """The head called `name`, or the first of this kind, whose tokens are of kind `tokenizer` ("" for any);
    ConfigError when there is none."""
    heads = bundle.config.heads

    def made(head: str) -> str:
        return _TOKENS.get(type(bundle.action_tokenizers.get(head)), "")

    def fits(head: HeadConfig) -> bool:
        return head.kind == kind and tokenizer in ("", made(head.name))

    for head in heads:
        if name in ("", head.name) and fits(head):
            return head.name
    fitting = [head.name for head in heads if fits(head)]
    wanted = f"a head of kind {kind!r}" + (f" over {tokenizer}" if tokenizer else "")
    wanted += f" named {name!r}" if name else ""
    got = ", ".join(f"{head.name} ({' over '.join(filter(None, (head.kind, made(head.name))))})" for head in heads)
    remedy = f"Choose one of {', '.join(fitting)}." if fitting else f"Train one: vla train head=[...,{kind}]."
    if kind == "tokens" and not fitting:
        remedy = f"Train one: vla train head=[...,{tokenizer or 'fast'}]."
    raise ConfigError(explain("decoder.head", wanted, got, remedy))


def check_length(bundle: Bundle, key: str, length: int, remedy: str) -> None:
    """ConfigError when a pass over `length` tokens is longer than any chunk: a token stands for at least one value."""
    most = bundle.config.horizon * bundle.config.action_dim
    if length > most:
        raise ConfigError(explain(key, f"at most {most}, the tokens of a chunk", length, remedy))


def probabilities(rows: Sequence[Array], ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """Probability of each chosen token, per sample, from constrained logits [B, n, V], together as many as the
    longest list; shorter ones are cut."""
    width = sum(row.shape[1] for row in rows)
    filled = [[*row, *[0] * (width - len(row))] for row in ids]
    logits = joined(rows)
    if isinstance(logits, np.ndarray):
        odds = logits[0]  # on the host a batch is one
        odds -= odds.max(axis=1, keepdims=True)
        np.exp(odds, out=odds)
        top = [(odds[np.arange(width), filled[0]] / odds.sum(axis=1)).tolist()]
    else:
        index = torch.tensor(filled, device=logits.device)[..., None]
        top = logits.softmax(dim=-1).gather(2, index)[..., 0].tolist()
    return [row[: len(kept)] for row, kept in zip(top, ids)]


def generators(given: DecodeInput) -> list[torch.Generator]:
    """One per sample, on the host: a batch on any device draws what its samples draw alone on a CPU."""
    return [torch.Generator().manual_seed(seed) for seed in given.seeds]


def predictions(
    given: DecodeInput, head: str, predict: Callable[[Prefix, str, Tensor, Tensor], Tensor]
) -> Callable[[Tensor, float], Tensor]:
    """What a head predicts behind the prefix (Vla.velocity, Vla.noise) of noisy actions [B, T, A], at a time or a step
    that all samples share -> float32[B, T, A]"""

    def predicted(noisy: Tensor, time: float) -> Tensor:
        times = torch.full((given.batch,), time, device=noisy.device)
        return predict(given.prefix, head, noisy.to(given.prefix.cache.keys.dtype), times).float()

    return predicted


def gaussian(given: DecodeInput, draws: Sequence[torch.Generator]) -> Tensor:
    """Standard normal float32[B, T, A] on the prefix's device, each sample from its own generator."""
    shape = given.bundle.config.horizon, given.bundle.config.action_dim
    return torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(given.prefix.device)
