"""Every policy on the same seeds and batches, then every final model on the same evaluation."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import unlearn_gym
from unlearn_gym.comparison.cell import evaluator, make_cell_env, run_cell, write_curves
from unlearn_gym.comparison.engines import run_calls
from unlearn_gym.comparison.records import FINETUNE, REFERENCES, UNTOUCHED, read_cells, with_checksum, write_results
from unlearn_gym.comparison.results import CELL_FORMAT, Results
from unlearn_gym.comparison.store import CellStore
from unlearn_gym.errors import PolicyError, ResultsError, SettingsError, TaskError, shown
from unlearn_gym.files import sha256
from unlearn_gym.metrics.judge import EvaluationSettings, Judge
from unlearn_gym.models.classifier import CLASSIFIER_WEIGHTS
from unlearn_gym.policies import existing_sources, make_policy, policy_sources, split_name
from unlearn_gym.policies.episode import policy_context, run_episode
from unlearn_gym.policies.manifest import read_manifest
from unlearn_gym.settings import LAMBDA_ROLES, RunSettings
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.tasks import Task, get_task, load_data, register_task, resolve_data_root, task_names

DEFAULT_POLICIES = (
    FINETUNE, "static:0.1", "static:0.5", "static:0.9", "prior", "random", "cosine",
    "variational:pathwise", "variational:score_function", "variational:kl_only", "variational:variance",
    "ppo", "ppo-potential",
)  # fmt: skip

MOST_SEEDS = 10_000
"""Each is a run of every policy and a file; a hundred give intervals that no reader tells from narrower ones."""
MIXTURE_ONLY = "variational:variance"
"""Moments of a gradient under other λ: for objectives that draw from a mixture."""
KEY_FILES = ("*.safetensors", "constants.json")
"""What a task's cells depend on, of the files beside its weights; the data counts by its content."""
EXTRAS = ("torchdiffeq", "torchmetrics")
"""Optional packages without which metrics are absent."""

CellProgress = Callable[[dict[str, Any] | None, int, int], None]


def default_policies(task: str, objective: str = "siss") -> tuple[str, ...]:
    """``DEFAULT_POLICIES`` less the agents that do not ship for ``task``, and less those that the ``objective`` has no
    use for.
    """
    shipped = (p for p in DEFAULT_POLICIES if all(path.is_file() for path in policy_sources(p, task)))
    return tuple(p for p in shipped if p != MIXTURE_ONLY or LAMBDA_ROLES[objective] == "mixture")


def seed_range(first: int, count: int) -> tuple[int, ...]:
    """``count`` seeds from ``first`` on; raises :class:`ResultsError` before there are too many of them."""
    if not 1 <= count <= MOST_SEEDS:
        raise ResultsError(f"seeds={shown(count)} must lie in 1..{MOST_SEEDS}: each is a run and a file of its own")
    return tuple(range(first, first + count))


