"""Metrics of a model's samples and losses.

FID and KID here are computed on the features of the shipped classifier (or the task's own), never on Inception
features: their values compare models within this package and nothing outside it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from unlearn_gym.diffusion import sample
from unlearn_gym.errors import ResultsError
from unlearn_gym.tasks import Task, TaskData, to_model_range
from unlearn_gym.tasks.probe import set_losses

KID_SUBSETS = 50
KID_SUBSET_SIZE = 200


def fid(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two feature sets ``(N, F)`` and ``(M, F)``; Heusel et al. (2017). 0 is best.

    Raises :class:`ResultsError` when either has no more rows than columns: the covariance is singular
    and the figure means nothing.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    smallest = min(len(features), len(reference))
    if smallest <= features.shape[1]:
        raise ResultsError(f"FID on {features.shape[1]} features needs more than {smallest} samples")
    statistics = (fid_features_to_statistics(x.double()) for x in (features, reference))
    return float(fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])


def kid(features: Tensor, reference: Tensor, *, subset_size: int = KID_SUBSET_SIZE, seed: int = 0) -> float:
    """Unbiased squared kernel distance of two feature sets, cubic kernel; Bińkowski et al. (2018).

    Mean over 50 random subsets; 0 is best, slightly negative values occur. Raises :class:`ResultsError`
    when a set is smaller than ``subset_size``.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    smallest = min(len(features), len(reference))
    if smallest < subset_size:
        raise ResultsError(f"KID with subset_size={subset_size} needs at least that many samples, not {smallest}")
    with contextlib.redirect_stdout(io.StringIO()):
        result = kid_features_to_metric(
            features.double(), reference.double(),
            kid_subsets=KID_SUBSETS, kid_subset_size=subset_size, rng_seed=seed, verbose=False,
        )  # fmt: skip
    return float(result["kernel_inception_distance_mean"])


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of ``hits`` in ``n``."""
    interval = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class EvaluationSettings:
    """Size of an evaluation: samples for the forget rate, for quality, and the sampler's steps."""

    num_forget_samples: int = 1000
    num_quality_samples: int = 500
    num_inference_steps: int | None = None
    batch_size: int = 125
    seed: int = 7

    def validate(self) -> None:
        """Raise :class:`ResultsError` for sizes from which a metric cannot be computed."""
        if self.num_forget_samples < 1:
            raise ResultsError(f"num_forget_samples={self.num_forget_samples} must be at least 1")
        if self.num_quality_samples < KID_SUBSET_SIZE:
            raise ResultsError(
                f"num_quality_samples={self.num_quality_samples} is too few for KID; take at least {KID_SUBSET_SIZE}"
            )


class Judged(NamedTuple):
    """Samples ``(N, *S)``, their features ``(N, F)`` and classes ``(N,)`` by the task's classifier, on the CPU."""

    samples: Tensor
    features: Tensor
    classes: Tensor


_REFERENCES: dict[tuple[Any, str], Tensor] = {}


def reference_features(task: Task, data: TaskData) -> Tensor:
    """Features ``(M, F)`` of the held-out retain data, computed once per process and content (by its SHA-256)."""
    classify = task.classifier
    digest = hashlib.sha256(data.heldout.cpu().contiguous().numpy().tobytes()).hexdigest()
    if (classify, digest) not in _REFERENCES:
        _REFERENCES[classify, digest] = classify(to_model_range(data.heldout))[0]
    return _REFERENCES[classify, digest]


class Evaluation(NamedTuple):
    """Metrics by name, and the samples ``(N, *S)`` that they were computed from (None without a classifier)."""

    metrics: dict[str, float]
    forget_samples: Tensor | None
    quality_samples: Tensor | None
    is_forget: Tensor | None
    """Which of ``forget_samples`` the classifier calls forget data, bool ``(N,)``."""


