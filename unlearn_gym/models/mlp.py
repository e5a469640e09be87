"""ε-network for points in the plane."""

from __future__ import annotations

import itertools
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from unlearn_gym.models.unet import timestep_embedding
from unlearn_gym.system.values import Checked


class MLPConfig(Checked):
    """Size of an :class:`EpsilonMLP`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mlp"] = "mlp"
    dim: int = Field(2, ge=1)
    hidden: tuple[int, ...] = Field((64, 64, 64), max_length=64)
    embedding_dim: int = Field(32, ge=4)


class EpsilonMLP(nn.Module):
    """``forward(x_t (B, D), timesteps (B,), labels=None) -> epsilon_pred (B, D)``; unconditional."""

    fractional_timesteps: ClassVar[bool] = True

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.dim + config.embedding_dim, *config.hidden)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], config.dim))

    def forward(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict the noise in ``x_t``."""
        embedding = timestep_embedding(timesteps, self.config.embedding_dim)
        return self.net(torch.cat([x_t, embedding], dim=1))
