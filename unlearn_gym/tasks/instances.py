"""Instances: what an episode unlearns and under which conditions, in sets for training and for testing.

As benchmarks of dynamic algorithm configuration have it (DACBench, Eimer et al., IJCAI 2021): an agent is trained on
one set and scored on another, and no instance is in both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from unlearn_gym.errors import SettingsError, describe_validation_error, error_line, shown
from unlearn_gym.files import FormatError, read_json_as, read_yaml, write_json
from unlearn_gym.settings import RunSettings
from unlearn_gym.system.values import Checked
from unlearn_gym.tasks import Task, TaskData, get_task, load_data

INSTANCES = Path(str(files("unlearn_gym"))) / "assets" / "instances"
SPLITS = ("train", "test")
CHANGED_SETTINGS = ("forget_scale", "learning_rate", "horizon")


class Instance(Checked):
    """What one episode unlearns; None leaves the task's or the environment's own value.

    ``num_forget`` of the task's forget samples are to be forgotten, chosen by ``forget_seed``: 1 for a single image.
    The others are neither forgotten nor retained in that episode.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: str = Field(description="which data, and which of its classes: 'mnist-digits:1,3'")
    num_forget: int | None = Field(None, ge=1)
    forget_seed: int = Field(0, ge=0, lt=2**32)  # what torch's CPU generator reads of a seed
    forget_scale: float | None = Field(None, ge=0.01, le=100)
    learning_rate: float | None = Field(None, ge=1e-7, le=1e-1)
    horizon: int | None = Field(None, ge=1, le=10_000)

    @field_validator("task")
    @classmethod
    def _own_name(cls, value: str) -> str:
        """The task's own name: "gaussians-2d:0" is "gaussians-2d"."""
        return get_task(value).name

    @classmethod
    def parse(cls, value: Any) -> Self:
        """``value`` itself, a task's name, or a dict of the fields; raises :class:`SettingsError`."""
        if isinstance(value, cls):
            return value
        try:
            return cls.model_validate({"task": value} if isinstance(value, str) else value)
        except ValidationError as error:
            reason = describe_validation_error(error, cls.model_fields)
            raise SettingsError(f"instance {shown(value)}: {reason}") from None

    def settings(self, task: Task, options: dict[str, Any]) -> RunSettings:
        """The task's settings with an environment's ``options``, and what the instance changes."""
        own = {name: getattr(self, name) for name in CHANGED_SETTINGS if getattr(self, name) is not None}
        return task.settings.override(**{**options, **own})

    def data(self, data: TaskData) -> TaskData:
        """The task's data with the chosen part of its forget set; raises :class:`SettingsError` if it has fewer."""
        if self.num_forget is None:
            return data
        if self.num_forget > len(data.forget):
            raise SettingsError(
                f"num_forget={self.num_forget}, but {self.task!r} has {len(data.forget)} samples to forget"
            )
        generator = torch.Generator().manual_seed(self.forget_seed)
        chosen = torch.randperm(len(data.forget), generator=generator)[: self.num_forget]
        labels = None if data.forget_labels is None else data.forget_labels[chosen]
        return replace(data, forget=data.forget[chosen], forget_labels=labels, forget_size=None)

    def as_info(self) -> dict[str, Any]:
        """The fields that are set, for ``info["instance"]``."""
        return self.model_dump(exclude_none=True)


