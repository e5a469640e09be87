"""Many runs as one: their networks evaluated together over stacked parameters, as suits an accelerator."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_gym.errors import RunError
from unlearn_gym.math import siss
from unlearn_gym.run.actions import Action
from unlearn_gym.run.batch import Batch, Draw
from unlearn_gym.run.gradients import GradientNorms, clip_factor, clip_values, gradient_norms
from unlearn_gym.run.objectives import EpsilonObjective
from unlearn_gym.run.run import UnlearningRun, make_optimizer
from unlearn_gym.run.terms import StepTerms, pack, unpack
from unlearn_gym.system.torch_state import insulated


class StackedRuns:
    """Updates several runs of one task and settings at once: one forward and two backward passes for all.

    Each run keeps its generators, counters and methods; its parameters become a row of ``matrix (N, P)``.
    :meth:`update` does what :meth:`UnlearningRun.update` does, up to rounding, with a number of kernel launches
    that does not grow with N but for the draws, and one transfer to the host for all. Raises
    :class:`RunError` for ``grad_norms="every:k"`` and for a network that ``torch.vmap`` cannot map.
    """

    @insulated
    def __init__(self, runs: list[UnlearningRun]) -> None:
        first = runs[0]
        if first.settings.norms_period > 1:
            raise RunError(
                f"stacked runs measure both norms always; grad_norms={first.settings.grad_norms!r} needs "
                "backend='processes' or 'serial'"
            )
        objective = first.objective
        if not isinstance(objective, EpsilonObjective):
            raise RunError(
                f"stacked runs are of ε-networks; objective={first.settings.objective!r} of this task's model makes "
                "passes of its own: use backend='processes' or 'serial'"
            )
        self.runs, self.settings = runs, first.settings
        self.matrix = torch.empty(len(runs), len(first.flat.vector), device=first.flat.vector.device)
        self.optimizer = make_optimizer(self.settings, [run.flat.vector for run in runs])
        for run, row in zip(runs, self.matrix, strict=True):
            run.flat.move_to(row)
            self.optimizer.state |= run.optimizer.state
            run.optimizer = self.optimizer
        self._names = [name for name, p in first.model.named_parameters() if p.requires_grad]
        coefs: dict[str, Any] = {"retain_coef": first.retain_coef, "forget_coef": first.forget_coef}
        scaled = coefs | {"forget_scale": self.settings.forget_scale}
        self._mix = torch.vmap(objective.draw, in_dims=(0, None, 0))
        signed = coefs | {"forget_scale": objective.sign * self.settings.forget_scale}
        self._terms = torch.vmap(partial(siss.siss_terms, **signed))
        self._output_gradients = torch.vmap(partial(siss.output_gradients, **coefs))
        rule: Any = {"settings": self.settings, "sign": objective.sign, "projects": objective.projects}

        def norms(retain: Tensor, forget: Tensor, weight: Tensor, strength: Tensor | None = None) -> GradientNorms:
            return gradient_norms(retain, forget, weight, strength=strength, **rule)

        self._norms = torch.vmap(norms)
        self._pack = torch.vmap(partial(pack, objective=objective, **scaled), in_dims=(0, 0, 0, 0, 0, None))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles stack the copied runs anew."""
        return StackedRuns, (self.runs,)

    @insulated
    def update(self, actions: Mapping[int, Action | float]) -> dict[int, StepTerms]:
        """One update of each run that ``actions`` names by its index; the others stay as they are."""
        chosen = {i: Action.of(action) for i, action in actions.items()}
        for i, action in chosen.items():
            self.runs[i].check(action)
        lambdas = {i: action.lambda_ for i, action in chosen.items()}
        runs = [self.runs[i] for i in lambdas]
        values = torch.tensor(list(lambdas.values()), device=self.matrix.device)
        vectors = self._rows(lambdas).requires_grad_()
        draws = self._mix(self._draw(runs), runs[0].alphas_cumprod, values)
        epsilon_pred = self._predict(vectors, draws)
        with torch.no_grad():
            terms = self._terms(epsilon_pred, draws.targets)
            output_grads = self._output_gradients(terms)
        (retain_grad,) = torch.autograd.grad(epsilon_pred, vectors, output_grads[0], retain_graph=True)
        (forget_grad,) = torch.autograd.grad(epsilon_pred, vectors, output_grads[1])
        norms = self._norms(retain_grad, forget_grad, terms.forget_weight, *self._strengths(chosen))
        scale = clip_factor(norms.update, self.settings.max_grad_norm)
        forget_scale = scale * norms.forget_multiplier
        update = retain_grad.mul_(scale[:, None]).addcmul_(forget_grad, forget_scale[:, None], value=-1.0)
        clip_values(update, self.settings.max_grad_value)
        self._optimize(runs, update, [action.step_scale for action in chosen.values()])
        with torch.no_grad():
            packed = self._pack(draws.from_forget, terms, norms, values, self._rows(lambdas).sum(1), runs[0].grid)
        return self._unpack(lambdas, packed)

    def _rows(self, lambdas: Mapping[int, float]) -> Tensor:
        whole = len(lambdas) == len(self.runs)
        return self.matrix.detach() if whole else self.matrix[list(lambdas)]

    def _draw(self, runs: list[UnlearningRun]) -> Batch:
        """The next batch of each run's own stream; equal labels where the network has none mask nothing."""
        batches = [run.draw(run.generator) for run in runs]
        if batches[0].retain_labels is None:
            none = torch.zeros_like(batches[0].timesteps)
            batches = [batch._replace(retain_labels=none, forget_labels=none) for batch in batches]
        if batches[0].extra is None:
            batches = [
                batch._replace(extra=batch.forget_index) for batch in batches
            ]  # vmap wants tensors; read by none
        columns: Any = zip(*batches, strict=True)
        return Batch(*(torch.stack(parts) for parts in columns))

    def _predict(self, vectors: Tensor, draws: Draw) -> Tensor:
        """ε_θ of every run at its own ``x_t``, ``(N, B, *S)``."""
        first = self.runs[0]
        conditional = first.data.retain_labels is not None

        def predict(vector: Tensor, x_t: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
            parameters = dict(zip(self._names, first.flat.gradient_views(vector), strict=True))
            return torch.func.functional_call(
                first.model, parameters, (x_t, timesteps, labels if conditional else None)
            )

        inputs: Any = (draws.x_t, draws.timesteps, draws.labels)
        try:
            return torch.vmap(predict)(vectors, *inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"torch.vmap cannot map this network ({reason}); use backend='processes'") from error

    def _strengths(self, actions: Mapping[int, Action]) -> tuple[Tensor, ...]:
        """ρ of every run ``(N,)``, the settings' where an action leaves it; nothing where all do."""
        strengths = [action.forget_strength for action in actions.values()]
        if all(strength is None for strength in strengths):
            return ()
        own = self.settings.forget_grad_norm
        rows = [own if strength is None else float(strength) for strength in strengths]
        return (torch.tensor(rows, device=self.matrix.device),)

    def _optimize(self, runs: list[UnlearningRun], updates: Tensor, scales: list[float | None]) -> None:
        vectors: list[nn.Parameter] = [run.flat.vector for run in runs]
        for vector, update in zip(vectors, updates, strict=True):
            vector.grad = update
        before = [None if s is None else vector.detach().clone() for s, vector in zip(scales, vectors, strict=True)]
        self.optimizer.step()
        with torch.no_grad():
            for vector, start, scale in zip(vectors, before, scales, strict=True):
                if start is not None and scale is not None:  # all vectors share one learning rate
                    vector.copy_(start + scale * (vector - start))
        for run in runs:
            run.flat.vector.grad = None
            run.updates += 1

    def _unpack(self, lambdas: Mapping[int, float], packed: Tensor) -> dict[int, StepTerms]:
        rows = packed.double().cpu().numpy()
        terms = {i: unpack(row, lambda_, 0) for (i, lambda_), row in zip(lambdas.items(), rows, strict=True)}
        for i, one in terms.items():
            self.runs[i].diverged = one.diverged
        return terms
