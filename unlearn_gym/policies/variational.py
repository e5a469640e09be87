"""Adaptive λ by variational inference: arXiv 2512.01054, section 5.1, with four estimators of the λ-gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unlearn_gym.errors import PolicyError
from unlearn_gym.math.siss import combine_products
from unlearn_gym.policies.base import Observation, PolicyContext, Transition
from unlearn_gym.run.terms import SECOND_MOMENT_GRID
from unlearn_gym.system.torch_state import initial_weights_from, insulated

GRADIENT_ESTIMATORS = ("pathwise", "score_function", "kl_only")
FEATURE_SETS = ("losses", "norms", "extended")
"""What the inference network sees: both losses; the gradient norms, too; all that an extended observation measures."""


def seen_entries(features: str, context: PolicyContext) -> list[int]:
    """Indices into an observation of what ``features`` names; raises :class:`PolicyError` where it lacks them."""
    if features == "extended" and not context.observation_extra:
        raise PolicyError(
            "features=extended needs an environment with the setting observation='extended'; "
            "set it, or use features=norms"
        )
    extra = range(-context.observation_extra, 0) if features == "extended" else ()
    return [*range(2 if features == "losses" else 4), *extra]


class InferenceNetwork(nn.Module):
    """Features ``v (num_inputs,)`` -> (μ, log σ²) of the posterior on z; layer sizes of the paper's public code."""

    def __init__(self, num_inputs: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(num_inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """μ and log σ², each 0-dim."""
        mu, log_variance = self.net(features)
        return mu, log_variance


class VariationalPolicy:
    """z ~ N(μ(v), σ²(v)), λ = sigmoid(z) mapped into the range; after each step one Adam step on
    ``L_SISS(λ) + β KL(N(μ, σ²) ‖ N(0, 1))``.

    dL_SISS/dλ is the run's, by ``estimator``: ``"pathwise"`` is the paper's reparameterisation (biased: it
    pushes λ down), ``"score_function"`` is unbiased and has expectation zero (but where λ is an objective's weight),
    ``"kl_only"`` is what the authors' public code does (the loss detached), so that λ tends to the prior.
    The network starts anew with every episode, unless a trained one is given: that one stays as it is, and only z is
    drawn.

    Args:
        context: the environment's λ range and how its observation ends.
        estimator: one of ``GRADIENT_ESTIMATORS``.
        kl_coef: β, weight of the KL term (0.01 in the authors' code).
        learning_rate: Adam's; the authors' 1e-4 serves runs of hundreds of updates, the default one of 60.
        features: v, one of ``FEATURE_SETS``; ``"norms"`` is the observation's first four entries.
        trained: a network to be used frozen, of as many inputs as v has (:mod:`unlearn_gym.policies.transfer`).
        training_seconds: what its training took, for comparisons that count it.

    Raises :class:`PolicyError` for ``"extended"`` features of an observation that is not.
    """

    def __init__(
        self,
        context: PolicyContext,
        estimator: str,
        *,
        kl_coef: float = 0.01,
        learning_rate: float = 0.01,
        features: str = "norms",
        trained: InferenceNetwork | None = None,
        training_seconds: float = 0.0,
    ) -> None:
        self.context, self.estimator, self.kl_coef, self.learning_rate = context, estimator, kl_coef, learning_rate
        self.entries = seen_entries(features, context)
        self.training_seconds = training_seconds
        self.trained = None if trained is None else trained.requires_grad_(False)
        self.reset(0)

    @insulated
    def reset(self, seed: int) -> None:
        """A new inference network, unless one is frozen, and a new stream of ξ, both from ``seed``."""
        if self.trained is not None:
            self.network = self.trained
        else:
            with initial_weights_from(seed):
                self.network = InferenceNetwork(len(self.entries))
            self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.learning_rate)
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """A new stream of ξ; the network and its optimizer go on."""
        self.generator = torch.Generator().manual_seed(seed)
        self._lambda: Tensor | None = None

    @insulated
    def act(self, obs: Observation, info: dict[str, Any]) -> float:
        """Draw λ; the graph is kept for the update that follows."""
        self._mu, self._log_variance = self.network(torch.as_tensor(obs[self.entries]))
        xi = torch.randn((), generator=self.generator)
        share = torch.sigmoid(self._mu + (0.5 * self._log_variance).exp() * xi)
        self._lambda = self.context.lambda_min + (self.context.lambda_max - self.context.lambda_min) * share
        return self.context.clip(float(self._lambda.detach()))

    @insulated
    def update(self, transition: Transition) -> None:
        """One step on the ELBO loss, with the run's λ-gradient in place of the loss's own; none of a frozen network."""
        if self.trained is not None or self._lambda is None or transition.info["diverged"]:
            return
        gradient = transition.info["terms"]["lambda_gradients"][self.estimator]
        kl = 0.5 * (self._mu.square() + self._log_variance.exp() - 1.0 - self._log_variance)
        loss = gradient * self._lambda + self.kl_coef * kl
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class VariancePolicy:
    """The λ that minimises the second moment of the gradient g_r - m g_f, plus ``kl_coef z²/2``.

    Its parts are estimated from the batches just seen (:func:`unlearn_gym.math.siss.gradient_second_moment`) and
    averaged over steps with ``decay``; m is the share of the forget gradients' norm that the updates truly applied,
    averaged alike. Under the norm rules m follows λ, so the choice is the fixed point of choosing and measuring.

    This is no gradient of L_SISS, whose expectation does not depend on λ: it is what λ truly acts on. z is the
    logit of λ in its range; its term is the KL of a point mass to the prior, up to a constant.
    """

    def __init__(self, context: PolicyContext, *, kl_coef: float = 0.01, decay: float = 0.9) -> None:
        self.context, self.decay = context, decay
        share = np.linspace(0.01, 0.99, 99)
        self._lambdas = context.lambda_min + (context.lambda_max - context.lambda_min) * share
        self._penalty = kl_coef * 0.5 * np.log(share / (1.0 - share)) ** 2
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forget all batches."""
        self._products: NDArray[np.float64] = np.zeros((3, len(SECOND_MOMENT_GRID)))
        self._applied_norm = self._forget_norm = 0.0

    def act(self, obs: Observation, info: dict[str, Any]) -> float:
        """The minimiser, after taking in the last batch's estimate."""
        terms, new = info["terms"], 1.0 - self.decay
        products, norm = np.asarray(terms["second_moment"]), terms["forget_grad_norm"]
        if np.isfinite(products).all() and np.isfinite(norm * terms["forget_multiplier"]):
            self._products = self.decay * self._products + new * products
            self._forget_norm = self.decay * self._forget_norm + new * norm
            self._applied_norm = self.decay * self._applied_norm + new * norm * terms["forget_multiplier"]
        multiplier = self._applied_norm / self._forget_norm if self._forget_norm > 0 else 0.0
        moment = np.interp(self._lambdas, SECOND_MOMENT_GRID, combine_products(self._products, multiplier))
        if not (moment > 0).all():
            return self.context.from_unit(0.5)
        return float(self._lambdas[np.argmin(np.log(moment) + self._penalty)])
