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
from typing import Any, Literal

import torch
from torch import Tensor

from unlearn_gym import siss
from unlearn_gym.diffusion import per_sample
from unlearn_gym.elbo import Posterior, reconstruction_error
from unlearn_gym.objectives.base import Context, LambdaRole, Learner, OwnPasses, Passes
from unlearn_gym.step import Batch


@dataclass(frozen=True)
class LatentObjective(OwnPasses):
    """One objective of VAEs: ``rows`` says from which posteriors z is drawn, of each pair from one or from both."""

    rows: Literal["mixture", "both", "retain", "forget"]
    lambda_role: LambdaRole = "none"

    def passes(self, model: Any, batch: Batch, lambda_: Tensor, context: Context, learner: Learner | None) -> Passes:
        """Encode both sides, draw, decode and weigh."""
        stopped = context.settings.encoder_gradient == "stopped"
        with torch.no_grad() if stopped else nullcontext():
            retain, forget = encode_pair(model, batch)
        if self.rows == "mixture":
            return _weigh(model, batch, retain, forget, lambda_, context)
        return _each_from_its_own(model, batch, retain, forget, self.rows, context)


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
    log_retain, log_forget = retain.log_density(z), forget.log_density(z)
    if labels is not None:
        log_retain = log_retain.masked_fill(labels.drawn != labels.retain, -torch.inf)
        log_forget = log_forget.masked_fill(labels.drawn != labels.forget, -torch.inf)
    log_mixture = torch.logaddexp(torch.log1p(-lambda_) + log_retain, lambda_.log() + log_forget)
    return (log_retain - log_mixture).exp(), (log_forget - log_mixture).exp()


def _weigh(model: Any, batch: Batch, retain: Posterior, forget: Posterior, lambda_: Tensor, context: Context) -> Passes:
    from_forget = batch.uniforms < lambda_
    drawn = torch.where(per_sample(from_forget, batch.noise), forget.draw(batch.noise), retain.draw(batch.noise))
    labels = None
    if batch.retain_labels is not None and batch.forget_labels is not None:
        labels = siss.mixture_labels(from_forget, batch.retain_labels, batch.forget_labels)
    weights = latent_weights(drawn, retain, forget, lambda_, labels)
    mean = model.decode(drawn, None if labels is None else labels.drawn)
    return _losses(model, batch, (mean, mean), (retain, forget), weights, from_forget, context)


def _each_from_its_own(
    model: Any, batch: Batch, retain: Posterior, forget: Posterior, rows: str, context: Context
) -> Passes:
    """Each side's ELBO from z of its own posterior; the side that ``rows`` leaves out has weight 0."""
    ones = torch.ones_like(batch.uniforms)
    weights = ones * (rows != "forget"), ones * (rows != "retain")
    means = [
        model.decode(posterior.draw(batch.noise), labels) if side else torch.zeros_like(batch.retain)
        for posterior, labels, side in (
            (retain, batch.retain_labels, rows != "forget"), (forget, batch.forget_labels, rows != "retain")
        )
    ]  # fmt: skip
    from_forget = torch.full_like(batch.uniforms, rows == "forget", dtype=torch.bool)
    return _losses(model, batch, (means[0], means[1]), (retain, forget), weights, from_forget, context)


def _losses(
    model: Any,
    batch: Batch,
    means: tuple[Tensor, Tensor],
    posteriors: tuple[Posterior, Posterior],
    weights: tuple[Tensor, Tensor],
    from_forget: Tensor,
    context: Context,
) -> Passes:
    """Weighted losses of both sides and what there is to report of them."""
    s, std, dim = context.settings, model.config.std, batch.retain[0].numel()
    errors = [
        (reconstruction_error(x, mean, std) + s.kl_coef * posterior.divergence()) / dim
        for x, mean, posterior in zip((batch.retain, batch.forget), means, posteriors, strict=True)
    ]
    retain = context.retain_coef * (weights[0] * errors[0]).mean()
    forget = context.forget_coef * (weights[1] * errors[1]).mean()
    residuals = [mean.detach() - x for x, mean in zip((batch.retain, batch.forget), means, strict=True)]
    loss = retain - s.forget_scale * forget
    terms = siss.SISSTerms(*(v.detach() for v in (retain, forget, loss, *errors, *weights, *residuals)))
    return Passes(retain, forget, terms, from_forget)


LATENT_OBJECTIVES = {
    "siss": LatentObjective("mixture", "mixture"),
    "siss-no-is": LatentObjective("both"),
    "naive": LatentObjective("retain"),
    "neggrad": LatentObjective("forget"),
}
