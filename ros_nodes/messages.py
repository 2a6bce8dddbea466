"""The one place where our types, ROS 2 messages and CDR bytes meet. numpy and rosbags, no middleware.

Node cores see the small frozen classes below; both shells (DDS wheel, rclpy) carry the bytes that `encode` writes and
`decode` reads: XCDR1 little-endian with its 4-byte encapsulation header, padded to 4 bytes, as every ROS 2 RMW
serialises. Images have a path of their own (header and pixels in one buffer; a zero-copy view when read); everything
else goes through the codec of the `rosbags` package.

Time: a ROS stamp is (sec: int32, nanosec: uint32); everywhere else it is `stamp_ns`, and the conversion is here only.
Bytes from a network are never trusted: whatever is truncated or malformed raises TransportError and nothing else.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.store import Typestore

from ros_nodes.discovery import GraphInfo as GraphInfo
from ros_nodes.discovery import GraphNode as GraphNode
from ros_nodes.discovery import graph_from, graph_to
from ros_nodes.pictures import decompress, size_of
from vla.errors import ConfigError, TransportError, explain, nearest
from vla.types import NS_PER_S, ActionChunk

CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "mono8": 1}
MAX_JSON_CHARS = 65_536
_DISTROS = {"humble": Stores.ROS2_HUMBLE, "jazzy": Stores.ROS2_JAZZY, "lyrical": Stores.ROS2_LYRICAL}
DISTROS = tuple(_DISTROS)


@functools.cache
def typestore(distro: str = "jazzy") -> Typestore:
    """Message definitions of one ROS 2 distribution; the graph messages differ (a GID has 24 bytes or 16)."""
    if distro not in _DISTROS:
        raise ConfigError(f"distro: {distro!r} is unknown. {nearest(distro, _DISTROS)}")
    return get_typestore(_DISTROS[distro])


# ---- time ----
def to_stamp(stamp_ns: int) -> tuple[int, int]:
    """Nanoseconds to (sec, nanosec); ROS stamps are int32 seconds, so TransportError outside 1901..2038."""
    sec, nanosec = divmod(int(stamp_ns), NS_PER_S)
    if not -(2**31) <= sec < 2**31:
        raise TransportError(
            explain("stamp_ns", "seconds that fit int32", f"{sec} s", "Stamp messages with the graph's clock.")
        )
    return sec, nanosec


def from_stamp(sec: int, nanosec: int) -> int:
    """(sec, nanosec) to nanoseconds."""
    return int(sec) * NS_PER_S + int(nanosec)


# ---- messages as the cores see them ----
@dataclass(frozen=True, eq=False)
class Image:
    """sensor_msgs/Image. pixels: uint8[H, W, C] in the channel order of `encoding` (one of CHANNELS)."""

    type_name: ClassVar[str] = "sensor_msgs/msg/Image"
    stamp_ns: int
    frame_id: str
    encoding: str
    pixels: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def rgb(self) -> np.ndarray:
        """uint8[H, W, 3] RGB: a view of `pixels` whatever the encoding."""
        if self.encoding == "bgr8":
            return self.pixels[..., ::-1]
        if self.encoding == "mono8":
            return np.broadcast_to(self.pixels, (*self.pixels.shape[:2], 3))
        return self.pixels[..., :3]


@dataclass(frozen=True, eq=False)
class CompressedImage:
    """sensor_msgs/CompressedImage. format: as image_transport writes it, with "jpeg" or "png" in it. data: the file."""

    type_name: ClassVar[str] = "sensor_msgs/msg/CompressedImage"
    stamp_ns: int
    frame_id: str
    format: str
    data: bytes

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as the file states it, read without decoding. TransportError as `rgb`."""
        return size_of(self.format, self.data)

    def rgb(self) -> np.ndarray:
        """uint8[H, W, 3] RGB, decoded. TransportError for another format, and for a file that is damaged or huge."""
        return decompress(self.format, self.data)


