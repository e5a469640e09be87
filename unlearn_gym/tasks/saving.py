"""Models as files that say what they are: written during or after a run, and read without it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from unlearn_gym.diffusion import ScheduleConfig
from unlearn_gym.errors import SettingsError, WeightsError, describe_validation_error, error_line, shown
from unlearn_gym.files import parse_json
from unlearn_gym.models import MLPConfig, UNetConfig, VAEConfig, build_network
from unlearn_gym.models.diffusers_folder import save_pipeline
from unlearn_gym.models.diffusers_unet import DiffusersConfig, DiffusersNetwork
from unlearn_gym.models.weights import load_weights, save_weights, serialize
from unlearn_gym.tasks.diffusers_pipeline import read_manifest
from unlearn_gym.tasks.registry import Task, get_task
from unlearn_gym.torch_state import initial_weights_from, insulated

HEADER = "unlearn_gym"
"""The entry of a safetensors file's metadata that says what its tensors are."""
LONGEST_HEADER = 2**16
"""Characters; a network's config has some hundred."""
Network = UNetConfig | MLPConfig | VAEConfig | DiffusersConfig


class Header(BaseModel):
    """What a saved model is: of which task, on which schedule, and its network where a config describes it."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    task: str
    schedule: ScheduleConfig
    network: Network | None = None

    @classmethod
    def of(cls, task: Task) -> Header:
        """That of ``task``'s models."""
        network = task.network if isinstance(task.network, BaseModel) else None
        return cls(task=task.name, schedule=task.schedule, network=network)

    def as_metadata(self) -> dict[str, str]:
        """As a safetensors file has it."""
        return {HEADER: self.model_dump_json()}  # one entry: safetensors writes several in any order


@insulated
def model_bytes(model: nn.Module, task: Task) -> bytes:
    """The safetensors file of ``model``, with a :class:`Header`."""
    return serialize(model.state_dict(), Header.of(task).as_metadata())


@insulated
def save_model(model: nn.Module, task: Task, path: str | os.PathLike[str]) -> Path:
    """Write ``model``, one of ``task``'s, to ``path``, and return that path. Nothing of the model changes.

    A path that ends with ``.safetensors`` becomes one file, which :func:`load_model`, ``unlearn-gym evaluate`` and
    every reader of safetensors know. Any other path becomes, for a network of diffusers, a folder in that library's
    layout, which its ``from_pretrained`` and :func:`unlearn_gym.tasks.diffusers_pipeline.diffusers_task` read; it
    also holds the vectors that stand for the labels in cross-attention, as ``class_embedding.safetensors``.

    Raises :class:`SettingsError` for a path without ``.safetensors`` unless the model is a network of diffusers, and
    for a folder that exists and is not empty.
    """
    if not isinstance(path, str | os.PathLike):
        raise SettingsError(f"path={path!r} must be a path, as in 'unlearned.safetensors'")
    where = Path(path)
    if where.suffix == ".safetensors":
        save_weights(where, model.state_dict(), Header.of(task).as_metadata())
    elif isinstance(model, DiffusersNetwork):
        told = read_manifest(task.pretrained_path.with_suffix(".json"))
        save_pipeline(model, where, told.get("scheduler", {}))
    else:
        raise SettingsError(f"path={str(where)!r} must end with .safetensors; only networks of diffusers have a folder")
    return where


def read_header(path: str | os.PathLike[str]) -> Header | None:
    """What the safetensors file at ``path`` says of itself; None for one that :func:`save_model` did not write.

    Raises :class:`WeightsError` for a file that is missing or damaged.
    """
    if not isinstance(path, str | os.PathLike):
        raise WeightsError(f"path={shown(path)} must be the path of a .safetensors file")
    if not Path(path).is_file():
        raise WeightsError(f"no weights at {path}; make them with save(path) of an environment")
    try:
        with safe_open(path, "pt") as file:
            text: Any = (file.metadata() or {}).get(HEADER)
        if text is not None and len(text) > LONGEST_HEADER:
            raise WeightsError(f"{path} has a header of {len(text):,} characters; save the model again")
        return None if text is None else Header.model_validate(parse_json(text))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file ({error}); restore or remake it") from None
    except ValidationError as error:
        raise WeightsError(f"{path}: {describe_validation_error(error)}; save the model again") from None
    except ValueError as error:
        raise WeightsError(f"{path} has an invalid header {text[:40]!r} ({error}); save the model again") from None


@insulated
def load_model(path: str | os.PathLike[str], task: Task | str | None = None) -> nn.Module:
    """The model that :func:`save_model` wrote to the ``.safetensors`` file ``path``, bit for bit, on the CPU.

    Its network is that of the file's header; where that has no config of it, or where a ``task`` is given, the task's.
    Raises :class:`WeightsError` for a file that is missing, damaged, of another network or without a header, and
    :class:`TaskError` for a task that is not registered.
    """
    header = read_header(path)
    if task is None and header is None:
        raise WeightsError(f"{path} does not say what network it is of; give task= the one that it was trained for")
    if task is None and header is not None and header.network is not None:
        model = _build(header.network, Path(path))
    else:
        chosen = task if isinstance(task, Task) else get_task(task or (header.task if header else ""))
        check_header(header, chosen, path)
        with initial_weights_from(None):
            model = chosen.build_model()
    load_weights(model, Path(path))
    return model.eval()


def check_header(header: Header | None, task: Task, path: str | os.PathLike[str]) -> None:
    """Raise :class:`WeightsError` if the header names another task, up to its ``:``, or another noise schedule."""
    if header is None:
        return
    if header.task.partition(":")[0] != task.name.partition(":")[0]:
        raise WeightsError(
            f"{path} says that it is of task {header.task!r}, and not of {task.name!r}; leave the task out"
        )
    if header.schedule != task.schedule:
        raise WeightsError(
            f"{path} was trained on another noise schedule than task {task.name!r} has; name its own task"
        )


def _build(network: Network, path: Path) -> nn.Module:
    """The network of a header, if the file's tensors are its: their shapes are compared before it is built."""

    def build() -> nn.Module:
        return network() if isinstance(network, DiffusersConfig) else build_network(network)

    try:
        with initial_weights_from(None), torch.device("meta"):
            outline = {name: list(value.shape) for name, value in build().state_dict().items()}
    except SettingsError:
        raise
    except Exception as error:  # whatever torch says of sizes that no network has
        raise WeightsError(f"{path}: no network can be built as its header says ({error_line(error)})") from None
    with safe_open(path, "pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if found != outline:
        raise WeightsError(f"{path} holds other tensors than the network of its header has; save the model again")
    with initial_weights_from(None):
        return build()
