"""Items 1 to 3 and the first half of 7: a step against its own arithmetic, other loops, and the machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import joblib
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unlearn_gym.benchmark.field_loop import FieldLoop
from unlearn_gym.benchmark.figures import Figure
from unlearn_gym.benchmark.timing import repeated, take_turns, threads
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.run.batch import Batch

ENDLESS = 1_000_000
BATCHES = (16, 32, 64)
STEPS = 4
"""Steps of one turn of item 2: a whole period of ``grad_norms="every:4"``."""


def make_env(task: str, device: str, **options: Any) -> SISSUnlearnEnv:
    """An environment that has been reset and does not end."""
    env = SISSUnlearnEnv(task, horizon=ENDLESS, device=device, **options)
    env.reset(seed=0)
    return env


def passes(model: Callable[..., Any], parameters: list[nn.Parameter], batch: Batch) -> Callable[[], None]:
    """One forward and two backward passes of ``model`` on the retain samples of ``batch``, and nothing else."""

    def run() -> None:
        output = model(batch.retain, batch.timesteps, batch.retain_labels)
        torch.autograd.grad(output, parameters, batch.noise, retain_graph=True)
        torch.autograd.grad(output, parameters, batch.noise)

    return run


def bare_passes(env: SISSUnlearnEnv) -> Callable[[], None]:
    """The :func:`passes` of the environment's network at its batch size."""
    device = env.settings.device
    model = env.task.pretrained_model().to(device).to(memory_format=torch.channels_last)
    return passes(model, list(model.parameters()), env.run.draw(torch.Generator(device).manual_seed(0)))


def thread_counts() -> list[int]:
    """One thread, and all cores."""
    return sorted({1, joblib.cpu_count()})


def stepping(env: SISSUnlearnEnv) -> Callable[[], Any]:
    """A function that makes one step of ``env``."""
    return lambda: env.step(0.5)


def named(count: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count} thread" + "s" * (count > 1)


def overhead(task: str, device: str, rounds: int) -> list[Figure]:
    """Item 1: ``env.step`` over the bare passes, with every sample in every pass and as it comes."""
    figures = []
    for count in thread_counts():
        with threads(count):
            whole, shipped = make_env(task, device, skip_zero_weights=False), make_env(task, device)
            functions = {"bare": bare_passes(whole), "whole": stepping(whole), "shipped": stepping(shipped)}
            turns = take_turns(functions, rounds, device=device)
        title = f"env.step / bare passes, all samples in all passes, {named(count)}"
        figures.append(Figure("1", title, turns.ratio("whole", "bare"), "×", 1.06))
        title = f"env.step as shipped (zero weights skipped) / bare passes over all samples, {named(count)}"
        figures.append(Figure("1", title, turns.ratio("shipped", "bare"), "×"))
        figures.append(Figure("1", f"env.step as shipped, {named(count)}", 1e3 * turns.median("shipped"), "ms"))
    return figures


def field_loop(task: str, device: str, rounds: int) -> list[Figure]:
    """Item 2: the loop of the field over ours, and what ``every:4`` saves under ``forget_grad_rule="loss"``."""
    whole: dict[str, Any] = {"skip_zero_weights": False}
    loss: dict[str, Any] = {"forget_grad_rule": "loss"}
    now_and_then = loss | {"grad_norms": "every:4"}
    options: dict[str, dict[str, Any]] = {
        "whole": whole, "shipped": {}, "loss whole": loss | whole, "loss shipped": loss,
        "every whole": now_and_then | whole, "every shipped": now_and_then,
    }  # fmt: skip
    envs = {name: make_env(task, device, **given) for name, given in options.items()}
    loop = FieldLoop(envs["whole"].run, envs["whole"].task.pretrained_model())
    updates = {"field": loop.update, **{name: env.run.update for name, env in envs.items()}}
    functions = {name: repeated(partial(update, 0.5), STEPS) for name, update in updates.items()}
    turns = take_turns(functions, rounds, device=device)
    goal = 1.07 if torch.device(device).type == "cpu" else 3.0
    rows = (
        ("published loop / update, all samples in all passes", "field", "whole", goal),
        ("published loop / update as shipped", "field", "shipped", goal),
        ("all samples in all passes / zero weights skipped", "whole", "shipped", None),
        ('both norms always / grad_norms="every:4"', "loss whole", "every whole", 1.3),
        ('the same with zero weights skipped', "loss shipped", "every shipped", None),
    )  # fmt: skip
    return [Figure("2", title, turns.ratio(a, b), "×", bound, at_least=True) for title, a, b, bound in rows]


def matmul_peak(device: str, rounds: int = 8) -> float:
    """FLOP/s of the fastest product of two float32 matrices of 1,024 rows and columns.

    The best of torch's product and of the same product as a 1×1 convolution: on a CPU they are different
    libraries, and on some chips the second is nearly twice as fast.
    """
    size = 1024
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device)
    positions = a.view(16, size, 8, 8).to(memory_format=torch.channels_last)
    kernel = a.view(size, size, 1, 1).to(memory_format=torch.channels_last)
    functions = {"product": lambda: a @ a, "convolution": lambda: torch.conv2d(positions, kernel)}
    with torch.inference_mode():
        turns = take_turns(functions, rounds, device=device)
    return float(2 * size**3 / min(map(min, turns.seconds.values())))


def machine(task: str, device: str, rounds: int) -> list[Figure]:
    """Item 3: FLOP/s of a step over the machine's measured matrix-product peak."""
    figures = []
    for count in thread_counts():
        with threads(count):
            peak = matmul_peak(device)
            figures.append(Figure("3", f"matrix-product peak, {named(count)}", peak / 1e9, "GFLOP/s"))
            for batch in BATCHES:
                env = make_env(task, device, batch_size=batch, skip_zero_weights=False)
                with FlopCounterMode(display=False) as counter:
                    env.step(0.5)
                seconds = take_turns({"step": stepping(env)}, rounds, device=device).median("step")
                share = counter.get_total_flops() / seconds / peak
                figures.append(Figure("3", f"step / peak, batch {batch}, {named(count)}", share, "×"))
    return figures


def reset(task: str, device: str, rounds: int) -> list[Figure]:
    """Item 7, first half: ``env.reset`` over ``env.step``, all samples in all passes."""
    env = make_env(task, device, skip_zero_weights=False)
    turns = take_turns({"step": stepping(env), "reset": env.reset}, rounds, device=device)
    return [Figure("7", "env.reset / env.step, all samples in all passes", turns.ratio("reset", "step"), "×", 1.0)]
