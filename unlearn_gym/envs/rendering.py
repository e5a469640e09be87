"""A frame of a run: samples of the current model, the λ trace, and both losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from unlearn_gym.run import UnlearningRun
from unlearn_gym.step import StepTerms
from unlearn_gym.tasks import Task
from unlearn_gym.tasks.probe import equally, learned_labels

RETAIN_COLOR, FORGET_COLOR, LAMBDA_COLOR = "#1f6f8b", "#c8553d", "#3d3d3d"
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


def image_grid(images: Tensor, columns: int) -> NDArray[np.float32]:
    """Tile ``(N, C, H, W)`` in [-1, 1] to one picture in [0, 1], with a pixel between tiles.

    C is that of grey or colour pictures, 1, 3 or 4; of others the first channel is shown.
    """
    images = images if images.shape[1] in (1, 3, 4) else images[:, :1]
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    grid = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), dtype=np.float32)
    for i, image in enumerate((images.clamp(-1, 1) + 1) / 2):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        grid[top : top + height, left : left + width] = image.permute(1, 2, 0).numpy()
    return grid[..., 0] if channels == 1 else grid


def draw_samples(axes: Axes, samples: Tensor, columns: int = GRID[1]) -> None:
    """A grid of images, or a scatter of points in the plane."""
    if samples.dim() == 4:
        axes.imshow(image_grid(samples, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        return
    axes.scatter(samples[:, 0], samples[:, 1], s=6, color=LAMBDA_COLOR, alpha=0.5, linewidths=0)
    axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")


def draw_frame(task: Task, run: UnlearningRun, history: Sequence[StepTerms]) -> NDArray[np.uint8]:
    """The frame, ``(540, 960, 3)`` uint8."""
    figure = Figure(figsize=(9.6, 5.4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))  # type: ignore[misc]
    axes = left.subplots()
    draw_samples(axes, fixed_samples(task, run))
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
