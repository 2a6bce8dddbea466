"""Image encoders: uint8 images to a grid of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class CameraEncoderConfig:
    """One camera's encoder. size: pixels, square, as fed (the policy resizes to it). grid: tokens per side.

    channels: width after each halving of the 4x4-patch stem; size / (4 * 2**(len - 1)) must equal grid.
    points: positions in the picture that the words look for, together one more token; 0 for none.
    """

    name: str
    size: int
    grid: int
    channels: tuple[int, ...] = (48, 96, 192)
    points: int = 0

    @property
    def tokens(self) -> int:
        return self.grid**2 + (self.points > 0)

    def __post_init__(self) -> None:
        reached = self.size // (4 * 2 ** (len(self.channels) - 1))
        if reached != self.grid:
            raise ValueError(
                f"camera {self.name}: size {self.size} with {len(self.channels)} stages gives a grid of {reached}, "
                f"expected {self.grid}. Change size, channels or grid."
            )


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, film: Tensor | None = None) -> Tensor:
        """film: [B, 2 * channels], scale and shift of the features before the second convolution."""
        y = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if film is not None:
            scale, shift = film[:, :, None, None].chunk(2, dim=1)
            y = y * (1 + scale) + shift
        return x + self.conv2(F.silu(y))


class SoftPoints(nn.Module):
    """Where the named things lie: K queries from the words, each answered by the mean pixel position under the
    softmax of its match with the features (the soft-argmax of Finn et al. 2016, deep spatial autoencoders).

    The token is linear in the positions, and so is what training reads off it, and neither the arm's state nor words
    reach the features before. Each of that matters: behind a non-linear read-out, with the state in the query, or with
    modulated features, words had not begun to bind to objects when here they already did.
    forward: features [B, C, h, w], text [B, text_width] -> [B, 1, width].
    """

    SIZE = 32
    GAIN = 4.0  # positions lie in [-1, 1] and start near 0, where the mean of a flat softmax is

    def __init__(self, channels: int, points: int, text_width: int, width: int):
        super().__init__()
        self.points = points
        self.norm, self.keys = nn.GroupNorm(8, channels), nn.Conv2d(channels, points * self.SIZE, 1)
        self.queries = nn.Linear(text_width, points * self.SIZE)
        self.embed = nn.Linear(2 * points, width)

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        batch, _, height, width = features.shape
        keys = self.keys(F.silu(self.norm(features))).reshape(batch, self.points, self.SIZE, height * width)
        queries = self.queries(F.rms_norm(text, text.shape[-1:])).reshape(batch, self.points, 1, self.SIZE)
        ys = torch.linspace(-1, 1, height, device=features.device)
        xs = torch.linspace(-1, 1, width, device=features.device)
        grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), dim=-1).flatten(0, 1)
        with torch.autocast(features.device.type, enabled=False):  # a position in 8 bits would be half a pixel off
            weights = (queries.float() @ keys.float()).squeeze(2).softmax(dim=-1)
            places = self.GAIN * (weights @ grid)
        return self.embed(places.flatten(1).to(features.dtype))[:, None]


_POINTS_STAGE = 1  # of the encoder: an eighth of the picture's resolution, and it has seen enough around each cell


class CameraEncoder(nn.Module):
    """Convolutions to a grid of tokens: small data teaches a convolution where things are far sooner than patches.

    Two constant channels hold the pixel coordinates (Liu et al. 2018, CoordConv), as actions need positions. With
    text_width > 0 a summary of the instruction scales and shifts the features of the stages behind the points, or of
    all stages where there are none (Perez et al. 2018, FiLM; as in RT-1, Brohan et al. 2022), so that the encoder looks
    for what was asked; it starts as the plain encoder.
    forward: uint8 or float [B, H, W, 3] in 0..255, text [B, text_width], None for neither FiLM nor points ->
    [B, tokens, width]: the grid, row-major, then the token of the points.
    """

    def __init__(self, config: CameraEncoderConfig, width: int, text_width: int = 0):
        super().__init__()
        if config.points and not text_width:
            raise ValueError(f"camera {config.name}: points answer the words, expected text_width > 0, got 0")
        self.config, self.text_width = config, text_width
        self.shrink, self.blocks, self.films = nn.ModuleList(), nn.ModuleList(), nn.ModuleDict()
        self._points_stage = min(_POINTS_STAGE, len(config.channels) - 1) if config.points else -1
        before = 5
        for i, channels in enumerate(config.channels):
            kernel = 4 if i == 0 else 2
            self.shrink.append(nn.Conv2d(before, channels, kernel, stride=kernel))
            self.blocks.append(ResidualBlock(channels))
            if text_width and i > self._points_stage:
                film = nn.Linear(text_width, 2 * channels)
                nn.init.zeros_(film.weight)
                nn.init.zeros_(film.bias)
                self.films[str(i)] = film
            before = channels
        self.points = (
            SoftPoints(config.channels[self._points_stage], config.points, text_width, width) if config.points else None
        )
        self.norm = nn.GroupNorm(8, before)
        self.project = nn.Linear(before, width)
        self.position = nn.Parameter(torch.randn(config.grid**2, width) * 0.02)
        line = torch.linspace(-1, 1, config.size)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))[None]
        self.register_buffer("coordinates", grid, persistent=False)

    def forward(self, images: Tensor, text: Tensor | None = None) -> Tensor:
        size = self.config.size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"camera {self.config.name}: expected images [B, {size}, {size}, 3], got {list(images.shape)}"
            )
        x = images.permute(0, 3, 1, 2).to(self.coordinates.dtype) / 127.5 - 1.0
        x = torch.cat((x, self.coordinates.expand(len(x), -1, -1, -1)), dim=1)
        if len(x) > 1 or x.is_cuda:  # on a CPU a single picture would be copied back before each small convolution
            x = x.contiguous(memory_format=torch.channels_last)
        points: tuple[Tensor, ...] = ()
        for i, (shrink, block) in enumerate(zip(self.shrink, self.blocks)):
            x = block(shrink(x), self.films[str(i)](text) if str(i) in self.films and text is not None else None)
            if self.points is not None and i == self._points_stage:
                if text is None:
                    raise ValueError(f"camera {self.config.name}: points need text [B, {self.text_width}], got none")
                points = (self.points(x, text),)
        x = F.silu(self.norm(x))
        tokens = self.project(x.flatten(2).transpose(1, 2)) + self.position
        return torch.cat((tokens, *points), dim=1)