@dataclass(frozen=True)
class Comparison:
    """What is compared. ``options`` are run settings other than the task's own.

    ``policies`` may name themselves, as in ``mine=path/to/agent.zip``: they are then called that wherever they appear,
    and ``named`` says what they are. ``trust`` opens the pickles of agents that cannot be rebuilt without.
    """

    task: str
    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    data_root: str | None = None
    named: dict[str, str] = field(default_factory=dict)
    trust: bool = False

    def __post_init__(self) -> None:
        split = [split_name(policy) for policy in self.policies]
        object.__setattr__(self, "policies", tuple(name for name, _ in split))
        object.__setattr__(self, "named", {**self.named, **{name: spec for name, spec in split if name != spec}})
        object.__setattr__(self, "task", get_task(self.task).name)
        root = resolve_data_root(self.data_root)
        object.__setattr__(self, "data_root", None if root is None else str(root.resolve()))

    def spec(self, policy: str) -> str:
        """What :func:`unlearn_gym.policies.make_policy` takes for the policy that is called so."""
        return self.named.get(policy, policy)

    def validate(self) -> None:
        """Raise what is wrong with the comparison itself; :meth:`try_policies` is about the policies."""
        for name, values in (("policies", self.policies), ("seeds", self.seeds)):
            if not values:
                raise ResultsError(f"{name} is empty; name at least one")
            if len(values) > MOST_SEEDS:
                raise ResultsError(
                    f"{len(values)} {name} are more than {MOST_SEEDS}; each is a run and a file of its own"
                )
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ResultsError(f"{name} names {shown(twice[0])} twice; each must be there once")
        if min(self.seeds) < 0:
            raise ResultsError(f"seed {shown(min(self.seeds))} is negative; seeds begin at 0")
        if max(self.seeds) >= 2**63:
            raise ResultsError(f"seed {shown(max(self.seeds))} is more than torch's generators take; stay below 2^63")
        self.evaluation.validate()
        get_task(self.task).settings.override(**self.options)
        get_task(self.task).check_pretrained()  # before its data, which may be large
        self.evaluation.check_memory(load_data(get_task(self.task), self.data_root))
        for policy in self.policies:
            if policy in REFERENCES:
                raise PolicyError(f"{policy!r} is in every comparison already; leave it out of the policies")
            agent_training(policy, self.task)  # a damaged manifest fails here, not after everything ran

    def try_policies(self, policies: Iterable[str]) -> None:
        """Raise what the cells of ``policies`` would raise, before any of them runs."""
        for policy in policies:
            if policy == FINETUNE:
                make_cell_env(self.task, policy, self.options, self.data_root)
            elif policy not in REFERENCES:
                self._try_policy(policy)

    def _try_policy(self, policy: str) -> None:
        """Let the policy make one step, so that one that cannot fails here."""
        env = make_cell_env(self.task, policy, self.options, self.data_root)
        chooser = make_policy(self.spec(policy), policy_context(env), trust=self.trust)
        run_episode(env, chooser, 0, name=policy, steps=1)

    def cell_keys(self) -> dict[str, str]:
        """For each row a hash of all that its cells depend on but their seed: cells with another are not ours."""
        task = get_task(self.task)
        settings = task.settings.override(**self.options)
        folders = {task.assets, task.pretrained_path.parent, task.oracle_path.parent}
        found = [path for folder in folders for end in KEY_FILES for path in folder.glob(end)]
        files = [path for path in found if ".checkpoint" not in path.suffixes]  # of a training, beside its weights
        common: dict[str, Any] = {
            "format": CELL_FORMAT, "task": self.task, "data": load_data(task, self.data_root).digest(),
            "extras": [name for name in EXTRAS if importlib.util.find_spec(name) is not None],
            "evaluation": _changed(asdict(self.evaluation), asdict(EvaluationSettings())),
            "settings": _changed(settings.model_dump(), RunSettings().model_dump()),
            "versions": [unlearn_gym.__version__, torch.__version__], "schedule": task.schedule.model_dump(),
            "forget_classes": task.forget_classes, "num_inference_steps": task.num_inference_steps,
            "files": sorted(sha256(path) for path in [*files, *task.weights_within, CLASSIFIER_WEIGHTS]),
        }  # fmt: skip
        keys = {}
        for policy in (*self.references(), *self.policies):
            spec = self.spec(policy)
            own = {**common, "source": [sha256(path) for path in existing_sources(spec, self.task)]}
            if spec != policy and not spec.endswith(".zip"):
                own["spec"] = spec
            keys[policy] = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return keys

    def cells(self) -> list[tuple[str, int]]:
        """(policy, seed) of every cell; the references do not depend on the seed."""
        return [(name, 0) for name in self.references()] + [(p, seed) for seed in self.seeds for p in self.policies]

    def keeps(self, seed: int) -> bool:
        """Whether the cells of ``seed`` keep samples for pictures: the first one's, and the references'."""
        return seed in (0, self.seeds[0])

    def references(self) -> tuple[str, ...]:
        """The untouched model and, where the task has one, the retrained oracle."""
        return REFERENCES if get_task(self.task).oracle_path.is_file() else (UNTOUCHED,)


