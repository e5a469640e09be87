"""The torch state that this package computes in, whatever the caller's: see :func:`own_torch_state`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

CPU = torch.device("cpu")
AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


def _is_own() -> bool:
    """Whether the current state is the package's already; an empty tensor shows three of the defaults."""
    probe = torch.empty(0)
    return (
        torch.is_grad_enabled()
        and not probe.is_inference()
        and probe.dtype is torch.float32
        and probe.device == CPU
        and not any(torch.is_autocast_enabled(kind) for kind in AUTOCAST_DEVICES)
    )


@contextmanager
def own_torch_state() -> Iterator[None]:
    """Compute with gradients on, in float32, without autocast, and with new tensors on the CPU unless told otherwise.

    ``torch.no_grad``, ``torch.inference_mode``, ``torch.set_default_dtype``, ``torch.set_default_device`` and
    ``torch.autocast`` of the caller are lifted within and are in force again afterwards, also after an error.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(CPU)
        for kind in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
        yield


def insulated(function: Callable[P, R]) -> Callable[P, R]:
    """Make ``function`` compute in :func:`own_torch_state`; it costs three microseconds where that is in force."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if _is_own():
            return function(*args, **kwargs)
        with own_torch_state():
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def initial_weights_from(seed: int | None) -> Iterator[None]:
    """Build networks whose initial weights come from ``seed``, and leave torch's global generators as they were.

    With None the weights are drawn from the global generator's state, for networks that are overwritten at once.
    Networks are built on the CPU, so only its generator draws: ``torch.manual_seed`` would seed a GPU's as well.
    """
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


def out_of_inference_mode(model: nn.Module) -> nn.Module:
    """``model`` itself, with parameters and buffers that were made in ``torch.inference_mode`` replaced by equal ones.

    Such tensors can never be trained. Parameters that several modules share stay shared.
    """
    replaced: dict[Tensor, Tensor] = {}
    for module in model.modules():
        own_tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for own in own_tensors:
            for name, tensor in own.items():
                if tensor is not None and tensor.is_inference():
                    if tensor not in replaced:
                        plain = tensor.detach().clone()
                        is_parameter = isinstance(tensor, nn.Parameter)
                        replaced[tensor] = nn.Parameter(plain, tensor.requires_grad) if is_parameter else plain
                    own[name] = replaced[tensor]
    return model