@dataclass(frozen=True, eq=False)
class JointState:
    """sensor_msgs/JointState. positions, velocities, efforts: float64[J] in the order of `names`, or float64[0]."""

    type_name: ClassVar[str] = "sensor_msgs/msg/JointState"
    stamp_ns: int
    names: tuple[str, ...]
    positions: np.ndarray
    velocities: np.ndarray = field(default_factory=lambda: np.empty(0))
    efforts: np.ndarray = field(default_factory=lambda: np.empty(0))
    frame_id: str = ""


@dataclass(frozen=True)
class Text:
    """std_msgs/String."""

    type_name: ClassVar[str] = "std_msgs/msg/String"
    data: str

    @classmethod
    def of(cls, **values: Any) -> Text:
        """A JSON object as text. NaN is refused: JSON has none."""
        return cls(json.dumps(values, separators=(",", ":"), allow_nan=False))

    def object(self) -> dict[str, Any]:
        """The JSON object in this text, or TransportError."""
        if len(self.data) > MAX_JSON_CHARS:
            raise TransportError(
                explain("data", f"at most {MAX_JSON_CHARS} characters", len(self.data), "Send a smaller object.")
            )
        try:
            value = json.loads(self.data)
        except (ValueError, RecursionError) as error:
            raise TransportError(explain("data", "a JSON object", repr(self.data[:40]), "Send JSON.")) from error
        if not isinstance(value, dict):
            raise TransportError(explain("data", "a JSON object", type(value).__name__, "Send {...}."))
        return value


@dataclass(frozen=True, eq=False)
class Values:
    """std_msgs/Float64MultiArray. data: float64[D]."""

    type_name: ClassVar[str] = "std_msgs/msg/Float64MultiArray"
    data: np.ndarray


@dataclass(frozen=True, eq=False)
class Trajectory:
    """trajectory_msgs/JointTrajectory. positions: float64[T, D]; times_ns: time_from_start of each point, T values.

    velocities, accelerations: float64[T, D], or float64[0] for none.
    """

    type_name: ClassVar[str] = "trajectory_msgs/msg/JointTrajectory"
    stamp_ns: int
    names: tuple[str, ...]
    positions: np.ndarray
    times_ns: tuple[int, ...]
    frame_id: str = ""
    velocities: np.ndarray = field(default_factory=lambda: np.empty(0))
    accelerations: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Flag:
    """std_msgs/Bool."""

    type_name: ClassVar[str] = "std_msgs/msg/Bool"
    data: bool


@dataclass(frozen=True)
class Clock:
    """rosgraph_msgs/Clock."""

    type_name: ClassVar[str] = "rosgraph_msgs/msg/Clock"
    stamp_ns: int


OK, WARN, ERROR, STALE = 0, 1, 2, 3


@dataclass(frozen=True)
class Status:
    """diagnostic_msgs/DiagnosticStatus. level: OK, WARN, ERROR or STALE; values: key/value strings."""

    type_name: ClassVar[str] = "diagnostic_msgs/msg/DiagnosticStatus"
    level: int
    name: str
    message: str
    values: Mapping[str, str] = field(default_factory=dict)
    hardware_id: str = ""


@dataclass(frozen=True)
class Diagnostics:
    """diagnostic_msgs/DiagnosticArray, what /diagnostics carries."""

    type_name: ClassVar[str] = "diagnostic_msgs/msg/DiagnosticArray"
    stamp_ns: int
    statuses: tuple[Status, ...]


@dataclass(frozen=True, eq=False)
class Raw:
    """A message of any type, not decoded. data: CDR bytes with their encapsulation header, as they were on the wire."""

    type_name: str
    data: bytes


Message = (
    Image | CompressedImage | JointState | Text | Values | Flag | Trajectory | Clock | Status | Diagnostics | GraphInfo
    | Raw
)  # fmt: skip


# ---- action chunks ----
def chunk_to_trajectory(chunk: ActionChunk, names: Sequence[str], chunk_id: str) -> Trajectory:
    """A chunk as JointTrajectory: stamp is the due time of action 0, joint_names the action names. Lossless."""
    return Trajectory(
        chunk.start_ns,
        tuple(names),
        chunk.actions.astype(np.float64),
        tuple(i * chunk.period_ns for i in range(len(chunk))),
        chunk_id,
    )


