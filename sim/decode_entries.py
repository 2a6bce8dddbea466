"""The lines of the decode benchmark: which decoder, on which head, beside what, compared with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policies.parts import GROUPS, Parts
from policies.vla_policy import VlaPolicy
from vla.errors import ConfigError
from vla.policy import Policy


@dataclass(frozen=True)
class Entry:
    """One line of the benchmark. name: as printed. config: name in configs/decoder. options: key=value.

    reference: name of the entry that this one is compared with, "" for a reference itself, whose success is compared
    with that of the first entry. pruning, reuse, ensembling: names in the groups of configs/, "" for none.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()
    reference: str = ""
    pruning: str = ""
    reuse: str = ""
    ensembling: str = ""

    @property
    def parts(self) -> Parts:
        around = {group: (getattr(self, group),) for group in GROUPS if getattr(self, group, "")}
        return Parts.named({"decoder": (self.config, *self.options), **around})

    @property
    def exact(self) -> bool:
        return bool(self.parts.decoder.exact) and not (self.pruning or self.reuse or self.ensembling)

    @property
    def compared(self) -> str:
        """Name of the entry that success is paired with, "" for none."""
        first = ENTRIES[0].name
        return self.reference or (first if self.name != first else "")

    def policy(self, policy: VlaPolicy) -> Policy:
        """`policy` set to this entry, and what stands around it."""
        parts = self.parts
        policy.decoder, policy.selection = parts.decoder, parts.pruning
        return parts.around(policy)

    def describe(self) -> dict[str, Any]:
        parts = self.parts.describe()
        return {**parts.pop("decoder"), **parts}


_BINS, _DISTILLED, _FAST = "greedy bins", "greedy distilled", "greedy FAST"


def _capped(passes: int, window: int = 0, *more: str) -> tuple[str, ...]:
    return ("head=distilled", f"passes={passes}", f"window={window}", *more)


# Every decoder on the form it was published for, the heads side by side, and what composes.
ENTRIES = (
    Entry(_BINS, "autoregressive", ("head=bins",)),
    Entry("jacobi bins", "jacobi", ("head=bins",), _BINS),
    *(Entry(f"jacobi bins, {n}", "jacobi", ("head=bins", f"window={n}"), _BINS) for n in (4, 8, 16)),
    Entry("jacobi bins, whole block", "jacobi", ("head=bins", "window=112"), _BINS),
    Entry("jacobi bins, warm", "jacobi", ("head=bins", "warm=true"), _BINS),
    Entry("speculative bins, previous chunk", "speculative", ("head=bins",), _BINS),
    Entry("speculative bins, shallow", "speculative_shallow", ("head=bins",), _BINS),
    Entry("speculative bins, draft head", "speculative_draft", ("head=bins",), _BINS),
    Entry("blockwise bins", "blockwise", ("head=bins",), _BINS),
    Entry("relaxed bins", "relaxed", ("head=bins",), _BINS),
    Entry("early exit bins", "early_exit", ("head=bins",), _BINS),
    Entry("early exit bins, adaptive", "early_exit_adaptive", ("head=bins",), _BINS),
    Entry("capped bins, 8 passes", "capped", ("head=bins", "passes=8"), _BINS),
    Entry("capped bins, 2 passes per 16", "capped", ("head=bins", "passes=2", "window=16"), _BINS),
    Entry("bidirectional bins", "jacobi_bidirectional", ("head=bins",), _BINS),
    Entry("forced bins", "forced", ("head=bins",), _BINS),
    Entry("continued bins", "continued", ("head=bins",), _BINS),
    Entry("jacobi bins, warm, pruned", "jacobi", ("head=bins", "warm=true"), _BINS, "flashvla"),
    Entry("jacobi bins, warm, pruned, reused", "jacobi", ("head=bins", "warm=true"), _BINS, "flashvla", "flashvla"),
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
    Entry("jacobi FAST", "jacobi", ("head=fast", "agreement=0.2"), _FAST),
    Entry("jacobi FAST, 4", "jacobi", ("head=fast", "window=4"), _FAST),
    Entry("speculative FAST, previous chunk", "speculative", ("head=fast",), _FAST),
    Entry("anytime FAST", "anytime", ("head=fast",), _FAST),
    Entry("early exit FAST", "early_exit", ("head=fast",), _FAST),
    Entry("continued FAST", "continued", ("head=fast",), _FAST),
    Entry("pruned FAST", "autoregressive", ("head=fast",), _FAST, "flashvla"),
    Entry("reused FAST", "autoregressive", ("head=fast",), _FAST, "score", "flashvla"),
    Entry("pruned and reused FAST", "autoregressive", ("head=fast",), _FAST, "flashvla", "flashvla"),
    Entry("ensembled FAST", "autoregressive", ("head=fast",), _FAST, ensembling="act"),
    Entry("flow, 10 steps", "flow", (), _BINS),
    Entry("flow, 4 steps", "flow", ("steps=4",), _BINS),
    Entry("flow, 5 steps, real-time chunking", "realtime", (), _BINS),
    Entry("flow, 4 steps, pruned, reused", "flow", ("steps=4",), _BINS, "flashvla", "flashvla"),
    Entry("diffusion, 4 steps", "diffusion", (), _BINS),
    Entry("diffusion, 4 steps, real-time chunking", "realtime_diffusion", (), _BINS),
    Entry("hybrid tokens", "ensemble", ("mode=tokens",), _BINS),
    Entry("hybrid ensemble", "ensemble", (), _BINS),
    Entry("parallel", "parallel", (), _BINS),
    Entry("parallel, pruned, reused", "parallel", (), _BINS, "flashvla", "flashvla"),
)


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
