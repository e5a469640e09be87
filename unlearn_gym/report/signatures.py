"""Signatures of failure in the results of a comparison, each a line of warning in the report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from unlearn_gym.comparison.records import FINETUNE, ORACLE, REFERENCES, UNTOUCHED
from unlearn_gym.comparison.results import Results
from unlearn_gym.settings import LAMBDA_ROLES

BOUND_SHARE = 0.9
"""λ is stuck where so much of the run's second half lies at a bound, within 1 % of the range."""
MIN_EFFECTIVE_SAMPLES = 2.0
RETAIN_FACTOR = 1.1
"""A retain loss above so many times the untouched model's is damage."""


def warnings(results: Results) -> list[str]:
    """A line for each signature that a policy shows."""
    policies = [p for p in results.policies if p not in (*REFERENCES, FINETUNE)]
    checks: tuple[Callable[[Results, str], str | None], ...] = (
        diverged, stuck_lambda, concentrated_weights, damaged_retain, over_forgotten,
    )  # fmt: skip
    found = (check(results, policy) for check in checks for policy in policies)
    objective = results.settings["objective"]
    useless = len(policies) > 1 and LAMBDA_ROLES[objective] == "none"
    first = [f"λ does nothing under objective `{objective}`: all policies make the same updates."]
    return [*(first if useless else ()), *(line for line in found if line is not None)]


def diverged(results: Results, policy: str) -> str | None:
    """Runs that ended in losses or parameters that are not finite."""
    cells = results.of(policy)
    count = sum(cell["diverged"] for cell in cells)
    return f"{policy}: {count} of {len(cells)} runs diverged; no figure has them." if count else None


def stuck_lambda(results: Results, policy: str) -> str | None:
    """λ at a bound for most of the second half of runs; a static λ is where it was put."""
    if policy.startswith("static:"):
        return None
    low, high = results.settings["lambda_min"], results.settings["lambda_max"]
    traces = results.traces(policy, "lambda_")
    late, margin = traces[:, traces.shape[1] // 2 :], 0.01 * (high - low)
    for name, bound in (("lower", low), ("upper", high)):
        stuck = int((np.mean(np.abs(late - bound) <= margin, axis=1) >= BOUND_SHARE).sum()) if late.size else 0
        if stuck:
            return f"{policy}: λ stays at its {name} bound {bound} in the second half of {stuck} of {len(late)} runs."
    return None


def concentrated_weights(results: Results, policy: str) -> str | None:
    """Few samples carry a gradient: the effective sample size, a mean over the run."""
    for side in ("retain", "forget"):
        traces = results.traces(policy, f"{side}_ess")
        size = float(np.nanmean(traces)) if traces.size and not np.isnan(traces).all() else np.inf
        if 0 < size < MIN_EFFECTIVE_SAMPLES:  # 0: a side that the objective leaves out
            return (
                f"{policy}: importance weights are concentrated, the {side} gradient of an update comes from "
                f"{size:.1f} effective samples of {results.settings['batch_size']}."
            )
    return None


def damaged_retain(results: Results, policy: str) -> str | None:
    """The retain loss has risen beyond a factor of the untouched model's."""
    before, after = (results.estimate(p, "retain_loss").mean for p in (UNTOUCHED, policy))
    if after > RETAIN_FACTOR * before:
        return f"{policy}: the retain loss rose to {after / before:.2f} times the untouched model's."
    return None


def over_forgotten(results: Results, policy: str) -> str | None:
    """The forget loss is above that of a model that never saw the data: forgotten on purpose, and visibly."""
    losses = results.values(policy, "forget_loss").values()
    if results.cap is None:
        return None
    beyond = sum(loss > results.cap for loss in losses)
    if beyond:
        return (
            f"{policy}: over-forgetting in {beyond} of {len(losses)} runs, the forget loss exceeds the "
            f"{ORACLE}'s {results.cap:.4f}."
        )
    return None
