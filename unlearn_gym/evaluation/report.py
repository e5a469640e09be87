"""Tables and pictures from the results of a comparison, and nothing but them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from unlearn_gym.envs.rendering import draw_samples
from unlearn_gym.evaluation.cell import FINETUNE, ORACLE, REFERENCES, UNTOUCHED, unpack_samples
from unlearn_gym.evaluation.metrics import wilson_interval
from unlearn_gym.evaluation.statistics import Estimate, bootstrap_mean, paired_difference

Results = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """How a metric is headed, printed and read."""

    name: str
    title: str
    form: Callable[[float], str]


METRICS = (
    Metric("forget_rate", "forget rate", lambda v: f"{100 * v:.1f} %"),
    Metric("forget_loss", "forget loss", lambda v: f"{v:.4f}"),
    Metric("retain_loss", "retain loss", lambda v: f"{v:.4f}"),
    Metric("kid", "KID", lambda v: f"{v:.2f}"),
    Metric("fid", "FID", lambda v: f"{v:.2f}"),
    Metric("class_accuracy", "class accuracy", lambda v: f"{100 * v:.1f} %"),
    Metric("mean_lambda", "mean λ", lambda v: f"{v:.2f}"),
    Metric("episode_return", "return", lambda v: f"{v:.2f}"),
)
HITS_SHOWN, GRID_SIZE = 20, 40
MIN_SEEDS_TO_STAR = 8
"""A percentile bootstrap of fewer values covers far less than 95 %: no verdict on fewer."""

ON_TERMINAL = ("forget_rate", "forget_loss", "retain_loss", "kid", "class_accuracy")
PAIRED = ("forget_rate", "forget_loss", "retain_loss", "kid", "episode_return")


def policies_in(results: Results) -> list[str]:
    """Rows in the order of the comparison: the references first."""
    return list(dict.fromkeys(cell["policy"] for cell in results["cells"]))


def per_seed(results: Results, policy: str, name: str) -> dict[int, float]:
    """``{seed: value}`` of a metric, of the return or of the run's mean λ; diverged runs have no metrics."""
    values = {}
    for cell in (c for c in results["cells"] if c["policy"] == policy):
        lambdas = cell.get("trace", {}).get("lambda_")
        figures = {**cell, **cell["metrics"], "mean_lambda": float(np.mean(lambdas)) if lambdas else None}
        values[cell["seed"]] = figures.get(name)
    return {seed: value for seed, value in values.items() if value is not None}


def estimate(results: Results, policy: str, name: str) -> Estimate:
    """Mean over seeds with its bootstrap interval."""
    return bootstrap_mean(list(per_seed(results, policy, name).values()))


def _cell_text(value: Estimate, form: Callable[[float], str]) -> str:
    if not np.isfinite(value.mean):
        return "–"
    if value.low == value.high:
        return form(value.mean)
    return f"{form(value.mean)} [{form(value.low)}, {form(value.high)}]"


def summary_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table: mean and 95 % interval over seeds of each metric."""
    present = [m for m in METRICS if any(per_seed(results, p, m.name) for p in policies_in(results))]
    header = ["policy", "seeds", *(m.title for m in present), "diverged", "run s", "evaluation s"]
    rows = []
    for policy in policies_in(results):
        cells = [c for c in results["cells"] if c["policy"] == policy]
        seconds = [c["env_seconds"] + c["policy_seconds"] for c in cells if "env_seconds" in c]
        rows.append(
            [
                policy,
                "–" if policy in REFERENCES else str(len(cells)),
                *(_cell_text(estimate(results, policy, m.name), m.form) for m in present),
                "–" if policy in REFERENCES else str(sum(c["diverged"] for c in cells)),
                f"{np.mean(seconds):.1f}" if seconds else "–",
                f"{np.mean([c['evaluation_seconds'] for c in cells]):.1f}",
            ]
        )
    return header, rows


def terminal_rows(results: Results, *, intervals: bool) -> tuple[list[str], list[list[str]]]:
    """The main figures alone, for a terminal: means, with intervals below them where there is room."""
    shown = [m for m in METRICS if m.name in ON_TERMINAL and per_seed(results, UNTOUCHED, m.name)]
    rows = []
    for policy in policies_in(results):
        row = [policy]
        for m in shown:
            mean, low, high = estimate(results, policy, m.name)
            text = m.form(mean) if np.isfinite(mean) else "diverged"
            row.append(text + (f"\n{m.form(low)} … {m.form(high)}" if intervals and low < high else ""))
        rows.append(row)
    return ["policy", *(m.title for m in shown)], rows


def baseline_policy(results: Results) -> str | None:
    """What the others are paired with: static:0.5 if it ran, else the first static λ."""
    static = [p for p in policies_in(results) if p.startswith("static:")]
    return "static:0.5" if "static:0.5" in static else (static[0] if static else None)


def paired_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Differences to the baseline on the same seeds and batches, with 95 % intervals."""
    baseline = baseline_policy(results)
    if baseline is None:
        return [], []
    metrics = [m for m in METRICS if m.name in PAIRED and per_seed(results, baseline, m.name)]
    rows = []
    for policy in policies_in(results):
        if policy in (*REFERENCES, baseline):
            continue
        row = [policy]
        for m in metrics:
            difference = paired_difference(per_seed(results, policy, m.name), per_seed(results, baseline, m.name))
            row.append(_cell_text(difference, m.form) + (" *" if is_clear(results, policy, difference) else ""))
        rows.append(row)
    return [f"policy − {baseline}", *(m.title for m in metrics)], rows


