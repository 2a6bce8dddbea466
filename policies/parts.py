"""What a bundle is run with: its decoder and what stands around it, and one home for making a policy of them all.

Each part is a group of configs/ and an option of the command lines: `--decoder jacobi window=4 --pruning score`. torch
is loaded with a bundle, or by a part that needs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla import configs
from vla.errors import ConfigError, explain
from vla.policy import Policy

if TYPE_CHECKING:
    from policies.vla_policy import VlaPolicy

GROUPS = {
    "decoder": "how a chunk is decoded (default: autoregressive)",
    "pruning": "which visual tokens stay (default: all)",
    "reuse": "when the last chunk stands instead of a forward pass (default: never); needs a pruning",
    "ensembling": "how earlier chunks have a say in the new one (default: not)",
}
Names = Mapping[str, Sequence[str]]  # group -> a name in its folder of configs/, then its settings as key=value


@dataclass(frozen=True)
class Parts:
    """decoder: of vla.decoding, None for greedy. pruning: a TokenSelection, reuse: a ReuseRule, ensembling: an
    Ensembling; None leaves them out.

    They compose in one order: a chunk is decoded behind the pruned prefix, reuse decides whether that happens at all,
    and ensembling fuses what comes out. See ReusePolicy and EnsemblingPolicy.
    """

    decoder: Any = None
    pruning: Any = None
    reuse: Any = None
    ensembling: Any = None

    @classmethod
    def named(cls, names: Names) -> Parts:
        """The parts that the configs of these names construct; ConfigError with the nearest name for unknown ones."""
        return cls(**{group: configs.load(group, words[0], words[1:]) for group, words in names.items() if words})

    def describe(self) -> dict[str, Any]:
        """{group: the config that constructs the part, None where there is none}."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {group: None if part is None else configs.describe(part) for group, part in parts.items()}

    def load(self, bundle: str | Path, device: str = "cpu", threads: int | None = None) -> tuple[Policy, VlaPolicy]:
        """The policy of a bundle folder with these parts, and the innermost one, which runs the model.

        threads: torch CPU threads of this process, None leaves them. Raises BundleError for an incomplete bundle,
        ConfigError for parts that it or each other cannot serve.
        """
        from policies.vla_policy import VlaPolicy

        if threads is not None and threads < 1:
            raise ConfigError(explain("threads", "1 or more", threads, "Leave it out for the default."))
        if self.reuse is not None and self.pruning is None:
            remedy = "Choose pruning score, which drops none."
            raise ConfigError(explain("reuse", "a pruning that names the important visual tokens", "none", remedy))
        inner = VlaPolicy.from_bundle(bundle, self.decoder, device, threads, self.pruning)
        return self.around(inner), inner

    def around(self, policy: Policy) -> Policy:
        """Reuse and ensembling around any policy, as far as they were chosen."""
        from policies.ensembling_policy import EnsemblingPolicy
        from policies.reuse_policy import ReusePolicy

        if self.reuse is not None:
            policy = ReusePolicy(policy, self.reuse)
        return policy if self.ensembling is None else EnsemblingPolicy(policy, self.ensembling)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--decoder, --pruning, ... NAME [KEY=VALUE ...]"""
    for group, text in GROUPS.items():
        parser.add_argument(f"--{group}", nargs="+", default=[], metavar=("NAME", "KEY=VALUE"), help=text)


def named_in(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """What `add_arguments` read, of the groups that were named."""
    return {group: tuple(getattr(options, group)) for group in GROUPS if getattr(options, group)}


def command_line(names: Names) -> list[str]:
    """The words that `named_in` reads as `names`."""
    return [word for group, words in names.items() for word in (f"--{group}", *words)]