def trajectory_to_chunk(message: Trajectory, names: Sequence[str], period_ns: int) -> ActionChunk:
    """Inverse of `chunk_to_trajectory`. TransportError for other names, another period, NaN or an empty trajectory."""
    if message.names != tuple(names):
        raise TransportError(
            explain("joint_names", list(names), list(message.names), "Policy and robot must share one embodiment.")
        )
    expected = tuple(i * period_ns for i in range(len(message.times_ns)))
    if not expected or message.times_ns != expected:
        raise TransportError(
            explain(
                "time_from_start",
                f"one point every {period_ns} ns from 0",
                list(message.times_ns[:4]),
                "Publish one point per action at the embodiment's rate.",
            )
        )
    if not np.all(np.isfinite(message.positions)):
        raise TransportError(explain("points", "finite actions", "NaN or infinity", "Check the policy."))
    return ActionChunk(message.positions.astype(np.float32), message.stamp_ns, period_ns / NS_PER_S)


# ---- image fast path ----
def _pad(offset: int, alignment: int) -> int:
    return -offset % alignment


def encode_image(message: Image) -> bytearray:
    """Header and pixels in one buffer. ConfigError for an encoding or array that sensor_msgs/Image does not carry."""
    pixels = message.pixels
    channels = CHANNELS.get(message.encoding)
    if channels is None or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
        raise ConfigError(
            explain(
                "image",
                f"uint8[H, W, C] in one of {list(CHANNELS)}",
                f"{pixels.dtype}{list(pixels.shape)} as {message.encoding!r}",
                "Convert the picture first.",
            )
        )
    height, width, _ = pixels.shape
    frame, encoding = message.frame_id.encode() + b"\0", message.encoding.encode() + b"\0"
    sec, nanosec = to_stamp(message.stamp_ns)
    head = bytearray(struct.pack("<4siII", b"\x00\x01\x00\x00", sec, nanosec, len(frame)))
    head += frame
    head += bytes(_pad(len(head), 4)) + struct.pack("<III", height, width, len(encoding)) + encoding + b"\0"
    head += bytes(_pad(len(head), 4)) + struct.pack("<II", width * channels, pixels.size)
    start = len(head)
    head += bytes(pixels.size + _pad(pixels.size, 4))
    np.frombuffer(head, np.uint8, pixels.size, start).reshape(pixels.shape)[...] = pixels
    return head


def decode_image(buffer: bytes) -> Image:
    """Zero-copy: `pixels` is a view of `buffer`. TransportError when malformed, or for an encoding not in CHANNELS."""
    try:
        kind, sec, nanosec, length = struct.unpack_from("<4siII", buffer, 0)
        if kind[:2] != b"\x00\x01":
            raise TransportError(explain("image", "little-endian CDR", kind.hex(), "Publish plain CDR."))
        frame_id, at = _string(buffer, 16, length)
        at += _pad(at, 4)
        height, width, length = struct.unpack_from("<III", buffer, at)
        encoding, at = _string(buffer, at + 12, length)
        at += 1  # is_bigendian has no meaning for 8-bit channels
        at += _pad(at, 4)
        step, size = struct.unpack_from("<II", buffer, at)
        at += 8
    except (struct.error, UnicodeDecodeError) as error:
        raise _malformed(Image.type_name, len(buffer), str(error)) from error
    channels = CHANNELS.get(encoding)
    if channels is None:
        raise TransportError(
            f"image encoding {encoding[:40]!r} is not supported. {nearest(encoding[:40], CHANNELS)} "
            f"Publish one of {', '.join(CHANNELS)}."
        )
    row = width * channels
    if not height or not width or step < row or size != step * height or at + size > len(buffer):
        raise _malformed(
            Image.type_name, len(buffer), f"{height}x{width} {encoding}, step {step}, {size} bytes of pixels"
        )
    rows = np.frombuffer(buffer, np.uint8, size, at).reshape(height, step)
    pixels = np.lib.stride_tricks.as_strided(rows, (height, width, channels), (step, channels, 1), writeable=False)
    return Image(from_stamp(sec, nanosec), frame_id, encoding, pixels)


