"""Objectives of ε-networks, as pure functions of tensors.

Such an objective says what the network is shown and what it is to predict there, as a
:class:`unlearn_gym.run.batch.Draw`: rows x_t, two targets and two weights for each. The run does the rest:

    L = c_r mean(w_r ℓ_r) - σ (1+s) c_f mean(w_f ℓ_f),

with σ = 1 where the forget term's error is to rise, and -1 where its target is one to be learned. Objectives with a
forward pass for each side show 2B rows, whose weights are 2 and 0, so that means over rows are means over a side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unlearn_gym.math import siss
from unlearn_gym.math.diffusion import per_sample, q_sample
from unlearn_gym.run.batch import Batch, Draw, mix
from unlearn_gym.run.objectives.base import Objective
from unlearn_gym.settings import LambdaRole, RunSettings
from unlearn_gym.tasks.data import TaskData, to_model_range

NUM_NEIGHBOURS = 10
"""ReTrack's K."""

DrawRows = Callable[[Batch, Tensor, Tensor], Draw]
Rows = Literal["mixture", "retain", "forget", "both"]
"""Which rows are shown: B of the mixture, B of one side, or B of each."""


@dataclass(frozen=True)
class EpsilonObjective(Objective):
    """One objective of ε-networks.

    Args:
        rows: what is shown.
        draw: makes it, from a batch, ᾱ_t ``(T,)`` and λ (0-dim).
        lambda_role: see :class:`Objective`, as ``learns_target`` and ``projects``.
        extra: what a batch needs more, ``"uniform"`` noise or ``"neighbours"``.
    """

    rows: Rows
    draw: DrawRows
    lambda_role: LambdaRole = "none"
    learns_target: bool = False
    projects: bool = False
    extra: Literal["uniform", "neighbours"] | None = None

    def own_rows(self, count: int) -> tuple[slice, slice] | None:
        """The rows with a retain and those with a forget weight, of ``count``, where the objective fixes them."""
        if self.rows == "mixture":
            return None
        split = {"retain": count, "forget": 0, "both": count // 2}[self.rows]
        return slice(split), slice(split, count)

    def prepare(self, data: TaskData, settings: RunSettings) -> Tensor | None:
        """Places ``(|F|, K)`` of each forget sample's nearest retain samples, where they are needed."""
        return nearest(data.forget, data.retain, NUM_NEIGHBOURS) if self.extra == "neighbours" else None

    def complete(self, batch: Batch, data: TaskData, prepared: Tensor | None, generator: torch.Generator) -> Batch:
        """``batch`` with uniform noise or the forget samples' neighbours, where they are needed."""
        if self.extra == "uniform":
            return batch._replace(extra=torch.rand(batch.noise.shape, generator=generator, device=generator.device))
        if prepared is not None:
            return batch._replace(extra=to_model_range(data.retain[prepared[batch.forget_index]]))
        return batch

    def weight_slope(
        self,
        terms: siss.SISSTerms,
        from_forget: Tensor,
        *,
        retain_coef: float,
        forget_coef: float,
        forget_scale: float,
    ) -> Tensor:
        """dL/dλ where λ is a weight and every row has one side's error."""
        forget = forget_scale * forget_coef * terms.forget_errors
        return 2.0 * torch.where(from_forget, -self.sign * forget, -retain_coef * terms.retain_errors).mean()


def bernoulli(batch: Batch, alphas_cumprod: Tensor, lambda_: Tensor) -> Draw:
    """The same draw, but each x_t serves its own side alone, with 1/(1-λ) or 1/λ for the other sides' absence."""
    drawn = mix(batch, alphas_cumprod, lambda_)
    k = drawn.from_forget
    retain_weight = torch.where(k, 0.0, 1.0 / (1.0 - lambda_))
    forget_weight = torch.where(k, 1.0 / lambda_, 0.0)
    return drawn._replace(targets=siss.MixtureTargets(batch.noise, batch.noise, retain_weight, forget_weight))


def _show(batch: Batch, alphas_cumprod: Tensor, rows: Rows, weights: tuple[Tensor | float, Tensor | float]) -> Draw:
    """Rows of one side, or of both one after the other, to predict their own noise with these weights."""
    sides = [(False, batch.retain, batch.retain_labels), (True, batch.forget, batch.forget_labels)]
    sides = [side for side in sides if rows == "both" or side[0] == (rows == "forget")]
    noise = torch.cat([batch.noise] * len(sides))
    timesteps = torch.cat([batch.timesteps] * len(sides))
    x_t = q_sample(torch.cat([x for _, x, _ in sides]), noise, timesteps, alphas_cumprod)
    labels = None
    if batch.retain_labels is not None and batch.forget_labels is not None:
        labels = torch.cat([label for _, _, label in sides if label is not None])
    from_forget = torch.cat([torch.full_like(batch.uniforms, k, dtype=torch.bool) for k, _, _ in sides])
    zero = torch.zeros_like(from_forget, dtype=noise.dtype)
    retain_weight, forget_weight = zero + weights[0], zero + weights[1]
    targets = siss.MixtureTargets(
        noise, noise, torch.where(from_forget, zero, retain_weight), torch.where(from_forget, forget_weight, zero)
    )
    return Draw(x_t, timesteps, labels, from_forget, targets)


def retain_only(batch: Batch, alphas_cumprod: Tensor, lambda_: Tensor) -> Draw:
    """Naive deletion: go on training on the retain data."""
    return _show(batch, alphas_cumprod, "retain", (1.0, 1.0))


def forget_only(batch: Batch, alphas_cumprod: Tensor, lambda_: Tensor) -> Draw:
    """NegGrad: raise the error on the forget data."""
    return _show(batch, alphas_cumprod, "forget", (1.0, 1.0))


def both(batch: Batch, alphas_cumprod: Tensor, lambda_: Tensor) -> Draw:
    """SISS without importance sampling: each side from its own data, in a forward pass of its own."""
    return _show(batch, alphas_cumprod, "both", (2.0, 2.0))


def towards_uniform(batch: Batch, alphas_cumprod: Tensor, lambda_: Tensor) -> Draw:
    """EraseDiff: at noisy forget data the network is to predict uniform noise in [0, 1]."""
    drawn = both(batch, alphas_cumprod, lambda_)
    return _towards(drawn, batch.extra)


def towards_neighbours(batch: Batch, alphas_cumprod: Tensor, lambda_: Tensor) -> Draw:
    """ReTrack: at noisy forget data the network is to predict what leads to retain data nearby.

    The target is Σ p_k v_k over the K neighbours x_k of the forget sample, v_k = (x_t - √ᾱ x_k)/√(1-ᾱ) and
    p = softmax(-‖v‖²/2): up to a constant ReTrack's Σ p_k ‖ε_θ - v_k‖², whose gradient it has.
    """
    drawn = _show(batch, alphas_cumprod, "both", (2.0 * (1.0 - lambda_), 2.0 * lambda_))
    neighbours = batch.extra
    assert neighbours is not None
    size = batch.noise.shape[0]
    alpha_bar = per_sample(alphas_cumprod[batch.timesteps], batch.noise).unsqueeze(1)
    noises = (drawn.x_t[size:].unsqueeze(1) - alpha_bar.sqrt() * neighbours) / (1.0 - alpha_bar).sqrt()
    nearest_one = neighbours[:, :1], noises[:, :1]
    shares = siss.log_density_ratio(nearest_one[0], neighbours, nearest_one[1], noises, alpha_bar, dim=2).softmax(1)
    shares = shares.view(*shares.shape, *(1,) * (noises.dim() - 2))
    return _towards(drawn, (shares * noises).sum(1))


def _towards(drawn: Draw, target: Tensor | None) -> Draw:
    """``drawn`` with another target ``(B, *S)`` for the forget rows, the second half."""
    assert target is not None
    noise = drawn.targets.forget_noise
    return drawn._replace(targets=drawn.targets._replace(forget_noise=torch.cat([noise[: len(target)], target])))


EPSILON_OBJECTIVES = {
    "siss": EpsilonObjective("mixture", mix, "mixture"),
    "siss-no-is": EpsilonObjective("both", both, "none"),
    "bernoulli": EpsilonObjective("mixture", bernoulli, "mixture"),
    "naive": EpsilonObjective("retain", retain_only, "none"),
    "neggrad": EpsilonObjective("forget", forget_only, "none"),
    "erasediff": EpsilonObjective("both", towards_uniform, "none", learns_target=True, projects=True, extra="uniform"),
    "retrack": EpsilonObjective("both", towards_neighbours, "weight", learns_target=True, extra="neighbours"),
}


def nearest(samples: Tensor, pool: Tensor, count: int) -> Tensor:
    """Indices ``(N, count)`` of the ``pool (M, *S)`` members nearest to each of ``samples (N, *S)``, by pixels."""
    flat = pool.flatten(1).float()
    count = min(count, len(pool))
    parts = [torch.cdist(part.flatten(1).float(), flat).topk(count, largest=False)[1] for part in samples.split(256)]
    return torch.cat(parts)
