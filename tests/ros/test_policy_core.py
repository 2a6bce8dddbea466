"""The policy core, driven by plain calls: what it accepts, what it refuses, and what its heartbeat says."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from policies.ensembling_policy import EnsemblingPolicy
from policies.hold import HoldPolicy
from policies.reuse_policy import ReusePolicy
from policies.vla_policy import VlaPolicy
from ros_nodes import command_node, policy_node, settings
from ros_nodes import messages as m
from ros_nodes.node import (
    CHUNK,
    CONTROL_STATUS,
    HEARTBEAT,
    INSTRUCTION,
    JOINT_STATES,
    REQUEST,
    Effects,
    Job,
    Now,
    Send,
)
from ros_nodes.policy_node import PolicyCore
from ros_nodes.request import CONFIDENCE, MAX_ID_CHARS, ChunkId, Request
from ros_nodes.shadow import Shadow
from tests.decoding.test_continuous import bundle_of
from vla.decoding.autoregressive import AutoregressiveDecoder
from vla.errors import ConfigError, EmbodimentMismatch, TransportError
from vla.models.heads import HeadConfig
from vla.policy import DecodeReport, InferContext, InferResult
from vla.resources import load_embodiment
from vla.types import ActionChunk, Observation

ROBOT = load_embodiment("tabletop")
AGENT, WRIST = (camera.topic for camera in ROBOT.cameras)
T0 = 1_000_000_000_000
PERIOD = 50_000_000


class Recording(HoldPolicy):
    """Holds, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__(ROBOT, horizon=4)
        self.seen: list[tuple[Observation, InferContext]] = []
        self.seeds: list[int] = []
        self.fail: Exception | None = None

    def reset(self, seed: int) -> None:
        self.seeds.append(seed)

    def infer_batch(self, observations: Any, contexts: Any) -> list[InferResult]:
        if self.fail is not None:
            raise self.fail
        self.seen += zip(observations, contexts)
        return super().infer_batch(observations, contexts)


