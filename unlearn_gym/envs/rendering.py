"""A frame of a run: samples of the current model, the λ trace, and both losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from unlearn_gym.metrics.pictures import FORGET_COLOR, LAMBDA_COLOR, RETAIN_COLOR, draw_samples
from unlearn_gym.metrics.probe import equally, learned_labels
from unlearn_gym.run import UnlearningRun
from unlearn_gym.run.terms import StepTerms
from unlearn_gym.tasks import Task

GRID = (4, 6)
NUM_POINTS = 400
RENDER_STEPS = 12


def fixed_samples(task: Task, run: UnlearningRun) -> Tensor:
    """Samples of the current model from noise that is the same in every frame and episode.

    Images: two rows under the forget data's label, two of the other labels. Points: 400 of them.
    """
    shape, device = run.data.retain.shape[1:], run.settings.device
    count = GRID[0] * GRID[1] if len(shape) == 3 else NUM_POINTS
    noise_shape = run.family.noise_shape(run.model, shape)
    noise = torch.randn((count, *noise_shape), generator=torch.Generator().manual_seed(0)).to(device)
    labels = None
    if run.data.retain_labels is not None:
        labels = equally(run.data.retain_labels.unique(), count)
        learned = learned_labels(task, run.data, count // 2)
        if learned is not None:
            labels[: count // 2] = learned
    steps = min(RENDER_STEPS, len(run.alphas_cumprod))
    return run.family.sample(
        run.model, noise, run.alphas_cumprod, labels=labels, num_inference_steps=steps, clip=task.clip
    ).cpu()


def draw_frame(task: Task, run: UnlearningRun, history: Sequence[StepTerms]) -> NDArray[np.uint8]:
    """The frame, ``(540, 960, 3)`` uint8."""
    figure = Figure(figsize=(9.6, 5.4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))  # type: ignore[misc]
    axes = left.subplots()
    draw_samples(axes, fixed_samples(task, run), columns=GRID[1])
    title = "samples from fixed noise"
    if task.probe_labels:
        title += f": label {', '.join(map(str, task.probe_labels))} above, all to retain below"
    axes.set_title(title, fontsize=10)
    top, bottom = right.subplots(2, 1, sharex=True)
    steps = np.arange(1, len(history) + 1)
    s = run.settings
    top.step(steps, [t.lambda_ for t in history], where="mid", color=LAMBDA_COLOR)
    top.set(ylabel="λ", ylim=(s.lambda_min - 0.05, s.lambda_max + 0.05), xlim=(0.5, s.horizon + 0.5))
    top.set_title(f"{task.name}: update {run.updates} of {s.horizon}", fontsize=10)
    for name, color in (("retain_loss", RETAIN_COLOR), ("forget_loss", FORGET_COLOR)):
        values = np.array([getattr(t, name) for t in history])
        bottom.plot(steps, np.where(values > 0, values, np.nan), color=color, label=name.replace("_", " "))
    bottom.set(xlabel="update", ylabel="weighted loss", yscale="log")
    bottom.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
