"""Both shells run the same cores: what holds on the wheel holds on rclpy."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shells import ROOT, SHELLS, Graph, command, graph, ros_environment

from ros_nodes.messages import Flag, Text, Values
from ros_nodes.node import (
    CHUNK,
    CONTROL,
    CONTROL_STATUS,
    DIAGNOSTICS,
    EMERGENCY_STOP,
    HEARTBEAT,
    INSTRUCTION,
    RECORD,
    RECORD_STATUS,
    RESET,
    SIM_STATUS,
    Endpoint,
)
from vla.resources import load_embodiment

pytestmark = pytest.mark.parametrize("shell", SHELLS)


def status(found: Graph, **wanted: Any) -> dict[str, Any]:
    """The first status of the command node that says this."""

    def matches(message: Text) -> bool:
        said = message.object()
        return all(said.get(key) == value for key, value in wanted.items())

    return dict(found.hear(CONTROL_STATUS.topic, matches).object())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_node_with_code_0(shell: str, number: signal.Signals) -> None:
    with graph(shell) as found:
        found.listen(CONTROL_STATUS)
        found.operator.start()
        process = found.start("command", embodiment="tabletop")
        status(found, phase="idle")
        assert found.end(process, number) == (0, "")


@pytest.mark.parametrize(
    ("node", "values", "message"),
    [
        ("command", {"embodiment": "tabletopp"}, "Did you mean 'tabletop'"),
        ("command", {}, "embodiment"),
        ("policy", {"policy": "hold"}, "expected a robot for 'hold'"),
        ("policy", {"policy": "hold", "embodiment": "tabletop", "slop": 5.0}, "slop"),
    ],
)
def test_a_wrong_setting_is_one_message(shell: str, node: str, values: dict[str, Any], message: str) -> None:
    run = subprocess.run(
        command(shell, node, 0, **values), cwd=ROOT, env=ros_environment(0), capture_output=True, text=True, timeout=120
    )
    assert run.returncode in (1, 2) and message in run.stderr and "Traceback" not in run.stderr


def test_an_episode(shell: str) -> None:
    """Simulator, policy and gate, all three in this shell: chunks are executed, and each node ends cleanly."""
    with graph(shell) as found:
        for endpoint in (CONTROL_STATUS, HEARTBEAT, SIM_STATUS, CHUNK):
            found.listen(endpoint)
        found.publisher(RESET)
        found.operator.start()
        sim = found.start("sim", env="tabletop")
        policy = found.start("policy", policy="hold", embodiment="tabletop")
        gate = found.start("command", embodiment="tabletop")
        status(found, phase="idle")
        found.hear(HEARTBEAT.topic)
        found.say(RESET, Text.of(episode=3, seed=1_000_007))
        found.hear(CONTROL_STATUS.topic, lambda m: m.object()["episode"] == 3 and m.object()["due"] > 20)
        # Not at once: a busy machine may have been late with a picture, and the arm goes on.
        going = ("pass", "reshape")
        running = found.hear(CONTROL_STATUS.topic, lambda m: m.object()["due"] > 20 and m.object()["verdict"] in going)
        assert running.object()["chunks"] >= 2
        for process in (policy, gate, sim):
            assert found.end(process) == (0, "")


def test_the_arm_rests_when_the_gate_ends(shell: str, tmp_path: Path) -> None:
    """Told to end in the middle of a motion, the gate brakes first: its last commands stand still."""
    robot = load_embodiment("tabletop")
    chunk = np.zeros((1, 16, robot.action_dim), np.float32)
    chunk[:, :, 1] = 0.01  # to the left, 0.2 m/s
    np.save(tmp_path / "left.npy", chunk)
    commands = Endpoint(robot.command_topic, Values.type_name)
    with graph(shell) as found:
        for endpoint in (CONTROL_STATUS, HEARTBEAT, commands):
            found.listen(endpoint)
        found.publisher(RESET)
        found.operator.start()
        found.start("sim", env="tabletop")
        found.start("policy", policy=str(tmp_path / "left.npy"), embodiment="tabletop")
        gate = found.start("command", embodiment="tabletop")
        found.hear(HEARTBEAT.topic)
        status(found, phase="idle")
        found.say(RESET, Text.of(episode=1, seed=1_000_007))
        positions = found.heard[commands.topic]

        def speeds() -> np.ndarray:
            return np.abs(np.diff([m.data for m in positions], axis=0)).max(axis=1) * robot.rate_hz

        found.wait(lambda: len(positions) > 5 and speeds()[-1] > 0.1, "motion")
        assert found.end(gate) == (0, "")
        assert speeds().max() > 0.1 and speeds()[-1] == 0


def test_what_operators_say_on_topics(shell: str) -> None:
    with graph(shell) as found:
        for endpoint in (CONTROL_STATUS, DIAGNOSTICS):
            found.listen(endpoint)
        for endpoint in (CONTROL, EMERGENCY_STOP):
            found.publisher(endpoint)
        found.operator.start()
        gate = found.start("command", embodiment="tabletop")
        status(found, phase="idle")
        found.say(CONTROL, Text.of(op="go", episode=5, seed=1))
        status(found, phase="armed", episode=5)
        found.say(EMERGENCY_STOP, Flag(True))
        found.hear(DIAGNOSTICS.topic, lambda m: "estop" in m.statuses[0].values)
        found.say(CONTROL, Text.of(op="resume"))
        found.hear(DIAGNOSTICS.topic, lambda m: "Release the emergency stop" in m.statuses[0].message)
        found.say(CONTROL, Text.of(op="done", success=True))
        assert status(found, phase="idle", episode=5)["success"]
        assert found.end(gate) == (0, "")


def test_instructions_reach_the_policy(shell: str) -> None:
    with graph(shell) as found:
        found.listen(HEARTBEAT)
        found.publisher(INSTRUCTION)
        found.operator.start()
        policy = found.start("policy", policy="hold", embodiment="tabletop")
        found.hear(HEARTBEAT.topic, lambda m: "no instruction yet" in m.message)
        found.say(INSTRUCTION, Text("push the red cube"))
        found.hear(HEARTBEAT.topic, lambda m: m.message == "ready")
        assert found.end(policy) == (0, "")


def test_the_recorder_takes_marks(shell: str, tmp_path: Any) -> None:
    with graph(shell) as found:
        found.listen(RECORD_STATUS)
        found.publisher(RECORD)
        found.operator.start()
        recorder = found.start("recorder", embodiment="tabletop", out=str(tmp_path), wait=True, min_free=0.0)
        found.hear(RECORD_STATUS.topic, lambda m: m.object()["state"] == "waiting")
        found.say(RECORD, Text("start"))
        found.hear(RECORD_STATUS.topic, lambda m: m.object()["state"] == "recording")
        found.say(RECORD, Text("stop"))
        found.hear(RECORD_STATUS.topic, lambda m: m.object()["episodes"] == 1)
        code, errors = found.end(recorder)
        assert code == 0 and errors == ""
        assert len([path for path in tmp_path.iterdir() if not path.name.endswith(".incomplete")]) == 1
