"""Weights as safetensors, read with every check that a file from outside needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from unlearn_gym.errors import WeightsError
from unlearn_gym.files import write_bytes


def serialize(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of ``tensors``, wherever they are and whatever strides they have."""
    return save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` to ``path``; a reader never sees a half-written file."""
    write_bytes(path, serialize(tensors, metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors in a safetensors file; raises :class:`WeightsError`."""
    if not path.is_file():
        raise WeightsError(f"no weights at {path}; make them with 'unlearn-gym pretrain'")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file ({error}); restore or remake it") from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy the weights at ``path`` into ``model``, see :func:`load_tensors`."""
    load_tensors(model, read_tensors(path), path)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``tensors``, which come from ``path``, into ``model``; raises :class:`WeightsError` and changes nothing
    when names or shapes differ or a value is not finite.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            missing = "lacks" if name not in tensors else "has an unknown"
            raise WeightsError(f"{path} {missing} tensor {name!r}: it was made for another network")
        found, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
        if found != wanted:
            raise WeightsError(
                f"{path}: {name!r} has shape {found}, the network needs {wanted}: made for another network"
            )
        if not torch.isfinite(tensors[name]).all():
            raise WeightsError(f"{path}: {name!r} holds values that are not finite; restore or remake it")
    model.load_state_dict(tensors)
