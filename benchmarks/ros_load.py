"""The nodes under load: share of command periods that hold, what is lost, how memory grows.

    python benchmarks/ros_load.py --seconds 600 [--json load.json]

Two 640x480 rgb8 cameras at 30 Hz and joint states at 500 Hz, sent by a process of their own that is also the arm; the
policy node and the command node as they are, in theirs, over DDS on loopback; commands at 100 Hz. A period is the time
between two commands where the arm gets them. Memory is resident memory, its growth that from the end of the warm-up (a
fifth of the run, at most two minutes) to the end. Lost is what was sent, by the sender's count, and not received. The
machine's steal time tells how much of it another machine took meanwhile.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ros_nodes.graph import free_domain
from ros_nodes.messages import Image, JointState, Text, Values, decode, encode
from ros_nodes.node import CONTROL, INSTRUCTION, JOINT_STATES, SENSOR, STATE, Endpoint
from ros_nodes.shell import CLOCK_OFFSET_VARIABLE, GraphClock
from ros_nodes.wire import Participant
from vla.embodiment import Embodiment
from vla.resources import config_dir, load_embodiment

ROOT = Path(__file__).resolve().parents[1]
CAMERA_HZ, JOINT_HZ, COMMAND_HZ = 30, 500, 100
GOALS = {"periods_held": 0.9999, "growth_percent": 1.0, "lost": 0}
START_S, DRAIN_S, SAMPLE_S = 120.0, 1.0, 1.0


# ---- accounting ----
def periods(received_ns: Sequence[int], bound_ms: float) -> dict[str, float]:
    """Of the times, steady nanoseconds, at which commands came. held: share of periods under `bound_ms`."""
    gaps = np.diff(np.asarray(received_ns, np.int64)) / 1e6
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


# ---- the robot's process ----
def run_robot(robot: Embodiment, domain: int, seconds: float) -> None:
    """Publishes the sensors and takes the commands; prints its counts as JSON."""
    clock, received_ns = GraphClock(), list[int]()
    positions = np.array(robot.home)

    def take(data: bytes, at_ns: int) -> None:
        nonlocal positions
        message = decode(Values.type_name, data)
        assert isinstance(message, Values)
        positions = message.data
        received_ns.append(at_ns)

    with Participant("robot", domain=domain) as participant:
        commands = participant.subscribe(robot.command_topic, Values.type_name, STATE, take)
        ends = [Endpoint(camera.topic, Image.type_name, SENSOR) for camera in robot.cameras]
        cameras = [participant.publisher(e.topic, e.type_name, e.quality) for e in ends]
        joints = participant.publisher(JOINT_STATES.topic, JOINT_STATES.type_name, STATE)
        words = participant.publisher(INSTRUCTION.topic, INSTRUCTION.type_name, INSTRUCTION.quality)
        control = participant.publisher(CONTROL.topic, CONTROL.type_name, CONTROL.quality)
        participant.start()
        deadline = time.monotonic() + START_S
        # Whoever comes late would count as having lost what was sent before.
        while not (all(c.readers for c in cameras) and joints.readers >= 2 and control.readers and commands.writers):
            if time.monotonic() > deadline:
                raise SystemExit("the nodes did not come up")
            time.sleep(0.05)
        words.publish(encode(Text("hold")))
        print("begin", flush=True)
        pictures = [np.zeros((camera.height, camera.width, 3), np.uint8) for camera in robot.cameras]
        begin, late_s = time.monotonic(), 0.0
        for number in range(round(seconds * JOINT_HZ)):
            wait = begin + number / JOINT_HZ - time.monotonic()
            late_s = max(late_s, -wait)
            time.sleep(max(0.0, wait))
            stamp_ns = clock.now().stamp_ns
            joints.publish(encode(JointState(stamp_ns, robot.command_names, positions, np.zeros(len(positions)))))
            if number * CAMERA_HZ // JOINT_HZ != (number - 1) * CAMERA_HZ // JOINT_HZ:
                for publisher, camera, pixels in zip(cameras, robot.cameras, pictures):
                    pixels[::8] = number % 256
                    publisher.publish(encode(Image(stamp_ns, camera.name, "rgb8", pixels)))
            if number == JOINT_HZ // 2:
                control.publish(encode(Text.of(op="go", episode=0, seed=0)))
        control.publish(encode(Text.of(op="done")))
        time.sleep(DRAIN_S)
        sent = {p.topic: p.sent for p in participant.publishers if p in (*cameras, joints)}
        print(json.dumps({"sent": sent, "received_ns": received_ns, "late_ms": 1e3 * late_s}), flush=True)


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


def measure(policy: str, robot_name: str, seconds: float, folder: Path) -> dict[str, Any]:
    """See the keys, and GOALS."""
    name, policy, schedule = robot_and_policy(policy, robot_name, folder)
    robot, domain = load_embodiment(name), str(free_domain())
    offset = str(time.time_ns() - time.monotonic_ns())
    environment = {**os.environ, CLOCK_OFFSET_VARIABLE: offset, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    nodes = {
        "policy": ["ros_nodes.policy_node", "--policy", policy, "--embodiment", name],
        "command": ["ros_nodes.command_node", "--embodiment", name, *schedule],
    }
    own = [sys.executable, str(Path(__file__).resolve()), "--role", "robot", "--robot", name, "--seconds", str(seconds)]
    processes: dict[str, subprocess.Popen[str]] = {}
    samples: dict[str, list[tuple[float, float]]] = {node: [] for node in nodes}
    try:
        for node, words in nodes.items():
            command = [sys.executable, "-m", *words, "--domain", domain, "--stats", str(folder / f"{node}.json")]
            processes[node] = subprocess.Popen(command, env=environment, text=True)
        arm = subprocess.Popen([*own, "--domain", domain], env=environment, stdout=subprocess.PIPE, text=True)
        processes["robot"] = arm
        assert arm.stdout is not None
        if arm.stdout.readline().strip() != "begin":
            raise SystemExit("the nodes did not come up")
        began, before = time.monotonic(), cpu_times()
        while arm.poll() is None and time.monotonic() < began + seconds:
            for node in nodes:
                samples[node].append((time.monotonic() - began, psutil.Process(processes[node].pid).memory_info().rss))
            time.sleep(SAMPLE_S)
        steal, total = (after - first for after, first in zip(cpu_times(), before))
        load = os.getloadavg()
        facts = json.loads(arm.communicate()[0])
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
    lost = losses(facts["sent"], received)
    sent = stats["command"]["sent"][robot.command_topic]
    lost |= losses({robot.command_topic: sent}, {"robot": {robot.command_topic: len(facts["received_ns"])}})
    warm_s = min(120.0, seconds / 5)
    return {
        "seconds": seconds,
        "cameras": [f"{camera.width}x{camera.height}" for camera in robot.cameras],
        "bound_ms": 2e3 / robot.rate_hz,
        "periods": periods(facts["received_ns"], 2e3 / robot.rate_hz),
        "commands": sent,
        "sensors": facts["sent"],
        "sender_late_ms": facts["late_ms"],
        "lost": lost,
        "memory": {node: growth(values, warm_s) for node, values in samples.items()},
        "steal_percent": 100.0 * steal / max(1, total),
        "load": load,
        "cpu_s": {node: s["cpu_s"] for node, s in stats.items()},
        "goals": GOALS,
    }


def report(result: Mapping[str, Any]) -> str:
    p, lost = result["periods"], result["lost"]
    times = f"{p['p50_ms']:.2f} / {p['p99_ms']:.2f} / {p['max_ms']:.2f}"
    held = f"command periods under {result['bound_ms']:g} ms"
    lines = [
        f"{result['seconds']:g} s, cameras {' '.join(result['cameras'])}, {result['commands']} commands",
        f"{'measure':<60} {'goal':>8} {'measured':>12}",
        f"{held:<60} {GOALS['periods_held']:>8.2%} {p['held']:>12.4%}",
        f"{'command period p50 / p99 / max, ms':<60} {'':>8} {times:>12}",
    ]
    for node, memory in result["memory"].items():
        label = f"memory of {node}, {memory['warm_mb']:.1f} to {memory['end_mb']:.1f} MB, growth"
        lines.append(f"{label:<60} {'< 1 %':>8} {memory['growth_percent']:>10.2f} %")
    for route, count in sorted(lost.items(), key=lambda item: "robot" not in item[0]):
        goal = "0" if route.endswith("robot") else ""
        lines.append(f"{'lost, ' + route:<60} {goal:>8} {count:>12}")
    lines.append(f"steal {result['steal_percent']:.2f} %, load {' '.join(f'{x:.2f}' for x in result['load'])}, ")
    lines[-1] += f"sensors sent late by at most {result['sender_late_ms']:.0f} ms"
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="of traffic (default: 600)")
    parser.add_argument("--policy", default="hold", help="hold (default), or a bundle, with its own rate and cameras")
    parser.add_argument("--robot", default="tabletop", help="what the bundle was made for (default: tabletop)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    parser.add_argument("--role", choices=("robot",), help=argparse.SUPPRESS)
    parser.add_argument("--domain", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        run_robot(load_embodiment(options.robot), options.domain, options.seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.policy, options.robot, options.seconds, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
