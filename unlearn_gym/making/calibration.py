"""Measure a task's feature constants: x0 of every feature, and the forget loss of a model that never saw F."""

from __future__ import annotations

import numpy as np

from unlearn_gym.errors import SettingsError, shown
from unlearn_gym.run import UnlearningRun
from unlearn_gym.run.terms import FEATURES
from unlearn_gym.system.torch_state import insulated
from unlearn_gym.tasks import FeatureConstants, Task, TaskData

MIN_BATCHES = 64
MAX_BATCHES = 1_000_000


@insulated
def calibrate(
    task: Task, data: TaskData, *, num_batches: int = 256, seed: int = 0, command: str = ""
) -> FeatureConstants:
    """Means over ``num_batches`` measured batches of the pretrained model at λ = 0.5, factors (1, 1).

    Raises ``SettingsError`` for fewer than 64 batches, as one batch alone varies by its own size, and for more than a
    million.
    """
    if not MIN_BATCHES <= num_batches <= MAX_BATCHES:
        raise SettingsError(f"num_batches={shown(num_batches)} must lie in {MIN_BATCHES}..{MAX_BATCHES}")
    settings = task.settings.override(dataset_factors="none", loss_reduction="mean")
    alphas_cumprod = task.schedule.alphas_cumprod()
    run = UnlearningRun(task.pretrained_model(), data, alphas_cumprod, settings, seed)
    terms = [run.measure(0.5) for _ in range(num_batches)]
    unseen = None
    if task.oracle_path.is_file():
        unseen = UnlearningRun(task.oracle_model(), data, alphas_cumprod, settings, seed).probe_losses()[0]
    means = {name: float(np.mean([getattr(t, name) for t in terms])) for name in FEATURES}
    return FeatureConstants(**means, unseen_forget_loss=unseen, num_batches=num_batches, command=command)
