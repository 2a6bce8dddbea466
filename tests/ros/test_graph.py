"""The whole graph: separate processes, episodes, measures, and what it says when a node cannot run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from shells import SHELLS
from shells import graph as nodes

from policies.hold import HoldPolicy
from policies.vla_policy import VlaPolicy
from ros_nodes import messages as m
from ros_nodes.evaluate import evaluate, rates
from ros_nodes.graph import Graph, Outcome
from ros_nodes.node import CHUNK, INSTRUCTION, JOINT_STATES, REQUEST, Job, Now, Send, pictures_of
from ros_nodes.policy_node import PolicyCore
from ros_nodes.request import ChunkId, Request
from sim.environment import make
from tests.remote.robots import served
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.errors import TransportError
from vla.policy import InferContext, InferResult, infer
from vla.runtime.trace import Trace
from vla.types import ActionChunk, Observation

SEED = 1_000_000


def test_the_expert_succeeds_over_ros_and_everything_is_measured(tmp_path: Path) -> None:
    seen: list[tuple[str, int, np.ndarray]] = []
    own_mb = psutil.Process().memory_info().rss / 2**20  # counted too: whatever the tests before have left in here
    graph = Graph(
        "tabletop", "expert", out=tmp_path, task="push", realtime=True, watch=("agentview",),
        on_image=lambda *picture: seen.append(picture),
    )  # fmt: skip
    result = evaluate(graph, range(SEED, SEED + 2))
    assert result["success"]["all"]["episodes"] == 2 and result["success"]["push"]["successes"] >= 1
    assert result["episodes"] == 2 and result["seeds"] == [SEED, SEED + 1]
    assert result["control_hz"] == pytest.approx(20, rel=0.1)
    assert 0 < result["transport_ms"]["p50"] <= result["transport_ms"]["p95"]
    assert 50 < result["peak_rss_mb"] - own_mb < 1500 and result["messages"] > 500
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == 2
    assert {p.returncode for p in graph.processes.values()} == {0}
    trace = Trace.load_mcap(tmp_path / "trace.mcap")
    assert [episode.seed for episode in trace.episodes] == [SEED, SEED + 1]
    assert seen and seen[0][0] == "agentview" and seen[0][2].shape == (128, 128, 3)


def test_a_node_that_cannot_start_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"the policy node ended with code 1.*no_such_bundle"):
        Graph("tabletop", "no_such_bundle", out=tmp_path).start()


def test_rates_are_counted_per_family() -> None:
    outcomes = [Outcome(i, i, "", i % 2 == 0, 1, 1.0, "push" if i < 4 else "stack") for i in range(6)]
    table = rates(outcomes)
    assert (table["all"]["successes"], table["push"]["episodes"], table["stack"]["success_rate"]) == (3, 4, 0.5)
    low, high = table["all"]["wilson_95"]
    assert low < 0.5 < high


class Hashing(HoldPolicy):
    """Actions that depend on every bit of the observation and its context."""

    def infer_batch(self, observations: Sequence[Observation], contexts: Sequence[InferContext]) -> list[InferResult]:
        results = []
        for o, c in zip(observations, contexts):
            parts: list[Any] = [o.images[k].tobytes() for k in sorted(o.images)]
            parts += [o.state.tobytes(), o.instruction.encode(), str((c.seed, c.executed, c.start_ns)).encode()]
            digest = hashlib.sha256(b"".join(parts)).digest()
            actions = np.random.default_rng(list(digest)).normal(size=(8, 7)).astype(np.float32)
            results.append(InferResult(ActionChunk(actions, c.start_ns, 0.05)))
        return results


def test_the_same_observation_gives_the_same_chunk_bit_for_bit_over_the_wire() -> None:
    environment = make("tabletop")
    observation, _ = environment.reset(seed=SEED)
    robot, policy = environment.embodiment, Hashing(environment.embodiment)
    direct = infer(policy, observation, InferContext(executed=3, start_ns=observation.stamp_ns, seed=42))

    core, sent = PolicyCore(policy, environment.kinematics.state), []
    now = Now(observation.stamp_ns, 1, 1)
    names, positions, velocities = environment.joint_state()
    messages = [(JOINT_STATES.topic, m.JointState(observation.stamp_ns, names, positions, velocities))]
    for camera in robot.cameras:
        image = m.Image(observation.stamp_ns, camera.name, "rgb8", observation.images[camera.name])
        messages.append((camera.topic, image))
    messages.append((INSTRUCTION.topic, m.Text(observation.instruction)))
    messages.append(("/vla/request", Request(0, 1, 0, observation.stamp_ns, 42, executed=3).text()))
    for topic, message in messages:
        for effect in core.on_message(topic, m.decode(message.type_name, bytes(m.encode(message))), now):
            assert isinstance(effect, Job)
            sent += core.on_result(effect.name, effect.run(), now)
    environment.close()
    (chunk,) = [s.message for s in sent if isinstance(s, Send) and s.topic == CHUNK.topic]
    arrived = m.decode(m.Trajectory.type_name, bytes(m.encode(chunk)))
    over_ros = m.trajectory_to_chunk(arrived, robot.action_names, direct.chunk.period_ns)
    assert np.array_equal(over_ros.actions, direct.chunk.actions) and over_ros.start_ns == direct.chunk.start_ns


@pytest.mark.parametrize("shell", SHELLS)
def test_a_bundle_gives_the_same_chunk_in_process_over_the_socket_and_over_ros_2(shell: str, tiny_bundle: Path) -> None:
    """Drawn tokens of a real model, so that the seeds count; pictures at the camera's size, and larger ones."""
    environment = make("tabletop")
    first, _ = environment.reset(seed=SEED)
    names, positions, velocities = environment.joint_state()
    raw = dict(first.images)
    environment.close()
    policy = VlaPolicy.from_bundle(tiny_bundle, AutoregressiveDecoder(temperature=1.0), threads=1)
    robot, said = policy.embodiment, []
    with served(policy) as remote, nodes(shell) as running:
        running.listen(CHUNK)
        running.operator.start()
        running.start("policy", policy=tiny_bundle, decoder="autoregressive temperature=1.0", max_age=10.0)
        running.say(INSTRUCTION, m.Text(first.instruction))
        for number, times in enumerate((1, 2)):
            images = {name: image.repeat(times, 0).repeat(times, 1) for name, image in raw.items()}
            seen = replace(first, images=images, stamp_ns=time.time_ns())
            context = InferContext(start_ns=seen.stamp_ns, seed=40 + number)
            running.say(REQUEST, Request(0, 7, number, seen.stamp_ns, context.seed).text())

            def answered(number: int = number, seen: Observation = seen) -> list[m.Trajectory]:
                # Best effort: again and again.
                running.say(JOINT_STATES, m.JointState(seen.stamp_ns, names, positions, velocities))
                for camera in robot.cameras:
                    image = m.Image(seen.stamp_ns, camera.name, "rgb8", seen.images[camera.name])
                    running.say(pictures_of(camera.topic, False), image)
                return [c for c in running.heard[CHUNK.topic] if ChunkId.read(c.frame_id).request == number]  # type: ignore

            running.wait(lambda: bool(answered()), "chunk")
            over_ros = m.trajectory_to_chunk(answered()[0], robot.action_names, round(robot.period_s * 1e9)).actions
            policy.reset(99)  # not the server's business: a remote robot's seed is its own
            remote.reset(7)
            over_socket = infer(remote, seen, context).chunk.actions
            policy.reset(7)
            direct = infer(policy, seen, context).chunk.actions
            assert direct.tobytes() == over_socket.tobytes() == over_ros.tobytes()
            said.append(direct.tobytes())
        policy.reset(8)
        said.append(infer(policy, seen, context).chunk.actions.tobytes())
    assert len(set(said)) == 3, "seeds matter"
