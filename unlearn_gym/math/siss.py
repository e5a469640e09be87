"""The SISS loss: mixture, importance weights and terms, as pure functions of tensors.

Alberti et al., "Data Unlearning in Diffusion Models" (ICLR 2025, arXiv 2503.01034); λ-orientation and
data-set factors of arXiv 2512.01054. Shapes: samples ``(B, *S)``, timesteps and labels ``(B,)``; one
noise tensor and one timestep serve the retain and the forget sample of a pair. All functions map over a
further leading dimension with ``torch.vmap``.

With a class-conditional network the label belongs to the sample: ``x_t`` carries its own sample's label
(``labels``, from :func:`mixture_labels`), and a density is zero where labels differ. Conditioning on
the drawn label without that would break the importance identity.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlearn_gym.math.diffusion import per_sample, q_sample


class PairLabels(NamedTuple):
    """Labels ``(B,)`` of the drawn sample, of the retain and of the forget sample of each pair."""

    drawn: Tensor
    retain: Tensor
    forget: Tensor


class MixtureTargets(NamedTuple):
    """ε_r and ε_f ``(B, *S)``, the noises that lead from each sample of the pair to x_t, and the importance
    weights w_r = q(x_t|retain)/q_λ(x_t) and w_f = q(x_t|forget)/q_λ(x_t), ``(B,)``.
    """

    retain_noise: Tensor
    forget_noise: Tensor
    retain_weight: Tensor
    forget_weight: Tensor


class SISSTerms(NamedTuple):
    """Per-sample quantities ``(B,)`` and their weighted means (0-dim).

    ``siss_loss = retain_loss - forget_scale * forget_loss``; ``retain_loss`` and ``forget_loss`` hold
    their data-set factor, ``retain_errors`` and ``forget_errors`` are the unweighted squared errors
    ℓ_r and ℓ_f. ``retain_residual`` and ``forget_residual (B, *S)`` are ε_θ - ε_r and ε_θ - ε_f.
    """

    retain_loss: Tensor
    forget_loss: Tensor
    siss_loss: Tensor
    retain_errors: Tensor
    forget_errors: Tensor
    retain_weight: Tensor
    forget_weight: Tensor
    retain_residual: Tensor
    forget_residual: Tensor


def dataset_factors(rule: str, num_retain: int, num_forget: int) -> tuple[float, float]:
    """(c_r, c_f); with N = |R| + |F|, "siss" is (N/(N-K), K/(N-K)), "inverse_size" (N/|R|, N/|F|), "none" (1, 1)."""
    total = num_retain + num_forget
    if rule == "siss":
        return total / num_retain, num_forget / num_retain
    return (total / num_retain, total / num_forget) if rule == "inverse_size" else (1.0, 1.0)


def sample_mixture(
    retain: Tensor,
    forget: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    uniforms: Tensor,
    alphas_cumprod: Tensor,
    lambda_: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw ``x_t (B, *S)`` from the mixture; ``from_forget (B,)`` is True where ``uniforms (B,)`` are below λ.

    Equal ``uniforms`` in [0, 1) give coupled draws at different λ.
    """
    from_forget = uniforms < lambda_
    x_start = torch.where(per_sample(from_forget, retain), forget, retain)
    return q_sample(x_start, noise, timesteps, alphas_cumprod), from_forget


def mixture_labels(from_forget: Tensor, retain_labels: Tensor, forget_labels: Tensor) -> PairLabels:
    """The labels to condition on and to weigh with."""
    drawn = torch.where(from_forget, forget_labels, retain_labels)
    return PairLabels(drawn, retain_labels, forget_labels)


