"""Every policy on the same seeds and batches, then every final model on the same evaluation."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import torch

import unlearn_gym
from unlearn_gym.errors import PolicyError, ResultsError, SettingsError, UnlearnGymError
from unlearn_gym.evaluation.cell import FINETUNE, REFERENCES, make_cell_env, run_cell, write_curves
from unlearn_gym.evaluation.episode import policy_context
from unlearn_gym.evaluation.metrics import EvaluationSettings, Evaluator
from unlearn_gym.files import sha256, write_json
from unlearn_gym.models.classifier import CLASSIFIER_WEIGHTS
from unlearn_gym.policies import make_policy, policy_source
from unlearn_gym.tasks import Task, get_task, load_data, register_task, task_names

DEFAULT_POLICIES = (
    FINETUNE, "static:0.1", "static:0.5", "static:0.9", "prior", "random", "cosine",
    "variational:pathwise", "variational:score_function", "variational:kl_only", "variational:variance",
    "ppo", "ppo-potential",
)  # fmt: skip

CellProgress = Callable[[dict[str, Any] | None, int, int], None]


def default_policies(task: str) -> tuple[str, ...]:
    """``DEFAULT_POLICIES`` less the agents that do not ship for ``task``."""
    sources = {policy: policy_source(policy, task) for policy in DEFAULT_POLICIES}
    return tuple(policy for policy, source in sources.items() if source is None or source.is_file())


@dataclass(frozen=True)
class Comparison:
    """What is compared. ``options`` are run settings other than the task's own."""

    task: str
    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    data_root: str | None = None

    def validate(self) -> None:
        """Raise what any cell would raise, before anything runs."""
        for name, values in (("policies", self.policies), ("seeds", self.seeds)):
            if not values:
                raise ResultsError(f"{name} is empty; name at least one")
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ResultsError(f"{name} names {twice[0]!r} twice; each must be there once")
        if min(self.seeds) < 0:
            raise ResultsError(f"seed {min(self.seeds)} is negative; seeds begin at 0")
        self.evaluation.validate()
        get_task(self.task).settings.override(**self.options)
        for policy in self.policies:
            if policy in REFERENCES:
                raise PolicyError(f"{policy!r} is in every comparison already; leave it out of the policies")
            if policy != FINETUNE:
                self._try_policy(policy)

    def _try_policy(self, policy: str) -> None:
        """Ask the policy once, so that one that cannot answer fails here."""
        env = make_cell_env(self.task, policy, self.options, self.data_root)
        chooser = make_policy(policy, policy_context(env))
        chooser.reset(0)
        try:
            action = chooser.act(*env.reset(seed=0))
            env.step(action)
        except UnlearnGymError as error:
            raise PolicyError(f"policy {policy!r}: {error}") from None
        except Exception as error:
            raise PolicyError(f"policy {policy!r} fails when asked for λ: {type(error).__name__}: {error}") from error

    def cell_keys(self) -> dict[str, str]:
        """For each row a hash of all that its cells depend on but their seed: cells with another are not ours."""
        task = get_task(self.task)
        settings = task.settings.override(**self.options)
        files = [*task.assets.glob("*.safetensors"), *task.assets.glob("*.npz"), *task.assets.glob("constants.json")]
        common: dict[str, Any] = {
            "evaluation": asdict(self.evaluation), "data_root": self.data_root, "settings": settings.model_dump(),
            "versions": [unlearn_gym.__version__, torch.__version__], "schedule": task.schedule.model_dump(),
            "forget_classes": task.forget_classes, "num_inference_steps": task.num_inference_steps,
            "files": {path.name: sha256(path) for path in sorted([*files, CLASSIFIER_WEIGHTS])},
        }  # fmt: skip
        keys = {}
        for policy in (*REFERENCES, *self.policies):
            source = policy_source(policy, self.task)
            own = {**common, "source": None if source is None else sha256(source)}
            keys[policy] = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return keys

    def cells(self) -> list[tuple[str, int]]:
        """(policy, seed) of every cell; the references do not depend on the seed."""
        return [(name, 0) for name in REFERENCES] + [(p, seed) for seed in self.seeds for p in self.policies]


