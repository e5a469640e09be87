"""The evidence lower bound of a VAE, as functions of tensors; Kingma and Welling (2014).

The model is any with ``encode(x, labels) -> (mean, log_variance)``,
``decode(z, labels) -> mean`` and ``config.std``, as :class:`unlearn_gym.models.vae.ConvVAE`. Shapes: samples ``x (B,
*S)`` in [-1, 1], latents ``z (B, Z)``, labels ``(B,)`` or None. Posteriors are diagonal Gaussians, the prior N(0, I).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor


class Posterior(NamedTuple):
    """Mean and log-variance ``(B, Z)`` of q(z|x)."""

    mean: Tensor
    log_variance: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """Z = μ + σ ξ with ``noise`` ξ; differentiable in both."""
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def log_density(self, z: Tensor) -> Tensor:
        """Log q(z|x), nats ``(B,)``."""
        squared = (z - self.mean).square() * (-self.log_variance).exp()
        return -0.5 * (squared + self.log_variance + math.log(2 * math.pi)).sum(1)

    def log_density_ratio(self, z: Tensor, other: Posterior) -> Tensor:
        """Log q(z|x) - log q(z|x') with the ``other`` posterior's x', nats ``(B,)``; subtracted before it is summed."""
        own, others = ((z - q.mean) * (-0.5 * q.log_variance).exp() for q in (self, other))
        return 0.5 * ((others - own) * (others + own) + other.log_variance - self.log_variance).sum(1)

    def divergence(self) -> Tensor:
        """KL(q(z|x) ‖ N(0, I)), nats ``(B,)``."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance).sum(1)


def reconstruction_error(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """-log N(x; mean, std²) but for its constant, nats ``(B,)``: ‖x - mean‖² / (2 std²)."""
    return (x - mean).square().flatten(1).sum(1) / (2.0 * std**2)


def negative_elbo(model: Any, x: Tensor, labels: Tensor | None, noise: Tensor, kl_coef: float = 1.0) -> Tensor:
    """``(reconstruction + kl_coef KL) / D`` from one z of ``noise (B, Z)``, nats per pixel ``(B,)``, no constant."""
    posterior = Posterior(*model.encode(x, labels))
    mean = model.decode(posterior.draw(noise), labels)
    total = reconstruction_error(x, mean, model.config.std) + kl_coef * posterior.divergence()
    return total / x[0].numel()