def _string(buffer: bytes, at: int, length: int) -> tuple[str, int]:
    if length < 1 or at + length > len(buffer):
        raise struct.error(f"a string of {length} bytes at offset {at}")
    return bytes(buffer[at : at + length - 1]).decode(), at + length


def _malformed(type_name: str, size: int, detail: str) -> TransportError:
    return TransportError(
        explain(type_name, "a well-formed CDR message", f"{size} bytes: {detail}", "Check the type of the publisher.")
    )


# ---- everything else, through rosbags ----
def _header(make: Mapping[str, Any], stamp_ns: int, frame_id: str) -> Any:
    return make["std_msgs/msg/Header"](make["builtin_interfaces/msg/Time"](*to_stamp(stamp_ns)), frame_id)


def _f64(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values, np.float64)


def _joint_state_to(m: JointState, make: Mapping[str, Any]) -> Any:
    return make[m.type_name](
        _header(make, m.stamp_ns, m.frame_id), list(m.names), _f64(m.positions), _f64(m.velocities), _f64(m.efforts)
    )


def _joint_state_from(r: Any) -> JointState:
    stamp = from_stamp(r.header.stamp.sec, r.header.stamp.nanosec)
    for key in ("position", "velocity", "effort"):
        if len(getattr(r, key)) not in (0, len(r.name)):
            raise TransportError(
                explain(key, f"{len(r.name)} values, one per name", len(getattr(r, key)), "Fix the joint state source.")
            )
    return JointState(stamp, tuple(r.name), _f64(r.position), _f64(r.velocity), _f64(r.effort), r.header.frame_id)


def _values_to(m: Values, make: Mapping[str, Any]) -> Any:
    return make[m.type_name](make["std_msgs/msg/MultiArrayLayout"]([], 0), _f64(m.data))


def _trajectory_to(m: Trajectory, make: Mapping[str, Any]) -> Any:
    point, duration, none = (
        make["trajectory_msgs/msg/JointTrajectoryPoint"],
        make["builtin_interfaces/msg/Duration"],
        np.empty(0),
    )
    rates = [rows if len(rows) else [none] * len(m.positions) for rows in (m.velocities, m.accelerations)]
    points = [
        point(_f64(row), _f64(velocity), _f64(acceleration), none, duration(*to_stamp(t)))
        for row, velocity, acceleration, t in zip(m.positions, *rates, m.times_ns)
    ]
    return make[m.type_name](_header(make, m.stamp_ns, m.frame_id), list(m.names), points)


def _trajectory_from(r: Any) -> Trajectory:
    width = len(r.joint_names)
    for index, point in enumerate(r.points):
        if len(point.positions) != width:
            raise TransportError(
                explain(f"points[{index}].positions", f"{width} values", len(point.positions), "One per joint name.")
            )
    positions = np.array([p.positions for p in r.points], np.float64).reshape(len(r.points), width)
    times = tuple(from_stamp(p.time_from_start.sec, p.time_from_start.nanosec) for p in r.points)
    stamp = from_stamp(r.header.stamp.sec, r.header.stamp.nanosec)
    return Trajectory(
        stamp, tuple(r.joint_names), positions, times, r.header.frame_id,
        _rates(r.points, "velocities", width), _rates(r.points, "accelerations", width),
    )  # fmt: skip


def _rates(points: Sequence[Any], key: str, width: int) -> np.ndarray:
    """float64[T, D], or float64[0] where the points have none."""
    lengths = {len(getattr(point, key)) for point in points}
    if not lengths - {0}:
        return np.empty(0)
    if lengths != {width}:
        raise TransportError(
            explain(f"points.{key}", f"{width} values in every point", sorted(lengths), "One per joint name, or none.")
        )
    return np.array([getattr(point, key) for point in points], np.float64)


def _clock_to(m: Clock, make: Mapping[str, Any]) -> Any:
    return make[m.type_name](make["builtin_interfaces/msg/Time"](*to_stamp(m.stamp_ns)))


def _status_to(m: Status, make: Mapping[str, Any]) -> Any:
    pair = make["diagnostic_msgs/msg/KeyValue"]
    return make[m.type_name](m.level, m.name, m.message, m.hardware_id, [pair(k, v) for k, v in m.values.items()])


