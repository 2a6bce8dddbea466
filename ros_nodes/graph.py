"""Starts the nodes as separate processes on loopback in a domain of their own, runs episodes, stops them cleanly.

    with Graph("tabletop", policy="tabletop", out=Path("runs/demo")) as graph:
        outcomes = [graph.run_episode(seed) for seed in range(1_000_000, 1_000_020)]
    print(graph.report())

The operator of the graph is this process: it resets the simulator over /sim/reset and follows /sim/status.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from policies.parts import Names, command_line
from ros_nodes.messages import Diagnostics, Image, Message, Status, Text, decode, encode
from ros_nodes.node import (
    CONTROL,
    CONTROL_STATUS,
    DIAGNOSTICS,
    HEARTBEAT,
    RESET,
    SENSOR,
    SIM_STATUS,
    Endpoint,
)
from ros_nodes.shell import CLOCK_OFFSET_VARIABLE
from ros_nodes.wire import Participant, Publisher
from vla.embodiment import Embodiment
from vla.errors import TransportError, explain
from vla.resources import embodiment_names, load_embodiment
from vla.runtime.summary import percentiles

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 60.0  # longer than the nodes' own limit, after which they say where they hang
MAX_RESTARTS = 5
_ROOT = Path(__file__).resolve().parent.parent
_SAMPLE_S = 0.5
_PRIORITY = {"command": 30, "sim": 20, "policy": 20}  # inference itself runs at half of its process's


@dataclass(frozen=True)
class Outcome:
    """One episode. task: the family that was drawn. moved, target: names, as far as the environment tells them at the
    end. error: why the simulator refused the reset, "" if it did not."""

    episode: int
    seed: int
    instruction: str
    success: bool
    steps: int
    wall_s: float
    task: str = ""
    moved: str | None = None
    target: str | None = None
    error: str = ""


def robot_of(env: str) -> str:
    """The shipped embodiment of an environment: the one of its name, else the Panda that LIBERO and robosuite share."""
    return env if env in embodiment_names() else "libero"


def free_domain() -> int:
    """A ROS domain whose first ports nobody uses. 1..101 keeps clear of Linux's ephemeral ports."""
    numbers = list(range(1, 102))
    random.Random(os.getpid() ^ time.monotonic_ns()).shuffle(numbers)
    for number in numbers:
        first = 7400 + 250 * number
        if all(_is_free(port) for port in (first, *range(first + 10, first + 20))):
            return number
    raise TransportError(explain("ROS domain", "a free one in 1..101", "all in use", "Stop other ROS graphs."))


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Graph:
    """Simulator, policy and command node of one robot.

    env, task: of sim.environment. policy: "expert", "hold", a bundle folder or a shipped bundle's name. out: results,
    logs and statistics. parts: what a bundle is run with, by name, see policies.parts. device: where it runs.
    execute, lead: of the scheduler. domain: None for a free one. realtime: run the nodes with real-time priority
    (SCHED_RR) where the user may, for machines busy with other work. on_image(camera, stamp_ns, rgb uint8[H, W, 3]) is
    called on the receive thread with pictures of `watch` (camera names).
    restart: nodes that are started again when they die in mid-run, MAX_RESTARTS times in all, noted in `restarts`.
    """

    def __init__(
        self,
        env: str = "tabletop",
        policy: str = "expert",
        *,
        out: Path,
        task: str | None = None,
        embodiment: Embodiment | None = None,
        parts: Names | None = None,
        execute: int = 8,
        lead: int = 2,
        real_time_factor: float | None = None,
        domain: int | None = None,
        threads: int = 1,
        device: str = "cpu",
        realtime: bool = False,
        watch: tuple[str, ...] = (),
        on_image: Callable[[str, int, np.ndarray], None] | None = None,
        restart: tuple[str, ...] = (),
    ):
        self.env, self.policy, self.out = env, policy, Path(out)
        robot_name = robot_of(env)
        self.embodiment = embodiment or load_embodiment(robot_name)
        self.simulated_time = env != "tabletop" or real_time_factor not in (None, 1.0)
        self.domain = free_domain() if domain is None else domain
        self._factor, self._realtime = real_time_factor, realtime
        expert = policy == "expert"
        sim_time = ["--use-sim-time"] if self.simulated_time else []
        sim = ["--env", env, *(["--task", task] if task else []), *(["--policy", "expert"] if expert else [])]
        sim += ["--rtf", str(real_time_factor)] if real_time_factor is not None else []
        # The expert plans one action from the present state: the command node waits for it within the period.
        schedule = ["--sequential", "--execute", "1", "--slot-wait", "0.03"] if expert else []
        schedule = schedule or ["--execute", str(execute), "--lead", str(lead)]
        self._commands = {
            "sim": ["ros_nodes.sim_node", *sim],
            "command": [
                "ros_nodes.command_node",
                "--embodiment",
                robot_name,
                "--out",
                str(self.out),
                *schedule,
                *sim_time,
            ],
        }
        if not expert:
            robot = ["--embodiment", robot_name]
            options = ["--policy", policy, *robot, "--threads", str(threads), "--device", device, *sim_time]
            options += command_line(parts or {})
            self._commands["policy"] = ["ros_nodes.policy_node", *options]
        self._watch, self._on_image, self._restart = watch, on_image, restart
        self.restarts: list[tuple[float, str, int]] = []  # (monotonic seconds, node, exit code), see `restart`
        self._running = False
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._participant: Participant | None = None
        self._changed = threading.Condition()
        self._seen: dict[str, tuple[int, Message]] = {}  # topic -> (steady time, message)
        self.stop_messages: list[str] = []
        self._reports: dict[str, Status] = {}
        self._episode = -1
        self._peak_rss = 0
        self._sampler: threading.Thread | None = None
        self._stopping = threading.Event()
        self.outcomes: list[Outcome] = []

    # ---- life ----
    def __enter__(self) -> Graph:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all processes and wait until each has spoken. TransportError with its last words when one dies."""
        try:
            self._participant = Participant("vla_operator", domain=self.domain)
            for endpoint in (SIM_STATUS, HEARTBEAT, CONTROL_STATUS, DIAGNOSTICS):
                self._listen(endpoint)
            for name in self._watch:
                self._listen(Endpoint(self.embodiment.camera(name).topic, Image.type_name, SENSOR))
            self._reset = self._participant.publisher(RESET.topic, RESET.type_name, RESET.quality)
            self._control = self._participant.publisher(CONTROL.topic, CONTROL.type_name, CONTROL.quality)
            self._participant.start()
            for name in self._commands:
                self.launch(name)
            self._sampler = threading.Thread(target=self._sample_memory, daemon=True)
            self._sampler.start()
            ready = {SIM_STATUS.topic: "sim", CONTROL_STATUS.topic: "command"}
            ready[HEARTBEAT.topic] = "policy" if "policy" in self._commands else "sim"
            self._wait(lambda: all(topic in self._seen for topic in ready), START_TIMEOUT_S, "all nodes to speak")
            self._wait(lambda: self._reset.readers >= 1, START_TIMEOUT_S, "the simulator to listen")
            self._running = True
        except BaseException:
            self.stop()
            raise

    def launch(self, name: str) -> None:
        """Start one node (again). Its output goes to logs/<name>.log, its statistics to stats/<name>.json."""
        logs = self.out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        command, environment = self._process(name)
        with open(logs / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        if self._realtime and name in _PRIORITY and hasattr(os, "sched_setscheduler"):
            with contextlib.suppress(OSError):  # threads of the node inherit it, as none is running yet
                os.sched_setscheduler(self.processes[name].pid, os.SCHED_RR, os.sched_param(_PRIORITY[name]))

    def _process(self, name: str) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of a node."""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")])),
            CLOCK_OFFSET_VARIABLE: os.environ.setdefault(
                CLOCK_OFFSET_VARIABLE, str(time.time_ns() - time.monotonic_ns())
            ),
            # Several processes share the cores: a pool that spins in one of them is time taken from the others.
            **{name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
        }
        common = ["--domain", str(self.domain), "--stats", str(self.out / "stats" / f"{name}.json")]
        return [sys.executable, "-m", *self._commands[name], *common], environment

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after a while. Safe to call twice."""
        self._stopping.set()
        for name in ("policy", "command", "sim"):  # the consumer of a stream ends before its source
            process = self.processes.get(name)
            if process is None or process.poll() is not None:
                continue
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._participant is not None:
            self._participant.close()
            self._participant = None

    # ---- episodes ----
    def run_episode(self, seed: int, timeout_s: float | None = None, **options: Any) -> Outcome:
        """Reset with `seed` and `options` (task, instruction, swap, goal), wait until it ends. TransportError when a
        node dies or the episode takes far longer than it may."""
        episode = self.begin(seed, **options)
        begin = time.monotonic()
        limit = timeout_s or 600.0
        self._wait(lambda: self._is_over(episode), limit, f"episode {episode} to end")
        status = self.sim_status()
        if status.get("state") == "done":  # the trace must have the episode before the next one begins
            self._wait(lambda: self._is_recorded(episode), 5.0, f"the command node to end episode {episode}")
        outcome = Outcome(
            episode,
            seed,
            str(status.get("instruction", "")),
            bool(status.get("success", False)),
            int(status.get("steps", 0)),
            time.monotonic() - begin,
            str(status.get("family", "")),
            status.get("moved"),
            status.get("object"),
            str(status.get("error", "")),
        )
        self.outcomes.append(outcome)
        return outcome

    def begin(self, seed: int, **options: Any) -> int:
        """Reset the simulator and return at once; the number of the episode."""
        self._episode += 1
        send(self._reset, Text.of(episode=self._episode, seed=seed, **options))
        return self._episode

    def _is_over(self, episode: int) -> bool:
        status = self.sim_status()
        return status.get("episode") == episode and status.get("state") in ("done", "error")

    def _is_recorded(self, episode: int) -> bool:
        status = self.control_status()
        return status.get("episode") == episode and status.get("phase") == "idle"

    def control(self, operation: str, **values: Any) -> None:
        """Send an operation to the command node: stop, resume, save."""
        send(self._control, Text.of(op=operation, **values))

    # ---- what was heard ----
    def sim_status(self) -> dict[str, Any]:
        return self._object(SIM_STATUS.topic)

    def control_status(self) -> dict[str, Any]:
        """The command node's last word: phase, verdict, reason, counters."""
        return self._object(CONTROL_STATUS.topic)

    def heartbeat(self) -> Status | None:
        """The policy's last heartbeat."""
        message = self._seen.get(HEARTBEAT.topic, (0, None))[1]
        return message if isinstance(message, Status) else None

    def heard_ns(self, topic: str) -> int:
        """When the last message of `topic` came, on the monotonic clock; 0 for never."""
        return self._seen[topic][0] if topic in self._seen else 0

    def wait_for(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until `condition()`; TransportError when it does not come true, or a node dies."""
        self._wait(condition, timeout_s, what)

    def _object(self, topic: str) -> dict[str, Any]:
        message = self._seen.get(topic, (0, None))[1]
        return message.object() if isinstance(message, Text) else {}

    def _listen(self, endpoint: Endpoint) -> None:
        assert self._participant is not None
        cameras = {camera.topic: camera.name for camera in self.embodiment.cameras}

        def receive(data: bytes, received_ns: int) -> None:
            message = decode(endpoint.type_name, data)
            if isinstance(message, Image):
                if self._on_image is not None:
                    self._on_image(cameras[endpoint.topic], message.stamp_ns, message.rgb())
                return
            with self._changed:
                if isinstance(message, Diagnostics):
                    texts = [s.message for s in message.statuses if s.level > 0]
                    self.stop_messages += [t for t in texts if t not in self.stop_messages][:100]
                    self._reports |= {s.name: s for s in message.statuses}  # each node tells of itself only
                    message = replace(message, statuses=tuple(self._reports.values()))
                self._seen[endpoint.topic] = (received_ns, message)
                self._changed.notify_all()

        self._participant.subscribe(endpoint.topic, endpoint.type_name, endpoint.quality, receive)

    def _wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            with self._changed:
                if condition():
                    return
                self._changed.wait(0.1)
            for name, process in list(self.processes.items()):
                if process.poll() is not None:
                    if self._running and name in self._restart and len(self.restarts) < MAX_RESTARTS:
                        self.restarts.append((time.monotonic(), name, process.returncode))
                        self.launch(name)
                        continue
                    raise TransportError(
                        f"the {name} node ended with code {process.returncode} while waiting for {what}: "
                        + self._last_words(name)
                    )
            if time.monotonic() > deadline:
                raise TransportError(
                    explain("graph", f"{what} within {timeout_s:g} s", "nothing", f"See {self.out / 'logs'}.")
                )

    def _last_words(self, name: str) -> str:
        try:
            lines = (self.out / "logs" / f"{name}.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "no output"

    def _sample_memory(self) -> None:
        while not self._stopping.wait(_SAMPLE_S):
            total = psutil.Process().memory_info().rss
            for process in self.processes.values():
                try:
                    total += psutil.Process(process.pid).memory_info().rss
                except psutil.Error:
                    continue
            self._peak_rss = max(self._peak_rss, total)

    # ---- results, after stop() ----
    def report(self) -> dict[str, Any]:
        """Measures of the run: see the keys. Only after `stop()`, when the nodes have written theirs.

        dropped_messages: what DDS or a full inbox is known to have lost. delivered: {"topic -> node": [received,
        sent]}; the second also counts what was sent before that node had joined, or after it had left.
        """
        stats = {name: _read(self.out / "stats" / f"{name}.json") for name in self._commands}
        control = _read(self.out / "control.json")
        policy = stats.get("policy", {}).get("summary", {})
        inference = policy.get("inference_ms", [])
        lost = {name: _total(s, "lost") + _total(s, "overrun") + _total(s, "failed") for name, s in stats.items()}
        messages = {name: _total(s, "sent") + _total(s, "received") for name, s in stats.items()}
        return {
            **control,
            "inference_ms": percentiles(inference) if inference else control.get("inference_ms"),
            "transport_ms": percentiles(self.transport_ms(), (50, 95)),
            "transit_ms": {
                f"{topic} -> {name}": percentiles(values)
                for name, s in stats.items()
                for topic, values in s.get("transit_ms", {}).items()
                if values
            },
            "dropped_messages": sum(lost.values()),
            "messages": sum(messages.values()),
            "delivered": {
                f"{topic} -> {name}": [count, sum(other.get("sent", {}).get(topic, 0) for other in stats.values())]
                for name, s in stats.items()
                for topic, count in s.get("received", {}).items()
                if any(topic in other.get("sent", {}) for other in stats.values())
            },
            "cpu_s": {name: round(s.get("cpu_s", 0.0), 2) for name, s in stats.items()},
            "peak_rss_mb": round(self._peak_rss / 2**20, 1),
            "rtf": stats["sim"].get("summary", {}).get("rtf"),
        }

    def transport_ms(self) -> list[float]:
        """What the transport adds from image to command: image, chunk and command transit, one sum per chunk."""
        hops = [
            self._transits("policy" if "policy" in self._commands else "sim", self.embodiment.cameras[0].topic),
            self._transits("command", "/vla/chunk"),
            self._transits("sim", self.embodiment.command_topic),
        ]
        hops = [hop for hop in hops if hop]
        if not hops:
            return []
        count = min(max(len(hop) for hop in hops), 4000)
        generator = random.Random(0)  # hops are independent of each other: pair them at random, repeatably
        return [sum(generator.choice(hop) for hop in hops) for _ in range(count)]

    def _transits(self, node: str, topic: str) -> list[float]:
        values: list[float] = _read(self.out / "stats" / f"{node}.json").get("transit_ms", {}).get(topic, [])
        return values


def send(publisher: Publisher, message: Message) -> None:
    publisher.publish(encode(message))


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        return data
    except (OSError, ValueError):
        return {}


def _total(stats: dict[str, Any], key: str) -> int:
    return sum(stats.get(key, {}).values())
