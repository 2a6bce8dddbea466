"""The lines of the decode benchmark: which decoder, on which head, beside what, compared with what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from policies.parts import GROUPS, Parts
from policies.vla_policy import VlaPolicy
from vla import configs
from vla.decoding.base import TokenDecoder
from vla.errors import ConfigError, nearest
from vla.policy import Policy


@dataclass(frozen=True)
class Entry:
    """One line of the benchmark. name: as printed. config: name in configs/decoder. options: key=value.

    reference: name of the entry that this one is compared with, "" for a reference itself, whose success is compared
    with that of the first entry. pruning, reuse, ensembling: names in the groups of configs/, with key=value behind
    them as after --pruning, "" for none. against: further entries that success is compared with.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()
    reference: str = ""
    pruning: str = ""
    reuse: str = ""
    ensembling: str = ""
    against: tuple[str, ...] = ()

    @property
    def parts(self) -> Parts:
        around = {group: tuple(words) for group in GROUPS if (words := getattr(self, group, "").split())}
        return Parts.named({"decoder": (self.config, *self.options), **around})

    @property
    def exact(self) -> bool:
        return bool(self.parts.decoder.exact) and not (self.pruning or self.reuse or self.ensembling)

    @property
    def compared(self) -> tuple[str, ...]:
        """Names of the entries that success is paired with, the reference before others; () for the first entry."""
        first = self.reference or ENTRIES[0].name
        return tuple(name for name in (first, *self.against) if name != self.name)

    def policy(self, policy: VlaPolicy) -> Policy:
        """`policy` set to this entry, and what stands around it."""
        parts = self.parts
        policy.decoder, policy.selection = parts.decoder, parts.pruning
        return parts.around(policy)

    def describe(self) -> dict[str, Any]:
        parts = self.parts.describe()
        return {**parts.pop("decoder"), **parts}


_BINS, _DISTILLED, _FAST = "greedy bins", "greedy distilled", "greedy FAST"
# Reuse of a policy that is asked all the time (--execute 1), without pruning: what costs little, what saves most.
_OFTEN, _EAGER = ("score", "flashvla_often"), ("score", "flashvla_eager")
_ONCE = ("score", "flashvla_once")  # for bins, whose later actions are worse


def _capped(passes: int, window: int = 0, *more: str) -> tuple[str, ...]:
    return ("head=distilled", f"passes={passes}", f"window={window}", *more)


def by_default(names: Iterable[str]) -> tuple[Entry, ...]:
    """Lines of decoders with their defaults, by name in configs/decoder: on bins and on FAST tokens, or, where they
    make none, on the head they find."""
    out: list[Entry] = []
    for name in names:
        if isinstance(configs.load("decoder", name), TokenDecoder):
            out.append(Entry(f"{name} bins", name, ("head=bins",), _BINS))
            out.append(Entry(f"{name} FAST", name, ("head=fast",), _FAST))
        else:
            out.append(Entry(name, name, (), _BINS))
    return tuple(out)


