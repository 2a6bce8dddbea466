"""A small robot that is recorded without middleware: messages go through the recorder's core as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ros_nodes import messages as m
from ros_nodes.node import INSTRUCTION, JOINT_STATES, RECORD, Effects, Job, Now, Send
from ros_nodes.recorder_node import RecorderCore, robot_topics
from vla.embodiment import Camera, Embodiment, Joint
from vla.types import ControlMode

MS = 1_000_000
T0 = 1_700_000_000_000_000_000
PERIOD = 50 * MS
NAMES = ("shoulder", "elbow", "gripper")
COMMANDS = "/two/commands"
ROBOT = Embodiment(
    name="two", rate_hz=20, action_space="joint_position", action_names=NAMES, action_units=("rad", "rad", "m"),
    state_names=NAMES, rotation_format="none", gripper_open=1, control_mode=ControlMode.JOINT_POSITION,
    cameras=(Camera("front", 16, 24, "/camera/front/image_raw"), Camera("wrist", 16, 16, "/camera/wrist/image_raw")),
    joints=tuple(Joint(name, -3.0, 3.0, 2.0, 10.0) for name in NAMES), command_topic=COMMANDS,
)  # fmt: skip


def position(time_ns: int) -> np.ndarray:
    """Where the joints are at a time: linear in it, so that interpolation is exact up to rounding."""
    seconds = (time_ns - T0) / 1e9
    return np.array([0.1 * seconds, -0.2 * seconds, 1.0 if seconds >= 0.5 else 0.0])


def command(number: int) -> np.ndarray:
    return np.array([number, number + 0.5, -number]) * 1e-2


def picture(number: int, camera: Camera) -> np.ndarray:
    """A plain colour that says which frame it is."""
    return np.full((camera.height, camera.width, 3), (10 * number % 200, 40, 200 - 5 * number % 100), np.uint8)


class Take:
    """One recorder. `give` hands it a message received at a time; jobs run at once unless `hold_jobs`.

    without: topics whose messages never arrive.
    """

    def __init__(
        self,
        out: Path,
        robot: Embodiment = ROBOT,
        compressed: bool = False,
        without: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        options = {"min_free_bytes": 0, "name": robot.name, **options}
        self.core = RecorderCore(robot_topics(robot, compressed), out, **options)
        self.robot, self.compressed, self.without = robot, compressed, without
        self.sent: list[Send] = []
        self.jobs: list[Job] = []
        self.hold_jobs = False
        self.now_ns, self.steady_ns = T0, MS

    def perform(self, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, Job):
                self.jobs.append(effect)
            else:
                self.sent.append(effect)
        while self.jobs and not self.hold_jobs:
            job = self.jobs.pop(0)
            try:
                value = job.run()
            except Exception as error:
                value = error
            self.perform(self.core.on_result(job.name, value, self._now()))

    def _now(self) -> Now:
        return Now(self.now_ns, self.steady_ns, self.steady_ns)

    def give(self, topic: str, message: m.Message, at_ns: int) -> None:
        if topic in self.without:
            return
        self.now_ns = at_ns
        raw = m.Raw(message.type_name, bytes(m.encode(message)))
        self.perform(self.core.on_message(topic, raw, self._now()))

    def tick(self) -> dict[str, Any]:
        """The status that the recorder publishes."""
        self.steady_ns += 1000 * MS
        before = len(self.sent)
        self.perform(self.core.tick(self._now()))
        return self.sent[before].message.object()  # type: ignore[union-attr]

    def mark(self, word: str, at_ns: int) -> None:
        self.give(RECORD.topic, m.Text(word), at_ns)

    def say(self, text: str, at_ns: int = T0) -> None:
        self.give(INSTRUCTION.topic, m.Text(text), at_ns)

    def finish(self) -> list[Path]:
        self.hold_jobs = False
        self.perform(self.core.close(self._now()))
        return self.core.bags


def scene(
    take: Take,
    periods: int = 20,
    start_ns: int = T0,
    *,
    names: tuple[str, ...] = NAMES,
    dropped: tuple[int, ...] = (),
    camera_offset_ns: int = 0,
    joints: bool = True,
    joints_ms: int = 10,
) -> None:
    """Pictures every 50 ms, joint states every `joints_ms`, a command 3 ms after each picture, as a robot sends them.

    dropped: pictures of the wrist camera that never come. camera_offset_ns: what the cameras' clock is ahead.
    """
    order = [NAMES.index(name) if name in NAMES else -1 for name in names]
    for step in range(periods * 50):
        at = start_ns + step * MS
        if joints and step % joints_ms == 0:
            values = np.append(position(at), 9.0)[order]
            take.give(JOINT_STATES.topic, m.JointState(at, names, values), at + MS // 2)
        if step % 50 == 2:  # 2 ms from the camera to here
            number = (at - T0) // PERIOD
            for camera in take.robot.cameras:
                if camera.name != "wrist" or number not in dropped:
                    stamp = at - 2 * MS + camera_offset_ns
                    take.give(*frame(take, camera, number, stamp), at)
        if step % 50 == 3:
            take.give(take.robot.command_topic, m.Values(command((at - T0) // PERIOD)), at)


def frame(take: Take, camera: Camera, number: int, stamp_ns: int) -> tuple[str, m.Message]:
    pixels = picture(number, camera)
    if not take.compressed:
        return camera.topic, m.Image(stamp_ns, camera.name, "rgb8", pixels)
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    message = m.CompressedImage(stamp_ns, camera.name, "rgb8; png compressed bgr8", buffer.getvalue())
    return f"{camera.topic}/compressed", message


def episode(out: Path, periods: int = 20, words: str = "push the cube", **options: Any) -> Path:
    """A recording of one episode, from start to stop."""
    keys = ("names", "dropped", "camera_offset_ns", "joints", "joints_ms")
    how = {key: options.pop(key) for key in keys if key in options}
    take = Take(out, **options)
    take.say(words, T0 - 5 * MS)
    take.mark("start", T0 - MS)
    scene(take, periods, **how)
    take.mark("stop", T0 + periods * PERIOD)
    return take.finish()[-1]
