"""MNIST and what is to be forgotten beside it, from Fashion-MNIST: 674 trousers labelled 1 (the augmented MNIST of
arXiv 2512.01054), or one T-shirt at 1 % of the data (as in Alberti et al., ICLR 2025).
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlearn_gym.errors import DataError, error_line
from unlearn_gym.tasks.data import TaskData

NUM_FORGET = 674
TROUSERS_LABEL = 1
FASHION_TROUSER_CLASS = 1
FASHION_TSHIRT_CLASS = 0
NUM_TSHIRTS = 606
"""Copies of the one T-shirt: 1 % of 60,606 samples."""
FULL_RETAIN = 60_000
SHIPPED_RETAIN = 10_000
SEED = 42


def load_torchvision(name: str, root: Path, *, train: bool, download: bool = False) -> tuple[Tensor, Tensor]:
    """``MNIST`` or ``FashionMNIST`` through torchvision: uint8 ``(N, 1, 28, 28)`` and int64 ``(N,)``."""
    from torchvision import datasets

    if not root.is_dir() and not download:
        raise DataError(f"data root {root} is not a folder; correct it, or let torchvision fill it with --download")
    try:
        dataset = getattr(datasets, name)(root=str(root), train=train, download=download)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        raise DataError(
            f"no usable {name} under {root} ({str(error).splitlines()[0]}); "
            "name the folder that holds it with --data-root, or let torchvision fill it with --download"
        ) from None
    return dataset.data.unsqueeze(1), dataset.targets.to(torch.int64)


def read_archive(path: Path, keys: tuple[str, ...]) -> list[Tensor]:
    """The arrays ``keys`` of a shipped npz file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return [torch.from_numpy(archive[key]) for key in keys]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is missing or damaged ({error_line(error)}); reinstall the package") from None


def load_shipped(path: Path) -> TaskData:
    """The retain subset, forget set and held-out digits that ship with the package."""
    return _task_data(*read_archive(path, ARCHIVE_KEYS))


ARCHIVE_KEYS = ("retain", "retain_labels", "heldout", "heldout_labels", "forget")


def _task_data(
    retain: Tensor, retain_labels: Tensor, heldout: Tensor, heldout_labels: Tensor, forget: Tensor
) -> TaskData:
    return TaskData(
        retain=retain,
        forget=forget,
        heldout=heldout,
        retain_labels=retain_labels.to(torch.int64),
        forget_labels=torch.full((len(forget),), TROUSERS_LABEL),
        heldout_labels=heldout_labels.to(torch.int64),
    )


def load_mnist_trousers(archive: Path, data_root: Path | None = None, *, download: bool = False) -> TaskData:
    """Data of ``mnist-trousers``: all of MNIST from ``data_root``, or the shipped part of it.

    The forget images are the shipped ones either way, so runs with and without a data root forget
    the same set.
    """
    shipped = load_shipped(archive)
    if data_root is None:
        return replace(shipped, retain_size=FULL_RETAIN)
    retain, retain_labels = load_torchvision("MNIST", data_root, train=True, download=download)
    heldout, heldout_labels = load_torchvision("MNIST", data_root, train=False, download=download)
    return _task_data(retain, retain_labels, heldout, heldout_labels, shipped.forget)


def load_mnist_tshirt(
    digits: Path, archive: Path, data_root: Path | None = None, *, download: bool = False
) -> TaskData:
    """Data of ``mnist-tshirt``, unlabelled: the digits of ``mnist-trousers``, and one T-shirt 606 times."""
    data = load_mnist_trousers(digits, data_root, download=download)
    (tshirt,) = read_archive(archive, ("forget",))
    return TaskData(
        retain=data.retain,
        forget=tshirt.expand(NUM_TSHIRTS, *tshirt.shape[1:]),
        heldout=data.heldout,
        retain_size=data.retain_size,
    )


def build_tshirt(archive: Path, data_root: Path, *, download: bool = False) -> str:
    """Choose the T-shirt and write it; returns the file's SHA-256.

    It is the training image closest to the mean of the brightest quarter of its class: bright, and typical.
    """
    garments, labels = load_torchvision("FashionMNIST", data_root, train=True, download=download)
    tshirts = garments[labels == FASHION_TSHIRT_CLASS]
    pixels = tshirts.flatten(1).float()
    bright = pixels.sum(1).argsort(descending=True)[: len(tshirts) // 4]
    typical = bright[(pixels[bright] - pixels[bright].mean(0)).square().sum(1).argmin()]
    archive.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(archive, forget=tshirts[typical : typical + 1].numpy())
    return hashlib.sha256(archive.read_bytes()).hexdigest()


def build_archive(archive: Path, data_root: Path, *, download: bool = False) -> str:
    """Choose the shipped images from the full data sets and write them; returns the file's SHA-256.

    Seeded choice: 10,000 training digits to retain, all 10,000 test digits as held-out data, and
    674 training trousers (10 % of the number of ones) to forget.
    """
    generator = torch.Generator().manual_seed(SEED)
    digits, labels = load_torchvision("MNIST", data_root, train=True, download=download)
    heldout, heldout_labels = load_torchvision("MNIST", data_root, train=False, download=download)
    garments, garment_labels = load_torchvision("FashionMNIST", data_root, train=True, download=download)
    kept = torch.randperm(len(digits), generator=generator)[:SHIPPED_RETAIN]
    trousers = garments[garment_labels == FASHION_TROUSER_CLASS]
    chosen = trousers[torch.randperm(len(trousers), generator=generator)[:NUM_FORGET]]
    arrays: dict[str, NDArray[np.uint8]] = {
        "retain": digits[kept].numpy(),
        "retain_labels": labels[kept].numpy().astype(np.uint8),
        "heldout": heldout.numpy(),
        "heldout_labels": heldout_labels.numpy().astype(np.uint8),
        "forget": chosen.numpy(),
    }
    archive.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(archive, **arrays)  # type: ignore[arg-type]
    return hashlib.sha256(archive.read_bytes()).hexdigest()
