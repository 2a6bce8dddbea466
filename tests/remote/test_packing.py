"""The message format: what goes in comes out, and what should not be in it is refused before it costs anything."""

from __future__ import annotations

import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.remote import packing, protocol
from policies.remote.packing import DTYPES, MAX_ITEMS, decode, encode
from tests.remote.fuzz_messages import SEEDS, check
from tests.remote.robots import context, observation
from vla.errors import TransportError


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 7), (3,), (2, 3, 4)])
def test_arrays_come_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    back = decode(encode({"x": array}))["x"]
    assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes()


def test_plain_data_comes_back() -> None:
    value = {"a": [1, -(2**63), 2**64 - 1, 2.5, None, True, "é"], "b": {"c": {"d": []}}, "e": b"\x00"}
    assert decode(encode(value)) == value
    assert decode(encode({"x": np.float32(1.5), "y": np.int64(3)})) == {"x": 1.5, "y": 3}


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["a"]), np.array([1j]), np.bool_(1), {1}, 2**64])
def test_what_it_cannot_hold_is_not_sent(value: object) -> None:
    with pytest.raises(TransportError, match="message"):
        encode({"x": value})


def array(data: object = b"\0" * 4, dtype: object = "<f4", shape: object = (1,), **more: object) -> bytes:
    given = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape, **more}
    return msgpack.packb({key: value for key, value in given.items() if value is not None})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (array(dtype="|O"), "dtype: expected one of"),
        (array(dtype="O"), "dtype"),
        (array(dtype="<U4"), "dtype"),
        (array(dtype="|V4"), "dtype"),
        (array(dtype=">f4"), "dtype"),
        (array(dtype="<M8[ns]"), "dtype"),
        (array(dtype="f4,f4"), "dtype"),
        (array(dtype=b"<f4"), "dtype"),
        (array(dtype=[["a", "<f4"]]), "dtype"),
        (array(data=b"\0" * 3), "expected 4 bytes.*got 3"),
        (array(data="text"), "data"),
        (array(data=[0, 0, 0, 0]), "data"),
        (array(shape=(-1,)), "shape"),
        (array(shape=(True,)), "shape"),
        (array(shape=(1.0,)), "shape"),
        (array(shape="1"), "shape"),
        (array(shape=(1,) * 9), "shape"),
        (array(shape=(2**62, 2**62), data=b""), "shape"),
        (array(shape=(0, 2**31 - 1, 2**31 - 1), data=b""), "data"),
        (array(shape=None), "byte keys"),
        (array(**{"more": 1}), "byte keys"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "number"),
        (msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}), "number"),
        (msgpack.packb({b"key": 1}), "byte keys"),
        (msgpack.packb({1: 2}), "the key 1"),
        (b"\x81\x90\x01", "nested"),
        (b"\x82\xa1a\x01\xa1a\x02", "'a' twice"),
        (msgpack.packb(msgpack.ExtType(1, b"x")), "ext"),
        (msgpack.packb({"t": msgpack.Timestamp(1)}), "ext"),
        (b"", "nothing"),
        (b"\xc1", "FormatError"),
        (b"\xa2\xff\xff", "utf-8"),
        (b"\xc6\xff\xff\xff\xffa", "OutOfData"),
        (b"\xdd\xff\xff\xff\xff", "entries"),
        (b"\xdf\xff\xff\xff\xff", "entries"),
        (b"\x91" * 9 + b"\x01", "nested deeper"),
        (b"\x01\x01", "1 bytes behind"),
        (b"\x80\x04\x95", "behind"),
    ],
)
def test_what_does_not_belong_is_refused_with_its_reason(data: bytes, message: str) -> None:
    with pytest.raises(TransportError, match=message):
        decode(data)


@pytest.mark.parametrize("item", [b"\x80", b"\x90", b"\xc0", b"\xa1a", b"\x81\xa0\x80"])
def test_a_large_message_of_small_things_costs_next_to_nothing(item: bytes) -> None:
    count = 2**24 // len(item)
    data = b"\xdd" + count.to_bytes(4, "big") + item * count
    tracemalloc.start()
    with pytest.raises(TransportError, match=f"more than {MAX_ITEMS}"):
        decode(data)
    assert (
        tracemalloc.get_traced_memory()[1] < 2 * len(data) + 2**23
    )  # the library's copy of the bytes, and little else
    tracemalloc.stop()


def test_arrays_are_views_that_nobody_can_write_to() -> None:
    back = decode(encode({"x": np.zeros(3)}))["x"]
    with pytest.raises(ValueError, match="read-only"):
        back[0] = 1


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    check(data)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
def test_any_damage_to_a_message_is_found_or_harmless(seed: bytes, data: st.DataObject) -> None:
    body = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(body) - 1)))
        cut = data.draw(st.integers(0, 8))
        body[at : at + cut] = data.draw(st.binary(max_size=8))
    check(bytes(body))


def test_a_whole_request_survives() -> None:
    message = protocol.write_request(observation(), context())
    back = packing.decode(packing.encode(message))
    assert set(back) == set(message) and back["prompt"] == "push"
