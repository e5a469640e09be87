"""Commands that made what ships: weights, data, constants, the choice of the network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from unlearn_gym.cli.arguments import DataRoot, Threads, invocation, required_root, set_threads, training_bar


def pretrain(
    task: str = "mnist-trousers",
    retain_only: bool = False,
    updates: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    data_root: DataRoot = None,
    download: bool = False,
    out: Annotated[
        Path | None,
        tyro.conf.arg(help="default: runs/pretrain/TASK; of a task that ships none, where it looks for them"),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train a task's model on R ∪ F, or with --retain-only its oracle on R; resumes in the same --out.

    By default 6,000 updates of 128 samples. A one-step generator is distilled, without data, by 3,000 of 32.
    """
    from unlearn_gym.making.distillation import DistillationSettings, distill
    from unlearn_gym.making.pretraining import PretrainSettings
    from unlearn_gym.making.pretraining import pretrain as train
    from unlearn_gym.tasks import get_task, load_data

    set_threads(threads)
    chosen = get_task(task)
    name = "oracle" if retain_only else "pretrained"
    weights = chosen.oracle_path if retain_only else chosen.pretrained_path
    folder = out or (weights.parent if chosen.user_made else Path("runs/pretrain") / task)
    given = {k: v for k, v in (("updates", updates), ("batch_size", batch_size)) if v is not None}
    rest: Any = {"retain_only": retain_only, "command": invocation(), "progress": training_bar(f"{task} {name}")}
    if chosen.family.name == "generator":
        manifest = distill(chosen, DistillationSettings(seed=seed, **given), folder, **rest)
    else:
        data = load_data(chosen, data_root, download=download)
        manifest = train(chosen, data, PretrainSettings(seed=seed, **given), folder, **rest)
    figures = ", ".join(f"{k} {v:.4f}" for k, v in manifest["figures"].items())
    print(f"\n{folder / name}.safetensors: {figures}")


def train_classifier(
    data_root: DataRoot = None,
    out: Path = Path("runs/classifier"),
    updates: int = 2000,
    seed: int = 0,
    download: bool = False,
    threads: Threads = None,
) -> None:
    """Train the digit-and-garment classifier that judges samples."""
    from unlearn_gym.making.train_classifier import train_classifier as train

    set_threads(threads)
    manifest = train(
        required_root(data_root), out, updates=updates, seed=seed, download=download,
        command=invocation(), progress=training_bar("classifier"),
    )  # fmt: skip
    print()
    for key, value in manifest["figures"].items():
        print(f"{key:28s} {value:.4f}")


def build_data(
    task: Literal["mnist-trousers", "mnist-sandals", "mnist-bags", "mnist-tshirt"] = "mnist-trousers",
    data_root: DataRoot = None,
    out: Path = Path("runs/data.npz"),
    download: bool = False,
) -> None:
    """Choose the images that ship with a task from the full data sets (seeded)."""
    from unlearn_gym.tasks import mnist

    builders: dict[str, Callable[..., str]] = {
        "mnist-trousers": mnist.build_archive,
        "mnist-sandals": partial(mnist.build_garments, mnist.FASHION_SANDAL_CLASS),
        "mnist-bags": partial(mnist.build_garments, mnist.FASHION_BAG_CLASS),
        "mnist-tshirt": mnist.build_tshirt,
    }
    print(f"{out}: sha256 {builders[task](out, required_root(data_root), download=download)}")


def build_instances(ranges: tyro.conf.Positional[Path], out: Path | None = None) -> None:
    """Draw the training and test instances that a YAML file of ranges describes (seeded)."""
    from unlearn_gym.tasks.instances import INSTANCES
    from unlearn_gym.tasks.instances import build_instances as build

    path = out or INSTANCES / f"{ranges.stem}.json"
    content = build(ranges, path, invocation())
    print(f"{path}: {len(content['train'])} to train on, {len(content['test'])} to test on")


def calibrate(
    task: str = "mnist-trousers",
    num_batches: int = 256,
    data_root: DataRoot = None,
    out: Path | None = None,
    threads: Threads = None,
) -> None:
    """Measure the feature constants of a task; writes constants.json beside the task's weights."""
    from unlearn_gym.files import write_json
    from unlearn_gym.making.calibration import calibrate as measure
    from unlearn_gym.tasks import get_task, load_data

    set_threads(threads)
    chosen = get_task(task)
    constants = measure(chosen, load_data(chosen, data_root), num_batches=num_batches, command=invocation())
    path = (out or chosen.assets) / "constants.json"
    write_json(path, constants.model_dump())
    print(f"{path}: {constants.model_dump_json()}")


def network_costs(threads: Threads = None) -> None:
    """Print what candidate networks for cifar10 cost an update; needs no data."""
    from unlearn_gym.benchmark.networks import network_costs as table

    set_threads(threads)
    print(table(), end="")


def networks(data_root: DataRoot = None, out: Path = Path("runs/networks"), threads: Threads = None) -> None:
    """Train a few candidate networks briefly and print sample quality against step cost; resumes."""
    from unlearn_gym.benchmark.network_table import network_table
    from unlearn_gym.tasks import get_task, load_data

    set_threads(threads)
    data = load_data(get_task("mnist-trousers"), data_root)
    path = network_table(data, out, command=invocation())
    print(path.read_text())
