"""Image transforms that training and execution share, bit for bit. numpy only."""

from __future__ import annotations

import functools

import numpy as np

from vla.embodiment import Camera
from vla.errors import DataError, explain


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area average: uint8[..., H, W, C] -> uint8[..., height, width, C].

    Every output pixel is the mean over the area that it covers, rounded half up. The sums are integers that floating
    point holds exactly, so the result does not depend on the order of summation, on the BLAS or on the machine.
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
    if rows % height == 0 and columns % width == 0:
        return _block_means(image, rows // height, columns // width)
    # float32 counts integers exactly up to 2**24, which images to about 180 x 180 stay below; it is the faster one
    exact = np.dtype(np.float32 if rows * columns * 256 <= 2**24 else np.float64)
    planes: np.ndarray = np.moveaxis(image.reshape(-1, rows, columns, channels), 3, 1).astype(exact)  # [N, C, H, W]
    total = _overlaps(rows, height).astype(exact) @ planes @ _overlaps(columns, width).astype(exact).T
    area = rows * columns
    mean = (total.astype(np.int64) + area // 2) // area
    return np.moveaxis(mean.astype(np.uint8), 1, 3).reshape(*image.shape[:-3], height, width, channels)


def fits(height: int, width: int, camera: Camera) -> bool:
    """Whether a picture of this size can stand for the camera's: the same size, or larger in the same proportion.

    A smaller one would be blurred beyond what the policy saw in training, and another proportion shows another field of
    view.
    """
    return height >= camera.height and height * camera.width == width * camera.height


def fitted(image: np.ndarray, camera: Camera) -> np.ndarray:
    """uint8[H, W, C] at the camera's size if it `fits`, area-averaged; as it is if not."""
    return resize(image, camera.height, camera.width) if fits(*image.shape[:2], camera) else image


def _block_means(image: np.ndarray, down: int, across: int) -> np.ndarray:
    """The same for whole blocks of `down` x `across` pixels: sums of slices, ten times as fast as the products."""
    kind = np.uint16 if down * across <= 256 else np.uint32  # 256 * 255 + 128 is the most that uint16 has to hold
    rows = image[..., 0::down, :, :].astype(kind)
    for i in range(1, down):
        rows += image[..., i::down, :, :]
    total = rows[..., 0::across, :].copy()
    for i in range(1, across):
        total += rows[..., i::across, :]
    return ((total + down * across // 2) // (down * across)).astype(np.uint8)


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
