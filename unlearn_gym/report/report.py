"""The report of a comparison: tables, pictures, warnings and how it was measured, from its results alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unlearn_gym.comparison.records import FINETUNE, ORACLE, REFERENCES, UNTOUCHED
from unlearn_gym.comparison.results import Results
from unlearn_gym.files import write_text
from unlearn_gym.math.statistics import spearman, wilson_interval
from unlearn_gym.metrics.catalogue import BY_NAME
from unlearn_gym.report import pictures, tables
from unlearn_gym.report.pictures import MIN_SEEDS
from unlearn_gym.report.signatures import warnings
from unlearn_gym.report.tables import estimate_text, markdown_table
from unlearn_gym.settings import FAMILY_OPTIONS, LAMBDA_ROLES, OWN_FORGET_RULES
from unlearn_gym.system.locks import folder_lock

FIGURES = ("forget_rate", "forget_loss", "retain_loss")


LOSSES = {
    "diffusion": "Losses: noise prediction on a fixed grid of (t, noise)",
    "generator": "Losses: the fake network's noise prediction on a fixed grid of (t, noise)",
    "vae": "Losses: negative ELBO, nats per pixel without a constant, at ten fixed draws of noise",
}
ROLE_TEXTS = {
    "mixture": "λ is the probability of drawing the forget sample",
    "weight": "λ is the forget term's weight, 1-λ the retain term's",
    "none": "λ does nothing",
}
SAMPLING = {
    "diffusion": "{steps} steps of DPM-Solver++(2M)",
    "generator": "one step of the generator, where a metric's name says so {steps} of DPM-Solver++(2M)",
    "vae": "the decoder's means at latents from the prior",
}
"""What the protocol says of a model's family."""


def write_report(results: Results, out: Path) -> Path:
    """Write ``report.md`` and the pictures beside it; returns the report's path."""
    with folder_lock(out):
        return _write_report(results, out)


def _write_report(results: Results, out: Path) -> Path:
    made = f"Made by `{results.raw['command']}`" if results.raw["command"] else "Made from Python"
    sections = [
        f"# Comparison on {results.task}",
        "\n".join(f"{line}  " for line in verdict(results)),
        markdown_table(*tables.summary(results)),
        *_section("Against the best static λ", tables.against_best_static(results), BEST_STATIC),
        *_section("Does the answer depend on the exchange rate?", tables.exchange_rates(results), EXCHANGE),
        *_section("Paired differences", tables.paired(results), PAIRED + _without_scores(results)),
        *_section("At equal forgetting", tables.matched(results), MATCHED),
        *_section("Effort", tables.efforts(results), TO_LEVELS + EFFORT if results.levels else EFFORT.capitalize()),
        *_warnings(results),
        "## Does the reward pay for what is wanted?",
        "\n".join(f"- {line}" for line in reward_lines(results)),
        "\n\n".join(f"![{p.stem}]({p.name})" for p in draw_pictures(results, out)),
        *_section("Other metrics", tables.remaining(results), "Means over seeds."),
        "## How it was measured",
        "\n".join(f"- {line}" for line in [*_protocol(results), *_calibration(results), *_absences(results)]),
        f"{made} with {', '.join(f'{k} {v}' for k, v in results.raw['versions'].items())}; "
        f"{hours(results):.2f} core hours.",
    ]
    path = out / "report.md"
    write_text(path, "\n\n".join(sections) + "\n")
    return path


