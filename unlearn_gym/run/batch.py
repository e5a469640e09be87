"""What an update is made of: pairs of retain and forget samples, and what the network is shown of them.

Pure functions of tensors, for one run or, mapped with ``torch.vmap``, for many.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlearn_gym.math import siss
from unlearn_gym.tasks.data import TaskData, to_model_range


class Batch(NamedTuple):
    """One pair batch: samples ``(B, *S)`` in model range, labels ``(B,)`` or None, ``uniforms (B,)`` in [0, 1).

    ``noise (B, *N)`` has the samples' shape for diffusion models, a latent's for VAEs. ``extra``: what an objective
    needs more.
    """

    retain: Tensor
    forget: Tensor
    retain_labels: Tensor | None
    forget_labels: Tensor | None
    noise: Tensor
    timesteps: Tensor
    uniforms: Tensor
    forget_index: Tensor
    extra: Any = None


class Draw(NamedTuple):
    """What the network gets, ``x_t (B, *S)``, ``timesteps`` and ``labels (B,)``, and what it is to predict."""

    x_t: Tensor
    timesteps: Tensor
    labels: Tensor | None
    from_forget: Tensor
    targets: siss.MixtureTargets


def draw_batch(
    data: TaskData,
    size: int,
    num_timesteps: int,
    generator: torch.Generator,
    noise_shape: tuple[int, ...] | None = None,
) -> Batch:
    """A batch of pairs, drawn with replacement on the generator's device; noise has the samples' shape, or another."""
    device = generator.device
    retain_index = torch.randint(len(data.retain), (size,), generator=generator, device=device)
    forget_index = torch.randint(len(data.forget), (size,), generator=generator, device=device)
    retain = to_model_range(data.retain[retain_index])
    return Batch(
        retain,
        to_model_range(data.forget[forget_index]),
        None if data.retain_labels is None else data.retain_labels[retain_index],
        None if data.forget_labels is None else data.forget_labels[forget_index],
        torch.randn((size, *(noise_shape or retain.shape[1:])), generator=generator, device=device),
        torch.randint(num_timesteps, (size,), generator=generator, device=device),
        torch.rand(size, generator=generator, device=device),
        forget_index,
    )


def mix(batch: Batch, alphas_cumprod: Tensor, lambda_: Tensor) -> Draw:
    """Draw x_t from the mixture at ``lambda_ ()`` and weigh it."""
    pair = batch.retain, batch.forget
    x_t, from_forget = siss.sample_mixture(
        *pair, batch.noise, batch.timesteps, batch.uniforms, alphas_cumprod, lambda_
    )  # fmt: skip
    labels = None
    if batch.retain_labels is not None and batch.forget_labels is not None:
        labels = siss.mixture_labels(from_forget, batch.retain_labels, batch.forget_labels)
    targets = siss.mixture_targets(x_t, *pair, batch.timesteps, alphas_cumprod, lambda_, labels=labels)
    return Draw(x_t, batch.timesteps, None if labels is None else labels.drawn, from_forget, targets)
