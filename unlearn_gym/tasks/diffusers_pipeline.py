"""Tasks out of models that others trained with the diffusers library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from unlearn_gym.errors import DataError, SettingsError, WeightsError
from unlearn_gym.files import read_json_as, sha256, write_json
from unlearn_gym.models.diffusers_folder import Source, read_folder
from unlearn_gym.models.diffusers_unet import DiffusersConfig, DiffusersNetwork
from unlearn_gym.models.weights import load_weights, read_tensors, save_weights
from unlearn_gym.system.torch_state import initial_weights_from, insulated
from unlearn_gym.tasks.data import TaskData
from unlearn_gym.tasks.registry import Task


@insulated
def diffusers_task(
    name: str,
    source: Path | str | DiffusersConfig,
    load_data: Callable[[Path | None, bool], TaskData],
    assets: Path | str,
    *,
    class_embedding: Path | str | None = None,
    scheduler: Mapping[str, Any] | None = None,
    variant: str | None = None,
    **fields: Any,
) -> Task:
    """The task whose model is a network of diffusers; :func:`unlearn_gym.tasks.register_task` makes it known.

    Args:
        name: the task's.
        source: a folder that ``save_pretrained`` of a ``DDPMPipeline`` or of its U-Net wrote, whose weights are copied
            to ``assets``; or a config alone, to be trained from scratch with
            :func:`unlearn_gym.making.pretraining.pretrain` into ``assets``.
        load_data: the task's, see :class:`Task`. Images are ``(N, C, H, W)``, and have labels if the network has.
        assets: folder of the task's own weights and constants, not that of the pipeline.
        class_embedding: safetensors file with one tensor ``weight (num_classes, cross_attention_dim)``, the state of
            an ``nn.Embedding`` that was trained with a ``UNet2DConditionModel`` and fed its cross-attention.
        scheduler: the config of the model's scheduler, as ``DDPMScheduler().config``, in place of the folder's: for
            a folder that has none.
        variant: which of a folder's weights, as in diffusers: ``"fp16"`` reads ``*.fp16.safetensors``. They become
            32-bit floats.
        fields: the other fields of :class:`Task`, ``schedule`` apart, which is the model's.

    Weights are copied once, and again when those of the pipeline have changed: constants that were measured on the
    former ones are then removed. Raises :class:`WeightsError` for files that are missing, damaged or no safetensors
    and for assets that hold something else, and :class:`SettingsError` for networks and schedules that are not
    supported and where diffusers is missing.
    """
    assets = Path(assets)
    if isinstance(source, DiffusersConfig):
        if class_embedding is not None:
            raise SettingsError("class_embedding goes with a folder; give the config num_classes instead")
        if scheduler is not None or variant is not None:
            raise SettingsError("scheduler and variant go with a folder; the config has schedule and prediction_type")
        config, network = source, _build(source)
        _check_manifest(config, assets)
    else:
        embedding = None if class_embedding is None else Path(class_embedding)
        num_classes = None if embedding is None else _num_classes(embedding)
        read = read_folder(Path(source), num_classes, scheduler=scheduler, variant=variant)
        config, network = read.config, _build(read.config)
        _import_weights(network, read, embedding, assets, str(source))
    return Task(
        name=name,
        network=config,
        load_data=FittingData(load_data, network.channels, network.size_factor, network.num_labels),
        assets=assets,
        schedule=config.schedule,
        **{"description": f"{config.architecture} of diffusers, {config.prediction_type}-predicting", **fields},
    )


@dataclass(frozen=True)
class FittingData:
    """``load`` of a task, whose samples must be images ``(channels, H, W)``, with H and W multiples of
    ``size_factor``, and have labels in 0..``num_labels``-1, or none for None; raises :class:`DataError`.
    """

    load: Callable[[Path | None, bool], TaskData]
    channels: int
    size_factor: int
    num_labels: int | None

    def __call__(self, data_root: Path | None, download: bool) -> TaskData:
        """The sets, if they fit the network."""
        data = self.load(data_root, download)
        shape = tuple(data.retain.shape[1:])
        if len(shape) != 3 or shape[0] != self.channels or any(side % self.size_factor for side in shape[1:]):
            raise DataError(
                f"samples have shape {shape}, the network takes ({self.channels}, H, W) with H and W multiples of "
                f"{self.size_factor}; convert or pad them"
            )
        if self.num_labels is None and data.retain_labels is not None:
            raise DataError("the data has labels, the network takes none; leave them out")
        if self.num_labels is not None and data.retain_labels is None:
            raise DataError(f"the data has no labels, the network needs them in 0..{self.num_labels - 1}; add them")
        for labels in (data.retain_labels, data.forget_labels, data.heldout_labels, data.unseen_labels):
            if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < (self.num_labels or 0):
                raise DataError(
                    f"labels lie in {int(labels.min())}..{int(labels.max())}, the network knows "
                    f"0..{(self.num_labels or 0) - 1}; number them so"
                )
        return data


def _build(config: DiffusersConfig) -> DiffusersNetwork:
    with initial_weights_from(None):
        return config()


def _num_classes(class_embedding: Path) -> int:
    if not class_embedding.is_file():
        raise WeightsError(f"no class embedding at {class_embedding}; give the path of its safetensors file")
    tensors = read_tensors(class_embedding)
    if set(tensors) != {"weight"} or tensors["weight"].dim() != 2:
        raise WeightsError(
            f"{class_embedding} must hold one tensor 'weight' (num_classes, cross_attention_dim); write it with "
            "safetensors.torch.save_file(embedding.state_dict(), path)"
        )
    return len(tensors["weight"])


def _import_weights(
    network: DiffusersNetwork, source: Source, embedding: Path | None, assets: Path, folder: str
) -> None:
    """Make ``assets/pretrained.safetensors`` a checked copy of the pipeline's weights, unless it is that already."""
    target, manifest_path = assets / "pretrained.safetensors", assets / "pretrained.json"
    manifest = read_manifest(manifest_path)
    new = {
        "imported_from": [sha256(path) for path in (*source.weights, embedding) if path is not None],
        "network": network.config.model_dump(mode="json"),
    }
    if target.is_file() and "imported_from" not in manifest:
        raise WeightsError(f"{target} was not imported from a pipeline; choose another folder for assets")
    _check_manifest(network.config, assets)
    old = {name: manifest.get(name) for name in new}
    if target.is_file() and old == new and manifest.get("sha256") == sha256(target):
        return
    source.load_into(network.unet)
    if embedding is not None and network.class_embedding is not None:
        load_weights(network.class_embedding, embedding)
    (assets / "constants.json").unlink(missing_ok=True)
    write_json(manifest_path, new)  # without a hash until the weights are whole: an interrupted import is made again
    save_weights(target, network.state_dict())
    told = {"folder": folder, "scheduler": json.loads(json.dumps(source.scheduler, default=str))}
    write_json(manifest_path, {**new, **told, "sha256": sha256(target)})


def _check_manifest(config: DiffusersConfig, assets: Path) -> None:
    """Raise :class:`WeightsError` for weights in ``assets`` of another network, prediction type or schedule."""
    wanted = config.model_dump(mode="json")
    if read_manifest(assets / "pretrained.json").get("network", wanted) != wanted:
        raise WeightsError(f"{assets} holds the weights of another network; choose another folder for assets")


class Manifest(BaseModel):
    """What ``pretrained.json`` holds, as far as anything is read from it; what is missing is not known."""

    model_config = ConfigDict(strict=True)

    imported_from: list[str] = []
    network: dict[str, Any] | str = {}
    sha256: str = ""
    scheduler: dict[str, Any] = {}


def read_manifest(path: Path) -> dict[str, Any]:
    """What stands beside imported or trained weights; empty where nothing does. Raises :class:`WeightsError`."""
    try:
        found = read_json_as(path, Manifest, WeightsError, "remove it, or choose another assets")
    except FileNotFoundError:
        return {}
    return found.model_dump(exclude_unset=True)
