"""Curves of what the runs do while an agent trains."""

from __future__ import annotations

from stable_baselines3.common.callbacks import BaseCallback

SCALARS = (
    "lambda_", "retain_loss", "forget_loss", "siss_loss", "retain_grad_norm", "forget_grad_norm",
    "retain_ess", "forget_ess",
)  # fmt: skip


class UnlearnScalars(BaseCallback):
    """Log ``unlearn/*``: means over each rollout of what every environment measured, and the spread of λ."""

    def _on_rollout_start(self) -> None:
        self._values: dict[str, list[float]] = {name: [] for name in SCALARS}

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            for name, values in self._values.items():
                values.append(info["terms"][name])
        return True

    def _on_rollout_end(self) -> None:
        for name, values in self._values.items():
            finite = [v for v in values if abs(v) < float("inf")]
            if finite:
                self.logger.record(f"unlearn/{name.rstrip('_')}", sum(finite) / len(finite))
        lambdas = self._values["lambda_"]
        mean = sum(lambdas) / len(lambdas)
        self.logger.record("unlearn/lambda_std", (sum((v - mean) ** 2 for v in lambdas) / len(lambdas)) ** 0.5)
