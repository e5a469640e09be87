"""What a policy is: it is asked for λ before every update of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from unlearn_gym.run.actions import Action
from unlearn_gym.system.values import one_number

Observation = NDArray[np.float32]


class Transition(NamedTuple):
    """One step as a policy may learn from it."""

    obs: Observation
    action: Action
    reward: float
    next_obs: Observation
    terminated: bool
    info: dict[str, Any]


@runtime_checkable
class LambdaPolicy(Protocol):
    """A policy chooses λ. It may also have ``update(transition: Transition) -> None``, called after every step."""

    def reset(self, seed: int) -> None:
        """Begin an episode; every random draw of the policy comes from ``seed``."""
        ...

    def act(self, obs: Observation, info: dict[str, Any]) -> float | Action:
        """The next update's λ, in [lambda_min, lambda_max], or more of an action; ``obs (6,)`` or more, ``info`` of the
        last step.
        """
        ...


@dataclass(frozen=True)
class PolicyContext:
    """What a policy may know of the environment it is made for.

    ``observation_extra`` is how many entries ``observation="extended"`` has added at the observation's end.
    """

    task: str
    lambda_min: float
    lambda_max: float
    horizon: int
    observation_low: tuple[float, ...] = ()
    observation_high: tuple[float, ...] = ()
    observation_extra: int = 0
    objective: str = "siss"

    def from_unit(self, share: float) -> float:
        """Map [0, 1] onto [lambda_min, lambda_max]."""
        return self.lambda_min + (self.lambda_max - self.lambda_min) * share

    def clip(self, lambda_: float) -> float:
        """The closest λ within the range."""
        return min(max(lambda_, self.lambda_min), self.lambda_max)


@dataclass
class FunctionPolicy:
    """A plain ``obs -> lambda_``, or ``obs -> Action``, as a policy."""

    function: Callable[[Observation], float | Action]

    def reset(self, seed: int) -> None:
        """A function has no state."""

    def act(self, obs: Observation, info: dict[str, Any]) -> float | Action:
        """The function's value."""
        value = self.function(obs)
        return value if isinstance(value, Action) else one_number(value)
