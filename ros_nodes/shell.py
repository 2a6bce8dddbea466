"""What the shells share: the graph's clock, the worker thread for jobs, and how long an end may take."""

from __future__ import annotations

import gc
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from ros_nodes.heap import reserve
from ros_nodes.messages import CompressedImage, Image, Message, decode
from ros_nodes.node import Effects, Job, NodeCore, Now
from vla.errors import TransportError, explain

CLOCK_OFFSET_VARIABLE = "VLA_CLOCK_OFFSET_NS"
CLOCK_STEP_NS = 50_000_000
# The receive thread must get the interpreter while the core computes: the default of 5 ms is our whole budget.
SWITCH_INTERVAL_S = 5e-4
JOB_END_S = 3.0  # how long a job may go on after the end was asked for
# From the signal on; then the process writes where its threads are to stderr, and ends. A long trace needs a while.
EXIT_LIMIT_S = 45.0
HOLD_LIMIT_S = 1.0  # how long a brake may take before publishing ends
MAX_BYTES = 1 << 18  # of a message that is no picture: reading a longer one would keep the core from its timer


def read(type_name: str, data: bytes, distro: str) -> Message:
    """`decode`, and TransportError for messages too long to be read in a control period."""
    if len(data) > MAX_BYTES and type_name not in (Image.type_name, CompressedImage.type_name):
        raise TransportError(explain(type_name, f"at most {MAX_BYTES} bytes", len(data), "Check the publisher."))
    return decode(type_name, data, distro)


class GraphClock:
    """Graph time. Wall: CLOCK_MONOTONIC plus one offset to the epoch, which processes started together share through an
    environment variable, so that their stamps agree to the nanosecond; when the wall clock is set (an NTP step, a
    resumed machine) by more than CLOCK_STEP_NS the offset follows, and Now.set_ns tells. Slewing moves both clocks.
    Simulated: the newest /clock, 0 until the first."""

    def __init__(self, simulated: bool = False):
        self.simulated, self._simulated_ns, self._set_ns = simulated, 0, 0
        given = os.environ.get(CLOCK_OFFSET_VARIABLE, "")
        self._offset_ns = int(given) if given else time.time_ns() - time.monotonic_ns()
        self._follow_wall()
        self._set_ns = 0  # what happened before this process is none of its business

    def now(self, received_ns: int = 0) -> Now:
        if self.simulated:
            return Now(self._simulated_ns, time.monotonic_ns(), received_ns)
        steady = self._follow_wall()
        return Now(steady + self._offset_ns, steady, received_ns, self._set_ns)

    def _follow_wall(self) -> int:
        """The steady time now, the offset corrected."""
        before, wall, steady = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        step = wall - steady - self._offset_ns
        # A thread that was interrupted between the two clocks has not seen a step.
        if abs(step) > CLOCK_STEP_NS and steady - before < CLOCK_STEP_NS // 50:
            self._offset_ns += step
            self._set_ns += step
        return steady

    def follow(self, stamp_ns: int) -> None:
        self._simulated_ns = stamp_ns


class Worker:
    """The thread for jobs, one after the other. done: called on it with the job's name and its value, an exception as
    the value when it failed."""

    def __init__(self, name: str, done: Callable[[str, Any], None]):
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._done = done
        self._thread = threading.Thread(target=self._work, name=f"{name}-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, job: Job) -> None:
        self._jobs.put(job)

    def end(self, limit_s: float) -> bool:
        """Let the running job end; True when it goes on for longer than `limit_s`, its thread living on."""
        self._jobs.put(None)
        self._thread.join(limit_s)
        return self._thread.is_alive()

    def _work(self) -> None:
        _yield_to_other_threads()
        while (job := self._jobs.get()) is not None:
            try:
                value = job.run()
            except Exception as error:  # the core decides what a failed job means
                value = error
            self._done(job.name, value)


def settle(core: NodeCore | None = None) -> None:
    """The last act of the start. Parts of numpy that it loads when first used, which was with the first chunk and took
    24 ms of a control period, are loaded. What the start has made leaves the garbage collector's sight: a full
    collection looks at all of it and stops every thread meanwhile, 17 ms in a command node and 75 ms with torch. A core
    whose messages are large says in `message_bytes` what they may take at one time; the heap gets that much."""
    import numpy.ma
    import numpy.random  # noqa: F401

    gc.collect()
    gc.freeze()
    if size := getattr(core, "message_bytes", 0):
        reserve(size)


def hold(core: NodeCore, perform: Callable[[Effects], None], now: Callable[[], Now]) -> None:
    """Bring what a core moves to rest before its publishers fall silent; at once for cores that move nothing.

    A core that moves an arm has `hold(now) -> Effects`, which begins the brake, and `held`, true at rest. Its timer
    goes on meanwhile, for at most HOLD_LIMIT_S.
    """
    begin = getattr(core, "hold", None)
    if begin is None:
        return
    perform(begin(now()))
    end_ns = time.monotonic_ns() + round(HOLD_LIMIT_S * 1e9)
    while not core.held and time.monotonic_ns() < end_ns:  # type: ignore[attr-defined]
        time.sleep(max(0.0, min(core.next_tick_ns, end_ns) - time.monotonic_ns()) / 1e9)
        perform(core.tick(now()))


def _yield_to_other_threads() -> None:
    """Under real-time scheduling, let this thread be preempted by those that receive and answer."""
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO):
        priority = os.sched_getparam(0).sched_priority
        os.sched_setscheduler(0, os.sched_getscheduler(0), os.sched_param(max(1, priority // 2)))
