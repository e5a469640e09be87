"""What ``info`` holds: every key that ``reset`` and ``step`` of the environments may return, in one list."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

from unlearn_gym.run.terms import StepTerms


class InfoKey(NamedTuple):
    """A key of ``info``, after those of the dicts around it; ``where`` it is found, "" for every reset and step."""

    path: tuple[str, ...]
    where: str
    meaning: str


INFO_KEYS = (
    InfoKey(("terms",), "", "dict: what the batch measured; after a reset, one batch at λ = `lambda_init`"),
    *(
        InfoKey(("terms", name), "", hint.__metadata__[0])
        for name, hint in get_type_hints(StepTerms, include_extras=True).items()
    ),
    InfoKey(("reward_terms",), "", "dict: the summands of the reward; empty after a reset"),
    InfoKey(("reward_terms", "siss"), 'step, with `reward="siss"`', "-L_SISS"),
    InfoKey(("reward_terms", "potential"), 'step, with `reward="potential"`', "the change of Φ"),
    InfoKey(("reward_terms", "smoothness"), "step", "-`smoothness_coef` (λ_t - λ_{t-1})²"),
    InfoKey(("reward_terms", "divergence"), "step that diverged", "-`divergence_penalty`, in place of the others"),
    InfoKey(("diverged",), "", "bool: whether the run has ended in values that are not finite"),
    InfoKey(("instance",), "reset", "dict: what the episode unlearns, the fields of `Instance` that are set"),
)
"""Of a single environment."""
VECTOR_KEYS = (
    InfoKey(("final_obs",), 'step that ended an episode, `autoreset_mode="SameStep"`', "its last observation"),
    InfoKey(("final_info",), 'step that ended an episode, `autoreset_mode="SameStep"`', "dict: its last info"),
    InfoKey(("worker_died",), "step that lost a worker process", "str: how it ended; nothing else is in the info"),
)
"""What vector environments add."""
