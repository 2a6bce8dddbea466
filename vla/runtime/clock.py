"""Clocks. Everything in the runtime takes `now_ns` as an argument; only entry points own a clock."""

from __future__ import annotations

import time
from typing import Protocol

from vla.errors import ConfigError, explain


class Clock(Protocol):
    """Monotonic nanoseconds."""

    def now_ns(self) -> int: ...

    def sleep_until(self, deadline_ns: int) -> None:
        """Return at `deadline_ns`, at once if it has passed."""
        ...


class MonotonicClock:
    """The machine's monotonic clock: it never jumps, whatever happens to the wall clock."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def sleep_until(self, deadline_ns: int) -> None:
        remaining = deadline_ns - time.monotonic_ns()
        if remaining > 0:
            time.sleep(remaining * 1e-9)


class VirtualClock:
    """A clock that moves only when told: simulated time, replays and tests."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        return self._now_ns

    def advance(self, delta_ns: int) -> int:
        """Move forward by `delta_ns` and return the new time. Raises ConfigError for a negative step."""
        if delta_ns < 0:
            raise ConfigError(
                explain(
                    "delta_ns", "zero or more", delta_ns, "A clock never runs back; use set() to inject that fault."
                )
            )
        self._now_ns += delta_ns
        return self._now_ns

    def set(self, now_ns: int) -> None:
        """Jump to `now_ns`, also backwards: a simulator that restarts does this, and consumers must notice."""
        self._now_ns = now_ns

    def sleep_until(self, deadline_ns: int) -> None:
        self._now_ns = max(self._now_ns, deadline_ns)
