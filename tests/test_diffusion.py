"""Schedule, forward process and sampler against closed forms."""

from __future__ import annotations

import pytest
import torch

from unlearn_gym.errors import SettingsError
from unlearn_gym.math.diffusion import ScheduleConfig, grid_loss, inference_timesteps, q_sample, sample

ALPHAS = ScheduleConfig().alphas_cumprod()
MEAN, STD = 0.5, 0.2


def gaussian_predictor(x, timesteps, labels):
    """The optimal ε of data N(0.5, 0.2²): √(1-ᾱ) (x - √ᾱ μ) / (ᾱ s² + 1 - ᾱ)."""
    a = ALPHAS[timesteps][:, None]
    return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)


def test_alphas_cumprod_is_decreasing_and_within_bounds():
    assert (ALPHAS.diff() < 0).all()
    assert 0 < ALPHAS[-1] < 1e-4
    assert ALPHAS[0] == pytest.approx(1 - 1e-4)


def test_q_sample_has_the_moments_of_the_forward_process():
    x = torch.full((100_000, 1), 0.7)
    x_t = q_sample(
        x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), torch.full((len(x),), 400), ALPHAS
    )
    assert x_t.mean().item() == pytest.approx(0.7 * ALPHAS[400].sqrt().item(), abs=0.01)
    assert x_t.var().item() == pytest.approx(1 - ALPHAS[400].item(), abs=0.01)


def test_inference_timesteps_span_the_schedule():
    steps = inference_timesteps(999, 20)
    assert (steps[0], steps[-1], len(set(steps))) == (999, 0, 20)


@pytest.mark.parametrize("steps", [1, 1001])
def test_inference_timesteps_out_of_range_are_named(steps):
    with pytest.raises(SettingsError, match=f"num_inference_steps={steps}"):
        inference_timesteps(999, steps)


@pytest.mark.parametrize("order", [1, 2])
def test_sampler_converges_to_the_data_distribution(order):
    noise = torch.randn((20_000, 1), generator=torch.Generator().manual_seed(0))
    x = sample(gaussian_predictor, noise, ALPHAS, num_inference_steps=200, order=order, clip=None)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, rel=0.05)


def test_second_order_is_closer_to_the_exact_flow_than_ddim():
    noise = torch.randn((1000, 1), generator=torch.Generator().manual_seed(0))
    exact = MEAN + STD * noise  # the probability flow of a Gaussian is affine, and ᾱ_T is nearly 0
    errors = [
        (sample(gaussian_predictor, noise, ALPHAS, num_inference_steps=20, order=o, clip=None) - exact).abs().mean()
        for o in (1, 2)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_grid_loss_of_the_exact_noise_is_zero_and_its_shape_is_stated():
    x = torch.zeros(30, 2)

    def oracle(x_t, timesteps, labels):
        return x_t / (1 - ALPHAS[timesteps][:, None]).sqrt()

    losses = grid_loss(oracle, x, ALPHAS, generator=torch.Generator().manual_seed(0), batch_size=7)
    assert losses.shape == (10, 30)
    assert losses.abs().max() < 1e-6


def test_sampling_from_a_timestep_with_the_true_noise_brings_the_sample_back():
    """With a predictor that knows x_0, the way back from any t ends there."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn((8, 2), generator=generator) for _ in range(2))

    def knows(x_t, timesteps, labels):
        alpha_bars = ALPHAS[timesteps][:, None]
        return (x_t - alpha_bars.sqrt() * x) / (1 - alpha_bars).sqrt()

    for start in (30, 300):
        x_t = q_sample(x, noise, torch.full((8,), start), ALPHAS)
        torch.testing.assert_close(sample(knows, x_t, ALPHAS, start=start, clip=None), x, atol=1e-3, rtol=0)


def test_the_grid_loss_against_another_predictor_is_their_mean_squared_difference():
    x = torch.zeros(5, 2)

    def constant(value):
        return lambda x_t, timesteps, labels: torch.full_like(x_t, value)

    generator = torch.Generator().manual_seed(0)
    losses = grid_loss(constant(1.0), x, ALPHAS, generator=generator, target=constant(-0.5))
    torch.testing.assert_close(losses, torch.full((10, 5), 2.25))


@pytest.mark.parametrize(("options", "reached"), [({"beta_start": 1e-9}, 1), ({"beta_end": 0.999}, 0)])
def test_a_schedule_whose_noise_level_reaches_an_end_is_refused(options, reached):
    with pytest.raises(ValueError, match=f"ᾱ reaches {reached} in float32"):
        ScheduleConfig(**options)
