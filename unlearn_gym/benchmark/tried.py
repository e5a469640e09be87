"""What might make a step faster: measured, so that what does not pay stays out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from unlearn_gym.benchmark.figures import Figure
from unlearn_gym.benchmark.step import make_env, passes, stepping
from unlearn_gym.benchmark.timing import repeated, take_turns
from unlearn_gym.benchmark.vector import make_ours
from unlearn_gym.errors import error_line


def network_variants(task: str, device: str, rounds: int) -> list[Figure]:
    """The bare passes as they are over those compiled, under bfloat16 autocast, and in torch's own layout."""
    env = make_env(task, device)
    batch = env.run.draw(torch.Generator(device).manual_seed(0))
    plain = env.task.pretrained_model().to(device).to(memory_format=torch.channels_last)
    contiguous = env.task.pretrained_model().to(device)
    kind = torch.device(device).type

    def autocast(*inputs: Any) -> Any:
        with torch.autocast(kind, dtype=torch.bfloat16):
            return plain(*inputs).float()

    weights = list(plain.parameters())
    functions = {
        "plain": passes(plain, weights, batch),
        "bfloat16 autocast": passes(autocast, weights, batch),
        "contiguous instead of channels_last": passes(contiguous, list(contiguous.parameters()), batch),
    }
    figures = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = passes(torch.compile(plain), weights, batch)
            compiled()
        functions["torch.compile"] = compiled
    except Exception as error:  # a machine without a compiler: nothing to compare
        figures.append(Figure("9", f"torch.compile failed: {error_line(error)}", None))
    turns = take_turns(functions, rounds, device=device)
    names = [name for name in functions if name != "plain"]
    return [*figures, *(Figure("9", f"passes as shipped / {name}", turns.ratio("plain", name), "×") for name in names)]


def optimizer_variants(task: str, device: str, rounds: int) -> list[Figure]:
    """One fused optimizer call on the flat vector against torch's ways over single parameters."""
    env = make_env(task, device)
    flat = env.run.flat

    def stepper(parameters: list[nn.Parameter], **options: Any) -> Callable[[], Any]:
        own = [nn.Parameter(p.detach().clone()) for p in parameters]
        for p in own:
            p.grad = torch.full_like(p, 1e-3)
        return torch.optim.AdamW(own, lr=1e-6, **options).step

    single = [p for p in flat.parameters if isinstance(p, nn.Parameter)]
    functions = {
        "flat": stepper([flat.vector], fused=True),
        "fused over parameters": stepper(single, fused=True),
        "foreach over parameters": stepper(single, foreach=True),
        "loop over parameters": stepper(single, foreach=False),
        "env.step": stepping(env),
    }
    turns = take_turns(functions, rounds, device=device)
    names = [name for name in functions if name not in ("flat", "env.step")]
    return [
        *(Figure("9", f"optimizer, {name} / fused on one vector", turns.ratio(name, "flat"), "×") for name in names),
        Figure("9", "optimizer, fused on one vector / env.step", turns.ratio("flat", "env.step"), "×"),
    ]


def backends(task: str, device: str, rounds: int, steps: int, num_envs: int = 8) -> list[Figure]:
    """Steps a second of the vector environment's backends, by turns."""
    envs = {name: make_ours(task, device, num_envs, backend=name) for name in ("processes", "stacked", "serial")}
    actions, functions = np.full((num_envs, 1), 0.5, dtype=np.float32), {}
    for name, env in envs.items():
        env.reset(seed=0)
        functions[name] = repeated(lambda env=env: env.step(actions), steps)  # type: ignore[misc]
    turns = take_turns(functions, rounds, device=device, warmup=1)
    for env in envs.values():
        env.close()
    rates = {name: num_envs * steps / turns.median(name) for name in envs}
    return [Figure("9", f"{task}, {num_envs} envs, backend {name}", rate, "steps/s") for name, rate in rates.items()]
