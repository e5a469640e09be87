"""Losses of a model on a task's sets, on a grid of (t, noise) that is the same for every model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unlearn_gym.diffusion import grid_loss
from unlearn_gym.tasks.data import TaskData, to_model_range


def set_losses(
    model: nn.Module,
    data: TaskData,
    alphas_cumprod: Tensor,
    *,
    num_samples: int = 300,
    seed: int = 0,
    batch_size: int = 125,
) -> dict[str, float]:
    """``forget_loss`` and ``retain_loss``: noise-prediction loss, a mean over pixels, of up to ``num_samples``
    forget and held-out retain samples at ten timesteps each; samples and noise are chosen by ``seed``.
    """
    device = next(model.parameters()).device
    alphas_cumprod, figures = alphas_cumprod.to(device), {}
    for key, samples, labels in (
        ("forget_loss", data.forget, data.forget_labels),
        ("retain_loss", data.heldout, data.heldout_labels),
    ):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(samples), generator=generator)[:num_samples]
        losses = grid_loss(
            model, to_model_range(samples[chosen]).to(device), alphas_cumprod,
            labels=None if labels is None else labels[chosen].to(device), generator=generator, batch_size=batch_size,
        )  # fmt: skip
        figures[key] = losses.mean().item()
    return figures
