"""Weights and images from outside: damaged files are one line, and no value changes silently."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unlearn_gym.errors import (
    DataError,
    WeightsError,
)
from unlearn_gym.models.weights import load_weights
from unlearn_gym.tasks.data import load_torchvision

from .conftest import fails


def one_layer(tmp_path, tensor):
    path = tmp_path / "w.safetensors"
    save_file({"weight": tensor}, path)
    return torch.nn.Linear(2, 3, bias=False), path


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_of_any_floating_type_are_cast(tmp_path, dtype):
    layer, path = one_layer(tmp_path, torch.full((3, 2), 0.5).to(dtype))
    load_weights(layer, path)
    assert torch.equal(layer.weight.detach(), torch.full((3, 2), 0.5))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((3, 2), 1e300, dtype=torch.float64), torch.full((3, 2), float("nan")),
        torch.ones(3, 2, dtype=torch.int64),
        torch.ones(3, 2, dtype=torch.bool), torch.ones(3, 2, dtype=torch.complex64),
        torch.full((3, 2), float("nan")).to(torch.float8_e4m3fn), torch.ones(3, 2, dtype=torch.uint8),
        torch.zeros(3, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    ],
    ids=lambda t: str(t.dtype),
)  # fmt: skip
def test_weights_that_a_cast_would_change_are_refused_and_nothing_is_loaded(tmp_path, tensor):
    layer, path = one_layer(tmp_path, tensor)
    before = layer.weight.detach().clone()
    assert "'weight' holds" in fails(WeightsError, load_weights, layer, path)
    assert torch.equal(layer.weight.detach(), before)


def test_counters_within_a_network_keep_their_type(tmp_path):
    norm, path = torch.nn.BatchNorm1d(2), tmp_path / "w.safetensors"
    save_file(norm.state_dict(), path)
    load_weights(norm, path)
    save_file(norm.state_dict() | {"num_batches_tracked": torch.tensor(1.5)}, path)
    fails(WeightsError, load_weights, norm, path)


def idx(kind: int, *shape: int, item: bytes) -> bytes:
    return gzip.compress(
        struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape) + item * int(np.prod(shape))
    )


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (idx(0x0D, 3, 28, 28, item=struct.pack(">f", 0.5)), idx(8, 3, item=b"\1")),  # float32
        (idx(10, 3, 28, 28, item=b"\0"), idx(8, 3, item=b"\1")),  # a type that there is not
        (idx(8, 3, 28, 28, item=b"\0"), idx(8, 2, item=b"\1")),  # another number of labels
        (idx(8, 3, 28, 28, item=b"\0"), idx(8, 3, item=b"\x0c")),  # labels of no class
        (gzip.compress(b""), idx(8, 3, item=b"\1")),
        (b"no gzip", idx(8, 3, item=b"\1")),
    ],
    ids=("float", "no type", "other count", "no class", "empty", "no gzip"),
)
def test_a_damaged_idx_file_is_one_line(tmp_path, images, labels):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            path = raw / f"{part}-{name}-ubyte"
            path.with_suffix(".gz").write_bytes(content)
            plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
            path.write_bytes(plain)
    assert "MNIST" in fails(DataError, load_torchvision, "MNIST", tmp_path, train=True)
