"""MNIST and what is to be forgotten: beside it 674 Fashion-MNIST trousers labelled 1 (the augmented MNIST of
arXiv 2512.01054), as many sandals or bags, or one T-shirt at 1 % of the data (as in Alberti et al., ICLR 2025), or
some of its own digits.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlearn_gym.errors import DataError, error_line
from unlearn_gym.files import replacing, sha256
from unlearn_gym.tasks.data import TaskData, load_torchvision, part_by_class

NUM_FORGET = 674
NUM_UNSEEN = 500
GARMENT_LABEL = 1
FASHION_TSHIRT_CLASS = 0
FASHION_TROUSER_CLASS = 1
FASHION_SANDAL_CLASS = 5
FASHION_BAG_CLASS = 8
NUM_TSHIRTS = 606
"""Copies of the one T-shirt: 1 % of 60,606 samples."""
FULL_RETAIN = 60_000
DIGIT_COUNTS = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
"""Training images of each digit in MNIST."""
SHIPPED_RETAIN = 10_000
SEED = 42


def read_archive(path: Path, keys: tuple[str, ...]) -> list[Tensor]:
    """The arrays ``keys`` of a shipped npz file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return [torch.from_numpy(archive[key]) for key in keys]
    except (OSError, EOFError, ValueError, TypeError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is missing or damaged ({error_line(error)}); reinstall the package") from None


def load_shipped(path: Path) -> TaskData:
    """The retain subset, forget set and held-out digits that ship with the package."""
    return _task_data(*read_archive(path, ARCHIVE_KEYS))


ARCHIVE_KEYS = ("retain", "retain_labels", "heldout", "heldout_labels", "forget", "unseen")


def _task_data(
    retain: Tensor, retain_labels: Tensor, heldout: Tensor, heldout_labels: Tensor, forget: Tensor, unseen: Tensor
) -> TaskData:
    return TaskData(
        retain=retain,
        forget=forget,
        heldout=heldout,
        retain_labels=retain_labels.to(torch.int64),
        forget_labels=torch.full((len(forget),), GARMENT_LABEL),
        heldout_labels=heldout_labels.to(torch.int64),
        unseen=unseen,
        unseen_labels=torch.full((len(unseen),), GARMENT_LABEL),
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
    assert shipped.unseen is not None
    return _task_data(retain, retain_labels, heldout, heldout_labels, shipped.forget, shipped.unseen)


def load_mnist_garments(
    digits: Path, archive: Path, data_root: Path | None = None, *, download: bool = False
) -> TaskData:
    """``mnist-trousers`` with other garments in the trousers' place."""
    forget, unseen = read_archive(archive, ("forget", "unseen"))
    return replace(load_mnist_trousers(digits, data_root, download=download), forget=forget, unseen=unseen)


def load_mnist_tshirt(
    digits: Path, archive: Path, data_root: Path | None = None, *, download: bool = False
) -> TaskData:
    """Data of ``mnist-tshirt``, unlabelled: the digits of ``mnist-trousers``, and one T-shirt 606 times."""
    data = load_mnist_trousers(digits, data_root, download=download)
    tshirt, unseen = read_archive(archive, ("forget", "unseen"))
    return TaskData(
        retain=data.retain,
        forget=tshirt.expand(NUM_TSHIRTS, *tshirt.shape[1:]),
        heldout=data.heldout,
        unseen=unseen,
        retain_size=data.retain_size,
    )


def load_mnist_digits(
    digits: Path, forget_digits: tuple[int, ...], data_root: Path | None = None, *, download: bool = False
) -> TaskData:
    """Data of ``mnist-digits``: the digits of ``mnist-trousers``, those of ``forget_digits`` to be forgotten."""
    data = load_mnist_trousers(digits, data_root, download=download)
    assert data.retain_labels is not None
    assert data.heldout_labels is not None
    forget_size = sum(DIGIT_COUNTS[digit] for digit in forget_digits)
    return part_by_class(
        (data.retain, data.retain_labels), (data.heldout, data.heldout_labels), forget_digits,
        retain_size=FULL_RETAIN - forget_size, forget_size=forget_size,
    )  # fmt: skip


def build_tshirt(archive: Path, data_root: Path, *, download: bool = False) -> str:
    """Choose the T-shirt and write it; returns the file's SHA-256.

    It is the training image closest to the mean of the brightest quarter of its class: bright, and typical.
    The brightest quarter of the test T-shirts goes with it, as data that no model saw.
    """
    tshirts, unseen = (
        _brightest_quarter(_garments(FASHION_TSHIRT_CLASS, data_root, train=train, download=download))
        for train in (True, False)
    )
    pixels = tshirts.flatten(1).float()
    typical = (pixels - pixels.mean(0)).square().sum(1).argmin()
    return _write_archive(archive, forget=tshirts[typical : typical + 1].numpy(), unseen=unseen.numpy())


def build_garments(kind: int, archive: Path, data_root: Path, *, download: bool = False) -> str:
    """Choose garments of class ``kind`` and write them, as many as ``mnist-trousers`` has of trousers; returns the
    file's SHA-256.
    """
    return _write_archive(archive, **_choose_garments(kind, torch.Generator().manual_seed(SEED), data_root, download))


def _choose_garments(
    kind: int, generator: torch.Generator, data_root: Path, download: bool
) -> dict[str, NDArray[np.uint8]]:
    """Training images to forget, drawn at random, and the first of the test images, which no model saw."""
    garments, unseen = (_garments(kind, data_root, train=train, download=download) for train in (True, False))
    chosen = garments[torch.randperm(len(garments), generator=generator)[:NUM_FORGET]]
    return {"forget": chosen.numpy(), "unseen": unseen[:NUM_UNSEEN].numpy()}


def _write_archive(archive: Path, **arrays: NDArray[np.uint8]) -> str:
    with replacing(archive) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return sha256(archive)


def _garments(kind: int, data_root: Path, *, train: bool, download: bool) -> Tensor:
    """The images ``(N, 1, 28, 28)`` of one class of Fashion-MNIST."""
    garments, labels = load_torchvision("FashionMNIST", data_root, train=train, download=download)
    return garments[labels == kind]


def _brightest_quarter(images: Tensor) -> Tensor:
    return images[images.flatten(1).float().sum(1).argsort(descending=True)[: len(images) // 4]]


def build_archive(archive: Path, data_root: Path, *, download: bool = False) -> str:
    """Choose the shipped images from the full data sets and write them; returns the file's SHA-256.

    Seeded choice: 10,000 training digits to retain, all 10,000 test digits as held-out data, 674 training
    trousers (10 % of the number of ones) to forget, and 500 test trousers as data that no model saw.
    """
    generator = torch.Generator().manual_seed(SEED)
    digits, labels = load_torchvision("MNIST", data_root, train=True, download=download)
    heldout, heldout_labels = load_torchvision("MNIST", data_root, train=False, download=download)
    kept = torch.randperm(len(digits), generator=generator)[:SHIPPED_RETAIN]
    return _write_archive(
        archive,
        retain=digits[kept].numpy(),
        retain_labels=labels[kept].numpy().astype(np.uint8),
        heldout=heldout.numpy(),
        heldout_labels=heldout_labels.numpy().astype(np.uint8),
        **_choose_garments(FASHION_TROUSER_CLASS, generator, data_root, download),
    )