def is_clear(results: Results, policy: str, difference: Estimate) -> bool:
    """Whether a paired difference's interval excludes 0 on enough seeds to say so."""
    enough = len(per_seed(results, policy, "retain_loss")) >= MIN_SEEDS_TO_STAR
    return enough and difference.low != difference.high and (difference.low > 0 or difference.high < 0)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A GitHub table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def diverged_in(results: Results) -> set[str]:
    """Policies of which at least one run diverged."""
    return {c["policy"] for c in results["cells"] if c["diverged"]}


def ranked_in(results: Results) -> list[str]:
    """Policies that are compared with each other: no reference, no baseline, none that diverged."""
    return [p for p in policies_in(results) if p not in (*REFERENCES, FINETUNE, *diverged_in(results))]


def most_forgetful(results: Results) -> str:
    """The ranked policy with the lowest forget rate and, among equals, the highest forget loss; "" if none."""

    def remembering(policy: str) -> tuple[float, float]:
        rates = list(per_seed(results, policy, "forget_rate").values())
        return float(np.mean(rates)) if rates else 0.0, -estimate(results, policy, "forget_loss").mean

    return min(ranked_in(results), key=remembering, default="")


def verdict(results: Results) -> list[str]:
    """Who forgot most at what cost, in sentences made from the figures; policies that diverged do not rank."""
    diverged, ranked = diverged_in(results), ranked_in(results)
    if not ranked:
        return ["No policy finished all its runs."]
    shown = [m for m in METRICS[:3] if per_seed(results, ranked[0], m.name)]

    def figures(policy: str) -> str:
        return ", ".join(f"{m.title} {_cell_text(estimate(results, policy, m.name), m.form)}" for m in shown)

    most = most_forgetful(results)
    cheapest = min(ranked, key=lambda p: estimate(results, p, "retain_loss").mean)
    oracle_loss = estimate(results, ORACLE, "forget_loss").mean
    closest = min(ranked, key=lambda p: abs(estimate(results, p, "forget_loss").mean - oracle_loss))
    lines = [
        f"Untouched model: {figures(UNTOUCHED)}. Retrained oracle: {figures(ORACLE)}.",
        f"Forgot most (lowest forget rate, then highest forget loss): **{most}**: {figures(most)}.",
        f"Closest to the oracle's forget loss: **{closest}**: {figures(closest)}.",
        f"Lowest retain loss: **{cheapest}**: {figures(cheapest)}.",
    ]
    seeds = len(results["comparison"]["seeds"])
    if seeds < MIN_SEEDS_TO_STAR:
        lines.append(f"Intervals over {seeds} seed(s) are far too narrow; take {MIN_SEEDS_TO_STAR} or more to compare.")
    if diverged:
        lines.append(f"Diverged in at least one run, and not ranked: {', '.join(sorted(diverged))}.")
    return lines


