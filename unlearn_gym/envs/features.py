"""What ``observation="extended"`` adds to an observation: what a run's model knows now, against its start."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlearn_gym.math.diffusion import grid_timesteps
from unlearn_gym.metrics.probe import learned_labels
from unlearn_gym.run import UnlearningRun
from unlearn_gym.system.torch_state import insulated
from unlearn_gym.tasks import Task, to_model_range

FEATURE_CLIP = 5.0
NUM_BANDS, BAND_SAMPLES = 5, 8
NUM_SAMPLES, SAMPLER_STEPS = 16, 5
DISTANCE_UNIT = 0.002
"""Share of ‖θ_0‖ that the distance is counted in: 60 updates at a task's defaults end between 1 and 3."""


class ObservationGroup(ABC):
    """Entries that belong together, all 0 at the start.

    ``entries``: how many, in words; ``observation``: what they are; ``cost``: the time of a step with the group over
    that of one without, on a CPU, by task (item 11 of ``unlearn-gym bench``).
    """

    entries: ClassVar[str]
    observation: ClassVar[str]
    cost: ClassVar[dict[str, float]]
    size: int

    @abstractmethod
    def __init__(self, task: Task, run: UnlearningRun, generator: torch.Generator) -> None:
        """Measure the start, which is what ``run`` has now; what is fixed for all runs comes from ``generator``."""

    @abstractmethod
    def measure(self, run: UnlearningRun, start: Tensor) -> Tensor:
        """What is to be known of the run's weights now, with the start's ``(P,)``: float64, on the run's device."""

    @abstractmethod
    def relate(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The entries ``(size,)``: what :meth:`measure` found, against what it found at the start."""


class BandLosses(ObservationGroup):
    """The forget loss in each of ``NUM_BANDS`` equal bands of timesteps, as log(x / x at the start).

    Measured on a grid of (sample, t, noise) of its own: ``BAND_SAMPLES`` timesteps, evenly spaced, in every band. A
    VAE has no timesteps: its bands are as many samples each, of which it has the negative ELBO.
    """

    entries = "5"
    observation = "log(forget loss / its start) in each fifth of the timesteps, 8 samples each"
    cost: ClassVar = {"gaussians-2d": 1.11, "mnist-trousers": 1.61}
    size = NUM_BANDS

    def __init__(self, task: Task, run: UnlearningRun, generator: torch.Generator) -> None:
        self.grid = _forget_grid(run, generator)
        self.start_losses = self.measure(run, run.flat.vector).cpu().numpy()

    @torch.no_grad()
    def measure(self, run: UnlearningRun, start: Tensor) -> Tensor:
        """Mean over pixels and samples of what training minimises in each band, ``(NUM_BANDS,)``."""
        errors = run.family.errors(run.model, *self.grid, run.alphas_cumprod)
        return errors.double().view(NUM_BANDS, BAND_SAMPLES).mean(1)

    def relate(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Logarithms of the ratios."""
        return np.asarray(np.log(np.maximum(values / self.start_losses, np.finfo(np.float64).tiny)))


class SampleFeatures(ObservationGroup):
    """Mean classifier features of ``NUM_SAMPLES`` samples from fixed noise under the forget data's labels, less those
    at the start, over their standard deviation there; none where the task has no classifier.
    """

    entries = "F"
    observation = "mean classifier features of 16 samples, their change since the start"
    cost: ClassVar = {"gaussians-2d": 1.46, "mnist-trousers": 2.44}

    def __init__(self, task: Task, run: UnlearningRun, generator: torch.Generator) -> None:
        self.task = task
        shape = run.family.noise_shape(run.model, run.data.retain.shape[1:])
        noise = torch.randn((NUM_SAMPLES, *shape), generator=generator)
        self._noise = noise.to(run.alphas_cumprod.device)
        labels = learned_labels(task, run.data, NUM_SAMPLES)
        self._labels = None if labels is None else labels.to(self._noise.device)
        start = self.features(run).double()
        self._mean = start.mean(0).cpu().numpy()
        self._std = np.maximum(start.cpu().numpy().std(0, ddof=1), np.finfo(np.float32).eps)
        self.size = len(self._mean)

    @torch.no_grad()
    def features(self, run: UnlearningRun) -> Tensor:
        """Classifier features ``(NUM_SAMPLES, F)`` of what the run's model draws now; F = 0 without a classifier."""
        if self.task.classify is None:
            return self._noise.new_empty(NUM_SAMPLES, 0)
        steps = min(SAMPLER_STEPS, len(run.alphas_cumprod))
        samples = run.family.sample(
            run.model, self._noise, run.alphas_cumprod,
            labels=self._labels, num_inference_steps=steps, clip=self.task.clip,
        )  # fmt: skip
        return self.task.classify(samples)[0]

    def measure(self, run: UnlearningRun, start: Tensor) -> Tensor:
        """Their mean ``(F,)``."""
        return self.features(run).double().mean(0)

    def relate(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Differences in standard deviations."""
        return np.asarray((values - self._mean) / self._std)


class ParameterDistance(ObservationGroup):
    """How far the weights are from the start: log(1 + ‖θ - θ_0‖ / (``DISTANCE_UNIT`` ‖θ_0‖)).

    The unit is a share of the weights' own norm: it knows neither their number nor the optimizer.
    """

    entries = "1"
    observation = "log(1 + 500 ‖θ − θ_0‖ / ‖θ_0‖) of the parameters θ"
    cost: ClassVar = {"gaussians-2d": 1.02, "mnist-trousers": 1.01}
    size = 1

    def __init__(self, task: Task, run: UnlearningRun, generator: torch.Generator) -> None:
        norm = float(run.flat.vector.detach().norm())
        self._unit = DISTANCE_UNIT * max(norm, float(np.finfo(np.float32).tiny))

    @torch.no_grad()
    def measure(self, run: UnlearningRun, start: Tensor) -> Tensor:
        """‖θ - θ_0‖, ``(1,)``."""
        return torch.dist(run.flat.vector, start).double().view(1)

    def relate(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """In units, on a logarithmic scale."""
        return np.asarray(np.log1p(values / self._unit))


GROUPS: dict[str, type[ObservationGroup]] = {
    "bands": BandLosses,
    "samples": SampleFeatures,
    "distance": ParameterDistance,
}
"""The groups by name, in the observation's order."""


class ExtendedFeatures:
    """The entries of all ``GROUPS``, each relative to the weights that ``run`` has when this is made.

    Everything drawn is fixed: runs of a task share it, and no generator of theirs is used.

    Args:
        task: what is unlearned, with or without ``classify``.
        run: a run of it at its start weights.
    """

    @insulated
    def __init__(self, task: Task, run: UnlearningRun) -> None:
        generator = torch.Generator().manual_seed(0)
        self.groups = {name: group(task, run, generator) for name, group in GROUPS.items()}

    @property
    def size(self) -> int:
        """Number of entries."""
        return sum(group.size for group in self.groups.values())

    @insulated
    def measure(self, run: UnlearningRun, start: Tensor) -> NDArray[np.float64]:
        """The entries ``(size,)`` of the run's current weights, in ±``FEATURE_CLIP``, which stands for NaN, too.

        ``start``: the start weights ``(P,)``, which many environments share.
        """
        groups = list(self.groups.values())
        values = torch.cat([group.measure(run, start) for group in groups]).cpu().numpy()
        parts = np.split(values, np.cumsum([group.size for group in groups])[:-1])
        entries = np.concatenate([group.relate(part) for group, part in zip(groups, parts, strict=True)])
        return np.clip(np.nan_to_num(entries, nan=np.inf), -FEATURE_CLIP, FEATURE_CLIP)


def _forget_grid(run: UnlearningRun, generator: torch.Generator) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Forget samples, ``labels``, ``noise`` and ``timesteps``, ordered by timestep.

    Timesteps are not drawn, so that no band can be without any, however few the schedule has.
    """
    data, count = run.data, NUM_BANDS * BAND_SAMPLES
    index = torch.randint(len(data.forget), (count,), generator=generator).to(data.forget.device)
    x = to_model_range(data.forget[index])
    noise = torch.randn((count, *run.family.noise_shape(run.model, x.shape[1:])), generator=generator).to(x)
    timesteps = torch.tensor(grid_timesteps(len(run.alphas_cumprod), count), device=x.device)
    labels = None if data.forget_labels is None else data.forget_labels[index]
    return x, labels, noise, timesteps