# Every decoder on the form it was published for, the heads side by side, and what composes. References are measured
# twice: what lies between the two is noise.
_LISTED = (
    Entry(_BINS, "autoregressive", ("head=bins",)),
    Entry(f"{_BINS}, again", "autoregressive", ("head=bins",), _BINS),
    Entry("jacobi bins", "jacobi", ("head=bins",), _BINS),
    *(Entry(f"jacobi bins, {n}", "jacobi", ("head=bins", f"window={n}"), _BINS) for n in (4, 8, 16)),
    Entry("jacobi bins, whole block", "jacobi", ("head=bins", "window=112"), _BINS),
    Entry("jacobi bins, warm", "jacobi", ("head=bins", "warm=true"), _BINS),
    Entry("jacobi bins, whole block, warm", "jacobi", ("head=bins", "window=112", "warm=true"), _BINS),
    Entry("speculative bins, previous chunk", "speculative", ("head=bins",), _BINS),
    Entry("speculative bins, shallow", "speculative_shallow", ("head=bins",), _BINS),
    Entry("speculative bins, draft head", "speculative_draft", ("head=bins",), _BINS),
    Entry("blockwise bins", "blockwise", ("head=bins",), _BINS),
    Entry("relaxed bins", "relaxed", ("head=bins",), _BINS),
    Entry("relaxed bins, 1 apart", "relaxed", ("head=bins", "distance=1"), _BINS),
    Entry("relaxed bins, draft head", "relaxed", ("head=bins", "draft=head", "draft_head=draft", "length=4"), _BINS),
    Entry(
        "relaxed bins, draft head, 1 apart",
        "relaxed",
        ("head=bins", "draft=head", "draft_head=draft", "length=4", "distance=1"),
        _BINS,
    ),
    Entry("relaxed bins, shallow", "relaxed", ("head=bins", "draft=shallow", "length=4"), _BINS),
    Entry("early exit bins", "early_exit", ("head=bins",), _BINS),
    Entry("early exit bins, adaptive", "early_exit_adaptive", ("head=bins",), _BINS),
    Entry("capped bins, 8 passes", "capped", ("head=bins", "passes=8"), _BINS),
    Entry("capped bins, 2 passes per 16", "capped", ("head=bins", "passes=2", "window=16"), _BINS),
    Entry("bidirectional bins", "inexact_bidirectional", ("head=bins",), _BINS),
    Entry("forced bins", "forced", ("head=bins",), _BINS),
    Entry("continued bins", "continued", ("head=bins",), _BINS),
    Entry("jacobi bins, warm, pruned", "jacobi", ("head=bins", "warm=true"), _BINS, "flashvla"),
    Entry(
        "jacobi bins, warm, pruned, three quarters stay",
        "jacobi",
        ("head=bins", "warm=true"),
        _BINS,
        "flashvla keep=0.75",
    ),
    Entry("jacobi bins, warm, pruned, reused", "jacobi", ("head=bins", "warm=true"), _BINS, "flashvla", "flashvla"),
    Entry("jacobi bins, warm, once reused", "jacobi", ("head=bins", "warm=true"), _BINS, *_ONCE),
    Entry("jacobi bins, warm, often reused", "jacobi", ("head=bins", "warm=true"), _BINS, *_OFTEN),
    Entry("jacobi bins, warm, eagerly reused", "jacobi", ("head=bins", "warm=true"), _BINS, *_EAGER),
    Entry(_DISTILLED, "autoregressive", ("head=distilled",)),
    Entry("jacobi distilled", "jacobi", ("head=distilled", "agreement=0.9"), _DISTILLED),
    Entry("jacobi distilled, whole block", "jacobi", ("head=distilled", "window=112"), _DISTILLED),
    Entry("jacobi distilled, warm", "jacobi", ("head=distilled", "warm=true", "agreement=0.9"), _DISTILLED),
    *(Entry(f"capped distilled, {n} passes", "capped", _capped(n), _DISTILLED) for n in (1, 2, 4, 8, 12)),
    *(Entry(f"capped distilled, {n} per 16", "capped", _capped(n, 16), _DISTILLED) for n in (1, 2, 4)),
    Entry("capped distilled, 1 per 16, warm", "capped", _capped(1, 16, "warm=true"), _DISTILLED),
    Entry("capped distilled, 2 per 16, pruned", "capped", _capped(2, 16), _DISTILLED, "flashvla"),
    Entry("capped distilled, 2 per 16, pruned, reused", "capped", _capped(2, 16), _DISTILLED, "flashvla", "flashvla"),
    Entry(_FAST, "autoregressive", ("head=fast",)),
    Entry(f"{_FAST}, again", "autoregressive", ("head=fast",), _FAST),
    Entry("jacobi FAST", "jacobi", ("head=fast",), _FAST),
    Entry("jacobi FAST, 4", "jacobi", ("head=fast", "window=4"), _FAST),
    Entry("speculative FAST, previous chunk", "speculative", ("head=fast",), _FAST),
    Entry("anytime FAST", "anytime", ("head=fast",), _FAST),
    Entry("early exit FAST", "early_exit", ("head=fast",), _FAST),
    Entry("continued FAST", "continued", ("head=fast",), _FAST),
    Entry("pruned FAST", "autoregressive", ("head=fast",), _FAST, "flashvla"),
    Entry("pruned FAST, three quarters stay", "autoregressive", ("head=fast",), _FAST, "flashvla keep=0.75"),
    Entry("reused FAST", "autoregressive", ("head=fast",), _FAST, "score", "flashvla"),
    Entry("pruned and reused FAST", "autoregressive", ("head=fast",), _FAST, "flashvla", "flashvla"),
    Entry("often reused FAST", "autoregressive", ("head=fast",), _FAST, *_OFTEN),
    Entry("eagerly reused FAST", "autoregressive", ("head=fast",), _FAST, *_EAGER),
    Entry("ensembled FAST", "autoregressive", ("head=fast",), _FAST, ensembling="act"),
    Entry("drawn FAST, temperature 1", "autoregressive", ("head=fast", "temperature=1"), _FAST),
    Entry("flow, 10 steps", "flow", (), _BINS),
    Entry("flow, 4 steps", "flow", ("steps=4",), _BINS),
    Entry("flow, 5 steps, real-time chunking", "realtime", (), _BINS),
    Entry(
        "flow, 4 steps, pruned, reused", "flow", ("steps=4",), _BINS, "flashvla", "flashvla", against=("flow, 4 steps",)
    ),
    Entry("diffusion, 4 steps", "diffusion", (), _BINS),
    Entry("diffusion, 4 steps, real-time chunking", "realtime_diffusion", (), _BINS),
    Entry("hybrid tokens", "ensemble", ("mode=tokens",), _BINS),
    *(
        Entry(f"hybrid ensemble{name}", "ensemble", options, _BINS, against=("hybrid tokens", "diffusion, 4 steps"))
        for name, options in (
            ("", ()),
            (", threshold 0.5", ("threshold=0.5",)),
            (", threshold 0.5, by jacobi", ("threshold=0.5", "inner=jacobi")),
        )
    ),
    Entry("parallel", "parallel", (), _BINS),
    Entry("parallel, pruned, reused", "parallel", (), _BINS, "flashvla", "flashvla", against=("parallel",)),
    Entry("parallel, often reused", "parallel", (), _BINS, *_OFTEN, against=("parallel",)),
    Entry("parallel, eagerly reused", "parallel", (), _BINS, *_EAGER, against=("parallel",)),
    Entry(
        "parallel, three quarters stay, eagerly reused",
        "parallel",
        (),
        _BINS,
        "flashvla keep=0.75",
        "flashvla_eager",
        against=("parallel",),
    ),
)
ENTRIES = (*_LISTED, *by_default(sorted({*configs.names("decoder")} - {entry.config for entry in _LISTED})))


def chosen(only: Sequence[str]) -> list[Entry]:
    """The entries of these names, all for none, with those they are compared with, and so on, and the repetitions of
    those; ConfigError with the nearest name for unknown ones."""
    by_name = {entry.name: entry for entry in ENTRIES}
    wanted: set[str] = set()
    waiting = list(only)
    while waiting:
        name = waiting.pop()
        if name not in by_name:
            raise ConfigError(f"--only: unknown line {name!r}. {nearest(name, by_name)}")
        if name not in wanted:
            wanted.add(name)
            waiting += by_name[name].compared
    wanted |= {f"{name}, again" for name in wanted} & set(by_name)
    return [entry for entry in ENTRIES if not only or entry.name in wanted]


def served(policy: VlaPolicy, entries: Sequence[Entry]) -> tuple[list[Entry], dict[str, str]]:
    """Which entries this bundle's heads serve, and why not the others."""
    good, refused = [], {}
    for entry in entries:
        try:
            parts = entry.parts
            parts.decoder.check(policy.bundle)
            if parts.pruning is not None:
                parts.pruning.check(policy.bundle.config)
            good.append(entry)
        except ConfigError as error:
            refused[entry.name] = str(error)
    return good, refused
