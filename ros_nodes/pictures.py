"""Pictures that travel as files (sensor_msgs/CompressedImage). Pillow, loaded when the first one comes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from vla.errors import TransportError, explain

MAX_PIXELS = 1 << 25  # a few bytes can claim to be gigabytes
JPEG_FORMAT = "rgb8; jpeg compressed bgr8"  # as image_transport names an rgb8 picture that it made a JPEG of
_COLOURS = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's modes of 8 bits and less
_T = TypeVar("_T")


def decompress(format: str, data: bytes) -> np.ndarray:
    """uint8[H, W, 3] RGB of a JPEG or PNG file. format: as image_transport writes it, "jpeg" or
    "bgr8; jpeg compressed bgr8". TransportError for another format, more than 8 bits, and for a file that is damaged or
    huge."""
    return _read(format, data, lambda picture: np.asarray(picture.convert("RGB")))


def size_of(format: str, data: bytes) -> tuple[int, int]:
    """(height, width) that the file states; nothing is decoded. TransportError as `decompress`, as far as it shows."""
    return _read(format, data, lambda picture: (picture.height, picture.width))


def compress(pixels: np.ndarray, quality: int) -> bytes:
    """A JPEG file of uint8[H, W, 3] RGB. quality: 1 to 95."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "jpeg", quality=quality)
    return out.getvalue()


def _read(format: str, data: bytes, use: Callable[[Any], _T]) -> _T:
    from PIL import Image

    words = format.lower().replace("jpg", "jpeg")
    kinds = [kind for kind in ("jpeg", "png") if kind in words]
    if not kinds or "depth" in words:
        raise TransportError(explain("format", "jpeg or png of colours", repr(format[:40]), "Compress pictures so."))
    try:
        with Image.open(io.BytesIO(data), formats=kinds) as picture:
            size, mode = picture.size, picture.mode
            if size[0] * size[1] <= MAX_PIXELS and mode in _COLOURS:
                return use(picture)
    except Exception as error:  # the decoders raise whatever the bytes provoke
        got = f"{len(data)} bytes: {type(error).__name__}"
        raise TransportError(explain("compressed image", f"a whole {kinds[0]}", got, "Check its source.")) from error
    if mode not in _COLOURS:
        raise TransportError(explain("compressed image", "8 bits per colour", mode, "Compress colours, not depth."))
    raise TransportError(explain("compressed image", f"at most {MAX_PIXELS} pixels", size, "Scale it down."))
