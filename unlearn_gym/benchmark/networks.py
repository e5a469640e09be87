"""What candidate networks for CIFAR-10 cost: a table to choose by where there is nothing to measure quality on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unlearn_gym.benchmark.timing import take_turns
from unlearn_gym.making.pretraining import Pretraining, PretrainSettings, training_samples
from unlearn_gym.models import UNetConfig
from unlearn_gym.run import UnlearningRun
from unlearn_gym.tasks import TaskData, get_task
from unlearn_gym.tasks.cifar import NETWORK

CANDIDATES = {
    "48-96-b1": NETWORK.model_copy(update={"channels": (48, 96)}),
    "64-128-b1": NETWORK.model_copy(update={"channels": (64, 128)}),
    "96-192-b1": NETWORK.model_copy(update={"channels": (96, 192)}),
    "64-128-256-b1": NETWORK,
}
"""By channels at 16×16, 8×8 and 4×4, and residual blocks a level; the first is the MNIST tasks' size."""
COLUMNS = ("network", "parameters", "unlearning update", "pretraining update")


def network_costs(candidates: Mapping[str, UNetConfig] = CANDIDATES, *, rounds: int = 9) -> str:
    """Markdown: each candidate's parameters, and median milliseconds of an unlearning and of a pretraining update at
    the default batch sizes, with the median ratio to the first candidate's in the same round.

    The images are noise and the weights those of a network that was never trained: what a pass costs depends on
    neither, where every sample takes part in every pass.
    """
    task, data = get_task("cifar10"), _noise()
    settings = task.settings.override(skip_zero_weights=False)
    samples = training_samples(data, retain_only=False)
    updates: dict[str, Callable[[], Any]] = {}
    for name, network in candidates.items():
        candidate = dataclasses.replace(task, network=network)
        run = UnlearningRun(candidate.build_model(), data, task.schedule.alphas_cumprod(), settings)
        updates[f"{name} unlearning"] = partial(run.update, 0.5)
        updates[f"{name} pretraining"] = Pretraining(candidate, *samples, PretrainSettings()).update
    turns = take_turns(updates, rounds, warmup=1)
    first = next(iter(candidates))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name, network in candidates.items():
        parameters = sum(p.numel() for p in dataclasses.replace(task, network=network).build_model().parameters())
        times = [
            f"{1e3 * turns.median(f'{name} {kind}'):.0f} ms, {turns.ratio(f'{name} {kind}', f'{first} {kind}'):.2f} ×"
            for kind in ("unlearning", "pretraining")
        ]
        lines.append(f"| {name} | {parameters:,} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def _noise(num_images: int = 64) -> TaskData:
    """Images ``(num_images, 3, 32, 32)`` of noise in every set."""
    generator = torch.Generator().manual_seed(0)

    def images() -> Tensor:
        return torch.randint(256, (num_images, 3, 32, 32), generator=generator, dtype=torch.uint8)

    zeros, ones = (torch.full((num_images,), label) for label in (0, 1))
    return TaskData(images(), images(), images(), retain_labels=ones, forget_labels=zeros, heldout_labels=ones)
