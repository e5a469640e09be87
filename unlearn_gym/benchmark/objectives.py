"""Item 10: an update of each objective against its own arithmetic, and against one of SISS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from unlearn_gym.benchmark.figures import Figure
from unlearn_gym.benchmark.step import make_env
from unlearn_gym.benchmark.timing import own_clock, take_turns, threads
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.models.flat import FlatParameters
from unlearn_gym.objectives.epsilon import EPSILON_OBJECTIVES, EpsilonObjective
from unlearn_gym.run import make_optimizer


def bare_update(env: SISSUnlearnEnv) -> Callable[[], None]:
    """The network's passes that an update of the environment's objective needs, one optimizer step, nothing else.

    A row of the mixture goes forward once and back twice, once for each gradient; one that is shown for its own
    side's sake alone goes forward and back once.
    """
    run, device = env.run, env.settings.device
    assert isinstance(run.objective, EpsilonObjective)
    model = env.task.pretrained_model().to(device).to(memory_format=torch.channels_last).eval()
    flat = FlatParameters(model)
    optimizer = make_optimizer(env.settings, [flat.vector])
    flat.vector.grad = torch.full_like(flat.vector, 1e-8)
    batch = run.draw(torch.Generator(device).manual_seed(0))
    sides = [(batch.retain, batch.retain_labels), (batch.forget, batch.forget_labels)]
    shown = sides if run.objective.rows == "both" else sides[:1]
    backward_passes = 2 if run.objective.rows == "mixture" else 1

    def update() -> None:
        for x, labels in shown:
            output = model(x, batch.timesteps, labels)
            for left in reversed(range(backward_passes)):
                torch.autograd.grad(output, flat.parameters, batch.noise, retain_graph=left > 0)
        optimizer.step()

    return update


def options_of(name: str) -> dict[str, Any]:
    """The settings of objective ``name``: a task's own, but for the rule that NegGrad refuses."""
    return {"objective": name} | ({"forget_grad_rule": "loss"} if name == "neggrad" else {})


def contestants(task: str, device: str) -> dict[str, Callable[[], Any]]:
    """Of every objective, the bare update, one with every sample in every pass, and one as shipped, at λ = 0.5."""
    functions: dict[str, Callable[[], Any]] = {}
    for name in EPSILON_OBJECTIVES:
        whole = make_env(task, device, skip_zero_weights=False, **options_of(name))
        functions[f"{name} bare"] = bare_update(whole)
        functions[f"{name} whole"] = partial(whole.run.update, 0.5)
        functions[f"{name} shipped"] = partial(make_env(task, device, **options_of(name)).run.update, 0.5)
    return functions


def objectives(task: str, device: str, rounds: int) -> list[Figure]:
    """Each objective's update over its bare one and over that of SISS, in seconds of one thread."""
    with threads(1):
        turns = take_turns(contestants(task, device), rounds, device=device, clock=own_clock(device))
    overheads = {name: turns.ratio(f"{name} whole", f"{name} bare") for name in EPSILON_OBJECTIVES}
    title = f"{task}, update / its passes and optimizer step alone, the dearest of {len(EPSILON_OBJECTIVES)} objectives"
    figures = [Figure("10", title, max(overheads.values()), "×", 1.1)]
    for name, overhead in overheads.items():
        title = f"{task}, {name}: update / its passes and optimizer step alone, all samples in all passes"
        relative = turns.ratio(f"{name} shipped", "siss shipped")
        figures.append(Figure("10", title, overhead, "×"))
        figures.append(Figure("10", f"{task}, {name}: update / update of siss, both as shipped", relative, "×"))
    return figures
