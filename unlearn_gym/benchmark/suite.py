"""The whole suite: items 1 to 9, their table, and the machine that they were measured on."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import torch

import unlearn_gym
from unlearn_gym.benchmark import evaluation, growth, step, tried, vector
from unlearn_gym.benchmark.figures import Figure, markdown
from unlearn_gym.errors import SettingsError
from unlearn_gym.files import write_json

ITEMS = {
    "1": "overhead of a step over the bare passes",
    "2": "against the loop of the field",
    "3": "distance to the machine",
    "4": "many environments",
    "5": "training overhead",
    "6": "evaluation",
    "7": "reset and memory",
    "8": "growth",
    "9": "what was tried",
}
QUICK_ITEMS = ("1", "2", "3", "4", "5", "6", "7")
FAST_TASK = "gaussians-2d"

Measured = tuple[list[Figure], dict[str, Any]]


def measure_item(item: str, task: str, device: str, out: Path, *, quick: bool) -> Measured:
    """The figures of one item, and raw values where there are more of them."""
    rounds = 12 if quick else 40
    raw: dict[str, Any] = {}
    match item:
        case "1":
            figures = step.overhead(task, device, rounds)
        case "2":
            figures = step.field_loop(task, device, 5 if quick else 15)
        case "3":
            figures = step.machine(task, device, 5 if quick else 20)
        case "4":
            counts, turns = ((2, 4), 2) if quick else ((1, 2, 4, 8), 5)
            figures = vector.many(task, device, counts, turns, 32 if quick else 64)
            figures += vector.many(FAST_TASK, device, counts, turns, 400 if quick else 1600)
        case "5":
            figures = vector.training(task, device, 1 if quick else 3)
            figures += vector.training(FAST_TASK, device, 2 if quick else 10)
        case "6":
            figures, raw = _evaluation(task, device, quick=quick)
        case "7":
            figures = step.reset(task, device, rounds) + vector.memory(task)
        case "8":
            figures, raw = growth.growth(task, device, 10, out)
        case _:
            figures = tried.network_variants(task, device, rounds) + tried.optimizer_variants(task, device, rounds)
            figures += tried.backends(task, device, 3, 4) + tried.backends(FAST_TASK, device, 5, 100)
    return figures, raw


def _evaluation(task: str, device: str, *, quick: bool) -> Measured:
    if quick:
        figures, raw = evaluation.sampler_steps(task, device, (20, 40), 300, ("untouched", "static:0.9"))
        return evaluation.cost(task, device, (500,)) + figures, raw
    names = ("untouched", "oracle", "static:0.1", "static:0.5", "static:0.9")
    figures, raw = evaluation.sampler_steps(task, device, (5, 10, 15, 20, 30, 50), 1000, names)
    return evaluation.cost(task, device, (2000, 10_000)) + figures, raw


def processor(device: str) -> str:
    """The name of the device in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def run_suite(
    task: str, out: Path, *, items: tuple[str, ...] = (), device: str = "cpu", quick: bool = False,
    command: str = "", progress: Callable[[str], None] = print,
) -> list[Figure]:  # fmt: skip
    """Measure ``items`` (default: all, or with ``quick`` 1 to 7 at small sizes); writes ``bench.json`` and ``.md``."""
    chosen = items or (QUICK_ITEMS if quick else tuple(ITEMS))
    unknown = [item for item in chosen if item not in ITEMS]
    if unknown:
        raise SettingsError(
            f"unknown item {unknown[0]!r}; items are {', '.join(f'{k} ({v})' for k, v in ITEMS.items())}"
        )
    step.make_env(task, device)  # a bad task or device fails here, in one line
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "command": command, "task": task, "device": device, "quick": quick, **_provenance(device),
        "seconds": {}, "figures": [], "raw": {},
    }  # fmt: skip
    figures: list[Figure] = []
    for item in chosen:
        progress(f"{item}: {ITEMS[item]} ...")
        started = time.perf_counter()
        found, raw = measure_item(item, task, device, out, quick=quick)
        figures += found
        result["seconds"][item] = round(time.perf_counter() - started, 1)
        result["figures"] += [figure.as_dict() for figure in found]
        result["raw"] |= {item: raw} if raw else {}
        write_json(out / "bench.json", result)
        (out / "bench.md").write_text(report(result) + "\n")
    return figures


def _provenance(device: str) -> dict[str, Any]:
    packages = ("torch", "gymnasium", "stable-baselines3", "numpy")
    return {
        "machine": {"processor": processor(device), "cores": joblib.cpu_count(), "system": platform.platform()},
        "versions": {
            "unlearn_gym": unlearn_gym.__version__, "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }  # fmt: skip


def load(folder: Path) -> dict[str, Any]:
    """What :func:`run_suite` wrote to ``folder``."""
    result: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    return result


def figures_of(result: dict[str, Any]) -> list[Figure]:
    """The figures of a stored result."""
    return [Figure(**{k: v for k, v in figure.items() if k != "verdict"}) for figure in result["figures"]]


def goals_table(result: dict[str, Any]) -> str:
    """The figures that have a goal, as Markdown: the README's table."""
    return markdown([figure for figure in figures_of(result) if figure.goal is not None])


def report(result: dict[str, Any]) -> str:
    """The suite's results as Markdown: where they were measured, and the table."""
    machine, versions = result["machine"], result["versions"]
    minutes, table = sum(result["seconds"].values()) / 60, markdown(figures_of(result))
    return (
        f"`{result['command']}`: {machine['processor']}, {machine['cores']} cores, torch {versions['torch']}, "
        f"device {result['device']}, {minutes:.0f} minutes.\n\n{table}"
    )
