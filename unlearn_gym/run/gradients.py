"""Both gradients of an update: their norms, the rule that weighs them, and clipping.

Pure functions of tensors, for one run or, mapped with ``torch.vmap``, for many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_gym.settings import OWN_FORGET_RULES, RunSettings

NEGLIGIBLE_WEIGHT = 1e-3
"""Importance weights below it count as none."""
BLOCK = 2**16
"""How many products of a long vector's entries are added up in one go."""


class GradientNorms(NamedTuple):
    """0-dim tensors: ‖g_r‖, ‖g_f‖, the factor m of the forget gradient, ‖g_r - m g_f‖; ``direct``: that of a third."""

    retain: Tensor
    forget: Tensor
    forget_multiplier: Tensor
    update: Tensor
    direct: Tensor


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two vectors ``(P,)``, 0-dim.

    In blocks on a CPU, which adds the products up one after the other: in float32 a norm of five million entries would
    be wrong in its fifth digit, one of fifty million in its fourth. Accelerators add them up as a tree.
    """
    if len(a) <= BLOCK or a.device.type != "cpu":
        return torch.dot(a, b)
    blocks = zip(a.split(BLOCK), b.split(BLOCK), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in blocks]).sum()


def takes_strength(settings: RunSettings) -> bool:
    """Whether the forget gradient's rule has a constant that an action may set anew."""
    return settings.forget_grad_rule != "loss" and settings.objective not in OWN_FORGET_RULES


def gradient_norms(
    retain_grad: Tensor,
    forget_grad: Tensor,
    forget_weight: Tensor,
    settings: RunSettings,
    *,
    sign: float,
    projects: bool,
    strength: float | Tensor | None = None,
) -> GradientNorms:
    """The norms of both gradients ``(P,)``, the forget gradient's factor by its rule, and the norm of the whole.

    ``sign`` and ``projects`` are the objective's. Where it ``projects``, the factor is EraseDiff's,
    -max(0, 1+s - ⟨g_r, g_f⟩/‖g_f‖²): just so much that the update's product with the forget gradient is at least
    ``forget_scale`` times that one's square. ``strength`` takes the place of ``forget_grad_norm``.

    The norm rules would blow a batch without forget data up to full strength: where all its forget
    weights are negligible, the direction of their gradient means nothing and its factor is 0.
    """
    r, f, rule = retain_grad, forget_grad, settings.forget_grad_rule
    rr, rf, ff = inner_product(r, r), inner_product(r, f), inner_product(f, f)
    retain, forget = rr.sqrt(), ff.sqrt()
    if projects:
        missing = settings.forget_scale - rf / ff.clamp_min(torch.finfo(ff.dtype).tiny)
        multiplier = missing.clamp_min(0.0)
    elif rule == "loss":
        multiplier = torch.full_like(forget, settings.forget_scale)
    else:
        constant = settings.forget_grad_norm if strength is None else strength
        target = constant * (retain if rule == "relative_norm" else 1.0)
        says_something = (forget > 0) & (forget_weight.max() > NEGLIGIBLE_WEIGHT)
        multiplier = torch.where(says_something, target / forget, torch.zeros_like(forget))
    multiplier = sign * multiplier
    update = (rr - 2.0 * multiplier * rf + multiplier.square() * ff).clamp_min(0.0).sqrt()
    return GradientNorms(retain, forget, multiplier, update, torch.zeros_like(update))


def clip_factor(norm: Tensor, max_grad_norm: float | None) -> Tensor:
    """What brings a gradient of ``norm ()`` down to ``max_grad_norm``; 1 where it is below, or for None."""
    if max_grad_norm is None:
        return torch.ones_like(norm)
    return (max_grad_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(max=1.0)


def clip_values(gradient: Tensor, max_grad_value: float | None) -> None:
    """Clamp each entry of ``gradient`` in place to ±``max_grad_value``; None leaves it."""
    if max_grad_value is not None:
        gradient.clamp_(-max_grad_value, max_grad_value)
