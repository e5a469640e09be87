"""Samples of a model, and what the task's classifier and the forget set say of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlearn_gym.errors import ResultsError, shown
from unlearn_gym.metrics.forgetting import copy_threshold, nearest
from unlearn_gym.metrics.inception import check_weights
from unlearn_gym.metrics.probe import equally, learned_labels
from unlearn_gym.metrics.quality import KID_SUBSET_SIZE
from unlearn_gym.models.families import Family, family_of
from unlearn_gym.system.memory import check_memory
from unlearn_gym.system.torch_state import insulated
from unlearn_gym.tasks import Task, TaskData, to_model_range

SAMPLE_COPIES = 3
"""Samples are held as they are drawn, as one tensor, and once more where they are compared."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Size of an evaluation.

    ``num_forget_samples`` are drawn under the forget data's labels, ``num_quality_samples`` under all others;
    ``num_likelihood_samples`` of each set get a likelihood (0: none, it costs seconds a sample); Inception features
    are measured where ``inception_weights`` names torch-fidelity's file.
    """

    num_forget_samples: int = 1000
    num_quality_samples: int = 1000
    num_inference_steps: int | None = None
    batch_size: int = 125
    seed: int = 7
    num_likelihood_samples: int = 0
    inception_weights: str | None = None

    def validate(self) -> None:
        """Raise :class:`ResultsError` for sizes from which a metric cannot be computed."""
        if self.num_forget_samples < 1:
            raise ResultsError(
                f"num_forget_samples={shown(self.num_forget_samples)} (--forget-samples) must be at least 1"
            )
        if self.num_quality_samples < KID_SUBSET_SIZE:
            raise ResultsError(
                f"num_quality_samples={shown(self.num_quality_samples)} (--quality-samples) is too few for KID; "
                f"take at least {KID_SUBSET_SIZE}"
            )
        if self.num_likelihood_samples < 0:
            raise ResultsError(f"num_likelihood_samples={shown(self.num_likelihood_samples)} must be at least 0")
        if self.inception_weights is not None:
            check_weights(Path(self.inception_weights))

    def check_memory(self, data: TaskData) -> None:
        """Raise ``SettingsError`` where the samples do not go into memory."""
        one = SAMPLE_COPIES * 4 * data.heldout[0].numel()
        for name in ("num_forget_samples", "num_quality_samples", "num_likelihood_samples", "batch_size"):
            check_memory(getattr(self, name) * one, f"{name}={shown(getattr(self, name))}")


class Judged(NamedTuple):
    """Samples ``(N, *S)``, their features ``(N, F)`` and logits ``(N, C)`` by the task's classifier, on the CPU."""

    samples: Tensor
    features: Tensor
    logits: Tensor

    @property
    def classes(self) -> Tensor:
        """The most likely classes ``(N,)``, see :func:`most_likely`."""
        return most_likely(self.logits)


def most_likely(logits: Tensor) -> Tensor:
    """The classes ``(N,)`` of the largest of ``logits (N, C)``; raises :class:`ResultsError` where some are NaN."""
    unknown = int(logits.isnan().any(1).sum())
    if unknown:
        raise ResultsError(f"the classifier's logits of {unknown} of {len(logits)} samples are not numbers")
    return logits.argmax(1)


_REFERENCES: dict[tuple[Any, str], Judged] = {}


@insulated
def judged_reference(task: Task, data: TaskData) -> Judged:
    """The held-out retain data, judged once per process and content (by its SHA-256)."""
    digest = hashlib.sha256(data.heldout.cpu().contiguous().numpy().tobytes()).hexdigest()
    key = (task.classifier, digest)
    if key not in _REFERENCES:
        samples = to_model_range(data.heldout)
        _REFERENCES[key] = Judged(samples, *task.classifier(samples))
    return _REFERENCES[key]


