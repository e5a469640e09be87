"""Likelihoods against closed forms: of Gaussians, of the ring, and of grey values."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from unlearn_gym.errors import DataError, ResultsError, SettingsError
from unlearn_gym.math.diffusion import ScheduleConfig
from unlearn_gym.metrics.likelihood import (
    between_timesteps,
    discretised_log_likelihood,
    ode_nll,
    variational_bound,
)
from unlearn_gym.models import UNetConfig, build_network
from unlearn_gym.tasks import get_task, load_data, to_model_range
from unlearn_gym.tasks.gaussians import NUM_MODES, STD, mode_centers, optimal_epsilon, sample_modes

ALPHAS = ScheduleConfig().alphas_cumprod()
RING_ALPHAS = get_task("gaussians-2d").schedule.alphas_cumprod()
MEAN, SCALE = 0.3, 0.2
GREYS = torch.arange(256) / 127.5 - 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def interpolated(timesteps, alphas_cumprod):
    """ᾱ at fractional timesteps, log ᾱ linear between the whole ones: float64 ``(B,)``."""
    logs, t = alphas_cumprod.double().log(), timesteps.double()
    below = t.nan_to_num().long().clamp(max=len(logs) - 2)
    return torch.lerp(logs[below], logs[below + 1], t - below).exp()


def gaussian(x, timesteps, labels):
    """The optimal ε of data N(0.3, 0.2²)."""
    a = interpolated(timesteps, ALPHAS).view(-1, *(1,) * (x.dim() - 1))
    return ((1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * SCALE**2 + 1 - a)).to(x)


def gaussian_points(n, seed=0):
    return MEAN + SCALE * torch.randn((n, 3), generator=seeded(seed))


def gaussian_bits(x):
    return -torch.distributions.Normal(MEAN, SCALE).log_prob(x).flatten(1).mean(1) / math.log(2)


def ring(x, timesteps, labels):
    return optimal_epsilon(tuple(range(NUM_MODES)), x, interpolated(timesteps, RING_ALPHAS).to(x))


def ring_points(per_mode):
    return sample_modes(list(range(NUM_MODES)), per_mode, seeded())


def ring_bits(x):
    log_densities = -((x[:, None] - mode_centers()) / STD).square().sum(2) / 2 - math.log(2 * math.pi * STD**2)
    return -(log_densities.logsumexp(1) - math.log(NUM_MODES)) / (2 * math.log(2))


def grey_images(n):
    """Images ``(n, 1, 4, 4)`` of N(0.3, 0.2²), rounded to 256 levels."""
    return grey(MEAN + SCALE * torch.randn((n, 1, 4, 4), generator=seeded()))


def grey(x):
    return ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


class AtFractions:
    """A predictor that says it takes fractional timesteps."""

    fractional_timesteps = True

    def __init__(self, predict):
        self.predict, self.asked = predict, []

    def __call__(self, x, timesteps, labels):
        self.asked.append(timesteps)
        return self.predict(x, timesteps, labels)


class AtWholes(AtFractions):
    """One that knows the trained timesteps alone."""

    fractional_timesteps = False


KINDS = pytest.mark.parametrize("kind", [AtFractions, AtWholes])


@KINDS
def test_a_network_is_asked_at_fractions_of_timesteps_only_if_it_says_so(kind):
    predict, x = kind(gaussian), gaussian_points(5)
    nll = ode_nll(predict, x, ALPHAS, generator=seeded(), num_levels=None, rtol=1e-5, atol=1e-5)
    assert (nll - gaussian_bits(x)).mean().abs() < 0.01
    asked = torch.cat(predict.asked)
    assert (asked == asked.round()).all() == (kind is AtWholes)
    assert (asked.dtype == torch.long) == (kind is AtWholes)
    assert 0 <= asked.min() <= asked.max() <= len(ALPHAS) - 1


def test_between_timesteps_a_prediction_is_near_the_optimal_one_and_at_them_it_is_the_network_s_own():
    x = gaussian_points(50)
    for t in (0, 0.01, 0.5, 1.3, 20.5, 500.25, 998.5, 998.99, 999):
        at = torch.full((50,), t, dtype=torch.float32)
        found, expected = between_timesteps(AtWholes(gaussian), ALPHAS)(x, at, None), gaussian(x, at, None)
        assert (found - expected).abs().max() < (1e-5 if t == int(t) else 3e-4)


@pytest.mark.parametrize("batch_size", [7, 128])
def test_ode_of_a_gaussian_is_its_closed_form(batch_size):
    x = gaussian_points(20)
    nll = ode_nll(gaussian, x, ALPHAS, generator=seeded(), num_levels=None, rtol=1e-5, atol=1e-5, batch_size=batch_size)
    assert nll.shape == (20,)
    assert nll == pytest.approx(gaussian_bits(x), abs=0.01)  # x_1 tells as much as x_0 but for 1-ᾱ_0 of its variance
    assert (nll - gaussian_bits(x)).mean().abs() < 2e-3


def test_ode_of_the_ring_is_its_closed_form():
    x = ring_points(100)
    for tolerance, error in ((1e-5, 3e-3), (1e-3, 5e-3)):
        nll = ode_nll(ring, x, RING_ALPHAS, generator=seeded(), num_levels=None, rtol=tolerance, atol=tolerance)
        assert (nll - ring_bits(x)).mean().abs() < error
        assert (nll - ring_bits(x)).std() < 0.03


def test_hutchinson_agrees_with_the_exact_trace_on_average_only():
    x = ring_points(1).repeat(100, 1)
    exact, estimate = (
        ode_nll(ring, x, RING_ALPHAS, generator=seeded(), num_levels=None, exact_trace=e, batch_size=800)
        for e in (True, False)
    )
    difference = estimate - exact
    assert difference.std() > 0.05
    assert difference.mean().abs() < 4 * difference.std() / len(x) ** 0.5


@pytest.mark.parametrize(
    ("predict", "alphas", "x", "bits"),
    [
        (gaussian, ALPHAS, gaussian_points(1000), gaussian_bits),
        (ring, RING_ALPHAS, ring_points(300), ring_bits),
    ],
    ids=["gaussian", "ring"],
)
def test_bound_is_above_the_closed_form_and_near_it(predict, alphas, x, bits):
    gap = variational_bound(predict, x, alphas, generator=seeded(), num_levels=None) - bits(x)
    error = gap.std() / len(x) ** 0.5
    assert error < 0.03
    assert -3 * error < gap.mean() < 0.15


def test_grey_values_have_the_bits_of_the_density_over_their_bins():
    x = grey_images(2000)
    bits = (gaussian_bits(x) + math.log2(127.5)).mean()
    nll = ode_nll(gaussian, x, ALPHAS, generator=seeded())
    bound = variational_bound(gaussian, x, ALPHAS, generator=seeded(), num_timesteps=20)
    dequantised = x + (torch.rand(x.shape, generator=seeded(1)) - 0.5) / 127.5
    uniform = ode_nll(gaussian, dequantised, ALPHAS, generator=seeded(), num_levels=None) + math.log2(127.5)
    assert (nll.mean() - bits).abs() < 3e-3
    assert (uniform.mean() - bits).abs() < 3e-3
    assert nll.mean() < bound.mean() < bits + 1


@pytest.mark.parametrize("figure", [variational_bound, ode_nll])
def test_known_image_costs_the_tails_of_its_decoder_and_nothing_else(figure):
    x = torch.full((3, 1, 4, 4), -1.0)

    def point(x_t, timesteps, labels):
        a = interpolated(timesteps, ALPHAS).view(-1, 1, 1, 1)
        return ((x_t + a.sqrt()) / (1 - a).sqrt()).to(x_t)

    mass = torch.distributions.Normal(0, (1 - ALPHAS[0]).sqrt()).cdf(torch.tensor(1 / 255))
    assert figure(point, x, ALPHAS, generator=seeded()) == pytest.approx(-mass.log2().expand(3), abs=5e-3)


@pytest.mark.parametrize("at", [torch.eq, torch.gt], ids=["decoder", "chain"])
@pytest.mark.parametrize("figure", [variational_bound, ode_nll])
def test_every_sample_has_its_own_label(figure, at):
    x = grey_images(3)

    def predict(x_t, timesteps, labels):
        return gaussian(x_t, timesteps, None) + (labels * at(timesteps, 0)).view(-1, 1, 1, 1)

    right = figure(predict, x, ALPHAS, labels=torch.zeros(3), generator=seeded(), batch_size=2)
    for worse in (1, 2):  # in the first batch and in the second
        labels = torch.eye(3)[worse]
        nll = figure(predict, x, ALPHAS, labels=labels, generator=seeded(), batch_size=2)
        assert (nll > right + 0.1).tolist() == labels.bool().tolist()


def test_pretrained_ring_is_ordered_as_theory_has_it():
    task = get_task("gaussians-2d")
    x, model = ring_points(400), task.pretrained_model()
    nll = ode_nll(model, x, RING_ALPHAS, generator=seeded(), num_levels=None, batch_size=400).mean()
    bound = variational_bound(model, x, RING_ALPHAS, generator=seeded(), num_levels=None, batch_size=8000).mean()
    assert ring_bits(x).mean() < nll < bound < nll + 0.3


def test_forget_images_are_likelier_under_the_model_that_learned_them():
    task = get_task("mnist-trousers")
    data = load_data(task)
    assert data.forget_labels is not None
    x, labels = to_model_range(data.forget[:2]), data.forget_labels[:2]
    for figure, options in ((variational_bound, {"num_timesteps": 40}), (ode_nll, {})):
        learned, never_seen = (
            figure(model, x, task.schedule.alphas_cumprod(), labels=labels, generator=seeded(), **options)
            for model in (task.pretrained_model(), task.oracle_model())
        )
        assert (learned < never_seen).all()
        assert ((learned > 0.5) & (learned < 8)).all()


@pytest.mark.parametrize("levels", [None, 256])
def test_worse_predictor_has_a_larger_bound(levels):
    x = grey_images(20)

    def bound(factor):
        predict = lambda *args: factor * gaussian(*args)  # noqa: E731
        return variational_bound(predict, x, ALPHAS, generator=seeded(), num_levels=levels, num_timesteps=50).mean()

    assert bound(1.0) < bound(0.95) < bound(0.8)
    assert bound(1.0) < bound(1.05)


@pytest.mark.parametrize("last", [0.9, 0.5, 0.01])
def test_the_bound_of_a_network_that_knows_the_noise_is_the_prior_term_and_the_decoders(last):
    alphas_cumprod = torch.tensor([0.99, 0.95, last])
    x = torch.tensor([[0.0, 0.5], [-0.25, 0.75]])

    def predict(x_t, timesteps, labels):
        a = alphas_cumprod[timesteps][:, None]
        rows = labels.long()
        return (x_t - a.sqrt() * x[rows]) / (1 - a).sqrt()

    found = variational_bound(predict, x, alphas_cumprod, labels=torch.arange(2.0), generator=seeded())
    end = torch.distributions.Normal(x * last**0.5, (1 - last) ** 0.5)
    prior = torch.distributions.kl_divergence(end, torch.distributions.Normal(0.0, 1.0)).sum(1)
    decoder = -discretised_log_likelihood(x, x, (1 - alphas_cumprod[0]).sqrt()).sum(1)
    torch.testing.assert_close(found, (prior + decoder) / (2 * math.log(2)), rtol=1e-3, atol=1e-4)


def test_strata_are_unbiased_and_all_timesteps_are_exact():
    x = torch.zeros(1, 2)

    def off_by_one(x_t, timesteps, labels):  # known noise, so that only the drawn timesteps are random
        return x_t / (1 - ALPHAS[timesteps][:, None]).sqrt() + 1

    full = [variational_bound(off_by_one, x, ALPHAS, generator=seeded(s), num_levels=None).item() for s in (0, 1)]
    assert full[0] == pytest.approx(full[1], rel=1e-5)
    for count in (5, 50):
        drawn = variational_bound(
            off_by_one, x.expand(4000, 2), ALPHAS, generator=seeded(), num_levels=None, num_timesteps=count
        )
        assert drawn.std() > 0
        assert abs(drawn.mean() - full[0]) < 4 * drawn.std() / 4000**0.5


@pytest.mark.parametrize("std", [1e-3, 0.01, 0.5])
def test_probabilities_of_the_grey_values_sum_to_one(std):
    means = torch.tensor([-1.5, -1.0, -0.3, 0.1234, 0.999, 3.0])[:, None]
    log_p = discretised_log_likelihood(GREYS.expand(6, 256), means, torch.tensor(std))
    assert log_p.exp().sum(1) == pytest.approx(torch.ones(6), abs=1e-4)
    assert torch.isfinite(log_p).all()


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_bound_of_images_under_a_predictor_of_nothing_is_finite(scale):
    def predict(x_t, timesteps, labels):
        return scale * torch.randn(x_t.shape, generator=seeded())

    x = GREYS.view(1, 1, 16, 16)
    assert torch.isfinite(variational_bound(predict, x, ALPHAS, generator=seeded(), num_timesteps=20)).all()


@pytest.mark.parametrize("figure", [variational_bound, ode_nll])
def test_equal_seeds_give_equal_figures(figure):
    a, b, other = (figure(gaussian, grey_images(5), ALPHAS, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("figure", [variational_bound, ode_nll])
def test_gradients_of_the_parameters_are_left_alone(figure, mode):
    model = build_network(UNetConfig(image_size=4, channels=(8,), num_classes=2))
    first, *others = model.parameters()
    first.grad = torch.ones_like(first)
    with mode():
        nll = figure(model, grey_images(3), ALPHAS, labels=torch.tensor([0, 1, 1]), generator=seeded())
    assert torch.isfinite(nll).all()
    assert not nll.requires_grad
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in others)


def test_missing_torchdiffeq_is_one_line_that_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ResultsError, match=r"needs torchdiffeq; install it with pip install 'unlearn_gym\[metrics\]'"):
        ode_nll(gaussian, gaussian_points(1), ALPHAS, generator=seeded(), num_levels=None)


@pytest.mark.parametrize("predict", [lambda x, t, y: x * math.nan, lambda x, t, y: 1e4 * torch.sin(1e4 * x)])
def test_flow_that_cannot_be_integrated_is_refused(predict):
    with pytest.raises(ResultsError, match=r"cannot be integrated with rtol=0\.0001"):
        ode_nll(predict, gaussian_points(1), ALPHAS, generator=seeded(), num_levels=None)


@pytest.mark.parametrize("count", [0, 1000])
def test_num_timesteps_out_of_range_is_named(count):
    with pytest.raises(SettingsError, match=rf"num_timesteps={count} must lie in 1\.\.999"):
        variational_bound(gaussian, gaussian_points(1), ALPHAS, generator=seeded(), num_timesteps=count)


@pytest.mark.parametrize("figure", [variational_bound, ode_nll])
@pytest.mark.parametrize(
    ("x", "match"),
    [(torch.zeros(1, 3, dtype=torch.uint8), "to_model_range"), (torch.full((1, 3), 3.2), "num_levels=None for points")],
)
def test_what_is_no_image_in_the_range_is_refused(figure, x, match):
    with pytest.raises(DataError, match=match):
        figure(gaussian, x, ALPHAS, generator=seeded())
