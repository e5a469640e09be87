"""What ``results.json`` and the files of finished cells may hold, and whether they still hold what was written."""

from __future__ import annotations

import base64
import math
import zlib
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unlearn_gym.errors import ResultsError, describe_validation_error
from unlearn_gym.files import checksum, read_json, write_json
from unlearn_gym.settings import RunSettings

CHECKSUM = "checksum"
ITEM_BYTES = {"uint8": 1, "float16": 2}
MOST_BYTES = 10**8
"""Samples that a cell keeps are a few dozen images: whatever claims to be more is damaged."""
AGAIN = "run the comparison again"
NEEDED_METRICS = {"forget_loss", "retain_loss"}
"""What every evaluation measures, and the score is made of."""
NEEDED_COLUMNS = {"lambda_", "retain_ess", "forget_ess"}
"""What a report reads of a trace."""


UNTOUCHED, ORACLE, FINETUNE = "untouched", "oracle", "finetune"
REFERENCES = (UNTOUCHED, ORACLE)
"""Rows of a comparison that no policy made: the model before, and the one that never saw the forget data."""


class Record(BaseModel):
    """Base of all records: types are strict, numbers are finite, and unknown fields are kept."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def _not_null(self) -> Self:
        """A file omits ``trace``, ``probe`` and ``pictures`` where there are none; it never has them as null."""
        for name in ("trace", "probe", "pictures"):
            if name in self.model_fields_set and getattr(self, name) is None:
                raise ValueError(f"{name} is null")
        return self


class Samples(Record):
    """Samples as :func:`pack_samples` packs them."""

    shape: list[int]
    dtype: Literal["uint8", "float16"]
    data: str

    @model_validator(mode="after")
    def _whole(self) -> Self:
        wanted = math.prod(self.shape) * ITEM_BYTES[self.dtype]
        if min(self.shape, default=0) < 1 or len(self.shape) not in (2, 4) or wanted > MOST_BYTES:
            raise ValueError(f"there are no samples of shape {self.shape}")
        packed = base64.b64decode(self.data, validate=True)
        try:
            raw = zlib.decompressobj().decompress(packed, wanted + 1)  # no more than that, whatever is packed
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if len(raw) != wanted:
            raise ValueError(f"the data is no {self.dtype} array of shape {self.shape}")
        return self


def pack_samples(samples: Any) -> dict[str, Any]:
    """Samples ``(N, *S)``, an array or tensor on the CPU, as compressed bytes for a JSON file: 8 bits a pixel of images
    in [-1, 1], or 16 a coordinate of points.
    """
    values = np.asarray(samples)
    pixels = values.ndim == 4
    array = ((values.clip(-1, 1) + 1) * 127.5).round().astype("uint8") if pixels else values.astype("float16")
    data = base64.b64encode(zlib.compress(array.tobytes(), 9)).decode()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "data": data}


def unpack_samples(packed: dict[str, Any]) -> NDArray[np.float32]:
    """Inverse of :func:`pack_samples`, up to its rounding."""
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    array = np.frombuffer(raw, packed["dtype"]).reshape(packed["shape"]).astype(np.float32)
    return array / np.float32(127.5) - 1 if packed["dtype"] == "uint8" else array


class Pictures(Record):
    """Samples for the report, and which of the forget ones show forget data; all or none of them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    forget: Samples | None = None
    quality: Samples | None = None
    forget_hits: list[int] | None = None

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        if len({value is None for value in (self.forget, self.quality, self.forget_hits)}) > 1:
            raise ValueError("samples of one kind are missing")
        if self.forget and not all(0 <= hit < self.forget.shape[0] for hit in self.forget_hits or ()):
            raise ValueError("forget_hits contains indices out of range")
        return self


class ProbeRecord(Record):
    """Losses along a run, columns of one length; None where they were not finite."""

    updates: list[int]
    forget_loss: list[float | None]
    retain_loss: list[float | None]
    seconds: list[float]

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        if len({len(column) for column in (self.updates, self.forget_loss, self.retain_loss, self.seconds)}) > 1:
            raise ValueError("columns differ in length")
        return self


