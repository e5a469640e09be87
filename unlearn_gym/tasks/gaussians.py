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


def nearest_mode(points: Tensor) -> Tensor:
    """Index of the closest mode within 4 standard deviations, -1 for none: ``(N,)``."""
    distance, index = torch.cdist(points, mode_centers().to(points.device)).min(dim=1)
    return torch.where(distance <= 4 * STD, index, torch.full_like(index, -1))


def load_gaussians(forget_modes: tuple[int, ...] = (0,), per_mode: int = 1000) -> TaskData:
    """Data of ``gaussians-2d``: drawn from a fixed seed, the same on every machine and call."""
    generator = torch.Generator().manual_seed(2512)
    kept = [mode for mode in range(NUM_MODES) if mode not in forget_modes]
    return TaskData(
        retain=sample_modes(kept, per_mode, generator),
        forget=sample_modes(list(forget_modes), per_mode, generator),
        heldout=sample_modes(kept, per_mode // 4, generator),
    )
