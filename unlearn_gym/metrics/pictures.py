"""What samples look like: images tiled to one picture, points in the plane."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

RETAIN_COLOR, FORGET_COLOR, LAMBDA_COLOR = "#1f6f8b", "#c8553d", "#3d3d3d"


def image_grid(images: Any, columns: int) -> NDArray[np.float32]:
    """Tile ``(N, C, H, W)``, an array or tensor on the CPU in [-1, 1], to one picture in [0, 1], with a pixel between
    tiles.

    C is that of grey or colour pictures, 1, 3 or 4; of others the first channel is shown.
    """
    pixels = np.asarray(images, dtype=np.float32)
    pixels = pixels if pixels.shape[1] in (1, 3, 4) else pixels[:, :1]
    n, channels, height, width = pixels.shape
    rows = -(-n // columns)
    grid = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), dtype=np.float32)
    for i, image in enumerate((pixels.clip(-1, 1) + 1) / 2):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        grid[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return grid[..., 0] if channels == 1 else grid


def draw_samples(axes: Axes, samples: Any, columns: int) -> None:
    """A grid of images ``(N, C, H, W)``, or a scatter of points ``(N, 2)`` in the plane; an array or tensor."""
    if samples.ndim == 4:
        axes.imshow(image_grid(samples, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        return
    axes.scatter(samples[:, 0], samples[:, 1], s=6, color=LAMBDA_COLOR, alpha=0.5, linewidths=0)
    axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
