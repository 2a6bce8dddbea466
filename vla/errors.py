"""The one exception tree.

    VlaError
    ├── ConfigError            a key, value or name in a config, or on the command line, is wrong
    ├── DataError              a data set, statistic or array is missing, truncated or malformed
    │   └── StatisticsError    normalisation statistics are missing or do not fit
    ├── BundleError            a checkpoint folder is incomplete, corrupt or of another kind
    ├── EmbodimentMismatch     two embodiments differ; every difference is named
    ├── ObservationError       an observation does not fit: camera, shape, NaN, stale stamp, instruction
    ├── SimulationError        a scene, asset or offscreen GL library is missing, or misuse of an environment
    └── TransportError         a ROS 2 topic, type, port or peer

Every message says which key, what was expected, what came and the remedy; `explain` writes it that way.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlaError(Exception):
    """Base of every error raised on purpose by this project."""


class ConfigError(VlaError):
    pass


class DataError(VlaError):
    pass


class StatisticsError(DataError):
    pass


class BundleError(VlaError):
    pass


class EmbodimentMismatch(VlaError):
    pass


class ObservationError(VlaError):
    pass


class SimulationError(VlaError):
    pass


class TransportError(VlaError):
    pass


def explain(key: str, expected: object, got: object, remedy: str) -> str:
    """One sentence shape for all errors: `key: expected X, got Y. Remedy.`"""
    return f"{key}: expected {expected}, got {got}. {remedy}"


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` when something close is known, else the list of what is known."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(choices) or 'none'}."
