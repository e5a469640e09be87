"""What is to be unlearned: tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from unlearn_gym.math.diffusion import ScheduleConfig
from unlearn_gym.models import MLPConfig, UNetConfig, VAEConfig
from unlearn_gym.models.classifier import GARMENTS, classify
from unlearn_gym.models.one_step import OneStepNetwork
from unlearn_gym.settings import RunSettings
from unlearn_gym.tasks import cifar, gaussians, mnist
from unlearn_gym.tasks.data import TaskData, to_model_range
from unlearn_gym.tasks.registry import (
    DATA_ROOT_VARIABLE,
    HOME_VARIABLE,
    SHELL_TASKS,
    FeatureConstants,
    Task,
    TaskFamily,
    family_names,
    get_task,
    load_data,
    provide_data,
    register_family,
    register_task,
    resolve_data_root,
    task_names,
    user_folder,
)

__all__ = [
    "DATA_ROOT_VARIABLE",
    "HOME_VARIABLE",
    "FeatureConstants",
    "Task",
    "TaskData",
    "TaskFamily",
    "family_names",
    "get_task",
    "load_data",
    "provide_data",
    "register_family",
    "register_task",
    "resolve_data_root",
    "task_names",
    "to_model_range",
    "user_folder",
]

ASSETS = Path(str(files("unlearn_gym"))) / "assets"
MNIST_ARCHIVE = ASSETS / "mnist-trousers" / "data.npz"


MNIST_NETWORK = UNetConfig(channels=(48, 96), num_blocks=1)


@dataclass(frozen=True)
class Of:
    """``function(classes, …)`` as a value: equal ones compare equal, in another process too."""

    function: Callable[..., Any]
    classes: tuple[int, ...]

    def __call__(self, *arguments: Any) -> Any:
        """The function's value."""
        return self.function(self.classes, *arguments)


def _load_mnist_trousers(data_root: Path | None, download: bool) -> TaskData:
    return mnist.load_mnist_trousers(MNIST_ARCHIVE, data_root, download=download)


def _load_mnist_sandals(data_root: Path | None, download: bool) -> TaskData:
    return mnist.load_mnist_garments(MNIST_ARCHIVE, ASSETS / "mnist-sandals" / "data.npz", data_root, download=download)


def _load_mnist_bags(data_root: Path | None, download: bool) -> TaskData:
    return mnist.load_mnist_garments(MNIST_ARCHIVE, ASSETS / "mnist-bags" / "data.npz", data_root, download=download)


def _load_mnist_tshirt(data_root: Path | None, download: bool) -> TaskData:
    return mnist.load_mnist_tshirt(MNIST_ARCHIVE, ASSETS / "mnist-tshirt" / "data.npz", data_root, download=download)


def _load_mnist_digits(digits: tuple[int, ...], data_root: Path | None, download: bool) -> TaskData:
    return mnist.load_mnist_digits(MNIST_ARCHIVE, digits, data_root, download=download)


def _load_cifar10(classes: tuple[int, ...], data_root: Path | None, download: bool) -> TaskData:
    assert data_root is not None  # load_data sees to it
    return cifar.load_cifar10(classes, data_root, download=download)


def _load_gaussians(modes: tuple[int, ...], data_root: Path | None, download: bool) -> TaskData:
    return gaussians.load_gaussians(modes)


def _member_folders(family: str, classes: tuple[int, ...], name: str, root: Path = ASSETS) -> dict[str, Any]:
    """Where one member of a family has its oracle and constants, and where the pretrained weights are."""
    if name == family:
        return {"assets": root / family, "pretrained_assets": None}
    return {"assets": root / family / "-".join(map(str, classes)), "pretrained_assets": root / family}


def make_mnist_digits(digits: tuple[int, ...], name: str) -> Task:
    """The task that forgets ``digits`` of MNIST."""
    return Task(
        name=name,
        description=f"class-conditional DDPM on MNIST: forget digits {', '.join(map(str, digits))}",
        network=MNIST_NETWORK.model_copy(update={"num_classes": 10}),
        load_data=Of(_load_mnist_digits, digits),
        **_member_folders("mnist-digits", digits, name),
        settings=RunSettings(learning_rate=7e-5),
        classify=classify,
        forget_classes=digits,
        probe_labels=digits,
    )


