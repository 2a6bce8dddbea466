"""Our messages against the codec of rosbags, and against hostile bytes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ros_nodes import messages as m
from vla.errors import ConfigError, TransportError
from vla.types import ActionChunk

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 4), np.uint8)
EXAMPLES: list[m.Message] = [
    *(m.Image(1_700_000_000_123_456_789, "cam", name, PIXELS[..., :c].copy()) for name, c in m.CHANNELS.items()),
    m.CompressedImage(6, "cam", "rgb8; jpeg compressed bgr8", bytes(range(1, 12))),
    m.JointState(5, ("a", "joint_2"), np.array([1.0, np.nan]), np.array([0.1, 0.2]), frame_id="base"),
    m.Text("grüß den roten Würfel"),
    m.Text(""),
    m.Values(np.array([1.5, -np.inf, 3.0])),
    m.Trajectory(7, ("x", "y"), RNG.normal(size=(3, 2)), (0, 50_000_000, 100_000_000), "0/1/2"),
    m.Clock(12_345_678_901_234_567),
    m.Status(m.WARN, "policy", "no camera", {"queue": "1", "latency_ms_p50": "3.2"}, "tabletop"),
    m.Diagnostics(9, (m.Status(m.OK, "a", "b"), m.Status(m.ERROR, "c", "d", {"k": "v"}))),
    m.GraphInfo(bytes(range(16)), (m.GraphNode("/", "n", (b"r" * 16,), (b"w" * 16, b"v" * 16)),)),
]
IDS = [f"{type(e).__name__}{i}" for i, e in enumerate(EXAMPLES)]


def assert_equal(a: object, b: object) -> None:
    assert type(a) is type(b)
    for key, value in vars(a).items():
        other = getattr(b, key)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype and np.array_equal(value, other, equal_nan=value.dtype != np.uint8), key
        else:
            assert value == other, key


@pytest.mark.parametrize("message", EXAMPLES, ids=IDS)
def test_round_trip(message: m.Message) -> None:
    data = m.encode(message)
    assert len(data) % 4 == 0 and bytes(data[:4]) == b"\x00\x01\x00\x00"
    assert_equal(m.decode(message.type_name, bytes(data)), message)


@pytest.mark.parametrize("message", [e for e in EXAMPLES if isinstance(e, m.Image)], ids=lambda e: e.encoding)
def test_image_bytes_equal_those_of_the_reference_codec(message: m.Image) -> None:
    make = m.typestore().types
    header = make["std_msgs/msg/Header"](make["builtin_interfaces/msg/Time"](*m.to_stamp(message.stamp_ns)), "cam")
    height, width, channels = message.pixels.shape
    reference = make[message.type_name](
        header, height, width, message.encoding, 0, width * channels, message.pixels.reshape(-1)
    )
    expected = bytes(m.typestore().serialize_cdr(reference, message.type_name, little_endian=True))
    assert bytes(m.encode(message))[: len(expected)] == expected


def test_image_is_read_without_a_copy_and_shown_as_rgb() -> None:
    data = bytes(m.encode(m.Image(1, "c", "bgr8", PIXELS[..., :3].copy())))
    image = m.decode(m.Image.type_name, data)
    assert isinstance(image, m.Image)
    assert np.shares_memory(image.pixels, np.frombuffer(data, np.uint8)) and not image.pixels.flags.writeable
    assert np.array_equal(image.rgb(), PIXELS[..., 2::-1])
    mono = m.Image(1, "c", "mono8", PIXELS[..., :1]).rgb()
    assert mono.shape == (5, 7, 3) and np.array_equal(mono[..., 2], PIXELS[..., 0])
    assert np.array_equal(m.Image(1, "c", "rgba8", PIXELS).rgb(), PIXELS[..., :3])


def test_image_rows_may_be_padded() -> None:
    make = m.typestore().types
    header = make["std_msgs/msg/Header"](make["builtin_interfaces/msg/Time"](0, 1), "cam")
    rows = RNG.integers(0, 256, (4, 16), np.uint8)
    message = make["sensor_msgs/msg/Image"](header, 4, 5, "rgb8", 0, 16, rows.reshape(-1))
    image = m.decode(m.Image.type_name, bytes(m.typestore().serialize_cdr(message, m.Image.type_name)))
    assert isinstance(image, m.Image) and np.array_equal(image.pixels, rows[:, :15].reshape(4, 5, 3))


def test_unsupported_encoding_is_refused_by_name() -> None:
    make = m.typestore().types
    header = make["std_msgs/msg/Header"](make["builtin_interfaces/msg/Time"](0, 1), "cam")
    message = make["sensor_msgs/msg/Image"](header, 2, 2, "16UC1", 0, 4, np.zeros(8, np.uint8))
    with pytest.raises(TransportError, match=r"'16UC1' is not supported.*rgb8"):
        m.decode(m.Image.type_name, bytes(m.typestore().serialize_cdr(message, m.Image.type_name)))
    with pytest.raises(ConfigError, match="rgb8"):
        m.encode(m.Image(0, "", "rgb8", np.zeros((2, 2, 3), np.float32)))


@pytest.mark.parametrize("message", EXAMPLES, ids=IDS)
def test_truncation_at_every_byte_is_an_error(message: m.Message) -> None:
    data = bytes(m.encode(message))
    unpadded = len(data.rstrip(b"\0"))
    for size in range(unpadded):
        with pytest.raises(TransportError):
            m.decode(message.type_name, data[:size])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(m.TYPE_NAMES), st.binary(max_size=200), st.booleans())
def test_random_bytes_raise_transport_error_or_decode(type_name: str, data: bytes, header: bool) -> None:
    try:
        message = m.decode(type_name, b"\x00\x01\x00\x00" + data if header else data)
    except TransportError:
        return
    assert message.type_name == type_name


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(EXAMPLES) - 1), st.data())
def test_flipped_bytes_raise_transport_error_or_decode(index: int, data: st.DataObject) -> None:
    buffer = bytearray(m.encode(EXAMPLES[index]))
    for _ in range(data.draw(st.integers(1, 4))):
        buffer[data.draw(st.integers(0, len(buffer) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(TransportError):
        m.decode(EXAMPLES[index].type_name, bytes(buffer))


@given(st.integers(-(2**31) * 10**9, (2**31) * 10**9 - 1))
def test_stamps_survive(stamp_ns: int) -> None:
    sec, nanosec = m.to_stamp(stamp_ns)
    assert 0 <= nanosec < 10**9 and m.from_stamp(sec, nanosec) == stamp_ns


def test_stamp_past_2038_is_an_error() -> None:
    with pytest.raises(TransportError, match="int32"):
        m.to_stamp(2**31 * 10**9)


def test_chunk_survives_bit_for_bit() -> None:
    chunk = ActionChunk(RNG.normal(size=(16, 7)).astype(np.float32), 123_456_789_012, 0.05)
    names = tuple("abcdefg")
    sent = m.encode(m.chunk_to_trajectory(chunk, names, "1/2/3"))
    message = m.decode(m.Trajectory.type_name, sent)
    assert isinstance(message, m.Trajectory) and message.frame_id == "1/2/3"
    back = m.trajectory_to_chunk(message, names, chunk.period_ns)
    assert np.array_equal(back.actions, chunk.actions) and back.actions.dtype == np.float32
    assert (back.start_ns, back.period_ns) == (chunk.start_ns, chunk.period_ns)
    for wrong in (tuple("abcdefx"), names[:6]):
        with pytest.raises(TransportError, match="joint_names"):
            m.trajectory_to_chunk(message, wrong, chunk.period_ns)
    with pytest.raises(TransportError, match="time_from_start"):
        m.trajectory_to_chunk(message, names, chunk.period_ns + 1)


@pytest.mark.parametrize("text", ["", "[1]", "{", "1e999", "[" * 60_000, "x" * 70_000])
def test_text_that_is_no_json_object(text: str) -> None:
    with pytest.raises(TransportError, match="expected"):
        m.Text(text).object()


def test_graph_ids_follow_the_distribution() -> None:
    info = next(e for e in EXAMPLES if isinstance(e, m.GraphInfo))
    assert m.gid_size("humble") == 24 and m.gid_size("jazzy") == 16
    assert len(m.encode(info, "humble")) == len(m.encode(info, "jazzy")) + 4 * 8
    assert m.decode(info.type_name, m.encode(info, "humble"), "humble") == info
    with pytest.raises(ConfigError, match="Did you mean 'jazzy'"):
        m.typestore("jazy")
