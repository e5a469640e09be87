"""Train the classifier that the evaluation uses: MNIST digits and Fashion-MNIST garments, 20 classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearn_gym.errors import SettingsError, shown
from unlearn_gym.files import sha256, write_json
from unlearn_gym.making.pretraining import one_cycle
from unlearn_gym.models.classifier import NUM_DIGITS, TROUSERS, DigitGarmentClassifier
from unlearn_gym.models.weights import save_weights
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.system.memory import check_memory
from unlearn_gym.system.torch_state import initial_weights_from, insulated
from unlearn_gym.system.values import SEEDS
from unlearn_gym.tasks.data import load_torchvision, to_model_range

MAX_SHIFT = 2
MAX_NOISE = 0.3


def labelled_images(root: Path, *, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    """Digits with labels 0..9 and garments with labels 10..19."""
    digits, labels = load_torchvision("MNIST", root, train=train, download=download)
    garments, garment_labels = load_torchvision("FashionMNIST", root, train=train, download=download)
    return torch.cat([digits, garments]), torch.cat([labels, garment_labels + NUM_DIGITS])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 2 pixels and add noise of a random strength, in [-1, 1]."""
    padded = F.pad(images, (MAX_SHIFT,) * 4, value=-1.0)
    shifts = torch.randint(2 * MAX_SHIFT + 1, (len(images), 2), generator=generator)
    size = images.shape[-1]
    rows = (shifts[:, :1] + torch.arange(size))[:, None, :, None].expand(-1, 1, -1, padded.shape[-1])
    columns = (shifts[:, 1:] + torch.arange(size))[:, None, None, :].expand(-1, 1, size, -1)
    shifted = padded.gather(2, rows).gather(3, columns)
    strength = MAX_NOISE * torch.rand((len(images), 1, 1, 1), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return (shifted + strength * noise).clamp(-1, 1)


@torch.no_grad()
def classifier_figures(model: DigitGarmentClassifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, and the two error rates that calibrate the forget rate."""
    predicted = torch.cat([model(to_model_range(b))[1].argmax(1) for b in images.split(500)])
    hit, trousers = predicted == labels, predicted == TROUSERS
    return {
        "digit_accuracy": hit[labels < NUM_DIGITS].float().mean().item(),
        "garment_accuracy": hit[labels >= NUM_DIGITS].float().mean().item(),
        "digits_called_trousers": trousers[labels < NUM_DIGITS].float().mean().item(),
        "ones_called_trousers": trousers[labels == 1].float().mean().item(),
        "trousers_called_trousers": trousers[labels == TROUSERS].float().mean().item(),
    }


@insulated
def train_classifier(
    root: Path,
    out: Path,
    *,
    updates: int = 2000,
    batch_size: int = 128,
    seed: int = 0,
    download: bool = False,
    command: str = "",
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Write ``classifier.safetensors`` and its manifest ``classifier.json`` to ``out``.

    All updates' batches are chosen at the start. Raises ``SettingsError`` where that is more than memory holds,
    :class:`FileError` where ``out`` cannot be written to, and :class:`LockError` while another process does.
    """
    if updates < 1 or batch_size < 1:
        raise SettingsError(f"updates={shown(updates)} and batch_size={shown(batch_size)} must be at least 1")
    if not 0 <= seed < SEEDS:
        raise SettingsError(f"seed={shown(seed)} must lie in 0..{SEEDS - 1}")
    check_memory(2 * 8 * updates * batch_size, f"updates={shown(updates)}, batch_size={shown(batch_size)}")
    with folder_lock(out):
        return _train(root, out, updates, batch_size, seed, download, command, progress)


def _train(
    root: Path,
    out: Path,
    updates: int,
    batch_size: int,
    seed: int,
    download: bool,
    command: str,
    progress: Callable[[int, int, float], None] | None,
) -> dict[str, Any]:
    images, labels = labelled_images(root, train=True, download=download)
    weights = (1.0 / torch.bincount(labels).float())[labels]
    generator = torch.Generator().manual_seed(seed)
    with initial_weights_from(seed):
        model = DigitGarmentClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=1e-2)
    chosen = torch.multinomial(weights, updates * batch_size, replacement=True, generator=generator)
    for update, index in enumerate(chosen.view(updates, batch_size)):
        _, logits = model(augment(to_model_range(images[index]), generator))
        loss = F.cross_entropy(logits, labels[index], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 3e-3 * one_cycle(update / updates)
        optimizer.step()
        if progress and update % 50 == 0:
            progress(update, updates, float(loss))
    figures = classifier_figures(model, *labelled_images(root, train=False, download=download))
    path = out / "classifier.safetensors"
    save_weights(path, model.state_dict())
    manifest = {
        "command": command, "updates": updates, "batch_size": batch_size, "seed": seed,
        "figures": figures, "versions": {"torch": torch.__version__}, "sha256": sha256(path),
    }  # fmt: skip
    write_json(out / "classifier.json", manifest)
    return manifest
