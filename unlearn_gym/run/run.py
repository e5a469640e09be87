"""The live unlearning run: each :meth:`UnlearningRun.update` is one optimizer step on the model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unlearn_gym.errors import RunError, shown
from unlearn_gym.math import siss
from unlearn_gym.models.families import family_of
from unlearn_gym.models.flat import FlatParameters, detached_copy, optimizer_state, restore_optimizer
from unlearn_gym.run.actions import Action
from unlearn_gym.run.batch import Batch, Draw, draw_batch
from unlearn_gym.run.gradients import (
    GradientNorms,
    clip_factor,
    clip_values,
    gradient_norms,
    inner_product,
    takes_strength,
)
from unlearn_gym.run.objectives import Context, Learner, OwnPasses, Passes, get_objective
from unlearn_gym.run.terms import SECOND_MOMENT_GRID, StepTerms, pack, unpack  # fmt: skip
from unlearn_gym.settings import RunSettings
from unlearn_gym.system.memory import bytes_per_sample, check_memory
from unlearn_gym.system.torch_state import insulated, out_of_inference_mode
from unlearn_gym.tasks.data import TaskData, to_model_range

PROBE_SIZE = 64
MEASURED_BATCH = 64
"""Above this batch size what an update takes in memory is measured first: it costs a small part of an update."""
SPLIT_LIMIT = 1.5
"""Largest share of samples, both sides counted, at which two passes of a part each are cheaper than three of all."""


@dataclass(frozen=True)
class Snapshot:
    """A run's state: weights, buffers, optimizer, both generators, norms last measured, counters; ``learner``: weights
    and optimizer of what learns beside, where something does.
    """

    vector: Tensor
    optimizer_name: str
    optimizer: dict[str, Tensor]
    buffers: dict[str, Tensor]
    generators: tuple[Tensor, Tensor]
    known_norms: tuple[Tensor, Tensor, Tensor]
    norms_age: int
    updates: int
    diverged: bool
    learner: tuple[Tensor, dict[str, Tensor]] | None = None


class Measured(NamedTuple):
    """What one batch measured, and which of its rows are forget samples."""

    terms: siss.SISSTerms
    norms: GradientNorms
    from_forget: Tensor
    lambda_gradients: dict[str, Tensor] | None = None


def make_optimizer(settings: RunSettings, vectors: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of one run, or of several: each of ``vectors (P,)`` holds all parameters of one."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(vectors, lr=settings.learning_rate, fused=True)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(vectors, lr=settings.learning_rate, betas=settings.adam_betas, weight_decay=0.0, fused=True)


@contextlib.contextmanager
def scaled_step(optimizer: torch.optim.Optimizer, scale: float | None) -> Iterator[None]:
    """Within the block a step of ``optimizer`` is ``scale`` times as long; None leaves it.

    All optimizers here move by their learning rate times what their moments say.
    """
    group = optimizer.param_groups[0]
    learning_rate = group["lr"]
    if scale is not None:
        group["lr"] = learning_rate * scale
    try:
        yield
    finally:
        group["lr"] = learning_rate


class UnlearningRun:
    """Model, optimizer, data streams and generators of one unlearning run.

    The batches of updates and those of measurements come from two generators, both seeded by
    :meth:`seed`: equal seeds give every policy the same updates' samples, noise and mask uniforms,
    whatever else it measures. All randomness is theirs.

    Args:
        model: with pretrained weights; it is trained in place. An ε-network, or a model of another family
            (:mod:`unlearn_gym.models.families`).
        data: retain and forget set (see :class:`unlearn_gym.tasks.TaskData`).
        alphas_cumprod: ᾱ_t of the model's noise schedule, ``(T,)``.
        settings: options, see :class:`unlearn_gym.settings.RunSettings`.
        seed: first seed of the generators.
    """

    @insulated
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
        self.family = family_of(model)
        self.objective = get_objective(self.family.name, settings)
        self.data = data.to(device)
        self._prepared = self.objective.prepare(self.data, settings)
        self._noise_shape = self.family.noise_shape(model, data.retain.shape[1:])
        self.alphas_cumprod = alphas_cumprod.to(device)
        model = out_of_inference_mode(model).to(device).to(memory_format=torch.channels_last)
        self.model = model.eval()  # dropout would draw globally
        own = self.objective if isinstance(self.objective, OwnPasses) else None
        self.flat = FlatParameters(own.trained(self.model) if own else self.model)
        self.learner = own.learner(self.model, settings) if own else None
        self.retain_grad = torch.zeros_like(self.flat.vector.data)
        self.forget_grad = torch.zeros_like(self.flat.vector.data)
        self._retain_views = self.flat.gradient_views(self.retain_grad)
        self._forget_views = self.flat.gradient_views(self.forget_grad)
        self.update_grad = torch.zeros_like(self.flat.vector.data)
        self._update_views = self.flat.gradient_views(self.update_grad)
        self.optimizer = make_optimizer(settings, [self.flat.vector])
        factors = siss.dataset_factors(
            settings.dataset_factors, data.retain_size or len(data.retain), data.forget_size or len(data.forget)
        )
        pixels = data.retain[0].numel() if settings.loss_reduction == "sum" else 1
        self.retain_coef, self.forget_coef = (pixels * factor for factor in factors)
        self._coefs = {"retain_coef": self.retain_coef, "forget_coef": self.forget_coef}
        self._context = Context(settings, self.alphas_cumprod, **self._coefs)
        self._signed_scale = self.objective.sign * settings.forget_scale
        self.generator = torch.Generator(device)
        self.measure_generator = torch.Generator(device)
        self.grid = torch.tensor(SECOND_MOMENT_GRID, dtype=torch.float32, device=device)
        self._splits = settings.skip_zero_weights and self.generator.device.type == "cpu"  # elsewhere it would wait
        self._known_norms = (torch.zeros((), device=device),) * 3
        self._norms_age = 0
        self.updates = 0
        self.diverged = False
        self.seed(seed)
        self._probe = self._draw_probe()
        if settings.batch_size > MEASURED_BATCH:
            check_memory(self.update_bytes, f"batch_size={shown(settings.batch_size)}", device)

    @property
    def state_bytes(self) -> int:
        """Bytes of the model, its gradients and the optimizer's state."""
        vectors = self.flat.vector.nbytes * (6 if self.learner is None else 10)
        return vectors + sum(tensor.nbytes for tensor in self.model.state_dict().values())

    @property
    @insulated
    def update_bytes(self) -> int:
        """About the bytes that an update's graph takes, measured on a few samples of no stream."""
        value = torch.full((), 0.5, device=self.generator.device)

        def passes(size: int) -> Measured:
            return self._separate_gradients(self._batch_of_no_stream(size), value, None)

        return self.settings.batch_size * bytes_per_sample(passes)

    def _batch_of_no_stream(self, size: int) -> Batch:
        generator = torch.Generator(self.generator.device).manual_seed(0)
        batch = draw_batch(self.data, size, len(self.alphas_cumprod), generator, self._noise_shape)
        return self.objective.complete(batch, self.data, self._prepared, generator)

    @insulated
    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are built anew: parameters that are views of one vector must stay so."""
        arguments = (copy.deepcopy(self.model), self.data, self.alphas_cumprod, self.settings)
        return _rebuild, (arguments, self.snapshot())

    def seed(self, seed: int) -> None:
        """Start both streams anew from ``seed``, an integer in 0..2³²-1."""
        self.generator.manual_seed(seed)
        self.measure_generator.manual_seed(seed ^ 2**31)  # torch's CPU generator reads the lower 32 bits alone

    @insulated
    def draw(self, generator: torch.Generator) -> Batch:
        """A batch of pairs, drawn with replacement, with what the objective needs more."""
        s, num_timesteps = self.settings, len(self.alphas_cumprod)
        batch = draw_batch(self.data, s.batch_size, num_timesteps, generator, self._noise_shape)
        return self.objective.complete(batch, self.data, self._prepared, generator)

    @insulated
    def update(self, action: Action | float) -> StepTerms:
        """One forward pass, two backward passes, one optimizer step; a number is the action with that λ.

        Samples of zero weight need no pass, and ``grad_norms="every:k"`` saves one backward pass between
        measurements. Raises :class:`RunError` for values out of range and for a run that has diverged.
        """
        action = Action.of(action)
        self.check(action)
        lambda_, strength = action.lambda_, action.forget_strength
        value, batch = torch.full((), float(lambda_), device=self.generator.device), self.draw(self.generator)
        if self.updates % self.settings.norms_period == 0:
            measured = self._separate_gradients(batch, value, self.learner, strength)
            norms = measured.norms
            self._known_norms, self._norms_age = (norms.retain, norms.forget, norms.direct), 0
            scale = clip_factor(norms.update, self.settings.max_grad_norm)
            torch.mul(self.retain_grad, scale, out=self.update_grad)
            self.update_grad.addcmul_(self.forget_grad, scale * norms.forget_multiplier, value=-1.0)
        else:
            measured = self._combined_gradient(batch, value)
            self.update_grad.mul_(clip_factor(measured.norms.update, self.settings.max_grad_norm))
        clip_values(self.update_grad, self.settings.max_grad_value)
        self.flat.vector.grad = self.update_grad
        with scaled_step(self.optimizer, action.step_scale):
            self.optimizer.step()
        self.flat.vector.grad = None  # an optimizer that runs share steps those that have a gradient
        self.updates += 1
        return self._report(lambda_, value, measured, self._norms_age)

    @insulated
    def measure(self, lambda_: float) -> StepTerms:
        """The terms of a batch of the measuring stream, without an update."""
        self.check(Action(lambda_))
        value, batch = torch.full((), float(lambda_), device=self.generator.device), self.draw(self.measure_generator)
        return self._report(lambda_, value, self._separate_gradients(batch, value, None), 0)

    @insulated
    def measure_unweighted(self) -> NDArray[np.float64]:
        """``[retain_loss, forget_loss, retain_grad_norm, forget_grad_norm]`` without importance
        weights, with (c_r, c_f), on a batch of the measuring stream: twice a step's forward pass.
        """
        batch = self.draw(self.measure_generator)
        if isinstance(self.objective, OwnPasses):
            value = torch.full((), 0.5, device=self.generator.device)
            passes = self.objective.unweighted().passes(self.model, batch, value, self._context, None)
            terms, norms, *_ = self._own_passes(passes)
            losses_and_norms = torch.stack([terms.retain_loss, terms.forget_loss, norms.retain, norms.forget])
            return np.asarray(losses_and_norms.tolist(), dtype=np.float64)
        values = []
        for x, labels, coef, gradient, views in (
            (batch.retain, batch.retain_labels, self.retain_coef, self.retain_grad, self._retain_views),
            (batch.forget, batch.forget_labels, self.forget_coef, self.forget_grad, self._forget_views),
        ):
            errors = self.family.errors(self.model, x, labels, batch.noise, batch.timesteps, self.alphas_cumprod)
            loss = coef * errors.mean()
            self._backward(loss, None, gradient, views, retain_graph=False)
            values += [loss.detach(), inner_product(gradient, gradient).sqrt()]
        losses_and_norms = torch.stack(values)[[0, 2, 1, 3]]
        return np.asarray(losses_and_norms.tolist(), dtype=np.float64)

    def check(self, action: Action) -> None:
        """Raise :class:`RunError` when an update with ``action`` cannot be made."""
        action.check()
        if action.forget_strength is not None and not takes_strength(self.settings):
            raise RunError(
                f"forget_strength={action.forget_strength} is the norm rules' constant, which objective="
                f"{self.settings.objective!r} with forget_grad_rule={self.settings.forget_grad_rule!r} does not have"
            )
        if self.diverged:
            raise RunError("this run has diverged; restore a snapshot before the next update")
        if not self.flat.hold_the_network():
            raise RunError(
                "the network's parameters are not those that the run trains: load_state_dict(assign=True), .to() and "
                ".double() replace them; make run or environment anew, and copy weights into its parameters"
            )

    def _separate_gradients(
        self, batch: Batch, value: Tensor, learner: Learner | None, strength: float | None = None
    ) -> Measured:
        """Fill ``retain_grad`` and ``forget_grad``, by one forward and two backward passes or less."""
        if isinstance(self.objective, OwnPasses):
            passes = self.objective.passes(self.model, batch, value, self._context, learner)
            return self._own_passes(passes, strength)
        draw = self.objective.draw(batch, self.alphas_cumprod, value)
        rows = self.objective.own_rows(len(draw.x_t)) or self._weighted_rows(draw.targets)
        terms = self._whole_passes(draw) if rows is None else self._split_passes(draw, rows)
        return Measured(terms, self._norms(terms, strength), draw.from_forget)

    def _norms(self, terms: siss.SISSTerms, strength: float | None) -> GradientNorms:
        objective = self.objective
        return gradient_norms(
            self.retain_grad, self.forget_grad, terms.forget_weight, self.settings,
            sign=objective.sign, projects=objective.projects, strength=strength,
        )  # fmt: skip

    def _own_passes(self, passes: Passes, strength: float | None = None) -> Measured:
        """A backward pass of each of an objective's losses; the direct one's gradient joins the retain side's."""
        sides = (
            (passes.retain, self.retain_grad, self._retain_views),
            (passes.forget, self.forget_grad, self._forget_views),
        )
        for loss, gradient, views in sides:
            if loss is None:
                gradient.zero_()
            else:
                self._backward(loss, None, gradient, views, retain_graph=loss is passes.retain)
        norms = self._norms(passes.terms, strength)
        if passes.direct is not None:
            self._backward(passes.direct, None, self.update_grad, self._update_views, retain_graph=False)
            self.retain_grad += self.update_grad
            whole = torch.add(self.retain_grad, norms.forget_multiplier * self.forget_grad, alpha=-1.0)
            direct, update = (inner_product(g, g).sqrt() for g in (self.update_grad, whole))
            norms = norms._replace(direct=direct, update=update)
        return Measured(passes.terms, norms, passes.from_forget, passes.lambda_gradients)

    def _weighted_rows(self, targets: siss.MixtureTargets) -> tuple[Tensor, Tensor] | None:
        """Which samples have a retain and which a forget weight, if each side's passes on its own pay."""
        if not self._splits:
            return None
        retain, forget = targets.retain_weight.nonzero()[:, 0], targets.forget_weight.nonzero()[:, 0]
        pays = len(retain) + len(forget) <= SPLIT_LIMIT * len(targets.retain_weight)
        return (retain, forget) if pays else None

    def _whole_passes(self, draw: Draw) -> siss.SISSTerms:
        epsilon_pred = self.model(draw.x_t, draw.timesteps, draw.labels)
        terms = self._terms(epsilon_pred, draw)
        retain_output_grad, forget_output_grad = siss.output_gradients(terms, **self._coefs)
        self._backward(epsilon_pred, retain_output_grad, self.retain_grad, self._retain_views, retain_graph=True)
        self._backward(epsilon_pred, forget_output_grad, self.forget_grad, self._forget_views, retain_graph=False)
        return terms

    def _split_passes(self, draw: Draw, rows: Sequence[slice | Tensor]) -> siss.SISSTerms:
        """A forward and a backward pass of each side's samples: one of zero weight has no gradient."""
        epsilon_pred, outputs = torch.empty_like(draw.x_t), []
        for index in rows:
            x_t, labels = draw.x_t[index], None if draw.labels is None else draw.labels[index]
            outputs.append(self.model(x_t, draw.timesteps[index], labels) if len(x_t) else None)
            if outputs[-1] is not None:
                epsilon_pred[index] = outputs[-1].detach()
        terms = self._terms(epsilon_pred, draw)
        sides = zip(
            rows, outputs, siss.output_gradients(terms, **self._coefs), (self.retain_grad, self.forget_grad),
            (self._retain_views, self._forget_views), strict=True,
        )  # fmt: skip
        for index, output, output_grad, gradient, views in sides:
            if output is None:
                gradient.zero_()
            else:
                self._backward(output, output_grad[index], gradient, views, retain_graph=False)
        return terms

    def _combined_gradient(self, batch: Batch, value: Tensor) -> Measured:
        """Fill ``update_grad`` by one backward pass of the loss; the separate norms are those last measured."""
        scale, output_grad = self._signed_scale, None
        if isinstance(self.objective, OwnPasses):
            passes = self.objective.passes(self.model, batch, value, self._context, self.learner)
            terms, from_forget, slopes = passes.terms, passes.from_forget, passes.lambda_gradients
            parts = (passes.retain, None if passes.forget is None else -scale * passes.forget, passes.direct)
            output = torch.stack([part for part in parts if part is not None]).sum()
        else:
            draw = self.objective.draw(batch, self.alphas_cumprod, value)
            output, from_forget, slopes = self.model(draw.x_t, draw.timesteps, draw.labels), draw.from_forget, None
            terms = self._terms(output, draw)
            retain_output_grad, forget_output_grad = siss.output_gradients(terms, **self._coefs)
            output_grad = retain_output_grad - scale * forget_output_grad
        self._backward(output, output_grad, self.update_grad, self._update_views, retain_graph=False)
        self._norms_age += 1
        norm = inner_product(self.update_grad, self.update_grad).sqrt()
        retain, forget, direct = self._known_norms
        norms = GradientNorms(retain, forget, torch.full_like(norm, scale), norm, direct)
        return Measured(terms, norms, from_forget, slopes)

    @torch.no_grad()
    def _terms(self, epsilon_pred: Tensor, draw: Draw) -> siss.SISSTerms:
        return siss.siss_terms(epsilon_pred, draw.targets, forget_scale=self._signed_scale, **self._coefs)

    def _backward(
        self, output: Tensor, output_grad: Tensor | None, gradient: Tensor, views: list[Tensor], *, retain_graph: bool
    ) -> None:
        gradient.zero_()
        if not output.requires_grad:
            raise RunError(
                "the network's output has no gradient, so nothing would be learned; its forward pass must not detach, "
                "or run under torch.no_grad, and its parameters must be trainable"
            )
        self.flat.point_gradients(views)
        torch.autograd.backward(output, output_grad, retain_graph=retain_graph, inputs=self.flat.parameters)
        self.flat.point_gradients(None)

    @torch.no_grad()
    def _report(self, lambda_: float, value: Tensor, measured: Measured, norms_age: int) -> StepTerms:
        """Everything the step measured, brought over from the device in one transfer."""
        scale: Any = {"forget_scale": self.settings.forget_scale, **self._coefs}
        packed = pack(
            measured.from_forget, measured.terms, measured.norms, value, self.flat.vector.sum(), self.grid,
            objective=self.objective, lambda_gradients=measured.lambda_gradients, **scale,
        )  # fmt: skip
        step_terms = unpack(packed.double().cpu().numpy(), lambda_, norms_age)
        if step_terms.retain_grad_norm == 0 and step_terms.forget_grad_norm == 0:
            self._check_graph()
        self.diverged = step_terms.diverged
        return step_terms

    @torch.enable_grad()
    def _check_graph(self) -> None:
        """Raise :class:`RunError` unless what the network returns depends on a parameter that the run trains.

        A gradient may be zero for all that: a network of ReLUs may be dead on a whole batch.
        """
        batch, value = self._batch_of_no_stream(2), torch.full((), 0.5, device=self.generator.device)
        if isinstance(self.objective, OwnPasses):
            passes = self.objective.passes(self.model, batch, value, self._context, None)
            outputs = [loss for loss in (passes.retain, passes.forget, passes.direct) if loss is not None]
        else:
            draw = self.objective.draw(batch, self.alphas_cumprod, value)
            outputs = [self.model(draw.x_t, draw.timesteps, draw.labels)]
        total = torch.stack([output.sum() for output in outputs]).sum()
        if all(g is None for g in torch.autograd.grad(total, self.flat.parameters, allow_unused=True)):
            raise RunError(
                "neither loss has a gradient for the parameters that the run trains, so nothing is learned: the "
                "network must not detach what it returns"
            )

    def _draw_probe(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Fixed forget and held-out samples, labels, noise and timesteps, the same for every run."""
        generator, data = torch.Generator().manual_seed(0), self.data
        parts = []
        for samples, labels in ((data.forget, data.forget_labels), (data.heldout, data.heldout_labels)):
            index = torch.randint(len(samples), (PROBE_SIZE,), generator=generator)
            x = to_model_range(samples[index.to(samples.device)])
            noise = torch.randn((PROBE_SIZE, *self._noise_shape), generator=generator).to(x)
            timesteps = torch.randint(len(self.alphas_cumprod), (PROBE_SIZE,), generator=generator).to(x.device)
            label = torch.zeros(PROBE_SIZE) if labels is None else labels[index.to(labels.device)]
            parts.append((x, label, noise, timesteps))
        x, labels, noise, timesteps = (torch.cat(p) for p in zip(*parts, strict=True))
        return x, None if data.forget_labels is None else labels, noise, timesteps

    @insulated
    @torch.no_grad()
    def probe_losses(self) -> tuple[float, float]:
        """Forget and held-out retain loss, unweighted, on a fixed probe of 64 samples each."""
        errors = self.family.errors(self.model, *self._probe, self.alphas_cumprod)
        forget, retain = errors.view(2, -1).mean(1).tolist()
        return forget, retain

    @insulated
    def export(self) -> nn.Module:
        """A copy of the model as it is now: a module of its own, which later updates do not touch.

        Parameters of ``model`` are views of one vector, which ``safetensors`` and ``huggingface_hub`` refuse to save;
        those of the copy are contiguous tensors of their own, on the run's device, without gradients.
        """
        return detached_copy(self.model)

    @insulated
    def snapshot(self) -> Snapshot:
        """A copy of the run's state that later updates do not touch."""
        return Snapshot(
            self.flat.vector.detach().clone(),
            self.settings.optimizer,
            optimizer_state(self.optimizer, self.flat.vector),
            {k: v.clone() for k, v in self.model.named_buffers()},
            (self.generator.get_state(), self.measure_generator.get_state()),
            self._known_norms,
            self._norms_age,
            self.updates,
            self.diverged,
            None if self.learner is None else self.learner.state(),
        )

    @insulated
    def restore(self, snapshot: Snapshot) -> None:
        """Bring back a :meth:`snapshot` of a run of the same network and optimizer, exactly.

        An environment around the run has a state of its own (previous λ, history, potential): to branch an episode,
        ``copy.deepcopy`` the environment.
        """
        if snapshot.vector.shape != self.flat.vector.shape:
            raise RunError(f"the snapshot has {len(snapshot.vector)} parameters, this model {len(self.flat.vector)}")
        if snapshot.optimizer_name != self.settings.optimizer:
            raise RunError(
                f"the snapshot is of a run with optimizer {snapshot.optimizer_name!r}, this one has "
                f"{self.settings.optimizer!r}; give both the same"
            )
        with torch.no_grad():
            self.flat.vector.copy_(snapshot.vector)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(snapshot.buffers[name])
        restore_optimizer(self.optimizer, self.flat.vector, snapshot.optimizer)
        if self.learner is not None and snapshot.learner is not None:
            self.learner.restore(*snapshot.learner)
        self.generator.set_state(snapshot.generators[0])
        self.measure_generator.set_state(snapshot.generators[1])
        self._known_norms, self._norms_age = snapshot.known_norms, snapshot.norms_age
        self.updates, self.diverged = snapshot.updates, snapshot.diverged


def _rebuild(arguments: tuple[Any, ...], snapshot: Snapshot) -> UnlearningRun:
    run = UnlearningRun(*arguments)
    run.restore(snapshot)
    return run
