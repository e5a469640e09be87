"""What is retained, what is forgotten and what was never seen, as tensors; torchvision's data sets as such."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from unlearn_gym.errors import DataError, error_line
from unlearn_gym.models.weights import read_tensors, save_weights

SIZES = ("retain_size", "forget_size")

IMAGE_LIMIT = 1.001
"""What float images may reach, with some room for rounding."""

Labelled = tuple[Tensor, Tensor]
"""Samples ``(N, *S)`` and their labels, int64 ``(N,)``."""


@dataclass(frozen=True)
class TaskData:
    """Retain set R, forget set F, and data of both kinds that the model never saw: ``heldout`` and ``unseen``.

    Samples are ``(N, *S)``, in all sets of one dtype: uint8 images, turned to [-1, 1] by :func:`to_model_range` batch
    by batch, or float32, points or images in [-1, 1]. Labels are integers ``(N,)``, kept as int64, or None for an
    unconditional model. ``retain_size`` and
    ``forget_size`` are the sizes of the whole sets that the model learned, where ``retain`` and ``forget``
    are only parts of them. ``unseen`` is optional: without it there is no membership-inference metric.
    """

    retain: Tensor
    forget: Tensor
    heldout: Tensor
    retain_labels: Tensor | None = None
    forget_labels: Tensor | None = None
    heldout_labels: Tensor | None = None
    unseen: Tensor | None = None
    unseen_labels: Tensor | None = None
    retain_size: int | None = None
    forget_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("retain", "forget", "heldout", *(["unseen"] if self.unseen is not None else [])):
            samples, labels = getattr(self, name), getattr(self, f"{name}_labels")
            if len(samples) == 0:
                raise DataError(f"the {name} set is empty; give it at least one sample")
            if samples.shape[1:] != self.retain.shape[1:]:
                raise DataError(
                    f"{name} samples have shape {tuple(samples.shape[1:])}, "
                    f"retain samples {tuple(self.retain.shape[1:])}; they must agree"
                )
            self._check_values(name, samples)
            if (labels is None) != (self.retain_labels is None):
                has, lacks = ("retain", name) if labels is None else (name, "retain")
                raise DataError(f"the {has} set has labels and the {lacks} set none; give labels for all sets or none")
            if labels is not None and labels.shape != (len(samples),):
                raise DataError(f"{name}_labels has shape {tuple(labels.shape)}, needs ({len(samples)},)")
            if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
                raise DataError(f"{name}_labels is {labels.dtype}; give the numbers of classes, as int64")
            if labels is not None:
                object.__setattr__(self, f"{name}_labels", labels.long())

    def _check_values(self, name: str, samples: Tensor) -> None:
        """Raise :class:`DataError` for samples that networks would take for others than they are."""
        if samples.dtype not in (torch.uint8, torch.float32):
            raise DataError(f"{name} samples are {samples.dtype}; give uint8 images of values 0..255, or float32")
        if samples.dtype != self.retain.dtype:
            raise DataError(f"{name} samples are {samples.dtype}, retain samples {self.retain.dtype}; they must agree")
        if samples.dtype == torch.uint8:
            return
        if not torch.isfinite(samples).all():
            raise DataError(f"the {name} set holds values that are not finite; remove them")
        if samples.dim() == 4 and (largest := samples.abs().max().item()) > IMAGE_LIMIT:
            raise DataError(
                f"the {name} images are float32 with values up to {largest:g} and must lie in [-1, 1]; scale them, "
                "or give uint8 images of values 0..255"
            )

    def save(self, path: Path, **more: Tensor) -> None:
        """Write everything, and ``more`` tensors, to a safetensors file that other processes can map."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {k: torch.tensor(values[k]) for k in SIZES if values[k] is not None}
        save_weights(path, {k: v for k, v in (values | more).items() if v is not None})

    @classmethod
    def load(cls, path: Path) -> tuple[Self, dict[str, Tensor]]:
        """What :meth:`save` wrote, data and ``more``, mapped into memory: processes share one copy."""
        tensors = read_tensors(path)
        values: dict[str, Any] = {f.name: tensors.pop(f.name, None) for f in fields(cls)}
        values |= {k: int(values[k]) for k in SIZES if values[k] is not None}
        return cls(**values), tensors

    def digest(self) -> str:
        """SHA-256 of everything in it."""
        digest = hashlib.sha256()
        for f in fields(self):
            value = getattr(self, f.name)
            digest.update(f"{f.name} {value if not isinstance(value, Tensor) else tuple(value.shape)}".encode())
            if isinstance(value, Tensor):
                digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: str | torch.device) -> Self:
        """The same data on ``device``."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def to_model_range(samples: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]; float samples pass unchanged."""
    return samples.float() / 127.5 - 1.0 if samples.dtype == torch.uint8 else samples


def part_by_class(train: Labelled, test: Labelled, classes: tuple[int, ...], **sizes: int) -> TaskData:
    """A data set of which ``classes`` are to be forgotten: what the model learned is ``train``, what it never saw
    ``test``; ``sizes`` are :class:`TaskData`'s.
    """
    of_forget = [torch.isin(labels, torch.tensor(classes)) for _, labels in (train, test)]
    retain, heldout = ([x[~chosen] for x in part] for part, chosen in zip((train, test), of_forget, strict=True))
    forget, unseen = ([x[chosen] for x in part] for part, chosen in zip((train, test), of_forget, strict=True))
    return TaskData(
        retain=retain[0], retain_labels=retain[1], forget=forget[0], forget_labels=forget[1],
        heldout=heldout[0], heldout_labels=heldout[1], unseen=unseen[0], unseen_labels=unseen[1], **sizes,
    )  # fmt: skip


def load_torchvision(name: str, root: Path, *, train: bool, download: bool = False) -> Labelled:
    """A data set of images through torchvision's class ``name``: uint8 ``(N, C, H, W)`` and int64 ``(N,)``.

    Raises :class:`DataError` where ``root`` does not hold it whole. CIFAR's files are pickles, which can run code:
    torchvision reads one only if its MD5 sum is that of the published file.
    """
    from torchvision import datasets

    if not root.is_dir() and not download:
        raise DataError(f"data root {root} is not a folder; correct it, or let torchvision fill it with --download")
    try:
        dataset = getattr(datasets, name)(root=str(root), train=train, download=download)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets, dtype=torch.int64)
    except Exception as error:  # torchvision raises what its parsing of a damaged file comes upon
        reason = error_line(error).replace(" You can use download=True to download it", "")
        remedy = "check the connection" if download else "let torchvision fill it with --download"
        raise DataError(
            f"no usable {name} under {root} ({reason}); name the folder that holds it with --data-root, or {remedy}"
        ) from None
    if len(images) != len(labels):
        raise DataError(f"{name} under {root} has {len(images)} images and {len(labels)} labels; download it again")
    classes = len(dataset.classes)
    if not all(0 <= label < classes for label in labels.unique().tolist()):
        raise DataError(f"{name} under {root} has labels that are not in 0..{classes - 1}; download it again")
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous(), labels
