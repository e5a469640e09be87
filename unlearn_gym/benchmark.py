"""What the environment costs beyond the network's own arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import SettingsError

WARMUP = 3


def bare_passes(env: SISSUnlearnEnv) -> Callable[[], None]:
    """One forward and two backward passes of the environment's network at its batch size, and nothing else."""
    run, model = env.run, env.task.pretrained_model().to(memory_format=torch.channels_last)
    batch = run.draw(torch.Generator().manual_seed(0))
    parameters = list(model.parameters())

    def passes() -> None:
        output = model(batch.retain, batch.timesteps, batch.retain_labels)
        torch.autograd.grad(output, parameters, batch.noise, retain_graph=True)
        torch.autograd.grad(output, parameters, batch.noise)

    return passes


def alternate(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> tuple[float, float, float]:
    """Median seconds of each, and the median of the ratio second / first over pairs run in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs + WARMUP):
        for function, into in zip((first, second), times, strict=True):
            started = time.perf_counter()
            function()
            into.append(time.perf_counter() - started)
    a, b = times[0][WARMUP:], times[1][WARMUP:]
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in zip(a, b, strict=True))


def benchmark(task: str, pairs: int = 40) -> dict[str, float]:
    """Ratios of ``env.step`` and ``env.reset`` to the bare passes and to each other, and steps a second.

    ``step_overhead``: env.step, optimizer included, over one forward and two backward passes;
    ``reset_over_step``: env.reset over env.step. Both are medians over pairs measured in turns.
    """
    if pairs < 1:
        raise SettingsError(f"pairs={pairs} must be at least 1")
    env = SISSUnlearnEnv(task, horizon=10 * (pairs + WARMUP))
    env.reset(seed=0)
    bare, step, overhead = alternate(bare_passes(env), lambda: env.step(0.5), pairs)
    _, _, reset = alternate(lambda: env.step(0.5), env.reset, pairs)
    return {
        "threads": float(torch.get_num_threads()),
        "bare_ms": 1e3 * bare,
        "step_ms": 1e3 * step,
        "step_overhead": overhead,
        "reset_over_step": reset,
        "steps_per_second": 1 / step,
    }