class Judge:
    """Draws samples of a task's models and judges them, always on the same noise and labels."""

    def __init__(self, task: Task, data: TaskData, settings: EvaluationSettings | None = None) -> None:
        self.task, self.data, self.settings = task, data, settings or EvaluationSettings()
        self.settings.check_memory(data)
        self.alphas_cumprod = task.schedule.alphas_cumprod()

    @cached_property
    def reference(self) -> Judged:
        """The held-out retain data, judged."""
        return judged_reference(self.task, self.data)

    @cached_property
    @insulated
    def forget(self) -> Tensor:
        """The forget set without repetitions, in model range."""
        return to_model_range(self.data.forget.unique(dim=0))

    @cached_property
    @insulated
    def copy_threshold(self) -> float:
        """Distance to the forget set below which a sample counts as a copy."""
        return copy_threshold(to_model_range(self._retain_like_forget()), self.forget)

    @insulated
    @torch.inference_mode()
    def draw(
        self, model: nn.Module, labels: Tensor | None, n: int, seed: int, *, family: Family | None = None
    ) -> Judged:
        """``n`` samples from the noise of ``seed``, on the model's device; each batch is judged as it comes.

        ``family`` draws them as from a model of another family than its own.
        """
        parts = [
            [x.cpu() for x in (samples, *self.task.classifier(samples))]
            for samples in self.batches(model, labels, n, seed, family)
        ]
        return Judged(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @torch.inference_mode()
    def batches(
        self, model: nn.Module, labels: Tensor | None, n: int, seed: int, family: Family | None = None
    ) -> Iterator[Tensor]:
        """The samples of :meth:`draw`, on the model's device, batch by batch and not judged."""
        device = next(model.parameters()).device
        alphas_cumprod, s = self.alphas_cumprod.to(device), self.settings
        family = family or family_of(model)
        shape = family.noise_shape(model, self.data.retain.shape[1:])
        noise = torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed))
        for start in range(0, n, s.batch_size):
            part = slice(start, min(start + s.batch_size, n))
            yield family.sample(
                model, noise[part].to(device), alphas_cumprod, clip=self.task.clip,
                labels=None if labels is None else labels[part].to(device),
                num_inference_steps=s.num_inference_steps or self.task.num_inference_steps,
            )  # fmt: skip

    def quality_labels(self) -> Tensor | None:
        """Every retained label equally often, ``(num_quality_samples,)``; None for an unconditional model."""
        if self.data.retain_labels is None:
            return None
        return equally(self.data.retain_labels.unique(), self.settings.num_quality_samples)

    def forget_labels(self) -> Tensor | None:
        """The labels that the forget data was learned with, ``(num_forget_samples,)``; None if unconditional."""
        return learned_labels(self.task, self.data, self.settings.num_forget_samples)

    def are_forget_classes(self, classes: Tensor) -> Tensor:
        """Which of ``classes (N,)`` are forget data, bool ``(N,)``."""
        return torch.isin(classes, torch.tensor(self.task.forget_classes))

    def _retain_like_forget(self) -> Tensor:
        """Held-out retain data under the forget data's labels, where there is any; else all of it."""
        heldout, labels = self.data.heldout, self.data.heldout_labels
        if labels is None:
            return heldout
        learned = learned_labels(self.task, self.data, len(labels))
        alike = torch.isin(labels, labels[:0] if learned is None else learned)
        return heldout[alike] if alike.any() else heldout

    @insulated
    def calibration(self) -> dict[str, float]:
        """What the judges say of real data: shares called forget data, and copies, among held-out retain data (of
        the forget data's labels, where there is any) and unseen data of the forget set's kind; of the forget set
        itself, which is its own copy, the first alone.
        """
        sets = {"retain": self._retain_like_forget(), "forget": self.data.forget, "unseen": self.data.unseen}
        figures: dict[str, float] = {"copy_threshold": self.copy_threshold}
        for name, samples in sets.items():
            if samples is None:
                continue
            x = to_model_range(samples)
            called = self.are_forget_classes(most_likely(self.task.classifier(x)[1]))
            figures |= {f"{name}_called_forget": called.float().mean().item(), f"num_{name}": float(len(x))}
            if name != "forget":
                copies = nearest(x, self.forget).distance < self.copy_threshold
                figures[f"{name}_called_copies"] = copies.float().mean().item()
        return figures
