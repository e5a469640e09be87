"""A compact ε-network for small images: a step costs milliseconds on a CPU."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from unlearn_gym.system.values import Checked


class UNetConfig(Checked):
    """Size of a :class:`CompactUNet`; ``channels`` has one entry for each resolution."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["unet"] = "unet"
    image_channels: int = Field(1, ge=1)
    image_size: int = Field(28, ge=4)
    channels: tuple[int, ...] = Field((32, 64), max_length=16)  # more would take minutes to build
    num_blocks: int = Field(2, ge=1, le=64)
    attention: bool = True
    embedding_dim: int = Field(128, ge=8)
    num_classes: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _divisible(self) -> UNetConfig:
        factor = 2 ** len(self.channels)
        if not self.channels or self.image_size % factor:
            raise ValueError(f"image_size={self.image_size} must be a multiple of {factor}")
        if any(c % 8 for c in self.channels):
            raise ValueError(f"channels={self.channels} must be multiples of 8")
        return self


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding ``(B, dim)`` of integer timesteps; Vaswani et al. (2017), section 3.5."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10_000.0) / (half - 1)))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ResBlock(nn.Module):
    """Two 3×3 convolutions with the embedding added between them, and a skip."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x (B, in, H, W)``, ``embedding (B, E)`` -> ``(B, out, H, W)``."""
        h = self.conv1(F.silu(self.norm1(x))) + self.embedding(embedding)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SelfAttention(nn.Module):
    """Single-head self-attention over the positions of a small feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> the same shape."""
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(attended.transpose(1, 2).reshape(batch, channels, height, width))


class CompactUNet(nn.Module):
    """U-Net on a pixel-unshuffled image: the full resolution is never convolved.

    ``forward(x_t (B, C, H, W), timesteps (B,), labels (B,) or None) -> epsilon_pred (B, C, H, W)``.
    Self-attention runs at the lowest resolution only.
    """

    fractional_timesteps: ClassVar[bool] = True

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, dim, blocks = config.channels, config.embedding_dim, config.num_blocks
        self.time_mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.class_embedding = nn.Embedding(config.num_classes, dim) if config.num_classes else None
        self.stem = nn.Conv2d(4 * config.image_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList(nn.ModuleList(ResBlock(c, c, dim) for _ in range(blocks)) for c in channels[:-1])
        steps = list(itertools.pairwise(channels))
        self.downsample = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in steps)
        self.middle = nn.ModuleList(ResBlock(channels[-1], channels[-1], dim) for _ in range(2 * blocks))
        self.attention = SelfAttention(channels[-1]) if config.attention else nn.Identity()
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in steps)
        self.up = nn.ModuleList(
            nn.ModuleList(ResBlock(2 * c if i == 0 else c, c, dim) for i in range(blocks)) for c in channels[:-1]
        )
        self.norm = nn.GroupNorm(8, channels[0])
        self.head = nn.Conv2d(channels[0], 4 * config.image_channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict the noise in ``x_t``."""
        embedding = self.time_mlp(timestep_embedding(timesteps, self.config.embedding_dim))
        if self.class_embedding is not None:
            if labels is None:
                raise ValueError("a class-conditional network needs labels (B,)")
            embedding = embedding + self.class_embedding(labels)
        embedding = F.silu(embedding)
        h = self.stem(F.pixel_unshuffle(x_t, 2))
        skips = []
        for blocks, downsample in zip(self.down, self.downsample, strict=True):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, embedding)
            skips.append(h)
            h = downsample(h)
        half = len(self.middle) // 2
        for block in self.middle[:half]:
            h = block(h, embedding)
        h = self.attention(h)
        for block in self.middle[half:]:
            h = block(h, embedding)
        for blocks, upsample in zip(reversed(self.up), reversed(self.upsample), strict=True):
            h = torch.cat([upsample(h), skips.pop()], dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, embedding)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)