BEST_STATIC = (
    "The best static λ is that of the highest mean score over these very seeds, so it is chosen with hindsight. IQM is "
    "the mean of the middle half. P is over all pairs of seeds (Agarwal et al., 2021); p-values are of Wilcoxon's "
    "signed-rank test on the paired scores, Holm-corrected among the static λ and, apart from these, among all others "
    "but fine-tuning. The last columns compare without hindsight: with the static λ that is best on the other seeds. "
    "n seeds give no p-value below 2^(1-n), so a comparison that is not clear shows no difference and no equality "
    "either: read the interval."
)
EXCHANGE = (
    "The score takes w times the relative rise of the retain loss from the share forgotten. Clearly better: p < 0.05, "
    "Holm-corrected over all that are not static. Both bests are chosen with hindsight, for which the "
    "interval is not corrected."
)
PAIRED = (
    "On the same seeds and batches. A star: p < 0.05 by Wilcoxon's signed-rank test, Holm-corrected in its column "
    "among the static λ and, apart from these, among all others but fine-tuning."
)
MATCHED = (
    "Each run's forget and retain loss are measured along it on a fixed probe. Where a run first reaches a forget "
    "loss (at a quarter, half and three quarters of the geometric way from the untouched model to the oracle), how "
    "much has its retain loss risen? Compared with the static λ that does best there, of those that always "
    "arrive, over seeds on which both do; means are of the runs that arrive, and "
    "runs that diverged later count as far as they came."
)
TO_LEVELS = "Mean updates and seconds to each forget loss, of the runs (their number) that reach it; "
EFFORT = "seconds of a run, as the clock went while other runs shared the machine."


def _without_scores(results: Results) -> str:
    """To which static λ differences are taken where there are no scores that could choose it."""
    return "" if results.has_scores else f" There are no scores, so differences are to {results.best_static}."


def _section(title: str, table: tables.Table, text: str) -> list[str]:
    header, rows = table
    return [f"## {title}", text, markdown_table(header, rows)] if rows else []


def _warnings(results: Results) -> list[str]:
    lines = warnings(results)
    return ["## Warnings", "\n".join(f"- {line}" for line in lines)] if lines else []


def draw_pictures(results: Results, out: Path) -> list[Path]:
    """All pictures that the results allow, written to ``out``."""
    drawn = [pictures.draw_front(results, out / "front.png"), pictures.draw_lambdas(results, out / "lambdas.png")]
    if results.family != "vae" and any(cell.get("profile") for cell in results.of(UNTOUCHED)):
        drawn.append(pictures.draw_profile(results, out / "profile.png"))
    if len(pictures.returns_and(results, "retain_loss")[0]) > 1:
        drawn.append(pictures.draw_returns(results, out / "returns.png"))
    if any(cell.get("pictures") for cell in results.of(UNTOUCHED)):
        drawn.append(pictures.draw_sample_grids(results, most_forgetful(results), out / "samples.png"))
    return drawn


def most_forgetful(results: Results) -> str:
    """The ranked policy with the lowest forget rate and, among equals, the highest forget loss; "" if none."""

    def remembering(policy: str) -> tuple[float, float]:
        rates = list(results.values(policy, "forget_rate").values())
        return float(np.mean(rates)) if rates else 0.0, -results.estimate(policy, "forget_loss").mean

    return min(results.ranked, key=remembering, default="")


def verdict(results: Results) -> list[str]:
    """Who forgot most at what cost, in sentences made from the figures; policies that diverged do not rank."""
    ranked = results.ranked
    if not ranked:
        return ["No policy finished all its runs."]
    shown = [BY_NAME[n] for n in FIGURES if results.values(ranked[0], n)]

    def figures(policy: str) -> str:
        return ", ".join(f"{m.title} {estimate_text(results.estimate(policy, m.name), m.form)}" for m in shown)

    most = most_forgetful(results)
    cheapest = min(ranked, key=lambda p: results.estimate(p, "retain_loss").mean)
    lines = [f"Untouched model: {figures(UNTOUCHED)}."]
    lines.append(
        f"Retrained oracle: {figures(ORACLE)}."
        if results.cap is not None
        else f"No score: {results.of(UNTOUCHED)[0].get('absent', {}).get('oracle_error', 'no retrained oracle')}."
    )
    order = "lowest forget rate, then highest" if shown[0].name == "forget_rate" else "highest"
    lines.append(f"Forgot most ({order} forget loss): **{most}**: {figures(most)}.")
    if results.cap is not None:
        cap = results.cap
        closest = min(ranked, key=lambda p: abs(results.estimate(p, "forget_loss").mean - cap))
        lines.append(f"Closest to the oracle's forget loss: **{closest}**: {figures(closest)}.")
    lines.append(f"Lowest retain loss: **{cheapest}**: {figures(cheapest)}.")
    if all(results.values(p, "score") for p in ranked):
        form = BY_NAME["score"].form
        best = max(ranked, key=lambda p: results.estimate(p, "score").mean)
        lines.append(f"Highest score: **{best}**: {estimate_text(results.estimate(best, 'score'), form)}.")
        if results.best_static is not None and any(not p.startswith("static:") for p in ranked):
            better = ", ".join(f"**{p}**" for p in tables.clearly_better(results)) or "no other policy"
            lines.append(f"Clearly better than the best static λ by hindsight, {results.best_static}: {better}.")
        for baseline in (UNTOUCHED, FINETUNE):
            mean = results.estimate(baseline, "score").mean
            if mean > results.estimate(best, "score").mean:
                lines.append(f"Not ranked, and better than all by this score: {baseline} ({form(mean)}).")
    seeds = {p: set(results.values(p, "retain_loss")) for p in ranked}
    fewest = min(len(s) for s in seeds.values())
    if len({frozenset(s) for s in seeds.values()}) > 1:
        lines.append("Policies ran on different seeds: compare them in the paired columns, not by their means.")
    if fewest < MIN_SEEDS:
        kind = "no intervals" if fewest == 1 else "intervals that are far too narrow"
        lines.append(f"{fewest} seed(s) give {kind}; take {MIN_SEEDS} or more.")
    if results.diverged:
        lines.append(f"Diverged in at least one run, and not ranked: {', '.join(sorted(results.diverged))}.")
    return lines


