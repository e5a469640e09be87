"""A convolutional variational autoencoder for small images, class-conditional as an option."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from unlearn_gym.system.values import Checked

MAX_LOG_VARIANCE = 10.0


class VAEConfig(Checked):
    """Size of a :class:`ConvVAE`; ``channels`` are those after each halving of the image.

    ``std``: the decoder's fixed standard deviation, in units of pixels in [-1, 1]; fixed, as a learned one lets a
    raised forget loss break it first.
    """

    family: ClassVar[str] = "vae"
    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["vae"] = "vae"
    image_channels: int = Field(1, ge=1)
    image_size: int = Field(28, ge=4)
    channels: tuple[int, int] = (32, 48)
    latent_dim: int = Field(16, ge=1)
    hidden_dim: int = Field(128, ge=1)
    num_classes: int | None = Field(None, ge=1)
    std: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> VAEConfig:
        if self.image_size % 4:
            raise ValueError(f"image_size={self.image_size} must be a multiple of 4")
        return self


class ConvVAE(nn.Module):
    """q(z|x, y) = N(μ, diag σ²) and p(x|z, y) = N(decode(z, y), std²); Kingma and Welling (2014).

    Images ``(B, C, H, W)`` in [-1, 1], latents ``z (B, Z)``, labels ``(B,)`` or None for an unconditional one.
    """

    family: ClassVar[str] = "vae"

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        (a, b), size, classes = config.channels, config.image_size // 4, config.num_classes or 0
        self._grid = (b, size, size)
        self.encoder = nn.Sequential(
            nn.Conv2d(config.image_channels, a, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(a, b, 4, stride=2, padding=1), nn.SiLU(), nn.Flatten(),
        )  # fmt: skip
        self.posterior = nn.Sequential(
            nn.Linear(b * size * size + classes, config.hidden_dim), nn.SiLU(),
            nn.Linear(config.hidden_dim, 2 * config.latent_dim),
        )  # fmt: skip
        self.expand = nn.Sequential(
            nn.Linear(config.latent_dim + classes, config.hidden_dim), nn.SiLU(),
            nn.Linear(config.hidden_dim, b * size * size), nn.SiLU(),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(b, a, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(a, a, 3, padding=1), nn.SiLU(),
            nn.Conv2d(a, 4 * config.image_channels, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip

    def encode(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance ``(B, Z)`` of q(z|x, y)."""
        statistics = self.posterior(self._with_label(self.encoder(x), labels))
        mean, log_variance = statistics.chunk(2, dim=1)
        return mean, log_variance.clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean ``(B, C, H, W)`` of p(x|z, y)."""
        return self.decoder(self.expand(self._with_label(z, labels)).view(-1, *self._grid))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The decoder's mean at the posterior's: a reconstruction."""
        return self.decode(self.encode(x, labels)[0], labels)

    def _with_label(self, values: Tensor, labels: Tensor | None) -> Tensor:
        if self.config.num_classes is None:
            return values
        if labels is None:
            raise ValueError("a class-conditional network needs labels (B,)")
        return torch.cat([values, F.one_hot(labels, self.config.num_classes).to(values)], dim=1)
