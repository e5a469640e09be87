"""How much of the forget set a model still holds: rates, distances and a membership-inference attack."""

from __future__ import annotations

from typing import NamedTuple

import scipy  # loads its stats when they are used, which takes a second
import torch
from torch import Tensor

CHUNK = 1000
"""Samples whose distances to another set are computed at once: all at once would not fit for whole data sets."""
COPY_QUANTILE = 0.001
"""The threshold of a copy: closer to the forget set than all but this share of real retain data."""


def membership_auc(member_losses: Tensor, other_losses: Tensor) -> float:
    """Area under the curve of the attack that calls a sample a member when its loss is low; Yeom et al. (2018).

    The chance that a member's loss ``(N,)`` is below that of data never seen ``(M,)``, ties half: in [0, 1]. 1: every
    member stands out; 0.5: none does, as after perfect forgetting; below 0.5: members have suspiciously high losses.
    """
    statistic = scipy.stats.mannwhitneyu(member_losses.numpy(), other_losses.numpy()).statistic
    return 1.0 - float(statistic) / (len(member_losses) * len(other_losses))


def unit_range(samples: Tensor) -> Tensor:
    """Samples as vectors ``(N, D)``: images of [-1, 1] in [0, 1], points as they are."""
    flat = samples.flatten(1)
    return (flat.clamp(-1, 1) + 1) / 2 if samples.dim() == 4 else flat


class Nearest(NamedTuple):
    """Distance ``(N,)`` to the closest sample of another set, and its place there ``(N,)``."""

    distance: Tensor
    place: Tensor


def nearest(samples: Tensor, others: Tensor) -> Nearest:
    """The closest of ``others`` to each of ``samples``: Euclidean, pixels in [0, 1]."""
    other, distances, places = unit_range(others), [], []
    for part in unit_range(samples).split(CHUNK):
        places.append(torch.cdist(part, other).argmin(dim=1))
        distances.append((part - other[places[-1]]).norm(dim=1))  # cdist subtracts squared norms: a copy is not at 0
    return Nearest(torch.cat(distances), torch.cat(places))


def copy_threshold(retain: Tensor, forget: Tensor) -> float:
    """Distance to the forget set that all but 0.1 % of real retain samples exceed: the threshold of a copy."""
    return float(torch.quantile(nearest(retain, forget).distance, COPY_QUANTILE))


def reconstruction_distance(x_start: Tensor, reconstructed: Tensor) -> float:
    """Mean Euclidean distance of samples and their reconstructions, pixels in [0, 1]: small while the model
    remembers, in [0, √D].
    """
    return float((unit_range(x_start) - unit_range(reconstructed)).norm(dim=1).mean())
