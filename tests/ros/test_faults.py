"""Processes that are killed, frozen or slowed, in both shells: the arm brakes, the report says why, and it goes on.

Floods and bytes that are no message are in test_garbage_floods.py, wrong messages in test_fault_messages.py.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shells import DEMOS, SHELLS, beside

from ros_nodes import messages as m
from ros_nodes.graph import Graph
from ros_nodes.node import (
    CONTROL_STATUS,
    Endpoint,
)
from tests.ros.driver import MS, ROBOT, Driver
from tests.ros.robot_driver import Bridge, TrajectoryDriver, VelocityDriver, wait_until
from vla.embodiment import Output
from vla.runtime.gate import Reason, Verdict
from vla.runtime.trace import Trace

SEED = 1_000_000


def swinging(folder: Path, shell: str) -> Graph:
    """A graph whose policy swings the arm from side to side, 0.2 m/s."""
    chunks = np.zeros((200, 16, 7), np.float32)
    chunks[:, :, 1] = np.where(np.arange(200) % 2, -0.01, 0.01)[:, None]
    chunks[:, :, 6] = 1.0
    np.save(folder / "swing.npy", chunks)
    return DEMOS[shell]("tabletop", str(folder / "swing.npy"), out=folder / "run", task="pick_place", realtime=True)


@pytest.fixture(params=SHELLS)
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Graph]:
    with swinging(tmp_path, request.param) as graph:
        yield graph


def in_motion(graph: Graph) -> bool:
    status = graph.control_status()
    return status["phase"] == "running" and status["verdict"] in ("pass", "reshape") and status["due"] >= 10


def begin(graph: Graph) -> None:
    number = graph.begin(SEED)
    graph.wait_for(lambda: graph.control_status()["episode"] == number and in_motion(graph), 15, "motion")


def braked(graph: Graph) -> bool:
    status = graph.control_status()
    return status["verdict"] == "stop" and status["reason"] == Reason.HEARTBEAT.text


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_policy_process_lost_in_motion(graph: Graph, fault: signal.Signals) -> None:
    begin(graph)
    os.kill(graph.processes["policy"].pid, fault)
    if fault is signal.SIGKILL:
        graph.processes.pop("policy").wait()
    graph.wait_for(lambda: braked(graph), 3, "the arm to brake")
    graph.wait_for(lambda: any(Reason.HEARTBEAT.text in text for text in graph.stop_messages), 3, "/diagnostics")
    if fault is signal.SIGSTOP:
        time.sleep(0.3)
        os.kill(graph.processes["policy"].pid, signal.SIGCONT)
        graph.wait_for(lambda: in_motion(graph), 5, "the same episode to go on")
    else:
        spoke = graph.heard_ns("/vla/heartbeat")
        graph.launch("policy")
        graph.wait_for(lambda: graph.heard_ns("/vla/heartbeat") > spoke, 40, "the new policy to speak")
        begin(graph)
    graph.wait_for(lambda: graph.sim_status()["state"] == "done", 15, "the episode to end")
    assert all(graph.processes[name].poll() is None for name in ("sim", "command", "policy"))
    graph.stop()

    assert {name: process.returncode for name, process in graph.processes.items()} == dict.fromkeys(graph.processes, 0)
    stop = next(s for s in json.loads((graph.out / "control.json").read_text())["stops"] if s["silence_ms"] >= 120)
    assert stop["reason"] == Reason.HEARTBEAT.text
    # Within 150 ms on a machine that has time for it; that bound is held on an exact clock in test_command_core.py.
    assert 120 <= stop["silence_ms"] < 220
    assert_bounded_brake(Trace.load_mcap(graph.out / "trace.mcap"))


@contextmanager
def slowed(pid: int, share: float = 0.1, period_s: float = 0.02) -> Iterator[None]:
    """A process that has the cores for `share` of the time only."""

    def run(ended: threading.Event) -> None:
        while not ended.is_set():
            os.kill(pid, signal.SIGSTOP)
            ended.wait((1 - share) * period_s)
            os.kill(pid, signal.SIGCONT)
            ended.wait(share * period_s)

    with beside(run):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_policy_process_ten_times_slower(shell: str, tmp_path: Path) -> None:
    """The shipped policy: chunks come late, each stop of the arm meanwhile has its reason, and it goes on by itself."""
    with DEMOS[shell]("tabletop", "tabletop", out=tmp_path / "run", task="pick_place") as graph:
        graph.run_episode(SEED)
        begin(graph)
        with slowed(graph.processes["policy"].pid):
            graph.wait_for(lambda: graph.sim_status()["state"] == "done", 60, "the slow episode to end")
        number = graph.begin(SEED)
        graph.wait_for(lambda: graph.control_status()["episode"] == number and in_motion(graph), 15, "motion again")
        graph.wait_for(lambda: graph.sim_status()["state"] == "done", 30, "the last episode to end")
        assert all(process.poll() is None for process in graph.processes.values())
    trace = Trace.load_mcap(tmp_path / "run" / "trace.mcap")
    took, taken_ns = trace.infer_ms[: trace.inferences], trace.infer_end_ns[: trace.inferences]
    episode = np.searchsorted([row.stamp_ns for row in trace.episodes], taken_ns)
    assert np.max(took[episode == 1]) > 2 * np.median(took[episode == 0]), "the fault was one, on a busy machine too"
    stops = json.loads((tmp_path / "run" / "control.json").read_text())["stops"]
    # A process without time may also be late to see its pictures.
    reasons = (Reason.NO_ACTION, Reason.HEARTBEAT, Reason.CAMERA)
    assert {stop["reason"] for stop in stops} <= {reason.text for reason in reasons}


def assert_bounded_brake(trace: Trace) -> None:
    """From the first stop for silence, speed falls to zero, never faster than the joints may brake."""
    rows = trace.rows
    first = int(np.flatnonzero(trace.reason[:rows] == Reason.HEARTBEAT)[0])
    # Until the arm may move again, or the episode ends.
    over = (trace.verdict[first:rows] != Verdict.STOP) | (np.diff(trace.tick_ns[first - 1 : rows]) > 5e8)
    stopped = first + int(np.argmax(np.append(over, True)))
    times, commands = trace.tick_ns[first - 3 : stopped] / 1e9, trace.command[first - 3 : stopped]
    velocities = np.diff(commands, axis=0) / np.diff(times)[:, None]
    limits = np.array([joint.max_acceleration for joint in trace.embodiment.joints])
    change = np.abs(np.diff(velocities, axis=0))
    assert np.all(change <= limits * np.diff(times)[1:, None] * 1.01 + 1e-6)
    assert np.any(np.abs(velocities[0]) > 0.05) and not np.any(velocities[-1])


# ---- the command node ----
TRAJECTORY = Endpoint("/arm_controller/joint_trajectory", m.Trajectory.type_name)
VELOCITIES = Endpoint("/velocity_controller/commands", m.Values.type_name)
DRIVERS = {
    "positions": ((), None),
    "trajectory": (("--output-topic", TRAJECTORY.topic), TrajectoryDriver),
    "velocities": (
        ("--output-topic", VELOCITIES.topic, "--driver-timeout", "0.1"),
        lambda positions: VelocityDriver(positions, 0.1),
    ),
}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("kind", ["positions", "trajectory", pytest.param("velocities", marks=pytest.mark.slow)])
def test_command_process_lost_in_motion(kind: str, shell: str, tmp_path: Path) -> None:
    """Frozen, and later killed: what the driver has makes the arm come to rest, and nobody else has to start again."""
    options, make = DRIVERS[kind]
    graph = swinging(tmp_path, shell)
    graph._commands["command"] += ["--output", kind, *options]
    endpoint = VELOCITIES if kind == "velocities" else TRAJECTORY
    with graph:
        bridge = Bridge(graph.domain, graph.embodiment.command_topic, endpoint, make)
        try:
            begin(graph)
            for fault in (signal.SIGSTOP, signal.SIGKILL):
                assert wait_until(lambda: bridge.speed() > 0.1)
                os.kill(graph.processes["command"].pid, fault)
                at = time.monotonic_ns()
                time.sleep(1.0)
                # The plan reaches 100 ms beyond the command, and a period more for the command itself to be reached.
                assert bridge.rested_ns(at) - at < 400_000_000
                spoke = graph.heard_ns(CONTROL_STATUS.topic)
                if fault is signal.SIGSTOP:
                    os.kill(graph.processes["command"].pid, signal.SIGCONT)
                else:
                    graph.processes.pop("command").wait()
                    graph.launch("command")
                graph.wait_for(
                    lambda s=spoke: graph.heard_ns(CONTROL_STATUS.topic) > s and in_motion(graph), 40, "motion"
                )
            assert all(graph.processes[name].poll() is None for name in ("sim", "command", "policy"))
            assert any("no word of the command node" in text for text in graph.stop_messages), "the policy is left"
            steps = np.diff([q for _, q in bridge.measured], axis=0) / 0.01
            limits = np.array([joint.max_velocity for joint in graph.embodiment.joints])
            assert np.all(np.max(np.abs(steps), axis=0)[:7] <= 1.5 * limits[:7]), "no jump, when it froze or came back"
        finally:
            bridge.close()
    assert {name: process.returncode for name, process in graph.processes.items()} == dict.fromkeys(graph.processes, 0)


@pytest.mark.parametrize("after_ms", range(500, 550, 17))
def test_a_trajectory_brings_the_arm_to_rest_whenever_the_command_node_dies(after_ms: int) -> None:
    driver = Driver(robot=replace(ROBOT, command_topic="", outputs=(Output(TRAJECTORY.topic, "trajectory"),)))
    arm = TrajectoryDriver(driver.positions)
    states, taken = [], 0

    def run(milliseconds: int, alive: bool = True) -> None:
        nonlocal taken
        for _ in range(milliseconds):
            if alive:
                driver.run(1)
            else:
                driver.time_ns += MS
            for _, sent in driver.sent[taken:]:
                if sent.topic == TRAJECTORY.topic:
                    arm.take(sent.message, driver.now().stamp_ns)
            taken = len(driver.sent)
            states.append(arm.at(driver.now().stamp_ns))
            driver.positions = states[-1][0].copy()

    run(50)
    driver.begin()
    run(after_ms)
    speed = np.max(np.abs(states[-1][1]))
    assert speed > 0.02
    died = len(states)
    run(700, alive=False)
    speeds = [float(np.max(np.abs(v))) for _, v, _ in states[died:]]
    assert max(speeds[250:]) == 0 and min(speeds[:250]) < speed
    run(600)  # the same process, frozen for a while: no step in what the arm does, and the motion goes on
    assert driver.status_now()["verdict"] in ("pass", "reshape")
    velocities = np.array([v for _, v, _ in states])
    limits = np.array([joint.max_acceleration for joint in ROBOT.joints])
    assert np.all(np.abs(np.diff(velocities, axis=0)) / 1e-3 <= 1.5 * limits), "splines go a little over between points"