def _notes(results: Results) -> list[str]:
    comparison, s = results["comparison"], results["settings"]
    evaluation, calibration = comparison["evaluation"], results["calibration"]
    lines = [
        f"- Task `{comparison['task']}`, {s['horizon']} updates of {s['optimizer']} at {s['learning_rate']:g}, batch "
        f"{s['batch_size']}, λ in [{s['lambda_min']}, {s['lambda_max']}], data-set factors `{s['dataset_factors']}`, "
        f"forget gradient rule `{s['forget_grad_rule']}` {s['forget_grad_norm']:g}, clip {s['max_grad_norm']}; "
        f"{results['num_retain']} retain and {results['num_forget']} forget samples.",
        "- Every policy of a seed starts from the same weights and draws the same samples, noise and mask uniforms.",
        f"- Losses: noise prediction on a fixed grid of (t, noise); retain loss on held-out data. Samples: "
        f"{evaluation['num_forget_samples']} under the forget data's label for the forget rate, "
        f"{evaluation['num_quality_samples']} of all labels for KID, FID and class accuracy, "
        f"{results['num_inference_steps']} steps of DPM-Solver++(2M), the same noise for every model.",
        f"- KID and FID: {results['feature_dim']} features of the task's own classifier, not Inception; reference: "
        f"{results['num_reference']} held-out retain samples, no forget data.",
        "- Intervals: 95 % percentile bootstrap over seeds; a reference row has none. They are too narrow for few "
        f"seeds, so a paired difference is starred only from {MIN_SEEDS_TO_STAR} seeds on, where its interval excludes "
        "0; stars are not corrected for the number of comparisons.",
    ]
    n = evaluation["num_forget_samples"]
    for policy in REFERENCES:
        for share in per_seed(results, policy, "forget_rate").values():
            low, high = wilson_interval(round(share * n), n)
            lines.append(
                f"- Forget rate of the {policy} model: {100 * share:.1f} %, Wilson 95 % interval "
                f"[{100 * low:.1f}, {100 * high:.1f}] % by its {n} samples alone."
            )
    lines.append(
        f"- A forget rate of 0.0 % in a run excludes rates above {100 * wilson_interval(0, n)[1]:.1f} % (Wilson)."
    )
    if calibration:
        lines.append(
            f"- Calibration of the classifier on real data: it calls {100 * calibration['retain_called_forget']:.2f} % "
            f"of {calibration['num_retain']:.0f} held-out retain samples of the probe label forget data, and "
            f"{100 * calibration['forget_called_forget']:.1f} % of the {calibration['num_forget']:.0f} forget samples."
        )
    return lines


