"""How much memory a computation needs, estimated before it begins: Linux kills a process that runs out of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from unlearn_gym.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor

PROCESS_BYTES = 300 * 2**20
"""What a Python process with torch takes."""
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may use."""


def check_memory(needed: int, what: str, device: str = "cpu") -> None:
    """Raise :class:`SettingsError` where ``what`` needs more bytes than ``device``, or this machine, has in all."""
    has = total_memory(device)
    if needed > has:
        raise SettingsError(
            f"{what} needs about {_gib(needed)} GiB of memory, and {device!r} has {_gib(has)}; choose smaller sizes"
        )


def _gib(count: float) -> str:
    count = min(count, 1e300)  # whole numbers may be beyond what a float holds
    return f"{count / 2**30:,.0f}" if 2**34 <= count < 2**60 else f"{count / 2**30:.2g}"


def total_memory(device: str = "cpu") -> float:
    """Bytes of memory of a CUDA device; for any other, the machine's or the container's limit; inf if unknown."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    try:
        found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    except (AttributeError, ValueError, OSError):  # not on Windows
        found = []
    for path in MEMORY_LIMITS:
        try:
            found.append(float(Path(path).read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return min(found, default=math.inf)


def saved_bytes(function: Callable[[], object]) -> int:
    """Bytes that autograd keeps for backward passes while ``function`` runs, parameters included."""
    import torch

    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), hooks:
        function()
    return sum(kept.values())


def bytes_per_sample(function: Callable[[int], object]) -> int:
    """What each sample adds to the memory of ``function(batch_size)``, which is called with two small batches."""
    return max(0, saved_bytes(lambda: function(8)) - saved_bytes(lambda: function(4))) // 4