class Driver:
    """A shell without threads: jobs run at once, time moves when told."""

    def __init__(self, policy: Any = None, **options: Any) -> None:
        self.policy = policy or Recording()
        self.core = PolicyCore(self.policy, lambda q: q[:7].astype(np.float32), **options)
        self.time_ns = 0
        self.sent: list[Send] = []
        self.run_jobs = True

    def now(self) -> Now:
        return Now(T0 + self.time_ns, self.time_ns, self.time_ns)

    def perform(self, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.sent.append(effect)
            elif isinstance(effect, Job) and self.run_jobs:
                try:
                    value = effect.run()
                except Exception as error:
                    value = error
                self.perform(self.core.on_result(effect.name, value, self.now()))

    def give(self, topic: str, message: m.Message) -> None:
        self.perform(self.core.on_message(topic, message, self.now()))

    def frame(
        self, topic: str = AGENT, stamp_ns: int = 0, size: int = 128, encoding: str = "rgb8", width: int = 0
    ) -> None:
        pixels = np.full((size, width or size, m.CHANNELS[encoding]), 7, np.uint8)
        self.give(topic, m.Image(T0 + stamp_ns, "cam", encoding, pixels))

    def joints(self, stamp_ns: int = 0, names: Any = ROBOT.command_names, positions: Any = None) -> None:
        values = np.arange(len(names), dtype=np.float64) if positions is None else positions
        self.give(JOINT_STATES.topic, m.JointState(T0 + stamp_ns, tuple(names), values))

    def sensors(self, stamp_ns: int = 0) -> None:
        self.joints(stamp_ns)
        self.frame(AGENT, stamp_ns)
        self.frame(WRIST, stamp_ns)

    def ask(self, number: int = 0, episode: int = 0, start_ns: int = 0, **more: Any) -> None:
        self.give(REQUEST.topic, Request(episode, 11, number, T0 + start_ns, **more).text())

    def ready(self) -> Driver:
        self.give(INSTRUCTION.topic, m.Text("push the red cube"))
        self.sensors()
        return self

    @property
    def chunks(self) -> list[m.Trajectory]:
        return [s.message for s in self.sent if s.topic == CHUNK.topic]  # type: ignore[misc]

    def beat(self) -> m.Status | None:
        before = len(self.sent)
        self.time_ns += PERIOD
        self.perform(self.core.tick(self.now()))
        beats = [s.message for s in self.sent[before:] if s.topic == HEARTBEAT.topic]
        return beats[0] if beats else None  # type: ignore[return-value]


def test_a_request_is_answered_with_the_synchronised_observation() -> None:
    driver = Driver().ready()
    driver.ask(number=3, episode=5)
    (chunk,) = driver.chunks
    observation, context = driver.policy.seen[0]
    assert chunk.stamp_ns == observation.stamp_ns == context.start_ns == T0
    assert chunk.names == ROBOT.action_names and chunk.positions.shape == (4, 7)
    assert ChunkId.read(chunk.frame_id).episode == 5 and ChunkId.read(chunk.frame_id).request == 3
    assert observation.instruction == "push the red cube" and set(observation.images) == {"agentview", "wrist"}
    assert np.array_equal(observation.state, np.arange(7, dtype=np.float32))
    beat = driver.beat()
    assert beat is not None and beat.level == m.OK and beat.values["chunks"] == "1" and "latency_ms_p99" in beat.values


def test_it_hears_sensors_words_and_requests_and_nothing_else() -> None:
    core = Driver().core
    assert {e.topic for e in core.subscriptions} == {
        AGENT, WRIST, JOINT_STATES.topic, INSTRUCTION.topic, REQUEST.topic, CONTROL_STATUS.topic,
    }  # fmt: skip
    assert set(vars(Request(0, 0, 0, 0))) == {
        "episode", "seed", "number", "start_ns", "infer_seed", "previous", "previous_start_ns", "executed", "committed",
    }  # fmt: skip


def test_chunk_numbers_begin_where_no_other_policy_does() -> None:
    driver = Driver(first_number=5 << 10).ready()
    driver.ask()
    assert ChunkId.read(driver.chunks[0].frame_id).number == 5 << 10
    driver.ask(number=1, previous=5 << 10, previous_start_ns=T0, executed=3)
    assert driver.policy.seen[1][1].previous is not None
    assert driver.beat().values["chunks"] == "2"


def test_joints_are_matched_by_name() -> None:
    driver = Driver()
    driver.give(INSTRUCTION.topic, m.Text("push"))
    names = ("wheel", *reversed(ROBOT.command_names))
    driver.joints(names=names, positions=np.arange(9.0))
    driver.frame(AGENT)
    driver.frame(WRIST)
    driver.ask()
    assert np.array_equal(driver.policy.seen[0][0].state, np.arange(8, 1, -1, dtype=np.float32))


def test_it_waits_for_sensors_as_new_as_asked_for() -> None:
    driver = Driver().ready()
    driver.ask(start_ns=PERIOD // 2)
    assert not driver.chunks
    driver.time_ns = PERIOD
    driver.sensors(PERIOD)
    assert [c.stamp_ns for c in driver.chunks] == [T0 + PERIOD]


def test_stamps_further_apart_than_the_slop_make_no_observation() -> None:
    driver = Driver(slop_s=0.02)
    driver.give(INSTRUCTION.topic, m.Text("push"))
    driver.joints(0)
    driver.frame(AGENT, 0)
    driver.frame(WRIST, 21_000_000)
    driver.ask()
    assert not driver.chunks
    driver.frame(WRIST, 20_000_000)
    assert len(driver.chunks) == 1


def test_the_slop_counts_from_the_first_camera() -> None:
    """Two of the others may lie twice as far apart, one on either side of it; what waits says the same rule."""
    driver = Driver(slop_s=0.02)
    driver.give(INSTRUCTION.topic, m.Text("push"))
    driver.joints(-20_000_000)
    driver.frame(AGENT, 0)
    driver.frame(WRIST, 20_000_000)
    driver.ask()
    assert len(driver.chunks) == 1
    driver.ask(number=1, start_ns=PERIOD)
    driver.frame(WRIST, PERIOD)
    said = [driver.beat() for _ in range(12)][-1].message
    assert "expected ['wrist', 'joint states'] within 0.02 s of agentview" in said


def test_the_context_carries_what_was_executed() -> None:
    driver = Driver().ready()
    driver.ask(number=0)
    committed = np.array([[0.1] * 7, [0.2] * 7], np.float32)
    driver.ask(number=1, previous=0, previous_start_ns=T0 - 5, executed=6, committed=committed, infer_seed=99)
    context = driver.policy.seen[1][1]
    assert context.previous is not None and context.previous.start_ns == T0 - 5
    assert (context.executed, context.seed) == (6, 99) and np.array_equal(context.committed, committed)
    assert driver.policy.seeds == [11]
    driver.ask(number=0, episode=1, previous=1)  # a new episode forgets
    assert driver.policy.seen[2][1].previous is None and driver.policy.seeds == [11, 11]


def test_an_image_taken_later_finds_less_left_of_what_was_committed() -> None:
    driver = Driver().ready()
    driver.ask(number=0)
    committed = np.array([[0.1] * 7, [0.2] * 7], np.float32)
    running = {"previous": 0, "previous_start_ns": T0, "executed": 6, "committed": committed}
    driver.ask(number=1, start_ns=PERIOD // 2, **running)  # sensors of half a period before the slot would do
    driver.time_ns = 2 * PERIOD
    driver.sensors(2 * PERIOD)
    context = driver.policy.seen[1][1]
    assert context.executed == 7 and np.array_equal(context.committed, committed[1:])
    driver.ask(number=2, start_ns=2 * PERIOD - PERIOD // 2, **running)
    context = driver.policy.seen[2][1]
    assert context.executed == 6 and np.array_equal(context.committed, committed)


BAD = {
    "too small": (lambda d: d.frame(AGENT, size=64), "expected 128x128, or larger in that proportion, got 64x64"),
    "another proportion": (lambda d: d.frame(AGENT, size=480, width=640), "in that proportion, got 480x640"),
    "NaN": (lambda d: d.joints(positions=np.full(8, np.nan)), "NaN or infinity in"),
    "missing joint": (lambda d: d.joints(names=ROBOT.command_names[:-1]), "missing ['gripper']"),
    "empty instruction": (lambda d: d.give(INSTRUCTION.topic, m.Text("  ")), "empty text"),
    "long instruction": (lambda d: d.give(INSTRUCTION.topic, m.Text("x" * 10_000)), "10000 characters"),
    "stale clock": (lambda d: setattr(d, "time_ns", 10**9), "1.000 s old"),
    "clock ahead": (lambda d: setattr(d, "time_ns", -(10**9)), "-1.000 s old"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_gives_no_chunk_and_says_why_and_recovers(fault: str) -> None:
    driver = Driver().ready()
    spoil, words = BAD[fault]
    spoil(driver)
    driver.ask()
    assert not driver.chunks
    beat = driver.beat()
    assert beat is not None and beat.level == m.WARN and words in beat.message
    driver.give(INSTRUCTION.topic, m.Text("push"))
    driver.sensors(driver.time_ns)
    driver.ask(number=1, start_ns=driver.time_ns)
    assert driver.chunks and driver.beat().level == m.OK


def test_an_unsupported_encoding_is_named() -> None:
    driver = Driver().ready()
    driver.perform(driver.core.on_reject(AGENT, "image encoding '16UC1' is not supported.", driver.now()))
    assert "16UC1" in driver.beat().message


@pytest.mark.parametrize("topic", [INSTRUCTION.topic, REQUEST.topic, JOINT_STATES.topic, AGENT, "/clock"])
def test_a_message_that_cannot_be_read_is_named_for_a_second(topic: str) -> None:
    """And then forgotten, whether or not a better one comes; what was heard before it stands."""
    driver = Driver().ready()
    driver.perform(driver.core.on_reject(topic, "cut short", driver.now()))
    driver.ask()
    assert driver.chunks
    beats = [driver.beat() for _ in range(25)]  # 1.25 s
    assert [f"{topic}: cut short" in beat.message for beat in beats] == [True] * 19 + [False] * 6
    assert [beat.level for beat in beats] == [m.WARN] * 19 + [m.OK] * 6


def test_no_instruction_yet() -> None:
    driver = Driver()
    driver.sensors()
    driver.ask()
    assert not driver.chunks and "no instruction" in driver.beat().message


def test_a_camera_that_says_nothing_is_named_when_a_request_waits_for_it() -> None:
    driver = Driver(max_age_s=0.2)
    driver.give(INSTRUCTION.topic, m.Text("push"))
    driver.joints()
    driver.frame(AGENT)
    driver.ask()
    beats = [driver.beat() for _ in range(5)]
    assert [beat.level for beat in beats] == [m.OK] * 3 + [m.WARN] * 2
    assert "nothing new of ['wrist']" in beats[-1].message
    driver.sensors(driver.time_ns)
    assert len(driver.chunks) == 1 and driver.beat().level == m.OK


def test_a_failing_policy_does_not_end_the_node() -> None:
    driver = Driver().ready()
    driver.policy.fail = RuntimeError("weights went missing")
    driver.ask()
    beat = driver.beat()
    assert not driver.chunks and beat.level == m.ERROR and "weights went missing" in beat.message
    driver.policy.fail = None
    driver.sensors(driver.time_ns)
    driver.ask(number=1, start_ns=driver.time_ns)
    assert len(driver.chunks) == 1 and driver.beat().level == m.OK


def test_a_chunk_with_nan_never_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver().ready()
    bad = InferResult(ActionChunk(np.full((4, 7), np.nan, np.float32), T0, 0.05))
    monkeypatch.setattr(driver.policy, "infer_batch", lambda o, c: [bad])
    driver.ask()
    assert not driver.chunks and "NaN" in driver.beat().message


def test_the_heartbeat_stops_while_inference_hangs() -> None:
    driver = Driver(hang_limit_s=0.2).ready()
    driver.run_jobs = False
    driver.ask()
    beats = [driver.beat() is not None for _ in range(8)]
    assert beats == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    "text",
    ["{}", '{"v":2}', "no json", '{"v":1,"episode":0}', '{"v":1,"episode":0,"seed":true}', '{"v":1,"episode":1e400}'],
)
def test_a_malformed_request_is_refused_and_reported_for_a_second(text: str) -> None:
    driver = Driver().ready()
    driver.give(REQUEST.topic, m.Text(text))
    assert not driver.chunks and driver.beat().level == m.WARN and REQUEST.topic in driver.beat().message
    driver.ask()
    assert len(driver.chunks) == 1 and [driver.beat().level for _ in range(20)][-1] == m.OK


def test_the_heartbeat_and_the_chunk_say_what_the_decoder_told(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver().ready()
    chunk = ActionChunk(np.zeros((4, 7), np.float32), T0, 0.05)
    reports = iter([DecodeReport(notes={"averaged": 1.0, "confidence": 0.975}), DecodeReport()])
    monkeypatch.setattr(driver.policy, "infer_batch", lambda o, c: [InferResult(chunk, next(reports))])
    driver.ask()
    values = driver.beat().values
    assert (values["note.averaged"], values["note.confidence"]) == ("1", "0.975")
    told = ChunkId.read(driver.chunks[0].frame_id).report
    assert told.notes == {"averaged": 1.0, "confidence": 0.975} and told.confidence == 1.0
    driver.ask(number=1)
    assert not any(key.startswith("note.") for key in driver.beat().values), "they are the last chunk's"


class Moving(Recording):
    """Always the same way, and always with an eye on the same places."""

    def infer_batch(self, observations: Any, contexts: Any) -> list[InferResult]:
        self.seen += zip(observations, contexts)
        actions = np.linspace(0.1, 0.2, 16 * 7, dtype=np.float32).reshape(16, 7)
        chunks = [ActionChunk(actions * len(self.seen), context.start_ns, ROBOT.period_s) for context in contexts]
        return [InferResult(chunk, DecodeReport(ids=(1, 2), kept_tokens=np.arange(9))) for chunk in chunks]


@pytest.mark.parametrize("ensembling", [False, True])
def test_a_reused_chunk_is_published_as_short_as_it_is_and_goes_on(ensembling: bool) -> None:
    inner = Moving()
    policy: Any = ReusePolicy(inner)
    driver = Driver(EnsemblingPolicy(policy) if ensembling else policy).ready()
    driver.ask()
    for number in (1, 2, 3):
        stamp = 4 * number * PERIOD
        driver.time_ns = stamp
        driver.sensors(stamp)
        driver.ask(number=number, start_ns=stamp, previous=number - 1, previous_start_ns=T0 + stamp - 4 * PERIOD,
                   executed=4)  # fmt: skip
    first, second, third, fourth = (m.trajectory_to_chunk(c, ROBOT.action_names, PERIOD) for c in driver.chunks)
    assert [len(chunk) for chunk in (first, second, third, fourth)] == [16, 16, 12, 16]
    assert [chunk.start_ns for chunk in (second, third)] == [T0 + 4 * PERIOD, T0 + 8 * PERIOD]
    np.testing.assert_array_equal(third.actions, second.actions[4:])
    assert len(inner.seen) == 3 and len(inner.seen[2][1].previous) == 12
    assert np.array_equal(fourth.actions, 3 * first.actions) != ensembling
    ((place, reason),) = driver.core.summary()["reused"]
    assert place == 2 and reason.startswith("angle 0.0 deg")
    assert driver.beat().values["reused"] == "" and ChunkId.read(driver.chunks[2].frame_id).passes == 0


def robot_file(path: Path, **changes: Any) -> str:
    """The robot with other facts, as a file."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps({**ROBOT.to_dict(), **changes}))))
    return str(path)


def test_the_robots_file_says_where_its_sensors_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrected after the training: policy node, shadow and command node hear the same topics."""
    monkeypatch.setattr(VlaPolicy, "warm_up", lambda self: None)
    agent, wrist = ROBOT.to_dict()["cameras"]
    cameras = [agent | {"height": 256, "width": 256}, wrist | {"topic": "/wrist/image"}]
    first, *others = ROBOT.to_dict()["joints"]
    sources = [{"topic": "/arm/joint_states"}]
    path = robot_file(
        tmp_path / "mine.yaml", cameras=cameras, joint_states=sources, joints=[first | {"upper": 0.5}, *others]
    )

    def built(**values: Any) -> PolicyCore:
        return policy_node.build(settings.options(settings.POLICY, {"policy": "tabletop", **values}))

    core = built(embodiment=path)
    heard = {e.topic for e in core.subscriptions}
    assert {AGENT, "/wrist/image", "/arm/joint_states"} < heard and not {WRIST, JOINT_STATES.topic} & heard
    assert core.embodiment.joints[0].upper == 0.5
    assert (core.embodiment.camera("agentview").height, core.embodiment.camera("agentview").width) == (128, 128)
    shadow = Shadow(core, lambda job: None)
    assert heard - {REQUEST.topic} <= {e.topic for e in shadow.subscriptions}
    assert {"/arm/joint_states"} == {e.topic for e in command_node.build_core(shadow.robot)._watch.subscriptions}
    assert {WRIST, JOINT_STATES.topic} < {e.topic for e in built().subscriptions}
    for height, width in ((64, 64), (240, 320)):
        small = robot_file(tmp_path / "s.yaml", cameras=[agent, wrist | {"height": height, "width": width}])
        with pytest.raises(EmbodimentMismatch, match=f"camera wrist: {height}x{width} does not fit 128x128"):
            built(embodiment=small)


def test_the_node_runs_what_its_command_line_names(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of(heads=(HeadConfig("words", "tokens", 0, 9),), text_vocab=512)
    cores: list[PolicyCore] = []
    devices: list[str] = []
    monkeypatch.setattr("vla.checkpoints.bundle.load", lambda path, device: (devices.append(device), bundle)[1])
    monkeypatch.setattr("ros_nodes.policies.bundle_path", lambda name: name)
    monkeypatch.setattr(VlaPolicy, "warm_up", lambda self: None)
    monkeypatch.setattr("ros_nodes.wheel_shell.run", lambda core, options: cores.append(core))
    policy_node.main(["--policy", "somewhere"])
    words = ["--decoder", "jacobi", "window=3", "--pruning", "score", "layer=1", "--reuse", "flashvla"]
    policy_node.main([*words, "--ensembling", "act", "decay=0.2", "--policy", "somewhere"])
    policy_node.main(["--policy", "somewhere", "--device", "auto"])
    with pytest.raises(ConfigError, match="device: expected auto, cpu, or cuda or cuda:N that is there, got 'cuda:99'"):
        policy_node.main(["--policy", "somewhere", "--device", "cuda:99"])
    assert devices == ["cpu", "cpu", "cuda:0" if torch.cuda.is_available() else "cpu"]
    plain, full, _ = (core._policy for core in cores)
    assert cores[0].status(Now(0, 0)).values["device"] == "cpu"
    assert isinstance(plain, VlaPolicy) and isinstance(plain.decoder, AutoregressiveDecoder)
    assert isinstance(full, EnsemblingPolicy) and full.rule.decay == 0.2 and isinstance(full.policy, ReusePolicy)
    inner = full.policy.policy
    assert isinstance(inner, VlaPolicy) and inner.decoder.window == 3 and inner.selection.drop is False  # type: ignore
    with pytest.raises(ConfigError, match="expected a bundle, got 'hold'"):
        policy_node.main(["--policy", "hold", "--embodiment", "tabletop", "--decoder", "jacobi"])
    with pytest.raises(ConfigError, match="device: expected a bundle to run there, got 'hold'"):
        policy_node.main(["--policy", "hold", "--embodiment", "tabletop", "--device", "cuda"])


def test_requests_survive_the_wire_exactly() -> None:
    committed = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    request = Request(1, 2, 3, 4, 5, 6, 7, 8, committed)
    back = Request.read(m.Text(request.text().data))
    assert np.array_equal(back.committed, committed)
    assert all(getattr(back, k) == getattr(request, k) for k in vars(request) if k != "committed")
    with pytest.raises(TransportError, match="finite"):
        Request.read(m.Text(re.sub(r'"committed":.*', '"committed":[[NaN]]}', request.text().data)))
    identity = ChunkId(1, 2, 3, 4, 5, 6)
    assert ChunkId.read(identity.text()) == identity
    notes = (("window", 16.0), ("missed", float("inf")))
    for offsets in ((), (-5, 7)):
        told = dataclasses.replace(identity, offsets_ns=offsets, notes=notes)
        assert ChunkId.read(told.text()) == told
        for some in ((), notes, ((CONFIDENCE, 0.75),)):
            reused = dataclasses.replace(told, notes=some, reused="angle 3.5 deg, overlap 97 % / score")
            assert ChunkId.read(reused.text()) == reused
    report = reused.report
    assert (report.confidence, report.notes, report.reused) == (0.75, {}, reused.reused)
    many = dataclasses.replace(identity, notes=(("a/b", 1.0), *((f"note_{i}", i / 7) for i in range(99))))
    back = ChunkId.read(many.text()).notes
    assert len(many.text()) <= MAX_ID_CHARS and 10 < len(back) < 99 and back[1] == ("note_1", 0.142857)
    for text in (
        "",
        "v2/1/2/3/4/5/6",
        "v1/1/2",
        "v1/a/2/3/4/5/6",
        "v1/1/2/3/4/5/6//a=b",
        "v1/1/2/3/4/5/6///",
        "v1/1/2/3/4/5/6///a/b",
    ):
        with pytest.raises(TransportError, match="chunk frame_id"):
            ChunkId.read(text)
