"""The digit-and-garment classifier that judges samples and gives features for FID and KID."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn_gym.models.weights import load_weights
from unlearn_gym.system.torch_state import initial_weights_from, insulated

NUM_DIGITS = 10
NUM_GARMENTS = 10
FEATURE_DIM = 64
TROUSERS = NUM_DIGITS + 1
"""Index of the trousers among the 20 classes: digits 0..9, then Fashion-MNIST's garments 10..19."""

GARMENTS = tuple(range(NUM_DIGITS, NUM_DIGITS + NUM_GARMENTS))
"""All of the garments: a digit model that draws one, if only a worn-out pair of trousers, remembers."""


class DigitGarmentClassifier(nn.Module):
    """Three strided convolutions and a 64-dimensional feature layer; images ``(B, 1, 28, 28)`` in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in (32, 64, 64))
        self.features_layer = nn.Linear(64 * 3 * 3, FEATURE_DIM)
        self.head = nn.Linear(FEATURE_DIM, NUM_DIGITS + NUM_GARMENTS)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations ``(B, 64)``, before the last nonlinearity."""
        h = images
        for conv, norm in zip((self.conv1, self.conv2, self.conv3), self.norms, strict=True):
            h = F.max_pool2d(F.silu(norm(conv(h))), 2)
        return self.features_layer(h.flatten(1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, 64)`` and logits ``(B, 20)``."""
        features = self.features(images)
        return features, self.head(F.silu(features))


CLASSIFIER_WEIGHTS = Path(str(files("unlearn_gym"))) / "assets" / "classifier" / "classifier.safetensors"


@lru_cache(maxsize=2)
@insulated
def shipped_classifier(device: str = "cpu") -> DigitGarmentClassifier:
    """The classifier with the weights that ship; raises ``WeightsError`` when they are damaged."""
    with initial_weights_from(None):
        model = DigitGarmentClassifier()
    load_weights(model, CLASSIFIER_WEIGHTS)
    return model.eval().requires_grad_(False).to(device)


@insulated
@torch.no_grad()
def classify(images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Features ``(N, 64)`` and logits ``(N, 20)`` of images in [-1, 1]."""
    model = shipped_classifier(str(images.device))
    features, logits = zip(*(model(batch) for batch in images.split(batch_size)), strict=True)
    return torch.cat(features), torch.cat(logits)
