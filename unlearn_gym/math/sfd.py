"""Score forgetting distillation: a one-step generator, a network that learns its score, and a frozen teacher.

Chen et al., "Score Forgetting Distillation" (ICLR 2025, arXiv 2409.11219), on the distillation of Zhou et al., "Score
identity Distillation" (ICML 2024, arXiv 2404.04057), written for ε-networks of a variance-preserving schedule. Pure
functions of tensors; samples ``(B, *S)``, timesteps and labels ``(B,)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_gym.errors import SettingsError
from unlearn_gym.math.diffusion import Predictor, per_sample, q_sample


class ScoreTerms(NamedTuple):
    """Per-sample figures ``(B,)`` of a generator's samples under one pair of scores.

    ``divergence``: ω ‖f_φ - f_ψ‖², the Fisher divergence that is to fall, never negative. ``surrogate``: what is
    differentiated for it; its own value tells nothing, and is negative for α > 1.
    """

    divergence: Tensor
    surrogate: Tensor


def predict_start(epsilon_pred: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The x_0 that a noise prediction amounts to: (x_t - √(1-ᾱ) ε)/√ᾱ, with ``alpha_bar`` as x_t broadcasts."""
    return (x_t - (1.0 - alpha_bar).sqrt() * epsilon_pred) / alpha_bar.sqrt()


def generate(network: Predictor, noise: Tensor, labels: Tensor | None, alphas_cumprod: Tensor, start: int) -> Tensor:
    """One step from ``noise (B, *S)`` to samples: the x_0 that ``network`` sees in √(1-ᾱ) noise at t = ``start``.

    Raises :class:`SettingsError` where the schedule has no such t.
    """
    if start >= len(alphas_cumprod):
        raise SettingsError(
            f"the generator starts at t={start}, its schedule ends at {len(alphas_cumprod) - 1}; lower start"
        )
    timesteps = torch.full((len(noise),), start, device=noise.device)
    alpha_bar = per_sample(alphas_cumprod[timesteps], noise)
    x_t = (1.0 - alpha_bar).sqrt() * noise
    return predict_start(network(x_t, timesteps, labels), x_t, alpha_bar)


def score_terms(
    samples: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    *,
    teacher: Predictor,
    fake: Predictor,
    teacher_labels: Tensor,
    fake_labels: Tensor,
    alpha: float,
) -> ScoreTerms:
    """How far the score of generated ``samples`` is from the teacher's, and what to differentiate to bring it there.

    With x_t the noisy sample, f_φ and f_ψ what teacher and fake network take x_0 for, Δ = f_φ - f_ψ, and
    ω = 1/mean|x - f_φ|, a constant for the gradient (SiD, eq. 23 and its code):

        surrogate = ω Δ·((f_φ - x) - α Δ),

    a mean over pixels. Labels that differ make the forget loss of SFD: ``fake_labels`` are those of the samples,
    ``teacher_labels`` those of the classes that they are to become. Differentiable in ``samples``.
    """
    alpha_bar = per_sample(alphas_cumprod[timesteps], samples)
    x_t = q_sample(samples, noise, timesteps, alphas_cumprod)
    real = predict_start(teacher(x_t, timesteps, teacher_labels), x_t, alpha_bar)
    learned = predict_start(fake(x_t, timesteps, fake_labels), x_t, alpha_bar)
    scale = (samples - real).detach().abs().flatten(1).mean(1).clamp_min(1e-5)
    difference = real - learned
    surrogate = (difference * ((real - samples) - alpha * difference)).flatten(1).mean(1) / scale
    return ScoreTerms(difference.detach().square().flatten(1).mean(1) / scale, surrogate)


def denoising_loss(
    network: Predictor,
    samples: Tensor,
    labels: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Noise-prediction loss, 0-dim: what the fake network learns the generator's samples by.

    The mean over samples and pixels, each sample's error times its entry of ``weights (B,)`` where there are some.
    """
    pred = network(q_sample(samples, noise, timesteps, alphas_cumprod), timesteps, labels)
    errors = (pred - noise).square()
    return (errors if weights is None else per_sample(weights, errors) * errors).mean()
