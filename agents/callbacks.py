"""What one sees while an agent trains: curves of the runs, and a bar."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback

SCALARS = (
    "lambda_", "retain_loss", "forget_loss", "siss_loss", "retain_grad_norm", "forget_grad_norm",
    "retain_ess", "forget_ess",
)  # fmt: skip
LOG_EVERY = 480
"""Environment steps between points of a curve."""


class UnlearnScalars(BaseCallback):
    """Log ``unlearn/*``: means over some hundred steps of what every environment measured, and the spread of λ."""

    def _init_callback(self) -> None:
        self._values: dict[str, list[float]] = {name: [] for name in SCALARS}
        self._logged_at = self.num_timesteps

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "terms" not in info:  # a worker died, and with it what it had measured
                continue
            for name, values in self._values.items():
                values.append(info["terms"][name])
        if self.num_timesteps - self._logged_at >= LOG_EVERY:
            self._log()
        return True

    def _on_training_end(self) -> None:
        if self._values["lambda_"]:
            self._log()

    def _log(self) -> None:
        for name, values in self._values.items():
            finite = [v for v in values if math.isfinite(v)]
            if finite:
                self.logger.record(f"unlearn/{name.rstrip('_')}", float(np.mean(finite)))
        self.logger.record("unlearn/lambda_std", float(np.std(self._values["lambda_"])))
        self._values = {name: [] for name in SCALARS}
        self._logged_at = self.num_timesteps


class Bar(BaseCallback):
    """A bar over all of a training, with the mean return of the last episodes."""

    def __init__(self, title: str, total: int) -> None:
        super().__init__()
        self._total = total
        columns: list[Any] = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        ]
        self._progress = Progress(*columns, TextColumn("{task.fields[last]}"))
        self._bar = self._progress.add_task(title, total=total, last="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _on_step(self) -> bool:
        episodes = self.model.ep_info_buffer
        last = f"training return {np.mean([e['r'] for e in episodes]):.3f}" if episodes else ""
        self._progress.update(self._bar, completed=min(self.num_timesteps, self._total), last=last)
        return True