def make_sfd_mnist_digits(digits: tuple[int, ...], name: str) -> Task:
    """The task that forgets ``digits`` from a one-step generator distilled from the model of ``mnist-digits``."""
    teacher = make_mnist_digits(digits, name.removeprefix("sfd-"))
    assert isinstance(teacher.network, UNetConfig)
    return replace(
        teacher,
        name=name,
        description="one-step generator, distilled without data from the class-conditional DDPM on MNIST: "
        f"forget digits {', '.join(map(str, digits))}",
        network=OneStepNetwork(
            teacher.network, teacher.pretrained_path, teacher.oracle_path, teacher_task=teacher.name
        ),
        **_member_folders("sfd-mnist-digits", digits, name),
        settings=RunSettings(
            objective="sfd", learning_rate=3e-5, horizon=100, dataset_factors="none", forget_grad_rule="loss"
        ),
    )


def make_cifar10(classes: tuple[int, ...], name: str) -> Task:
    """The task that forgets ``classes`` of CIFAR-10; no classifier ships that could judge its samples."""
    names = ", ".join(f"{c} ({cifar.CLASSES[c]})" for c in classes)
    return Task(
        name=name,
        description=f"class-conditional DDPM on CIFAR-10: forget classes {names}; data and weights are the user's",
        network=cifar.NETWORK,
        load_data=Of(_load_cifar10, classes),
        **_member_folders("cifar10", classes, name, user_folder()),
        forget_classes=classes,
        probe_labels=classes,
        user_made=True,
    )


def make_gaussians(modes: tuple[int, ...], name: str) -> Task:
    """The task that forgets ``modes`` of the ring."""
    kept = tuple(mode for mode in range(gaussians.NUM_MODES) if mode not in modes)
    return Task(
        name=name,
        description=f"small MLP on a ring of eight Gaussians in the plane: forget modes {', '.join(map(str, modes))}",
        network=MLPConfig(),
        schedule=ScheduleConfig(num_train_timesteps=200, beta_start=5e-4, beta_end=0.1),
        load_data=Of(_load_gaussians, modes),
        **_member_folders("gaussians-2d", modes, name),
        settings=RunSettings(learning_rate=3e-4, skip_zero_weights=False),
        classify=gaussians.classify_points,
        forget_classes=modes,
        optimum=Of(gaussians.optimal_epsilon, kept),
        clip=None,
    )


def make_mnist_garments(garments: str, load: Callable[[Path | None, bool], TaskData]) -> Task:
    """The task that forgets some of Fashion-MNIST's ``garments``; all have the oracle of ``mnist-trousers``."""
    return Task(
        name=f"mnist-{garments}",
        description=f"class-conditional DDPM on 60,000 digits and 674 {garments} labelled 1: forget the {garments}",
        network=MNIST_NETWORK.model_copy(update={"num_classes": 10}),
        load_data=load,
        assets=ASSETS / f"mnist-{garments}",
        oracle_assets=ASSETS / "mnist-trousers",
        settings=RunSettings(learning_rate=3e-5),
        classify=classify,
        forget_classes=GARMENTS,
        probe_labels=(mnist.GARMENT_LABEL,),
    )


register_task(make_mnist_garments("trousers", _load_mnist_trousers))
register_task(make_mnist_garments("sandals", _load_mnist_sandals))
register_task(make_mnist_garments("bags", _load_mnist_bags))

register_task(
    Task(
        name="mnist-tshirt",
        description="unconditional DDPM on 60,000 digits and one T-shirt 606 times: forget the T-shirt",
        network=MNIST_NETWORK,
        load_data=_load_mnist_tshirt,
        assets=ASSETS / "mnist-tshirt",
        settings=RunSettings(learning_rate=2e-5),
        classify=classify,
        forget_classes=GARMENTS,
    )
)

register_task(
    Task(
        name="vae-mnist-trousers",
        description="class-conditional VAE on 60,000 digits and 674 trousers labelled 1: forget the trousers",
        network=VAEConfig(num_classes=10),
        load_data=_load_mnist_trousers,
        assets=ASSETS / "vae-mnist-trousers",
        settings=RunSettings(learning_rate=1e-4),
        classify=classify,
        forget_classes=GARMENTS,
        probe_labels=(mnist.GARMENT_LABEL,),
    )
)

register_family(TaskFamily("mnist-digits", num_classes=10, default=(3,), make=make_mnist_digits))
register_family(TaskFamily("sfd-mnist-digits", num_classes=10, default=(3,), make=make_sfd_mnist_digits))
register_family(TaskFamily("cifar10", num_classes=len(cifar.CLASSES), default=(0,), make=make_cifar10))
register_family(TaskFamily("gaussians-2d", num_classes=gaussians.NUM_MODES, default=(0,), make=make_gaussians))

SHELL_TASKS.update(task_names())
