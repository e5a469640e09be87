"""Networks and their weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from unlearn_gym.models.mlp import EpsilonMLP, MLPConfig
from unlearn_gym.models.unet import CompactUNet, UNetConfig

NetworkConfig = Annotated[UNetConfig | MLPConfig, Field(discriminator="kind")]

__all__ = ["CompactUNet", "EpsilonMLP", "MLPConfig", "NetworkConfig", "UNetConfig", "build_network"]


def build_network(config: UNetConfig | MLPConfig) -> nn.Module:
    """A freshly initialised network; draws from torch's global generator like every ``nn.Module``."""
    return CompactUNet(config) if isinstance(config, UNetConfig) else EpsilonMLP(config)
