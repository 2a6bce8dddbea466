"""Recordings to a data set: what is in it is what was published, and what cannot be is named and left out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from recordings import COMMANDS, MS, NAMES, PERIOD, ROBOT, T0, Take, command, episode, picture, position, scene

from ros_nodes import convert as conversion
from ros_nodes import messages as m
from ros_nodes.bag import Bag, BagWriter
from ros_nodes.convert import Report, Settings, convert
from ros_nodes.node import JOINT_STATES, STATE_VECTOR, Endpoint
from ros_nodes.recorder_node import robot_topics
from ros_nodes.recording import Recording
from vla.cli.main import main
from vla.data.lerobot import LeRobotDataset
from vla.embodiment import Embodiment, Output
from vla.errors import ConfigError, DataError, TransportError
from vla.types import ControlMode

PIXEL = 6  # what the video codec may change


def made(path: Path) -> LeRobotDataset:
    return LeRobotDataset(path)


def check(data: LeRobotDataset, periods: int = 20, first: int = 1, number: int = 0) -> None:
    """One episode holds the published pictures, states and commands of samples first..periods-1."""
    rows = slice(data.episodes[number].start, data.episodes[number].stop)
    assert data.episodes[number].length == periods - first
    times = T0 + PERIOD * np.arange(first, periods)
    assert np.array_equal(data.column("observation.state")[rows], np.stack([position(t) for t in times]).astype("f4"))
    expected = np.stack([command(k) for k in range(first, periods)]).astype("f4")
    assert np.array_equal(data.column("action")[rows], expected)
    for camera in ROBOT.cameras:
        frames = list(data.frames(camera.name, rows.start, rows.stop))
        for k, frame in enumerate(frames, first):
            assert np.abs(frame.astype(int) - picture(k, camera)).max() <= PIXEL, f"{camera.name} {k}"


def reasons(report: Report) -> str:
    return "; ".join(left.text for left in report.skipped)


def test_a_data_set_holds_what_was_published(tmp_path: Path) -> None:
    """The first sample is the first with a command before it; the action of a sample is sent during its period."""
    path = episode(tmp_path / "bags")
    report = convert([path], ROBOT, tmp_path / "data")
    assert (report.episodes, report.frames, report.skipped, report.notes) == (1, 19, [], [])
    data = made(tmp_path / "data")
    check(data)
    assert (
        data.fps == 20
        and data.tasks == ("push the cube",)
        and data.cameras == tuple(camera.name for camera in ROBOT.cameras)
    )
    assert data.embodiment() == ROBOT and not list(tmp_path.glob("*.work"))
    (kept,) = data.collection()["episodes"]
    assert kept["recording"] == path.name and kept["start_ns"] == T0 + PERIOD and kept["repeated"] == {
        "front": 0, "wrist": 0,
    }  # fmt: skip


def test_compressed_pictures_and_joints_in_another_order(tmp_path: Path) -> None:
    names = ("wheel", "gripper", "shoulder", "elbow")
    path = episode(tmp_path / "bags", compressed=True, names=names)
    convert([path], ROBOT, tmp_path / "data")
    check(made(tmp_path / "data"))


def test_a_picture_that_cannot_be_decoded_costs_its_episode(tmp_path: Path) -> None:
    take = Take(tmp_path / "bags", compressed=True)
    take.say("go", T0 - 2 * MS)
    for begin in (0, 6):
        take.mark("start", T0 + begin * PERIOD - MS)
        scene(take, 5, T0 + begin * PERIOD)
        if begin:
            at = T0 + 8 * PERIOD
            broken = m.CompressedImage(at, "c", "jpeg", b"\xff\xd8 cut short")
            take.give(f"{ROBOT.cameras[0].topic}/compressed", broken, at + 2 * MS)
        take.mark("stop", T0 + (begin + 5) * PERIOD)
    report = convert(take.finish(), ROBOT, tmp_path / "data")
    assert report.episodes == 1 and report.frames == 4
    assert "episode 1: /camera/front/image_raw/compressed: compressed image: expected a whole jpeg" in reasons(report)
    for kind, data in (("16UC1; compressedDepth png", b""), ("tiff", b""), ("png", bytes(99))):
        with pytest.raises(TransportError):
            m.CompressedImage(0, "c", kind, data).rgb()


def test_joint_states_between_samples_are_interpolated(tmp_path: Path) -> None:
    """Joint states at 7 ms never fall on the samples; the gripper, which jumps at 0.5 s, is never in between."""
    path = episode(tmp_path / "bags", joints_ms=7)
    convert([path], ROBOT, tmp_path / "data")
    data = made(tmp_path / "data")
    times = T0 + PERIOD * np.arange(1, 20)
    expected = np.stack([position(t) for t in times])
    state = data.column("observation.state")
    assert np.allclose(state[:, :2], expected[:, :2], atol=1e-6) and set(state[:, 2].tolist()) == {0.0, 1.0}


def test_an_episode_ends_with_its_last_joint_state(tmp_path: Path) -> None:
    """At 15 Hz the last joint state comes before the last sample, as the recorder stops: that is no hole."""
    path = episode(tmp_path / "bags", joints_ms=66)
    report = convert([path], ROBOT, tmp_path / "data")
    last = (20 * 50 - 1) // 66 * 66
    assert report.frames == last // 50 and not report.skipped


def test_one_lost_frame_is_noted_and_more_end_the_episode(tmp_path: Path) -> None:
    one = episode(tmp_path / "one", dropped=(7, 12))
    report = convert([one], ROBOT, tmp_path / "data")
    data = made(tmp_path / "data")
    assert report.notes == [f"{one.name}, episode 0: camera wrist shows 2 frames twice"]
    frames = list(data.frames("wrist", 0, len(data)))
    assert np.abs(frames[7 - 1].astype(int) - picture(6, ROBOT.cameras[1])).max() <= PIXEL
    assert np.abs(frames[8 - 1].astype(int) - picture(8, ROBOT.cameras[1])).max() <= PIXEL
    three = episode(tmp_path / "three", dropped=(7, 8, 9))
    report = convert([one, three], ROBOT, tmp_path / "both")
    assert report.episodes == 1 and "camera wrist: nothing for 0.150 s, 0.451 s after the start" in reasons(report)
    wide = convert([three], ROBOT, tmp_path / "wide", Settings(image_slop_s=0.2))
    assert wide.episodes == 1 and not wide.skipped


def test_clocks_that_differ_are_refused_or_aligned(tmp_path: Path) -> None:
    path = episode(tmp_path / "bags", camera_offset_ns=3200 * MS)
    with pytest.raises(DataError, match=r"front/image_raw: received -3\.198 s after it was stamped.*aligned"):
        convert([path], ROBOT, tmp_path / "data")
    for clock in ("aligned", "received"):
        report = convert([path], ROBOT, tmp_path / clock, Settings(clock=clock))
        data = made(tmp_path / clock)
        assert report.episodes == 1 and np.array_equal(
            data.column("action"), np.stack([command(k) for k in range(1, 19)]).astype("f4")
        )
        frames = list(data.frames("front", 0, len(data)))
        assert np.abs(frames[4].astype(int) - picture(5, ROBOT.cameras[0])).max() <= PIXEL


def test_unstamped_messages_are_named(tmp_path: Path) -> None:
    take = Take(tmp_path / "bags")
    take.say("go")
    for step in range(40):
        at = T0 + step * 10 * MS
        take.give(JOINT_STATES.topic, m.JointState(0, NAMES, np.zeros(3)), at)
        for camera in ROBOT.cameras:
            take.give(camera.topic, m.Image(at, "c", "rgb8", picture(0, camera)), at)
        take.give(COMMANDS, m.Values(np.zeros(3)), at)
    path = take.finish()[0]
    with pytest.raises(DataError, match="joint_states: messages without a stamp"):
        convert([path], ROBOT, tmp_path / "data", Settings(whole=True))
    assert convert([path], ROBOT, tmp_path / "data", Settings(whole=True, clock="received")).episodes == 1


def other_types(tmp_path: Path) -> Path:
    """A recording whose wrist camera is a point cloud, and that lacks commands."""
    endpoints = [
        Endpoint(ROBOT.cameras[0].topic, m.Image.type_name),
        Endpoint(ROBOT.cameras[1].topic, "sensor_msgs/msg/PointCloud2"),
        JOINT_STATES,
    ]
    writer = BagWriter(tmp_path / "odd", endpoints)
    for step in range(20):
        at = T0 + step * PERIOD
        image = m.Image(at, "c", "rgb8", picture(step, ROBOT.cameras[0]))
        writer.write(ROBOT.cameras[0].topic, at, bytes(m.encode(image)))
        writer.write(ROBOT.cameras[1].topic, at, bytes(64))
        writer.write(JOINT_STATES.topic, at, bytes(m.encode(m.JointState(at, NAMES, position(at)))))
    return writer.close()


def test_a_missing_topic_and_a_wrong_type_are_named_and_the_rest_is_made(tmp_path: Path, capsys: Any) -> None:
    good, odd = episode(tmp_path / "bags"), other_types(tmp_path)
    robot = tmp_path / "two.yaml"
    robot.write_text(yaml.safe_dump(ROBOT.to_dict()))
    common = ["--robot", str(robot)]
    strict = ["convert", str(good), str(odd), *common, "--out", str(tmp_path / "none"), "--strict"]
    assert main(strict) == 2 and not (tmp_path / "none").exists()
    assert "--strict: 1 left out" in capsys.readouterr().err
    out = tmp_path / "data"
    assert main(["convert", str(good), str(odd), *common, "--out", str(out), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (left,) = report["skipped"]
    assert left["recording"] == "odd" and left["episode"] == -1
    assert f"{COMMANDS}: no such topic" in left["reason"]
    assert "wrist/image_raw: expected sensor_msgs/msg/Image or sensor_msgs/msg/CompressedImage, got sensor_msgs/msg/" \
        "PointCloud2" in left["reason"]  # fmt: skip
    check(made(out))
    assert main(["convert", str(good), str(odd), *common, "--out", str(out)]) == 1  # already there: says the same
    assert "left out: odd" in capsys.readouterr().err
    assert main(["convert", str(good), *common, "--out", str(tmp_path / "good")]) == 0
    assert main(["convert", str(odd), *common, "--out", str(tmp_path / "bad")]) == 2


def marked(tmp_path: Path, words: list[tuple[str, int]], periods: int = 30) -> Path:
    take = Take(tmp_path / "bags", name="marks")
    take.say("push the cube", T0 - MS)
    pending = [(word, T0 + at * PERIOD - MS) for word, at in words]
    for number in range(periods):
        while pending and pending[0][1] < T0 + number * PERIOD:
            take.mark(*pending.pop(0))
        scene(take, 1, T0 + number * PERIOD)
    for mark in pending:
        take.mark(*mark)
    return take.finish()[0]


def test_episodes_lie_between_marks(tmp_path: Path) -> None:
    words = [("start", 0), ("stop", 6), ("start", 8), ("start", 10), ("stop", 16), ("start", 18), ("discard", 22)]
    path = marked(tmp_path, words)
    report = convert([path], ROBOT, tmp_path / "data")
    assert report.episodes == 2 and [left.episode for left in report.skipped] == [1, 3]
    assert "begun again 0.100 s after its start" in reasons(report) and "discarded" in reasons(report)
    assert [episode.length for episode in made(tmp_path / "data").episodes] == [4, 4]
    whole = convert([path], ROBOT, tmp_path / "whole", Settings(whole=True))
    assert whole.episodes == 1 and whole.frames == 28
    with pytest.raises(DataError, match="--whole"):
        convert([marked(tmp_path, [])], ROBOT, tmp_path / "unmarked")


def test_commands_of_the_episode_before_are_not_in_force(tmp_path: Path) -> None:
    take = Take(tmp_path / "bags")
    take.say("go", T0 - MS)
    scene(take, 4)
    take.mark("start", T0 + 4 * PERIOD - MS)
    for number in range(4, 10):  # the operator's first command comes in the third period
        scene(take, 1, T0 + number * PERIOD)
    take.mark("stop", T0 + 10 * PERIOD)
    path = take.finish()[0]
    convert([path], ROBOT, tmp_path / "data")
    assert made(tmp_path / "data").collection()["episodes"][0]["start_ns"] == T0 + 5 * PERIOD


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("words", "instruction changes: other / push"), ("nan", "joint states: NaN"), ("silent", "instruction (pass")],
)
def test_episodes_with_a_fault_are_named(tmp_path: Path, fault: str, reason: str) -> None:
    take = Take(tmp_path / "bags")
    if fault != "silent":
        take.say("push", T0 - 2 * MS)
    take.mark("start", T0 - MS)
    scene(take, 10)
    if fault == "words":
        take.say("other", T0 + 5 * PERIOD)
    if fault == "nan":
        take.give(JOINT_STATES.topic, m.JointState(T0 + 250 * MS, NAMES, np.array([0, np.nan, 0])), T0 + 251 * MS)
    take.mark("stop", T0 + 10 * PERIOD)
    path = take.finish()[0]
    with pytest.raises(DataError, match="at least one episode") as caught:
        convert([path], ROBOT, tmp_path / "data")
    assert reason in str(caught.value)
    if fault != "nan":
        assert convert([path], ROBOT, tmp_path / "said", Settings(instruction="push the cube")).episodes == 1
        assert made(tmp_path / "said").tasks == ("push the cube",)


def test_pictures_of_another_size_or_encoding(tmp_path: Path) -> None:
    path = episode(tmp_path / "bags", 6)
    half = dataclasses.replace(
        ROBOT, cameras=tuple(dataclasses.replace(c, height=c.height // 2, width=c.width // 2) for c in ROBOT.cameras)
    )
    with Bag(path) as bag:
        bag.facts.clear()
        with pytest.raises(DataError, match=r"front.*expected 8x12.*got 16x24.*--resize.*wrist") as caught:
            Recording(bag, half)
        assert "refuse" not in str(caught.value)  # averaged at run time as well
        cameras = tuple(dataclasses.replace(c, width=c.width // 2) for c in ROBOT.cameras)
        with pytest.raises(DataError, match=r"front.*expected 16x12.*got 16x24.*--resize.*policy node will refuse"):
            Recording(bag, dataclasses.replace(ROBOT, cameras=cameras))
        recording = Recording(bag, half, resize_frames=True)
        (frame,) = recording.frames("front", [3])
        assert np.array_equal(frame, picture(3, half.cameras[0]))
        places = [0, 0, 2, 5, 5, 5]
        numbers = [frame[0, 0, 0] // 10 for frame in recording.frames("wrist", places)]
        assert numbers == places and list(recording.frames("wrist", [])) == []
    writer = BagWriter(tmp_path / "depth", [Endpoint(c.topic, m.Image.type_name) for c in ROBOT.cameras])
    raw = bytes(m.encode(m.Image(T0, "c", "rgb8", picture(0, ROBOT.cameras[0])))).replace(b"rgb8", b"16UC")
    for camera in ROBOT.cameras:
        writer.write(camera.topic, T0, raw)
    with pytest.raises(DataError, match="no such topic"), Bag(writer.close()) as bag:
        Recording(bag, ROBOT)
    with Bag(tmp_path / "depth") as bag, pytest.raises(DataError):
        Recording(bag, ROBOT, needs_commands=False)


def test_a_recording_of_another_robot_is_refused(tmp_path: Path) -> None:
    take = Take(tmp_path / "bags", facts={"embodiment": json.dumps(dataclasses.replace(ROBOT, rate_hz=10).to_dict())})
    take.say("go")
    take.mark("start", T0)
    scene(take, 5)
    with pytest.raises(DataError, match="rate_hz"):
        convert(take.finish(), ROBOT, tmp_path / "data")


def test_a_killed_recorder_loses_only_the_episode_it_was_at(tmp_path: Path) -> None:
    words = [("start", 0), ("stop", 60), ("start", 65)]
    path = marked(tmp_path, words, 130)
    with Bag(path) as bag:
        assert not bag.incomplete
    left = path.rename(path.with_name(path.name + ".incomplete"))
    (left / "metadata.yaml").unlink()
    file = next(left.glob("*.mcap"))
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * 0.7)])
    report = convert([left], ROBOT, tmp_path / "data")
    assert report.episodes == 1 and "no stop" in reasons(report) and "not finished" in report.notes[0]
    check(made(tmp_path / "data"), 59)


def test_an_interrupted_conversion_goes_on_and_makes_the_same(tmp_path: Path) -> None:
    paths = [episode(tmp_path / "bags", 8 + number) for number in range(3)]
    convert(paths, ROBOT, tmp_path / "at_once")

    def stop(name: str, done: int, total: int) -> None:
        if name == paths[2].name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(paths, ROBOT, tmp_path / "data", on_progress=stop)
    work = tmp_path / "data.work"
    assert not (tmp_path / "data").exists() and len(list((work / "episodes").iterdir())) == 2
    (work / "episodes" / ".half.part").mkdir()
    with pytest.raises(ConfigError, match=r"settings\.whole"):
        convert(paths, ROBOT, tmp_path / "data", Settings(whole=True))
    began: list[str] = []
    writing = conversion._write
    conversion._write = lambda shard, *rest: (began.append(shard.name), writing(shard, *rest))[1]
    try:
        convert(paths, ROBOT, tmp_path / "data")
    finally:
        conversion._write = writing
    assert len(began) == 1 and not work.exists()
    assert made(tmp_path / "data").fingerprint == made(tmp_path / "at_once").fingerprint
    with pytest.raises(ConfigError, match="free path"):
        convert(paths[:1], ROBOT, tmp_path / "data")
    with pytest.raises(ConfigError, match="each once"):
        convert([paths[0], paths[0]], ROBOT, tmp_path / "twice")


def test_trajectories_are_commands_too(tmp_path: Path) -> None:
    """A JointTrajectory in force is where it has led by the end of the period; names decide the order."""
    path = episode(tmp_path / "bags", 10)
    with Bag(path) as bag:
        messages, topics = list(bag.messages(bag.topics)), bag.topics
    endpoints = [
        Endpoint(name, m.Trajectory.type_name if name == COMMANDS else topic.type_name)
        for name, topic in topics.items()
    ]
    writer = BagWriter(tmp_path / "trajectories", endpoints)
    order = (2, 0, 1)
    for topic, at, data in messages:
        if topic == COMMANDS:
            values = m.decode(m.Values.type_name, data).data[list(order)]
            names = tuple(NAMES[place] for place in order)
            points = np.stack([values, values + 0.1, values + 0.1])
            data = bytes(m.encode(m.Trajectory(0, names, points, (0, 94 * MS, 200 * MS))))
        writer.write(topic, at, data)
    convert([writer.close()], ROBOT, tmp_path / "data")
    expected = np.stack([command(k) for k in range(1, 10)]) + 0.05  # sent 3 ms into the period: 47 of 94 ms
    assert np.allclose(made(tmp_path / "data").column("action"), expected, atol=1e-6)


def test_robots_with_several_outputs(tmp_path: Path) -> None:
    """An arm on a trajectory topic under the driver's names, a gripper that takes action goals, which no topic has."""
    arm = Output("/arm/joint_trajectory", "trajectory", NAMES[:2], ("a", "b"))
    goals = Output("/gripper/goals", "gripper_command", NAMES[2:])
    robot = dataclasses.replace(ROBOT, command_topic="", outputs=(arm, goals))
    assert {e.topic: e.type_name for e in robot_topics(robot)}[arm.topic] == m.Trajectory.type_name
    take = Take(tmp_path / "bags", robot)
    take.say("go")
    take.mark("start", T0 - MS)
    for step in range(12):
        at = T0 + step * PERIOD
        take.give(JOINT_STATES.topic, m.JointState(at, NAMES, np.array([0, 0, 0.1 * step])), at)
        for camera in robot.cameras:
            take.give(camera.topic, m.Image(at, "c", "rgb8", picture(step, camera)), at)
        points = np.array([[-step, step], [-step, step]]) * 0.1
        take.give(arm.topic, m.Trajectory(at, ("b", "a"), points, (50 * MS, 90 * MS)), at + 3 * MS)
    take.mark("stop", T0 + 11 * PERIOD)
    paths = take.finish()
    with pytest.raises(DataError, match=r"/gripper/goals: gripper_command is no position on a topic\. Pass --measured"):
        convert(paths, robot, tmp_path / "data")
    convert(paths, robot, tmp_path / "data", Settings(measured=True))
    steps = np.arange(1, 11)[:, None] * 0.1
    expected = np.concatenate([steps, -steps, steps + 0.1], axis=1)  # the gripper: where it was as the period ended
    assert np.allclose(made(tmp_path / "data").column("action"), expected)


