"""The results of a comparison: every raw value as ``results.json`` keeps it, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlearn_gym.comparison.matched import Probe, matched_levels
from unlearn_gym.comparison.records import FINETUNE, ORACLE, REFERENCES, UNTOUCHED, read_results
from unlearn_gym.errors import ResultsError
from unlearn_gym.math.statistics import Estimate, bootstrap_mean
from unlearn_gym.settings import RunSettings

CELL_FORMAT = 2
"""To be raised when a cell holds more than before or a default changes, so that older ones are run again."""
MUST_AGREE = (
    "settings", "num_train_timesteps", "num_inference_steps", "num_retain", "num_forget", "num_reference",
    "feature_dim", "probe_cap", "calibration", "versions",
)  # fmt: skip
"""What results must have in common to be merged, beside task and evaluation."""

CellName = tuple[str, int]


def score(forget_loss: float, retain_loss: float, start: tuple[float, float], cap: float, retain_coef: float) -> float:
    """``(min(f, cap) - f0)/(cap - f0) - w max(0, r/r0 - 1)``: the share of the way to a model that never saw the
    forget data, less w times the relative damage to held-out retain data. 0 for the untouched model, 1 at most.

    The potential Φ of design.md, section 3, at the end of a run: ``start`` is (f0, r0) of the untouched model,
    ``cap`` the oracle's forget loss, ``retain_coef`` w.
    """
    f0, r0 = start
    return (min(forget_loss, cap) - f0) / (cap - f0) - retain_coef * max(0.0, retain_loss / r0 - 1.0)


class Results:
    """What a comparison left behind, by policy and metric; ``raw`` is what ``results.json`` holds.

    Metrics are those of the cells, and ``episode_return``, ``mean_lambda`` and ``score``. Runs that diverged have none.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw
        self.task: str = raw["comparison"]["task"]
        self.settings: dict[str, Any] = RunSettings().model_dump(mode="json") | raw["settings"]  # of older versions too
        self.cells: list[dict[str, Any]] = raw["cells"]
        self.seeds: list[int] = sorted({c["seed"] for c in self.cells if c["policy"] not in REFERENCES})

    @cached_property
    def policies(self) -> list[str]:
        """Rows in the order of the comparison: the references first."""
        return list(dict.fromkeys(cell["policy"] for cell in self.cells))

    def of(self, policy: str) -> list[dict[str, Any]]:
        """The cells of ``policy``."""
        return [cell for cell in self.cells if cell["policy"] == policy]

    @cached_property
    def _values(self) -> dict[str, dict[str, dict[int, float]]]:
        table: dict[str, dict[str, dict[int, float]]] = {}
        for cell in (c for c in self.cells if not c["diverged"]):
            lambdas = cell.get("trace", {}).get("lambda_")
            figures = {**cell["metrics"], "episode_return": cell.get("episode_return")}
            figures["mean_lambda"] = float(np.mean(lambdas)) if lambdas else None
            figures["score"] = self.score(cell["metrics"], self.settings["potential_retain_coef"])
            for name, value in figures.items():
                if value is not None:
                    table.setdefault(cell["policy"], {}).setdefault(name, {})[cell["seed"]] = value
        return table

    def values(self, policy: str, metric: str) -> dict[int, float]:
        """``{seed: value}``, without the runs that have none."""
        return self._values.get(policy, {}).get(metric, {})

    def estimate(self, policy: str, metric: str) -> Estimate:
        """Mean over seeds with its bootstrap interval; NaN without values."""
        return bootstrap_mean(list(self.values(policy, metric).values()))

    @cached_property
    def _reference_losses(self) -> dict[str, dict[str, float]]:
        return {c["policy"]: c["metrics"] for c in self.cells if c["policy"] in REFERENCES and c["metrics"]}

    @property
    def family(self) -> str:
        """The family of the task's models; results of older versions are all of diffusion models."""
        return str(self.raw.get("family", "diffusion"))

    @property
    def cap(self) -> float | None:
        """The oracle's forget loss, where there is an oracle."""
        return self._reference_losses.get(ORACLE, {}).get("forget_loss")

    def score(self, metrics: dict[str, float], retain_coef: float) -> float | None:
        """:func:`score` of a cell's metrics; None for a run that diverged and for a task without an oracle."""
        start = self._reference_losses.get(UNTOUCHED)
        if not metrics or start is None or self.cap is None or not self.cap > start["forget_loss"]:
            return None
        return score(
            metrics["forget_loss"], metrics["retain_loss"], (start["forget_loss"], start["retain_loss"]),
            self.cap, retain_coef,
        )  # fmt: skip

    def scores(self, policy: str, retain_coef: float) -> dict[int, float]:
        """``{seed: score}`` with another exchange rate w than the settings'."""
        found = {cell["seed"]: self.score(cell["metrics"], retain_coef) for cell in self.of(policy)}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def has_scores(self) -> bool:
        """Whether there is an oracle to score by, with a higher forget loss than the untouched model's."""
        return bool(self.values(UNTOUCHED, "score"))

    @property
    def diverged(self) -> set[str]:
        """Policies of which at least one run diverged."""
        return {cell["policy"] for cell in self.cells if cell["diverged"]}

    @property
    def ranked(self) -> list[str]:
        """Policies that are compared with each other: no reference, no baseline, none that diverged."""
        return [p for p in self.policies if p not in (*REFERENCES, FINETUNE, *self.diverged)]

    @cached_property
    def best_static(self) -> str | None:
        """The static λ of the highest mean score by hindsight, of those that never diverged; without scores 0.5, or
        the first. None when no static λ ran through.
        """
        static = [p for p in self.ranked if p.startswith("static:")]
        if any(not self.values(p, "score") for p in static):
            return "static:0.5" if "static:0.5" in static else static[0]
        return max(static, key=lambda p: self.estimate(p, "score").mean, default=None)

    @cached_property
    def fair_static(self) -> dict[int, float]:
        """``{seed: score}`` of the static λ that is best on the *other* seeds: chosen without hindsight."""
        scores = {p: self.values(p, "score") for p in self.ranked if p.startswith("static:")}
        common = set.intersection(*(set(s) for s in scores.values())) if scores else set()
        if len(common) < 2:
            return {}
        means = {p: {s: np.mean([v[o] for o in common if o != s]) for s in common} for p, v in scores.items()}
        return {s: scores[max(scores, key=lambda p: means[p][s])][s] for s in common}

    def traces(self, policy: str, name: str) -> NDArray[np.float64]:
        """A traced term over the updates, ``(runs, updates)``; NaN where a run had ended."""
        traces = [cell["trace"][name] for cell in self.of(policy) if "trace" in cell]
        longest = max((len(t) for t in traces), default=0)
        padded = [t + [None] * (longest - len(t)) for t in traces]
        return np.array(padded, dtype=np.float64).reshape(len(traces), longest)

    def probes(self, policy: str) -> dict[int, Probe]:
        """``{seed: probe}`` along each run."""
        return {cell["seed"]: cell["probe"] for cell in self.of(policy) if cell.get("probe", {}).get("updates")}

    @cached_property
    def levels(self) -> list[float]:
        """Forget losses of the probe at which policies are compared: on the way from its start to ``probe_cap``."""
        cap = self.raw.get("probe_cap")
        starts = [probe["forget_loss"][0] for p in self.policies for probe in self.probes(p).values()]
        start = starts[0] if starts else None
        if cap is None or start is None or not cap > start:
            return []
        return matched_levels(start, cap)


