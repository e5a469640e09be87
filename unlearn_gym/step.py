"""The arithmetic of an update around the network's passes: pure functions of tensors, for one run or, mapped
with ``torch.vmap``, for many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlearn_gym import siss
from unlearn_gym.settings import RunSettings
from unlearn_gym.tasks.data import TaskData, to_model_range

if TYPE_CHECKING:
    from unlearn_gym.objectives.base import Objective

FEATURES = ("retain_loss", "forget_loss", "retain_grad_norm", "forget_grad_norm")
"""The measured quantities that make up an observation, in its order."""

SECOND_MOMENT_GRID = np.linspace(0.02, 0.98, 49)
"""The λ at which every step reports the second moment of its gradient."""

NEGLIGIBLE_WEIGHT = 1e-3
BLOCK = 2**16
"""How many products of a long vector's entries are added up in one go."""


class Moments(np.ndarray[Any, np.dtype[np.float64]]):
    """An array whose ``repr`` is its shape, so that an ``info`` can be printed; ``print`` shows its values."""

    def __repr__(self) -> str:
        return f"<array of shape {self.shape}>"


@dataclass(frozen=True, slots=True)
class StepTerms:
    """What one batch measured, as ``info["terms"]`` has it. Losses hold their factor (c_r, c_f), ``loss_reduction`` in
    it; norms are those of the gradients of ``retain_loss`` and ``forget_loss``, before any rescaling or clipping.
    """

    lambda_: Annotated[float, "λ of the update"]
    retain_loss: Annotated[float, "c_r times the batch's mean of the weighted errors on retain samples"]
    forget_loss: Annotated[float, "c_f times the batch's mean of the weighted errors on forget samples"]
    siss_loss: Annotated[
        float,
        "the total loss that the objective reports; rescaling (`forget_grad_rule`) and `sfd`'s surrogate are not in it",
    ]
    retain_grad_norm: Annotated[float, "norm of the gradient of `retain_loss`, before rescaling and clipping"]
    forget_grad_norm: Annotated[float, "norm of the gradient of `forget_loss`, before rescaling and clipping"]
    forget_multiplier: Annotated[float, "factor that the forget gradient got (`forget_grad_rule`)"]
    update_norm: Annotated[float, "norm of the whole gradient before clipping"]
    direct_grad_norm: Annotated[float, "norm of the gradient that a hybrid adds (`hybrid_coef`), else 0"]
    retain_weight_max: Annotated[float, "largest importance weight of the retain terms"]
    forget_weight_max: Annotated[float, "largest importance weight of the forget terms"]
    retain_ess: Annotated[float, "effective sample size (Σw)²/Σw² of the retain weights, in 0..B"]
    forget_ess: Annotated[float, "effective sample size (Σw)²/Σw² of the forget weights, in 0..B"]
    negligible_fraction: Annotated[float, "share of the 2B weights below 0.001"]
    forget_fraction: Annotated[float, "share of the noisy samples x_t that were drawn from forget samples"]
    norms_age: Annotated[int, 'updates since both norms were measured, 0 unless `grad_norms="every:k"`']
    lambda_gradients: Annotated[
        dict[str, float],
        "dL/dλ by the estimators `pathwise`, `score_function` and `kl_only`, 0 where λ does nothing; `variance`: "
        "d log M/dλ of the gradient's second moment M, 0 where λ is no mixture's weight",
    ]
    second_moment: Annotated[
        NDArray[np.float64],
        "array (3, 49): the parts ⟨g_r, g_r⟩, ⟨g_r, g_f⟩ and ⟨g_f, g_f⟩ of M at 49 λ from 0.02 to 0.98; zeros where λ "
        "is no mixture's weight",
    ]
    diverged: Annotated[bool, "whether a loss, a norm or a parameter is not finite"]

    def as_dict(self) -> dict[str, Any]:
        """The terms by name; dict and array are copies."""
        values = {name: getattr(self, name) for name in self.__slots__}
        moment = self.second_moment.copy().view(Moments)
        return {**values, "lambda_gradients": {**self.lambda_gradients}, "second_moment": moment}


SCALARS = StepTerms.__slots__[1 : StepTerms.__slots__.index("norms_age")]
SLOPES = ("pathwise", "score_function", "kl_only", "variance")


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


