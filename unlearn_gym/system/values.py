"""Numbers and switches that come from outside: what counts as one."""

from __future__ import annotations

import math
from decimal import Decimal
from numbers import Integral, Real
from typing import Annotated, Any, TypeGuard, get_args, get_origin

import numpy as np
import torch
from pydantic import BaseModel, ValidationInfo, field_validator
from torch import Tensor

from unlearn_gym.errors import ActionError, shown

SEEDS = 2**32
"""How many seeds differ: torch's CPU generator reads the lower 32 bits alone."""


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether ``value`` is a whole number, Python's or numpy's: ``True`` does not count."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a real number, Python's or numpy's: ``True`` does not count."""
    return isinstance(value, Real) and not isinstance(value, bool)


def one_number(value: Any) -> float:
    """The real number that ``value`` is, or holds as an array, list or tensor of shape ``()`` or ``(1,)``.

    A tensor may require a gradient, be on any device, and have any integer or floating type. NaN and infinity are
    returned as they are. Raises :class:`ActionError` for all
    that is no number (texts, truth values, complex numbers, masked entries) and for more or fewer than one.
    """
    if isinstance(value, float | np.floating):
        return float(value)
    if type(value) is np.ndarray and value.shape in ((), (1,)) and value.dtype.kind == "f":
        return float(value.item())
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Tensor) and value[0].dim() == 0:
        value = value[0]
    try:
        array = _plain_tensor(value).numpy() if isinstance(value, Tensor) else np.asarray(value)
        masked = isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value)
    except (Exception, SystemExit) as error:  # ragged lists, foreign arrays and tensors: each raises what it likes
        raise ActionError(f"action {shown(value)} is not a number ({_why(error)}); give one λ") from None
    if array.size != 1 or array.ndim > 1:
        raise ActionError(f"action has shape {array.shape}; give one λ, as a number or an array of shape (1,)")
    item = array.item()
    if masked or array.dtype.kind not in "fiuO" or not (is_real(item) or isinstance(item, Decimal)):
        raise ActionError(f"action {shown(value)} is{' masked and so' * masked} not a number; give one λ")
    try:
        return float(item)
    except OverflowError:
        return math.inf if item > 0 else -math.inf
    except ValueError:  # of a signalling Decimal
        return math.nan


def numbers_of(actions: Any, count: int) -> list[float]:
    """The ``count`` numbers in ``actions``, of shape ``(count,)`` or ``(count, 1)``; raises :class:`ActionError`."""
    try:
        rows = _plain_tensor(actions).numpy() if isinstance(actions, Tensor) else actions
        rows = rows if isinstance(rows, list | tuple | np.ndarray) else np.asarray(rows)
        found = len(rows)
    except Exception as error:  # foreign arrays and tensors: each raises what it likes
        raise ActionError(
            f"actions {shown(actions)} are no array ({_why(error)}); give one λ for each of {count} environments"
        ) from None
    if found != count:
        shape = rows.shape if isinstance(rows, np.ndarray) else (found,)
        raise ActionError(f"actions of shape {shape}; give one λ for each of {count} environments")
    values = []
    for i, row in enumerate(rows):
        try:
            values.append(one_number(row))
        except ActionError as error:
            raise ActionError(f"environment {i}: {error}") from None
    return values


def _plain_tensor(tensor: Tensor) -> Tensor:
    """``tensor`` as float64 in this process's memory, without its graph."""
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"it is of type {tensor.dtype}")
    return tensor.detach().to("cpu", torch.float64)


def _why(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:100]


class Checked(BaseModel):
    """A model whose numbers must be numbers and whose switches ``True`` or ``False``: pydantic takes "0.5" and ``True``
    for numbers and "no" for a truth value, and does not know numpy's.
    """

    @field_validator("*", mode="before")
    @classmethod
    def _as_declared(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _leaves(cls.model_fields[info.field_name or ""].annotation)
        if bool in kinds:
            return _switch(value) if kinds <= {bool, type(None)} else value
        return _numbers(value) if kinds & {int, float} and str not in kinds else value


def _leaves(annotation: Any) -> set[Any]:
    """The types that an annotation is made of in the end: ``tuple[float, int] | None`` of float, int and None."""
    parts = get_args(annotation)[: 1 if get_origin(annotation) is Annotated else None]
    return {annotation} if not parts else set().union(*map(_leaves, parts))


def _switch(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | np.bool_):
        raise ValueError("must be True or False")
    return value if value is None else bool(value)


def _numbers(value: Any) -> Any:
    """``value`` with numpy's numbers as Python's, at any depth."""
    if value is None or type(value) in (int, float):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_numbers, value))
    if is_real(value):
        return int(value) if is_whole(value) else float(value)
    raise ValueError("must be a number")