class Ranges(Checked):
    """What ``count`` instances are drawn from: ``tasks`` equally often, numbers log-uniformly between two bounds.

    ``learning_rate`` is in units of the task's own, ``num_forget`` a share of the task's forget set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    count: int = Field(ge=1, le=100_000, description="each is held in memory and written out")
    tasks: tuple[str, ...] = Field(min_length=1)
    forget_scale: tuple[float, float] = (1.0, 1.0)
    learning_rate: tuple[float, float] = (1.0, 1.0)
    num_forget: tuple[float, float] = (1.0, 1.0)
    horizon: tuple[float, float] = (60, 60)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("forget_scale", "learning_rate", "num_forget", "horizon"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}={[low, high]} must be two numbers above 0, the smaller one first")
        return self

    def draw(self, rng: np.random.Generator) -> tuple[Instance, ...]:
        """The instances, in the order of the tasks."""
        return tuple(self._draw_one(get_task(self.tasks[i % len(self.tasks)]), rng) for i in range(self.count))

    def _draw_one(self, task: Task, rng: np.random.Generator) -> Instance:
        def between(bounds: tuple[float, float]) -> float:
            low, high = map(math.log, bounds)
            return float(f"{math.exp(rng.uniform(low, high)):.3g}")

        share, available = between(self.num_forget), len(load_data(task).forget)
        return Instance(
            task=task.name, forget_scale=between(self.forget_scale), horizon=round(between(self.horizon)),
            learning_rate=float(f"{task.settings.learning_rate * between(self.learning_rate):.3g}"),
            num_forget=None if share >= 1 else max(1, round(share * available)), forget_seed=int(rng.integers(2**31)),
        )  # fmt: skip


class InstanceRanges(Checked):
    """A file of ``configs/instances``: what both sets are drawn from. No task may be in both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0)
    train: Ranges
    test: Ranges

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        shared = {get_task(name).name for name in self.train.tasks} & {get_task(name).name for name in self.test.tasks}
        if shared:
            raise ValueError(f"{min(shared)!r} is in the training and in the test tasks; leave it in one of them")
        return self


class InstanceSets(Checked):
    """A file of instances: one to train on and one to test on. An instance may be the name of its task."""

    train: tuple[Instance, ...]
    test: tuple[Instance, ...]

    @field_validator("train", "test", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return [{"task": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


def build_instances(ranges: Path, out: Path, command: str) -> dict[str, Any]:
    """Draw the sets that a YAML file describes and write them to ``out``; raises :class:`SettingsError`."""
    try:
        described = InstanceRanges.model_validate(read_yaml(ranges))
    except (OSError, FormatError) as error:
        raise SettingsError(f"cannot read {ranges} ({error_line(error)}); name a YAML file") from None
    except ValidationError as error:
        known = [*InstanceRanges.model_fields, *Ranges.model_fields]
        raise SettingsError(f"{ranges}: {describe_validation_error(error, known)}") from None
    rng = np.random.default_rng(described.seed)
    sets = {split: [i.as_info() for i in getattr(described, split).draw(rng)] for split in SPLITS}
    content = {"command": command, "ranges": described.model_dump(mode="json"), **sets}
    write_json(out, content)
    return content


def load_instances(value: str | os.PathLike[str] | Sequence[Any]) -> tuple[Instance, ...]:
    """A set by name, ``"gaussians-2d/train"``; from a file, ``"my.json/test"``; or from a list of instances.

    Raises :class:`SettingsError` for a set that does not exist, is empty, or whose training and test part overlap.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes):
            raise SettingsError(f"instances={shown(value)} must be the name of a set, or a list of instances")
        found = tuple(Instance.parse(one) for one in value)
    else:
        name, slash, split = value.rpartition("/")
        if not slash or split not in SPLITS:
            raise SettingsError(
                f"instances={shown(value)} must end in /train or /test, as in {shipped_sets()[0] + '/train'!r}"
            )
        path = Path(name) if name.endswith(".json") else INSTANCES / f"{name}.json"
        if not path.is_file():
            raise SettingsError(
                f"there are no instances {shown(name)}; known: {', '.join(shipped_sets())}, or a .json file"
            )
        remedy = 'it holds no instances: it must be {"train": [{"task": ...}, ...], "test": [...]}'
        content = read_json_as(path, InstanceSets, SettingsError, remedy)
        sets = {"train": content.train, "test": content.test}
        both = {i.task for i in sets["train"]} & {i.task for i in sets["test"]}
        if both:
            raise SettingsError(f"{path}: task {min(both)!r} is in both sets; an agent's test must be new to it")
        found = sets[split]
    if not found:
        raise SettingsError(f"instances={shown(value)} is empty; name at least one")
    return found


def shipped_sets() -> list[str]:
    """Names of the sets in the package."""
    return sorted(path.stem for path in INSTANCES.glob("*.json"))
