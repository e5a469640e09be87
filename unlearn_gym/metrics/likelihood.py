"""Likelihood of data under a DDPM in bits per dimension: the variational bound, and the probability-flow ODE.

Both start alike: x_1 = √ᾱ_0 x_0 + √(1-ᾱ_0) ε, the least noise that the network was trained on, is a latent variable
with the decoder p(x_0 | x_1) of Ho et al. (2020); and both end at p(x_T) = N(0, I). They differ in how they find
log p(x_1): by a bound over the chain, or by the flow's change of variables. So neither asks the network about noise
that it never saw, and the flow's figure is the lower one as far as the network is close to a score.

Shapes: ``x_start (B, *S)``; images of ``num_levels`` grey values in [-1, 1], or points (``num_levels=None``), whose
likelihood is a density: its bits may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.special import log_ndtr

from unlearn_gym.errors import DataError, ResultsError, SettingsError, error_line
from unlearn_gym.math.diffusion import Predictor, q_sample
from unlearn_gym.system.torch_state import insulated

EXACT_TRACE_MAX_DIM = 8
"""Up to as many dimensions the flow's divergence is exact: one backward pass for each of them."""
MAX_STEPS = 300
"""Of the ODE solver, six evaluations each; networks that learned something take 10 to 20 at the default tolerances."""


@insulated
@torch.inference_mode()
def variational_bound(
    predict: Predictor,
    x_start: Tensor,
    alphas_cumprod: Tensor,
    *,
    labels: Tensor | None = None,
    generator: torch.Generator,
    num_timesteps: int | None = None,
    num_levels: int | None = 256,
    batch_size: int = 512,
) -> Tensor:
    """Upper bound ``(B,)`` of the negative log-likelihood, bits per dimension; Ho et al. (2020), eq. 5.

    L_T is exact, L_{t-1} (eq. 8) and L_0 take one draw of noise each. The reverse variance is one of the two of
    their section 3.2, the one that gives the better bound: β̃_t for grey values, β_t for points. L_0 has variance
    β_1, and for grey values it is the discretised Gaussian of their section 3.3.

    All T terms are summed, or L_0 and one other out of each of ``num_timesteps`` strata, drawn per sample: an unbiased
    estimate. The strata are even in √t, as the terms are largest at small t; those that round to nothing are dropped.
    All draws come from ``generator``: models given equally seeded ones are compared on the same noise.

    Raises :class:`SettingsError` for ``num_timesteps`` out of 1..T-1, :class:`DataError` for images not in [-1, 1].
    """
    _check_data(x_start, num_levels)
    transitions = _sum_of_transitions(
        predict, x_start, labels, alphas_cumprod, generator, num_timesteps, batch_size, small=num_levels is not None
    )
    decoder = []
    for start in range(0, len(x_start), batch_size):
        part = slice(start, start + batch_size)
        y = None if labels is None else labels[part]
        decoder.append(_decode(predict, x_start[part], y, alphas_cumprod, generator, num_levels)[0])
    alpha_bar = alphas_cumprod[-1]
    prior = 0.5 * (alpha_bar * (x_start.square() - 1) - torch.log1p(-alpha_bar)).flatten(1).sum(1)
    return (prior + transitions + torch.cat(decoder)) / (x_start[0].numel() * math.log(2))


@insulated
@torch.inference_mode(False)
@torch.no_grad()
def ode_nll(
    predict: Predictor,
    x_start: Tensor,
    alphas_cumprod: Tensor,
    *,
    labels: Tensor | None = None,
    generator: torch.Generator,
    num_levels: int | None = 256,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    exact_trace: bool | None = None,
    batch_size: int = 128,
) -> Tensor:
    """Negative log-likelihood ``(B,)`` by the probability-flow ODE, bits per dimension; Song et al. (2021), eq. 39.

    The flow goes from x_1 to x_T, with s = log(√(1-ᾱ) / √ᾱ) for time: dx/ds = σ (ε_θ - σ x), σ² = 1 - ᾱ. The
    schedule then enters only by the timestep that the network is asked for, a fraction: log ᾱ is linear in t between
    the trained timesteps. A network that says ``fractional_timesteps = True`` is asked at that fraction, any other
    one at the two whole timesteps around it (:func:`between_timesteps`), at twice the cost. The divergence is exact
    in up to 8 dimensions, else Hutchinson's estimate with one Rademacher probe; ``exact_trace`` overrides that.
    ``rtol`` and ``atol`` are those of dopri5 for x and for nats per dimension, in the worst sample of a batch.

    What is returned is -log p(x_1) - log p(x_0 | x_1) + log q(x_1 | x_0) for one drawn x_1: in expectation an upper
    bound of the flow's NLL, tight where the decoder is the true posterior. Uniformly dequantised images (Theis et al.,
    2016) are points, whose figure plus log2((levels - 1) / 2) bounds that of the images, far less tightly.

    Raises :class:`ResultsError` without torchdiffeq or when the flow cannot be integrated, :class:`DataError` for
    images not in [-1, 1].
    """
    _import_odeint()
    _check_data(x_start, num_levels)
    dim, figures = x_start[0].numel(), []
    exact = dim <= EXACT_TRACE_MAX_DIM if exact_trace is None else exact_trace
    whole = not getattr(predict, "fractional_timesteps", False)
    ask = between_timesteps(predict, alphas_cumprod) if whole else predict
    for start in range(0, len(x_start), batch_size):
        x = x_start[start : start + batch_size]
        y = None if labels is None else labels[start : start + batch_size].clone()  # autograd keeps it
        decoder_nll, x_first, noise = _decode(predict, x, y, alphas_cumprod, generator, num_levels)
        velocity = _probability_flow(ask, y, alphas_cumprod, _probes(x, generator, exact=exact))
        log_p = _flow_log_density(velocity, x_first, alphas_cumprod, rtol, atol)
        log_q = _log_normal(noise) - dim / 2 * (1 - alphas_cumprod[0]).log()
        figures.append((decoder_nll + log_q - log_p) / (dim * math.log(2)))
    return torch.cat(figures)