class Evaluator:
    """Evaluates models of one task on the same noise, probe and retain-only reference.

    The metrics are ``forget_rate`` (share of ``num_forget_samples`` samples, under
    the label that the forget data was learned with, that the task's classifier calls forget data),
    ``forget_loss`` and ``retain_loss`` (noise-prediction loss on a fixed grid, of the forget set and of
    held-out retain data), ``fid``, ``kid`` (against held-out retain data) and ``class_accuracy`` (share of
    class-conditional samples, labels equally often, that the classifier assigns to their label).
    Metrics that the task cannot have are absent.
    """

    def __init__(self, task: Task, data: TaskData, settings: EvaluationSettings | None = None) -> None:
        self.task, self.data, self.settings = task, data, settings or EvaluationSettings()
        self.alphas_cumprod = task.schedule.alphas_cumprod()
        self.reference = None if task.classify is None else reference_features(task, data)

    def evaluate(self, model: nn.Module) -> Evaluation:
        """All metrics of ``model``; raises :class:`ResultsError` when samples are too few for one."""
        model = copy.deepcopy(model).to(memory_format=torch.channels_last).eval()
        figures = set_losses(
            model, self.data, self.alphas_cumprod, seed=self.settings.seed, batch_size=self.settings.batch_size
        )
        if self.reference is None:
            return Evaluation(figures, None, None, None)
        labels = self.quality_labels()
        quality = self.draw(model, labels, self.settings.num_quality_samples, self.settings.seed)
        if torch.isfinite(quality.features).all():
            figures["fid"] = fid(quality.features, self.reference)
            figures["kid"] = kid(quality.features, self.reference)
        if labels is not None:
            figures["class_accuracy"] = (quality.classes == labels).float().mean().item()
        forget = self.draw(model, self.forget_labels(), self.settings.num_forget_samples, self.settings.seed + 1)
        is_forget = self.are_forget_classes(forget.classes)
        figures["forget_rate"] = is_forget.float().mean().item()
        return Evaluation(figures, forget.samples, quality.samples, is_forget)

    @torch.inference_mode()
    def draw(self, model: nn.Module, labels: Tensor | None, n: int, seed: int) -> Judged:
        """``n`` samples from the noise of ``seed``, on the model's device; each batch is judged as it comes."""
        device = next(model.parameters()).device
        alphas_cumprod, s = self.alphas_cumprod.to(device), self.settings
        noise = torch.randn((n, *self.data.retain.shape[1:]), generator=torch.Generator().manual_seed(seed))
        parts = []
        for start in range(0, n, s.batch_size):
            part = slice(start, start + s.batch_size)
            samples = sample(
                model, noise[part].to(device), alphas_cumprod, clip=self.task.clip,
                labels=None if labels is None else labels[part].to(device),
                num_inference_steps=s.num_inference_steps or self.task.num_inference_steps,
            )  # fmt: skip
            parts.append([x.cpu() for x in (samples, *self.task.classifier(samples))])
        return Judged(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def quality_labels(self) -> Tensor | None:
        """Every label equally often, ``(num_quality_samples,)``; None for an unconditional model."""
        if self.data.retain_labels is None:
            return None
        n, classes = self.settings.num_quality_samples, self.data.retain_labels.unique()
        return classes.repeat(n // len(classes) + 1)[:n]

    def forget_labels(self) -> Tensor | None:
        """The label that the forget data was learned with, ``(num_forget_samples,)``; None if unconditional."""
        label = self.task.probe_label
        return None if label is None else torch.full((self.settings.num_forget_samples,), label)

    def are_forget_classes(self, classes: Tensor) -> Tensor:
        """Which of ``classes (N,)`` are forget data, bool ``(N,)``."""
        return torch.isin(classes, torch.tensor(self.task.forget_classes))

    def calibration(self) -> dict[str, float]:
        """What the classifier says of real data: share called forget data in held-out retain data (of the
        probe label, where there is one) and in the forget set itself.
        """
        heldout = self.data.heldout
        if self.task.probe_label is not None and self.data.heldout_labels is not None:
            heldout = heldout[self.data.heldout_labels == self.task.probe_label]
        called = [self.task.classifier(to_model_range(samples))[1] for samples in (heldout, self.data.forget)]
        retain_rate, forget_rate = (self.are_forget_classes(classes).float().mean().item() for classes in called)
        return {
            "retain_called_forget": retain_rate,
            "forget_called_forget": forget_rate,
            "num_retain": float(len(heldout)),
            "num_forget": float(len(self.data.forget)),
        }
