"""The report's pictures, from the results alone."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from unlearn_gym.comparison.records import FINETUNE, ORACLE, REFERENCES, UNTOUCHED, unpack_samples
from unlearn_gym.comparison.results import Results
from unlearn_gym.files import replacing
from unlearn_gym.math.diffusion import grid_timesteps
from unlearn_gym.math.statistics import Estimate, spearman
from unlearn_gym.metrics.pictures import draw_samples

HITS_SHOWN, GRID_SIZE = 20, 40
KNOWN = (
    FINETUNE, "prior", "random", "linear", "cosine", "exponential", "variational:pathwise",
    "variational:score_function", "variational:kl_only", "variational:variance", "ppo", "ppo-potential",
)  # fmt: skip
"""Policies with a colour of their own, the same in every picture."""
MAX_LINES = 8
MIN_SEEDS = 8
"""A percentile bootstrap of fewer values covers far less than 95 %."""


def color(policy: str) -> Any:
    """The colour of a policy in every picture: by λ for a static one, the same for each name otherwise."""
    if policy in REFERENCES:
        return "black" if policy == UNTOUCHED else "dimgray"
    if policy.startswith("static:"):
        return colormaps["viridis"](min(max(float(policy.removeprefix("static:")), 0.0), 1.0))
    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    if policy in KNOWN:
        return palette[KNOWN.index(policy)]
    digest = zlib.crc32(policy.encode())
    family = [i for i, name in enumerate(KNOWN) if policy.startswith(f"{name}:")]
    if not family:
        return colormaps["hsv"](digest % 256)
    shade = 0.25 + 0.5 * (digest % 97) / 97  # a variant: its family's colour, darker or lighter
    return tuple(c * 2 * shade if shade < 0.5 else c + (1 - c) * (2 * shade - 1) for c in palette[family[0]])


def save(figure: Figure, path: Path) -> Path:
    """Write the picture as PNG."""
    FigureCanvasAgg(figure)
    with replacing(path) as file:
        figure.savefig(file, dpi=130, format="png")
    return path


def bare(axes: Axes) -> None:
    """Without the upper and right border."""
    axes.spines[["top", "right"]].set_visible(False)


def draw_front(results: Results, path: Path) -> Path:
    """Forgetting against its cost: a point a policy, with intervals; stars for the references.

    Left the forget rate of samples, right the forget set's own loss; both against held-out retain loss.
    """
    names = [n for n in ("forget_rate", "forget_loss") if results.values(UNTOUCHED, n)]
    figure = Figure(figsize=(4.2 * len(names) + 2.2, 4.8), layout="constrained")
    panels = figure.subplots(1, len(names), sharex=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for policy in results.policies:
            x, y = results.estimate(policy, "retain_loss"), results.estimate(policy, name)
            if not np.isfinite([x.mean, y.mean]).all():
                continue
            panel.errorbar(
                x.mean, y.mean, xerr=[[x.mean - x.low], [x.high - x.mean]], yerr=[[y.mean - y.low], [y.high - y.mean]],
                fmt="*" if policy in REFERENCES else "o", markersize=13 if policy in REFERENCES else 6,
                color=color(policy), elinewidth=1, capsize=2, label=policy if panel is panels[0] else None,
            )  # fmt: skip
        panel.set(xlabel="retain loss (held-out), lower is better", ylabel=name.replace("_", " "))
        if results.values(ORACLE, name):
            panel.axhline(results.estimate(ORACLE, name).mean, color="dimgray", linewidth=0.8, linestyle=":")
        panel.xaxis.set_major_locator(MaxNLocator(4))
        bare(panel)
    dotted = "; dotted: the oracle" if ORACLE in results.policies else ""
    figure.suptitle(f"{results.task}: means and 95 % intervals{dotted}", fontsize=10)
    columns = 1 + (len(results.policies) - 1) // 24
    figure.legend(loc="outside right center", fontsize=7 if columns > 1 else 8, frameon=False, ncols=columns)
    return save(figure, path)


def draw_lambdas(results: Results, path: Path) -> Path:
    """λ over the run, one small panel a policy: every seed thin, their mean thick. Static λ are left out."""
    named = [p for p in results.policies if p not in (*REFERENCES, FINETUNE)]
    named = [p for p in named if not p.startswith("static:")] or named
    columns = min(4, max(1, len(named)))
    rows = max(1, -(-len(named) // columns))
    figure = Figure(figsize=(2.6 * columns, 1.7 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, policy in zip(panels, named, strict=False):
        traces = results.traces(policy, "lambda_")
        steps = np.arange(1, traces.shape[1] + 1)
        panel.plot(steps, traces.T, color=color(policy), linewidth=0.6, alpha=0.5)
        panel.plot(steps, np.nanmean(traces, axis=0), color=color(policy), linewidth=1.8)
        panel.set_title(policy, fontsize=8)
        panel.tick_params(labelbottom=True)
        bare(panel)
    for panel in panels[len(named) :]:
        panel.set_axis_off()
    s = results.settings
    panels[0].set(ylim=(s["lambda_min"] - 0.03, s["lambda_max"] + 0.03))
    figure.supxlabel("update", fontsize=9)
    figure.supylabel("λ", fontsize=9)
    return save(figure, path)


def draw_profile(results: Results, path: Path) -> Path:
    """The forget set's loss at each timestep, over the untouched model's: where in the diffusion forgetting happens."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    panel = figure.subplots()
    profiles = {p: [c["profile"] for c in results.of(p) if c.get("profile")] for p in results.policies}
    start = np.array(profiles[UNTOUCHED][0])
    shown = [*REFERENCES, *sorted(results.ranked, key=lambda p: -results.estimate(p, "forget_loss").mean)]
    shown = [p for p in shown if profiles.get(p)]
    if len(shown) > MAX_LINES + len(REFERENCES):  # a few lines spread over the ranking say as much as all of them
        keep = np.linspace(len(REFERENCES), len(shown) - 1, MAX_LINES).round().astype(int)
        shown = [*shown[: len(REFERENCES)], *(shown[i] for i in keep)]
    timesteps = grid_timesteps(results.raw.get("num_train_timesteps", 1000), len(start))
    for policy in shown:
        style = "--" if policy in REFERENCES else "-"
        mean = np.mean(profiles[policy], axis=0) / start
        panel.plot(timesteps, mean, style, color=color(policy), marker=".", label=policy)
    panel.set(xlabel="timestep t", ylabel="forget loss / untouched model's", yscale="log")
    panel.yaxis.set_major_formatter(LogFormatter())
    panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # 1.5, where 1.5 × 10⁰ would stand
    shown_of = f", {MAX_LINES} of {len(results.ranked)} policies" if len(results.ranked) > MAX_LINES else ""
    panel.set_title(f"{results.task}: forget loss over timesteps, most forgetful first{shown_of}", fontsize=9)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    bare(panel)
    return save(figure, path)


