"""One cell of a comparison: one policy at one seed, and the evaluation of the model that it leaves."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unlearn_gym.comparison.records import FINETUNE, ORACLE, REFERENCES, UNTOUCHED, pack_samples
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import WeightsError
from unlearn_gym.metrics.evaluator import Evaluation, Evaluator
from unlearn_gym.metrics.judge import EvaluationSettings
from unlearn_gym.models.weights import load_weights
from unlearn_gym.policies import make_policy
from unlearn_gym.policies.episode import policy_context, run_episode
from unlearn_gym.system.curves import curve_errors
from unlearn_gym.system.torch_state import insulated
from unlearn_gym.tasks import Task, get_task, load_data
from unlearn_gym.tasks.saving import model_bytes

FINETUNE_OPTIONS = {
    "lambda_min": 0.0, "lambda_init": 0.0, "forget_grad_rule": "relative_norm", "forget_grad_norm": 0.0,
    "grad_norms": "exact",
}  # fmt: skip
"""λ = 0 and no forget gradient: plain training on retain data, the naive baseline."""

IMAGES_KEPT, POINTS_KEPT = (100, 40), 300
"""Samples of the forget labels and of those to retain that a cell keeps for the report's pictures."""
PROBES = 20
"""Points along a run at which its forget and retain loss are measured."""


def make_cell_env(task: str, policy: str, options: dict[str, Any], data_root: str | None) -> SISSUnlearnEnv:
    """The environment that ``policy`` runs in."""
    extra = FINETUNE_OPTIONS if policy == FINETUNE else {}
    return SISSUnlearnEnv(task, data_root=data_root, **{**options, **extra})


@lru_cache(maxsize=4)
@insulated
def evaluator(task: str, data_root: str | None, settings: EvaluationSettings) -> Evaluator:
    """One evaluator for all cells of a process: references and the oracle's samples are computed once."""
    chosen = get_task(task)
    return Evaluator(chosen, load_data(chosen, data_root), settings)


def final_model(task: Task, name: str) -> nn.Module:
    """``untouched``, ``oracle``, or the network with the weights of a ``.safetensors`` file."""
    if name in REFERENCES:
        return task.pretrained_model() if name == UNTOUCHED else task.oracle_model()
    if not name.endswith(".safetensors"):
        raise WeightsError(f"weights {name!r} must be {UNTOUCHED!r}, {ORACLE!r} or a .safetensors file")
    model = task.pretrained_model()
    load_weights(model, Path(name))
    return model


@insulated
def run_cell(
    task: str,
    policy: str,
    seed: int,
    options: dict[str, Any],
    evaluation: EvaluationSettings,
    data_root: str | None,
    *,
    keep_samples: bool,
    spec: str | None = None,
    trust: bool = False,
    keep_model: bool = False,
) -> dict[str, Any]:
    """Trace, probes, return, times and metrics as JSON knows them; a run that diverged has no metrics.

    ``policy`` is what the policy is called, ``spec`` what it is (None: the same).

    A model whose losses or samples are not finite after the last update counts as diverged too. With ``keep_model``
    the bytes of a safetensors file are under ``"model"``, but for a run that diverged.
    """
    cell: dict[str, Any] = {"policy": policy, "seed": seed}
    if policy in REFERENCES:
        model = final_model(get_task(task), policy)
    else:
        env = make_cell_env(task, policy, options, data_root)
        name, every = ("static:0" if policy == FINETUNE else spec or policy), max(1, env.settings.horizon // PROBES)
        chooser = make_policy(name, policy_context(env), trust=trust)
        cell |= asdict(run_episode(env, chooser, seed, name=policy, probe_every=every))
        cell["training_seconds"] = float(getattr(chooser, "training_seconds", 0.0))
        model = env.run.model
    started = time.perf_counter()
    result = evaluator(task, data_root, evaluation).evaluate(model)
    cell["diverged"] = cell.get("diverged", False) or not result.finite
    cell |= {"metrics": {}, "absent": {}, "profile": []}
    if not cell["diverged"]:
        cell |= {"metrics": result.metrics, "absent": result.absent, "profile": result.profile}
    cell["evaluation_seconds"] = time.perf_counter() - started
    if keep_samples:
        cell["pictures"] = _pictures(evaluator(task, data_root, evaluation), model, result)
    kept = {"model": model_bytes(model, get_task(task))} if keep_model and not cell["diverged"] else {}
    return {**finite_or_none(cell), **kept}


def _pictures(judges: Evaluator, model: nn.Module, result: Evaluation) -> dict[str, Any]:
    """Samples for the report's grids, and which of the forget samples the classifier calls forget data; without a
    classifier nothing has drawn them before, and none is called so.
    """
    if not result.finite:
        return {}
    num_forget, num_quality = IMAGES_KEPT if judges.data.retain.dim() == 4 else (POINTS_KEPT, POINTS_KEPT)
    forget, quality, is_forget = result.forget_samples, result.quality_samples, result.is_forget
    if forget is None or quality is None:
        forget, quality = judges.draw(model, num_forget, num_quality)
    if not all(torch.isfinite(samples).all() for samples in (forget, quality)):
        return {}
    return {
        "forget": pack_samples(forget[:num_forget]),
        "quality": pack_samples(quality[:num_quality]),
        "forget_hits": [] if is_forget is None else is_forget[:num_forget].nonzero().flatten().tolist(),
    }


def write_curves(folder: Path, cell: dict[str, Any]) -> None:
    """The cell's trace and metrics as TensorBoard scalars ``unlearn/*`` and ``eval/*``; replaces older ones."""
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    if "trace" not in cell:
        return
    with curve_errors(folder), SummaryWriter(str(folder)) as writer:
        for name, values in cell["trace"].items():
            for step, value in enumerate(values, start=1):
                if value is not None:
                    writer.add_scalar(f"unlearn/{name.rstrip('_')}", value, step)
        for name, value in cell["metrics"].items():
            writer.add_scalar(f"eval/{name}", value, len(cell["trace"]["lambda_"]))


def finite_or_none(value: Any) -> Any:
    """``value`` with every float that JSON does not know as None, and floats to 7 digits."""
    if isinstance(value, dict):
        return {k: finite_or_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
