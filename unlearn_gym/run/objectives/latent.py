"""Objectives of VAEs: SISS in latent space, and its baselines.

The mixture is one of posteriors, q_λ(z) = (1-λ) q(z|x_r) + λ q(z|x_f), as arXiv 2512.01054 names it for VAEs; λ is the
share of *forget* samples, as for diffusion models. (Public code for VAEs has it reversed in places, λ q(z|x_r) +
(1-λ) q(z|x_f), and in one normalises w_r + w_f to 1, which is no importance sampling any more.) One z of one decoder
pass serves both sides:

    w_r = q(z|x_r)/q_λ(z),    ℓ_r = (‖x_r - decode(z)‖²/(2 std²) + β KL(q(z|x_r) ‖ p)) / D,

and w_f, ℓ_f alike. With labels the pair (z, label) is drawn, and a density is zero where labels differ.

**The encoder's gradient** (``encoder_gradient``). ``"full"``: through z = μ + σξ, through both weights and through KL.
Mask and ξ are drawn without regard to the parameters, so that the gradient of w ℓ has the expectation of the gradient
of E_{q(z|x)} ℓ, the negative ELBO's, for encoder and decoder. ``"stopped"``: none; z and weights are constants. By
the importance identity E_{q_λ}[w ∇ℓ] = E_{q(z|x)}[∇ℓ] the decoder's gradient has the same expectation as before, and
the decoder alone draws samples; the encoder stays as it was.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from unlearn_gym.math import siss
from unlearn_gym.math.diffusion import per_sample
from unlearn_gym.math.elbo import Posterior, reconstruction_error
from unlearn_gym.run.batch import Batch
from unlearn_gym.run.objectives.base import Context, Learner, OwnPasses, Passes
from unlearn_gym.settings import LambdaRole


@dataclass(frozen=True)
class LatentObjective(OwnPasses):
    """One objective of VAEs: ``rows`` says from which posteriors z is drawn, of each pair from one or from both."""

    rows: Literal["mixture", "both", "retain", "forget"]
    lambda_role: LambdaRole = "none"

    def unweighted(self) -> OwnPasses:
        """Each side's bound from its own posterior."""
        return LatentObjective("both")

    def passes(self, model: Any, batch: Batch, lambda_: Tensor, context: Context, learner: Learner | None) -> Passes:
        """Encode both sides, draw, decode and weigh."""
        if self.rows == "mixture":
            return _mixture(model, batch, lambda_, context)
        return _each_from_its_own(model, batch, self.rows, context)


def _encoding(context: Context) -> Any:
    """Where encoders are asked: without a graph where their gradient is stopped."""
    return torch.no_grad() if context.settings.encoder_gradient == "stopped" else nullcontext()


def encode_pair(model: Any, batch: Batch) -> tuple[Posterior, Posterior]:
    """Posteriors of the retain and of the forget samples, by one pass of the encoder."""
    labels = None
    if batch.retain_labels is not None and batch.forget_labels is not None:
        labels = torch.cat([batch.retain_labels, batch.forget_labels])
    mean, log_variance = model.encode(torch.cat([batch.retain, batch.forget]), labels)
    size = len(batch.retain)
    return Posterior(mean[:size], log_variance[:size]), Posterior(mean[size:], log_variance[size:])


def latent_weights(
    z: Tensor, retain: Posterior, forget: Posterior, lambda_: Tensor, labels: siss.PairLabels | None
) -> tuple[Tensor, Tensor]:
    """w_r and w_f ``(B,)`` of ``z (B, Z)``, by log densities; differentiable in all."""
    return siss.importance_weights(forget.log_density_ratio(z, retain), lambda_, labels)


def _mixture(model: Any, batch: Batch, lambda_: Tensor, context: Context) -> Passes:
    """One z of each pair, from the posterior that the mask says, for both sides."""
    from_forget = batch.uniforms < lambda_
    with _encoding(context):
        retain, forget = encode_pair(model, batch)
    drawn = torch.where(per_sample(from_forget, batch.noise), forget.draw(batch.noise), retain.draw(batch.noise))
    labels = None
    if batch.retain_labels is not None and batch.forget_labels is not None:
        labels = siss.mixture_labels(from_forget, batch.retain_labels, batch.forget_labels)
    weights = latent_weights(drawn, retain, forget, lambda_, labels)
    mean = model.decode(drawn, None if labels is None else labels.drawn)
    sides = [Side(batch.retain, mean, retain, weights[0]), Side(batch.forget, mean, forget, weights[1])]
    return _losses(sides, model.config.std, from_forget, context)


def _each_from_its_own(model: Any, batch: Batch, rows: str, context: Context) -> Passes:
    """Each side's bound from z of its own posterior; a side that ``rows`` leaves out is not asked, and weighs 0."""
    sides = []
    for name, x, labels in (
        ("retain", batch.retain, batch.retain_labels), ("forget", batch.forget, batch.forget_labels)
    ):  # fmt: skip
        if rows in ("both", name):
            with _encoding(context):
                posterior = Posterior(*model.encode(x, labels))
            mean = model.decode(posterior.draw(batch.noise), labels)
            sides.append(Side(x, mean, posterior, torch.ones_like(batch.uniforms)))
        else:
            sides.append(Side(x, x, Posterior(*torch.zeros(2, len(x), 1).to(x)), torch.zeros_like(batch.uniforms)))
    shown = [
        torch.full_like(batch.uniforms, side == "forget", dtype=torch.bool)
        for side in ("retain", "forget")
        if rows in ("both", side)
    ]
    left_out: dict[str, Any] = {side: None for side in ("retain", "forget") if rows not in ("both", side)}
    return _losses(sides, model.config.std, torch.cat(shown), context)._replace(**left_out)


class Side(NamedTuple):
    """Samples ``x (B, *S)``, the decoder's ``mean (B, *S)`` for them, their posterior and weights ``(B,)``."""

    x: Tensor
    mean: Tensor
    posterior: Posterior
    weight: Tensor


def _losses(sides: list[Side], std: float, from_forget: Tensor, context: Context) -> Passes:
    """Weighted losses of both sides, and what there is to report of them."""
    s, dim = context.settings, sides[0].x[0].numel()
    errors = [
        (reconstruction_error(side.x, side.mean, std) + s.kl_coef * side.posterior.divergence()) / dim for side in sides
    ]
    retain = context.retain_coef * (sides[0].weight * errors[0]).mean()
    forget = context.forget_coef * (sides[1].weight * errors[1]).mean()
    loss, residuals = retain - s.forget_scale * forget, [side.mean - side.x for side in sides]
    parts = (retain, forget, loss, *errors, *(side.weight for side in sides), *residuals)
    return Passes(retain, forget, siss.SISSTerms(*(part.detach() for part in parts)), from_forget)


LATENT_OBJECTIVES = {
    "siss": LatentObjective("mixture", "mixture"),
    "siss-no-is": LatentObjective("both"),
    "naive": LatentObjective("retain"),
    "neggrad": LatentObjective("forget"),
}
