"""The same update as published SISS training loops write it, to be compared with.

What such a loop does is described in Alberti et al.'s public code (ICLR 2025): per-parameter dictionaries of cloned
gradients, norms tensor by tensor with a transfer each, and three copies of the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unlearn_gym.math import siss
from unlearn_gym.run import UnlearningRun
from unlearn_gym.run.batch import mix
from unlearn_gym.run.gradients import NEGLIGIBLE_WEIGHT


class FieldLoop:
    """Updates a copy of ``run``'s network on batches of a stream of its own, seeded with ``seed``."""

    def __init__(self, run: UnlearningRun, model: torch.nn.Module, seed: int = 0) -> None:
        self.run, self.settings = run, run.settings
        self.model = model.to(self.settings.device).to(memory_format=torch.channels_last).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.settings.learning_rate, weight_decay=0.0)
        self.generator = torch.Generator(self.settings.device).manual_seed(seed)

    def update(self, lambda_: float) -> dict[str, float]:
        """One update under ``forget_grad_rule="relative_norm"``; what it logs."""
        run, s = self.run, self.settings
        draw = mix(run.draw(self.generator), run.alphas_cumprod, torch.tensor(lambda_, device=s.device))
        epsilon_pred = self.model(draw.x_t, draw.timesteps, draw.labels)
        terms = siss.siss_terms(
            epsilon_pred, draw.targets, retain_coef=run.retain_coef, forget_coef=run.forget_coef,
            forget_scale=s.forget_scale,
        )  # fmt: skip
        retain = self._gradients(terms.retain_loss, retain_graph=True)
        forget = self._gradients(terms.forget_loss, retain_graph=False)
        retain_norm, forget_norm = _norm(retain), _norm(forget)
        factor = s.forget_grad_norm * retain_norm / forget_norm if forget_norm > 0 else 0.0
        if draw.targets.forget_weight.max().item() <= NEGLIGIBLE_WEIGHT:
            factor = 0.0
        for name, parameter in self.model.named_parameters():
            parameter.grad = retain[name] - factor * forget[name]
        if s.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.max_grad_norm)
        self.optimizer.step()
        return {
            "retain_loss": terms.retain_loss.item(), "forget_loss": terms.forget_loss.item(),
            "siss_loss": terms.siss_loss.item(), "retain_grad_norm": retain_norm, "forget_grad_norm": forget_norm,
            "retain_weight_max": terms.retain_weight.max().item(),
            "forget_weight_max": terms.forget_weight.max().item(),
        }  # fmt: skip

    def _gradients(self, loss: Tensor, *, retain_graph: bool) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        loss.backward(retain_graph=retain_graph)
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return gradients


def _norm(gradients: dict[str, Tensor]) -> float:
    return float(sum(g.norm().item() ** 2 for g in gradients.values())) ** 0.5
