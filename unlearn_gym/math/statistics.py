"""Estimates over seeds with intervals, paired comparisons of policies, and tests of many of them.

Every interval is a 95 % percentile bootstrap of ``RESAMPLES`` seeded draws; of fewer than about ten values it covers
clearly less than 95 %. A NaN among the values makes an estimate NaN and a test None: it says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import scipy  # loads its stats when they are used, which takes a second
from numpy.typing import NDArray

from unlearn_gym.errors import ResultsError

RESAMPLES = 5000
MIN_PAIRS, MIN_POINTS = 5, 3

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """An estimate (``mean``, whatever it is of) and its 95 % interval; no width when there is nothing to resample."""

    mean: float
    low: float
    high: float


UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))


@lru_cache(maxsize=8)
def _draws(n: int, seed: int) -> NDArray[np.intp]:
    """Indices of ``n`` draws with replacement, ``(RESAMPLES, n)``; read-only, as callers share them."""
    indices = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    indices.flags.writeable = False
    return indices


@lru_cache(maxsize=8)
def _counts(n: int, seed: int) -> Array:
    """How often each of ``n`` is drawn, ``(RESAMPLES, n)``: whole numbers as floats; read-only."""
    flat = _draws(n, seed) + n * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(flat.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(np.float64)
    counts.flags.writeable = False
    return counts


def _with_interval(estimate: float, resampled: Array) -> Estimate:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(estimate, float(low), float(high))


# Indices drawn once and one vectorised pass: scipy.stats.bootstrap takes three to six times as long.
def _bootstrap(values: Sequence[float], statistic: Callable[[Array], Any], seed: int) -> Estimate:
    """``statistic`` (over the last axis) of ``values`` with its interval."""
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0 or np.isnan(data).any():
        return UNKNOWN
    estimate = float(statistic(data))
    if not np.isfinite(data).all() or np.ptp(data) == 0:
        return Estimate(estimate, estimate, estimate)
    return _with_interval(estimate, statistic(data[_draws(len(data), seed)]))


def _interquartile_mean(data: Array) -> Any:
    """scipy.stats.trim_mean(data, 0.25, axis=-1), which takes five times as long."""
    n = data.shape[-1]
    return np.sort(data, axis=-1)[..., n // 4 : n - n // 4].mean(axis=-1)


def bootstrap_mean(values: list[float], seed: int = 0) -> Estimate:
    """Mean of ``values`` with a percentile-bootstrap 95 % interval over them; NaN for an empty list."""
    return _bootstrap(values, lambda data: data.mean(axis=-1), seed)


def bootstrap_iqm(values: list[float], seed: int = 0) -> Estimate:
    """Interquartile mean of ``values``, Agarwal et al. (2021), with its bootstrap 95 % interval; NaN for none.

    The mean without the lowest and the highest ⌊n/4⌋ values, in their unit: with fewer than 4 it is the mean. A
    lone infinite value does not move it, but leaves it without an interval.
    """
    return _bootstrap(values, _interquartile_mean, seed)


def _common(values: dict[int, float], baseline: dict[int, float]) -> tuple[Array, Array]:
    """Both sides over their common seeds, ``(n,)`` each in the same order."""
    seeds = sorted(values.keys() & baseline.keys())
    ours, theirs = (np.array([side[seed] for seed in seeds], dtype=np.float64) for side in (values, baseline))
    return ours, theirs


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> Estimate:
    """Mean of ``values - baseline`` over their common seeds, with its bootstrap interval."""
    return bootstrap_mean([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def probability_of_improvement(
    values: dict[int, float], baseline: dict[int, float], *, higher_is_better: bool, seed: int = 0
) -> Estimate:
    """Probability in [0, 1] that a run of ``values`` is better than one of ``baseline``; Agarwal et al. (2021).

    The share of all n² pairs of runs over the n common seeds (``{seed: value}``), ties as half: Mann-Whitney's U over
    n². Seeds are resampled jointly, since both runs of a seed share its batches; so a list against itself is 0.5
    exactly. An infinite value counts as the best or the worst. NaN without a common seed. Where every pair is won the
    interval has no width, however few the seeds: read the p-value beside it.
    """
    ours, theirs = _common(values, baseline)
    n = len(ours)
    if n == 0 or np.isnan([ours, theirs]).any():
        return UNKNOWN
    better = np.greater if higher_is_better else np.less
    wins = better(ours[:, None], theirs) + 0.5 * np.equal(ours[:, None], theirs)
    counts = _counts(n, seed)
    # Halves times whole numbers are exact: nothing is divided before the end.
    return _with_interval(float(wins.sum()) / n**2, ((counts @ wins) * counts).sum(axis=1) / n**2)


def paired_p_value(values: dict[int, float], baseline: dict[int, float]) -> float | None:
    """Two-sided p-value in (0, 1] of Wilcoxon's (1945) signed-rank test over the common seeds.

    Exact for every n, ties included: the distribution over all 2^n signs of the observed ranks; differences of 0 are
    dropped. The smallest value n seeds can give is 2^(1-n): 0.0625 of 5. None for fewer than 5 common seeds or a
    difference that is not finite; 1.0 where every difference is 0, as equal runs are no evidence of a difference and
    still count as one of the comparisons made.
    """
    ours, theirs = _common(values, baseline)
    if len(ours) < MIN_PAIRS or not np.isfinite([ours, theirs]).all():
        return None
    differences = ours - theirs
    largest = np.abs(differences).max()
    if largest == 0:
        return 1.0
    scaled = np.round(differences / largest, 12)  # differences of shares k/n tie only up to their last bits
    return _signed_rank_p_value(scaled[scaled != 0])


# scipy.stats.wilcoxon gives the same without ties, takes 30 to 60 ms with them and is not exact from 14 pairs on.
def _signed_rank_p_value(differences: Array) -> float:
    ranks = np.rint(2 * scipy.stats.rankdata(np.abs(differences))).astype(int)  # tied ranks are halves
    total = int(ranks.sum())
    probability = np.zeros(total + 1)  # of each sum of the ranks whose sign is +
    probability[0] = 1.0
    for rank in ranks:
        probability = (probability + np.concatenate([np.zeros(rank), probability[:-rank]])) / 2
    positive = int(ranks[differences > 0].sum())
    return min(1.0, 2 * float(probability[: min(positive, total - positive) + 1].sum()))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Step-down adjusted p-values of Holm (1979), under the same keys in the same order.

    To call a comparison clear where its adjusted value is at most α keeps the probability of any false call at α or
    below, whatever the dependence. Raises :class:`ResultsError` for a p-value outside [0, 1].
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise ResultsError(f"the p-value of {name} is {p}, not within [0, 1]; leave that comparison out")
    adjusted, largest = dict(p_values), 0.0
    for tested, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        adjusted[name] = largest = max(largest, min(1.0, (len(p_values) - tested) * p_values[name]))
    return adjusted


def spearman(
    x: Sequence[float], y: Sequence[float], groups: Sequence[Any] | None = None, seed: int = 0
) -> Estimate | None:
    """Spearman's rank correlation in [-1, 1] of a run's ``x`` with its ``y``, with its bootstrap 95 % interval.

    Runs of one seed share their batches and are no independent draws: with their seeds as ``groups`` (an id a run)
    whole groups are resampled, and the interval is one over seeds. Resamples in which a side is constant are left
    out. None for fewer than 3 runs, a constant side or a NaN. Raises :class:`ResultsError` for lists of different
    lengths.
    """
    ids = range(len(x)) if groups is None else groups
    if not len(x) == len(y) == len(ids):
        raise ResultsError(f"{len(x)} x, {len(y)} y and {len(ids)} groups do not pair up; give one of each a run")
    data = np.array([x, y], dtype=np.float64)
    if len(x) < MIN_POINTS or np.isnan(data).any() or min(len(np.unique(side)) for side in data) < 2:
        return None
    members = {name: i for i, name in enumerate(dict.fromkeys(ids))}
    counts = _counts(len(members), seed)[:, [members[name] for name in ids]]
    correlations = _rank_correlation(data[0], data[1], np.concatenate([np.ones((1, len(x))), counts]))
    return _with_interval(float(correlations[0]), correlations[1:][np.isfinite(correlations[1:])])


def _rank_correlation(x: Array, y: Array, counts: Array) -> Array:
    """Spearman's ρ of each resample, ``(R,)``, from how often it holds each run, ``counts (R, n)``; NaN if constant."""
    n = counts.sum(axis=1, keepdims=True)
    a, b = (r - (counts * r).sum(axis=1, keepdims=True) / n for r in (_ranks(x, counts), _ranks(y, counts)))
    covariance, *variances = ((counts * product).sum(axis=1) for product in (a * b, a * a, b * b))
    with np.errstate(invalid="ignore"):
        return np.clip(covariance / np.sqrt(variances[0] * variances[1]), -1.0, 1.0)


def _ranks(values: Array, counts: Array) -> Array:
    """Mean rank of each run within each resample, ``(R, n)``, without sorting any resample."""
    distinct, position = np.unique(values, return_inverse=True)
    ties = counts @ np.eye(len(distinct))[position]
    return (np.cumsum(ties, axis=1) - (ties - 1) / 2)[:, position]


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of ``hits`` in ``n``; Wilson (1927)."""
    interval = scipy.stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)
