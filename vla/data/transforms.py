"""Image transforms that training and execution share, bit for bit. numpy only."""

from __future__ import annotations

import functools

import numpy as np

from vla.errors import DataError, explain


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area average: uint8[..., H, W, C] -> uint8[..., height, width, C].

    Every output pixel is the mean over the area that it covers, rounded half up. The sums are integers below 2**53, so
    the result does not depend on the order of summation, on the BLAS or on the machine.
    """
    if image.dtype != np.uint8 or image.ndim < 3:
        raise DataError(
            explain("image", "uint8[..., H, W, C]", f"{image.dtype}{image.shape}", "Pass 8-bit RGB images.")
        )
    rows, columns, channels = image.shape[-3:]
    if (rows, columns) == (height, width):
        return image
    if height < 1 or width < 1:
        raise DataError(explain("resize", "a size of at least 1 x 1", f"{height} x {width}", "Fix the image size."))
    lead = image.shape[:-3]
    if rows % height == 0 and columns % width == 0:  # whole blocks: no weights needed
        block = (rows // height, columns // width)
        split = image.reshape(*lead, height, block[0], width, block[1], channels)
        # two passes of narrow integers are several times faster than one sum over both axes
        total = split.sum(-2, dtype=np.uint32).sum(-3, dtype=np.uint32)
        area = block[0] * block[1]
        return ((total + area // 2) // area).astype(np.uint8)
    down, across = _overlaps(rows, height), _overlaps(columns, width)
    flat = image.reshape(-1, rows, columns * channels).astype(np.float64)
    tall = (down @ flat).reshape(-1, height, columns, channels)  # [N, height, W, C]
    total = np.einsum("jw,nhwc->nhjc", across, tall, optimize=True)  # [N, height, width, C]
    area = rows * columns
    out = (total.astype(np.int64) + area // 2) // area
    return out.astype(np.uint8).reshape(*lead, height, width, channels)


@functools.lru_cache(maxsize=32)
def _overlaps(source: int, target: int) -> np.ndarray:
    """float64[target, source] of integers: how much of source pixel i lies in target pixel j; rows sum to source.

    In units of 1 / (source * target) of the image, source pixel i spans [i * target, (i + 1) * target).
    """
    left = np.maximum(np.arange(target)[:, None] * source, np.arange(source)[None] * target)
    right = np.minimum((np.arange(target)[:, None] + 1) * source, (np.arange(source)[None] + 1) * target)
    weights = np.maximum(right - left, 0).astype(np.float64)
    weights.setflags(write=False)
    return weights
