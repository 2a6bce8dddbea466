"""Camera node: a V4L2 device or a video file in, pictures out. For desks without a camera driver.

    python -m ros_nodes.camera_node --source /dev/video2 --embodiment so101 --camera wrist
    python -m ros_nodes.camera_node --source drive.mp4 --loop --topic /camera/front/image_raw --transport both

A device is read on the worker thread, and its pictures are stamped with the moment they were taken. One that is
unplugged or falls silent is tried again every second, and /diagnostics says so meanwhile. A file is played at its own
rate or at `--rate`, one picture decoded ahead, stamped with the moment each was due. CameraInfo is not published: an
uncalibrated one would say nothing, and nothing here reads it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ros_nodes import entry
from ros_nodes.capture import Device, File, Frame, Source
from ros_nodes.messages import ERROR, OK, CompressedImage, Diagnostics, Image, Message, Status
from ros_nodes.node import DIAGNOSTICS, Effect, Effects, Job, Now, Periodic, Send, pictures_of
from ros_nodes.pictures import JPEG_FORMAT, compress
from vla.errors import ConfigError, VlaError, explain
from vla.types import NS_PER_S

TRANSPORTS = {"raw": (False,), "compressed": (True,), "both": (False, True)}  # which are compressed
REPORT_NS = NS_PER_S
RETRY_NS = NS_PER_S
LATE_NS = 100_000_000  # a file that is played later than this goes on from now, instead of hurrying after its times


class CameraCore:
    """source: what gives pictures. topic: of sensor_msgs/Image; `<topic>/compressed` carries CompressedImage.

    transport: raw, compressed or both; a topic that ends with /compressed is of that kind anyway. quality: of JPEGs, 1
    to 95. simulated: stamps are /clock's, and nothing is published before it began.
    """

    name = "vla_camera"
    subscriptions = ()

    def __init__(
        self,
        source: Source,
        topic: str,
        frame_id: str = "camera",
        transport: str = "raw",
        quality: int = 90,
        simulated: bool = False,
    ):
        pictures = (pictures_of(topic, compressed) for compressed in TRANSPORTS[transport])
        self._endpoints = tuple({endpoint.topic: endpoint for endpoint in pictures}.values())
        self.publications = (*self._endpoints, DIAGNOSTICS)
        self._source, self._frame_id, self._quality, self._simulated = source, frame_id, quality, simulated
        self._compressed = any(endpoint.type_name == CompressedImage.type_name for endpoint in self._endpoints)
        self._reports = Periodic(REPORT_NS)
        self._busy = False  # the source is in the hands of the worker thread
        self._ready: tuple[Frame, bytes] | None = None  # the file's next picture
        self._begin_ns: int | None = None  # steady time of the file's first picture
        self._retry_ns = 0  # steady time
        self._fault, self._ended, self._failures = "", False, 0
        self._published = 0
        self._told = (0, 0)  # (steady time, published) of the last report
        self.held = False  # by the shell: nothing is read and published

    @property
    def next_tick_ns(self) -> int:
        if self._ready is not None:
            return min(self._reports.next_ns, self._due_ns(self._ready[0]))
        idle = self._busy or self.held or self._ended
        return self._reports.next_ns if idle else min(self._reports.next_ns, self._retry_ns)

    # ---- reading, on the worker thread ----
    def _read(self) -> tuple[Frame, bytes] | None:
        """The next picture and, if wanted, its JPEG."""
        try:
            frame = self._source.read()
        except VlaError:
            self._source.close()
            raise
        if frame is None:
            return None
        return frame, compress(frame.pixels, self._quality) if self._compressed else b""

    # ---- what comes back ----
    def on_result(self, name: str, value: Any, now: Now) -> Effects:
        if name == "close":
            return ()
        self._busy = False
        if isinstance(value, Exception) and not isinstance(value, VlaError):
            raise value  # all that a source can do is a VlaError: this is a fault of ours
        if self.held:
            return (Job("close", self._source.close),)
        if isinstance(value, VlaError):
            self._failures += not self._fault
            self._fault, self._ended = str(value), not self._source.live
            self._retry_ns = now.steady_ns + RETRY_NS
            return (self._report(now),)
        if name == "open":
            return self._next("read")
        self._fault = ""
        if value is None:
            self._ended = True
            return (self._report(now),)
        if self._source.live:
            frame, jpeg = value
            return (*self._publish(frame, jpeg, frame.at_ns, now), *self._next("read"))
        self._ready = value
        return self._play(now)

    def _next(self, name: str) -> Effects:
        self._busy = True
        return (Job(name, self._source.open if name == "open" else self._read),)

    # ---- time ----
    def tick(self, now: Now) -> Effects:
        effects: list[Effect] = list(self._play(now))
        if not (self._busy or self.held or self._ended or self._ready) and now.steady_ns >= self._retry_ns:
            effects += self._next("open")  # nothing where it is open
        if self._reports.due(now.steady_ns):
            effects.append(self._report(now))
        return effects

    def _due_ns(self, frame: Frame) -> int:
        return frame.at_ns + (self._begin_ns or 0)

    def _play(self, now: Now) -> Effects:
        """The file's next picture, when it is due."""
        if self._ready is None:
            return ()
        frame, jpeg = self._ready
        if self._begin_ns is None or now.steady_ns - self._due_ns(frame) > LATE_NS:
            self._begin_ns = now.steady_ns - frame.at_ns
        if now.steady_ns < self._due_ns(frame):
            return ()
        self._ready = None
        return (*self._publish(frame, jpeg, self._due_ns(frame), now), *self._next("read"))

    def _publish(self, frame: Frame, jpeg: bytes, taken_ns: int, now: Now) -> list[Effect]:
        stamp_ns = now.stamp_ns - (0 if self._simulated else now.steady_ns - taken_ns)
        if stamp_ns <= 0:
            return []
        self._published += 1
        pictures: dict[str, Message] = {
            Image.type_name: Image(stamp_ns, self._frame_id, "rgb8", frame.pixels),
            CompressedImage.type_name: CompressedImage(stamp_ns, self._frame_id, JPEG_FORMAT, jpeg),
        }
        return [Send(endpoint.topic, pictures[endpoint.type_name]) for endpoint in self._endpoints]

    # ---- nothing is subscribed ----
    def on_message(self, topic: str, message: Message, now: Now) -> Effects:
        return ()

    def on_reject(self, topic: str, reason: str, now: Now) -> Effects:
        return ()

    # ---- reports ----
    def _report(self, now: Now) -> Send:
        begin_ns, published = self._told
        self._told = now.steady_ns, self._published
        rate_hz = (self._published - published) * NS_PER_S / max(now.steady_ns - begin_ns, 1) if begin_ns else 0.0
        text = self._fault or ("the file has ended" if self._ended else "publishing" if self._published else "starting")
        values = {"source": self._source.name, "published": str(self._published), "rate_hz": f"{rate_hz:.1f}",
                  "failures": str(self._failures)}  # fmt: skip
        status = Status(ERROR if self._fault else OK, f"{self.name}: {self._frame_id}", text, values)
        return Send(DIAGNOSTICS.topic, Diagnostics(now.stamp_ns, (status,)))

    # ---- life ----
    def hold(self, now: Now) -> Effects:
        """Deactivated: the device is let go."""
        self.held, self._ready, self._begin_ns = True, None, None
        return () if self._busy else (Job("close", self._source.close),)

    def release(self) -> None:
        self.held, self._ended, self._retry_ns = False, False, 0

    def close(self, now: Now) -> Effects:
        if not self._busy:  # else a read may go on, and the container is freed with it
            self._source.close()
        return ()

    def summary(self) -> dict[str, Any]:
        return {"published": self._published, "failures": self._failures, "fault": self._fault}


