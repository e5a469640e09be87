"""Every policy on the same seeds and batches, then every final model on the same evaluation."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import platform
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import joblib
import numpy as np
import torch
from torch import Tensor

import unlearn_gym
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import ResultsError, SettingsError
from unlearn_gym.evaluation.episode import policy_context, run_episode
from unlearn_gym.evaluation.metrics import EvaluationSettings, Evaluator
from unlearn_gym.models.weights import sha256
from unlearn_gym.policies import make_policy, policy_source
from unlearn_gym.tasks import get_task, load_data, to_model_range

UNTOUCHED, ORACLE, FINETUNE = "untouched", "oracle", "finetune"
REFERENCES = (UNTOUCHED, ORACLE)
DEFAULT_POLICIES = (
    "static:0.1", "static:0.5", "static:0.9", "prior", "random", "cosine",
    "variational:pathwise", "variational:score_function", "variational:kl_only", "variational:variance", "ppo",
)  # fmt: skip
FINETUNE_OPTIONS = {
    "lambda_min": 0.0, "lambda_init": 0.0, "forget_grad_rule": "relative_norm", "forget_grad_norm": 0.0,
}  # fmt: skip
"""λ = 0 and no forget gradient: plain training on retain data, the naive baseline."""

PICTURE_SAMPLES = 40


@dataclass(frozen=True)
class Comparison:
    """What is compared: JSON-able, and hashed to tell whether finished cells belong to it."""

    task: str = "mnist-trousers"
    policies: tuple[str, ...] = DEFAULT_POLICIES
    seeds: tuple[int, ...] = (0, 1, 2)
    options: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    data_root: str | None = None

    def __post_init__(self) -> None:
        for name, values in (("policies", self.policies), ("seeds", self.seeds)):
            if not values:
                raise ResultsError(f"{name} is empty; name at least one")
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ResultsError(f"{name} names {twice[0]!r} twice; each must be there once")

    def cell_key(self, policy: str) -> str:
        """Hash of all that a cell of ``policy`` depends on but its seed: cells with another key are not ours."""
        parts = {**asdict(self), "policies": None, "seeds": None, "version": unlearn_gym.__version__}
        assets = get_task(self.task).assets
        parts["weights"] = {p.name: sha256(p) for p in sorted(assets.glob("*.safetensors"))}
        source = policy_source(policy, self.task)
        parts["policy"] = None if source is None else sha256(source)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def cells(self) -> list[tuple[str, int]]:
        """(policy, seed) of every cell; the references do not depend on the seed."""
        return [(name, self.seeds[0]) for name in REFERENCES] + [
            (policy, seed) for seed in self.seeds for policy in self.policies
        ]

    def make_env(self, policy: str = "") -> SISSUnlearnEnv:
        """The environment that ``policy`` runs in."""
        extra = FINETUNE_OPTIONS if policy == FINETUNE else {}
        return SISSUnlearnEnv(self.task, data_root=self.data_root, **{**self.options, **extra})


def validate(comparison: Comparison) -> None:
    """Build every policy once and check the sample sizes, so that a bad name fails before anything runs."""
    comparison.evaluation.validate()
    context = policy_context(comparison.make_env())
    for policy in comparison.policies:
        if policy not in (FINETUNE, *REFERENCES):
            make_policy(policy, context)


def run_cell(comparison: Comparison, policy: str, seed: int, threads: int | None = None) -> dict[str, Any]:
    """One episode of ``policy`` at ``seed`` and the evaluation of the model it leaves."""
    if threads is not None:
        torch.set_num_threads(threads)
    task = get_task(comparison.task)
    data = load_data(task, comparison.data_root)
    cell: dict[str, Any] = {"policy": policy, "seed": seed, "key": comparison.cell_key(policy)}
    if policy in REFERENCES:
        model = task.pretrained_model() if policy == UNTOUCHED else task.oracle_model()
    else:
        env = comparison.make_env(policy)
        name = "static:0" if policy == FINETUNE else policy
        episode = run_episode(env, make_policy(name, policy_context(env)), seed)
        cell |= asdict(episode)
        model = env.run.model
    started = time.perf_counter()
    evaluator = Evaluator(task, data, comparison.evaluation)
    evaluation = evaluator.evaluate(model)
    cell["metrics"] = {} if cell.get("diverged") else evaluation.metrics
    cell["evaluation_seconds"] = time.perf_counter() - started
    if seed == comparison.seeds[0]:
        drawn = (evaluation.forget_samples, evaluation.quality_samples)
        cell["samples"] = [pack_samples(s) for s in drawn if s is not None]
    return finite_or_none(cell)


def pack_samples(samples: Tensor) -> dict[str, Any]:
    """The first samples as compressed bytes for a JSON file: 8 bits a pixel, or 16 a coordinate."""
    first = samples[:PICTURE_SAMPLES].numpy()
    array = ((first.clip(-1, 1) + 1) * 127.5).round().astype("uint8") if samples.dim() == 4 else first.astype("float16")
    data = base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "data": data}


def unpack_samples(packed: dict[str, Any]) -> Tensor:
    """Inverse of :func:`pack_samples`, up to its rounding."""
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    return to_model_range(torch.from_numpy(np.frombuffer(raw, packed["dtype"]).reshape(packed["shape"]).copy())).float()


def finite_or_none(value: Any) -> Any:
    """``value`` with every float that JSON does not know as None, and floats to 7 digits."""
    if isinstance(value, dict):
        return {k: finite_or_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def _cell_path(out: Path, policy: str, seed: int) -> Path:
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", policy).strip("-")
    digest = hashlib.sha256(policy.encode()).hexdigest()[:6]
    return out / "cells" / f"{slug}-{digest}-seed{seed}.json"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n")
    partial.replace(path)


def _finished(path: Path, key: str) -> dict[str, Any] | None:
    """The cell at ``path`` if it is whole and of this comparison."""
    try:
        cell: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return cell if cell.get("key") == key else None


def _store_cell(comparison: Comparison, out: Path, policy: str, seed: int, threads: int) -> dict[str, Any]:
    cell = run_cell(comparison, policy, seed, threads)
    write_json(_cell_path(out, policy, seed), cell)
    return cell


def run_comparison(
    comparison: Comparison,
    out: Path,
    *,
    jobs: int = 1,
    command: str = "",
    progress: Callable[[dict[str, Any] | None, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run every cell that ``out`` does not hold yet, in ``jobs`` processes, and write ``results.json``.

    Every finished cell is a file of its own, so an interrupted comparison continues where it stopped.
    ``progress(cell, done, total)`` is called for every cell, and first with None. Returns the results.
    """
    if jobs < 1:
        raise SettingsError(f"jobs={jobs} must be at least 1")
    validate(comparison)
    cells: list[tuple[str, int]] = comparison.cells()
    found: list[dict[str, Any]] = []
    open_cells = []
    if progress:
        progress(None, 0, len(cells))
    for policy, seed in cells:
        cell = _finished(_cell_path(out, policy, seed), comparison.cell_key(policy))
        if cell is None:
            open_cells.append((policy, seed))
        else:
            found.append(cell)
            if progress:
                progress(cell, len(found), len(cells))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    tasks = (joblib.delayed(_store_cell)(comparison, out, *cell, threads) for cell in open_cells)
    for cell in parallel(tasks):
        found.append(cell)
        _write_curves(out, cell)
        if progress:
            progress(cell, len(found), len(cells))
    order = {cell: i for i, cell in enumerate(cells)}
    found.sort(key=lambda cell: order[cell["policy"], cell["seed"]])
    results = {"comparison": asdict(comparison), **_provenance(comparison, command), "cells": found}
    write_json(out / "results.json", results)
    return results


