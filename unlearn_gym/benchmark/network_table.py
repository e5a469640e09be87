"""Choose the network by measurement: sample quality against the cost of a step, for a few candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unlearn_gym.benchmark.timing import take_turns
from unlearn_gym.files import write_json, write_text
from unlearn_gym.making.pretraining import PretrainSettings, pretrain
from unlearn_gym.metrics.evaluator import Evaluator
from unlearn_gym.metrics.judge import EvaluationSettings
from unlearn_gym.models import UNetConfig, build_network
from unlearn_gym.models.weights import load_weights
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.tasks import TaskData, get_task

CANDIDATES = {
    "24-48-b2": UNetConfig(channels=(24, 48), num_blocks=2, num_classes=10),
    "32-64-b1": UNetConfig(channels=(32, 64), num_blocks=1, num_classes=10),
    "32-64-b2": UNetConfig(channels=(32, 64), num_blocks=2, num_classes=10),
    "32-64-b2-no-attention": UNetConfig(channels=(32, 64), num_blocks=2, attention=False, num_classes=10),
    "24-96-b1": UNetConfig(channels=(24, 96), num_blocks=1, num_classes=10),
    "48-96-b1": UNetConfig(channels=(48, 96), num_blocks=1, num_classes=10),
    "32-128-b1": UNetConfig(channels=(32, 128), num_blocks=1, num_classes=10),
    "32-96-b2": UNetConfig(channels=(32, 96), num_blocks=2, num_classes=10),
}
TRAINING = PretrainSettings(updates=1500, batch_size=64)
EVALUATION = EvaluationSettings(num_forget_samples=500, num_quality_samples=500)
STEP_BATCH = 16


def bare_step(model: nn.Module) -> None:
    """One forward and two backward passes at the environment's batch size."""
    x = torch.zeros(STEP_BATCH, 1, 28, 28)
    index = torch.zeros(STEP_BATCH, dtype=torch.int64)
    out = model(x, index, index)
    torch.autograd.backward(out, x, retain_graph=True)
    torch.autograd.backward(out, x)


def step_milliseconds(models: dict[str, nn.Module], rounds: int = 15) -> dict[str, float]:
    """Median time of a bare step of each model, taken in turns so that a slow moment hits all alike."""
    turns = take_turns({name: partial(bare_step, model) for name, model in models.items()}, rounds)
    return {name: 1e3 * turns.median(name) for name in models}


def network_table(data: TaskData, out: Path, *, command: str, report: Callable[[str], None] = print) -> Path:
    """Train every candidate briefly (resumable), measure, and write ``networks.json`` and ``networks.md``."""
    with folder_lock(out):
        return _network_table(data, out, command, report)


def _network_table(data: TaskData, out: Path, command: str, report: Callable[[str], None]) -> Path:
    task = get_task("mnist-trousers")
    rows: list[dict[str, Any]] = []
    models: dict[str, nn.Module] = {}
    for name, config in CANDIDATES.items():
        candidate = dataclasses.replace(task, network=config)
        manifest = pretrain(candidate, data, TRAINING, out / name, command=command)
        model = build_network(config).to(memory_format=torch.channels_last)
        load_weights(model, out / name / "pretrained.safetensors")
        figures = Evaluator(candidate, data, EVALUATION).evaluate(model).metrics
        rows.append({"network": name, "parameters": manifest["num_parameters"], **figures})
        models[name] = model
        report(f"{name}: {figures}")
    milliseconds = step_milliseconds(models)
    for row in rows:
        row["step_ms"] = milliseconds[row["network"]]
        row["step_ratio"] = row["step_ms"] / milliseconds["32-64-b2"]
    result = {
        "command": command, "threads": torch.get_num_threads(), "training": TRAINING.model_dump(),
        "evaluation": dataclasses.asdict(EVALUATION), "rows": rows,
    }  # fmt: skip
    write_json(out / "networks.json", result)
    path = out / "networks.md"
    write_text(path, _markdown(result))
    return path


def _markdown(result: dict[str, Any]) -> str:
    columns = {
        "network": "{}", "parameters": "{:,}", "step_ratio": "{:.2f}", "retain_loss": "{:.4f}", "forget_loss": "{:.4f}",
        "feature_fid": "{:.2f}", "feature_kid": "{:.4f}", "class_accuracy": "{:.3f}", "forget_rate": "{:.3f}",
    }  # fmt: skip
    lines = [
        "# Choice of the network",
        "",
        f"Made by `{result['command']}`: {result['training']['updates']} updates at batch "
        f"{result['training']['batch_size']} for each candidate, {result['threads']} thread(s); channels at 14×14 and "
        "7×7, b = residual blocks a level. `step_ratio` is the time of one forward and two backward passes at batch "
        f"{STEP_BATCH} over that of 32-64-b2, taken in turns. FID and KID are on the shipped classifier's features, "
        "against held-out digits; `forget_rate` is the share of garments "
        "among 500 samples labelled 1 (trousers are 9.1 % of the data).",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    lines += ["| " + " | ".join(f.format(row[c]) for c, f in columns.items()) + " |" for row in result["rows"]]
    return "\n".join(lines) + "\n"