def _residual_noise(x_t: Tensor, x_start: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise that leads from ``x_start`` to ``x_t``: (x_t - √ᾱ x_start) / √(1-ᾱ)."""
    return (x_t - alpha_bar.sqrt() * x_start) / (1.0 - alpha_bar).sqrt()


def log_density_ratio(
    start: Tensor, other: Tensor, noise: Tensor, other_noise: Tensor, alpha_bar: Tensor, dim: int = 1
) -> Tensor:
    """Log q(x_t|other) - log q(x_t|start), summed over the dimensions from ``dim`` on.

    ``noise`` and ``other_noise`` lead from ``start`` and ``other`` to the same x_t; ``alpha_bar`` is ᾱ_t, with one
    entry for each of the leading dimensions and ones behind, as it broadcasts over the samples.

    Both log densities are of the size of the dimension, and their difference mostly is not: half the difference of
    ‖noise‖² and ‖other_noise‖² is taken apart into (noise - other_noise)·(noise + other_noise) / 2, and the first
    factor is √ᾱ (other - start) / √(1-ᾱ), whose digits the subtraction of the noises would have cost.
    """
    products = ((other - start) * (noise + other_noise)).flatten(dim).sum(dim)
    return 0.5 * (alpha_bar / (1.0 - alpha_bar)).sqrt().flatten(dim).squeeze(dim) * products


def importance_weights(
    log_ratio: Tensor, lambda_: float | Tensor, labels: PairLabels | None = None
) -> tuple[Tensor, Tensor]:
    """w_r = q_r/q_λ and w_f = q_f/q_λ ``(B,)`` of q_λ = (1-λ) q_r + λ q_f, from ``log_ratio (B,)`` = log q_f - log q_r.

    A density is zero where ``labels`` differ. ``(1-λ) w_r + λ w_f = 1``, ``w_r <= 1/(1-λ)``, ``w_f <= 1/λ`` to
    rounding, whatever the dimension; finite at λ = 0 and λ = 1 for everything that the mixture can draw.
    Differentiable in a tensor ``lambda_`` in [0, 1] and in ``log_ratio``.
    """
    if labels is not None:
        log_ratio = log_ratio.masked_fill(labels.drawn != labels.retain, torch.inf)
        log_ratio = log_ratio.masked_fill(labels.drawn != labels.forget, -torch.inf)
    lambda_ = torch.as_tensor(lambda_, dtype=log_ratio.dtype, device=log_ratio.device)
    # both densities over the larger one: neither overflows, and at a tie each branch gets half the gradient
    zero = torch.zeros_like(log_ratio)
    retain, forget = torch.minimum(-log_ratio, zero).exp(), torch.minimum(log_ratio, zero).exp()
    mixture = (1.0 - lambda_) * retain + lambda_ * forget
    return retain / mixture, forget / mixture


def mixture_targets(
    x_t: Tensor,
    retain: Tensor,
    forget: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    lambda_: float | Tensor,
    *,
    labels: PairLabels | None = None,
) -> MixtureTargets:
    """What a network is to predict at ``x_t``, and with which weight: known before the network runs.

    :func:`importance_weights` says what holds for the weights. Differentiable in a tensor ``lambda_``.
    """
    alpha_bar = per_sample(alphas_cumprod[timesteps], x_t)
    retain_noise = _residual_noise(x_t, retain, alpha_bar)
    forget_noise = _residual_noise(x_t, forget, alpha_bar)
    log_ratio = log_density_ratio(retain, forget, retain_noise, forget_noise, alpha_bar)
    return MixtureTargets(retain_noise, forget_noise, *importance_weights(log_ratio, lambda_, labels))


def siss_terms(
    epsilon_pred: Tensor,
    targets: MixtureTargets,
    *,
    retain_coef: float = 1.0,
    forget_coef: float = 1.0,
    forget_scale: float = 1.0,
) -> SISSTerms:
    """``L_SISS = c_r mean(w_r ℓ_r) - (1+s) c_f mean(w_f ℓ_f)``, with ℓ the mean over pixels.

    ``retain_coef`` is c_r, ``forget_coef`` c_f and ``forget_scale`` 1+s. Differentiable in
    ``epsilon_pred`` and in the targets' weights.
    """
    retain_residual, forget_residual = epsilon_pred - targets.retain_noise, epsilon_pred - targets.forget_noise
    retain_errors = retain_residual.square().flatten(1).mean(1)
    forget_errors = forget_residual.square().flatten(1).mean(1)
    retain_loss = retain_coef * (targets.retain_weight * retain_errors).mean()
    forget_loss = forget_coef * (targets.forget_weight * forget_errors).mean()
    return SISSTerms(
        retain_loss, forget_loss, retain_loss - forget_scale * forget_loss, retain_errors, forget_errors,
        targets.retain_weight, targets.forget_weight, retain_residual, forget_residual,
    )  # fmt: skip


def output_gradients(terms: SISSTerms, *, retain_coef: float, forget_coef: float) -> tuple[Tensor, Tensor]:
    """∂retain_loss/∂ε_θ and ∂forget_loss/∂ε_θ, each ``(B, *S)``: what the two backward passes start from."""
    scale = 2.0 / terms.retain_residual.numel()
    retain = per_sample(retain_coef * scale * terms.retain_weight, terms.retain_residual)
    forget = per_sample(forget_coef * scale * terms.forget_weight, terms.forget_residual)
    return retain * terms.retain_residual, forget * terms.forget_residual


def lambda_gradients(
    terms: SISSTerms,
    from_forget: Tensor,
    lambda_: float | Tensor,
    *,
    retain_coef: float,
    forget_coef: float,
    forget_scale: float,
) -> dict[str, Tensor]:
    """``dL_SISS/dλ`` by the estimators that differ in kind, as 0-dim tensors.

    ``"pathwise"`` differentiates the weights with the drawn mask fixed (∂w = -w (w_f - w_r) ∂λ): the
    reparameterisation of arXiv 2512.01054, biased towards small λ. ``"score_function"`` adds
    ``loss_i · ∂ log p(mask_i|λ)/∂λ`` and is unbiased: its expectation at fixed θ is zero, because
    ``E[L_SISS]`` does not depend on λ; where weights are saturated it is zero sample by sample, as its two
    parts cancel. ``"kl_only"`` detaches the loss and is zero.
    """
    w_r, w_f = terms.retain_weight, terms.forget_weight
    losses_r = retain_coef * w_r * terms.retain_errors
    losses_f = forget_scale * forget_coef * w_f * terms.forget_errors
    pathwise = (losses_f - losses_r) * (w_f - w_r)
    k = from_forget.to(w_r.dtype)
    tiny = torch.finfo(w_r.dtype).tiny
    probability = torch.as_tensor(lambda_, dtype=w_r.dtype, device=w_r.device)
    score = k / probability.clamp_min(tiny) - (1.0 - k) / (1.0 - probability).clamp_min(tiny)
    return {
        "pathwise": pathwise.mean(),
        "score_function": (pathwise + (losses_r - losses_f) * score).mean(),
        "kl_only": torch.zeros_like(terms.siss_loss),
    }


def output_gradient_products(terms: SISSTerms, *, retain_coef: float, forget_coef: float) -> Tensor:
    """⟨g_r, g_r⟩, ⟨g_r, g_f⟩ and ⟨g_f, g_f⟩ of each drawn x_t, ``(3, B)``, with g = c w ∇ℓ.

    ∇ is taken with respect to the network's output, as per-sample gradients of the weights would cost a
    backward pass each (Katharopoulos and Fleuret, 2018, bound the one by the other).
    """
    retain = per_sample(retain_coef * terms.retain_weight, terms.retain_residual) * terms.retain_residual
    forget = per_sample(forget_coef * terms.forget_weight, terms.forget_residual) * terms.forget_residual
    pairs = ((retain, retain), (retain, forget), (forget, forget))
    return torch.stack([(a * b).flatten(1).mean(1) for a, b in pairs])


def gradient_second_moment(terms: SISSTerms, products: Tensor, lambdas: Tensor) -> Tensor:
    """Means of the ``products (3, B)`` were x_t drawn with each of ``lambdas (G,)`` instead: ``(3, G)``.

    ``E_{q_λ'}[h/q_λ'²] = E_{q_λ}[(h/q_λ²) q_λ/q_λ']`` and ``q_λ'/q_λ = (1-λ') w_r + λ' w_f``: the weights of
    one batch drawn at λ tell of every λ'. :func:`combine_products` makes ‖g_r - m g_f‖² of the rows.
    """
    ratio = (1.0 - lambdas)[:, None] * terms.retain_weight + lambdas[:, None] * terms.forget_weight
    return (products[:, None, :] / ratio).mean(2)


def combine_products(products: Any, forget_multiplier: Any) -> Any:
    """‖g_r - m g_f‖² from ⟨g_r, g_r⟩, ⟨g_r, g_f⟩, ⟨g_f, g_f⟩ ``(3, …)``, tensor or array, and m."""
    return products[0] - 2.0 * forget_multiplier * products[1] + forget_multiplier**2 * products[2]


def second_moment_slope(terms: SISSTerms, products: Tensor, forget_multiplier: float | Tensor) -> Tensor:
    """D log M/dλ' at λ' = λ of the second moment M for a fixed multiplier, 0-dim (0 if all gradients vanish)."""
    squared = combine_products(products, forget_multiplier)
    total = squared.sum().clamp_min(torch.finfo(squared.dtype).tiny)
    return (squared * (terms.retain_weight - terms.forget_weight)).sum() / total
