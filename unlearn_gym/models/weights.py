"""Weights as safetensors, read with every check that a file from outside needs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from unlearn_gym.errors import WeightsError
from unlearn_gym.files import write_bytes

CHECKSUM = "checksum"


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


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """:func:`save_weights` with a checksum of all values, for :func:`read_checkpoint`."""
    save_weights(path, {**tensors, CHECKSUM: _digest(tensors)})


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors that :func:`save_checkpoint` wrote; raises :class:`WeightsError` where any bit of them differs."""
    tensors = read_tensors(path)
    found = tensors.pop(CHECKSUM, None)
    if found is None or not torch.equal(found, _digest(tensors)):
        raise WeightsError(
            f"{path} is damaged or of an older version: its values do not match its checksum; remove it to begin anew, "
            "or choose another --out"
        )
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 of names, types, shapes and values, uint8 ``(32,)``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy the weights at ``path`` into ``model``, see :func:`load_tensors`."""
    load_tensors(model, read_tensors(path), path)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``tensors``, which come from ``path``, into ``model``, cast to its own types.

    Raises :class:`WeightsError` and changes nothing when names, shapes or kinds of numbers differ, or a value is not
    finite once it is cast.
    """
    expected, cast = model.state_dict(), {}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            missing = "lacks" if name not in tensors else "has an unknown"
            raise WeightsError(f"{path} {missing} tensor {name!r}: it was made for another network")
        cast[name] = cast_weights(tensors[name], expected[name].dtype, f"{path}: {name!r}")
        found, wanted = tuple(cast[name].shape), tuple(expected[name].shape)
        if found != wanted:
            raise WeightsError(
                f"{path}: {name!r} has shape {found}, the network needs {wanted}: made for another network"
            )
    model.load_state_dict(cast)


def cast_weights(found: Tensor, wanted: torch.dtype, where: str) -> Tensor:
    """``found`` as ``wanted``, if no value changes its kind or gets lost; raises :class:`WeightsError`."""
    if found.dtype != wanted and not (found.is_floating_point() and wanted.is_floating_point):
        raise WeightsError(f"{where} holds {found.dtype}, the network needs {wanted}; save it as that")
    try:
        values = found.to(wanted)
        finite = bool(torch.isfinite(values).all())
    except NotImplementedError:  # of the types that pack several numbers into a byte
        raise WeightsError(
            f"{where} holds {found.dtype}, which torch cannot read as {wanted}; save it as that"
        ) from None
    if not finite:
        cast = "" if found.dtype == wanted else f" as {wanted}"
        raise WeightsError(f"{where} holds values that are not finite{cast}; restore or remake it")
    return values