def build(options: argparse.Namespace) -> CameraCore:
    """The core that CAMERA of ros_nodes/settings.py describes, its source open: a wrong one is an error now."""
    if bool(options.width) != bool(options.height):
        got = f"width {options.width}, height {options.height}"
        raise ConfigError(explain("width, height", "both or neither", got, "State both."))
    size = (options.height, options.width) if options.width else None
    topic, name = "/camera/image_raw", "camera"
    if options.embodiment:
        from vla.resources import load_embodiment

        robot = load_embodiment(options.embodiment)
        camera = robot.camera(options.camera) if options.camera else robot.cameras[0]
        topic, name, size = camera.topic, camera.name, size or (camera.height, camera.width)
    elif options.camera:
        raise ConfigError(explain("embodiment", f"the robot with camera {options.camera!r}", "none", "Name it."))
    source: Source
    if options.source.startswith("/dev/"):
        source = Device(options.source, size, options.rate, options.pixel_format, options.resize)
    else:
        source = File(options.source, size, options.rate, options.loop, options.resize)
    source.open()
    frame_id = options.frame_id or name
    return CameraCore(
        source, options.topic or topic, frame_id, options.transport, options.quality, options.use_sim_time
    )


def main(arguments: list[str] | None = None) -> int:
    return entry.on_wheel("camera", arguments)


if __name__ == "__main__":
    sys.exit(entry.run(main))
