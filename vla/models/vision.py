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
    """

    name: str
    size: int
    grid: int
    channels: tuple[int, ...] = (48, 96, 192)

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


class CameraEncoder(nn.Module):
    """Convolutions to a grid of tokens: small data teaches a convolution where things are far sooner than patches.

    Two constant channels hold the pixel coordinates (Liu et al. 2018, CoordConv), as actions need positions. With
    text_width > 0 a summary of the instruction scales and shifts the features of every stage (Perez et al. 2018, FiLM;
    as in RT-1, Brohan et al. 2022), so that the encoder looks for what was asked; it starts as the plain encoder.
    forward: uint8 or float [B, H, W, 3] in 0..255, text [B, text_width] or None -> [B, grid * grid, width], row-major.
    """

    def __init__(self, config: CameraEncoderConfig, width: int, text_width: int = 0):
        super().__init__()
        self.config = config
        self.shrink, self.blocks, self.films = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before = 5
        for i, channels in enumerate(config.channels):
            kernel = 4 if i == 0 else 2
            self.shrink.append(nn.Conv2d(before, channels, kernel, stride=kernel))
            self.blocks.append(ResidualBlock(channels))
            if text_width:
                film = nn.Linear(text_width, 2 * channels)
                nn.init.zeros_(film.weight)
                nn.init.zeros_(film.bias)
                self.films.append(film)
            before = channels
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
        x = x.contiguous(memory_format=torch.channels_last)
        for i, (shrink, block) in enumerate(zip(self.shrink, self.blocks)):
            x = block(shrink(x), self.films[i](text) if self.films and text is not None else None)
        x = F.silu(self.norm(x))
        return self.project(x.flatten(2).transpose(1, 2)) + self.position
