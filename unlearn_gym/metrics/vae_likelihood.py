"""Likelihood of data under a VAE in bits per dimension, comparable with a diffusion model's (``likelihood.py``)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unlearn_gym.math.elbo import Posterior
from unlearn_gym.metrics.likelihood import discretised_log_likelihood
from unlearn_gym.system.torch_state import insulated

NUM_IMPORTANCE = 50
"""K of the importance-weighted figure in an evaluation."""


@insulated
@torch.inference_mode()
def importance_weighted_nll(
    model: Any,
    x_start: Tensor,
    *,
    labels: Tensor | None = None,
    generator: torch.Generator,
    num_importance: int = NUM_IMPORTANCE,
    num_levels: int | None = 256,
) -> Tensor:
    """-log (1/K Σ_k p(x|z_k) p(z_k)/q(z_k|x)), K = ``num_importance``, bits per dimension ``(B,)``.

    Burda et al. (2016), eq. 8. K = 1 is the negative ELBO; in expectation the figure falls with K towards -log p(x).
    p(x|z) is the probability of the ``num_levels`` grey values of images ``x_start (B, *S)`` in [-1, 1], each the mass
    of the decoder's Gaussian around it; for ``num_levels=None`` its density.
    """
    posterior, std = Posterior(*model.encode(x_start, labels)), torch.tensor(model.config.std, device=x_start.device)
    logs = []
    for _ in range(num_importance):
        noise = torch.randn(posterior.mean.shape, generator=generator, device=generator.device).to(x_start)
        z = posterior.draw(noise)
        mean = model.decode(z, labels)
        if num_levels is None:
            log_p = -0.5 * (((x_start - mean) / std).square() + math.log(2 * math.pi)) - std.log()
        else:
            log_p = discretised_log_likelihood(x_start, mean, std, num_levels)
        log_prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
        logs.append(log_p.flatten(1).sum(1) + log_prior - posterior.log_density(z))
    log_likelihood = torch.logsumexp(torch.stack(logs), 0) - math.log(num_importance)
    return -log_likelihood / (x_start[0].numel() * math.log(2))
