"""The live unlearning run: each :meth:`UnlearningRun.update` is one optimizer step on the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unlearn_gym import siss
from unlearn_gym.diffusion import q_sample
from unlearn_gym.errors import RunError
from unlearn_gym.models.flat import FlatParameters
from unlearn_gym.settings import RunSettings
from unlearn_gym.tasks.data import TaskData, to_model_range

FEATURES = ("retain_loss", "forget_loss", "retain_grad_norm", "forget_grad_norm")
"""The measured quantities that make up an observation, in its order."""

SECOND_MOMENT_GRID = np.linspace(0.02, 0.98, 49)
"""The λ at which every step reports the second moment of its gradient."""

NEGLIGIBLE_WEIGHT = 1e-3
PROBE_SIZE = 64


@dataclass(frozen=True, slots=True)
class StepTerms:
    """What one batch measured. Losses hold their data-set factor (c_r, c_f); norms are those of the
    gradients of ``retain_loss`` and ``forget_loss``, before any rescaling or clipping.

    ``lambda_gradients``: dL_SISS/dλ by estimator (see :func:`unlearn_gym.siss.lambda_gradients`), and
    ``"variance"``: d log M/dλ of the gradient's second moment M. ``second_moment (3, 49)``: M's parts
    ⟨g_r, g_r⟩, ⟨g_r, g_f⟩, ⟨g_f, g_f⟩ at ``SECOND_MOMENT_GRID`` (:func:`unlearn_gym.siss.combine_products`).
    ``retain_ess``, ``forget_ess``: effective sample size (Σw)²/Σw² in 0..B; ``negligible_fraction``: share
    of the 2B weights below 0.001; ``forget_fraction``: share of x_t drawn from forget samples.
    ``forget_multiplier``: the factor that the forget gradient got; ``update_norm``: norm of the whole
    gradient before clipping.
    """

    lambda_: float
    retain_loss: float
    forget_loss: float
    siss_loss: float
    retain_grad_norm: float
    forget_grad_norm: float
    forget_multiplier: float
    update_norm: float
    retain_weight_max: float
    forget_weight_max: float
    retain_ess: float
    forget_ess: float
    negligible_fraction: float
    forget_fraction: float
    lambda_gradients: dict[str, float]
    second_moment: NDArray[np.float64]
    diverged: bool

    def as_dict(self) -> dict[str, Any]:
        """The terms by name; dict and array are copies."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "lambda_gradients": {**self.lambda_gradients}, "second_moment": self.second_moment.copy()}


class Batch(NamedTuple):
    """One pair batch: samples ``(B, *S)`` in model range, labels ``(B,)`` or None."""

    retain: Tensor
    forget: Tensor
    retain_labels: Tensor | None
    forget_labels: Tensor | None
    noise: Tensor
    timesteps: Tensor


class GradientNorms(NamedTuple):
    """0-dim tensors: ‖g_r‖, ‖g_f‖, the factor m of the forget gradient, ‖g_r - m g_f‖."""

    retain: Tensor
    forget: Tensor
    forget_multiplier: Tensor
    update: Tensor


@dataclass(frozen=True)
class Snapshot:
    """A run's state: weights, buffers, optimizer, both generators, counters."""

    vector: Tensor
    optimizer: dict[str, Tensor]
    buffers: dict[str, Tensor]
    generators: tuple[Tensor, Tensor]
    updates: int
    diverged: bool


def dataset_factors(rule: str, num_retain: int, num_forget: int) -> tuple[float, float]:
    """(c_r, c_f); with N = |R| + |F|, "siss" is (N/(N-K), K/(N-K)), "inverse_size" (N/|R|, N/|F|)."""
    total = num_retain + num_forget
    if rule == "siss":
        return total / num_retain, num_forget / num_retain
    return (total / num_retain, total / num_forget) if rule == "inverse_size" else (1.0, 1.0)


def effective_sample_size(weights: Tensor) -> Tensor:
    """(Σw)²/Σw², 0 where all weights vanish."""
    return weights.sum().square() / weights.square().sum().clamp_min(torch.finfo(weights.dtype).tiny)


