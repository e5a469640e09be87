"""What an agent decides before an update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from unlearn_gym.errors import RunError, shown
from unlearn_gym.system.values import is_real


@dataclass(frozen=True, slots=True)
class Action:
    """One decision: every value but λ may be left to the run's settings.

    Attributes:
        lambda_: λ in [0, 1], see the objective.
        forget_strength: ρ ≥ 0. Takes the place of ``forget_grad_norm`` for this update; 0 is repair, an update on
            retain data alone. Only for ``forget_grad_rule`` ``"relative_norm"`` and ``"fixed_norm"``.
        step_scale: η ≥ 0. The optimizer's step is this many times as long; its moments see the gradient as it is.
        stop: the episode ends after this update.
    """

    lambda_: float
    forget_strength: float | None = None
    step_scale: float | None = None
    stop: bool = False

    @classmethod
    def of(cls, value: Any) -> Action:
        """``value``, if it is an action; otherwise the one whose λ it is."""
        return value if isinstance(value, cls) else cls(value)

    def check(self) -> None:
        """Raise :class:`RunError` for a value that no update can be made with."""
        if not is_real(self.lambda_):
            raise RunError(f"lambda_={shown(self.lambda_)} must be a number in [0, 1]")
        if not 0.0 <= self.lambda_ <= 1.0:
            raise RunError(f"lambda_={self.lambda_} must lie in [0, 1]")
        for name in ("forget_strength", "step_scale"):
            value = getattr(self, name)
            if value is not None and not (is_real(value) and 0.0 <= value < math.inf):
                raise RunError(f"{name}={shown(value)} must be a number of at least 0, or None")