def between_timesteps(predict: Predictor, alphas_cumprod: Tensor) -> Predictor:
    """``predict`` at a timestep between whole ones, the same for a batch: what it says of x_0 at both, interpolated.

    Of ε_k = predict(x, k) follows x_0 = (x - σ_k ε_k) / √ᾱ_k; that is linear in t between both k, log ᾱ is too, and
    ε = (x - √ᾱ x_0) / σ. Unlike ε, which behaves as σ or as 1/σ, x_0 hardly changes between neighbours. At a whole
    timestep the result is the network's own.
    """
    logs = alphas_cumprod.double().log().tolist()

    def ask(x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        t = float(timesteps[0])
        below = 0 if math.isnan(t) else min(int(t), len(logs) - 2)  # a solver that fails asks at NaN
        share = t - below
        log = (1 - share) * logs[below] + share * logs[below + 1]
        kept, epsilon = 1.0, torch.zeros_like(x)
        for k, weight in ((below, 1 - share), (below + 1, share)):
            if weight != 0:
                factor = weight * math.exp((log - logs[k]) / 2)  # weight √ᾱ / √ᾱ_k
                at = torch.full((len(x),), k, dtype=torch.long, device=x.device)
                epsilon = epsilon + factor * math.sqrt(-math.expm1(logs[k])) * predict(x, at, labels)
                kept -= factor
        return (kept * x + epsilon) / math.sqrt(-math.expm1(log))

    return ask


def discretised_log_likelihood(x: Tensor, mean: Tensor, std: Tensor, num_levels: int = 256) -> Tensor:
    """Log-probability of each grey value of ``x``, nats, of the shape of ``x``; Ho et al. (2020), eq. 13.

    The Gaussian's mass between the midpoints to the neighbouring levels; the outermost levels take the tails.
    """
    half = 1 / (num_levels - 1)
    low = torch.where(x < -1 + half, -math.inf, (x - half - mean) / std)
    high = torch.where(x > 1 - half, math.inf, (x + half - mean) / std)
    flip = low + high > 0  # to the lower tail, where log Φ keeps its digits
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    return log_ndtr(high) + torch.log(-torch.expm1(log_ndtr(low) - log_ndtr(high)))


def _check_data(x_start: Tensor, num_levels: int | None) -> None:
    if not x_start.is_floating_point():
        raise DataError(f"x_start is {x_start.dtype}; turn images to [-1, 1] with to_model_range")
    if num_levels is not None and x_start.abs().max() > 1:
        raise DataError(
            f"x_start reaches {x_start.abs().max():.3g}, images lie in [-1, 1]; pass num_levels=None for points"
        )


def _import_odeint() -> Callable[..., Any]:
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise ResultsError(
            "the probability-flow likelihood needs torchdiffeq; install it with pip install 'unlearn_gym[metrics]'"
        ) from None
    return odeint


def _randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=generator.device).to(x)


def _log_normal(x: Tensor) -> Tensor:
    """Log N(x; 0, I), nats ``(B,)``."""
    return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def _strata(num_transitions: int, num_strata: int | None) -> Tensor:
    """Edges of the strata of 0..num_transitions, int64; without a number every stratum holds one."""
    if num_strata is None:
        return torch.arange(num_transitions + 1)
    if not 1 <= num_strata <= num_transitions:
        raise SettingsError(f"num_timesteps={num_strata} must lie in 1..{num_transitions}, or be None for all")
    return torch.linspace(0, num_transitions**0.5, num_strata + 1, dtype=torch.float64).square().round().long().unique()


def _transition_terms(alphas_cumprod: Tensor, *, small: bool) -> tuple[Tensor, Tensor]:
    """L_{t-1} = dim * constant + factor * ‖ε_θ - ε‖², each ``(T-1,)`` for t = 1..T-1 counted from 0, float64.

    Ho et al. (2020), eq. 8 and 12; ``small``: variance β̃_t (equal to the posterior's: no constant), else β_t.
    """
    alpha_bars = alphas_cumprod.double()
    previous, current = alpha_bars[:-1], alpha_bars[1:]
    alphas, ratio = current / previous, (1 - previous) / (1 - current)  # ratio = β̃_t / β_t
    factors = (1 - alphas) / (2 * alphas * (1 - current))
    if small:
        return torch.zeros_like(ratio), factors / ratio
    return 0.5 * (ratio - 1 - ratio.log()), factors


