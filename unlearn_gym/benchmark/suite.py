"""The whole suite: items 1 to 11, their table, and the machine that they were measured on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import joblib
import torch
from pydantic import BaseModel, ConfigDict, StringConstraints

import unlearn_gym
from unlearn_gym.benchmark import evaluation, growth, objectives, observation, step, tried, vector
from unlearn_gym.benchmark.figures import Figure, markdown
from unlearn_gym.errors import ResultsError, SettingsError
from unlearn_gym.files import read_json, read_json_as, write_json, write_text
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.tasks import get_task

ITEMS = {
    "1": "overhead of a step over the bare passes",
    "2": "against the published loop",
    "3": "distance to the machine",
    "4": "many environments",
    "5": "training overhead",
    "6": "evaluation",
    "7": "reset and memory",
    "8": "growth",
    "9": "what was tried",
    "10": "objectives against their arithmetic and against SISS",
    "11": "groups of the extended observation",
}
QUICK_ITEMS = ("1", "2", "3", "4", "5", "6", "7")
FAST_TASK = "gaussians-2d"


class Item(BaseModel):
    """One item of ``bench.json``."""

    model_config = ConfigDict(strict=True)

    command: str
    seconds: float
    figures: list[Figure]


class Machine(BaseModel):
    """Where it was measured."""

    model_config = ConfigDict(strict=True)

    processor: str
    cores: int


class Bench(BaseModel):
    """What ``bench.json`` holds, as far as anything is read from it."""

    model_config = ConfigDict(strict=True)

    task: str
    device: str
    quick: bool
    machine: Machine
    versions: dict[str, str]
    items: dict[Annotated[str, StringConstraints(pattern=r"^\d+$")], Item]


Measured = tuple[list[Figure], dict[str, Any]]


def check_task(task: str) -> None:
    """Raise :class:`SettingsError` for a task whose model is no ε-network: most items are loops over such."""
    family = get_task(task).family.name
    if family != "diffusion":
        raise SettingsError(
            f"--task {task!r}: the benchmark is of diffusion models, and this task's is of the family {family}; "
            "its objectives are measured by item 10 of any other task"
        )


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
            counts = (2, 4) if quick else (1, 2, 4, 8)
            figures, raw = vector.many(task, device, counts, 2 if quick else 5, 32 if quick else 64)
            more, more_raw = vector.many(FAST_TASK, device, counts, 3 if quick else 11, 300 if quick else 1200)
            figures, raw = figures + more, raw | more_raw
        case "5":
            figures = vector.training(task, device, 1 if quick else 3)
            figures += vector.training(FAST_TASK, device, 2 if quick else 10)
        case "6":
            figures, raw = _evaluation(task, device, quick=quick)
        case "7":
            figures = step.reset(task, device, rounds) + vector.memory(task)
        case "8":
            figures, raw = growth.growth(task, device, 10, out)
        case "10":
            figures = objectives.objectives(task, device, rounds)
            figures += objectives.objectives(FAST_TASK, device, 10 * rounds)
            figures += objectives.objectives("vae-mnist-trousers", device, 2 * rounds)
            figures += objectives.objectives("sfd-mnist-digits", device, max(3, rounds // 2))
        case "11":
            figures = observation.groups(task, device, rounds) + observation.groups(FAST_TASK, device, 10 * rounds)
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
    """Measure ``items`` (default: all, or with ``quick`` 1 to 7 at small sizes); writes ``bench.json`` and ``.md``.

    Items that ``out`` holds already, measured on the same machine, versions and sizes, stay unless measured again.
    """
    chosen = items or (QUICK_ITEMS if quick else tuple(ITEMS))
    unknown = [item for item in chosen if item not in ITEMS]
    if unknown:
        raise SettingsError(
            f"unknown item {unknown[0]!r}; items are {', '.join(f'{k} ({v})' for k, v in ITEMS.items())}"
        )
    check_task(task)
    step.make_env(task, device)  # a bad task or device fails here, in one line
    with folder_lock(out):
        result = _begin(out, task, device, quick=quick, say=progress)
        return _measure(chosen, result, out, command, progress)


def _measure(
    chosen: tuple[str, ...], result: dict[str, Any], out: Path, command: str, progress: Callable[[str], None]
) -> list[Figure]:
    """Measure the ``chosen`` items into ``result``, which is written after each."""
    figures: list[Figure] = []
    for item in chosen:
        progress(f"{item}: {ITEMS[item]} ...")
        started = time.perf_counter()
        found, raw = measure_item(item, result["task"], result["device"], out, quick=result["quick"])
        figures += found
        result["items"][item] = {
            "command": command, "seconds": round(time.perf_counter() - started, 1),
            "figures": [figure.as_dict() for figure in found], "raw": raw,
        }  # fmt: skip
        write_json(out / "bench.json", result)
        write_text(out / "bench.md", report(result) + "\n")
    return figures


def _begin(out: Path, task: str, device: str, *, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """The result in ``out`` to be completed, if it is of the same machine, versions and sizes, or an empty one."""
    own = {"task": task, "device": device, "quick": quick, **_provenance(device)}
    try:
        stored = load(out) if (out / "bench.json").exists() else {}
    except ResultsError as error:
        say(str(error))
        stored = {}
    if {key: stored.get(key) for key in own} == own:
        return stored
    return {**own, "items": {}}


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
    """What :func:`run_suite` wrote to ``folder``; raises :class:`ResultsError` where that is damaged."""
    path = folder / "bench.json"
    read_json_as(path, Bench, ResultsError, "the items in it are to be measured again")
    result: dict[str, Any] = read_json(path)
    return result


def _in_order(items: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(items.items(), key=lambda item: int(item[0]))


def figures_of(result: dict[str, Any]) -> list[Figure]:
    """The figures of a stored result, item by item."""
    stored = [row for _, item in _in_order(result["items"]) for row in item["figures"]]
    return [Figure(**{k: v for k, v in row.items() if k != "verdict"}) for row in stored]


def goals_table(result: dict[str, Any]) -> str:
    """The figures that have a goal, as Markdown: the README's table."""
    return markdown([figure for figure in figures_of(result) if figure.goal is not None])


def report(result: dict[str, Any]) -> str:
    """The suite's results as Markdown: where and how they were measured, and the table."""
    machine, versions, items = result["machine"], result["versions"], _in_order(result["items"])
    commands = {item["command"]: [k for k, v in items if v["command"] == item["command"]] for _, item in items}
    made = "; ".join(f"items {', '.join(keys)} by `{command}`" for command, keys in commands.items())
    minutes = sum(item["seconds"] for _, item in items) / 60
    return (
        f"{machine['processor']}, {machine['cores']} cores, torch {versions['torch']}, device {result['device']}, "
        f"{minutes:.0f} minutes: {made}.\n\n"
        "Times are medians over rounds in which everything that is compared ran in turn; a ratio is the median of the "
        "rounds' own ratios, so it is not exactly the quotient of two medians. On a CPU, items 10 and 11 count what "
        "one thread computed, whoever shared the machine.\n\n"
        f"{markdown(figures_of(result))}"
    )
