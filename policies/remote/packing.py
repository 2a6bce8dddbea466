"""Plain data and numpy arrays as msgpack, read with suspicion. numpy and msgpack only.

Arrays travel as openpi's clients send them, a map with byte keys: {b"__ndarray__": True, b"data": bytes, b"dtype": str,
b"shape": [int]}; numpy scalars as {b"__npgeneric__": True, b"data": number, b"dtype": str}. All other keys are text.

What comes off a socket is nobody's promise. The library reads numbers, text and bytes; containers are walked here, so
that a message which claims four thousand million entries, or nests a thousand deep, is refused at the claim and not
when the memory is gone. Nothing in a message names a class or a function.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any

import msgpack
import numpy as np

from vla.errors import TransportError, explain

MAX_ITEMS = 20_000  # keys and values in one message; arrays count as one each
MAX_DEPTH = 8
MAX_DIMS = 8
DTYPES = {
    np.dtype(name).str: np.dtype(name)
    for name in ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8")
}
_ARRAY = {b"__ndarray__", b"data", b"dtype", b"shape"}
_SCALAR = {b"__npgeneric__", b"data", b"dtype"}


def encode(value: Any) -> bytes:
    """Plain data with arrays in it as one message; TransportError for what it cannot hold."""
    try:
        return bytes(msgpack.packb(value, default=_array))
    except (TypeError, ValueError, OverflowError) as error:
        raise TransportError(explain("message", "numbers, text and arrays", str(error), "Send plain data.")) from error


def decode(data: bytes) -> Any:
    """What `encode` was given; arrays are read-only views into `data`'s copy.

    Raises TransportError, and nothing else, for bytes that are not exactly one message within the limits above.
    """
    reader = _Reader(data)
    try:
        value = reader.read(0)
    except (msgpack.UnpackException, ValueError, OverflowError) as error:
        raise _malformed(f"{type(error).__name__}: {error}") from error
    if reader.place != len(data):
        raise _malformed(f"{len(data) - reader.place} bytes behind its end")
    return value


def _array(value: Any) -> dict[bytes, Any]:
    array = np.asarray(value)
    if not isinstance(value, (np.ndarray, np.generic)) or array.dtype.str not in DTYPES:
        kind = array.dtype if isinstance(value, (np.ndarray, np.generic)) else type(value).__name__
        raise TypeError(f"{kind} cannot be sent")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": array.dtype.str}
    return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}


class _Reader:
    """One message. The first byte of a value says whether it is a container; all others the library reads."""

    def __init__(self, data: bytes):
        self._data, self._left = data, MAX_ITEMS
        self._unpacker = msgpack.Unpacker(raw=False, max_buffer_size=max(1, len(data)), max_ext_len=0)
        self._unpacker.feed(data)

    @property
    def place(self) -> int:
        return int(self._unpacker.tell())

    def read(self, depth: int) -> Any:
        if self.place >= len(self._data):
            raise _malformed("nothing where a value should be")
        kind = self._data[self.place]
        is_map = 0x80 <= kind <= 0x8F or kind in (0xDE, 0xDF)
        is_list = 0x90 <= kind <= 0x9F or kind in (0xDC, 0xDD)
        if not is_map and not is_list:
            return self._unpacker.unpack()
        if depth == MAX_DEPTH:
            raise _malformed(f"values nested deeper than {MAX_DEPTH}")
        if is_list:
            count = self._take(self._unpacker.read_array_header())
            return [self.read(depth + 1) for _ in range(count)]
        return self._map(self._take(self._unpacker.read_map_header()), depth)

    def _take(self, count: int) -> int:
        if count > self._left:
            raise _malformed(f"more than {MAX_ITEMS} entries")
        self._left -= count
        return count

    def _map(self, count: int, depth: int) -> Any:
        out: dict[Any, Any] = {}
        for _ in range(count):
            key = self.read(MAX_DEPTH)  # no containers as keys
            if not isinstance(key, (str, bytes)) or key in out:
                raise _malformed(f"the key {reprlib.repr(key)}" + (" twice" if isinstance(key, (str, bytes)) else ""))
            out[key] = self.read(depth + 1)
        if not any(isinstance(key, bytes) for key in out):
            return out
        if set(out) == _ARRAY and out[b"__ndarray__"] is True:
            return _read_array(out[b"data"], _dtype(out[b"dtype"]), out[b"shape"])
        if set(out) == _SCALAR and out[b"__npgeneric__"] is True:
            return _read_scalar(out[b"data"], _dtype(out[b"dtype"]))
        raise _malformed(f"byte keys {reprlib.repr(sorted(map(repr, out)))}")


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise TransportError(
            explain("array dtype", f"one of {sorted(DTYPES)}", reprlib.repr(name), "Convert it before.")
        )
    return DTYPES[name]


def _read_array(data: Any, dtype: np.dtype, shape: Any) -> np.ndarray:
    dims_fit = isinstance(shape, list) and len(shape) <= MAX_DIMS
    if not dims_fit or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise TransportError(
            explain("array shape", f"at most {MAX_DIMS} sizes", reprlib.repr(shape), "Send a smaller one.")
        )
    # Zero sizes count as one here: numpy multiplies the others and overflows.
    if not isinstance(data, bytes) or math.prod(max(1, n) for n in shape) >= 2**40:
        got = f"{type(data).__name__} for shape {shape}"
        raise TransportError(explain("array data", "its bytes", got, "Send what `tobytes` gives."))
    if len(data) != math.prod(shape) * dtype.itemsize:
        wanted = f"{math.prod(shape) * dtype.itemsize} bytes for {dtype}{shape}"
        raise TransportError(explain("array data", wanted, f"{len(data)}", "Send the whole array."))
    return np.ndarray(tuple(shape), dtype, data)


def _read_scalar(value: Any, dtype: np.dtype) -> Any:
    whole = dtype.kind in "iu"
    if type(value) is int and whole:
        fits = np.iinfo(dtype).min <= value <= np.iinfo(dtype).max
    else:
        fits = type(value) is float and not whole
    if not fits:
        raise TransportError(explain("number", f"one of {dtype}", reprlib.repr(value), "Send plain numbers."))
    return value


def _malformed(got: str) -> TransportError:
    return TransportError(explain("message", "one msgpack value", got, "Send what openpi's clients send."))
