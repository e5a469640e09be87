"""Networks and their weights."""

from __future__ import annotations

from torch import nn

from unlearn_gym.models.mlp import EpsilonMLP, MLPConfig
from unlearn_gym.models.unet import CompactUNet, UNetConfig
from unlearn_gym.models.vae import ConvVAE, VAEConfig

__all__ = [
    "CompactUNet",
    "ConvVAE",
    "EpsilonMLP",
    "MLPConfig",
    "UNetConfig",
    "VAEConfig",
    "build_network",
]


def build_network(config: UNetConfig | MLPConfig | VAEConfig) -> nn.Module:
    """A freshly initialised network; draws from torch's global generator like every ``nn.Module``."""
    if isinstance(config, VAEConfig):
        return ConvVAE(config)
    return CompactUNet(config) if isinstance(config, UNetConfig) else EpsilonMLP(config)
