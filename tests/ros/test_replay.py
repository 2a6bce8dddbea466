"""Recordings run again: the same to the bit with the same bundle, seed and decoder, else the first difference."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ros_nodes import messages as m
from ros_nodes import settings
from ros_nodes.bag import Bag, BagWriter
from ros_nodes.command_node import build_core
from ros_nodes.node import CHUNK, HEARTBEAT, JOINT_STATES, REQUEST, RESET, Endpoint, Job, NodeCore, Now, Send
from ros_nodes.policy_node import build
from ros_nodes.recorder_node import RecorderCore, robot_topics
from ros_nodes.request import ChunkId
from ros_nodes.sim_node import SimCore
from sim.environment import make
from vla.cli.main import main
from vla.errors import TransportError
from vla.resources import load_embodiment, pretrained_names
from vla.runtime.trace import Trace

MS = 1_000_000
T0 = 1_700_000_000_000_000_000
ROBOT = load_embodiment("tabletop")
pytestmark = pytest.mark.skipif("tabletop" not in pretrained_names(), reason="no policy is shipped yet: see the README")


class Graph:
    """Node cores on one virtual clock, without middleware. Inference takes `latency_ms` of it, every other one 4 ms
    more. Joint states reach the policy 12 ms later than the others, as on a busy machine: after the pictures that were
    taken with them."""

    def __init__(self, cores: dict[str, NodeCore], recorder: RecorderCore, latency_ms: int = 30) -> None:
        self.cores, self.recorder = cores, recorder
        self.time_ns, self.latency_ns = 5_000 * MS, latency_ms * MS
        self.results: list[tuple[int, str, str, Any]] = []
        self.latencies: list[float] = []
        self.late: list[tuple[int, m.Message]] = []

    def now(self) -> Now:
        return Now(T0 + self.time_ns, self.time_ns, self.time_ns)

    def publish(self, topic: str, message: m.Message) -> None:
        data = bytes(m.encode(message))
        if any(endpoint.topic == topic for endpoint in self.recorder.subscriptions):
            self.perform("recorder", self.recorder.on_message(topic, m.Raw(message.type_name, data), self.now()))
        for name, core in self.cores.items():
            if name == "policy" and topic == JOINT_STATES.topic:
                self.late.append((self.time_ns + 12 * MS, m.decode(message.type_name, data)))
            elif any(endpoint.topic == topic for endpoint in core.subscriptions):
                self.perform(name, core.on_message(topic, m.decode(message.type_name, data), self.now()))

    def perform(self, name: str, effects: Any) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.publish(effect.topic, effect.message)
            elif isinstance(effect, Job) and name == "recorder":
                self.perform(name, self.recorder.on_result(effect.name, effect.run(), self.now()))
            elif isinstance(effect, Job):
                took_ns = self.latency_ns + 4 * MS * (len(self.latencies) % 2) if name == "policy" else 0
                self.results.append((self.time_ns + took_ns, name, effect.name, effect.run()))
                if name == "policy":
                    self.latencies.append(took_ns / MS)

    def run(self, milliseconds: int) -> None:
        for _ in range(milliseconds):
            self.time_ns += MS
            while self.late and self.late[0][0] <= self.time_ns:
                message = self.late.pop(0)[1]
                self.perform("policy", self.cores["policy"].on_message(JOINT_STATES.topic, message, self.now()))
            for name, core in self.cores.items():
                if self.time_ns >= core.next_tick_ns:
                    self.perform(name, core.tick(self.now()))
            due = [result for result in self.results if result[0] <= self.time_ns]
            self.results = [result for result in self.results if result[0] > self.time_ns]
            for _, name, job, value in due:
                self.perform(name, self.cores[name].on_result(job, value, self.now()))


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser, settings.POLICY)
    return parser.parse_args(["--policy", "tabletop", *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A second of the shipped policy on the tabletop, recorded by the recorder's core; and its trace."""
    out = tmp_path_factory.mktemp("run")
    environment = make("tabletop")
    policy = build(options("--decoder", "jacobi"))
    recorder = RecorderCore(robot_topics(ROBOT), out, "run", min_free_bytes=0)
    command = build_core(ROBOT, out / "command", capacity=1000)
    graph = Graph({"sim": SimCore(environment), "policy": policy, "command": command}, recorder)
    graph.run(200)
    graph.publish(RESET.topic, m.Text.of(episode=0, seed=1_000_003))
    graph.run(1_300)
    graph.perform("recorder", recorder.close(graph.now()))
    environment.close()
    return {"bag": recorder.bags[0], "latencies": graph.latencies, "command": command}


