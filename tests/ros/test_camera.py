"""The camera node: its core by plain calls, its sources on generated videos, and both shells end to end."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from shells import ROOT, SHELLS, command, graph, ros_environment

from ros_nodes import camera_node, capture, settings
from ros_nodes import messages as m
from ros_nodes.camera_node import LATE_NS, RETRY_NS, CameraCore
from ros_nodes.capture import Device, File, Frame
from ros_nodes.node import (
    CHUNK,
    DIAGNOSTICS,
    HEARTBEAT,
    INSTRUCTION,
    JOINT_STATES,
    REQUEST,
    Effects,
    Job,
    Now,
    Send,
    pictures_of,
)
from ros_nodes.request import Request
from vla.errors import ConfigError, DataError
from vla.resources import load_embodiment

T0 = 1_000_000_000_000
MS = 1_000_000
TOPIC = "/camera/front/image_raw"
RATE_HZ, COUNT = 20, 8


def level(number: int) -> int:
    """Brightness of picture `number` of `film`."""
    return 20 + 25 * number


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COUNT pictures of 48x64, lossless: flat ones, each brighter, with one red corner at the top left."""
    path = tmp_path_factory.mktemp("film") / "film.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=RATE_HZ)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for number in range(COUNT):
            picture = np.full((48, 64, 3), level(number), np.uint8)
            picture[:8, :8] = (255, 0, 0)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="bgr0")))
        out.mux(stream.encode())
    return path


# ---- sources ----
def frames(source: Any, count: int) -> list[Frame]:
    source.open()
    found = [source.read() for _ in range(count)]
    source.close()
    return found


def test_a_file_is_read_exactly_and_ends(film: Path) -> None:
    *found, last = frames(File(str(film)), COUNT + 1)
    assert last is None
    for number, frame in enumerate(found):
        assert frame.pixels.shape == (48, 64, 3) and frame.at_ns == number * 50 * MS
        assert np.all(frame.pixels[10:] == level(number)) and np.all(frame.pixels[:8, :8] == (255, 0, 0))


def test_a_file_in_a_loop_goes_on_one_period_after_its_end(film: Path) -> None:
    found = frames(File(str(film), loop=True), 2 * COUNT + 1)
    assert [frame.at_ns for frame in found] == [number * 50 * MS for number in range(2 * COUNT + 1)]
    assert [frame.pixels[20, 20, 0] for frame in found] == [level(n % COUNT) for n in range(2 * COUNT + 1)]


