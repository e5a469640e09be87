"""Quality of a sample set against a retain-only reference set.

All distances are on the features that they are given: those of a task's own classifier, unless a name says Inception.
Their values compare models within this package and nothing outside it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlearn_gym.errors import ResultsError

KID_SUBSETS = 50
KID_SUBSET_SIZE = 200
NEIGHBORHOOD = 3
"""k of the balls of :func:`precision_recall`, as in Kynkäänniemi et al. (2019)."""
SCORE_SPLITS = 10
LEAST_LOG_PROBABILITY = -700.0
"""Smaller ones are rounded up to it, lest a class that no sample has be a logarithm of zero in float64."""
SSIM_SIZE = 11
"""Width of SSIM's window: images must not be smaller."""


def _check_features(*sets: Tensor) -> None:
    """Raise :class:`ResultsError` unless all are ``(N, F)`` of one F >= 1, and finite."""
    shapes = [tuple(features.shape) for features in sets]
    if any(len(shape) != 2 or shape[1] < 1 or shape[1] != shapes[0][-1] for shape in shapes):
        raise ResultsError(
            f"features of shapes {' and '.join(map(str, shapes))} must be (N, F) and (M, F), F at least 1"
        )
    if not all(torch.isfinite(features).all() for features in sets):
        raise ResultsError("the features are not finite; check what the classifier makes of the samples")


def fid(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two feature sets ``(N, F)`` and ``(M, F)``; Heusel et al. (2017). 0 is best.

    Raises :class:`ResultsError` when either has no more rows than columns: the covariance is singular
    and the figure means nothing; and for features that are not finite or of different widths.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    _check_features(features, reference)
    smallest = min(len(features), len(reference))
    if smallest <= features.shape[1]:
        raise ResultsError(
            f"FID on {features.shape[1]} features needs more than {features.shape[1]} samples, not {smallest}"
        )
    statistics = [fid_features_to_statistics(x.double()) for x in (features, reference)]
    for values in statistics:  # numpy gives the variance of one feature as a scalar
        values["sigma"] = np.atleast_2d(values["sigma"])
    return float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])


def kid(features: Tensor, reference: Tensor, *, subset_size: int = KID_SUBSET_SIZE, seed: int = 0) -> float:
    """Unbiased squared kernel distance of two feature sets, cubic kernel; Bińkowski et al. (2018).

    Mean over 50 random subsets; 0 is best, slightly negative values occur. Raises :class:`ResultsError`
    when a set is smaller than ``subset_size``, and for features that are not finite or of different widths.
    """
    from torch_fidelity.metric_kid import mmd2

    _check_features(features, reference)
    smallest = min(len(features), len(reference))
    if smallest < subset_size:
        raise ResultsError(f"KID with subset_size={subset_size} needs at least that many samples, not {smallest}")
    sets = [side.double().cpu().numpy() for side in (features, reference)]
    rng, values = np.random.RandomState(seed), []  # torch-fidelity's subsets
    for _ in range(KID_SUBSETS):
        x, y = (side[rng.choice(len(side), subset_size, replace=False)] for side in sets)
        values.append(mmd2(_cubic_kernel(x, x), _cubic_kernel(x, y), _cubic_kernel(y, y)))
    return float(np.mean(values))


# torch-fidelity's kid_features_to_metric gives the same and takes six times as long, most of it in numpy's power.
def _cubic_kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    kernel = x @ y.T / x.shape[1] + 1.0
    return kernel * kernel * kernel


def class_score(logits: Tensor) -> float:
    """Exponential of E KL(p(y|x) ‖ p(y)) of logits ``(N, C)``, mean over ten splits: the Inception Score of Salimans
    et al. (2016) with another classifier. From 1 (worst) to C. Raises :class:`ResultsError` for fewer than ten samples
    and for logits that give no probabilities.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    if len(logits) < SCORE_SPLITS:
        raise ResultsError(f"the class score needs at least {SCORE_SPLITS} samples, not {len(logits)}")
    log_probabilities = logits.double().log_softmax(1)
    if log_probabilities.isnan().any():
        raise ResultsError("the classifier's logits are not finite; no class follows from them")
    bounded = log_probabilities.clamp(min=LEAST_LOG_PROBABILITY)
    return float(isc_features_to_metric(bounded, splits=SCORE_SPLITS)["inception_score_mean"])


def precision_recall(features: Tensor, reference: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Shares of samples near the reference and of the reference near samples; Kynkäänniemi et al. (2019).

    Both in [0, 1], 1 is best. Near is within the distance to a point's third neighbour of its own set. Both sets
    are cut to the size of the smaller, as the figures depend on sizes; the choice comes from ``seed``. Raises
    :class:`ResultsError` for fewer than 5 samples, and for features that are not finite or of different widths.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    _check_features(features, reference)
    n, generator = min(len(features), len(reference)), torch.Generator().manual_seed(seed)
    if n < NEIGHBORHOOD + 2:
        raise ResultsError(f"precision and recall need at least {NEIGHBORHOOD + 2} samples, not {n}")
    sets = (x[torch.randperm(len(x), generator=generator)[:n]].double() for x in (features, reference))
    precision, recall = calculate_precision_recall_full(*sets, NEIGHBORHOOD)
    return float(precision), float(recall)


def total_variation(shares: Tensor, other: Tensor) -> float:
    """Half the sum of absolute differences of two distributions ``(C,)``: 0 for equal, 1 for disjoint ones."""
    return 0.5 * float((shares - other).abs().sum())


def class_shares(classes: Tensor, num_classes: int) -> Tensor:
    """Share of each class 0..num_classes-1 in ``classes (N,)``."""
    return torch.bincount(classes, minlength=num_classes).double() / len(classes)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity ``(N,)`` of images ``(N, C, H, W)`` in [-1, 1] with ``others``; Wang et al. (2004), by
    torchmetrics. In [-1, 1], 1 for equal images. Raises :class:`ResultsError` when torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise ResultsError("SSIM needs torchmetrics; install it with pip install 'unlearn_gym[metrics]'") from None
    unit, other_unit = ((x.clamp(-1, 1) + 1) / 2 for x in (images, others))
    similarity = structural_similarity_index_measure(unit, other_unit, data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)
    return similarity