def write_report(results: Results, out: Path) -> Path:
    """Write ``report.md`` and the pictures beside it; returns the report's path."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = [draw_front(results, out / "front.png"), draw_lambdas(results, out / "lambdas.png")]
    if any(c["policy"] == UNTOUCHED and c.get("pictures") for c in results["cells"]):
        pictures.append(draw_sample_grids(results, out / "samples.png"))
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    sections = [
        f"# Comparison on {results['comparison']['task']}",
        "\n".join(f"{line}  " for line in verdict(results)),
        markdown_table(*summary_rows(results)),
    ]
    header, rows = paired_rows(results)
    if rows:
        sections += ["## Paired differences", markdown_table(header, rows)]
    sections += ["\n\n".join(f"![{p.stem}]({p.name})" for p in pictures), "## How it was measured"]
    sections += ["\n".join(_notes(results)), f"Made by `{results['command']}` with {versions}."]
    path = out / "report.md"
    path.write_text("\n\n".join(sections) + "\n")
    return path


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return path


def _colors(results: Results) -> dict[str, Any]:
    from matplotlib import colormaps

    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    named = [p for p in policies_in(results) if p not in REFERENCES]
    colors: dict[str, Any] = {p: palette[i % len(palette)] for i, p in enumerate(named)}
    return {**colors, UNTOUCHED: "black", ORACLE: "dimgray"}


def draw_front(results: Results, path: Path) -> Path:
    """Forgetting against its cost: a point a policy, with intervals; stars for the references.

    Left the forget rate of samples, right the forget set's own loss; both against held-out retain loss.
    """
    names = [n for n in ("forget_rate", "forget_loss") if per_seed(results, UNTOUCHED, n)]
    figure = Figure(figsize=(4.2 * len(names) + 2.2, 4.4), layout="constrained")
    colors = _colors(results)
    panels = figure.subplots(1, len(names), sharex=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for policy in policies_in(results):
            x, y = estimate(results, policy, "retain_loss"), estimate(results, policy, name)
            if not np.isfinite([x.mean, y.mean]).all():
                continue
            panel.errorbar(
                x.mean, y.mean, xerr=[[x.mean - x.low], [x.high - x.mean]], yerr=[[y.mean - y.low], [y.high - y.mean]],
                fmt="*" if policy in REFERENCES else "o", markersize=13 if policy in REFERENCES else 6,
                color=colors[policy], elinewidth=1, capsize=2, label=policy if panel is panels[0] else None,
            )  # fmt: skip
        panel.set(xlabel="retain loss (held-out), lower is better", ylabel=name.replace("_", " "))
        panel.axhline(estimate(results, ORACLE, name).mean, color="dimgray", linewidth=0.8, linestyle=":")
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{results['comparison']['task']}: means and 95 % intervals; dotted: the oracle", fontsize=10)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return _save(figure, path)


def _traces(results: Results, policy: str, name: str) -> NDArray[np.float64]:
    traces = [c["trace"][name] for c in results["cells"] if c["policy"] == policy and "trace" in c]
    longest = max((len(t) for t in traces), default=0)
    return np.array([t + [None] * (longest - len(t)) for t in traces], dtype=np.float64).reshape(len(traces), longest)


def draw_lambdas(results: Results, path: Path) -> Path:
    """λ over the run, one small panel a policy: every seed thin, their mean thick."""
    named = [p for p in policies_in(results) if p not in (*REFERENCES, FINETUNE)]
    columns = min(4, max(1, len(named)))
    rows = -(-len(named) // columns)
    figure = Figure(figsize=(2.6 * columns, 1.7 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    colors = _colors(results)
    for panel, policy in zip(panels, named, strict=False):
        traces = _traces(results, policy, "lambda_")
        steps = np.arange(1, traces.shape[1] + 1)
        panel.plot(steps, traces.T, color=colors[policy], linewidth=0.6, alpha=0.5)
        panel.plot(steps, np.nanmean(traces, axis=0), color=colors[policy], linewidth=1.8)
        panel.set_title(policy, fontsize=8)
        panel.tick_params(labelbottom=True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(named) :]:
        panel.set_axis_off()
    s = results["settings"]
    panels[0].set(ylim=(s["lambda_min"] - 0.03, s["lambda_max"] + 0.03))
    figure.supxlabel("update", fontsize=9)
    figure.supylabel("λ", fontsize=9)
    return _save(figure, path)


def draw_sample_grids(results: Results, path: Path) -> Path:
    """Samples from the same noise: untouched, the policy that forgot most, the oracle.

    Images: above under the forget data's label, first the noises that the untouched model turns into forget
    data; below of all labels. Points: one scatter each.
    """
    pictures = {c["policy"]: c["pictures"] for c in reversed(results["cells"]) if c.get("pictures")}
    shown = [p for p in (UNTOUCHED, most_forgetful(results), ORACLE) if p in pictures]
    hits = pictures[UNTOUCHED]["forget_hits"][:HITS_SHOWN]
    order = [*hits, *(i for i in range(GRID_SIZE + len(hits)) if i not in hits)][:GRID_SIZE]
    drawn = {p: [unpack_samples(pictures[p][name]) for name in ("forget", "quality")] for p in shown}
    images = drawn[UNTOUCHED][0].dim() == 4
    figure = Figure(figsize=(4.2 * len(shown), 4.2), layout="constrained")
    panels = figure.subplots(2 if images else 1, len(shown), squeeze=False)
    for column, policy in enumerate(shown):
        forget, quality = drawn[policy]
        panels[0, column].set_title(policy, fontsize=10)
        draw_samples(panels[0, column], forget[order] if images else forget, columns=10)
        if images:
            draw_samples(panels[1, column], quality, columns=10)
    title = "samples from the same noise; in the middle the policy that forgot most"
    if images:
        title += f"; top: first the {len(hits)} that the untouched model turns into forget data; bottom: of all labels"
    figure.suptitle(title, fontsize=9)
    return _save(figure, path)