class CellRecord(Record):
    """One policy at one seed."""

    policy: str
    seed: int = Field(ge=0)
    key: str | None = None
    diverged: bool
    metrics: dict[str, float | None]
    absent: dict[str, str] = {}
    profile: list[float | None] = []
    trace: dict[str, list[float | None]] | None = None
    probe: ProbeRecord | None = None
    pictures: Pictures | None = None
    episode_return: float | None = None
    env_seconds: float = 0.0
    policy_seconds: float = 0.0
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    threads: int | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.diverged and any(self.metrics.get(name) is None for name in NEEDED_METRICS):
            raise ValueError(f"metrics lack {' or '.join(sorted(NEEDED_METRICS))}")
        if self.metrics.get("retain_loss") == 0:
            raise ValueError("retain_loss is 0, which is impossible")
        kind, _, value = self.policy.partition(":")
        if kind == "static":
            float(value)
        if self.trace is not None:
            missing = sorted(NEEDED_COLUMNS - self.trace.keys())
            if missing:
                raise ValueError(f"trace lacks {' and '.join(missing)}")
            if None in self.trace["lambda_"] or len({len(column) for column in self.trace.values()}) > 1:
                raise ValueError("trace has a lambda_ that is null, or its columns differ in length")
        return self


class Sizes(Record):
    """:class:`unlearn_gym.metrics.judge.EvaluationSettings`."""

    num_forget_samples: int
    num_quality_samples: int
    num_inference_steps: int | None = None
    batch_size: int = 125
    seed: int = 7
    num_likelihood_samples: int = 0
    inception_weights: str | None = None


class ComparisonRecord(Record):
    """What was compared."""

    task: str
    policies: list[str]
    seeds: list[int]
    options: dict[str, bool | int | float | str | None]
    evaluation: Sizes


class TrainingRecord(Record):
    """What an agent's training cost."""

    seconds: float | None = None
    timesteps: int | None = None
    reward: str | None = None
    seed: int | None = None
    task: str | None = None


class ResultsRecord(Record):
    """All of ``results.json``."""

    format: int
    command: str
    comparison: ComparisonRecord
    settings: dict[str, Any]
    family: Literal["diffusion", "generator", "vae"] = "diffusion"
    num_train_timesteps: int = Field(1000, ge=1)
    num_inference_steps: int
    num_retain: int
    num_forget: int
    num_reference: int
    feature_dim: int | None
    probe_cap: float | None = None
    calibration: dict[str, float | None]
    training: dict[str, TrainingRecord | None] = {}
    versions: dict[str, str]
    machine: dict[str, str | int | None] = {}
    cells: list[CellRecord]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len({len(cell.profile) for cell in self.cells if cell.profile}) > 1:
            raise ValueError("profiles of cells differ in length")
        try:
            RunSettings(**_checkable(self.settings))
        except ValidationError as error:
            raise ValueError(f"settings: {describe_validation_error(error)}") from None
        return self


def _checkable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that this version knows, without the name of a device: a report runs on none, and is made elsewhere,
    too.
    """
    known = RunSettings.model_fields.keys() - ({"device"} if isinstance(settings.get("device"), str) else set())
    return {name: value for name, value in settings.items() if name in known}


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the checksum of all else that it holds; one that has a checksum is left as it is."""
    return record if CHECKSUM in record else {**record, CHECKSUM: checksum(record)}


def matches_checksum(record: dict[str, Any]) -> bool:
    """Whether the record matches its checksum."""
    try:
        return bool(record[CHECKSUM] == checksum({k: v for k, v in record.items() if k != CHECKSUM}))
    except (KeyError, ValueError):
        return False