def run_comparison(
    comparison: Comparison, out: Path, *, jobs: int = 1, command: str = "", progress: CellProgress | None = None
) -> dict[str, Any]:
    """Run every cell that ``out`` does not hold yet, in ``jobs`` processes, and write ``results.json``.

    Every finished cell is a file of its own, so an interrupted comparison continues where it stopped.
    ``progress(cell, done, total)`` is called for every cell, and first with None. Returns the results.
    """
    if jobs < 1:
        raise SettingsError(f"jobs={jobs} must be at least 1")
    comparison.validate()
    (out / "cells").mkdir(parents=True, exist_ok=True)
    cells, keys = comparison.cells(), comparison.cell_keys()
    report = progress or (lambda cell, done, total: None)
    report(None, 0, len(cells))
    stored = {cell: _read_cell(_cell_path(out, *cell), keys[cell[0]]) for cell in cells}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for name, cell in stored.items():
        if cell is not None:
            found[name] = cell
            report(cell, len(found), len(cells))
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    task = get_task(comparison.task)
    open_cells = [cell for cell in cells if cell not in found]
    for cell in parallel(
        joblib.delayed(_store_cell)(task, comparison, out, *cell, keys[cell[0]], threads) for cell in open_cells
    ):
        found[cell["policy"], cell["seed"]] = cell
        report(cell, len(found), len(cells))
    results = {
        "comparison": asdict(comparison), **_provenance(comparison, command), "cells": [found[cell] for cell in cells]
    }  # fmt: skip
    write_json(out / "results.json", results, indent=None)
    return results


def _store_cell(
    task: Task, comparison: Comparison, out: Path, policy: str, seed: int, key: str, threads: int | None
) -> dict[str, Any]:
    """Run a cell and write it, perhaps in a process that knows no task of the user's yet."""
    if threads is not None:
        torch.set_num_threads(threads)
    if task.name not in task_names():
        register_task(task)
    c = comparison
    cell = run_cell(task, policy, seed, c.options, c.evaluation, c.data_root, keep_samples=seed in (0, c.seeds[0]))
    cell["key"] = key
    path = _cell_path(out, policy, seed)
    write_curves(out / "tensorboard" / path.stem, cell)
    write_json(path, cell, indent=None)
    return cell


def _cell_path(out: Path, policy: str, seed: int) -> Path:
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", policy).strip("-")
    digest = hashlib.sha256(policy.encode()).hexdigest()[:6]
    return out / "cells" / f"{slug}-{digest}-seed{seed}.json"


def _read_cell(path: Path, key: str) -> dict[str, Any] | None:
    """The cell at ``path`` if it is whole and of this comparison."""
    try:
        cell: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return cell if cell.get("key") == key else None


def load_results(folder: Path) -> dict[str, Any]:
    """The ``results.json`` of a finished comparison; raises :class:`ResultsError` when there is none."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
    except OSError:
        raise ResultsError(f"no results.json in {folder}; finish 'unlearn-gym compare --out {folder}'") from None
    except ValueError as error:
        raise ResultsError(f"{path} is damaged ({error}); run the comparison again") from None
    missing = RESULT_KEYS - results.keys() if isinstance(results, dict) else RESULT_KEYS
    if missing:
        raise ResultsError(f"{path} lacks {sorted(missing)[0]!r}; run the comparison again")
    return dict(results)


RESULT_KEYS = {"comparison", "settings", "calibration", "versions", "cells", "command"}


def _provenance(comparison: Comparison, command: str) -> dict[str, Any]:
    """Where the figures come from: settings, versions, machine, and what the classifier says of real data."""
    task = get_task(comparison.task)
    data = load_data(task, comparison.data_root)
    evaluator = Evaluator(task, data, comparison.evaluation)
    packages = ("torch", "gymnasium", "stable-baselines3", "torch-fidelity", "numpy")
    return {
        "command": command,
        "settings": task.settings.override(**comparison.options).model_dump(),
        "num_inference_steps": comparison.evaluation.num_inference_steps or task.num_inference_steps,
        "num_retain": len(data.retain), "num_forget": len(data.forget), "num_reference": len(data.heldout),
        "feature_dim": None if evaluator.reference is None else evaluator.reference.shape[1],
        "calibration": evaluator.calibration() if task.classify else {},
        "versions": {
            "unlearn_gym": unlearn_gym.__version__, "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
    }  # fmt: skip
