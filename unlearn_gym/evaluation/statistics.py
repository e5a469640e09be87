"""Means over seeds with intervals, and paired differences."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 5000


class Estimate(NamedTuple):
    """A mean and its 95 % interval; the interval is (mean, mean) when there is nothing to resample."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: list[float], seed: int = 0) -> Estimate:
    """Mean of ``values`` with a percentile-bootstrap 95 % interval over them; NaN for an empty list."""
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0:
        return Estimate(np.nan, np.nan, np.nan)
    mean = float(data.mean())
    if len(data) == 1 or np.ptp(data) == 0 or not np.isfinite(data).all():
        return Estimate(mean, mean, mean)
    interval = bootstrap(
        (data,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> Estimate:
    """Mean of ``values - baseline`` over their common seeds, with its bootstrap interval."""
    return bootstrap_mean([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])
