"""Experiments: named sets of comparisons, read from a YAML file, run piece by piece, and reported together."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from unlearn_gym.comparison.comparison import MOST_SEEDS, Comparison, finished_cells, run_comparison
from unlearn_gym.comparison.records import REFERENCES, UNTOUCHED
from unlearn_gym.comparison.results import Results, load_results, merge_results
from unlearn_gym.comparison.store import CellStore
from unlearn_gym.errors import ResultsError, UnlearnGymError, describe_validation_error, shown
from unlearn_gym.files import FormatError, read_yaml, write_text
from unlearn_gym.math.statistics import paired_difference
from unlearn_gym.metrics.catalogue import BY_NAME
from unlearn_gym.metrics.judge import EvaluationSettings
from unlearn_gym.report.report import MERITS, hours, reward_correlations, write_report
from unlearn_gym.report.tables import (
    Table,
    adjusted_p_values,
    clearly_better,
    compared,
    estimate_text,
    markdown_table,
    p_text,
)
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.system.values import Checked

EXPERIMENTS = Path("configs/experiments")
BESIDE_ORACLE = (
    "forget_rate", "forget_loss", "retain_loss", "feature_kid", "class_accuracy", "oracle_error", "score",
    "multi_step_forget_rate", "multi_step_kid", "multi_step_accuracy",
)  # fmt: skip
"""Columns of a task's methods, as far as any of them has a value."""
ACROSS = ("forget_rate", "forget_loss", "retain_loss", "score", "mean_lambda")
Progress = Callable[[str], Callable[[dict[str, Any] | None, int, int], None]]


class Arm(Checked):
    """One comparison of an experiment: a task, its policies, and run settings other than the task's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    task: str
    policies: tuple[str, ...]
    options: dict[str, Any] = Field({})
    seeds: int | None = Field(None, ge=1, le=MOST_SEEDS, description="None: as many as the experiment has")


class Quick(Checked):
    """The small size of an experiment: everything it replaces, and which arms it keeps (default: all)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: int = Field(2, ge=1, le=MOST_SEEDS)
    num_samples: int = Field(250, ge=200)
    num_likelihood_samples: int = Field(0, ge=0)
    options: dict[str, Any] = Field({"horizon": 12})
    arms: tuple[str, ...] = ()


class Experiment(Checked):
    """A question, and the comparisons that are to answer it; or, with ``merge``, the experiments whose results do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str
    seeds: int = Field(10, ge=1, le=MOST_SEEDS)
    num_samples: int = Field(500, ge=200, description="of either kind, for each model")
    num_likelihood_samples: int = Field(0, ge=0, description="of the forget set and of held-out retain data, for each")
    arms: tuple[Arm, ...] = ()
    merge: tuple[str, ...] = ()
    quick: Quick = Quick()

    @model_validator(mode="after")
    def _arms_or_merge(self) -> Experiment:
        if bool(self.arms) == bool(self.merge):
            raise ValueError("give arms, or merge with names of experiments, and not both")
        names = [arm.name for arm in self.arms]
        unknown = [name for name in self.quick.arms if name not in names]
        if len(set(names)) < len(names) or unknown:
            raise ValueError(f"arms {names} must have different names, and quick.arms {unknown} must be among them")
        return self

    def comparisons(self, data_root: str | None, *, quick: bool) -> dict[str, Comparison]:
        """The comparison of each arm, at the full or the quick size."""
        size: Experiment | Quick = self.quick if quick else self
        likelihoods = size.num_likelihood_samples
        evaluation = EvaluationSettings(size.num_samples, size.num_samples, num_likelihood_samples=likelihoods)
        more = self.quick.options if quick else {}
        chosen = (self.quick.arms if quick else ()) or tuple(arm.name for arm in self.arms)
        return {
            a.name: Comparison(
                a.task, a.policies, tuple(range((not quick and a.seeds) or size.seeds)), {**a.options, **more},
                evaluation, data_root,
            )
            for a in self.arms
            if a.name in chosen
        }  # fmt: skip


def load_experiment(name: str) -> Experiment:
    """The experiment in the YAML file ``name``, or of that name in ``configs/experiments``; raises
    :class:`ResultsError` in one line.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else EXPERIMENTS / f"{name}.yaml"
    if not path.is_file():
        if path.parent == EXPERIMENTS and not EXPERIMENTS.is_dir():
            raise ResultsError(
                f"no {EXPERIMENTS} in {Path.cwd()}, so no experiment {name!r}: run this in the root of a checkout, "
                "which has them, or name a .yaml file"
            )
        known = sorted(p.stem for p in EXPERIMENTS.glob("*.yaml"))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known) or 'none'}"
        raise ResultsError(f"no experiment {shown(name)}; {hint} (from {EXPERIMENTS}, or a path to a .yaml file)")
    try:
        return Experiment.model_validate(read_yaml(path))
    except FormatError as error:
        raise ResultsError(f"{path}: {error}") from None
    except ValidationError as error:
        known = [*Experiment.model_fields, *Arm.model_fields, *Quick.model_fields]
        raise ResultsError(f"{path}: {describe_validation_error(error, known)}") from None


