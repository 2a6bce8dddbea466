"""The film of a run: both cameras side by side, enlarged, with the instruction and the outcome written in."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PANEL = 384  # pixels per camera view
CAPTION = 72
INK, PAPER, GOOD, BAD = (235, 238, 242), (18, 20, 24), (80, 200, 120), (230, 90, 80)


@dataclass(frozen=True)
class Shot:
    """views: uint8[H, W, 3] per camera. success: None while the episode runs."""

    views: Sequence[np.ndarray]
    instruction: str
    headline: str
    success: bool | None = None


def compose(shot: Shot) -> np.ndarray:
    """uint8[CAPTION + PANEL, V * PANEL, 3]: caption above, views beside each other."""
    width = PANEL * len(shot.views)
    canvas = Image.new("RGB", (width, CAPTION + PANEL), PAPER)
    for index, view in enumerate(shot.views):
        canvas.paste(_square(view), (index * PANEL, CAPTION))
    draw = ImageDraw.Draw(canvas)
    draw.text((14, 8), shot.headline, fill=(140, 148, 160), font=ImageFont.load_default(15))
    if shot.success is not None:
        word, colour = ("success", GOOD) if shot.success else ("failure", BAD)
        font = ImageFont.load_default(15)
        draw.text((width - 14 - draw.textlength(word, font=font), 8), word, fill=colour, font=font)
        draw.rectangle((0, CAPTION - 4, width, CAPTION - 1), fill=colour)
    size = 22
    while size > 11 and draw.textlength(shot.instruction, font=ImageFont.load_default(size)) > width - 28:
        size -= 1
    text = textwrap.shorten(shot.instruction, width=(width - 28) // 5, placeholder=" ...")
    draw.text((14, 32), text, fill=INK, font=ImageFont.load_default(size))
    return np.asarray(canvas)


def _square(view: np.ndarray) -> Image.Image:
    """The view at PANEL x PANEL, its aspect kept, on dark borders."""
    height, width = view.shape[:2]
    scale = PANEL / max(height, width)
    image = Image.fromarray(view).resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
    panel = Image.new("RGB", (PANEL, PANEL), PAPER)
    panel.paste(image, ((PANEL - image.width) // 2, (PANEL - image.height) // 2))
    return panel


def write_film(path: Path, shots: Iterable[Shot], fps: int) -> int:
    """Encode the shots as H.264; returns the number of frames. Raises DataError when there is none."""
    from vla.data.video import CODECS, encode

    # What every player and browser shows; a film is watched, not trained on.
    chosen = replace(CODECS["h264_420"], crf=23, gop=2 * fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    return encode(path, (compose(shot) for shot in shots), fps, chosen)


def hold(shot: Shot, frames: int) -> Iterator[Shot]:
    """The last picture of an episode stands a moment, so that its outcome can be read."""
    for _ in range(frames):
        yield shot


class FrameSpool:
    """Frames of one camera in a scratch file: a long run must not fill the memory it is measuring.

    All frames of a spool have one shape. `append` returns the index to read the frame back with.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, path.open("w+b")
        self._shape: tuple[int, ...] | None = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, image: np.ndarray) -> int:
        if self._shape is None:
            self._shape = image.shape
        if image.shape != self._shape:
            raise ValueError(f"frame of shape {image.shape} in a spool of {self._shape}")
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(image).tobytes())
        self._count += 1
        return self._count - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if self._shape is None or not 0 <= index < self._count:
            raise IndexError(index)
        size = int(np.prod(self._shape))
        self._file.seek(index * size)
        return np.frombuffer(self._file.read(size), np.uint8).reshape(self._shape)

    def close(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
