"""The report's tables: what each policy came to, and how it compares with the best static λ."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from unlearn_gym.comparison.matched import Crossing, first_crossing
from unlearn_gym.comparison.records import FINETUNE, REFERENCES, UNTOUCHED
from unlearn_gym.comparison.results import Results
from unlearn_gym.math.statistics import (
    Estimate,
    bootstrap_iqm,
    bootstrap_mean,
    holm,
    paired_difference,
    paired_p_value,
    probability_of_improvement,
)
from unlearn_gym.metrics.catalogue import BY_NAME, MAIN, METRICS, Metric

Table = tuple[list[str], list[list[str]]]

ON_TERMINAL = ("forget_rate", "forget_loss", "retain_loss", "score", "feature_kid", "class_accuracy")
PAIRED = ("score", "forget_rate", "forget_loss", "retain_loss", "feature_kid", "oracle_error", "episode_return")
CLEAR = 0.05
"""A difference is starred below this Holm-corrected p-value."""
RETAIN_COEFS = (1.0, 3.0, 10.0, 30.0)
"""Exchange rates w of :func:`exchange_rates`: what a relative rise of the retain loss costs in shares forgotten."""
NOTHING = "–"
FAMILIES: tuple[Callable[[str], bool], ...] = (
    lambda p: p.startswith("static:"),
    lambda p: p == FINETUNE,
    lambda p: p != FINETUNE and not p.startswith("static:"),
)
"""Policies whose comparisons are corrected together."""


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A GitHub table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def estimate_text(value: Estimate, form: Callable[[float], str]) -> str:
    """A mean with its interval, where there is one."""
    if not np.isfinite(value.mean):
        return NOTHING
    if value.low == value.high:
        return form(value.mean)
    return f"{form(value.mean)} [{form(value.low)}, {form(value.high)}]"


def present(results: Results, names: tuple[str, ...]) -> list[Metric]:
    """Those of the metrics ``names`` that any policy has."""
    return [BY_NAME[n] for n in names if any(results.values(p, n) for p in results.policies)]


def summary(results: Results) -> Table:
    """The main table: mean and 95 % interval over seeds of each metric."""
    metrics, rows = present(results, MAIN), []
    for policy in results.policies:
        cells, reference = results.of(policy), policy in REFERENCES
        rows.append(
            [
                policy,
                NOTHING if reference else str(len(cells)),
                *(estimate_text(results.estimate(policy, m.name), m.form) for m in metrics),
                NOTHING if reference else str(sum(c["diverged"] for c in cells)),
            ]
        )
    return ["policy", "seeds", *(m.title for m in metrics), "diverged"], rows


def remaining(results: Results) -> Table:
    """Means of all metrics that the main table leaves out."""
    metrics = present(results, tuple(m.name for m in METRICS if m.name not in MAIN))
    rows = [[p, *(estimate_mean(results, p, m) for m in metrics)] for p in results.policies]
    return ["policy", *(m.title for m in metrics)], rows if metrics else []


def estimate_mean(results: Results, policy: str, metric: Metric) -> str:
    """The mean alone."""
    mean = results.estimate(policy, metric.name).mean
    return metric.form(mean) if np.isfinite(mean) else NOTHING


def terminal(results: Results, *, intervals: bool) -> Table:
    """The main figures alone, for a terminal: means, and with ``intervals`` these below them."""
    shown = [m for m in present(results, ON_TERMINAL) if results.values(UNTOUCHED, m.name)]
    rows = []
    for policy in results.policies:
        row = [policy]
        for m in shown:
            mean, low, high = results.estimate(policy, m.name)
            text = m.form(mean) if np.isfinite(mean) else ("diverged" if policy in results.diverged else NOTHING)
            row.append(text + (f"\n[{m.form(low)}, {m.form(high)}]" if intervals and low < high else ""))
        rows.append(row)
    return ["policy", *(m.title for m in shown)], rows


def p_text(value: float | None) -> str:
    """A p-value, where there is one."""
    return NOTHING if value is None else f"{value:.3f}"


def clearly_better(results: Results) -> list[str]:
    """Policies other than static λ and fine-tuning whose score is clearly above the best static λ's by hindsight."""
    baseline = results.best_static
    if baseline is None:
        return []
    ours = results.values(baseline, "score")
    p_values = adjusted_p_values(compared(results, baseline, "score"), ours)
    return [
        p for p, value in p_values.items()
        if FAMILIES[2](p) and value < CLEAR and paired_difference(results.values(p, "score"), ours).mean > 0
    ]  # fmt: skip


