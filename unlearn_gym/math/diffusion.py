"""Noise schedule, forward process and sampler of a DDPM.

Shapes: samples ``(B, *S)`` with ``S = (C, H, W)`` for images in [-1, 1] or ``(D,)`` for points;
``timesteps (B,)`` are integers in ``0..T-1``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from unlearn_gym.errors import SettingsError
from unlearn_gym.system.torch_state import insulated
from unlearn_gym.system.values import Checked

Predictor = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(x_t, timesteps, labels or None) -> epsilon_pred``, all with the batch in front.

A network that also takes fractional timesteps, as floats, says so by an attribute ``fractional_timesteps = True``.
"""
RECONSTRUCTION_SHARE = 0.3
"""Images are noised to this share of T (t = 300 of 1,000): far enough to need the model, near enough to come back."""
RECONSTRUCTION_STEPS = 10


ScheduleKind = Literal["linear", "scaled_linear", "cosine"]


class ScheduleConfig(Checked):
    """β schedule of ``num_train_timesteps`` T steps.

    ``kind`` is ``"linear"``: β from ``beta_start`` to ``beta_end``, Ho et al. (2020), eq. 1 and section 4;
    ``"scaled_linear"``: √β linear between the roots of both, as Rombach et al. (2022) train latent diffusion models;
    or ``"cosine"``: Nichol and Dhariwal (2021), eq. 17, with s = 0.008 and β at most 0.999, which reads neither
    ``beta_start`` nor ``beta_end``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_train_timesteps: int = Field(1000, ge=2, le=1_000_000)
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    kind: ScheduleKind = "linear"

    @model_validator(mode="after")
    def _stays_between_0_and_1(self) -> Self:
        alphas_cumprod = self.alphas_cumprod()
        if not bool(((alphas_cumprod > 0) & (alphas_cumprod < 1)).all()):
            reached = 0 if bool((alphas_cumprod == 0).any()) else 1
            raise ValueError(
                f"ᾱ reaches {reached} in float32 and must stay between 0 and 1; take other values than beta_start="
                f"{self.beta_start}, beta_end={self.beta_end} and num_train_timesteps={self.num_train_timesteps}"
            )
        return self

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the default ``kind``: hashes of linear schedules stay those from before there were others."""
        return {name: value for name, value in handler(self).items() if (name, value) != ("kind", "linear")}

    def betas(self) -> Tensor:
        """β_t as float64 ``(T,)``."""
        start, end, count = self.beta_start, self.beta_end, self.num_train_timesteps
        if self.kind == "linear":
            return torch.linspace(start, end, count, dtype=torch.float64)
        if self.kind == "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
        times = torch.arange(count + 1, dtype=torch.float64) / count
        f = torch.cos((times + 0.008) / 1.008 * math.pi / 2).square()
        return (1.0 - f[1:] / f[:-1]).clamp(max=0.999)

    @insulated
    def alphas_cumprod(self, device: str | torch.device = "cpu") -> Tensor:
        """ᾱ_t as float32 ``(T,)``, decreasing in (0, 1); accumulated in float64."""
        return torch.cumprod(1.0 - self.betas(), dim=0).to(device=device, dtype=torch.float32)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View ``values (B,)`` so that it broadcasts over the trailing dimensions of ``like (B, *S)``."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def q_sample(x_start: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """``x_t = √ᾱ_t x_start + √(1-ᾱ_t) noise``; Ho et al. (2020), eq. 4."""
    alpha_bar = per_sample(alphas_cumprod[timesteps], x_start)
    return alpha_bar.sqrt() * x_start + (1.0 - alpha_bar).sqrt() * noise


def inference_timesteps(start: int, num_inference_steps: int) -> list[int]:
    """Timesteps from ``start`` down to 0, both included, evenly spaced in √t (Song et al., 2021, appendix D.2).

    Steps that round to the same t are merged, so many steps on a short schedule become fewer.
    """
    if not 2 <= num_inference_steps <= start + 1:
        raise SettingsError(f"num_inference_steps={num_inference_steps} must lie in 2..{start + 1}")
    roots = torch.linspace(start**0.5, 0, num_inference_steps, dtype=torch.float64)
    return sorted({int(t) for t in roots.square().round()}, reverse=True)


@torch.inference_mode()
def sample(
    predict: Predictor,
    noise: Tensor,
    alphas_cumprod: Tensor,
    *,
    labels: Tensor | None = None,
    num_inference_steps: int = 20,
    order: int = 2,
    clip: float | None = 1.0,
    start: int | None = None,
) -> Tensor:
    """Deterministic sampling from ``noise (B, *S)``: the same noise gives the same samples.

    With ``start``, ``noise`` is ``x_t`` at that timestep instead of T-1: the way back of a noisy sample.
    DPM-Solver++(2M), Lu et al. (2022), algorithm 2, with λ = log(√ᾱ / √(1-ᾱ)); ``order=1`` is DDIM
    with η = 0. ``clip`` bounds the predicted ``x_0`` (None for data that is not an image).
    Returns the samples ``(B, *S)``.
    """
    schedule = inference_timesteps(len(alphas_cumprod) - 1 if start is None else start, num_inference_steps)
    alpha_bars = alphas_cumprod.double()[schedule].cpu()
    alphas, sigmas = alpha_bars.sqrt(), (1.0 - alpha_bars).sqrt()
    log_snrs = torch.log(alphas / sigmas)
    x, previous_x0, previous_h = noise, None, 0.0
    for i, t in enumerate(schedule):
        alpha, sigma = float(alphas[i]), float(sigmas[i])
        timesteps = torch.full((len(x),), t, device=x.device)
        x0 = (x - sigma * predict(x, timesteps, labels)) / alpha
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        if i + 1 == len(schedule):
            return x0
        h = float(log_snrs[i + 1] - log_snrs[i])
        direction = x0
        if order == 2 and previous_x0 is not None:
            direction = x0 + (x0 - previous_x0) * (h / previous_h / 2)
        next_alpha, next_sigma = float(alphas[i + 1]), float(sigmas[i + 1])
        x = (next_sigma / sigma) * x + next_alpha * -float(torch.expm1(torch.tensor(-h))) * direction
        previous_x0, previous_h = x0, h
    return x


def reconstruct(
    predict: Predictor, x_start: Tensor, alphas_cumprod: Tensor, *, labels: Tensor | None, clip: float | None, seed: int
) -> Tensor:
    """Samples ``(N, *S)`` noised to 0.3 T and brought back by the model in ten steps."""
    start = max(1, round(RECONSTRUCTION_SHARE * len(alphas_cumprod)))
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(seed)).to(x_start.device)
    timesteps = torch.full((len(x_start),), start, device=x_start.device)
    x_t = q_sample(x_start, noise, timesteps, alphas_cumprod)
    steps = min(RECONSTRUCTION_STEPS, start + 1)
    return sample(predict, x_t, alphas_cumprod, labels=labels, num_inference_steps=steps, clip=clip, start=start)


def grid_timesteps(num_train_timesteps: int, num_timesteps: int) -> list[int]:
    """Midpoints of ``num_timesteps`` equal parts of 0..T-1."""
    return [int((k + 0.5) * num_train_timesteps / num_timesteps) for k in range(num_timesteps)]


@torch.inference_mode()
def grid_loss(
    predict: Predictor,
    x_start: Tensor,
    alphas_cumprod: Tensor,
    *,
    labels: Tensor | None = None,
    generator: torch.Generator,
    num_timesteps: int = 10,
    batch_size: int = 512,
    target: Predictor | None = None,
) -> Tensor:
    """Noise-prediction loss on a fixed grid: every sample at each of :func:`grid_timesteps`.

    The noise comes from ``generator``, so two models given equally seeded generators are compared
    on the same grid. Returns ``(num_timesteps, B)``: the mean over pixels of ``(ε_θ - ε)²``, where ε is the
    noise or, with ``target``, that predictor's estimate of it.
    """
    rows = []
    for t in grid_timesteps(len(alphas_cumprod), num_timesteps):
        losses = []
        for start in range(0, len(x_start), batch_size):
            x = x_start[start : start + batch_size]
            noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)
            timesteps = torch.full((len(x),), t, device=x.device)
            batch_labels = None if labels is None else labels[start : start + batch_size]
            x_t = q_sample(x, noise, timesteps, alphas_cumprod)
            wanted = noise if target is None else target(x_t, timesteps, batch_labels)
            losses.append((predict(x_t, timesteps, batch_labels) - wanted).square().flatten(1).mean(1))
        rows.append(torch.cat(losses))
    return torch.stack(rows)
