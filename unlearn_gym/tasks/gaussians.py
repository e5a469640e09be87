"""A ring of eight Gaussians in the plane: exact ground truth, thousands of steps a second."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unlearn_gym.tasks.data import TaskData

NUM_MODES = 8
RADIUS = 2.0
STD = 0.15


def mode_centers() -> Tensor:
    """Centres of the modes, ``(8, 2)``."""
    angles = torch.arange(NUM_MODES) * (2 * math.pi / NUM_MODES)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)


def sample_modes(modes: list[int], per_mode: int, generator: torch.Generator) -> Tensor:
    """``per_mode`` points of each of ``modes``, shuffled: ``(len(modes) * per_mode, 2)``."""
    centers = mode_centers()[modes].repeat_interleave(per_mode, dim=0)
    points = centers + STD * torch.randn(centers.shape, generator=generator)
    return points[torch.randperm(len(points), generator=generator)]


def closest_mode(points: Tensor) -> Tensor:
    """Index of the mode closest to each point ``(N,)``, however far."""
    return torch.cdist(points, mode_centers()).argmin(1)


def classify_points(points: Tensor) -> tuple[Tensor, Tensor]:
    """The points themselves as features ``(N, 2)``, and log-densities under each mode, up to a constant, as logits
    ``(N, 9)``; the ninth class is none of them: farther than 4 standard deviations from every mode.
    """
    points = points.to(torch.float32)
    log_densities = -0.5 * (torch.cdist(points, mode_centers().to(points.device)) / STD).square()
    return points, torch.cat([log_densities, torch.full_like(log_densities[:, :1], -0.5 * 4**2)], dim=1)


def optimal_epsilon(modes: tuple[int, ...], x_t: Tensor, alpha_bars: Tensor) -> Tensor:
    """E[noise | x_t] ``(B, 2)`` for equally likely ``modes``, ``x_t (B, 2)`` and ``alpha_bars (B,)``: the noise
    prediction of least expected error.

    x_t is a mixture of Gaussians of variance v = ᾱ STD² + 1 - ᾱ around √ᾱ c, and the noise's mean given x_t and the
    mode is √(1-ᾱ) (x_t - √ᾱ c) / v.
    """
    alpha_bars = alpha_bars[:, None]
    variance = alpha_bars * STD**2 + 1 - alpha_bars
    offsets = x_t[:, None, :] - alpha_bars.sqrt()[:, :, None] * mode_centers()[list(modes)].to(x_t)[None]
    shares = torch.softmax(-offsets.square().sum(2) / (2 * variance), dim=1)
    return (1 - alpha_bars).sqrt() * (shares[:, :, None] * offsets).sum(1) / variance


PER_MODE, HELDOUT_PER_MODE = 1000, 250


def load_gaussians(forget_modes: tuple[int, ...] = (0,)) -> TaskData:
    """Data of ``gaussians-2d``: drawn from a fixed seed, the same on every machine and call.

    All members of the family share one pool of points that the pretrained model has learned and one that no model has
    seen; which modes are to be forgotten only parts them.
    """
    generator, others = torch.Generator().manual_seed(2512), list(range(1, NUM_MODES))
    retain, forget = sample_modes(others, PER_MODE, generator), sample_modes([0], PER_MODE, generator)
    heldout, unseen = sample_modes(others, HELDOUT_PER_MODE, generator), sample_modes([0], PER_MODE, generator)
    learned, new = torch.cat([retain, forget]), torch.cat([heldout, unseen[:HELDOUT_PER_MODE]])
    of_forget = [torch.isin(closest_mode(points), torch.tensor(forget_modes)) for points in (learned, new)]
    return TaskData(
        retain=learned[~of_forget[0]], forget=learned[of_forget[0]], heldout=new[~of_forget[1]],
        unseen=unseen if forget_modes == (0,) else new[of_forget[1]],
    )  # fmt: skip