MERITS = ("score", "forget_loss", "retain_loss", "feature_kid")


def reward_correlations(results: Results) -> dict[str, str]:
    """Spearman correlation over all SISS runs of the return with each figure of merit, as text; those that exist."""
    found = {}
    for name in MERITS:
        xs, ys, seeds = pictures.returns_and(results, name)
        rho = spearman(xs, ys, groups=seeds)
        if rho is not None:
            found[name] = f"{pictures.correlation_text(results, rho)} over {len(xs)} runs"
    return found


def reward_lines(results: Results) -> list[str]:
    """:func:`reward_correlations` in sentences."""
    lines = [
        f"Return and {BY_NAME[name].title}: Spearman {text}, seeds resampled."
        for name, text in reward_correlations(results).items()
    ]
    return lines or ["Too few runs to say."]


def hours(results: Results) -> float:
    """Core hours of all cells, as their clocks ran."""
    clocks = ("env_seconds", "policy_seconds", "evaluation_seconds")
    return sum(cell.get(clock, 0.0) for cell in results.cells for clock in clocks) / 3600


def _objective_text(results: Results) -> str:
    """What was minimised, what λ was there, and the options of the model's family."""
    name = results.settings["objective"]
    options = [f", `{option}` {results.settings[option]}" for option in FAMILY_OPTIONS[results.family]]
    return f"objective `{name}`: {ROLE_TEXTS[LAMBDA_ROLES[name]]}{''.join(options)}"


def _rule_text(results: Results) -> str:
    """The rule for the forget gradient, where the objective does not bring its own."""
    s = results.settings
    if s["objective"] in OWN_FORGET_RULES:
        return ""
    norm = "" if s["forget_grad_rule"] == "loss" else f" {s['forget_grad_norm']:g}"
    return f"forget gradient rule `{s['forget_grad_rule']}`{norm}, "


def _clip_text(results: Results) -> str:
    """How the gradient was clipped, and of what: errors summed over pixels make it D times larger."""
    s = results.settings
    by_value = "" if s["max_grad_value"] is None else f", entries at {s['max_grad_value']:g}"
    return f"clip {s['max_grad_norm']}{by_value}{', errors summed over pixels' * (s['loss_reduction'] == 'sum')}"


def _samples_text(results: Results) -> str:
    """How many samples were drawn, under which labels, and for what."""
    evaluation = results.raw["comparison"]["evaluation"]
    quality = f"{evaluation['num_quality_samples']} of"
    if results.raw["feature_dim"] is not None:
        return f"{evaluation['num_forget_samples']} of the forget data's labels, {quality} those to retain"
    return f"{quality} the labels to retain" if evaluation.get("inception_weights") else "for the pictures alone"