def test_a_guided_arm_needs_no_commands(tmp_path: Path) -> None:
    take = Take(tmp_path / "bags", without=(COMMANDS,))
    take.say("go")
    take.mark("start", T0 - MS)
    scene(take, 8)
    take.mark("stop", T0 + 8 * PERIOD)
    paths = take.finish()
    with pytest.raises(DataError, match="no messages"):
        convert(paths, ROBOT, tmp_path / "data")
    convert(paths, ROBOT, tmp_path / "data", Settings(measured=True))
    expected = np.stack([position(T0 + k * PERIOD) for k in range(1, 9)])
    assert np.allclose(made(tmp_path / "data").column("action"), expected, atol=2e-3)  # up to 10 ms of motion


def test_robots_that_publish_their_state_vector(tmp_path: Path) -> None:
    names = ("ee_x", "ee_rx", "ee_ry", "ee_rz", "gripper")
    robot = Embodiment(
        name="osc", rate_hz=20, action_space="osc_delta", action_names=("dx", "gripper"), action_units=("m", "1"),
        state_names=names, rotation_format="axis_angle", gripper_open=1, control_mode=ControlMode.OSC_DELTA,
        cameras=ROBOT.cameras[:1], command_topic=COMMANDS,
    )  # fmt: skip
    take = Take(tmp_path / "bags", robot)
    take.say("go")
    take.mark("start", T0)
    for step in range(12):
        at = T0 + step * PERIOD
        state = np.array([0.1 * step, 3.1 if step % 2 else -3.1, 0, 0, step % 2])
        take.give(STATE_VECTOR.topic, m.JointState(at - 20 * MS, names, state), at)
        take.give(robot.cameras[0].topic, m.Image(at, "c", "rgb8", picture(step, robot.cameras[0])), at)
        take.give(COMMANDS, m.Values(np.array([step, -step]) * 0.1), at)
    report = convert(take.finish(), robot, tmp_path / "data")
    data = made(tmp_path / "data")
    assert report.frames == len(data) == 10 and np.allclose(data.column("action")[:, 0], 0.1 * np.arange(1, 11))
    state = data.column("observation.state")
    assert np.allclose(state[:, 0], 0.1 * np.arange(1, 11) + 0.04)
    assert np.allclose(np.abs(state[:, 1]), 3.1) and set(state[:, 4].tolist()) == {0.0, 1.0}


def test_what_lies_beside_the_data_set_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError):
        convert([episode(tmp_path / "bags", 4)], ROBOT, tmp_path / "data")
    assert (tmp_path / "data" / "mine.txt").read_text() == "keep"
    shutil.rmtree(tmp_path / "data")
