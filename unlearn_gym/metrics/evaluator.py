"""Every metric of a model: what it has forgotten, what its samples are worth, how far it is from the oracle.

``catalogue.py`` says of each what it means; features are those of the task's own classifier unless a name says
Inception.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlearn_gym.errors import ResultsError, SettingsError, UnlearnGymError, error_line
from unlearn_gym.metrics.catalogue import MEASURED
from unlearn_gym.metrics.forgetting import membership_auc, nearest, reconstruction_distance
from unlearn_gym.metrics.inception import inception_features
from unlearn_gym.metrics.judge import EvaluationSettings, Judge, Judged
from unlearn_gym.metrics.likelihood import ode_nll, variational_bound
from unlearn_gym.metrics.probe import probe_grid
from unlearn_gym.metrics.quality import (
    SSIM_SIZE,
    class_score,
    class_shares,
    fid,
    kid,
    precision_recall,
    ssim,
    total_variation,
)
from unlearn_gym.metrics.vae_likelihood import importance_weighted_nll
from unlearn_gym.models.families import FAMILIES, family_of
from unlearn_gym.system.torch_state import insulated
from unlearn_gym.tasks import Task, TaskData, to_model_range

QUALITY = (
    "feature_fid", "feature_kid", "oracle_fid", "oracle_kid", "precision", "recall", "class_score", "class_imbalance",
    "class_accuracy", "ssim_mean",
)  # fmt: skip
COPIES = ("copy_rate", "copy_distance", "ssim_copy")
INCEPTION = ("inception_fid", "inception_kid", "inception_score")
MULTI_STEP = ("multi_step_forget_rate", "multi_step_kid", "multi_step_accuracy")

PROBE_SIZE = 100
"""Samples of each set for reconstructions and for differences of noise predictions."""

LIKELIHOODS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "diffusion": {"bound": variational_bound, "ode": ode_nll},
    "generator": {"bound": variational_bound, "ode": ode_nll},
    "vae": {
        "elbo": lambda *args, alphas_cumprod, **options: importance_weighted_nll(*args, num_importance=1, **options),
        "iw": lambda *args, alphas_cumprod, **options: importance_weighted_nll(*args, **options),
    },
}
"""What ``nll_*_forget`` and ``nll_*_retain`` are computed by, for each family."""


@dataclass
class Figures:
    """Metrics by name, and for each one that could not be computed the reason."""

    values: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        """Take in a value, or its absence where it is not finite."""
        if math.isfinite(value):
            self.values[name] = float(value)
        else:
            self.absent[name] = "not finite"

    def missing(self, reason: str) -> dict[str, str]:
        """The absent metrics with their reasons, ``reason`` for those of which nothing is known."""
        return {name: self.absent.get(name, reason) for name in MEASURED if name not in self.values}

    @contextmanager
    def trying(self, *names: str) -> Iterator[None]:
        """What cannot be computed within is absent, with the error's line as the reason, whatever the error is."""
        try:
            yield
        except Exception as error:
            reasons = {name: reason_of(error) for name in names if name not in self.values}
            self.absent = {**reasons, **self.absent}


def reason_of(error: Exception) -> str:
    """Why a metric is absent, in one line: an error of the package's own explains itself."""
    line = error_line(error)
    return line if isinstance(error, UnlearnGymError) else f"{type(error).__name__}: {line}"


class Evaluation(NamedTuple):
    """Metrics by name, reasons of those that are absent, the forget loss at ten timesteps, and the samples
    ``(N, *S)`` (None where none were drawn).
    """

    metrics: dict[str, float]
    absent: dict[str, str]
    profile: list[float]
    forget_samples: Tensor | None = None
    quality_samples: Tensor | None = None
    is_forget: Tensor | None = None
    """Which of ``forget_samples`` the classifier calls forget data, bool ``(N,)``."""
    finite: bool = True
    """Whether losses and samples are."""