def _protocol(results: Results) -> list[str]:
    s, evaluation = results.settings, results.raw["comparison"]["evaluation"]
    rate = f"Score: w = {s['potential_retain_coef']:g}. " if results.has_scores else ""
    lines = [
        f"Task `{results.task}`, {_objective_text(results)}.",
        f"{s['horizon']} updates of {s['optimizer']} at {s['learning_rate']:g}, batch "
        f"{s['batch_size']}, λ in [{s['lambda_min']}, {s['lambda_max']}], data-set factors `{s['dataset_factors']}`, "
        f"{_rule_text(results)}1+s = {s['forget_scale']:g}, {_clip_text(results)}; "
        f"{results.raw['num_retain']} retain and {results.raw['num_forget']} forget samples.",
        *(f"`{name}` is `{spec}`." for name, spec in results.raw["comparison"].get("named", {}).items()),
        "Every policy of a seed starts from the same weights and sees the same samples, noise and mask uniforms.",
        f"{LOSSES[results.family]}; retain loss on held-out data. Samples: {_samples_text(results)}; "
        f"{SAMPLING[results.family].format(steps=results.raw['num_inference_steps'])}, one noise.",
        f"{rate}Intervals: 95 % percentile bootstrap over seeds; a reference row has none.",
    ]
    if results.raw["feature_dim"] is not None:
        lines.append(
            f"KID, FID: {results.raw['feature_dim']} features of the task's own classifier, not Inception; against "
            f"{results.raw['num_reference']} held-out retain samples, no forget data. docs/metrics.md has every metric."
        )
    n = evaluation["num_forget_samples"]
    for policy in REFERENCES:
        for share in results.values(policy, "forget_rate").values():
            low, high = wilson_interval(round(share * n), n)
            lines.append(
                f"Forget rate of the {policy} model: {100 * share:.1f} %, Wilson 95 % interval "
                f"[{100 * low:.1f}, {100 * high:.1f}] % by its {n} samples alone."
            )
    if results.values(UNTOUCHED, "forget_rate"):
        zero = 100 * wilson_interval(0, n)[1]
        lines.append(f"A forget rate of 0.0 % in a run excludes rates above {zero:.1f} % (Wilson).")
    if FINETUNE in results.policies:
        lines.append(f"`{FINETUNE}` is plain training on retain data (λ = 0, no forget gradient), the naive baseline.")
    return lines


def _calibration(results: Results) -> list[str]:
    c = results.raw["calibration"]
    if not c:
        return []
    kinds = {"retain": "held-out retain", "forget": "forget", "unseen": "unseen samples of the forget set's kind"}
    kinds = {kind: words for kind, words in kinds.items() if f"num_{kind}" in c}
    copied = [kind for kind in kinds if f"{kind}_called_copies" in c]
    called = "; ".join(
        f"{100 * c[f'{kind}_called_forget']:.2f} % of {c[f'num_{kind}']:.0f} {words}" for kind, words in kinds.items()
    )
    copies = "; ".join(f"{100 * c[f'{kind}_called_copies']:.2f} % of {kinds[kind]}" for kind in copied)
    return [
        f"Calibration on real data: the classifier calls forget data {called}.",
        f"A copy is closer than {c['copy_threshold']:.3f} to the forget set, as are {copies}: where that last share is "
        "large, it finds the kind of image rather than the image.",
    ]


def _absences(results: Results) -> list[str]:
    """Metrics that no run has, with the reasons, and those that only some have."""
    reasons = {name: reason for cell in results.cells for name, reason in cell.get("absent", {}).items()}
    lacking = {n: sum(n in cell.get("absent", {}) for cell in results.cells) for n in reasons}
    never = {n: r for n, r in reasons.items() if not any(results.values(p, n) for p in results.policies)}
    by_reason = {reason: [n for n, r in never.items() if r == reason] for reason in dict.fromkeys(never.values())}
    lines = [f"Not measured: {', '.join(names)} ({reason})." for reason, names in by_reason.items()]
    return lines + [
        f"{name} is absent in {lacking[name]} of {len(results.cells)} runs ({reason})."
        for name, reason in reasons.items()
        if name not in never
    ]
