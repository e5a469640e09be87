"""What is to be unlearned: tasks by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from unlearn_gym.diffusion import ScheduleConfig
from unlearn_gym.models import MLPConfig, UNetConfig
from unlearn_gym.models.classifier import GARMENTS, classify
from unlearn_gym.settings import RunSettings
from unlearn_gym.tasks import gaussians, mnist
from unlearn_gym.tasks.data import TaskData, to_model_range
from unlearn_gym.tasks.registry import (
    DATA_ROOT_VARIABLE,
    FeatureConstants,
    Task,
    get_task,
    load_data,
    provide_data,
    register_task,
    resolve_data_root,
    task_names,
)

__all__ = [
    "DATA_ROOT_VARIABLE",
    "FeatureConstants",
    "Task",
    "TaskData",
    "get_task",
    "load_data",
    "provide_data",
    "register_task",
    "resolve_data_root",
    "task_names",
    "to_model_range",
]

ASSETS = Path(str(files("unlearn_gym"))) / "assets"
MNIST_ARCHIVE = ASSETS / "mnist-trousers" / "data.npz"


def _load_mnist_trousers(data_root: Path | None, download: bool) -> TaskData:
    return mnist.load_mnist_trousers(MNIST_ARCHIVE, data_root, download=download)


def _load_mnist_tshirt(data_root: Path | None, download: bool) -> TaskData:
    return mnist.load_mnist_tshirt(MNIST_ARCHIVE, ASSETS / "mnist-tshirt" / "data.npz", data_root, download=download)


def _load_gaussians(data_root: Path | None, download: bool) -> TaskData:
    return gaussians.load_gaussians()


def _classify_points(points: Tensor) -> tuple[Tensor, Tensor]:
    return points.to(torch.float32), gaussians.nearest_mode(points)


register_task(
    Task(
        name="mnist-trousers",
        description="class-conditional DDPM on 60,000 digits and 674 trousers labelled 1: forget the trousers",
        network=UNetConfig(channels=(48, 96), num_blocks=1, num_classes=10),
        load_data=_load_mnist_trousers,
        assets=ASSETS / "mnist-trousers",
        settings=RunSettings(learning_rate=3e-5),
        classify=classify,
        forget_classes=GARMENTS,
        probe_label=mnist.TROUSERS_LABEL,
    )
)

register_task(
    Task(
        name="mnist-tshirt",
        description="unconditional DDPM on 60,000 digits and one T-shirt 606 times: forget the T-shirt",
        network=UNetConfig(channels=(48, 96), num_blocks=1),
        load_data=_load_mnist_tshirt,
        assets=ASSETS / "mnist-tshirt",
        settings=RunSettings(learning_rate=2e-5),
        classify=classify,
        forget_classes=GARMENTS,
    )
)

register_task(
    Task(
        name="gaussians-2d",
        description="small MLP on a ring of eight Gaussians in the plane: forget the first",
        network=MLPConfig(),
        schedule=ScheduleConfig(num_train_timesteps=200, beta_start=5e-4, beta_end=0.1),
        load_data=_load_gaussians,
        assets=ASSETS / "gaussians-2d",
        settings=RunSettings(learning_rate=3e-4, skip_zero_weights=False),
        classify=_classify_points,
        forget_classes=(0,),
        clip=None,
    )
)
