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

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class CameraEncoder(nn.Module):
    """Convolutions to a grid of tokens: small data teaches a convolution where things are far sooner than patches.

    Two constant channels hold the pixel coordinates (Liu et al. 2018, CoordConv), as actions need positions.
    forward: uint8 or float [B, H, W, 3] in 0..255 -> [B, grid * grid, width], row-major.
    """

    def __init__(self, config: CameraEncoderConfig, width: int):
        super().__init__()
        self.config = config
        stages: list[nn.Module] = []
        before = 5
        for i, channels in enumerate(config.channels):
            kernel = 4 if i == 0 else 2
            stages += [nn.Conv2d(before, channels, kernel, stride=kernel), ResidualBlock(channels)]
            before = channels
        self.stages = nn.Sequential(*stages)
        self.norm = nn.GroupNorm(8, before)
        self.project = nn.Linear(before, width)
        self.position = nn.Parameter(torch.randn(config.grid**2, width) * 0.02)
        line = torch.linspace(-1, 1, config.size)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))[None]
        self.register_buffer("coordinates", grid, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        size = self.config.size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"camera {self.config.name}: expected images [B, {size}, {size}, 3], got {list(images.shape)}"
            )
        x = images.permute(0, 3, 1, 2).to(self.coordinates.dtype) / 127.5 - 1.0
        x = torch.cat((x, self.coordinates.expand(len(x), -1, -1, -1)), dim=1)
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.silu(self.norm(self.stages(x)))
        return self.project(x.flatten(2).transpose(1, 2)) + self.position
