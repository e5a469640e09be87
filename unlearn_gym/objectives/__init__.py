"""What an update minimises: the objectives between which ``objective=`` chooses, for each family of models."""

from __future__ import annotations

from unlearn_gym.errors import SettingsError
from unlearn_gym.objectives.base import Context, LambdaRole, Learner, Objective, OwnPasses, Passes
from unlearn_gym.objectives.epsilon import EPSILON_OBJECTIVES, EpsilonObjective
from unlearn_gym.objectives.latent import LATENT_OBJECTIVES
from unlearn_gym.objectives.score_forgetting import ScoreForgetting

__all__ = ["OBJECTIVES", "Context", "EpsilonObjective", "Learner", "Objective", "OwnPasses", "Passes", "get_objective"]

OBJECTIVES: dict[str, dict[str, EpsilonObjective | OwnPasses]] = {
    "diffusion": {**EPSILON_OBJECTIVES},
    "vae": {**LATENT_OBJECTIVES},
    "generator": {"sfd": ScoreForgetting()},
}
"""By the model's family and by the name that ``objective=`` takes. Sources: ``docs/objectives.md``."""


def lambda_role(name: str) -> LambdaRole:
    """What λ is to the objective ``name``, the same in every family."""
    return next(objectives[name].lambda_role for objectives in OBJECTIVES.values() if name in objectives)


def get_objective(family: str, name: str) -> EpsilonObjective | OwnPasses:
    """The objective ``name`` for models of ``family``; raises :class:`SettingsError` where there is none."""
    if name not in OBJECTIVES[family]:
        others = [kind for kind, objectives in OBJECTIVES.items() if name in objectives]
        raise SettingsError(
            f"objective={name!r} is for models of the family {' or '.join(others)}, and this task's is of {family}; "
            f"choose {' or '.join(OBJECTIVES[family])}"
        )
    return OBJECTIVES[family][name]