class GradientNorms(NamedTuple):
    """0-dim tensors: ‖g_r‖, ‖g_f‖, the factor m of the forget gradient, ‖g_r - m g_f‖; ``direct``: that of a third."""

    retain: Tensor
    forget: Tensor
    forget_multiplier: Tensor
    update: Tensor
    direct: Tensor


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


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two vectors ``(P,)``, 0-dim.

    In blocks on a CPU, which adds the products up one after the other: in float32 a norm of five million entries would
    be wrong in its fifth digit, one of fifty million in its fourth. Accelerators add them up as a tree.
    """
    if len(a) <= BLOCK or a.device.type != "cpu":
        return torch.dot(a, b)
    blocks = zip(a.split(BLOCK), b.split(BLOCK), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in blocks]).sum()


def gradient_norms(
    retain_grad: Tensor,
    forget_grad: Tensor,
    forget_weight: Tensor,
    settings: RunSettings,
    objective: Objective,
) -> GradientNorms:
    """The norms of both gradients ``(P,)``, the forget gradient's factor by its rule, and the norm of the whole.

    For an objective that ``projects`` the factor is EraseDiff's, -max(0, 1+s - ⟨g_r, g_f⟩/‖g_f‖²): just
    so much that the update's product with the forget gradient is at least ``forget_scale`` times that one's square.

    The norm rules would blow a batch without forget data up to full strength: where all its forget
    weights are negligible, the direction of their gradient means nothing and its factor is 0.
    """
    r, f, rule = retain_grad, forget_grad, settings.forget_grad_rule
    rr, rf, ff = inner_product(r, r), inner_product(r, f), inner_product(f, f)
    retain, forget = rr.sqrt(), ff.sqrt()
    if objective.projects:
        missing = settings.forget_scale - rf / ff.clamp_min(torch.finfo(ff.dtype).tiny)
        multiplier = missing.clamp_min(0.0)
    elif rule == "loss":
        multiplier = torch.full_like(forget, settings.forget_scale)
    else:
        target = settings.forget_grad_norm * (retain if rule == "relative_norm" else 1.0)
        says_something = (forget > 0) & (forget_weight.max() > NEGLIGIBLE_WEIGHT)
        multiplier = torch.where(says_something, target / forget, torch.zeros_like(forget))
    multiplier = objective.sign * multiplier
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


def effective_sample_size(weights: Tensor) -> Tensor:
    """(Σw)²/Σw², 0 where all weights vanish."""
    return weights.sum().square() / weights.square().sum().clamp_min(torch.finfo(weights.dtype).tiny)


def pack(
    from_forget: Tensor,
    terms: siss.SISSTerms,
    norms: GradientNorms,
    lambda_: Tensor,
    parameter_sum: Tensor,
    grid: Tensor,
    *,
    objective: Objective,
    retain_coef: float,
    forget_coef: float,
    forget_scale: float,
    lambda_gradients: dict[str, Tensor] | None = None,
) -> Tensor:
    """Everything that a step reports as one vector on its device, for one transfer; :func:`unpack` reads it.

    ``parameter_sum ()`` is the sum of all parameters: not finite as soon as one of them is not.
    """
    coefs = {"retain_coef": retain_coef, "forget_coef": forget_coef}
    slopes = {**(lambda_gradients or {})} or objective.lambda_gradients(
        terms, from_forget, lambda_, forget_scale=forget_scale, **coefs
    )
    moment, slopes["variance"] = torch.zeros(3, len(grid), device=grid.device), torch.zeros_like(terms.siss_loss)
    if objective.lambda_role == "mixture":
        products = siss.output_gradient_products(terms, **coefs)
        moment = siss.gradient_second_moment(terms, products, grid)
        slopes["variance"] = siss.second_moment_slope(terms, products, norms.forget_multiplier)
    w_r, w_f = terms.retain_weight, terms.forget_weight
    negligible = torch.cat([w_r, w_f]) < NEGLIGIBLE_WEIGHT
    scalars = [
        terms.retain_loss, terms.forget_loss, terms.siss_loss,
        norms.retain, norms.forget, norms.forget_multiplier, norms.update, norms.direct,
        w_r.max(), w_f.max(), effective_sample_size(w_r), effective_sample_size(w_f),
        negligible.float().mean(), from_forget.float().mean(),
    ]  # fmt: skip
    return torch.cat([torch.stack([*scalars, *(slopes[name] for name in SLOPES), parameter_sum]), moment.flatten()])


def unpack(values: NDArray[np.float64], lambda_: float, norms_age: int) -> StepTerms:
    """The terms that :func:`pack` made a vector of."""
    first, last = len(SCALARS), len(SCALARS) + len(SLOPES)
    return StepTerms(
        lambda_=lambda_,
        **dict(zip(SCALARS, values[:first].tolist(), strict=True)),
        norms_age=norms_age,
        lambda_gradients=dict(zip(SLOPES, values[first:last].tolist(), strict=True)),
        second_moment=values[last + 1 :].reshape(3, -1),
        diverged=not bool(np.isfinite(values[: last + 1]).all()),
    )
