"""What a run asks of its objective."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlearn_gym.math import siss
from unlearn_gym.models.flat import FlatParameters, optimizer_state, restore_optimizer
from unlearn_gym.run.batch import Batch
from unlearn_gym.run.gradients import clip_values
from unlearn_gym.settings import LambdaRole, RunSettings
from unlearn_gym.tasks.data import TaskData


class Objective:
    """What an update minimises, L = c_r mean(w_r ℓ_r) - σ (1+s) c_f mean(w_f ℓ_f), as a run asks for it.

    There are two kinds: an :class:`unlearn_gym.run.objectives.epsilon.EpsilonObjective` says what an ε-network is shown
    and is to predict; an :class:`OwnPasses` makes its passes itself, whatever the model.

    Attributes:
        lambda_role: ``"mixture"``: λ is the share of forget samples that weights make up for, as in SISS;
            ``"weight"``: the forget term's weight, the retain term's being 1-λ; ``"none"``: it does nothing.
        learns_target: the forget term's error is to fall; its target is another than the data (σ = -1).
        projects: the forget gradient's factor is EraseDiff's, in place of ``forget_grad_rule``.
    """

    lambda_role: LambdaRole = "none"
    learns_target: bool = False
    projects: bool = False

    @property
    def sign(self) -> float:
        """σ: 1 where the forget term's error is to rise."""
        return -1.0 if self.learns_target else 1.0

    def check(self, data: TaskData, settings: RunSettings) -> None:
        """Raise ``SettingsError`` for settings that the data does not fit; cheap."""

    def prepare(self, data: TaskData, settings: RunSettings) -> Any:
        """What batches need of the data, found once for a run; raises ``SettingsError`` for what does not fit it."""
        return None

    def complete(self, batch: Batch, data: TaskData, prepared: Any, generator: torch.Generator) -> Batch:
        """``batch`` with what the objective needs more, drawn from ``generator``."""
        return batch

    def lambda_gradients(
        self, terms: siss.SISSTerms, from_forget: Tensor, lambda_: Tensor, *, forget_scale: float, **coefs: float
    ) -> dict[str, Tensor]:
        """dL/dλ by the estimators of :func:`unlearn_gym.math.siss.lambda_gradients`; 0 where λ does nothing.

        Where λ is a weight nothing is drawn with it: both estimators are the derivative.
        """
        if self.lambda_role == "mixture":
            return siss.lambda_gradients(terms, from_forget, lambda_, forget_scale=forget_scale, **coefs)
        zero = torch.zeros_like(terms.siss_loss)
        slopes = dict.fromkeys(("pathwise", "score_function", "kl_only"), zero)
        if self.lambda_role == "weight":
            slope = self.weight_slope(terms, from_forget, forget_scale=forget_scale, **coefs)
            slopes |= {"pathwise": slope, "score_function": slope}
        return slopes

    def weight_slope(
        self,
        terms: siss.SISSTerms,
        from_forget: Tensor,
        *,
        retain_coef: float,
        forget_coef: float,
        forget_scale: float,
    ) -> Tensor:
        """dL/dλ where λ is a weight and every row has both errors."""
        forget = forget_scale * forget_coef * terms.forget_errors
        return (-self.sign * forget - retain_coef * terms.retain_errors).mean()


class Context(NamedTuple):
    """What is the same for all updates of a run."""

    settings: RunSettings
    alphas_cumprod: Tensor
    retain_coef: float
    forget_coef: float


class Passes(NamedTuple):
    """What an objective's own passes give: 0-dim losses with their graphs, and the terms to report, without.

    The gradients of ``retain`` and ``forget`` are the update's two; None stands for a side that the objective leaves
    out. That of ``direct``, where there is one, is added.
    ``lambda_gradients``: dL/dλ by estimator, where that of ``terms`` is not all.
    """

    retain: Tensor | None
    forget: Tensor | None
    terms: siss.SISSTerms
    from_forget: Tensor
    direct: Tensor | None = None
    lambda_gradients: dict[str, Tensor] | None = None


class Learner:
    """A second network that learns beside the one that a run trains, by Adam without momentum."""

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        self.flat = FlatParameters(network)
        self.gradient = torch.zeros_like(self.flat.vector.data)
        self._views = self.flat.gradient_views(self.gradient)
        self.optimizer = torch.optim.Adam([self.flat.vector], lr=learning_rate, betas=(0.0, 0.999), fused=True)

    def step(self, loss: Tensor, max_grad_norm: float | None = None, max_grad_value: float | None = None) -> None:
        """One optimizer step down ``loss``, 0-dim, its gradient clipped by its norm and then by its entries."""
        self.gradient.zero_()
        self.flat.point_gradients(self._views)
        torch.autograd.backward(loss, inputs=self.flat.parameters)
        self.flat.point_gradients(None)
        self.flat.vector.grad = self.gradient
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_([self.flat.vector], max_grad_norm)
        clip_values(self.gradient, max_grad_value)
        self.optimizer.step()
        self.flat.vector.grad = None

    def state(self) -> tuple[Tensor, dict[str, Tensor]]:
        """A copy of the parameters and of the optimizer's state."""
        return self.flat.vector.detach().clone(), optimizer_state(self.optimizer, self.flat.vector)

    def restore(self, vector: Tensor, optimizer: dict[str, Tensor]) -> None:
        """Bring back a :meth:`state`."""
        with torch.no_grad():
            self.flat.vector.copy_(vector)
        restore_optimizer(self.optimizer, self.flat.vector, optimizer)


class OwnPasses(Objective):
    """An objective that makes its passes through the model itself."""

    def trained(self, model: Any) -> nn.Module:
        """The part of ``model`` whose parameters the run's updates change."""
        return model

    def learner(self, model: Any, settings: RunSettings) -> Learner | None:
        """What learns beside it."""
        return None

    def unweighted(self) -> OwnPasses:
        """The objective whose passes measure both terms unweighted, for ``features="fresh"``."""
        raise NotImplementedError

    def passes(self, model: Any, batch: Batch, lambda_: Tensor, context: Context, learner: Learner | None) -> Passes:
        """The forward passes of one update; ``learner`` takes its step on the way, and None where none is to learn."""
        raise NotImplementedError