def compared(results: Results, baseline: str | None, metric: str) -> dict[str, dict[int, float]]:
    """``{policy: {seed: value}}`` of the policies that are compared with ``baseline``."""
    return {p: results.values(p, metric) for p in results.policies if p not in (*REFERENCES, baseline)}


def adjusted_p_values(values: dict[str, dict[int, float]], baseline: dict[int, float]) -> dict[str, float]:
    """P-values of each policy's paired differences, ``{seed: value}``, to ``baseline``, Holm-corrected within each
    family: the static λ, which ask for the best of them; plain fine-tuning; and all others, which ask whether adapting
    λ helps.
    """
    adjusted: dict[str, float] = {}
    for family in FAMILIES:
        raw = {p: paired_p_value(ours, baseline) for p, ours in values.items() if family(p)}
        adjusted |= holm({p: value for p, value in raw.items() if value is not None})
    return adjusted


def against_best_static(results: Results) -> Table:
    """The score of each policy, and its paired comparison with the best static λ by hindsight."""
    baseline = results.best_static
    if baseline is None or not results.values(baseline, "score"):
        return [], []
    form, ours, fair = BY_NAME["score"].form, results.values(baseline, "score"), results.fair_static
    others, rows = compared(results, baseline, "score"), []
    p_values, fair_p_values = (adjusted_p_values(others, scores) for scores in (ours, fair))
    for policy in (p for p in results.policies if p not in REFERENCES):
        values = results.values(policy, "score")
        row = [policy, *(estimate_text(e(list(values.values())), form) for e in (bootstrap_mean, bootstrap_iqm))]
        if policy == baseline:
            row += ["best static", NOTHING, NOTHING, NOTHING, NOTHING]
        else:
            improvement = probability_of_improvement(values, ours, higher_is_better=True)
            row += [
                estimate_text(paired_difference(values, ours), form),
                estimate_text(improvement, BY_NAME["precision"].form),
                p_text(p_values.get(policy)),
                estimate_text(paired_difference(values, fair), form),
                p_text(fair_p_values.get(policy)),
            ]
        rows.append(row)
    header = ["policy", "score", "IQM", f"score − {baseline}", f"P(better than {baseline})", "p (Holm)"]
    return [*header, "score − static λ of the other seeds", "p (Holm)"], rows


def exchange_rates(results: Results) -> Table:
    """For several exchange rates w of forgetting and damage: the best static λ by hindsight, and the best of the other
    policies against it.
    """
    static = [p for p in results.ranked if p.startswith("static:")]
    others, rows, form = [p for p in results.ranked if FAMILIES[2](p)], [], BY_NAME["score"].form
    if not static or not others or not results.scores(static[0], 1.0):
        return [], []
    for w in RETAIN_COEFS:
        scores = {p: results.scores(p, w) for p in results.ranked}
        means = {p: float(np.mean(list(values.values()))) for p, values in scores.items()}
        baseline, best = (max(family, key=lambda p: means[p]) for family in (static, others))
        p_values = adjusted_p_values({p: scores[p] for p in others}, scores[baseline])
        better = [p for p in others if p_values.get(p, 1.0) < CLEAR and means[p] > means[baseline]]
        rows.append(
            [
                f"{w:g}", baseline, form(means[baseline]), best,
                estimate_text(paired_difference(scores[best], scores[baseline]), form), ", ".join(better) or "none",
            ]
        )  # fmt: skip
    return ["w", "best static", "its score", "best other", "difference", "clearly better than best static"], rows


