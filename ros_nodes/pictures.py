"""Pictures that travel as files (sensor_msgs/CompressedImage). Pillow, loaded when the first one comes."""

from __future__ import annotations

import io

import numpy as np

from vla.errors import TransportError, explain

MAX_PIXELS = 1 << 25  # a few bytes can claim to be gigabytes


def decompress(format: str, data: bytes) -> np.ndarray:
    """uint8[H, W, 3] RGB of a JPEG or PNG file. format: as image_transport writes it, "jpeg" or
    "bgr8; jpeg compressed bgr8". TransportError for another format, and for a file that is damaged or huge."""
    from PIL import Image

    words = format.lower().replace("jpg", "jpeg")
    kinds = [kind for kind in ("jpeg", "png") if kind in words]
    if not kinds or "depth" in words:
        raise TransportError(explain("format", "jpeg or png of colours", repr(format[:40]), "Compress pictures so."))
    try:
        with Image.open(io.BytesIO(data), formats=kinds) as picture:
            size = picture.size
            if size[0] * size[1] <= MAX_PIXELS:
                return np.asarray(picture.convert("RGB"))
    except Exception as error:  # the decoders raise whatever the bytes provoke
        got = f"{len(data)} bytes: {type(error).__name__}"
        raise TransportError(explain("compressed image", f"a whole {kinds[0]}", got, "Check its source.")) from error
    raise TransportError(explain("compressed image", f"at most {MAX_PIXELS} pixels", size, "Scale it down."))
