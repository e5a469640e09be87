"""What ``observation="extended"`` adds to an observation: what a run's model knows now, against its start."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlearn_gym.diffusion import grid_timesteps, q_sample, sample
from unlearn_gym.run import UnlearningRun
from unlearn_gym.tasks import Task, to_model_range
from unlearn_gym.tasks.probe import learned_labels

FEATURE_CLIP = 5.0
NUM_BANDS, BAND_SAMPLES = 5, 8
NUM_SAMPLES, SAMPLER_STEPS = 16, 5


class ExtendedFeatures:
    """Two groups of entries, each relative to the weights that ``run`` has when this is made.

    1. The forget loss in each of ``NUM_BANDS`` equal bands of timesteps, as log(x / x at the start), on a grid of
       (sample, t, noise) of its own: ``BAND_SAMPLES`` timesteps, evenly spaced, in every band.
    2. The mean classifier features of ``NUM_SAMPLES`` samples from fixed noise under the forget data's labels, less
       those at the start, over their standard deviation there; none where the task has no classifier.

    Everything drawn is fixed: runs of a task share it, and no generator of theirs is used.

    Args:
        task: what is unlearned, with or without ``classify``.
        run: a run of it at its start weights.
    """

    def __init__(self, task: Task, run: UnlearningRun) -> None:
        self.task = task
        generator = torch.Generator().manual_seed(0)
        self._grid = _forget_grid(run, generator)
        noise = torch.randn((NUM_SAMPLES, *run.data.retain.shape[1:]), generator=generator)
        self._noise = noise.to(run.alphas_cumprod.device)
        labels = learned_labels(task, run.data, NUM_SAMPLES)
        self._labels = None if labels is None else labels.to(self._noise.device)
        self._losses = self._band_losses(run).cpu().numpy()
        start = self._sample_features(run).double()
        self._mean = start.mean(0).cpu().numpy()
        self._std = np.maximum(start.cpu().numpy().std(0, ddof=1), np.finfo(np.float32).eps)

    @property
    def size(self) -> int:
        """Number of entries: ``NUM_BANDS`` and one for each classifier feature."""
        return NUM_BANDS + len(self._mean)

    def measure(self, run: UnlearningRun) -> NDArray[np.float64]:
        """The entries ``(size,)`` of the run's current weights, in ±``FEATURE_CLIP``, which stands for NaN, too."""
        losses, features = self._band_losses(run), self._sample_features(run).double().mean(0)
        values = torch.cat([losses, features]).cpu().numpy()
        ratios = np.log(np.maximum(values[:NUM_BANDS] / self._losses, np.finfo(np.float64).tiny))
        changes = (values[NUM_BANDS:] - self._mean) / self._std
        return np.clip(np.nan_to_num(np.append(ratios, changes), nan=np.inf), -FEATURE_CLIP, FEATURE_CLIP)

    @torch.no_grad()
    def _band_losses(self, run: UnlearningRun) -> Tensor:
        """Mean over pixels and samples of (ε_θ - ε)² in each band, ``(NUM_BANDS,)`` float64."""
        x_t, timesteps, noise, labels = self._grid
        errors = (run.model(x_t, timesteps, labels) - noise).square().flatten(1).mean(1)
        return errors.double().view(NUM_BANDS, BAND_SAMPLES).mean(1)

    @torch.no_grad()
    def _sample_features(self, run: UnlearningRun) -> Tensor:
        """Classifier features ``(NUM_SAMPLES, F)`` of what the run's model draws now; F = 0 without a classifier."""
        if self.task.classify is None:
            return self._noise.new_empty(NUM_SAMPLES, 0)
        steps = min(SAMPLER_STEPS, len(run.alphas_cumprod))
        samples = sample(
            run.model, self._noise, run.alphas_cumprod,
            labels=self._labels, num_inference_steps=steps, clip=self.task.clip,
        )  # fmt: skip
        return self.task.classify(samples)[0]


def _forget_grid(run: UnlearningRun, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Forget samples ``x_t``, ``timesteps``, ``noise`` and ``labels``, ordered by timestep.

    Timesteps are not drawn, so that no band can be without any, however few the schedule has.
    """
    data, count = run.data, NUM_BANDS * BAND_SAMPLES
    index = torch.randint(len(data.forget), (count,), generator=generator).to(data.forget.device)
    x = to_model_range(data.forget[index])
    noise = torch.randn(x.shape, generator=generator).to(x)
    timesteps = torch.tensor(grid_timesteps(len(run.alphas_cumprod), count), device=x.device)
    labels = None if data.forget_labels is None else data.forget_labels[index]
    return q_sample(x, noise, timesteps, run.alphas_cumprod), timesteps, noise, labels