def _sum_of_transitions(
    predict: Predictor,
    x_start: Tensor,
    labels: Tensor | None,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    num_timesteps: int | None,
    batch_size: int,
    *,
    small: bool,
) -> Tensor:
    """Σ_t L_{t-1}, t > 1, or its estimate from one t of each stratum, in nats ``(B,)``."""
    edges, dim = _strata(len(alphas_cumprod) - 1, num_timesteps), x_start[0].numel()
    widths = edges.diff()
    draws = torch.rand((len(x_start), len(widths)), generator=generator, device=generator.device).cpu()
    timesteps = (1 + edges[:-1] + (draws * widths).long()).flatten().to(x_start.device)
    rows = torch.arange(len(x_start), device=x_start.device).repeat_interleave(len(widths))
    constants, factors = (v.to(x_start) for v in _transition_terms(alphas_cumprod, small=small))
    terms = []
    for row, t in zip(rows.split(batch_size), timesteps.split(batch_size), strict=True):
        x = x_start[row]
        noise = _randn_like(x, generator)
        pred = predict(q_sample(x, noise, t, alphas_cumprod), t, None if labels is None else labels[row])
        terms.append(dim * constants[t - 1] + factors[t - 1] * (pred - noise).square().flatten(1).sum(1))
    return (torch.cat(terms).view(len(x_start), -1) * widths.to(x_start)).sum(1)


def _decode(
    predict: Predictor,
    x: Tensor,
    labels: Tensor | None,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    num_levels: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-log p(x | x_1) in nats ``(B,)``, the x_1 that was drawn, and its noise."""
    noise, first = _randn_like(x, generator), torch.zeros(len(x), dtype=torch.long, device=x.device)
    x_first = q_sample(x, noise, first, alphas_cumprod)
    std = (1 - alphas_cumprod[0]).sqrt()
    mean = (x_first - std * predict(x_first, first, labels)) / alphas_cumprod[0].sqrt()
    if num_levels is None:
        nll = -_log_normal((x - mean) / std) + x[0].numel() * std.log()
    else:
        nll = -discretised_log_likelihood(x, mean, std, num_levels).flatten(1).sum(1)
    return nll, x_first, noise


def _probes(x: Tensor, generator: torch.Generator, *, exact: bool) -> Tensor:
    """Vectors v ``(P, B, *S)`` whose Σ v·Jv is tr J: all unit vectors, or in expectation one of random signs."""
    if exact:
        dim = x[0].numel()
        return torch.eye(dim).view(dim, 1, *x.shape[1:]).expand(dim, *x.shape).to(x)
    signs = torch.randint(2, (1, *x.shape), generator=generator, device=generator.device)
    return (2 * signs - 1).to(x)


def _probability_flow(
    predict: Predictor, labels: Tensor | None, alphas_cumprod: Tensor, probes: Tensor
) -> Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """The derivative by s of x and of the log-volume per dimension."""
    knots = -alphas_cumprod.double().log().cpu().numpy()
    dim = probes[0, 0].numel()

    def velocity(s: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        squared = torch.sigmoid(2 * s)
        t = float(np.interp(softplus(2 * s.double()).item(), knots, np.arange(len(knots))))
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            pred = predict(x, torch.full((len(x),), t, device=x.device, dtype=x.dtype), labels)
            rows = [torch.autograd.grad(pred, x, v, retain_graph=True)[0] * v for v in probes]
        divergence = torch.stack(rows).sum(0).flatten(1).sum(1)
        return squared.sqrt() * pred.detach() - squared * state[0], squared.sqrt() * divergence / dim - squared

    return velocity


def _worst(state: tuple[Tensor, ...]) -> Tensor:
    """The solver's error norm: mean square over pixels, but the worst sample, lest one go wrong unseen in a batch."""
    return torch.stack([v.reshape(len(v), -1).square().mean(1).max() for v in state]).max().sqrt()


def _flow_log_density(
    velocity: Callable[..., Any], x_first: Tensor, alphas_cumprod: Tensor, rtol: float, atol: float
) -> Tensor:
    """Log p(x_1) in nats ``(B,)``: that of the x_T it flows to, plus the log-volume gained on the way."""
    times = -0.5 * torch.logit(alphas_cumprod[[0, -1]].double())
    state = (x_first, torch.zeros(len(x_first), device=x_first.device, dtype=x_first.dtype))
    try:
        options = {"max_num_steps": MAX_STEPS, "norm": _worst}
        x, volume = _import_odeint()(velocity, state, times, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:  # torchdiffeq's way to say that its steps are too small or too many
        raise ResultsError(
            f"the probability flow cannot be integrated with rtol={rtol}, atol={atol} ({error_line(error)}); "
            "loosen them, or check that the network's predictions are finite"
        ) from None
    return _log_normal(x[-1]) + x_first[0].numel() * volume[-1]