def _status_from(r: Any) -> Status:
    return Status(int(r.level), r.name, r.message, {pair.key: pair.value for pair in r.values}, r.hardware_id)


def _diagnostics_to(m: Diagnostics, make: Mapping[str, Any]) -> Any:
    return make[m.type_name](_header(make, m.stamp_ns, ""), [_status_to(s, make) for s in m.statuses])


def _diagnostics_from(r: Any) -> Diagnostics:
    stamp = from_stamp(r.header.stamp.sec, r.header.stamp.nanosec)
    return Diagnostics(stamp, tuple(_status_from(s) for s in r.status))


def _compressed_to(m: CompressedImage, make: Mapping[str, Any]) -> Any:
    return make[m.type_name](_header(make, m.stamp_ns, m.frame_id), m.format, np.frombuffer(m.data, np.uint8))


def _compressed_from(r: Any) -> CompressedImage:
    stamp = from_stamp(r.header.stamp.sec, r.header.stamp.nanosec)
    return CompressedImage(stamp, r.header.frame_id, r.format, r.data.tobytes())


_TO: dict[type, Callable[[Any, Mapping[str, Any]], Any]] = {
    CompressedImage: _compressed_to,
    JointState: _joint_state_to,
    Text: lambda m, make: make[m.type_name](m.data),
    Values: _values_to,
    Flag: lambda m, make: make[m.type_name](m.data),
    Trajectory: _trajectory_to,
    Clock: _clock_to,
    Status: _status_to,
    Diagnostics: _diagnostics_to,
}
_FROM: dict[str, Callable[[Any], Message]] = {
    CompressedImage.type_name: _compressed_from,
    JointState.type_name: _joint_state_from,
    Text.type_name: lambda r: Text(r.data),
    Values.type_name: lambda r: Values(_f64(r.data)),
    Trajectory.type_name: _trajectory_from,
    Flag.type_name: lambda r: Flag(bool(r.data)),
    Clock.type_name: lambda r: Clock(from_stamp(r.clock.sec, r.clock.nanosec)),
    Status.type_name: _status_from,
    Diagnostics.type_name: _diagnostics_from,
    GraphInfo.type_name: graph_from,
}
TYPE_NAMES = (Image.type_name, *_FROM)


def encode(message: Message, distro: str = "jazzy") -> bytes | bytearray:
    """CDR bytes of a message, padded to 4 bytes."""
    if isinstance(message, Raw):
        return message.data
    if isinstance(message, Image):
        return encode_image(message)
    store = typestore(distro)
    if isinstance(message, GraphInfo):
        ros = graph_to(message, store.types, gid_size(distro))
    else:
        ros = _TO[type(message)](message, store.types)
    data = bytes(store.serialize_cdr(ros, message.type_name, little_endian=True))
    return data + bytes(_pad(len(data), 4))


def decode(type_name: str, buffer: bytes, distro: str = "jazzy") -> Message:
    """The message in `buffer`, or TransportError. Image pixels are a view of `buffer`; all else is copied."""
    if type_name == Image.type_name:
        return decode_image(buffer)
    if type_name not in _FROM:
        raise TransportError(f"message type {type_name!r} is not handled. {nearest(type_name, TYPE_NAMES)}")
    store = typestore(distro)
    try:
        ros = store.deserialize_cdr(buffer, type_name)
        # A string cut short is accepted by the codec, because slices do not complain: the length tells.
        if len(store.serialize_cdr(ros, type_name)) > len(buffer):
            raise TransportError("cut short")
        return _FROM[type_name](ros)
    except Exception as error:  # the codec raises whatever the bytes provoke; a node must outlive any of them
        raise _malformed(type_name, len(buffer), f"{type(error).__name__}: {error}") from error


@functools.cache
def gid_size(distro: str) -> int:
    """Bytes of a graph GID: 24 up to Humble, 16 since."""
    _, fields = typestore(distro).fielddefs["rmw_dds_common/msg/Gid"]
    array: Any = fields[0][1]
    return int(array[1][1])