class Evaluator:
    """Evaluates models of one task on the same noise, probes and retain-only reference.

    Metrics that the task cannot have are absent from the result, with the reason.
    """

    @insulated
    def __init__(self, task: Task, data: TaskData, settings: EvaluationSettings | None = None) -> None:
        self.task, self.data, self.settings = task, data, settings or EvaluationSettings()
        self.alphas_cumprod = task.schedule.alphas_cumprod()
        self.judge = Judge(task, data, self.settings)

    @cached_property
    @insulated
    def oracle(self) -> nn.Module | None:
        """The retrained oracle, if the task has one."""
        return self._for_evaluation(self.task.oracle_model()) if self.task.oracle_path.is_file() else None

    @cached_property
    @insulated
    def oracle_samples(self) -> Judged | None:
        """The oracle's samples, of other noise than the models': its own row shows the distance of two draws."""
        if self.oracle is None:
            return None
        judge, s = self.judge, self.settings
        return judge.draw(self.oracle, judge.quality_labels(), s.num_quality_samples, s.seed + 2)

    @insulated
    def evaluate(self, model: nn.Module) -> Evaluation:
        """All metrics of ``model``.

        The losses must be there. Any other metric that cannot be computed is absent, and its reason says what went
        wrong: it takes no other one down. Raises what the model raises when its losses are asked for, and
        :class:`SettingsError` for sizes at which no samples can be drawn.
        """
        model, figures = self._for_evaluation(model), Figures()
        profile = self._losses(model, figures)
        if not all(name in figures.values for name in ("forget_loss", "retain_loss")):
            return Evaluation(figures.values, figures.missing("the losses are not finite"), profile, finite=False)
        with figures.trying("reconstruction_distance"):
            self._reconstruction(model, figures)
        self._predictions(model, figures)
        self._likelihoods(model, figures)
        if self.task.classify is None:
            return self._unjudged(model, figures, profile, "the task has no classifier")
        judge, s = self.judge, self.settings
        try:
            quality = judge.draw(model, judge.quality_labels(), s.num_quality_samples, s.seed)
            forget = judge.draw(model, judge.forget_labels(), s.num_forget_samples, s.seed + 1)
        except SettingsError:
            raise
        except Exception as error:
            return self._unjudged(model, figures, profile, f"samples cannot be drawn and judged ({reason_of(error)})")
        if not all(torch.isfinite(drawn.samples).all() for drawn in (quality, forget)):
            return Evaluation(figures.values, figures.missing("the samples are not finite"), profile, finite=False)
        with figures.trying(*QUALITY):
            self._quality(quality, figures)
        self._inception(figures, lambda: quality.samples)
        is_forget = self._forgetting(forget, figures)
        if family_of(model).name == "generator":
            with figures.trying(*MULTI_STEP):
                self._in_many_steps(model, figures)
        absent = figures.missing("not for this kind of task")
        return Evaluation(figures.values, absent, profile, forget.samples, quality.samples, is_forget)

    def _unjudged(self, model: nn.Module, figures: Figures, profile: list[float], reason: str) -> Evaluation:
        """The evaluation's end where no classifier judges samples: Inception may still."""
        judge, s, drawn = self.judge, self.settings, list[Tensor]()

        def draw() -> Tensor:
            parts = judge.batches(model, judge.quality_labels(), s.num_quality_samples, s.seed)
            drawn.append(torch.cat(list(parts)).cpu())
            return drawn[0]

        self._inception(figures, draw)
        if drawn and not torch.isfinite(drawn[0]).all():
            return Evaluation(figures.values, figures.missing("the samples are not finite"), profile, finite=False)
        absent = figures.missing(reason)
        return Evaluation(figures.values, absent, profile, quality_samples=drawn[0] if drawn else None)

    @insulated
    def draw(self, model: nn.Module, num_forget: int, num_quality: int) -> tuple[Tensor, Tensor]:
        """Up to so many samples ``(N, *S)`` under the forget data's labels and under those to retain, not judged."""
        judge, s, model = self.judge, self.settings, self._for_evaluation(model)
        asked = (
            (judge.forget_labels(), min(num_forget, s.num_forget_samples), s.seed + 1),
            (judge.quality_labels(), min(num_quality, s.num_quality_samples), s.seed),
        )
        forget, quality = (torch.cat(list(judge.batches(model, *what))).cpu() for what in asked)
        return forget, quality

    def _for_evaluation(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(memory_format=torch.channels_last).eval()

    def _grid(self, model: nn.Module, samples: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
        s = self.settings
        return probe_grid(
            model, samples, labels, self.alphas_cumprod, seed=s.seed, batch_size=s.batch_size, **options
        )  # fmt: skip

    def _losses(self, model: nn.Module, figures: Figures) -> list[float]:
        """Losses of each set and the attack on them; returns the forget set's loss at each timestep."""
        data = self.data
        forget = self._grid(model, data.forget, data.forget_labels)
        figures.add("forget_loss", forget.mean().item())
        figures.add("retain_loss", self._grid(model, data.heldout, data.heldout_labels).mean().item())
        if data.unseen is None:
            figures.absent["membership_auc"] = "the task has no unseen data of the forget set's kind"
        else:
            with figures.trying("membership_auc"):
                unseen = self._grid(model, data.unseen, data.unseen_labels)
                figures.add("membership_auc", membership_auc(forget.mean(0), unseen.mean(0)))
        return forget.mean(1).tolist()

    def _reconstruction(self, model: nn.Module, figures: Figures) -> None:
        device, data = next(model.parameters()).device, self.data
        x = to_model_range(data.forget[:PROBE_SIZE]).to(device)
        labels = None if data.forget_labels is None else data.forget_labels[:PROBE_SIZE].to(device)
        alphas_cumprod, clip = self.alphas_cumprod.to(device), self.task.clip
        back = family_of(model).reconstruct(model, x, alphas_cumprod, labels=labels, clip=clip, seed=self.settings.seed)
        figures.add("reconstruction_distance", reconstruction_distance(x, back))

    def _predictions(self, model: nn.Module, figures: Figures) -> None:
        """Mean squared differences of noise predictions: to the closed-form optimum on R, to the oracle on R and F."""
        data = self.data
        if self.task.optimum is not None:
            optimum, alphas_cumprod = self.task.optimum, self.alphas_cumprod
            with figures.trying("optimum_error"):
                error = self._grid(
                    model, data.heldout, data.heldout_labels,
                    target=lambda x_t, t, labels: optimum(x_t, alphas_cumprod.to(x_t.device)[t]),
                )  # fmt: skip
                figures.add("optimum_error", error.mean().item())
        with figures.trying("oracle_error", "oracle_fid", "oracle_kid"):
            if self.oracle is None:
                raise ResultsError(f"no retrained oracle; {self.task.oracle_remedy}")
            sets = ((data.forget, data.forget_labels), (data.heldout, data.heldout_labels))
            oracle = self.oracle.to(next(model.parameters()).device)
            errors = [self._grid(model, *pair, target=oracle, num_samples=PROBE_SIZE).mean() for pair in sets]
            figures.add("oracle_error", torch.stack(errors).mean().item())

    def _likelihoods(self, model: nn.Module, figures: Figures) -> None:
        n, data, device = self.settings.num_likelihood_samples, self.data, next(model.parameters()).device
        for method, compute in LIKELIHOODS[family_of(model).name].items():
            for name, samples, labels in (
                ("forget", data.forget, data.forget_labels), ("retain", data.heldout, data.heldout_labels)
            ):  # fmt: skip
                key = f"nll_{method}_{name}"
                if n == 0:
                    figures.absent[key] = "not asked for; give num_likelihood_samples (--likelihood-samples)"
                    continue
                with figures.trying(key):
                    bits = compute(
                        model, to_model_range(samples[:n]).to(device), alphas_cumprod=self.alphas_cumprod.to(device),
                        labels=None if labels is None else labels[:n].to(device),
                        generator=torch.Generator(device).manual_seed(self.settings.seed),
                        num_levels=256 if samples.dtype == torch.uint8 else None,
                    )  # fmt: skip
                    figures.add(key, bits.mean().item())

    def _in_many_steps(self, model: nn.Module, figures: Figures) -> None:
        """Samples of a one-step generator's fake network, as of any diffusion model."""
        judge, s, many = self.judge, self.settings, FAMILIES["diffusion"]
        labels = judge.quality_labels()
        quality = judge.draw(model, labels, s.num_quality_samples, s.seed, family=many)
        forget = judge.draw(model, judge.forget_labels(), s.num_forget_samples, s.seed + 1, family=many)
        figures.add("multi_step_forget_rate", judge.are_forget_classes(forget.classes).float().mean().item())
        with figures.trying("multi_step_kid"):
            figures.add("multi_step_kid", kid(quality.features, judge.reference.features))
        if labels is not None:
            figures.add("multi_step_accuracy", (quality.classes == labels).float().mean().item())

    def _quality(self, drawn: Judged, figures: Figures) -> None:
        """Metrics of samples of the labels to retain, or of all samples of an unconditional model."""
        labels, reference = self.judge.quality_labels(), self.judge.reference
        self._feature_distances(drawn, figures)
        with figures.trying("class_imbalance", *([] if labels is None else ["class_accuracy"])):
            wanted = reference.classes if labels is None else labels
            shares = (class_shares(classes, drawn.logits.shape[1]) for classes in (drawn.classes, wanted))
            figures.add("class_imbalance", total_variation(*shares))
            if labels is not None:
                figures.add("class_accuracy", (drawn.classes == labels).float().mean().item())
        self._ssim(figures, "ssim_mean", drawn.samples, reference.samples.mean(0, keepdim=True))

    def _feature_distances(self, drawn: Judged, figures: Figures) -> None:
        """How far the samples' features are from those of the reference and of the oracle's samples."""
        expected = self.judge.reference.features
        for name, metric in (("fid", fid), ("kid", kid)):
            with figures.trying(f"feature_{name}"):
                figures.add(f"feature_{name}", metric(drawn.features, expected))
            with figures.trying(f"oracle_{name}"):
                if self.oracle_samples is not None:
                    figures.add(f"oracle_{name}", metric(drawn.features, self.oracle_samples.features))
        with figures.trying("precision", "recall"):
            for name, value in zip(("precision", "recall"), precision_recall(drawn.features, expected), strict=True):
                figures.add(name, value)
        with figures.trying("class_score"):
            figures.add("class_score", class_score(drawn.logits))

    def _forgetting(self, drawn: Judged, figures: Figures) -> Tensor | None:
        """Metrics of samples drawn under the forget data's labels; returns which of them are forget data, if known."""
        judge, is_forget = self.judge, None
        with figures.trying("forget_rate"):
            is_forget = judge.are_forget_classes(drawn.classes)
            figures.add("forget_rate", is_forget.float().mean().item())
        with figures.trying(*COPIES):
            closest = nearest(drawn.samples, judge.forget)
            figures.add("copy_distance", closest.distance.median().item())
            self._ssim(figures, "ssim_copy", drawn.samples, judge.forget[closest.place])
            figures.add("copy_rate", (closest.distance < judge.copy_threshold).float().mean().item())
        return is_forget

    def _ssim(self, figures: Figures, name: str, samples: Tensor, others: Tensor) -> None:
        if samples.dim() != 4 or min(samples.shape[2:]) < SSIM_SIZE:
            figures.absent[name] = f"SSIM is for images of at least {SSIM_SIZE} pixels a side"
            return
        with figures.trying(name):
            figures.add(name, ssim(samples, others.expand_as(samples)).mean().item())

    @cached_property
    def _inception_reference(self) -> Tensor:
        assert self.settings.inception_weights is not None
        return inception_features(to_model_range(self.data.heldout), Path(self.settings.inception_weights))[0]

    def _inception(self, figures: Figures, draw: Callable[[], Tensor]) -> None:
        """Metrics of the samples that ``draw`` returns, where Inception can judge samples of the task."""
        images, weights = self.data.retain.dim() == 4, self.settings.inception_weights
        if not images or weights is None:
            reason = "no Inception weights were given" if images else "Inception features are of images"
            figures.absent |= dict.fromkeys(INCEPTION, reason)
            return
        with figures.trying(*INCEPTION):
            samples = draw()
            if not torch.isfinite(samples).all():
                raise ResultsError("the samples are not finite")
            features, logits = inception_features(samples, Path(weights))
            with figures.trying("inception_score"):
                figures.add("inception_score", class_score(logits))
            for name, metric in (("inception_fid", fid), ("inception_kid", kid)):
                with figures.trying(name):
                    figures.add(name, metric(features, self._inception_reference))
