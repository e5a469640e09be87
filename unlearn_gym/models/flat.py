"""All parameters of a network as one vector: norms, updates and snapshots become single calls."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def _layout(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Storage shape and the permutation back, so that channels-last weights keep their strides."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        o, i, h, w = parameter.shape
        return (o, h, w, i), (0, 3, 1, 2)
    return tuple(parameter.shape), tuple(range(parameter.dim()))


class FlatParameters:
    """One contiguous ``vector (P,)`` of which every parameter of ``model`` is a view.

    Writing the vector writes the network. ``gradient_views`` gives, for a gradient vector ``(P,)``,
    the views that :meth:`point_gradients` installs as the parameters' ``.grad``, so that a backward
    pass adds straight into the vector.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no trainable parameters")
        first = self.parameters[0]
        size = sum(p.numel() for p in self.parameters)
        self.vector = nn.Parameter(torch.empty(size, dtype=first.dtype, device=first.device))
        self._layouts = [_layout(p) for p in self.parameters]
        self._places = [
            (module._parameters, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        with torch.no_grad():
            for parameter, view in zip(self.parameters, self.gradient_views(self.vector.data), strict=True):
                view.copy_(parameter)
                parameter.data = view

    def move_to(self, storage: Tensor) -> None:
        """Keep the parameters in ``storage (P,)`` from now on, with the values that they have."""
        storage.copy_(self.vector.data)
        self.vector.data = storage
        for parameter, view in zip(self.parameters, self.gradient_views(storage), strict=True):
            parameter.data = view

    def hold_the_network(self) -> bool:
        """Whether the network still computes with these parameters, and they are still views of the vector.

        ``load_state_dict(assign=True)`` puts others in their place, ``model.double()`` gives them other data.
        """
        place = self.vector.data_ptr()
        for parameter in self.parameters:
            if parameter.data_ptr() != place:
                return False
            place += parameter.nbytes
        return all(parameters.get(name) is parameter for parameters, name, parameter in self._places)

    def gradient_views(self, vector: Tensor) -> list[Tensor]:
        """Views of ``vector (P,)`` with the parameters' shapes and strides."""
        views, start = [], 0
        for parameter, (shape, order) in zip(self.parameters, self._layouts, strict=True):
            stop = start + parameter.numel()
            views.append(vector[start:stop].view(shape).permute(order))
            start = stop
        return views

    def point_gradients(self, views: list[Tensor] | None) -> None:
        """Make ``views`` the parameters' ``.grad`` (None takes them away)."""
        for i, parameter in enumerate(self.parameters):
            parameter.grad = None if views is None else views[i]


def optimizer_state(optimizer: torch.optim.Optimizer, vector: nn.Parameter) -> dict[str, Tensor]:
    """A copy of what ``optimizer`` keeps of ``vector``; empty before its first step."""
    return {k: v.clone() for k, v in optimizer.state[vector].items() if isinstance(v, Tensor)}


def restore_optimizer(optimizer: torch.optim.Optimizer, vector: nn.Parameter, state: dict[str, Tensor]) -> None:
    """Bring back an :func:`optimizer_state`."""
    optimizer.state.pop(vector, None)
    if state:
        optimizer.state[vector] = {k: v.clone() for k, v in state.items()}


@torch.no_grad()
def detached_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are contiguous tensors of their own, not views, without
    gradients: what every other library can save, copy and train.
    """
    copied = copy.deepcopy(model)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
        tensor.grad = None
    return copied