def fault(cell: Any, *, require_checksum: bool = True) -> str | None:
    """What is wrong with the content of a stored cell, which needs a checksum only with ``require_checksum``."""
    try:
        CellRecord.model_validate(cell)
    except (ValidationError, RecursionError) as error:
        return describe_validation_error(error) if isinstance(error, ValidationError) else "it is nested too deeply"
    if CHECKSUM not in cell and require_checksum:
        return "it has no checksum, as an older version wrote it"
    return "it does not match its checksum" if CHECKSUM in cell and not matches_checksum(cell) else None


def write_results(path: Path, raw: dict[str, Any]) -> None:
    """Write ``raw`` as a ``results.json`` with checksums, of each cell and of the whole."""
    content = {**raw, "cells": [with_checksum(cell) for cell in raw["cells"]]}
    content.pop(CHECKSUM, None)
    write_json(path, with_checksum(content), indent=None)


def read_results(path: Path, format_number: int) -> dict[str, Any]:
    """The content of a ``results.json``, checked; raises :class:`ResultsError` in one line.

    Checksums are held against the values where there are any: results of older versions have none. Of the settings
    neither the device is checked nor fields that only another version knows.
    """
    raw = _read_object(path)
    if raw.get("format") != format_number:
        raise ResultsError(f"{path} has format {str(raw.get('format'))[:20]}, this version {format_number}; {AGAIN}")
    for name, field in ResultsRecord.model_fields.items():
        if field.is_required() and name not in raw:
            raise ResultsError(f"{path} lacks {name!r}; {AGAIN}")
    if not raw["cells"]:
        raise ResultsError(f"{path} holds no runs of a task; {AGAIN}")
    try:
        ResultsRecord.model_validate(raw)
    except ValidationError as error:
        raise ResultsError(f"{path} is damaged ({describe_validation_error(error)}); {AGAIN}") from None
    names = [(c["policy"], c["seed"]) for c in raw["cells"]]
    if len(set(names)) < len(names):
        raise ResultsError(f"{path} is damaged (it holds a run twice); {AGAIN}")
    if _signed(raw):
        _check_sums(path, raw)
    return raw


def _signed(raw: dict[str, Any]) -> bool:
    """Whether checksums were written with these results: then the whole and every cell must have one."""
    return CHECKSUM in raw or any(isinstance(cell, dict) and CHECKSUM in cell for cell in raw["cells"])


def _check_sums(path: Path, raw: dict[str, Any]) -> None:
    changed = next((cell for cell in raw["cells"] if not matches_checksum(cell)), None)
    if changed is not None:
        where = f"{changed['policy']} at seed {changed['seed']}"
        raise ResultsError(f"{path} is damaged ({where} does not match its checksum); {AGAIN}")
    if CHECKSUM not in raw:
        raise ResultsError(f"{path} is damaged (its runs have checksums and it has none itself); {AGAIN}")
    if not matches_checksum(raw):
        raise ResultsError(f"{path} is damaged (the part outside the runs does not match its checksum); {AGAIN}")


def read_cells(path: Path, format_number: int) -> tuple[list[dict[str, Any]], str | None]:
    """The undamaged cells of a ``results.json``, even if the rest of it is damaged, and a message about the others."""
    if not path.exists():
        return [], None
    try:
        raw = _read_object(path)
    except ResultsError as error:
        return [], str(error).removesuffix(f"; {AGAIN}")
    stored = raw.get("cells")
    if raw.get("format") != format_number or not isinstance(stored, list):
        return [], f"{path} holds no cells of format {format_number}"
    signed = _signed(raw)
    faults = [fault(cell, require_checksum=signed) for cell in stored]
    sound = [cell for cell, wrong in zip(stored, faults, strict=True) if wrong is None]
    first = next((wrong for wrong in faults if wrong is not None), None)
    return sound, None if first is None else f"{len(stored) - len(sound)} runs in {path} are damaged ({first})"


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = read_json(path)
    except OSError as error:
        raise ResultsError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from None
    except ValueError as error:
        raise ResultsError(f"{path} is damaged ({error}); {AGAIN}") from None
    if not isinstance(raw, dict):
        raise ResultsError(f"{path} is damaged (it is no JSON object); {AGAIN}")
    return raw
