"""Models as files that say what they are: written during or after a run, and read without it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from unlearn_gym.errors import (
    SettingsError,
    TaskError,
    WeightsError,
    describe_validation_error,
    error_line,
    one_line,
    shown,
)
from unlearn_gym.files import parse_json
from unlearn_gym.math.diffusion import ScheduleConfig
from unlearn_gym.models import MLPConfig, UNetConfig, VAEConfig, build_network
from unlearn_gym.models.diffusers_folder import save_pipeline
from unlearn_gym.models.diffusers_unet import DiffusersConfig, DiffusersNetwork, completed, excess
from unlearn_gym.models.weights import load_weights, save_weights, serialize
from unlearn_gym.system.torch_state import initial_weights_from, insulated
from unlearn_gym.tasks.diffusers_pipeline import read_manifest
from unlearn_gym.tasks.registry import Task, get_task

HEADER = "unlearn_gym"
"""The entry of a safetensors file's metadata that says what its tensors are."""
LONGEST_HEADER = 2**16
"""Characters; a network's config has some hundred."""
Network = UNetConfig | MLPConfig | VAEConfig | DiffusersConfig


def _kind(network: Any) -> str:
    """Which config a header's network is, so that an error names a field of it and not one of the first config."""
    return str(network.get("kind") if isinstance(network, dict) else getattr(network, "kind", None))


OfItsKind = Annotated[
    Annotated[UNetConfig, Tag("unet")]
    | Annotated[MLPConfig, Tag("mlp")]
    | Annotated[VAEConfig, Tag("vae")]
    | Annotated[DiffusersConfig, Tag("diffusers")],
    Discriminator(_kind, "network", "kind must be 'unet', 'mlp', 'vae' or 'diffusers'"),
]


class Header(BaseModel):
    """What a saved model is: of which task, on which schedule, and its network where a config describes it."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    task: str
    schedule: ScheduleConfig
    network: OfItsKind | None = None

    @classmethod
    def of(cls, task: Task) -> Header:
        """That of ``task``'s models."""
        network = task.network if isinstance(task.network, Network) else None
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
    Raises :class:`WeightsError` for a file that is missing, damaged, of another network or noise schedule, or without
    a header, :class:`TaskError` for a task that is not registered, and :class:`SettingsError` where diffusers is
    missing or cannot build the network. Warns where the file says that it is of another task than the given one.
    """
    header = read_header(path)
    if task is None and header is None:
        raise WeightsError(f"{path} does not say what network it is of; give task= the one that it was trained for")
    note = None
    if task is None and header is not None and header.network is not None:
        model = _build(header.network, Path(path))
    else:
        chosen = fitting_task(header, task, path)
        note = other_task(header, chosen, path)
        with initial_weights_from(None):
            model = chosen.build_model()
    load_weights(model, Path(path))
    if note is not None:  # after all that can fail, which would make it needless
        warnings.warn(note, UserWarning, stacklevel=3)  # of who calls: `insulated` lies between
    return model.eval()


def fitting_task(header: Header | None, task: Task | str | None, path: str | os.PathLike[str]) -> Task:
    """``task``, or for None the one that the header names; raises :class:`TaskError` for one that is not registered,
    and :class:`WeightsError` where it does not fit, see :func:`check_header`.
    """
    named = header.task if header is not None and task is None else task
    try:
        chosen = named if isinstance(named, Task) else get_task(named)  # type: ignore[arg-type] # which refuses None
    except TaskError as error:
        if task is not None:
            raise
        raise TaskError(f"{path}: {error}; or give a task whose network and noise schedule are the file's") from None
    check_header(header, chosen, path)
    return chosen


def check_header(header: Header | None, task: Task, path: str | os.PathLike[str]) -> None:
    """Raise :class:`WeightsError` if the header has another noise schedule or another network than the task.

    A network that is a function is not compared: its weights have to fit, and that is all that is known of it.
    """
    if header is None:
        return
    if header.schedule != task.schedule:
        raise WeightsError(
            f"{path} was trained on another noise schedule than task {task.name!r} has; give the task that it was "
            f"trained for, which it calls {shown(header.task)}"
        )
    if header.network is None or not isinstance(task.network, Network):
        return
    difference = _difference(header.network, task.network)
    if difference:
        raise WeightsError(
            f"{path} is of another network than task {task.name!r} has, {difference}; give the task that it was "
            f"trained for, which it calls {shown(header.task)}"
        )


def other_task(header: Header | None, task: Task, path: str | os.PathLike[str]) -> str | None:
    """A line to tell where the header names another task, up to its ``:``; None where it does not."""
    if header is not None and header.task.partition(":")[0] != task.name.partition(":")[0]:
        return one_line(
            f"{path} says that it is of task {shown(header.task)}; it is taken as one of {shown(task.name)}, whose "
            "network and noise schedule fit"
        )
    return None


def _difference(found: Network, wanted: Network) -> str:
    """The first entry in which two configs differ as networks; empty where they are the same."""
    if found.kind != wanted.kind:
        return f"kind={found.kind!r} and not {wanted.kind!r}"
    if isinstance(found, DiffusersConfig) and isinstance(wanted, DiffusersConfig):
        found, wanted = completed(found), completed(wanted)
    names = type(found).model_fields
    ours, theirs = ({name: getattr(config, name) for name in names} for config in (found, wanted))
    for entries in (ours, theirs):
        entries |= {f"unet.{name}": value for name, value in entries.pop("unet", {}).items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            return f"{name}={shown(ours.get(name))} and not {shown(theirs.get(name))}"
    return ""


def _build(network: Network, path: Path) -> nn.Module:
    """The network of a header, if the file's tensors are its: their shapes are compared before it is built."""
    beyond = excess(network) if isinstance(network, DiffusersConfig) else None
    if beyond:  # some characters could ask for hours of building
        raise WeightsError(
            f"{path}: the network of its header has {beyond}; give task= the one that it was trained for"
        )

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