def run_experiment(
    name: str,
    out: Path,
    *,
    quick: bool,
    jobs: int,
    data_root: str | None,
    command: str,
    progress: Progress,
    engine: str = "joblib",
    trust: bool = False,
) -> Path:
    """Run what is not done yet, write each arm's results and report, and ``experiment.md`` over all of them.

    Cells are kept beside ``out``, in ``cells``, where other experiments find them: no policy is run twice on one
    setting and seed. Returns the path of ``experiment.md``.
    """
    experiment = load_experiment(name)
    with folder_lock(out):
        arms = _run_arms(experiment, name, out, quick, jobs, data_root, command, progress, engine, trust)
        for arm, results in arms.items():
            write_report(results, out / arm)
        path = out / "experiment.md"
        write_text(path, experiment_page(Path(name).stem, experiment.question, arms))
    return path


def _run_arms(
    experiment: Experiment,
    name: str,
    out: Path,
    quick: bool,
    jobs: int,
    data_root: str | None,
    command: str,
    progress: Progress,
    engine: str,
    trust: bool,
) -> dict[str, Results]:
    """The results of each arm, or of what is merged."""
    if experiment.merge:
        arms = _merged_arms(experiment, out, command, quick=quick)
    else:
        comparisons = {
            arm: replace(comparison, trust=trust)
            for arm, comparison in experiment.comparisons(data_root, quick=quick).items()
        }
        for arm, comparison in comparisons.items():
            try:
                comparison.validate()
            except UnlearnGymError as error:
                raise ResultsError(f"experiment {name!r}, arm {arm!r}: {error}") from None
        arms = {}
        for arm, comparison in comparisons.items():
            store = CellStore(out.parent / "cells", finished_cells(out / arm))
            arms[arm] = run_comparison(
                comparison, out / arm, store=store, jobs=jobs, engine=engine, command=command, progress=progress(arm)
            )
    return arms


def _merged_arms(experiment: Experiment, out: Path, command: str, *, quick: bool) -> dict[str, Results]:
    """The results of all merged experiments beside ``out``, those of one task and setting together.

    They are not written again: the experiments that they come from hold every value.
    """
    groups: dict[str, dict[str, Results]] = {}
    for name in experiment.merge:
        folders = sorted(path.parent for path in (out.parent / name).glob("*/results.json"))
        if not folders:
            again = f"unlearn-gym experiment {name}{' --quick' if quick else ''} --out {out.parent / name}"
            raise ResultsError(f"no results of {name!r} in {out.parent}; run '{again}' first")
        for folder in folders:
            results = load_results(folder)
            groups.setdefault(_group(results), {})[f"{name}/{folder.name}"] = results
    arms = {}
    for group, parts in groups.items():
        merged = merge_results(list(parts.values()), list(parts))
        merged.raw["command"] = command
        arms[group] = merged
    return arms


def _group(results: Results) -> str:
    """Where results belong: their task and the options that differ from its own."""
    options = results.raw["comparison"]["options"]
    parts = [results.task.replace(":", "-").replace(",", "-"), *(f"{k}-{v}" for k, v in sorted(options.items()))]
    return "-".join(parts).replace("_", "-").lower()


SCORE_COLUMNS = (
    "the last two columns: the paired difference of the score to the arm's best static λ by hindsight, and its "
    "p-value: Wilcoxon's signed-rank test, Holm-corrected within the arm among the static λ and, apart from these, "
    "among all others but fine-tuning. "
)


def _smallest_p(num_seeds: int) -> str:
    """What so many seeds can show at all."""
    return (
        f"Fewer than five seeds give no p-value, n seeds none below 2^(1-n): {num_seeds} seeds can call one of at most "
        f"{int(0.05 * 2 ** (num_seeds - 1))} comparisons clear, and only if all of them agree."
    )


