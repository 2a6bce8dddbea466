"""The nodes under load: share of command periods that hold, what is lost, how memory grows.

    python benchmarks/ros_load.py --seconds 600 [--realtime] [--json load.json]

Two 640x480 rgb8 cameras at 30 Hz from one process, joint states at 500 Hz from another, which is the arm; the policy
node and the command node as they are, in theirs, over DDS on loopback; commands at 100 Hz. A period is the time between
two commands where the arm gets them. Memory is resident memory, its growth that from the end of the warm-up (a fifth of
the run, at most two minutes) to the end. Lost is what was sent, by the sender's count, and not received.

What the machine itself does to a period is measured beside it: its steal time, which another machine took, and its
pauses, in which a process of high real-time priority, one on each core, did not wake from a sleep of 2 ms for PAUSE_MS.
Periods that no pause touches are counted once more by themselves. --realtime gives the command node and the arm the
real-time priority that drivers of ros2_control have, where the user may.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ros_nodes.graph import free_domain
from ros_nodes.messages import Image, JointState, Text, Values, decode, encode
from ros_nodes.node import CONTROL, INSTRUCTION, JOINT_STATES, SENSOR, STATE, Endpoint
from ros_nodes.shell import CLOCK_OFFSET_VARIABLE, GraphClock, settle
from ros_nodes.wire import Participant
from vla.embodiment import Embodiment
from vla.resources import config_dir, load_embodiment

ROOT = Path(__file__).resolve().parents[1]
CAMERA_HZ, JOINT_HZ, COMMAND_HZ = 30, 500, 100
GOALS = {"periods_held": 0.9999, "growth_percent": 1.0, "lost": 0}
START_S, DRAIN_S, SAMPLE_S = 120.0, 1.0, 1.0
PAUSE_MS, WITNESS_PRIORITY = 5.0, 90
PRIORITY = {"arm": 40, "command": 30}  # a driver before what commands it


# ---- accounting ----
def periods(received_ns: Sequence[int], bound_ms: float, pauses: Sequence[Sequence[int]] = ()) -> dict[str, float]:
    """Of the times, steady nanoseconds, at which commands came. held: share of periods under `bound_ms`.

    pauses: (begin, end) in steady nanoseconds; periods in which one lies, or begins or ends, are left out.
    """
    times = np.asarray(received_ns, np.int64)
    untouched = np.ones(max(0, len(times) - 1), bool)
    for begin, end in pauses:
        untouched &= (times[1:] < begin) | (times[:-1] > end)
    gaps = np.diff(times)[untouched] / 1e6
    if not len(gaps):
        return {"count": 0, "held": 0.0, "p50_ms": 0.0, "p99_ms": 0.0, "max_ms": 0.0}
    p50, p99 = np.percentile(gaps, [50, 99])
    held = float(np.mean(np.less(gaps, bound_ms)))
    return {"count": len(gaps), "held": held, "p50_ms": float(p50), "p99_ms": float(p99), "max_ms": float(gaps.max())}


def growth(samples: Sequence[tuple[float, float]], warm_s: float) -> dict[str, float]:
    """samples: (seconds since the start, bytes). From the median of the tenth of them that follows the warm-up to that
    of the last tenth, so that one sample decides nothing."""
    values = np.array([size for at, size in samples if at >= warm_s] or [size for _, size in samples] or [0.0])
    share = max(1, len(values) // 10)
    warm, end = float(np.median(values[:share])), float(np.median(values[-share:]))
    percent = 100.0 * (end - warm) / warm if warm else 0.0
    return {"warm_mb": warm / 2**20, "end_mb": end / 2**20, "growth_percent": percent}


def losses(sent: Mapping[str, int], received: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """{"topic -> node": messages sent on the topic that this node did not get}. received: node -> topic -> count."""
    return {
        f"{topic} -> {node}": sent[topic] - count
        for node, counts in received.items()
        for topic, count in counts.items()
        if topic in sent
    }


def cpu_times() -> tuple[int, int]:
    """(steal, all) of /proc/stat, in clock ticks over all cores."""
    values = [int(value) for value in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return values[7], sum(values)


# ---- the robot's processes ----
def ticks(seconds: float, hz: float) -> Iterator[tuple[int, float]]:
    """(number, seconds that it is late), each when it is due."""
    begin = time.monotonic()
    for number in range(round(seconds * hz)):
        wait = begin + number / hz - time.monotonic()
        time.sleep(max(0.0, wait))
        yield number, max(0.0, -wait)


def wait_for(ready: Callable[[], bool]) -> None:
    """Whoever comes late would count as having lost what was sent before."""
    deadline = time.monotonic() + START_S
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit("the nodes did not come up")
        time.sleep(0.05)


def told(word: str) -> None:
    """Says that this process is ready, and waits for `word`."""
    settle()
    print("ready", flush=True)
    if sys.stdin.readline().strip() != word:
        raise SystemExit(1)


def run_cameras(robot: Embodiment, domain: int, seconds: float) -> dict[str, Any]:
    clock, late_s = GraphClock(), 0.0
    with Participant("cameras", domain=domain) as participant:
        ends = [Endpoint(camera.topic, Image.type_name, SENSOR) for camera in robot.cameras]
        cameras = [participant.publisher(e.topic, e.type_name, e.quality) for e in ends]
        participant.start()
        wait_for(lambda: all(camera.readers for camera in cameras))
        told("begin")
        pictures = [np.zeros((camera.height, camera.width, 3), np.uint8) for camera in robot.cameras]
        for number, late in ticks(seconds, CAMERA_HZ):
            late_s = max(late_s, late)
            for publisher, camera, pixels in zip(cameras, robot.cameras, pictures):
                pixels[::8] = number % 256
                publisher.publish(encode(Image(clock.now().stamp_ns, camera.name, "rgb8", pixels)))
        time.sleep(DRAIN_S)
        return {"sent": {camera.topic: camera.sent for camera in cameras}, "late_ms": 1e3 * late_s}


def run_arm(robot: Embodiment, domain: int, seconds: float) -> dict[str, Any]:
    clock, received_ns, late_s = GraphClock(), list[int](), 0.0
    positions = np.array(robot.home)

    def take(data: bytes, at_ns: int) -> None:
        nonlocal positions
        message = decode(Values.type_name, data)
        assert isinstance(message, Values)
        positions = message.data
        received_ns.append(at_ns)

    with Participant("arm", domain=domain) as participant:
        commands = participant.subscribe(robot.command_topic, Values.type_name, STATE, take)
        joints = participant.publisher(JOINT_STATES.topic, JOINT_STATES.type_name, STATE)
        words = participant.publisher(INSTRUCTION.topic, INSTRUCTION.type_name, INSTRUCTION.quality)
        control = participant.publisher(CONTROL.topic, CONTROL.type_name, CONTROL.quality)
        participant.start()
        wait_for(lambda: bool(joints.readers >= 2 and control.readers and words.readers and commands.writers))
        told("begin")
        words.publish(encode(Text("hold")))
        for number, late in ticks(seconds, JOINT_HZ):
            late_s = max(late_s, late)
            state = JointState(clock.now().stamp_ns, robot.command_names, positions, np.zeros(len(positions)))
            joints.publish(encode(state))
            if number == JOINT_HZ // 2:
                control.publish(encode(Text.of(op="go", episode=0, seed=0)))
        control.publish(encode(Text.of(op="done")))
        time.sleep(DRAIN_S)
        return {"sent": {joints.topic: joints.sent}, "late_ms": 1e3 * late_s, "received_ns": received_ns}


def run_witness(core: int, seconds: float) -> dict[str, Any]:
    """pauses: of this core, (begin, end) in steady nanoseconds; None where the user may not have real-time priority."""
    try:
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(WITNESS_PRIORITY))
    except OSError:
        return {"pauses": None}
    told("begin")
    pauses, last_ns = [], time.monotonic_ns()
    end_ns = last_ns + round((seconds + DRAIN_S) * 1e9)
    while last_ns < end_ns:
        time.sleep(0.002)
        now_ns = time.monotonic_ns()
        if now_ns - last_ns > PAUSE_MS * 1e6:
            pauses.append((last_ns, now_ns))
        last_ns = now_ns
    return {"pauses": pauses}


# ---- the whole ----
def robot_and_policy(policy: str, robot: str, folder: Path) -> tuple[str, str, list[str]]:
    """(embodiment, policy, options of the command node). hold: the Panda, commanded by positions at COMMAND_HZ."""
    if policy != "hold":
        return robot, policy, []
    data = yaml.safe_load((config_dir() / "embodiment" / "panda.yaml").read_text(encoding="utf-8"))
    data |= {"rate_hz": COMMAND_HZ, "outputs": [], "command_topic": "/arm_controller/commands"}
    (folder / "robot.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    np.save(folder / "hold.npy", np.tile(np.float32(data["home"]), (1, 64, 1)))
    # Cameras at 30 Hz are a third of the control rate: a chunk has to outlast the wait for a picture.
    return str(folder / "robot.yaml"), str(folder / "hold.npy"), ["--execute", "32", "--lead", "8"]


def start(words: Sequence[str], environment: Mapping[str, str], priority: int = 0) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, *words], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if priority:  # threads of the process inherit it, as none is running yet
        os.sched_setscheduler(process.pid, os.SCHED_RR, os.sched_param(priority))
    return process


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(process.communicate()[0].splitlines()[-1])
    return found


def measure(policy: str, robot_name: str, seconds: float, folder: Path, realtime: bool) -> dict[str, Any]:
    """See the keys, and GOALS."""
    name, policy, schedule = robot_and_policy(policy, robot_name, folder)
    robot, domain = load_embodiment(name), str(free_domain())
    offset = str(time.time_ns() - time.monotonic_ns())
    environment = {**os.environ, CLOCK_OFFSET_VARIABLE: offset, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    own = [str(Path(__file__).resolve()), "--robot", name, "--seconds", str(seconds), "--domain", domain, "--role"]
    cores = sorted(os.sched_getaffinity(0))
    words = {
        "policy": ["-m", "ros_nodes.policy_node", "--policy", policy, "--embodiment", name],
        "command": ["-m", "ros_nodes.command_node", "--embodiment", name, *schedule],
    }
    nodes = {node: [*w, "--domain", domain, "--stats", str(folder / f"{node}.json")] for node, w in words.items()}
    robots = {"cameras": [*own, "cameras"], "arm": [*own, "arm"]}
    witnesses = {f"witness {core}": [*own, "witness", "--core", str(core)] for core in cores}
    processes: dict[str, subprocess.Popen[str]] = {}
    samples: dict[str, list[tuple[float, float]]] = {node: [] for node in nodes}
    try:
        for role, command in (nodes | robots | witnesses).items():
            processes[role] = start(command, environment, PRIORITY.get(role, 0) if realtime else 0)
        for role in robots | witnesses:
            line = (processes[role].stdout or sys.stdin).readline().strip()
            if role in robots and line != "ready":
                raise SystemExit(f"{role}: did not come up")
            if role in witnesses and line != "ready":
                witnesses.pop(role)
        for role in (*robots, *witnesses):
            print("begin", file=processes[role].stdin, flush=True)
        began, before = time.monotonic(), cpu_times()
        while processes["arm"].poll() is None and time.monotonic() < began + seconds:
            for node in nodes:
                samples[node].append((time.monotonic() - began, psutil.Process(processes[node].pid).memory_info().rss))
            time.sleep(SAMPLE_S)
        steal, total = (after - first for after, first in zip(cpu_times(), before))
        load = os.getloadavg()
        cameras, arm = (answer(processes[role]) for role in robots)
        pauses = [pause for role in witnesses for pause in answer(processes[role])["pauses"]]
        for node in nodes:
            processes[node].send_signal(signal.SIGINT)
            processes[node].wait(60)
    finally:
        for process in processes.values():
            process.kill()
    stats = {node: json.loads((folder / f"{node}.json").read_text()) for node in nodes}
    received = {
        node: {topic: count - s["overrun"].get(topic, 0) for topic, count in s["received"].items()}
        for node, s in stats.items()
    }
    sensors = cameras["sent"] | arm["sent"]
    sent, arrived = stats["command"]["sent"][robot.command_topic], arm["received_ns"]
    lost = losses(sensors, received) | losses({robot.command_topic: sent}, {"arm": {robot.command_topic: len(arrived)}})
    warm_s, bound_ms = min(120.0, seconds / 5), 2e3 / robot.rate_hz
    longest = [1e-6 * (end - begin) for begin, end in pauses]
    return {
        "seconds": seconds,
        "realtime": realtime,
        "cameras": [f"{camera.width}x{camera.height}" for camera in robot.cameras],
        "bound_ms": bound_ms,
        "periods": periods(arrived, bound_ms),
        "pauses": {"count": len(pauses), "max_ms": max(longest, default=0.0)} if witnesses else None,
        "untouched_periods": periods(arrived, bound_ms, pauses) if witnesses else None,
        "long_periods": [
            {"at_s": 1e-9 * (end - arrived[0]), "ms": 1e-6 * (end - begin)}
            for begin, end in pairwise(arrived)
            if end - begin > 1e6 * bound_ms
        ],
        "commands": sent,
        "sensors": sensors,
        "sender_late_ms": {"cameras": cameras["late_ms"], "arm": arm["late_ms"]},
        "lost": lost,
        "memory": {node: growth(values, warm_s) for node, values in samples.items()},
        "steal_percent": 100.0 * steal / max(1, total),
        "load": load,
        "cpu_s": {node: s["cpu_s"] for node, s in stats.items()},
        "goals": GOALS,
    }


def report(result: Mapping[str, Any]) -> str:
    lost = result["lost"]
    lines = [
        f"{result['seconds']:g} s, cameras {' '.join(result['cameras'])}, {result['commands']} commands"
        + (", command node and arm at real-time priority" if result["realtime"] else ""),
        f"{'measure':<66} {'goal':>8} {'measured':>21}",
    ]

    def row(label: str, measured: str, goal: str = "") -> None:
        lines.append(f"{label:<66} {goal:>8} {measured:>21}")

    held = f"{GOALS['periods_held']:.2%}"
    for key, which in (
        ("periods", "command periods"),
        ("untouched_periods", "those that no pause of the machine touches"),
    ):
        if p := result[key]:
            row(f"{which}: {p['count']}, under {result['bound_ms']:g} ms", f"{p['held']:.4%}", held)
            row(f"{which}, p50 / p99 / max, ms", f"{p['p50_ms']:.2f} / {p['p99_ms']:.2f} / {p['max_ms']:.2f}")
    if pauses := result["pauses"]:
        row(
            f"pauses of the machine of {PAUSE_MS:g} ms or more; the longest, ms",
            f"{pauses['count']}; {pauses['max_ms']:.0f}",
        )
    for node, memory in result["memory"].items():
        label = f"memory of {node}, {memory['warm_mb']:.1f} to {memory['end_mb']:.1f} MB, growth"
        row(label, f"{memory['growth_percent']:.2f} %", f"< {GOALS['growth_percent']:g} %")
    for route, count in sorted(lost.items(), key=lambda item: "arm" not in item[0].split()):
        row("lost, " + route, str(count), "0" if route.endswith(" arm") else "")
    late = ", ".join(f"{role} by {ms:.0f} ms" for role, ms in result["sender_late_ms"].items())
    cpu = ", ".join(f"{node} {100 * s / result['seconds']:.0f} %" for node, s in result["cpu_s"].items())
    load = " ".join(f"{x:.2f}" for x in result["load"])
    lines.append(f"steal {result['steal_percent']:.2f} %, load {load}, sensors late at most: {late}")
    lines.append(f"of one core: {cpu}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="of traffic (default: 600)")
    parser.add_argument("--policy", default="hold", help="hold (default), or a bundle, with its own rate and cameras")
    parser.add_argument("--robot", default="tabletop", help="what the bundle was made for (default: tabletop)")
    parser.add_argument("--realtime", action="store_true", help="real-time priority for the command node and the arm")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    parser.add_argument("--role", choices=("cameras", "arm", "witness"), help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--domain", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "witness":
        print(json.dumps(run_witness(options.core, options.seconds)), flush=True)
        return
    if options.role:
        run = run_cameras if options.role == "cameras" else run_arm
        print(json.dumps(run(load_embodiment(options.robot), options.domain, options.seconds)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.policy, options.robot, options.seconds, Path(folder), options.realtime)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
