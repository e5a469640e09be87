"""Item 6: what an evaluation costs, and how many sampler steps change no ranking."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from unlearn_gym.benchmark.figures import Figure
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.metrics.evaluator import Evaluator
from unlearn_gym.metrics.judge import EvaluationSettings, Judge, judged_reference
from unlearn_gym.metrics.probe import set_losses
from unlearn_gym.metrics.quality import fid, kid
from unlearn_gym.tasks import Task, get_task, load_data

RUN_UPDATES = 60
TIE = 0.05
"""Two models tie in a metric where they differ by less than this share of its spread between all of them."""


def cost(task: str, device: str, sizes: tuple[int, ...]) -> list[Figure]:
    """Seconds for ``sizes`` samples, judged as they come, for each metric on the last of them, and for all together."""
    chosen = get_task(task)
    data = load_data(chosen)
    model = chosen.pretrained_model().to(device).to(memory_format=torch.channels_last).eval()
    figures = []
    for n in sizes:
        judge = Judge(chosen, data, EvaluationSettings(num_quality_samples=n))
        started = time.perf_counter()
        judged = judge.draw(model, judge.quality_labels(), n, seed=0)
        figures.append(Figure("6", f"{n:,} samples with features", time.perf_counter() - started, "s"))
    reference = judged_reference(chosen, data).features
    metrics = {
        f"FID of {sizes[-1]:,} samples": lambda: fid(judged.features, reference),
        f"KID of {sizes[-1]:,} samples": lambda: kid(judged.features, reference),
        "both losses, 300 samples of each set at 10 timesteps": lambda: set_losses(model, data, judge.alphas_cumprod),
    }
    for name, compute in metrics.items():
        started = time.perf_counter()
        compute()
        figures.append(Figure("6", name, time.perf_counter() - started, "s"))
    fresh = Evaluator(chosen, data)  # with the oracle's samples, as the first evaluation of a comparison has it
    title = "default metrics of one model (2,000 samples, 1,000 more of the oracle)"
    started = time.perf_counter()
    fresh.evaluate(model)
    figures.append(Figure("6", title, time.perf_counter() - started, "s", 60.0))
    return figures


def final_model(task: Task, name: str) -> nn.Module:
    """``untouched``, ``oracle``, or what 60 updates at a ``static:λ`` leave."""
    if name in ("untouched", "oracle"):
        return task.pretrained_model() if name == "untouched" else task.oracle_model()
    env = SISSUnlearnEnv(task.name, horizon=RUN_UPDATES)
    env.reset(seed=0)
    for _ in range(RUN_UPDATES):
        env.step(float(name.removeprefix("static:")))
    return env.run.model


def sampler_steps(
    task: str, device: str, steps: tuple[int, ...], num_samples: int, names: tuple[str, ...]
) -> tuple[list[Figure], dict[str, Any]]:
    """KID and forget rate of several models at each number of steps, from the same noise.

    The figures compare KID and FID at each number with those at the last and largest. Returns also every value.
    """
    chosen = get_task(task)
    data, models = load_data(chosen), {name: final_model(chosen, name) for name in names}
    table: dict[int, dict[str, dict[str, float]]] = {}
    for n in steps:
        evaluator = Evaluator(chosen, data, EvaluationSettings(num_samples, num_samples, num_inference_steps=n))
        table[n] = {name: _judge(evaluator, model.to(device)) for name, model in models.items()}
    return sampler_figures(table, chosen.num_inference_steps), {str(n): row for n, row in table.items()}


def sampler_figures(table: Mapping[int, dict[str, dict[str, float]]], shipped: int) -> list[Figure]:
    """For KID and FID: how far each is from that at the most steps, and how many pairs of models swap places."""
    most, figures = max(table), []
    for n, metric in itertools.product(sorted(table)[:-1], ("feature_kid", "feature_fid")):
        found, finest = ({name: row[metric] for name, row in table[k].items()} for k in (n, most))
        spread = max(finest.values()) - min(finest.values())
        error = max(abs(found[name] - finest[name]) for name in found) / spread
        pairs = [p for p in itertools.combinations(found, 2) if abs(finest[p[0]] - finest[p[1]]) > TIE * spread]
        swapped = sum((found[a] < found[b]) != (finest[a] < finest[b]) for a, b in pairs)
        name = metric.removeprefix("feature_").upper()
        title = f"{name} at {n} steps{' (shipped)' if n == shipped else ''} and at {most}"
        swaps = f"{title}: of {len(pairs)} pairs of models without a tie, swap places"
        figures += [
            Figure("6", f"{title}: largest difference / spread between models", error, "×"),
            Figure("6", swaps, float(swapped), "", 0.0 if n == shipped else None),
        ]
    return figures


def _judge(evaluator: Evaluator, model: nn.Module) -> dict[str, float]:
    metrics = evaluator.evaluate(model).metrics
    return {
        name: metrics[name]
        for name in ("feature_kid", "feature_fid", "forget_rate", "class_accuracy")
        if name in metrics
    }