def experiment_page(name: str, question: str, arms: dict[str, Results]) -> str:
    """The Markdown page over all arms of an experiment."""
    first = next(iter(arms.values()))
    versions = ", ".join(f"{k} {v}" for k, v in first.raw["versions"].items())
    lines = [f"# Experiment {name}", question, markdown_table(*across(arms))]
    lines.append(
        f"Means over seeds with 95 % intervals; {SCORE_COLUMNS}{_smallest_p(len(first.seeds))}"
        if any(results.has_scores for results in arms.values())
        else "Means over seeds with 95 % intervals; without an oracle there are no scores to compare."
    )
    lines += methods(arms)
    lines += ["## The return against what is wanted", markdown_table(*rewards(arms))]
    lines.append("Spearman's rank correlation over all SISS runs of an arm; intervals resample seeds.")
    lines.append("\n".join(f"- [{arm}]({arm}/report.md): {_arm_line(results)}" for arm, results in arms.items()))
    total = sum(hours(results) for results in arms.values())
    lines.append(f"Made by `{first.raw['command']}` with {versions}; {total:.2f} core hours.")
    return "\n\n".join(lines) + "\n"


def methods(arms: dict[str, Results]) -> list[str]:
    """A section for each task that several arms have in common: all of them beside its one oracle."""
    tasks: dict[str, dict[str, Results]] = {}
    for arm, results in arms.items():
        tasks.setdefault(results.task, {})[arm] = results
    sections = []
    for task, own in tasks.items():
        if len(own) > 1:
            sections += [f"## {task}: forgetting against quality, beside the oracle", markdown_table(*_beside(own))]
    return sections


def _beside(arms: dict[str, Results]) -> Table:
    """The references once, then a row for every policy of every arm."""
    measured = {name for results in arms.values() for cell in results.of(UNTOUCHED) for name in cell["metrics"]}
    metrics = [BY_NAME[name] for name in BESIDE_ORACLE if name in measured or name == "score"]
    rows, seen = [], set()
    for arm, results in arms.items():
        for policy in results.policies:
            label = "–" if policy in REFERENCES else arm
            if (label, policy) not in seen:
                seen.add((label, policy))
                values = (estimate_text(results.estimate(policy, m.name), m.form) for m in metrics)
                rows.append([label, policy, *values, "–" if policy in REFERENCES else str(len(results.seeds))])
    return ["arm", "policy", *(m.title for m in metrics), "seeds"], rows


def rewards(arms: dict[str, Results]) -> Table:
    """How the return of an arm's runs goes with each figure of merit."""
    rows = []
    for arm, results in arms.items():
        found = reward_correlations(results)
        rows.append([arm, *(found.get(name, "–") for name in MERITS)])
    return ["arm", *(f"return and {BY_NAME[name].title}" for name in MERITS)], rows


def _arm_line(results: Results) -> str:
    options = ", ".join(f"{k} = {v}" for k, v in results.raw["comparison"]["options"].items())
    better = ", ".join(clearly_better(results)) or "no policy"
    verdict = f"; clearly better than the best static λ: {better}" if results.cap is not None else ""
    return f"`{results.task}`, {options or 'its own settings'}, {len(results.seeds)} seeds{verdict}"


def across(arms: dict[str, Results]) -> Table:
    """A row for every policy of every arm."""
    metrics = [BY_NAME[name] for name in ACROSS]
    rows = []
    for arm, results in arms.items():
        best = results.best_static
        scored = best is not None and bool(results.values(best, "score"))
        p_values = {}
        if best is not None and scored:
            p_values = adjusted_p_values(compared(results, best, "score"), results.values(best, "score"))
        for policy in results.policies:
            row = [arm, policy, *(estimate_text(results.estimate(policy, m.name), m.form) for m in metrics)]
            if policy in REFERENCES or best is None or not scored or policy == best:
                row += ["best static" if policy == best and scored else "–", "–"]
            else:
                difference = paired_difference(results.values(policy, "score"), results.values(best, "score"))
                row += [estimate_text(difference, BY_NAME["score"].form), p_text(p_values.get(policy))]
            rows.append(row)
    return ["arm", "policy", *(m.title for m in metrics), "score − best static", "p (Holm)"], rows
