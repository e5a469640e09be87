"""Item 10: an update of each objective against its own arithmetic, and against one of SISS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from unlearn_gym.benchmark.figures import Figure
from unlearn_gym.benchmark.step import make_env
from unlearn_gym.benchmark.timing import own_clock, take_turns, threads
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.models.flat import FlatParameters
from unlearn_gym.models.one_step import OneStepModel
from unlearn_gym.run.batch import Batch
from unlearn_gym.run.objectives import OBJECTIVES
from unlearn_gym.run.objectives.epsilon import EpsilonObjective
from unlearn_gym.run.objectives.latent import LatentObjective
from unlearn_gym.run.run import UnlearningRun, make_optimizer
from unlearn_gym.tasks import get_task

TEACHERS = {"sfd-mnist-digits": "mnist-digits"}
"""Where models of a task that SISS is not for came from, and are compared with."""


def bare_update(env: SISSUnlearnEnv) -> Callable[[], None]:
    """The passes that an update of the environment's objective needs, the optimizer steps, and nothing else."""
    run, device = env.run, env.settings.device
    model = env.task.pretrained_model().to(device).to(memory_format=torch.channels_last).eval()
    make_passes = {"diffusion": _epsilon_passes, "vae": _latent_passes, "generator": _one_step_passes}
    trained = model.generator if isinstance(model, OneStepModel) else model
    flat = FlatParameters(trained)
    optimizer = make_optimizer(env.settings, [flat.vector])
    flat.vector.grad = torch.full_like(flat.vector, 1e-8)
    passes = make_passes[run.family.name](run, model, flat.parameters, run.draw(torch.Generator(device).manual_seed(0)))

    def update() -> None:
        passes()
        optimizer.step()

    return update


def _epsilon_passes(run: UnlearningRun, model: Any, parameters: list[nn.Parameter], batch: Batch) -> Callable[[], None]:
    """A row of the mixture goes forward once and back twice, once for each gradient; one that is shown for its own
    side's sake alone goes forward and back once.
    """
    assert isinstance(run.objective, EpsilonObjective)
    sides = [(batch.retain, batch.retain_labels), (batch.forget, batch.forget_labels)]
    shown = sides if run.objective.rows == "both" else sides[:1]
    backward_passes = 2 if run.objective.rows == "mixture" else 1

    def passes() -> None:
        for x, labels in shown:
            output = model(x, batch.timesteps, labels)
            for left in reversed(range(backward_passes)):
                torch.autograd.grad(output, parameters, batch.noise, retain_graph=left > 0)

    return passes


def _latent_passes(run: UnlearningRun, model: Any, parameters: list[nn.Parameter], batch: Batch) -> Callable[[], None]:
    """The mixture: both sides encoded, one decoded, back twice through all; else each side shown forward and back."""
    assert isinstance(run.objective, LatentObjective)
    rows, size = run.objective.rows, len(batch.retain)
    assert batch.retain_labels is not None
    assert batch.forget_labels is not None
    x, labels = torch.cat([batch.retain, batch.forget]), torch.cat([batch.retain_labels, batch.forget_labels])
    sides = [slice(2 * size)] if rows == "mixture" else [slice(size), slice(size, 2 * size)]
    shown = sides if rows in ("both", "mixture") else sides[:1]

    def passes() -> None:
        for side in shown:
            mean, log_variance = model.encode(x[side], labels[side])
            output = model.decode((mean + log_variance)[:size], labels[side][:size])
            for left in reversed(range(2 if rows == "mixture" else 1)):
                torch.autograd.grad(output, parameters, x[:size], retain_graph=left > 0)

    return passes


def _one_step_passes(
    run: UnlearningRun, model: Any, parameters: list[nn.Parameter], batch: Batch
) -> Callable[[], None]:
    """The fake network forward and back on both sides at once; on each side the generator forward and back, teacher and
    fake network forward and back to their input.
    """
    fake = FlatParameters(model.fake)
    optimizer = torch.optim.Adam([fake.vector], lr=1e-8, fused=True)
    fake.vector.grad = torch.full_like(fake.vector, 1e-8)
    start = torch.full_like(batch.timesteps, model.start)

    def passes() -> None:
        samples = [model.generator(draw.noise, start, draw.labels) for draw in batch.extra]
        both, labels = torch.cat(samples).detach(), torch.cat([draw.labels for draw in batch.extra])
        torch.autograd.grad(model.fake(both, start.repeat(2), labels), fake.parameters, both)
        optimizer.step()
        for x, draw in zip(samples, batch.extra, strict=True):
            judged = model.teacher(x, start, draw.teacher_labels) - model.fake(x, start, draw.labels)
            torch.autograd.grad(judged, parameters, draw.noise)

    return passes


def options_of(name: str) -> dict[str, Any]:
    """The settings of objective ``name``: a task's own, but for the rule that NegGrad and ReTrack refuse."""
    return {"objective": name} | ({"forget_grad_rule": "loss"} if name in ("neggrad", "retrack") else {})


def contestants(task: str, device: str) -> dict[str, Callable[[], Any]]:
    """Of every objective of the task's models, the bare update, one with every sample in every pass, and one as
    shipped, at λ = 0.5; and for those with one rule, as shipped, the update of SISS on their teacher's task.
    """
    functions: dict[str, Callable[[], Any]] = {}
    for name in names_of(task):
        whole = make_env(task, device, skip_zero_weights=False, **options_of(name))
        functions[f"{name} bare"] = bare_update(whole)
        functions[f"{name} whole"] = partial(whole.run.update, 0.5)
        functions[f"{name} shipped"] = partial(make_env(task, device, **options_of(name)).run.update, 0.5)
    if "siss shipped" not in functions:
        functions["siss shipped"] = partial(make_env(TEACHERS[task], device).run.update, 0.5)
    return functions


def names_of(task: str) -> list[str]:
    """The objectives of a task's models."""
    return list(OBJECTIVES[get_task(task).family.name])


def objectives(task: str, device: str, rounds: int) -> list[Figure]:
    """Each objective's update over its bare one and over that of SISS, in seconds of one thread."""
    names = names_of(task)
    with threads(1):
        turns = take_turns(contestants(task, device), rounds, device=device, clock=own_clock(device))
    overheads = {name: turns.ratio(f"{name} whole", f"{name} bare") for name in names}
    title = f"{task}, update / its passes and optimizer step alone, the dearest of {len(names)} objectives"
    figures = [Figure("10", title, max(overheads.values()), "×", 1.1)]
    of_siss = "siss" if "siss" in names else f"siss on {TEACHERS[task]}"
    for name, overhead in overheads.items():
        title = f"{task}, {name}: update / its passes and optimizer step alone, all samples in all passes"
        relative = turns.ratio(f"{name} shipped", "siss shipped")
        figures.append(Figure("10", title, overhead, "×"))
        figures.append(Figure("10", f"{task}, {name}: update / update of {of_siss}, both as shipped", relative, "×"))
    return figures
