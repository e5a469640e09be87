"""What a step's action means: from what an agent gives to an :class:`unlearn_gym.run.actions.Action`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from unlearn_gym.errors import ActionError
from unlearn_gym.run.actions import Action
from unlearn_gym.system.values import one_number

ACTION_TOLERANCE = 1e-6


def parse_action(action: Any, lambda_min: float, lambda_max: float) -> Action:
    """What ``action`` decides: an :class:`Action`, or the one whose λ it is as a number or an array of shape ``(1,)``
    (see :func:`unlearn_gym.system.values.one_number`).

    Raises :class:`ActionError` for all that is no number, and for a λ outside the range by more than rounding.
    """
    given = action if isinstance(action, Action) else Action(one_number(action))
    lambda_ = one_number(given.lambda_)  # an action's own may be any number too
    if not lambda_min - ACTION_TOLERANCE <= lambda_ <= lambda_max + ACTION_TOLERANCE:
        raise ActionError(
            f"λ={lambda_} must lie in [{lambda_min}, {lambda_max}]; for an agent that acts in [-1, 1], wrap the "
            "environment in gymnasium.wrappers.RescaleAction"
        )
    within = min(max(lambda_, lambda_min), lambda_max)
    return given if within == given.lambda_ else replace(given, lambda_=within)
