"""CIFAR-10 (Krizhevsky, 2009): colour photographs of ten classes at 32×32, some of the classes to be forgotten.

Nothing of it is in the package: the images come through torchvision, the weights are the user's to train.
"""

from __future__ import annotations

from pathlib import Path

from unlearn_gym.models import UNetConfig
from unlearn_gym.tasks.data import TaskData, load_torchvision, part_by_class

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NETWORK = UNetConfig(image_channels=3, image_size=32, channels=(64, 128, 256), num_blocks=1, num_classes=len(CLASSES))
"""The candidate of ``unlearn-gym network-costs`` with most parameters for its time; nobody has measured its quality."""


def load_cifar10(classes: tuple[int, ...], data_root: Path, *, download: bool = False) -> TaskData:
    """All of CIFAR-10, images uint8 ``(N, 3, 32, 32)`` with labels: the training images of ``classes`` to be
    forgotten, those of all others to be retained, the test images unseen and held out.

    Raises ``DataError`` where ``data_root`` does not hold ``cifar-10-batches-py`` as published.
    """
    train, test = (load_torchvision("CIFAR10", data_root, train=part, download=download) for part in (True, False))
    return part_by_class(train, test, classes)