def replay(capsys: Any, recording: Path, *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["replay", str(recording), "--policy", "tabletop", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def edited(bag: Path, out: Path, edit: Callable[[str, int, bytes], bytes | None]) -> Path:
    """A copy of a recording; `edit` changes a message, or drops it with None."""
    with Bag(bag) as source:
        writer = BagWriter(out, [Endpoint(name, topic.type_name) for name, topic in source.topics.items()])
        for topic, log_ns, data in source.messages(source.topics):
            changed = edit(topic, log_ns, data)
            if changed is not None:
                writer.write(topic, log_ns, changed)
    return writer.close()


def test_same_bundle_seed_and_decoder_give_the_same_chunks_bit_for_bit(run: dict[str, Any], capsys: Any) -> None:
    code, outcome = replay(capsys, run["bag"], "--decoder", "jacobi")
    assert code == 0 and outcome["same"] and outcome["way"] == "requests"
    assert outcome["different"] == 0 and outcome["first"] is None and outcome["missing"] == outcome["causes"] == []
    with Bag(run["bag"]) as bag:  # the joint states of the same instant were not there yet, though recorded before
        chunks = [m.decode(m.Trajectory.type_name, data) for _, _, data in bag.messages([CHUNK.topic])]
    assert {ChunkId.read(chunk.frame_id).offsets_ns for chunk in chunks} == {(-20 * MS, 0)}
    assert outcome["compared"] >= 3 * 16 and {error["max"] for error in outcome["errors"].values()} == {0.0}


def test_another_decoder_is_named_with_the_first_action(run: dict[str, Any], capsys: Any, tmp_path: Path) -> None:
    words = ["--decoder", "autoregressive", "temperature=1.0"]
    code, outcome = replay(capsys, run["bag"], *words, "--plot", str(tmp_path / "plot.png"))
    assert code == 1 and outcome["different"] > 0
    (cause,) = outcome["causes"]
    assert cause.startswith("decoder: recorded") and "JacobiDecoder" in cause and "AutoregressiveDecoder" in cause
    first = outcome["first"]
    assert first["name"] in ROBOT.action_names and first["recorded"] != first["replayed"] and first["size"] > 0
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert replay(capsys, run["bag"], *words)[1] == outcome  # sampling follows the recorded seeds
    code, other = replay(capsys, run["bag"], *words, "--seed", "5", "--plot", str(tmp_path / "plot.html"))
    assert code == 1 and other["errors"] != outcome["errors"]
    assert "seed: recorded 1000003, replayed 5" in other["causes"]
    assert "<svg" in (tmp_path / "plot.html").read_text()


def test_a_lost_picture_is_named(run: dict[str, Any], capsys: Any, tmp_path: Path) -> None:
    with Bag(run["bag"]) as bag:
        chunks = [m.decode(m.Trajectory.type_name, data) for _, _, data in bag.messages([CHUNK.topic])]
    lost = chunks[1].stamp_ns
    topics = [camera.topic for camera in ROBOT.cameras]

    def without(topic: str) -> Callable[[str, int, bytes], bytes | None]:
        return lambda t, _, data: None if t == topic and m.decode_image(data).stamp_ns == lost else data

    for number, topic in enumerate(topics):
        path = edited(run["bag"], tmp_path / str(number), without(topic))
        code, outcome = replay(capsys, path, "--decoder", "jacobi")
        assert code == 1 and outcome["different"] == 0 and len(outcome["missing"]) == 1
        assert "request 1 of episode 0: observation missing" in outcome["missing"][0]
    path = edited(run["bag"], tmp_path / "none", lambda t, _, data: None if t == topics[1] else data)
    assert main(["replay", str(path), "--policy", "tabletop"]) == 1  # the topic is there, and empty


def test_another_pixel_is_a_difference_with_a_size(run: dict[str, Any], capsys: Any, tmp_path: Path) -> None:
    def blank(topic: str, _: int, data: bytes) -> bytes:
        return data if topic != ROBOT.cameras[0].topic else data[:200] + bytes(len(data) - 200)

    path = edited(run["bag"], tmp_path / "blank", blank)
    code, outcome = replay(capsys, path, "--decoder", "jacobi")
    assert code == 1 and outcome["first"]["chunk"] == 0 and outcome["causes"][0].startswith("numerical")


def test_bundle_and_parts_that_were_not_recorded_are_said(run: dict[str, Any], capsys: Any, tmp_path: Path) -> None:
    def silent(topic: str, _: int, data: bytes) -> bytes | None:
        return None if topic == HEARTBEAT.topic else data

    path = edited(run["bag"], tmp_path / "silent", silent)
    assert replay(capsys, path, "--decoder", "jacobi")[0] == 0
    code, outcome = replay(capsys, path, "--decoder", "autoregressive", "temperature=1.0")
    assert code == 1 and outcome["causes"] == ["not recorded, so perhaps another: bundle, parts, torch, device"]


def test_own_schedule_with_the_recorded_latencies_repeats_the_motion(run: dict[str, Any], capsys: Any) -> None:
    code, outcome = replay(capsys, run["bag"], "--decoder", "jacobi", "--own-schedule")
    assert outcome["way"] == "schedule" and outcome["compared"] > 15
    assert code == 0 and outcome["same"] and {error["max"] for error in outcome["errors"].values()} == {0.0}, outcome
    code, other = replay(capsys, run["bag"], "--decoder", "jacobi", "--own-schedule", "--execute", "6")
    assert code == 1 and "or another --execute and --lead" in other["notes"][0]
    assert other["causes"] == [other["notes"][0].split("because of the ")[1]]


def test_other_latencies_are_the_reason_for_other_actions(run: dict[str, Any], capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "same.json").write_text(json.dumps(run["latencies"]))
    (tmp_path / "slow.json").write_text(json.dumps([160.0]))
    code, outcome = replay(capsys, run["bag"], "--decoder", "jacobi", "--latency", str(tmp_path / "same.json"))
    assert code == 0, outcome
    code, outcome = replay(capsys, run["bag"], "--decoder", "jacobi", "--latency", str(tmp_path / "slow.json"))
    assert code == 1 and outcome["causes"] == ["latency: chunk 0 took 30.0 ms, now 160.0 ms"]
    assert replay(capsys, run["bag"], "--decoder", "jacobi", "--latency", str(tmp_path / "slow.json"))[1] == outcome


def test_a_recording_without_a_policy_is_compared_with_its_operator(
    run: dict[str, Any], capsys: Any, tmp_path: Path
) -> None:
    ours = (REQUEST.topic, CHUNK.topic, HEARTBEAT.topic)
    path = edited(run["bag"], tmp_path / "operator", lambda t, _, data: None if t in ours else data)
    code, outcome = replay(capsys, path, "--decoder", "jacobi", "--tolerance", "1e-6")
    assert code == 1 and outcome["way"] == "schedule" and "no policy drove this recording" in outcome["causes"][0]
    gone = edited(run["bag"], tmp_path / "gone", lambda t, _, d: None if t in (*ours, ROBOT.command_topic) else d)
    assert main(["replay", str(gone), "--policy", "tabletop"]) == 2
    assert "commands of all joints to compare with" in capsys.readouterr().err


def test_a_demos_trace_needs_its_pictures(run: dict[str, Any], capsys: Any, tmp_path: Path) -> None:
    import io

    from PIL import Image

    trace: Trace = run["command"]._loop.trace
    from vla.runtime.trace import EpisodeRow

    trace.episodes.clear()
    end_ns = int(trace.tick_ns[trace.rows - 1])
    trace.add_episode(EpisodeRow(1_000_003, "", "push", False, trace.rows, end_ns))
    bare = trace.save_mcap(tmp_path / "trace.mcap")
    assert main(["replay", str(bare), "--policy", "tabletop"]) == 2
    assert "a trace with pictures" in capsys.readouterr().err
    with Bag(run["bag"]) as bag:
        words = m.decode(m.Text.type_name, next(iter(bag.messages(["/vla/instruction"])))[2]).data
        for camera in ROBOT.cameras:
            for number, (_, _, data) in enumerate(bag.messages([camera.topic])):
                if number % 2 == 0:
                    image, buffer = m.decode_image(data), io.BytesIO()
                    Image.fromarray(image.pixels).save(buffer, "JPEG", quality=85)
                    trace.add_image(camera.name, image.stamp_ns, buffer.getvalue())
    trace.episodes[:] = [EpisodeRow(1_000_003, "", words, False, trace.rows, end_ns)]
    full = trace.save_mcap(tmp_path / "full.mcap")
    code, outcome = replay(capsys, full, "--decoder", "jacobi", "--tolerance", "0.02")
    trace.images.clear()
    assert outcome["compared"] > 15 and "JPEG" in outcome["notes"][0]
    assert max(outcome["errors"][name]["rms"] for name in ("dx", "dy", "dz")) < 0.01 and code in (0, 1)


def test_names_and_files_that_do_not_fit(run: dict[str, Any], capsys: Any, tmp_path: Path) -> None:
    for words in (["--plot", "x.gif"], ["--latency", "nonsense"]):
        assert main(["replay", str(run["bag"]), "--policy", "tabletop", *words]) == 2
    assert main(["replay", str(tmp_path / "absent"), "--policy", "tabletop"]) == 2
    assert "rosbag2 recording" in capsys.readouterr().err


def test_a_chunk_says_which_messages_it_came_from() -> None:
    identity = ChunkId(1, 2, 3, 4, 5, 6, (-20 * MS, 0))
    assert ChunkId.read(identity.text()) == identity and ChunkId.read("v1/1/2/3/4/5/6").offsets_ns == ()
    for text in ("v1/1/2/3/4/5/6/", "v1/1/2/3/4/5/6/1,x", "v1/1/2/3/4/5/6/1/2"):
        with pytest.raises(TransportError):
            ChunkId.read(text)
