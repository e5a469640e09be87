"""Inception features, for users who have the weights: this package ships none and downloads none."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from unlearn_gym.errors import ResultsError
from unlearn_gym.files import sha256
from unlearn_gym.system.torch_state import insulated

WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"
HASH_PREFIX = "6726825d"
BATCH_SIZE = 50


def check_weights(path: Path) -> None:
    """Raise :class:`ResultsError` unless ``path`` is the published file: it is a pickle, and only that one is read."""
    if not path.is_file() or not sha256(path).startswith(HASH_PREFIX):
        raise ResultsError(
            f"{path} is not torch-fidelity's {WEIGHTS_NAME} (a SHA-256 that begins with {HASH_PREFIX}); "
            "give the path to that file, or leave Inception features out"
        )


@lru_cache(maxsize=1)
@insulated
def _extractor(path: Path) -> torch.nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    check_weights(path)
    return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)


@insulated
@torch.inference_mode()
def inception_features(images: Tensor, weights: Path) -> tuple[Tensor, Tensor]:
    """Pool features ``(N, 2048)`` and unbiased logits ``(N, 1008)`` of images ``(N, C, H, W)`` in [-1, 1].

    Raises :class:`ResultsError` when ``weights`` is not the published file.
    """
    extractor, parts = _extractor(weights), []
    for batch in images.split(BATCH_SIZE):
        pixels = ((batch.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        parts.append(extractor(pixels.expand(-1, 3, -1, -1).contiguous()))
    features, logits = (torch.cat(column) for column in zip(*parts, strict=True))
    return features, logits
