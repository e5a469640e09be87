"""Losses of a model on a task's sets, on a grid of (t, noise) that is the same for every model; labels to ask with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unlearn_gym.math.diffusion import Predictor
from unlearn_gym.models.families import family_of
from unlearn_gym.system.torch_state import insulated
from unlearn_gym.tasks.data import TaskData, to_model_range
from unlearn_gym.tasks.registry import Task


@insulated
def probe_grid(
    model: nn.Module,
    samples: Tensor,
    labels: Tensor | None,
    alphas_cumprod: Tensor,
    *,
    num_samples: int = 300,
    seed: int = 0,
    batch_size: int = 125,
    target: Predictor | None = None,
) -> Tensor:
    """The family's errors on a grid ``(10, n)`` of up to ``num_samples`` of ``samples (N, *S)``, on the model's device;
    samples and noise are chosen by ``seed``. See :func:`unlearn_gym.math.diffusion.grid_loss`.
    """
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(samples), generator=generator)[:num_samples]
    return family_of(model).grid(
        model, to_model_range(samples[chosen]).to(device), alphas_cumprod.to(device),
        labels=None if labels is None else labels[chosen].to(device),
        generator=generator, batch_size=batch_size, target=target,
    ).cpu()  # fmt: skip


def set_losses(model: nn.Module, data: TaskData, alphas_cumprod: Tensor, **options: Any) -> dict[str, float]:
    """``forget_loss`` and ``retain_loss``: what training minimises, a mean over pixels, of forget and of held-out
    retain samples at ten timesteps or latents each; ``options`` are those of :func:`probe_grid`.
    """
    return {
        "forget_loss": probe_grid(model, data.forget, data.forget_labels, alphas_cumprod, **options).mean().item(),
        "retain_loss": probe_grid(model, data.heldout, data.heldout_labels, alphas_cumprod, **options).mean().item(),
    }


def learned_labels(task: Task, data: TaskData, n: int) -> Tensor | None:
    """The labels under which the forget data was learned, equally often ``(n,)``; None for an unconditional model.

    Those of the task, or where it names none those of the data.
    """
    if data.forget_labels is None:
        return None
    labels = torch.tensor(task.probe_labels) if task.probe_labels else data.forget_labels.unique().cpu()
    return equally(labels, n)


def equally(labels: Tensor, n: int) -> Tensor:
    """``n`` labels, each of ``labels`` equally often."""
    return labels.repeat(n // len(labels) + 1)[:n]
