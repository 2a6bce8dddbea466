"""The recorder: what it writes, when, and what it does when the disk is slow, full or gone."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mcap.reader import make_reader
from recordings import MS, PERIOD, ROBOT, T0, Take, command, episode, picture, scene
from rosbags.highlevel import AnyReader

from ros_nodes import messages as m
from ros_nodes import recorder_node
from ros_nodes.bag import Bag, BagWriter
from ros_nodes.graph import free_domain
from ros_nodes.node import INSTRUCTION, JOINT_STATES, RECORD, RECORD_STATUS, SENSOR, Endpoint
from ros_nodes.recorder_node import RecorderCore, parse_topic, read_mark, robot_topics
from ros_nodes.wire import Participant
from vla.errors import ConfigError, DataError, TransportError

ROOT = Path(__file__).resolve().parents[2]


def contents(path: Path) -> list[tuple[str, int, bytes]]:
    with Bag(path) as bag:
        return list(bag.messages(bag.topics))


def test_other_readers_find_what_came_on_the_wire(tmp_path: Path) -> None:
    path = episode(tmp_path)
    front = ROBOT.cameras[0]
    with AnyReader([path]) as reader:
        counts = {name: topic.msgcount for name, topic in reader.topics.items()}
        assert counts[front.topic] == counts["/two/commands"] == 20 and counts["/joint_states"] == 100
        assert counts["/vla/record"] == 2 and counts["/vla/instruction"] == 1
        read = [(c.topic, at, reader.deserialize(data, c.msgtype)) for c, at, data in reader.messages()]
    images = [(at, message) for topic, at, message in read if topic == front.topic]
    for number, (at, message) in enumerate(images):
        assert message.header.stamp.nanosec == (T0 + number * PERIOD) % 10**9 and at == T0 + number * PERIOD + 2 * MS
        assert message.encoding == "rgb8" and message.data.tobytes() == picture(number, front).tobytes()
    sent = [message.data for topic, _, message in read if topic == "/two/commands"]
    assert np.array_equal(sent, [command(number) for number in range(20)])


def test_the_file_is_what_rosbag2_writes(tmp_path: Path) -> None:
    path = episode(tmp_path)
    info = yaml.safe_load((path / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    file = path / info["relative_file_paths"][0]
    assert sorted(p.name for p in path.iterdir()) == sorted([file.name, "metadata.yaml"])
    assert info["version"] == 5 and info["storage_identifier"] == "mcap"
    with file.open("rb") as stream:
        reader = make_reader(stream)
        assert reader.get_header().profile == "ros2"
        summary = reader.get_summary()
        kinds = {schema.name: schema for schema in summary.schemas.values()}
        assert {schema.encoding for schema in kinds.values()} == {"ros2msg"}
        assert b"MSG: std_msgs/Header" in kinds["sensor_msgs/msg/Image"].data
        channels = {channel.topic: channel for channel in summary.channels.values()}
        assert {channel.message_encoding for channel in channels.values()} == {"cdr"}
        qos = yaml.safe_load(channels[ROBOT.cameras[0].topic].metadata["offered_qos_profiles"])[0]
        assert (qos["reliability"], qos["durability"], qos["history"]) == (2, 2, 1)
        latched = yaml.safe_load(channels["/vla/instruction"].metadata["offered_qos_profiles"])[0]
        assert (latched["reliability"], latched["durability"]) == (1, 1)
        counted = summary.statistics.channel_message_counts
    listed = {t["topic_metadata"]["name"]: t["message_count"] for t in info["topics_with_message_count"]}
    assert listed == {topic: counted.get(channel.id, 0) for topic, channel in channels.items()}
    assert info["message_count"] == sum(listed.values()) == info["files"][0]["message_count"]
    assert info["starting_time"]["nanoseconds_since_epoch"] == T0 - 5 * MS


def test_every_message_type_that_is_recorded_has_a_definition(tmp_path: Path) -> None:
    kinds = {endpoint.type_name for endpoint in robot_topics(ROBOT, compressed=True)}
    writer = BagWriter(tmp_path / "x", robot_topics(ROBOT, compressed=True), "humble")
    assert "sensor_msgs/msg/CompressedImage" in kinds
    writer.close()
    with AnyReader([tmp_path / "x"]) as reader:
        assert kinds <= set(reader.typestore.types)


def test_waiting_for_start_writes_one_recording_per_episode(tmp_path: Path) -> None:
    take = Take(tmp_path, wait=True)
    take.say("push the cube")
    scene(take, 4)  # nobody said start
    assert list(tmp_path.iterdir()) == []
    for number in range(2):
        begin = T0 + (1 + number) * 10 * PERIOD
        take.mark("start", begin)
        scene(take, 4, begin)
        take.mark("stop" if number == 0 else "discard", begin + 4 * PERIOD)
        scene(take, 1, begin + 5 * PERIOD)
    first, second = take.finish()
    for path in (first, second):
        read = contents(path)
        topics = [topic for topic, _, _ in read]
        assert topics[:2] == ["/vla/instruction", "/vla/record"] and topics[-1] == "/vla/record"
        assert topics.count("/two/commands") == 4
    assert take.core.episodes == 1 and first.name != second.name
    assert not list(tmp_path.glob("*.incomplete"))


def test_the_end_of_the_recorder_ends_the_episode(tmp_path: Path) -> None:
    take = Take(tmp_path)
    take.mark("start", T0)
    scene(take, 2)
    (path,) = take.finish()
    marks = [m.decode(m.Text.type_name, data).data for topic, _, data in contents(path) if topic == RECORD.topic]
    assert [read_mark(text) for text in marks] == ["start", "stop"] and "end of recording" in marks[1]
    assert Take(tmp_path / "none").finish() == []  # nothing came: no empty recording


def test_marks(tmp_path: Path) -> None:
    assert [read_mark(text) for text in (" start\n", '{"op": "discard"}')] == ["start", "discard"]
    for text in ("begin", "{", '{"op": 3}', ""):
        with pytest.raises(TransportError):
            read_mark(text)
    take = Take(tmp_path, wait=True)
    take.mark("star", T0)
    assert "star" in take.tick()["error"] and take.core.status().level == m.WARN and take.core.state == "waiting"
    take.mark("start", T0 + MS)
    assert take.tick()["error"] == "" and take.core.state == "recording"


def test_received_time_is_when_it_came_not_when_it_was_handled(tmp_path: Path) -> None:
    from ros_nodes.node import Now

    for simulated, expected in ((False, T0 - 30 * MS), (True, T0)):
        take = Take(tmp_path / str(simulated), simulated=simulated)
        raw = m.Raw(m.Text.type_name, bytes(m.encode(m.Text("go"))))
        take.perform(take.core.on_message("/vla/instruction", raw, Now(T0, 70 * MS, 40 * MS)))
        assert contents(take.finish()[0])[0][1] == expected


def test_before_simulated_time_begins_only_latched_words_are_kept(tmp_path: Path) -> None:
    take = Take(tmp_path, simulated=True)
    take.say("push", 0)
    take.mark("start", 0)
    assert take.core.state == "waiting" and take.core.summary()["before_clock"] == 2
    take.give(JOINT_STATES.topic, m.JointState(5, ("a",), np.zeros(1)), 10 * MS)
    topics = [(topic, at) for topic, at, _ in contents(take.finish()[0])]
    assert topics == [("/vla/instruction", 10 * MS), ("/joint_states", 10 * MS)]


def test_a_slow_disk_drops_pictures_first_and_says_so(tmp_path: Path) -> None:
    take = Take(tmp_path, queue_bytes=400_000)
    take.hold_jobs = True  # the disk hangs
    big = np.zeros((200, 200, 3), np.uint8)
    for step in range(40):
        at = T0 + step * MS
        take.give(ROBOT.cameras[0].topic, m.Image(at, "front", "rgb8", big), at)
        take.give("/two/commands", m.Values(command(step)), at)
    status = take.tick()
    assert status["dropped"] == {ROBOT.cameras[0].topic: 37} and status["queued_mb"] < 0.5
    assert take.core.status().level == m.WARN
    (path,) = take.finish()
    with Bag(path) as bag:
        assert bag.topics["/two/commands"].messages == 40 and bag.topics[ROBOT.cameras[0].topic].messages == 3
        assert json.loads(bag.facts["dropped"]) == {ROBOT.cameras[0].topic: 37}


def test_a_disk_that_runs_full_completes_the_recording(tmp_path: Path, monkeypatch: Any) -> None:
    take = Take(tmp_path, min_free_bytes=1000)
    usage = type("Usage", (), {"free": 2000})
    monkeypatch.setattr(recorder_node.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(recorder_node, "SPACE_CHECK_S", 0.0)
    scene(take, 2)
    usage.free = 10
    scene(take, 1, T0 + 2 * PERIOD)
    assert take.core.state == "stopped" and "MiB free" in take.tick()["error"]
    (path,) = take.core.bags
    with Bag(path) as bag:
        assert bag.facts["ended"] == "disk full" and not bag.incomplete
    take.mark("start", T0 + 4 * PERIOD)  # still full
    assert take.core.state == "stopped" and len(take.core.bags) == 1
    usage.free = 2000
    take.mark("start", T0 + 5 * PERIOD)
    scene(take, 1, T0 + 5 * PERIOD)
    assert len(take.finish()) == 2 and recorder_node.report(take.core) == 0


def test_a_disk_that_refuses_leaves_what_it_took(tmp_path: Path, monkeypatch: Any) -> None:
    take = Take(tmp_path)
    scene(take, 60)
    write = BagWriter.write

    def refuse(self: BagWriter, *arguments: Any) -> None:
        write(self, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BagWriter, "write", refuse)
    scene(take, 1, T0 + 60 * PERIOD)
    assert "No space left" in take.tick()["error"] and take.core.status().level == m.ERROR
    assert take.finish() == [] and recorder_node.report(take.core) == 1
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".incomplete") and take.core.left == [left]
    with Bag(left) as bag:
        assert "not finished" in bag.incomplete and bag.topics["/two/commands"].messages > 10


def test_recordings_are_never_written_over(tmp_path: Path) -> None:
    paths = {episode(tmp_path, 1) for _ in range(3)}
    assert len(paths) == 3 and all(path.is_dir() for path in paths)
    with pytest.raises(ConfigError, match="free"):
        BagWriter(next(iter(paths)), robot_topics(ROBOT))


def test_topics_can_be_added_and_left_out(tmp_path: Path) -> None:
    assert parse_topic("/tf:tf2_msgs/msg/TFMessage") == Endpoint(
        "/tf", "tf2_msgs/msg/TFMessage", recorder_node.Quality(True, 100)
    )
    assert parse_topic("/scan:sensor_msgs/msg/LaserScan:best_effort").quality.reliable is False
    for text in ("/tf", "tf:tf2_msgs/msg/TFMessage", "/tf:tf2_msgs/TFMessage", "/a:b/msg/C:maybe"):
        with pytest.raises(ConfigError):
            parse_topic(text)
    with pytest.raises(ConfigError, match="Imag"):
        BagWriter(tmp_path / "x", [Endpoint("/cam", "sensor_msgs/msg/Imagee", SENSOR)])
    core = RecorderCore([], tmp_path)
    assert [endpoint.topic for endpoint in core.subscriptions] == [RECORD.topic]
    assert all(endpoint.raw for endpoint in core.subscriptions) and RECORD_STATUS in core.publications


def test_a_recording_cut_anywhere_is_read_up_to_there(tmp_path: Path) -> None:
    path = episode(tmp_path, 100)
    whole = contents(path)
    file = next(path.glob("*.mcap"))
    (path / "metadata.yaml").unlink()
    data = file.read_bytes()
    lengths = []
    for cut in (0, 1, 30, 5_000, 60_000, 120_000):
        file.write_bytes(data[: len(data) - cut])
        read = contents(path)
        lengths.append(len(read))
        assert read == whole[: len(read)]
        with Bag(path) as bag:
            assert bool(bag.incomplete) == bool(cut)
    assert lengths[0] == lengths[1] == len(whole) > lengths[4] > lengths[5] > 0


def test_what_is_no_recording_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.mcap").write_bytes(b"no")
    (tmp_path / "x.bag").write_bytes(b"#ROSBAG V2.0")
    for name in ("empty", "x.mcap", "x.bag", "absent"):
        with pytest.raises(DataError, match="rosbag2 recording"), Bag(tmp_path / name):
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_process_ends_by_signal(tmp_path: Path, number: signal.Signals) -> None:
    """Over DDS, as users run it: Ctrl-C leaves a whole recording, a kill a readable one with a name that says so."""
    domain = free_domain()
    arguments = ["--embodiment", "tabletop", "--domain", str(domain), "--out", str(tmp_path), "--min-free", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ros_nodes.recorder_node", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        with Participant("test_robot", domain=domain) as robot:
            camera = Endpoint("/camera/agentview/image_raw", m.Image.type_name, SENSOR)
            pictures = robot.publisher(*[camera.topic, camera.type_name, camera.quality])
            joints = robot.publisher(JOINT_STATES.topic, JOINT_STATES.type_name, JOINT_STATES.quality)
            robot.start()
            deadline = time.monotonic() + 60
            while not (pictures.readers and joints.readers) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert pictures.readers and joints.readers
            for step in range(100):
                stamp = T0 + step * MS
                pictures.publish(m.encode(m.Image(stamp, "c", "rgb8", np.full((128, 128, 3), step, np.uint8))))
                joints.publish(m.encode(m.JointState(stamp, ("a",), np.array([float(step)]))))
                time.sleep(0.005)
            time.sleep(0.2)
            process.send_signal(number)
            out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    (path,) = tmp_path.iterdir()
    with Bag(path) as bag:
        read = list(bag.messages(["/joint_states"]))
        values = [m.decode(m.JointState.type_name, data).positions[0] for _, _, data in read]
        if number is signal.SIGINT:
            assert process.returncode == 0 and out.strip() == str(path) and not bag.incomplete
            assert values == list(range(100))
        else:
            assert path.name.endswith(".incomplete") and bag.incomplete
            assert values == list(range(len(values))) and len(values) > 80  # the last chunk is lost, no more


def test_marks_are_said_from_the_command_line(capsys: Any) -> None:
    from vla.cli.main import main

    domain, heard = free_domain(), []
    words = ["record", "--say", "start", "--domain", str(domain)]
    assert main([*words[:2], "begin", *words[3:]]) == 2 and "'begin' is unknown" in capsys.readouterr().err
    assert main(["record"]) == 2 and "--robot" in capsys.readouterr().err
    with Participant("listener", domain=domain) as listener:
        for endpoint in (RECORD, INSTRUCTION):
            listener.subscribe(
                endpoint.topic, endpoint.type_name, endpoint.quality,
                lambda data, _: heard.append(m.decode(m.Text.type_name, data).data),
            )  # fmt: skip
        listener.start()
        assert main([*words, "--instruction", "fold the towel"]) == 0
    assert heard == ["fold the towel", "start"]