def paired(results: Results) -> Table:
    """Differences to the best static λ on the same seeds and batches, with 95 % intervals; starred where clear."""
    baseline = results.best_static
    if baseline is None:
        return [], []
    metrics = [m for m in present(results, PAIRED) if results.values(baseline, m.name)]
    theirs = {m.name: results.values(baseline, m.name) for m in metrics}
    ours = {m.name: compared(results, baseline, m.name) for m in metrics}
    p_values, rows = {name: adjusted_p_values(ours[name], theirs[name]) for name in ours}, []
    for policy in (p for p in results.policies if p not in (*REFERENCES, baseline)):
        row = [policy]
        for m in metrics:
            difference = paired_difference(ours[m.name][policy], theirs[m.name])
            star = " *" if p_values[m.name].get(policy, 1.0) < CLEAR else ""
            row.append(estimate_text(difference, m.form) + star)
        rows.append(row)
    return [f"policy − {baseline}", *(m.title for m in metrics)], rows


def crossings(results: Results, policy: str, level: float) -> dict[int, Crossing]:
    """``{seed: where the run first reaches the forget loss}``, of those that do."""
    found = {seed: first_crossing(probe, level) for seed, probe in results.probes(policy).items()}
    return {seed: crossing for seed, crossing in found.items() if crossing is not None}


def retain_rises(results: Results, policy: str, level: float) -> dict[int, float]:
    """Relative rise of the probe's retain loss, in percent, where each run first reaches ``level``."""
    probes, rises = results.probes(policy), {}
    for seed, crossing in crossings(results, policy, level).items():
        start = probes[seed]["retain_loss"][0]
        if start:
            rises[seed] = 100 * (crossing.retain_loss / start - 1)
    return rises


def best_static_at(results: Results, level: float) -> str | None:
    """The static λ whose runs all reach ``level``, at the lowest mean retain loss."""
    rises = {p: retain_rises(results, p, level) for p in results.ranked if p.startswith("static:")}
    whole = {p: float(np.mean(list(r.values()))) for p, r in rises.items() if r and len(r) == len(results.probes(p))}
    return min(whole, key=lambda p: whole[p], default=None)


def matched(results: Results) -> Table:
    """Quality at equal forgetting: runs that reach each level, the retain loss's rise there, and its difference to the
    best static λ at that level, over seeds on which both reach it.
    """
    header, rows = ["policy"], [[p] for p in results.policies if p not in (*REFERENCES, FINETUNE)]
    for level in results.levels:
        baseline = best_static_at(results, level)
        rises = {row[0]: retain_rises(results, row[0], level) for row in rows}
        against = rises.get(baseline or "", {})
        p_values = adjusted_p_values({p: r for p, r in rises.items() if p != baseline}, against)
        header += [f"reach {level:.4f}", "retain rise", f"− {baseline}" if baseline else "–"]
        for row in rows:
            ours = rises[row[0]]
            star = " *" if p_values.get(row[0], 1.0) < CLEAR else ""
            difference = NOTHING if row[0] == baseline else _percent(paired_difference(ours, against)) + star
            row += [f"{len(ours)}/{len(results.of(row[0]))}", _percent(bootstrap_mean(list(ours.values()))), difference]
    return header, rows if results.levels else []


def _percent(value: Estimate) -> str:
    return estimate_text(value, lambda v: f"{v:+.2f} %")


def efforts(results: Results) -> Table:
    """What a policy costs: updates and seconds to each forget level, seconds of environment and of policy in a run,
    and of the training before.
    """
    levels, rows = results.levels, []
    training = results.raw.get("training", {})
    for policy in (p for p in results.policies if p not in REFERENCES):
        row = [policy]
        for level in levels:
            found = list(crossings(results, policy, level).values())
            updates, elapsed = (np.mean([getattr(c, n) for c in found]) if found else 0 for n in ("updates", "seconds"))
            row.append(f"{updates:.1f} / {elapsed:.2f} s ({len(found)})" if found else NOTHING)
        cells = results.of(policy)
        seconds = (training.get(policy) or {}).get("seconds") or max(c.get("training_seconds", 0.0) for c in cells)
        row += [f"{np.mean([c[f'{side}_seconds'] for c in cells]):.2f}" for side in ("env", "policy")]
        row.append(f"{seconds:.1f}" if seconds else NOTHING)
        rows.append(row)
    return ["policy", *(f"to {level:.4f}" for level in levels), "environment s", "policy s", "training s"], rows