def _write_curves(out: Path, cell: dict[str, Any]) -> None:
    """The cell's trace as TensorBoard scalars ``unlearn/*``."""
    from torch.utils.tensorboard import SummaryWriter

    if "trace" not in cell:
        return
    folder = out / "tensorboard" / _cell_path(out, cell["policy"], cell["seed"]).stem
    with SummaryWriter(str(folder)) as writer:
        for name, values in cell["trace"].items():
            for step, value in enumerate(values, start=1):
                if value is not None:
                    writer.add_scalar(f"unlearn/{name.rstrip('_')}", value, step)
        for name, value in cell["metrics"].items():
            writer.add_scalar(f"eval/{name}", value, len(cell["trace"]["lambda_"]))


def load_results(folder: Path) -> dict[str, Any]:
    """The ``results.json`` of a finished comparison; raises :class:`ResultsError` when there is none."""
    try:
        results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    except OSError:
        raise ResultsError(
            f"no results.json in {folder}; run 'unlearn-gym compare --out {folder}' to its end"
        ) from None
    except ValueError as error:
        raise ResultsError(f"{folder / 'results.json'} is damaged ({error}); run the comparison again") from None
    return results


def _provenance(comparison: Comparison, command: str) -> dict[str, Any]:
    """Where the figures come from: settings, versions, machine, and what the classifier says of real data."""
    env = comparison.make_env()
    data = load_data(env.task, comparison.data_root)
    evaluator = Evaluator(env.task, data, comparison.evaluation)
    return {
        "command": command,
        "settings": env.settings.model_dump(),
        "num_inference_steps": comparison.evaluation.num_inference_steps or env.task.num_inference_steps,
        "num_retain": len(data.retain), "num_forget": len(data.forget), "num_reference": len(data.heldout),
        "feature_dim": None if evaluator.reference is None else evaluator.reference.shape[1],
        "calibration": evaluator.calibration() if env.task.classify else {},
        "versions": {
            "unlearn_gym": unlearn_gym.__version__, "torch": torch.__version__,
            "gymnasium": gymnasium.__version__, "python": platform.python_version(),
        },
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
    }  # fmt: skip
