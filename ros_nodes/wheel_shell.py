"""Runs a node core on the DDS wheel: receive thread, core thread (the caller's), worker thread.

The receive thread only stores bytes, stamped; each topic keeps its newest `depth` messages, so a slow core sees fresh
data instead of a backlog. The core thread decodes, calls the core and publishes. SIGINT and SIGTERM end the loop
cleanly: the core says its last words, the statistics file is written, the node leaves the graph.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

from ros_nodes.messages import DISTROS, Clock, Raw, encode
from ros_nodes.names import Names, spoken
from ros_nodes.node import CLOCK, Effects, Job, NodeCore, Send
from ros_nodes.shell import EXIT_LIMIT_S, JOB_END_S, SWITCH_INTERVAL_S, GraphClock, Worker, hold, read, settle
from ros_nodes.wire import Participant, Publisher, Subscription
from vla.errors import ConfigError, TransportError, explain
from vla.files import write_text

_WAKE, _RESULT = object(), object()
_IDLE_NS = 200_000_000


class WheelShell:
    """One core in one participant. `run()` returns after SIGINT, SIGTERM or `stop()`.

    names: of the node and its topics in the graph. The core, and what is counted here, know only its own.
    """

    def __init__(
        self,
        core: NodeCore,
        domain: int | None = None,
        network: str = "loopback",
        distro: str = "jazzy",
        use_sim_time: bool = False,
        stats_path: Path | None = None,
        names: Names | None = None,
    ):
        if actions := [name for name, _ in getattr(core, "actions", ())]:
            remedy = "Actions need rclpy; without it use kind: trajectory on the controller's topic."
            raise ConfigError(explain(f"outputs of {core.name}", "topics", f"actions {actions}", remedy))
        self.core, self.clock, self._distro, self._stats_path = core, GraphClock(use_sim_time), distro, stats_path
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._worker = Worker(core.name, lambda name, value: self._inbox.put((_RESULT, name, value)))
        self._boxes: dict[str, deque[tuple[bytes, int]]] = {}
        self._types: dict[str, str] = {}
        self._raw: set[str] = set()  # topics whose messages are handed on as bytes
        self.counts: dict[str, dict[str, int]] = {"overrun": {}, "rejected": {}, "failed": {}}
        self._stopping = False
        self.job_stuck = False  # a job did not end in time; its thread lives on
        self.bounded_exit = False
        names = names or Names()
        own = names.node or core.name
        core.name = spoken(names.full(own))
        self._participant = Participant(own, names.full(), domain, network, distro)
        self._publishers: dict[str, Publisher] = {
            e.topic: self._participant.publisher(names(e.topic), e.type_name, e.quality) for e in core.publications
        }
        self._subscriptions: dict[str, Subscription] = {}
        self._unheard = dict.fromkeys(getattr(core, "must_be_heard", ()), False)  # by topic: nobody listens
        endpoints = list(core.subscriptions)
        if use_sim_time and CLOCK.topic not in {e.topic for e in endpoints}:
            endpoints.append(CLOCK)
        for e in endpoints:
            self._boxes[e.topic] = deque(maxlen=e.quality.depth)
            self._types[e.topic] = e.type_name
            if e.raw:
                self._raw.add(e.topic)
            receive = self._receiver(e.topic)
            subscription = self._participant.subscribe(names(e.topic), e.type_name, e.quality, receive)
            self._subscriptions[e.topic] = subscription

    def stop(self) -> None:
        """Ask the loop to end; callable from any thread and from a signal handler."""
        self._stopping = True
        self._inbox.put(_WAKE)

    def run(self) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)
        settle(self.core)
        self._worker.start()
        self._participant.start()
        try:
            while not self._stopping:
                self._step()
            hold(self.core, self._perform, self.clock.now)
        finally:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGINT, signal.SIGTERM):  # a second signal ends even a close that hangs
                    signal.signal(number, signal.SIG_DFL)
            # The worker first: it may be using what the core is about to close, and a thread that still computes while
            # the interpreter goes down can hang or crash it.
            self.job_stuck = self._worker.end(JOB_END_S)
            try:
                self._perform(self.core.close(self.clock.now()))
            finally:
                self._write_stats()
                self._participant.close()

    # ---- core thread ----
    def _step(self) -> None:
        wait_ns = min(self.core.next_tick_ns - time.monotonic_ns(), _IDLE_NS)
        try:
            item = self._inbox.get(timeout=wait_ns / 1e9) if wait_ns > 0 else self._inbox.get_nowait()
        except queue.Empty:
            item = _WAKE
        if isinstance(item, str):
            self._deliver(item)
        elif isinstance(item, tuple):
            _, name, value = item
            self._perform(self.core.on_result(name, value, self.clock.now()))
        # Checked after every message: a flood on one topic cannot starve the timer.
        if time.monotonic_ns() >= self.core.next_tick_ns:
            self._perform(self.core.tick(self.clock.now()))

    def _deliver(self, topic: str) -> None:
        try:
            data, received_ns = self._boxes[topic].popleft()
        except IndexError:  # overwritten by a newer message, which has its own turn
            return
        if topic in self._raw:
            raw = Raw(self._types[topic], data)
            self._perform(self.core.on_message(topic, raw, self.clock.now(received_ns)))
            return
        try:
            message = read(self._types[topic], data, self._distro)
        except TransportError as error:
            self._count("rejected", topic)
            self._perform(self.core.on_reject(topic, str(error), self.clock.now(received_ns)))
            return
        if topic == CLOCK.topic and self.clock.simulated and isinstance(message, Clock):
            self.clock.follow(message.stamp_ns)
            if all(e.topic != topic for e in self.core.subscriptions):
                return
        self._perform(self.core.on_message(topic, message, self.clock.now(received_ns)))

    def _perform(self, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                try:
                    self._publishers[effect.topic].publish(encode(effect.message, self._distro))
                except TransportError:
                    self._count("failed", effect.topic)
                if effect.topic in self._unheard:
                    self._look_for_readers(effect.topic)
            elif isinstance(effect, Job):  # there are no action clients here: a core with goals is not started
                self._worker.put(effect)

    def _look_for_readers(self, topic: str) -> None:
        """Tell the core when they are gone, and with an empty reason when they are back, as of an action's server."""
        publisher = self._publishers[topic]
        unheard = not publisher.readers
        if unheard != self._unheard[topic]:
            self._unheard[topic] = unheard
            reason = f"{publisher.topic}: nobody listens; start the relay of docs/ros2.md" if unheard else ""
            self._perform(self.core.on_reject(topic, reason, self.clock.now()))

    # ---- other threads ----
    def _receiver(self, topic: str) -> Any:
        box = self._boxes[topic]

        def receive(data: bytes, received_ns: int) -> None:
            if len(box) == box.maxlen:
                self._count("overrun", topic)
            box.append((data, received_ns))
            self._inbox.put(topic)

        return receive

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.bounded_exit:
            faulthandler.dump_traceback_later(EXIT_LIMIT_S, exit=True)
        self.stop()

    # ---- statistics ----
    def _count(self, kind: str, topic: str) -> None:
        self.counts[kind][topic] = self.counts[kind].get(topic, 0) + 1

    def stats(self) -> dict[str, Any]:
        """Messages per topic: sent, received, lost by DDS, overrun here, rejected; transit times, CPU time, memory."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "node": self.core.name,
            "sent": {topic: p.sent for topic, p in self._publishers.items()},
            "received": {topic: s.received for topic, s in self._subscriptions.items()},
            "lost": {topic: s.lost for topic, s in self._subscriptions.items()},
            "transit_ms": {
                topic: [round(t / 1e6, 3) for t in s.transit_ns] for topic, s in self._subscriptions.items()
            },
            **self.counts,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_rss_mb": usage.ru_maxrss / 1024,
            "summary": self.core.summary(),
        }

    def _write_stats(self) -> None:
        if self._stats_path is None:
            return
        write_text(self._stats_path, json.dumps(self.stats(), indent=1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options every node has."""
    group = parser.add_argument_group("ROS 2 graph")
    group.add_argument("--domain", type=int, help="ROS domain (default: ROS_DOMAIN_ID, else 0)")
    group.add_argument(
        "--network",
        default="loopback",
        help="loopback (default): this machine only; auto: as CYCLONEDDS_URI or the DDS default says; or an interface",
    )
    group.add_argument("--distro", choices=DISTROS, default="jazzy", help="ROS 2 distribution of the peers")
    group.add_argument("--use-sim-time", action="store_true", help="follow /clock instead of the wall clock")
    Names.add_arguments(group)
    group.add_argument("--stats", type=Path, metavar="FILE", help="write message counts and timings here at the end")


def run(core: NodeCore, options: argparse.Namespace) -> None:
    """Run `core` with the options of `add_arguments` until SIGINT or SIGTERM; the process's last act.

    A job that hangs, or an end that takes longer than EXIT_LIMIT_S, ends the process with code 1. ConfigError for a
    core with goals for action servers.
    """
    names = Names.of(options.namespace, options.remap)
    shell = WheelShell(
        core, options.domain, options.network, options.distro, options.use_sim_time, options.stats, names
    )
    shell.bounded_exit = True
    shell.run()
    if shell.job_stuck:
        print(f"error: {core.name}: a job went on for {JOB_END_S:g} s after the end was asked for", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
