"""Item 8: how the time of a step grows with batch, parameters and number of environments."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unlearn_gym.benchmark.figures import Figure
from unlearn_gym.benchmark.step import make_env, stepping
from unlearn_gym.benchmark.timing import repeated, take_turns
from unlearn_gym.benchmark.vector import make_ours
from unlearn_gym.files import replacing
from unlearn_gym.models import UNetConfig, build_network
from unlearn_gym.run import UnlearningRun
from unlearn_gym.tasks import get_task, load_data

BATCHES = (4, 8, 16, 32, 64, 128)
CHANNELS = ((16, 32), (24, 48), (32, 64), (48, 96), (64, 128), (96, 192))
ENVS = (1, 2, 4, 8, 16)

Curve = tuple[list[float], list[float]]


def batches(task: str, device: str, rounds: int) -> Curve:
    """Batch sizes and milliseconds a step."""
    envs = {n: make_env(task, device, batch_size=n, skip_zero_weights=False) for n in BATCHES}
    turns = take_turns({str(n): stepping(env) for n, env in envs.items()}, rounds, device=device)
    return [float(n) for n in BATCHES], [1e3 * turns.median(str(n)) for n in BATCHES]


def parameters(device: str, rounds: int) -> Curve:
    """Parameters of compact U-Nets of growing width, with weights as initialised, and milliseconds an update."""
    task = get_task("mnist-trousers")
    data, settings = load_data(task), task.settings.override(skip_zero_weights=False, device=device)
    runs = []
    for channels in CHANNELS:
        network = build_network(UNetConfig(channels=channels, num_blocks=1, num_classes=10))
        runs.append(UnlearningRun(network, data, task.schedule.alphas_cumprod(), settings))
    functions = {str(i): partial(run.update, 0.5) for i, run in enumerate(runs)}
    turns = take_turns(functions, rounds, device=device)
    sizes = [float(len(run.flat.vector)) for run in runs]
    return sizes, [1e3 * turns.median(str(i)) for i in range(len(runs))]


def environments(task: str, device: str, rounds: int, steps: int) -> Curve:
    """Numbers of environments and milliseconds a step of all of them."""
    times = []
    for n in ENVS:
        env = make_ours(task, device, n)
        env.reset(seed=0)
        block = repeated(partial(env.step, np.full((n, 1), 0.5, dtype=np.float32)), steps)
        times.append(1e3 * take_turns({"all": block}, rounds, device=device, warmup=1).median("all") / steps)
        env.close()
    return [float(n) for n in ENVS], times


def exponent(curve: Curve) -> float:
    """B of the fit time = a · size^b on logarithmic scales."""
    sizes, times = curve
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def growth(task: str, device: str, rounds: int, out: Path) -> tuple[list[Figure], dict[str, Any]]:
    """The three curves with their exponents, and ``growth.png`` in ``out``."""
    curves = {
        "batch size": batches(task, device, rounds),
        "parameters": parameters(device, rounds),
        "environments": environments(task, device, rounds, 4),
    }
    _plot(curves, out / "growth.png")
    figures = [Figure("8", f"time of a step ~ {name} ^", exponent(curve)) for name, curve in curves.items()]
    return figures, {name: {"size": sizes, "ms": times} for name, (sizes, times) in curves.items()}


def _plot(curves: dict[str, Curve], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(picture)
    for axes, (name, (sizes, times)) in zip(picture.subplots(1, len(curves)), curves.items(), strict=True):
        slope = exponent((sizes, times))
        scale = np.exp(np.mean(np.log(times) - slope * np.log(sizes)))
        axes.loglog(sizes, times, "o", color="C0", label="measured")
        axes.loglog(sizes, scale * np.array(sizes) ** slope, "--", color="C1", label=f"fit, exponent {slope:.2f}")
        axes.set_xlabel(name)
        axes.set_ylabel("ms")
        axes.legend(frameon=False)
    picture.suptitle("time of a step")
    with replacing(path) as file:
        picture.savefig(file, dpi=110, format="png")