def draw_returns(results: Results, path: Path) -> Path:
    """The return against what is wanted: one point a run, one panel a figure of merit."""
    names = [n for n in ("score", "forget_loss", "retain_loss") if any(results.values(p, n) for p in results.policies)]
    figure = Figure(figsize=(3.4 * len(names) + 1.6, 3.8), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        xs, ys, seeds = returns_and(results, name)
        for policy in results.policies:
            x, y = (results.values(policy, n) for n in ("episode_return", name))
            common = sorted(x.keys() & y.keys())
            label = policy if panel is panels[0] and common else None
            panel.scatter([x[s] for s in common], [y[s] for s in common], s=9, color=color(policy), label=label)
        found = spearman(xs, ys, groups=seeds)
        rho = "" if found is None else f"Spearman {correlation_text(results, found)}"
        panel.set(xlabel=f"return (reward={results.settings.get('reward', 'siss')})", ylabel=name.replace("_", " "))
        panel.set_title(rho, fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        bare(panel)
    columns = 1 + (len(results.policies) - 1) // 20
    figure.legend(loc="outside right center", fontsize=6, frameon=False, ncols=columns, markerscale=1.5)
    return save(figure, path)


def correlation_text(results: Results, found: Estimate) -> str:
    """A rank correlation, with its interval over seeds where there are enough of them."""
    if len(results.seeds) < MIN_SEEDS:
        return f"{found.mean:+.2f}"
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def returns_and(results: Results, metric: str) -> tuple[list[float], list[float], list[int]]:
    """Return, metric and seed of every SISS run that has both."""
    rows = [
        (returns[seed], values[seed], seed)
        for policy in results.policies if policy not in (*REFERENCES, FINETUNE)
        for returns, values in [(results.values(policy, "episode_return"), results.values(policy, metric))]
        for seed in returns.keys() & values.keys()
    ]  # fmt: skip
    xs, ys, seeds = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    return xs, ys, [int(seed) for seed in seeds]


def draw_sample_grids(results: Results, policy: str, path: Path) -> Path:
    """Samples from the same noise: untouched, ``policy``, the oracle.

    Images: above under the forget data's label, first the noises that the untouched model turns into forget
    data; below of all labels to retain. Points: one scatter each.
    """
    pictures = {c["policy"]: c["pictures"] for c in reversed(results.cells) if c.get("pictures")}
    shown = [p for p in (UNTOUCHED, policy, ORACLE) if p in pictures]
    hits = pictures[UNTOUCHED]["forget_hits"][:HITS_SHOWN]
    drawn = {p: [unpack_samples(pictures[p][name]) for name in ("forget", "quality")] for p in shown}
    order = [*hits, *(i for i in range(len(drawn[UNTOUCHED][0])) if i not in hits)][:GRID_SIZE]
    images = drawn[UNTOUCHED][0].ndim == 4
    figure = Figure(figsize=(4.2 * len(shown), 4.2), layout="constrained")
    panels = figure.subplots(2 if images else 1, len(shown), squeeze=False)
    for column, name in enumerate(shown):
        forget, quality = drawn[name]
        panels[0, column].set_title(name, fontsize=10)
        draw_samples(panels[0, column], forget[order] if images else forget, columns=10)
        if images:
            draw_samples(panels[1, column], quality, columns=10)
    title = "samples from the same noise"
    if policy in shown:
        title += f"; {'in the middle' if len(shown) == 3 else 'on the right'} the policy that forgot most"
    if images and hits:
        title += f"; top: first the {len(hits)} that the untouched model turns into forget data; bottom: to retain"
    elif images:
        title += "; with labels: top those of the forget data, bottom those to retain"
    figure.suptitle(title, fontsize=9)
    return save(figure, path)
