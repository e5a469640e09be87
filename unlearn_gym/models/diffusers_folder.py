"""Folders of the diffusers library, read as data: no code of theirs runs, no pickle is opened, nothing is downloaded.

A pipeline has its U-Net and scheduler in folders of their own, or, if it is old, all files beside
``model_index.json``. A model that was saved alone is a ``config.json`` and weights.
"""

from __future__ import annotations

import inspect
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from unlearn_gym.errors import SettingsError, WeightsError, describe_validation_error
from unlearn_gym.files import read_json
from unlearn_gym.math.diffusion import ScheduleConfig, ScheduleKind
from unlearn_gym.models.diffusers_unet import (
    ARCHITECTURES,
    PREDICTION_TYPES,
    DiffusersConfig,
    DiffusersNetwork,
    import_diffusers,
)
from unlearn_gym.models.flat import detached_copy
from unlearn_gym.models.weights import load_tensors, read_tensors, save_weights

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
STEM = "diffusion_pytorch_model"
CLASS_EMBEDDING = "class_embedding.safetensors"
WEIGHTS = f"unet/{STEM}.safetensors"
"""Where a pipeline that is saved today has its weights."""
SCHEDULES: dict[str, ScheduleKind] = {
    "linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine",
}  # fmt: skip
"""Ours by diffusers' ``beta_schedule``."""

SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
"""Classes that all say in the same words which schedule a network was trained with."""

SAVE = "write it with DDPMPipeline(unet, scheduler).save_pretrained(folder)"
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Today's names of an attention's layers by those of diffusers before 0.15."""


@dataclass(frozen=True)
class Source:
    """What a folder holds: the network's config, its weights in one file or several, and its scheduler's config."""

    config: DiffusersConfig
    weights: tuple[Path, ...]
    scheduler: dict[str, Any]
    index: Path | None = None
    """Which of several files has which tensor."""

    def load_into(self, unet: nn.Module) -> None:
        """Copy the weights into the library's network; raises :class:`WeightsError` and changes nothing where they
        are not those of this network, or not finite.
        """
        tensors: dict[str, Tensor] = {}
        for path in self.weights:
            tensors |= read_tensors(path)
        if self.index is not None:
            _check_index(_read_index(self.index), tensors, self.index)
        load_tensors(unet, _todays_names(tensors, unet), self.index or self.weights[0])


class ShardIndex(BaseModel):
    """An index of weights in several files: which file holds each tensor."""

    weight_map: dict[str, str] = Field(min_length=1)


def read_folder(
    folder: Path,
    num_classes: int | None = None,
    *,
    scheduler: Mapping[str, Any] | None = None,
    variant: str | None = None,
) -> Source:
    """What diffusers saved in ``folder``, a pipeline or a model alone.

    ``num_classes`` is that of :class:`DiffusersConfig`; ``scheduler`` a scheduler's config in place of the folder's;
    ``variant`` chooses weights as in diffusers, ``"fp16"``; without it a sole variant is read where no other weights
    are. Weights are read as 32-bit floats, whatever they were saved as.

    Raises :class:`WeightsError` for a file that is missing or damaged and for pickles, and :class:`SettingsError` for
    a pipeline of more than a U-Net and a scheduler, and for a network, schedule or kind of prediction that is not
    supported. Warns of what diffusers ignores: arguments in a config that its class does not have.
    """
    index = _read(folder, INDEX) if (folder / INDEX).is_file() else {}
    if index:
        _check_parts(index, folder)
    elif not (folder / CONFIG).is_file():
        raise WeightsError(f"no {INDEX} in {folder}, which a saved pipeline has, nor a {CONFIG}; {SAVE}")
    unet_at, scheduler_at = (_place(folder, name, file) for name, file in (("unet", CONFIG), ("scheduler", SCHEDULER)))
    unet, where = _read(folder, unet_at), folder / unet_at
    values = dict(scheduler) if scheduler is not None else _read_scheduler_file(folder, scheduler_at, index)
    architecture = unet.get("_class_name", index["unet"][1] if index else None)
    if architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise SettingsError(f"{where}: _class_name={architecture!r} is not supported; it must be {known}")
    said = "scheduler" if scheduler is not None else str(folder / scheduler_at)
    try:
        config = DiffusersConfig(
            architecture=architecture,
            unet=_known_arguments(unet, architecture, where),
            num_classes=num_classes,
            **_read_scheduler(values, said),
        )
    except ValidationError as error:
        raise SettingsError(f"{where}: {describe_validation_error(error)}; {SAVE}") from None
    weights, shards = find_weights(where.parent, variant)
    return Source(config, weights, values, shards)


def save_pipeline(network: DiffusersNetwork, folder: Path, scheduler: Mapping[str, Any]) -> None:
    """Write a copy of ``network`` to a new ``folder`` as ``DDPMPipeline.save_pretrained`` does, whole or not at all.

    ``scheduler`` is the config of the scheduler that the network came with: its class and what it says of sampling are
    kept, and what it says of training is the network's own; without one it is a DDPMScheduler.
    Raises :class:`SettingsError` for a folder that exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"{folder} exists; name a new folder, or one file that ends with .safetensors")
    config, library = network.config, import_diffusers(network.config.architecture)
    copied = detached_copy(network).cpu()
    assert isinstance(copied, DiffusersNetwork)
    if "dropout" in config.unet:
        copied.unet.register_to_config(dropout=config.unet["dropout"])
    beta_schedule = next(name for name, kind in SCHEDULES.items() if kind == config.schedule.kind)
    said = {"variance_type": "learned_range"} if config.learned_variance else {}
    trained = {"beta_schedule": beta_schedule, "prediction_type": config.prediction_type}
    values = {**said, **scheduler, **config.schedule.model_dump(exclude={"kind"}), **trained}
    values = {name: value for name, value in values.items() if name not in ("_class_name", "predict_epsilon")}
    kind = getattr(library, scheduler.get("_class_name") or SCHEDULERS[0])
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")
    try:
        library.DDPMPipeline(copied.unet, kind.from_config(values)).save_pretrained(partial)
        if copied.class_embedding is not None:
            save_weights(partial / CLASS_EMBEDDING, copied.class_embedding.state_dict())
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def find_weights(folder: Path, variant: str | None = None) -> tuple[tuple[Path, ...], Path | None]:
    """The safetensors files of the network in ``folder``, and their index where there are several.

    Raises :class:`WeightsError`, and for several variants without a choice :class:`SettingsError`.
    """
    pattern = re.compile(
        rf"{STEM}(?:\.(?P<one>[^.]+))?\.safetensors|{STEM}\.safetensors\.index(?:\.(?P<many>[^.]+))?\.json"
    )
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and path.is_file() and not re.search(r"-\d{5}-of-\d{5}", path.name):
            found.setdefault(match["one"] or match["many"], []).append(path)
    if variant is None and None not in found and len(found) > 1:
        names = ", ".join(repr(name) for name in sorted(filter(None, found)))
        raise SettingsError(f"{folder} has weights of several variants and none without; give variant= one of {names}")
    if variant is None and len(found) == 1:
        variant = next(iter(found))
    if variant not in found:
        _refuse_missing(folder, variant)
    paths = sorted(found[variant], key=lambda path: path.suffix != ".json")  # an index goes first, as in diffusers
    if paths[0].suffix != ".json":
        return (paths[0],), None
    shards = sorted(set(_read_index(paths[0]).weight_map.values()))
    for name in shards:
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise WeightsError(
                f"{paths[0]} names {name!r}, which is no safetensors file beside it; save the model again with "
                "save_pretrained(folder, safe_serialization=True)"
            )
        if not (folder / name).is_file():
            raise WeightsError(f"{paths[0]} names {name!r}, and there is no {folder / name}; restore it, or {SAVE}")
    return tuple(folder / name for name in shards), paths[0]