def test_a_file_at_another_rate_and_size(film: Path) -> None:
    found = frames(File(str(film), (24, 32), rate_hz=100.0, scaled=True), 3)
    assert [frame.at_ns for frame in found] == [0, 10 * MS, 20 * MS]
    assert found[2].pixels.shape == (24, 32, 3) and np.all(found[2].pixels[:4, :4] == (255, 0, 0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda film: File(str(film), (24, 32)), r"film.mkv: expected 24x32, got 48x64. Say `resize`"),
        (lambda film: File("nowhere.mp4"), "nowhere.mp4: expected a video file, got no such file"),
        (lambda film: File(__file__), "expected a camera or a video"),
        (lambda film: Device("/dev/video-none"), "/dev/video-none: expected a camera .* got No such file .* Plug"),
        (lambda film: Device(str(film)), "film.mkv: expected a camera"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(film: Path, make: Any, message: str) -> None:
    source = make(film)
    with pytest.raises(DataError, match=message):
        source.open()
    source.close()


def pattern(**options: Any) -> Device:
    """FFmpeg's test picture in place of a device: it has the same interface, and keeps time."""
    return Device("testsrc=size=64x48:rate=50,realtime", driver="lavfi", **options)


def test_a_device_gives_pictures_as_they_come() -> None:
    device = pattern()
    device.open()
    device.open()  # nothing
    device.read()
    before_ns = time.monotonic_ns()
    found = [device.read() for _ in range(5)]
    after_ns = time.monotonic_ns()
    device.close()
    assert all(frame is not None and frame.pixels.shape == (48, 64, 3) for frame in found)
    stamps = [frame.at_ns for frame in found if frame]
    assert before_ns <= stamps[0] and stamps == sorted(set(stamps)) and stamps[-1] <= after_ns
    assert after_ns - before_ns > 60 * MS


class Driver:
    """What a driver may do, in the place of a container: each call of decode gives the next thing of the script."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)

    def decode(self, stream: Any) -> Any:
        item = self.script.pop(0) if self.script else BlockingIOError()
        if isinstance(item, Exception):
            raise item
        yield item

    def close(self) -> None:
        pass


class Shot:
    def __init__(self, at_s: float | None, value: int) -> None:
        self.time, self.value = at_s, value

    def to_ndarray(self, format: str) -> np.ndarray:
        return np.full((2, 2, 3), self.value, np.uint8)


def device_with(*script: Any) -> Device:
    device = Device("/dev/video0")
    device._container, device._stream = Driver(*script), None
    return device


def test_a_drivers_stamp_counts_where_it_is_of_the_steady_clock() -> None:
    now_s = time.monotonic()
    old, cut, wait = Shot(now_s - 0.5, 1), av.InvalidDataError(1, "cut short"), BlockingIOError()
    frame = device_with(old, cut, wait, Shot(now_s - 0.03, 2)).read()
    assert frame is not None and frame.pixels[0, 0, 0] == 2 and abs(frame.at_ns - (now_s - 0.03) * 1e9) < 1000
    for other in (None, 17.0, time.time()):
        frame = device_with(Shot(other, 3)).read()
        assert frame is not None and 0 <= frame.at_ns - now_s * 1e9 < 1e9


def test_a_device_that_goes_away_or_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="/dev/video0: expected pictures, got No such device"):
        device_with(av.error.OSError(19, "No such device")).read()
    monkeypatch.setattr(capture, "SILENT_S", 0.05)
    with pytest.raises(DataError, match=r"none for 0.05 s\. Plug it in again"):
        device_with().read()


# ---- the core ----
class Script:
    """A source that does what it is told: Frames, None at the end, or errors."""

    name = "script"

    def __init__(self, live: bool, *items: Any) -> None:
        self.live, self.items, self.calls = live, list(items), list[str]()
        self.refuse: Exception | None = None

    def open(self) -> None:
        self.calls.append("open")
        if self.refuse is not None:
            raise self.refuse

    def read(self) -> Any:
        item = self.items.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self.calls.append("close")


class Shell:
    """A shell without threads: jobs run when told."""

    def __init__(self, source: Any, **options: Any) -> None:
        self.core = CameraCore(source, TOPIC, "front", **options)
        self.time_ns, self.offset_ns = 0, T0
        self.sent: list[Send] = []
        self.jobs: list[Job] = []

    def now(self) -> Now:
        return Now(self.time_ns + self.offset_ns, self.time_ns)

    def perform(self, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.sent.append(effect)
            else:
                assert isinstance(effect, Job)
                self.jobs.append(effect)

    def work(self) -> None:
        job = self.jobs.pop(0)
        try:
            value = job.run()
        except Exception as error:
            value = error
        self.perform(self.core.on_result(job.name, value, self.now()))

    def at(self, time_ns: int) -> Shell:
        self.time_ns = time_ns
        self.perform(self.core.tick(self.now()))
        return self

    def pictures(self, topic: str = TOPIC) -> list[Any]:
        return [send.message for send in self.sent if send.topic == topic]

    @property
    def status(self) -> m.Status:
        (status,) = self.pictures(DIAGNOSTICS.topic)[-1].statuses
        return status


def frame(at_ns: int, value: int = 0) -> Frame:
    return Frame(np.full((2, 2, 3), value, np.uint8), at_ns)


def test_a_files_pictures_leave_when_they_are_due() -> None:
    shell = Shell(Script(False, frame(0, 1), frame(50 * MS, 2), frame(100 * MS, 3), None))
    shell.at(7 * MS).work()  # opens
    shell.work()
    assert [picture.stamp_ns for picture in shell.pictures()] == [T0 + 7 * MS]  # the first one, at once
    shell.work()  # decodes ahead
    assert shell.core.next_tick_ns == 57 * MS and not shell.jobs
    assert len(shell.at(56 * MS).pictures()) == 1 and len(shell.at(60 * MS).pictures()) == 2
    assert shell.pictures()[1].stamp_ns == T0 + 57 * MS  # when it was due, not when it left
    shell.at(107 * MS).work()  # the third is read only now, and due
    shell.work()
    assert [p.pixels[0, 0, 0] for p in shell.pictures()] == [1, 2, 3]
    assert (shell.status.level, shell.status.message) == (m.OK, "the file has ended") and not shell.jobs
    assert shell.core.next_tick_ns > shell.time_ns and shell.status.values["published"] == "3"


def test_a_file_that_was_held_up_goes_on_from_now() -> None:
    shell = Shell(Script(False, *(frame(n * 50 * MS, n) for n in range(5))))
    for _ in range(3):
        (shell.work if shell.jobs else lambda: shell.at(0))()
    shell.work()
    late_ns = 50 * MS + LATE_NS + 1
    shell.at(late_ns)
    assert [p.stamp_ns - T0 for p in shell.pictures()] == [0, late_ns]
    shell.work()
    assert shell.core.next_tick_ns == late_ns + 50 * MS


def test_a_devices_picture_is_stamped_with_the_moment_it_was_taken() -> None:
    shell = Shell(Script(True, frame(90 * MS, 5)), transport="both")
    shell.at(100 * MS).work()
    shell.work()
    (raw,), (jpeg,) = shell.pictures(), shell.pictures(f"{TOPIC}/compressed")
    assert raw.stamp_ns == jpeg.stamp_ns == T0 + 90 * MS and raw.frame_id == jpeg.frame_id == "front"
    assert raw.encoding == "rgb8" and jpeg.format == "rgb8; jpeg compressed bgr8"
    assert np.abs(jpeg.rgb().astype(int) - raw.rgb()).max() <= 2
    assert shell.jobs  # the next one is waited for at once


@pytest.mark.parametrize("topic", [TOPIC, f"{TOPIC}/compressed"])
@pytest.mark.parametrize("transport", ["raw", "compressed", "both"])
def test_topics_say_what_they_carry(topic: str, transport: str) -> None:
    core = CameraCore(Script(True), topic, transport=transport)
    *pictures, diagnostics = core.publications
    assert diagnostics == DIAGNOSTICS and len({e.topic for e in pictures}) == len(pictures) > 0
    for endpoint in pictures:
        kind = m.CompressedImage if endpoint.topic.endswith("/compressed") else m.Image
        assert endpoint.type_name == kind.type_name and not endpoint.quality.reliable and endpoint.quality.depth == 5
    names = {e.topic.removeprefix(TOPIC) for e in pictures}
    wanted = {"raw": {""}, "compressed": {"/compressed"}, "both": {"", "/compressed"}}[transport]
    assert names == (wanted if topic == TOPIC else {"/compressed"})


def test_a_device_that_was_unplugged_is_tried_again_and_diagnostics_say_so() -> None:
    source = Script(True, frame(0), DataError("unplugged"), frame(3 * RETRY_NS))
    shell = Shell(source)
    shell.at(0).work()
    shell.work()
    shell.work()
    assert (shell.status.level, shell.status.message) == (m.ERROR, "unplugged") and source.calls[-1] == "close"
    assert shell.status.name == "vla_camera: front"
    assert not shell.jobs and shell.core.next_tick_ns == RETRY_NS
    source.refuse = DataError("still away")
    shell.at(RETRY_NS).work()
    assert shell.status.message == "still away" and not shell.jobs
    source.refuse = None
    shell.at(2 * RETRY_NS).work()
    shell.at(3 * RETRY_NS).work()
    assert len(shell.pictures()) == 2
    assert shell.at(4 * RETRY_NS).status.level == m.OK and shell.status.values["failures"] == "1"


def test_a_damaged_file_is_not_begun_anew() -> None:
    shell = Shell(Script(False, frame(0), DataError("damaged")))
    shell.at(0).work()
    shell.work()
    shell.work()
    assert shell.at(10 * RETRY_NS).status.message == "damaged" and not shell.jobs


def test_deactivated_it_lets_go_of_the_device() -> None:
    source = Script(True, frame(0), frame(0), frame(0))
    shell = Shell(source)
    shell.at(0).work()
    shell.perform(shell.core.hold(shell.now()))
    assert shell.core.held and len(shell.jobs) == 1  # a read goes on: the device cannot be closed now
    shell.work()
    shell.work()
    assert source.calls == ["open", "close"] and not shell.pictures() and not shell.jobs
    assert not shell.at(5 * RETRY_NS).jobs
    shell.core.release()
    assert shell.core.next_tick_ns <= shell.time_ns
    shell.at(shell.time_ns).work()
    shell.work()
    assert source.calls[-1] == "open" and len(shell.pictures()) == 1


def test_simulated_time_stamps_and_waits_for_its_beginning() -> None:
    shell = Shell(Script(True, frame(0), frame(0)), simulated=True)
    shell.offset_ns = 0
    shell.at(0).work()
    shell.work()
    assert not shell.pictures()
    shell.offset_ns = 77
    shell.work()
    assert [picture.stamp_ns for picture in shell.pictures()] == [77]


def test_what_is_not_our_own_error_is_not_swallowed() -> None:
    shell = Shell(Script(True, ZeroDivisionError()))
    shell.at(0).work()
    with pytest.raises(ZeroDivisionError):
        shell.work()


# ---- settings ----
def made(film: Path, **values: Any) -> CameraCore:
    options = settings.options(settings.CAMERA, {"source": str(film), **values})
    return camera_node.build(argparse.Namespace(**vars(options), use_sim_time=False))


def test_the_robot_says_topic_and_size(film: Path) -> None:
    robot = load_embodiment("tabletop")
    core = made(film, embodiment="tabletop", camera="wrist", resize=True)
    assert core.publications[0] == pictures_of(robot.camera("wrist").topic) and core._frame_id == "wrist"
    read = core._source.read()
    assert read is not None and read.pixels.shape == (128, 128, 3)
    assert made(film).publications[0].topic == "/camera/image_raw"
    for values, error in {
        ("embodiment", "tabletop"): "expected 128x128, got 48x64",
        ("width", 64): "expected both or neither",
        ("camera", "wrist"): "expected the robot with camera 'wrist'",
    }.items():
        with pytest.raises((ConfigError, DataError), match=error):
            made(film, **dict([values]))
    with pytest.raises(ConfigError, match="wrst"):
        made(film, embodiment="tabletop", camera="wrst")


# ---- end to end ----
@pytest.mark.parametrize("shell", SHELLS)
def test_a_film_arrives_whole_in_colour_and_on_time(shell: str, film: Path) -> None:
    raw, jpeg = pictures_of(TOPIC), pictures_of(TOPIC, compressed=True)
    deep = [dataclasses.replace(e, quality=dataclasses.replace(e.quality, depth=50)) for e in (raw, jpeg)]
    with graph(shell) as found:
        for endpoint in (*deep, DIAGNOSTICS):
            found.listen(endpoint)
        found.operator.start()
        values = {"source": str(film), "topic": TOPIC, "loop": True, "transport": "both", "frame_id": "front"}
        process = found.start("camera", **values)
        found.wait(lambda: min(len(found.heard[e.topic]) for e in deep) > 45, "pictures")
        report = found.hear(DIAGNOSTICS.topic, lambda d: float(d.statuses[0].values["rate_hz"]) > 0)
        assert found.end(process) == (0, "")
        pictures: list[Any] = found.heard[raw.topic]
        compressed: list[Any] = found.heard[jpeg.topic]
    for picture in pictures:
        assert (picture.encoding, picture.frame_id) == ("rgb8", "front") and picture.pixels.shape == (48, 64, 3)
        assert np.all(picture.pixels[:8, :8] == (255, 0, 0)) and np.ptp(picture.pixels[10:]) == 0
    numbers = [(int(picture.pixels[20, 20, 0]) - level(0)) // 25 for picture in pictures]
    steps = np.diff(numbers) % COUNT
    assert steps.min() >= 1 and np.mean(steps == 1) > 0.9, numbers  # none comes twice; best effort may lose one
    gaps_ms = np.diff([picture.stamp_ns for picture in pictures]) / MS
    assert np.median(gaps_ms) == pytest.approx(1e3 / RATE_HZ, abs=0.1) and gaps_ms.min() > 0
    assert abs(pictures[-1].stamp_ns - time.time_ns()) < 120e9
    by_stamp = {picture.stamp_ns: picture for picture in pictures}
    pairs = [(by_stamp[c.stamp_ns], c) for c in compressed if c.stamp_ns in by_stamp]
    assert len(pairs) > 40
    assert max(np.abs(c.rgb()[12:].astype(int) - p.pixels[12:]).max() for p, c in pairs) <= 8
    assert report.statuses[0].message == "publishing" and report.statuses[0].values["source"] == str(film)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_policy_sees_what_cameras_send_compressed(shell: str, film: Path) -> None:
    robot = load_embodiment("tabletop")
    with graph(shell) as found:
        for endpoint in (HEARTBEAT, CHUNK):
            found.listen(endpoint)
        for endpoint in (INSTRUCTION, JOINT_STATES, REQUEST):
            found.publisher(endpoint)
        found.operator.start()
        # Two processes, so their pictures are up to half a period apart.
        found.start("policy", policy="hold", embodiment="tabletop", compressed=True, slop=0.1)
        values = {"source": str(film), "embodiment": "tabletop", "resize": True, "loop": True}
        for camera in robot.camera_names:
            found.start("camera", camera=camera, transport="compressed", **values)
        found.say(INSTRUCTION, m.Text("push the red cube"))
        seen = [f"picture/{camera}" for camera in robot.camera_names]
        found.hear(HEARTBEAT.topic, lambda beat: all(key in beat.values for key in seen))
        request = Request(0, 1, 0, time.time_ns() - 10**9)
        found.say(REQUEST, request.text())
        names = robot.command_names

        def moved() -> bool:
            joints = m.JointState(time.time_ns(), names, np.zeros(len(names)))
            found.say(JOINT_STATES, joints)
            return bool(found.heard[CHUNK.topic])

        found.wait(moved, "chunk")
        beat = found.hear(HEARTBEAT.topic, lambda beat: beat.values["chunks"] == "1")
        assert beat.level == m.OK, beat.message
        assert float(beat.values["first_action_ms_p50"]) >= float(beat.values["latency_ms_p50"]) > 0
        for process in reversed(found.processes):
            assert found.end(process) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_camera_that_is_not_there_is_one_message(shell: str) -> None:
    words = command(shell, "camera", 0, source="/dev/video-none")
    run = subprocess.run(words, cwd=ROOT, env=ros_environment(0), capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "/dev/video-none: expected a camera" in run.stderr and "Traceback" not in run.stderr