class UnlearningRun:
    """Model, optimizer, data streams and generators of one unlearning run.

    The batches of updates and those of measurements come from two generators, both seeded by
    :meth:`seed`: equal seeds give every policy the same updates' samples, noise and mask uniforms,
    whatever else it measures. All randomness is theirs.

    Args:
        model: ε-network with pretrained weights; it is trained in place.
        data: retain and forget set (see :class:`unlearn_gym.tasks.TaskData`).
        alphas_cumprod: ᾱ_t of the model's noise schedule, ``(T,)``.
        settings: options, see :class:`unlearn_gym.settings.RunSettings`.
        seed: first seed of the generators.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TaskData,
        alphas_cumprod: Tensor,
        settings: RunSettings,
        seed: int = 0,
    ) -> None:
        device = settings.device
        self.settings = settings
        self.data = data.to(device)
        self.alphas_cumprod = alphas_cumprod.to(device)
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()  # dropout would draw globally
        self.flat = FlatParameters(self.model)
        self.retain_grad = torch.zeros_like(self.flat.vector.data)
        self.forget_grad = torch.zeros_like(self.flat.vector.data)
        self._retain_views = self.flat.gradient_views(self.retain_grad)
        self._forget_views = self.flat.gradient_views(self.forget_grad)
        self.update_grad = torch.zeros_like(self.flat.vector.data)
        self.flat.vector.grad = self.update_grad
        self.optimizer = self._make_optimizer()
        self.retain_coef, self.forget_coef = dataset_factors(
            settings.dataset_factors, data.retain_size or len(data.retain), len(data.forget)
        )
        self._coefs = {"retain_coef": self.retain_coef, "forget_coef": self.forget_coef}
        self.generator = torch.Generator(device)
        self.measure_generator = torch.Generator(device)
        self._grid = torch.tensor(SECOND_MOMENT_GRID, dtype=torch.float32, device=device)
        self.updates = 0
        self.diverged = False
        self.seed(seed)
        self._probe = self._draw_probe()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are built anew: parameters that are views of one vector must stay so."""
        arguments = (copy.deepcopy(self.model), self.data, self.alphas_cumprod, self.settings)
        return _rebuild, (arguments, self.snapshot())

    def _make_optimizer(self) -> torch.optim.Optimizer:
        s, parameters = self.settings, [self.flat.vector]
        if s.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=s.learning_rate, fused=True)
        kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
        return kind(parameters, lr=s.learning_rate, weight_decay=0.0, fused=True)

    def seed(self, seed: int) -> None:
        """Start both streams anew from ``seed``, an integer in 0..2³²-1."""
        self.generator.manual_seed(seed)
        self.measure_generator.manual_seed(seed + 2**32)

    def draw(self, generator: torch.Generator) -> Batch:
        """A batch of pairs, drawn with replacement."""
        data, size, device = self.data, self.settings.batch_size, self.settings.device
        retain_index = torch.randint(len(data.retain), (size,), generator=generator, device=device)
        forget_index = torch.randint(len(data.forget), (size,), generator=generator, device=device)
        retain = to_model_range(data.retain[retain_index])
        num_timesteps = len(self.alphas_cumprod)
        return Batch(
            retain,
            to_model_range(data.forget[forget_index]),
            None if data.retain_labels is None else data.retain_labels[retain_index],
            None if data.forget_labels is None else data.forget_labels[forget_index],
            torch.randn(retain.shape, generator=generator, device=device),
            torch.randint(num_timesteps, (size,), generator=generator, device=device),
        )

    def update(self, lambda_: float) -> StepTerms:
        """One forward pass, two backward passes, one optimizer step.

        Raises :class:`RunError` for a λ outside [0, 1] and for a run that has diverged.
        """
        terms, from_forget = self._gradients(lambda_, self.generator)
        norms = self._norms(terms.forget_weight)
        scale = torch.ones_like(norms.update)
        if self.settings.max_grad_norm is not None:
            scale = (self.settings.max_grad_norm / (norms.update + 1e-6)).clamp(max=1.0)
        torch.mul(self.retain_grad, scale, out=self.update_grad)
        self.update_grad.addcmul_(self.forget_grad, scale * norms.forget_multiplier, value=-1.0)
        self.optimizer.step()
        self.updates += 1
        return self._report(lambda_, terms, from_forget, norms)

    def measure(self, lambda_: float) -> StepTerms:
        """The terms of a batch of the measuring stream, without an update."""
        terms, from_forget = self._gradients(lambda_, self.measure_generator)
        return self._report(lambda_, terms, from_forget, self._norms(terms.forget_weight))

    def measure_unweighted(self) -> NDArray[np.float64]:
        """``[retain_loss, forget_loss, retain_grad_norm, forget_grad_norm]`` without importance
        weights, with (c_r, c_f), on a batch of the measuring stream: twice a step's forward pass.
        """
        batch = self.draw(self.measure_generator)
        values = []
        for x_start, labels, coef, gradient, views in (
            (batch.retain, batch.retain_labels, self.retain_coef, self.retain_grad, self._retain_views),
            (batch.forget, batch.forget_labels, self.forget_coef, self.forget_grad, self._forget_views),
        ):
            x_t = q_sample(x_start, batch.noise, batch.timesteps, self.alphas_cumprod)
            loss = coef * (self.model(x_t, batch.timesteps, labels) - batch.noise).square().mean()
            self._backward(loss, None, gradient, views, retain_graph=False)
            values += [loss.detach(), gradient.norm()]
        losses_and_norms = torch.stack(values)[[0, 2, 1, 3]]
        return np.asarray(losses_and_norms.tolist(), dtype=np.float64)

    def _gradients(self, lambda_: float, generator: torch.Generator) -> tuple[siss.SISSTerms, Tensor]:
        """Fill ``retain_grad`` and ``forget_grad`` from one batch."""
        if not 0.0 <= lambda_ <= 1.0:
            raise RunError(f"lambda_={lambda_} must lie in [0, 1]")
        if self.diverged:
            raise RunError("this run has diverged; restore a snapshot before the next update")
        batch = self.draw(generator)
        x_t, from_forget = siss.sample_mixture(
            batch.retain, batch.forget, batch.noise, batch.timesteps, self.alphas_cumprod, lambda_, generator
        )
        labels = None
        if batch.retain_labels is not None and batch.forget_labels is not None:
            labels = siss.mixture_labels(from_forget, batch.retain_labels, batch.forget_labels)
        epsilon_pred = self.model(x_t, batch.timesteps, None if labels is None else labels.drawn)
        with torch.no_grad():
            terms = siss.siss_terms(
                epsilon_pred, x_t, batch.retain, batch.forget, batch.timesteps, self.alphas_cumprod, lambda_,
                forget_scale=self.settings.forget_scale, labels=labels, **self._coefs,
            )  # fmt: skip
            retain_output_grad, forget_output_grad = siss.output_gradients(terms, **self._coefs)
        self._backward(epsilon_pred, retain_output_grad, self.retain_grad, self._retain_views, retain_graph=True)
        self._backward(epsilon_pred, forget_output_grad, self.forget_grad, self._forget_views, retain_graph=False)
        return terms, from_forget

    def _backward(
        self, output: Tensor, output_grad: Tensor | None, gradient: Tensor, views: list[Tensor], *, retain_graph: bool
    ) -> None:
        gradient.zero_()
        self.flat.point_gradients(views)
        torch.autograd.backward(output, output_grad, retain_graph=retain_graph, inputs=self.flat.parameters)
        self.flat.point_gradients(None)

    def _norms(self, forget_weight: Tensor) -> GradientNorms:
        """The norms of both gradients, the forget gradient's factor by its rule, and the norm of the whole.

        The norm rules would blow a batch without forget data up to full strength: where all its forget
        weights are negligible, the direction of their gradient means nothing and its factor is 0.
        """
        s, r, f = self.settings, self.retain_grad, self.forget_grad
        rr, rf, ff = torch.dot(r, r), torch.dot(r, f), torch.dot(f, f)
        retain, forget = rr.sqrt(), ff.sqrt()
        if s.forget_grad_rule == "loss":
            multiplier = torch.full_like(forget, s.forget_scale)
        else:
            target = s.forget_grad_norm * (retain if s.forget_grad_rule == "relative_norm" else 1.0)
            says_something = (forget > 0) & (forget_weight.max() > NEGLIGIBLE_WEIGHT)
            multiplier = torch.where(says_something, target / forget, torch.zeros_like(forget))
        update = (rr - 2.0 * multiplier * rf + multiplier.square() * ff).clamp_min(0.0).sqrt()
        return GradientNorms(retain, forget, multiplier, update)

    @torch.no_grad()
    def _report(
        self,
        lambda_: float,
        terms: siss.SISSTerms,
        from_forget: Tensor,
        norms: GradientNorms,
    ) -> StepTerms:
        """Everything the step measured, brought over from the device in one transfer."""
        gradients = siss.lambda_gradients(
            terms, from_forget, lambda_, forget_scale=self.settings.forget_scale, **self._coefs
        )
        products = siss.output_gradient_products(terms, **self._coefs)
        moment = siss.gradient_second_moment(terms, products, self._grid)
        gradients["variance"] = siss.second_moment_slope(terms, products, norms.forget_multiplier)
        w_r, w_f = terms.retain_weight, terms.forget_weight
        negligible = torch.cat([w_r, w_f]) < NEGLIGIBLE_WEIGHT
        scalars = {
            "retain_loss": terms.retain_loss,
            "forget_loss": terms.forget_loss,
            "siss_loss": terms.siss_loss,
            "retain_grad_norm": norms.retain,
            "forget_grad_norm": norms.forget,
            "forget_multiplier": norms.forget_multiplier,
            "update_norm": norms.update,
            "retain_weight_max": w_r.max(),
            "forget_weight_max": w_f.max(),
            "retain_ess": effective_sample_size(w_r),
            "forget_ess": effective_sample_size(w_f),
            "negligible_fraction": negligible.float().mean(),
            "forget_fraction": from_forget.float().mean(),
        }
        parameter_sum = self.flat.vector.sum()  # not finite as soon as one parameter is not
        stacked = torch.stack([*scalars.values(), parameter_sum, *gradients.values()])
        packed = torch.cat([stacked, moment.flatten()]).double().cpu().numpy()
        values, slopes, curve = np.split(packed, [len(scalars) + 1, len(stacked)])
        self.diverged = not bool(np.isfinite(values).all())
        return StepTerms(
            lambda_=lambda_,
            lambda_gradients=dict(zip(gradients, slopes.tolist(), strict=True)),
            second_moment=curve.reshape(moment.shape),
            diverged=self.diverged,
            **dict(zip(scalars, values.tolist(), strict=False)),
        )

    def _draw_probe(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Fixed forget and held-out pairs (x_t, timesteps, noise, labels), the same for every run."""
        generator, data = torch.Generator().manual_seed(0), self.data
        parts = []
        for samples, labels in ((data.forget, data.forget_labels), (data.heldout, data.heldout_labels)):
            index = torch.randint(len(samples), (PROBE_SIZE,), generator=generator)
            x = to_model_range(samples[index.to(samples.device)])
            noise = torch.randn(x.shape, generator=generator).to(x)
            timesteps = torch.randint(len(self.alphas_cumprod), (PROBE_SIZE,), generator=generator).to(x.device)
            label = torch.zeros(PROBE_SIZE) if labels is None else labels[index.to(labels.device)]
            parts.append((q_sample(x, noise, timesteps, self.alphas_cumprod), timesteps, noise, label))
        x_t, timesteps, noise, labels = (torch.cat(p) for p in zip(*parts, strict=True))
        return x_t, timesteps, noise, None if data.forget_labels is None else labels

    @torch.no_grad()
    def probe_losses(self) -> tuple[float, float]:
        """Forget and held-out retain loss, unweighted, on a fixed probe of 64 samples each."""
        x_t, timesteps, noise, labels = self._probe
        errors = (self.model(x_t, timesteps, labels) - noise).square().flatten(1).mean(1)
        forget, retain = errors.view(2, -1).mean(1).tolist()
        return forget, retain

    def snapshot(self) -> Snapshot:
        """A copy of the run's state that later updates do not touch."""
        state = self.optimizer.state[self.flat.vector]
        return Snapshot(
            self.flat.vector.detach().clone(),
            {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)},
            {k: v.clone() for k, v in self.model.named_buffers()},
            (self.generator.get_state(), self.measure_generator.get_state()),
            self.updates,
            self.diverged,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Bring back a :meth:`snapshot` of a run of the same network, exactly."""
        if snapshot.vector.shape != self.flat.vector.shape:
            raise RunError(f"the snapshot has {len(snapshot.vector)} parameters, this model {len(self.flat.vector)}")
        with torch.no_grad():
            self.flat.vector.copy_(snapshot.vector)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(snapshot.buffers[name])
        self.optimizer.state.clear()
        if snapshot.optimizer:
            self.optimizer.state[self.flat.vector] = {k: v.clone() for k, v in snapshot.optimizer.items()}
        self.generator.set_state(snapshot.generators[0])
        self.measure_generator.set_state(snapshot.generators[1])
        self.updates, self.diverged = snapshot.updates, snapshot.diverged


def _rebuild(arguments: tuple[Any, ...], snapshot: Snapshot) -> UnlearningRun:
    run = UnlearningRun(*arguments)
    run.restore(snapshot)
    return run