def _changed(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """``values`` that are not the default: a setting that a later version adds does not make older cells others."""
    return {name: value for name, value in values.items() if value != defaults[name]}


def run_comparison(
    comparison: Comparison,
    out: Path,
    *,
    store: CellStore | None = None,
    jobs: int = 1,
    engine: str = "joblib",
    command: str = "",
    progress: CellProgress | None = None,
    save_models: bool = False,
) -> Results:
    """Run every cell that neither ``store`` nor ``out`` holds yet, in ``jobs`` processes; writes ``results.json``.

    ``engine``: see :func:`unlearn_gym.comparison.engines.run_calls`. Every finished cell is a file of its own in
    ``store`` (default: ``out/cells``), so an interrupted comparison continues where it stopped, and cells of a
    ``results.json`` that another comparison left there are kept. With ``save_models`` every cell's model is a
    safetensors file of its own in ``out/models``, but for runs that diverged. ``progress(cell, done, total)`` is called
    for every cell, and first with None.
    """
    if jobs < 1:
        raise SettingsError(f"jobs={jobs} must be at least 1")
    comparison.validate()
    with folder_lock(out):
        return _run_comparison(comparison, out, store, jobs, engine, command, progress, save_models=save_models)


def _run_comparison(
    comparison: Comparison,
    out: Path,
    store: CellStore | None,
    jobs: int,
    engine: str,
    command: str,
    progress: CellProgress | None,
    *,
    save_models: bool,
) -> Results:
    before = finished_cells(out)
    store = store or CellStore(out / "cells", known=before)
    cells, keys = comparison.cells(), comparison.cell_keys()
    stored = {name: store.read(*name, keys[name[0]]) for name in cells}
    found = {n: c for n, c in stored.items() if c is not None and ("pictures" in c or not comparison.keeps(n[1]))}
    if save_models:
        saved = {n: store.model_path(*n, keys[n[0]]).is_file() for n in found}
        found = {n: cell for n, cell in found.items() if saved[n] or cell["diverged"]}
    others = [c for c in before if keys.get(c["policy"]) != c.get("key") or (c["policy"], c["seed"]) not in cells]
    if others:
        tell(
            f"{out} has {len(others)} runs of other settings, policies or seeds: they stay in {out / 'cells'}, and "
            "results and report will be of this comparison alone"
        )
    if store.faults:
        tell(f"{len(store.faults)} stored runs are not believed and run again; the first: {store.faults[0]}")
    comparison.try_policies(dict.fromkeys(policy for policy, seed in cells if (policy, seed) not in found))
    report = progress or (lambda cell, done, total: None)
    report(None, 0, len(cells))
    for done, cell in enumerate(found.values(), start=1):
        report(cell, done, len(cells))
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    task = get_task(comparison.task)
    calls = [(task, comparison, *name, keys[name[0]], threads, save_models) for name in cells if name not in found]
    with contextlib.closing(run_calls(engine, _run_keyed, calls, jobs, _cell_name)) as ran:
        for fresh in ran:
            model = fresh.pop("model", None)
            cell = found[fresh["policy"], fresh["seed"]] = with_checksum(fresh)
            if model is not None:
                store.write_model(cell, model)
            write_curves(out / "tensorboard" / store.path(cell["policy"], cell["seed"], cell["key"]).stem, cell)
            store.write(cell)
            report(cell, len(found), len(cells))
    raw = {
        "format": CELL_FORMAT,
        "comparison": asdict(comparison), **_provenance(comparison, command), "cells": [found[name] for name in cells]
    }  # fmt: skip
    for cell in (cell for cell in others if cell.get("key") is not None):
        store.write(cell)
    write_results(out / "results.json", raw)
    return Results(raw)


def _cell_name(task: Task, comparison: Comparison, policy: str, seed: int, *rest: Any) -> str:
    return f"policy {policy!r}, seed {seed}"


def finished_cells(out: Path) -> list[dict[str, Any]]:
    """The sound cells of the ``results.json`` in ``out``; says in one line why there are others."""
    sound, wrong = read_cells(out / "results.json", CELL_FORMAT)
    if wrong is not None:
        tell(f"{wrong}; what is not sound is run again")
    return sound


def tell(line: str) -> None:
    """Say on stderr what a command does otherwise than was to be expected."""
    print(f"unlearn-gym: {line}", file=sys.stderr, flush=True)


def _run_keyed(
    task: Task, comparison: Comparison, policy: str, seed: int, key: str, threads: int | None, save_model: bool
) -> dict[str, Any]:
    """Run a cell, perhaps in a process that knows no task of the user's yet."""
    if threads is not None:
        torch.set_num_threads(threads)
    if task.name not in task_names():
        register_task(task)
    c = comparison
    cell = run_cell(
        c.task, policy, seed, c.options, c.evaluation, c.data_root,
        keep_samples=c.keeps(seed), spec=c.spec(policy), trust=c.trust, keep_model=save_model,
    )  # fmt: skip
    return cell | {"key": key, "threads": torch.get_num_threads()}


def agent_training(policy: str, task: str) -> dict[str, Any] | None:
    """What a shipped or trained agent's manifest says of its training's cost; None for all that needed none;
    raises :class:`PolicyError` for a damaged manifest.
    """
    agents = [p for p in policy_sources(policy, task) if p.suffix == ".zip"]
    if not agents or not agents[0].with_suffix(".json").is_file():
        return None
    return read_manifest(agents[0]).model_dump(include={"seconds", "timesteps", "reward", "seed", "task"})


def _probe_cap(task: Task) -> float | None:
    """The forget loss of a model that never saw the data, on a run's probe, where it was measured."""
    try:
        return task.unseen_forget_loss
    except TaskError:
        return None


def _judged(judge: Judge) -> tuple[int | None, dict[str, float]]:
    """How many features the classifier has and what it says of real data; where it fails, its metrics say why."""
    try:
        return judge.reference.features.shape[1], judge.calibration()
    except Exception:
        return None, {}


def _provenance(comparison: Comparison, command: str) -> dict[str, Any]:
    """Where the figures come from: settings, versions, machine, and what the classifier says of real data."""
    task = get_task(comparison.task)
    data = load_data(task, comparison.data_root)
    feature_dim, calibration = _judged(evaluator(comparison.task, comparison.data_root, comparison.evaluation).judge)
    packages = ("torch", "gymnasium", "stable-baselines3", "torch-fidelity", "numpy")
    return {
        "command": command,
        "settings": task.settings.override(**comparison.options).model_dump(), "family": task.family.name,
        "num_train_timesteps": task.schedule.num_train_timesteps,
        "num_inference_steps": comparison.evaluation.num_inference_steps or task.num_inference_steps,
        "num_retain": len(data.retain), "num_forget": len(data.forget), "num_reference": len(data.heldout),
        "feature_dim": feature_dim, "calibration": calibration,
        "probe_cap": _probe_cap(task),
        "training": {p: agent_training(comparison.spec(p), comparison.task) for p in comparison.policies},
        "versions": {
            "unlearn_gym": unlearn_gym.__version__, "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
    }  # fmt: skip
