"""What an update minimises: the objectives between which ``objective=`` chooses, for each family of models."""

from __future__ import annotations

from unlearn_gym.errors import SettingsError
from unlearn_gym.run.objectives.base import Context, Learner, Objective, OwnPasses, Passes
from unlearn_gym.run.objectives.epsilon import EPSILON_OBJECTIVES, EpsilonObjective
from unlearn_gym.run.objectives.latent import LATENT_OBJECTIVES
from unlearn_gym.run.objectives.score_forgetting import ScoreForgetting
from unlearn_gym.settings import FAMILY_OPTIONS, RunSettings

__all__ = ["OBJECTIVES", "Context", "EpsilonObjective", "Learner", "Objective", "OwnPasses", "Passes", "get_objective"]

OBJECTIVES: dict[str, dict[str, EpsilonObjective | OwnPasses]] = {
    "diffusion": {**EPSILON_OBJECTIVES},
    "vae": {**LATENT_OBJECTIVES},
    "generator": {"sfd": ScoreForgetting()},
}
"""By the model's family and by the name that ``objective=`` takes. Sources: ``docs/objectives.md``."""


def get_objective(family: str, settings: RunSettings) -> EpsilonObjective | OwnPasses:
    """The objective of ``settings`` for models of ``family``.

    Raises :class:`SettingsError` where there is none of that name, for settings that only objectives of other
    families read, and for a rule under which λ would change nothing though it is the objective's weight.
    """
    name = settings.objective
    if name not in OBJECTIVES[family]:
        others = [kind for kind, objectives in OBJECTIVES.items() if name in objectives]
        raise SettingsError(
            f"objective={name!r} is for models of the family {' or '.join(others)}, and this task's model is of the "
            f"family {family}; its objectives are {', '.join(OBJECTIVES[family])}"
        )
    objective = OBJECTIVES[family][name]
    undone = settings.forget_grad_rule == "relative_norm" and not settings.hybrid_coef
    if objective.lambda_role == "weight" and undone:
        raise SettingsError(
            f"objective={name!r} with forget_grad_rule='relative_norm': λ is the forget term's weight there, and the "
            "rule rescales that term's gradient whatever λ is; take forget_grad_rule='loss'"
        )
    for kind, options in FAMILY_OPTIONS.items():
        for option in options:
            value = getattr(settings, option)
            if kind != family and value != RunSettings.model_fields[option].default:
                raise SettingsError(
                    f"{option}={value!r} is for models of the family {kind}, and this task's model is of the "
                    f"family {family}; leave it out"
                )
    return objective
