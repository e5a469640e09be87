"""What an update measured, as one vector on its device and as names and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlearn_gym.math import siss
from unlearn_gym.run.gradients import NEGLIGIBLE_WEIGHT, GradientNorms
from unlearn_gym.run.objectives.base import Objective

FEATURES = ("retain_loss", "forget_loss", "retain_grad_norm", "forget_grad_norm")
"""The measured quantities that make up an observation, in its order."""

SECOND_MOMENT_GRID = np.linspace(0.02, 0.98, 49)
"""The λ at which every step reports the second moment of its gradient."""


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