def _refuse_missing(folder: Path, variant: str | None) -> None:
    pickles = sorted(path for end in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{end}"))
    wanted = f"{STEM}{f'.{variant}' if variant else ''}.safetensors"
    if pickles and variant is None:
        raise WeightsError(
            f"{pickles[0]} is a pickle, which can run code when it is read; save the pipeline again with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    raise WeightsError(f"no weights at {folder / wanted}, nor an index of several files; {SAVE}")


def _place(folder: Path, name: str, file: str) -> str:
    """Where a part of a pipeline has its config: in a folder of its own, or, in older ones, beside the index."""
    return file if (folder / file).is_file() and not (folder / name).is_dir() else f"{name}/{file}"


def _read(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of ``folder``."""
    path = folder / name
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise WeightsError(f"no {name} in {folder}, which a saved pipeline has; restore it, or {SAVE}") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is not readable JSON ({error}); restore it, or {SAVE}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no JSON object; restore it, or {SAVE}")
    return value


def _read_scheduler_file(folder: Path, name: str, index: dict[str, Any]) -> dict[str, Any]:
    """The scheduler's config, with the class that the pipeline's index has where it names none itself."""
    if not index and not (folder / name).is_file():
        raise WeightsError(
            f"{folder} holds a network and no {SCHEDULER}, so the noise that it was trained on is unknown; give "
            "scheduler= its config, as in scheduler=DDPMScheduler().config"
        )
    classes = index.get("scheduler")
    named = {"_class_name": classes[1]} if isinstance(classes, list) and len(classes) == 2 else {}
    return {**named, **_read(folder, name)}


def _read_index(path: Path) -> ShardIndex:
    try:
        return ShardIndex.model_validate(read_json(path))
    except (OSError, ValueError) as error:
        line = describe_validation_error(error) if isinstance(error, ValidationError) else str(error)
        raise WeightsError(f"{path} is no index of weights ({line}); restore it, or {SAVE}") from None


def _check_index(index: ShardIndex, tensors: Mapping[str, Tensor], path: Path) -> None:
    for name in sorted(index.weight_map.keys() ^ tensors.keys()):
        told = "its files lack it" if name in index.weight_map else "its files have it"
        raise WeightsError(f"{path} and its files disagree on the tensor {name!r} ({told}); restore them, or {SAVE}")


def _todays_names(tensors: Mapping[str, Tensor], unet: nn.Module) -> dict[str, Tensor]:
    """``tensors`` with those of attention layers that have an old name under the one that ``unet`` knows."""
    known, renamed = unet.state_dict().keys(), {}
    for name, tensor in tensors.items():
        module, _, end = name.rpartition(".")
        parent, _, layer = module.rpartition(".")
        todays = f"{parent}.{OLD_ATTENTION.get(layer, layer)}.{end}"
        renamed[todays if name not in known and todays in known and todays not in tensors else name] = tensor
    return renamed


def _known_arguments(values: dict[str, Any], architecture: str, where: Path) -> dict[str, Any]:
    """Those of a config's ``values`` that its class has; a warning names the others, as diffusers does."""
    known = inspect.signature(getattr(import_diffusers(architecture), architecture).__init__).parameters
    given = {name: value for name, value in values.items() if not name.startswith("_")}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        warnings.warn(f"{where}: {architecture} has no {', '.join(unknown)}; ignored, as diffusers does", stacklevel=4)
    return {name: value for name, value in given.items() if name in known}


def _check_parts(index: dict[str, Any], folder: Path) -> None:
    """Raise :class:`SettingsError` unless the pipeline is a U-Net of diffusers' and its scheduler."""
    parts = {name: value for name, value in index.items() if isinstance(value, list) and any(value)}
    for name in parts:
        if name not in ("unet", "scheduler"):
            raise SettingsError(
                f"the pipeline in {folder} has a {name!r} besides its U-Net and scheduler, as models of latents or "
                f"texts have; of the two alone, {SAVE}"
            )
    unet = parts.get("unet", [None])
    if unet[0] != "diffusers" or len(unet) != 2:
        raise SettingsError(
            f"{folder / INDEX}: unet={index.get('unet')!r} is no class of diffusers, and code of others "
            "is not run; it must be ['diffusers', 'UNet2DModel'] or ['diffusers', 'UNet2DConditionModel']"
        )


def _prediction_type(values: dict[str, Any], where: str) -> Any:
    """What the network predicts: ``prediction_type``, or what configs before diffusers 0.9 said by another name."""
    old, said = values.get("predict_epsilon"), values.get("prediction_type")
    if old is None:
        return values.get("prediction_type", "epsilon")
    if not isinstance(old, bool):
        raise SettingsError(f"{where}: predict_epsilon={old!r} must be true or false; restore it")
    if said is not None and (said == "epsilon") != old:
        raise SettingsError(
            f"{where}: predict_epsilon={old} and prediction_type={said!r} contradict each other; remove the one that "
            "is not how the model was trained"
        )
    return said or ("epsilon" if old else "sample")


def _read_scheduler(values: dict[str, Any], where: str) -> dict[str, Any]:
    """``schedule``, ``prediction_type`` and ``learned_variance`` of a :class:`DiffusersConfig`."""
    prediction_type = _prediction_type(values, where)
    kind = values.get("beta_schedule", "linear")
    for name, value, known in (
        ("_class_name", values.get("_class_name", SCHEDULERS[0]), SCHEDULERS),
        ("beta_schedule", kind, tuple(SCHEDULES)),
        ("prediction_type", prediction_type, PREDICTION_TYPES),
    ):
        if value not in known:
            raise SettingsError(f"{where}: {name}={value!r} is not supported; the model must have one of {known}")
    for name in ("trained_betas", "rescale_betas_zero_snr"):
        if values.get(name):
            raise SettingsError(
                f"{where}: {name}={str(values[name])[:40]} is not supported; the model must have been trained on one "
                f"of the schedules {tuple(SCHEDULES)} as it is"
            )
    names = (
        ["num_train_timesteps"] if kind == "squaredcos_cap_v2" else ["num_train_timesteps", "beta_start", "beta_end"]
    )
    try:
        schedule = ScheduleConfig(kind=SCHEDULES[kind], **{name: values[name] for name in names if name in values})
    except ValidationError as error:
        raise SettingsError(f"{where}: {describe_validation_error(error)}; restore it, or {SAVE}") from None
    learned = values.get("variance_type") in ("learned", "learned_range")
    return {"schedule": schedule, "prediction_type": prediction_type, "learned_variance": learned}
