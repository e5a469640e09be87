"""Folders that ``DDPMPipeline.save_pretrained`` wrote, read as data: no code of theirs runs, nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unlearn_gym.diffusion import ScheduleConfig, ScheduleKind
from unlearn_gym.errors import SettingsError, WeightsError
from unlearn_gym.models.diffusers_unet import ARCHITECTURES, PREDICTION_TYPES, DiffusersConfig
from unlearn_gym.settings import describe_validation_error

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULES: dict[str, ScheduleKind] = {
    "linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine",
}  # fmt: skip
"""Ours by diffusers' ``beta_schedule``."""

SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
"""Classes that all say in the same words which schedule a network was trained with."""

SAVE = "write it with DDPMPipeline(unet, scheduler).save_pretrained(folder)"


def read_config(folder: Path, num_classes: int | None = None) -> DiffusersConfig:
    """The network of the pipeline saved in ``folder``; ``num_classes`` is that of :class:`DiffusersConfig`.

    Reads ``model_index.json``, ``unet/config.json`` and ``scheduler/scheduler_config.json``. Raises
    :class:`WeightsError` for a file that is missing or no JSON, and :class:`SettingsError` for a pipeline of more than
    a U-Net and a scheduler, and for a network, schedule or kind of prediction that is not supported.
    """
    _check_parts(_read(folder, "model_index.json"), folder)
    unet = _read(folder, "unet/config.json")
    scheduler = _read(folder, "scheduler/scheduler_config.json")
    where = folder / "unet/config.json"
    architecture = unet.get("_class_name")
    if architecture not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise SettingsError(f"{where}: _class_name={architecture!r} is not supported; it must be {known}")
    try:
        return DiffusersConfig(
            architecture=architecture,
            unet={name: value for name, value in unet.items() if not name.startswith("_")},
            num_classes=num_classes,
            **_read_scheduler(scheduler, folder / "scheduler/scheduler_config.json"),
        )
    except ValidationError as error:
        raise SettingsError(f"{where}: {describe_validation_error(error)}; {SAVE}") from None


def find_weights(folder: Path) -> Path:
    """The safetensors file of the pipeline saved in ``folder``; raises :class:`WeightsError`."""
    path = folder / WEIGHTS
    if path.is_file():
        return path
    pickles = sorted(path.parent.glob("*.bin"))
    if pickles:
        raise WeightsError(
            f"{pickles[0]} is a pickle, which can run code when it is read; save the pipeline again with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    raise WeightsError(f"no weights at {path}; {SAVE}, in one file and without a variant")


def _read(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of ``folder``."""
    path = folder / name
    try:
        value = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise WeightsError(f"no {name} in {folder}, which a saved pipeline has; restore it, or {SAVE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not readable JSON ({error}); restore it, or {SAVE}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no JSON object; restore it, or {SAVE}")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _check_parts(index: dict[str, Any], folder: Path) -> None:
    """Raise :class:`SettingsError` unless the pipeline is a U-Net of diffusers' and its scheduler."""
    parts = {name: value for name, value in index.items() if isinstance(value, list) and any(value)}
    for name in parts:
        if name not in ("unet", "scheduler"):
            raise SettingsError(
                f"the pipeline in {folder} has a {name!r} besides its U-Net and scheduler, as models of latents or "
                f"texts have; of the two alone, {SAVE}"
            )
    if parts.get("unet", [None])[0] != "diffusers":
        raise SettingsError(
            f"{folder / 'model_index.json'}: unet={index.get('unet')!r} is no class of diffusers, and code of others "
            "is not run; it must be ['diffusers', 'UNet2DModel'] or ['diffusers', 'UNet2DConditionModel']"
        )


def _read_scheduler(values: dict[str, Any], where: Path) -> dict[str, Any]:
    """``schedule``, ``prediction_type`` and ``learned_variance`` of a :class:`DiffusersConfig`."""
    prediction_type = values.get("prediction_type", "epsilon")
    kind = values.get("beta_schedule", "linear")
    for name, value, known in (
        ("_class_name", values.get("_class_name"), SCHEDULERS),
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