def load_results(folder: Path) -> Results:
    """The ``results.json`` of a finished comparison; raises :class:`ResultsError` where there is none, and for one that
    does not hold what was written.
    """
    path = folder / "results.json"
    if not path.exists():
        raise ResultsError(f"no results.json in {folder}; finish 'unlearn-gym compare --out {folder}'")
    return Results(read_results(path, CELL_FORMAT))


def merge_results(parts: Sequence[Results], names: Sequence[str]) -> Results:
    """All cells of ``parts`` as one comparison; ``names`` are theirs in messages.

    Raises :class:`ResultsError` where they differ in task, settings, evaluation, data or versions, or hold different
    measurements of one (policy, seed). Equal cells count once.
    """
    first, cells = parts[0], dict[CellName, dict[str, Any]]()
    for part, name in zip(parts, names, strict=True):
        for what, ours, theirs in _common_ground(part, first):
            if ours != theirs:
                raise ResultsError(
                    f"{name} and {names[0]} cannot be merged: {what} is {ours} there, {theirs} here; "
                    "arms of 'unlearn-gym experiment FILE.yaml' may differ (docs/objectives.md)"
                )
        for cell in part.cells:
            known = cells.setdefault((cell["policy"], cell["seed"]), cell)
            if known is not cell and (known.get("key") != cell.get("key") or known.get("key") is None):
                raise ResultsError(
                    f"{name} measured {cell['policy']} at seed {cell['seed']} otherwise than another folder did; "
                    "leave one of them out"
                )
    order = {policy: i for i, policy in enumerate(dict.fromkeys(p for part in parts for p in part.policies))}
    merged = sorted(cells.values(), key=lambda c: (c["policy"] not in REFERENCES, c["seed"], order[c["policy"]]))
    raws = [part.raw for part in parts]
    both = {
        name: tuple(dict.fromkeys(value for raw in raws for value in raw["comparison"][name]))
        for name in ("policies", "seeds")
    }
    return Results(
        {
            **first.raw,
            "comparison": {
                **first.raw["comparison"],
                **both,
                "named": _merged_names(parts, names),
            },
            "training": {k: v for raw in raws for k, v in raw.get("training", {}).items()},
            "command": "; ".join(dict.fromkeys(raw["command"] for raw in raws)),
            "cells": merged,
        }
    )


def _merged_names(parts: Sequence[Results], names: Sequence[str]) -> dict[str, str]:
    """What the policies are that were given names; raises :class:`ResultsError` where one name has two meanings."""
    merged: dict[str, str] = {}
    for part, where in zip(parts, names, strict=True):
        for name, spec in part.raw["comparison"].get("named", {}).items():
            if merged.setdefault(name, spec) != spec:
                raise ResultsError(
                    f"{where} and another folder cannot be merged: {name!r} is {spec} there, {merged[name]} elsewhere; "
                    "run one of them again under another name"
                )
    return merged


def _common_ground(a: Results, b: Results) -> list[tuple[str, Any, Any]]:
    """(what, a's, b's) of everything that merged results must agree in, down to single settings."""
    rows: list[tuple[str, Any, Any]] = [("task", a.task, b.task)]
    rows += [(f"evaluation {k}", *v) for k, v in _pairs(*(r.raw["comparison"]["evaluation"] for r in (a, b)))]
    for name in MUST_AGREE:
        ours, theirs = a.raw.get(name), b.raw.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            rows += [(f"{name} {k}", *v) for k, v in _pairs(ours, theirs)]
        else:
            rows.append((name, ours, theirs))
    return rows


def _pairs(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, tuple[Any, Any]]]:
    return [(key, (a.get(key), b.get(key))) for key in sorted(a.keys() | b.keys())]
