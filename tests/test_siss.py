"""Laws of the mixture, its weights and the λ-gradients."""

from __future__ import annotations

import math

import pytest
import torch

from unlearn_gym.math import siss
from unlearn_gym.math.diffusion import ScheduleConfig

SHAPES = [(2,), (1, 4, 4)]
LAMBDAS = [0.0, 0.01, 0.3, 0.5, 0.9, 1.0]
ALPHAS = ScheduleConfig().alphas_cumprod()


def pairs(
    n: int, shape: tuple[int, ...], lambda_: float, seed: int = 0, spread: float = 1.0, timestep: int | None = None
):
    generator = torch.Generator().manual_seed(seed)
    retain, forget, noise = (torch.randn((n, *shape), generator=generator) for _ in range(3))
    timesteps = torch.randint(len(ALPHAS), (n,), generator=generator)
    if timestep is not None:
        timesteps = torch.full((n,), timestep)
    uniforms = torch.rand(n, generator=generator)
    x_t, k = siss.sample_mixture(retain * spread, forget * spread, noise, timesteps, uniforms, ALPHAS, lambda_)
    return retain * spread, forget * spread, noise, timesteps, x_t, k


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lambda_", LAMBDAS)
def test_weights_obey_their_identities(shape, lambda_):
    retain, forget, _, timesteps, x_t, _ = pairs(512, shape, lambda_)
    _, _, w_r, w_f = siss.mixture_targets(x_t, retain, forget, timesteps, ALPHAS, lambda_)
    assert torch.isfinite(w_r).all()
    assert torch.isfinite(w_f).all()
    torch.testing.assert_close((1 - lambda_) * w_r + lambda_ * w_f, torch.ones(512), rtol=0, atol=1e-6)
    if lambda_ < 1:
        assert (w_r <= 1 / (1 - lambda_) * (1 + 1e-6)).all()
    if lambda_ > 0:
        assert (w_f <= 1 / lambda_ * (1 + 1e-6)).all()


@pytest.mark.parametrize("lambda_", [0.1, 0.5, 0.9])
def test_weights_keep_their_digits_at_512_x_512_x_3(lambda_):
    """Images that overlap in noise, so that both weights count: ‖√ᾱ (x_f - x_r)‖ / √(1-ᾱ) is 0.5 to 3."""
    generator, n = torch.Generator().manual_seed(0), 2
    shape = (n, 3, 512, 512)
    retain = torch.randint(256, shape, generator=generator) / 127.5 - 1
    noise, direction = (torch.randn(shape, generator=generator) for _ in range(2))
    for t in (0, 3, 30, 100, 250, 400, 500, 600, 750, 900, 999):
        timesteps, ratio = torch.full((n,), t), (ALPHAS[t] / (1 - ALPHAS[t])).sqrt()
        steps = torch.tensor([0.5, 3.0]).view(n, 1, 1, 1) / ratio * direction / direction.flatten(1).norm(dim=1).max()
        pair = retain, retain + steps
        x_t, _ = siss.sample_mixture(*pair, noise, timesteps, torch.tensor([0.0, 0.99]), ALPHAS, lambda_)
        w_r, w_f = siss.mixture_targets(x_t, *pair, timesteps, ALPHAS, lambda_)[2:]
        doubles = [v.double() for v in (x_t, *pair)]
        exact = siss.mixture_targets(*doubles, timesteps, ALPHAS.double(), lambda_)
        d_r, d_f = (0.5 * eps.square().flatten(1).sum(1) for eps in exact[:2])
        expected = torch.softmax(torch.stack([math.log(1 - lambda_) - d_r, math.log(lambda_) - d_f]), 0)
        found = torch.stack([(1 - lambda_) * w_r, lambda_ * w_f])
        assert (expected > 1e-3).all()  # none is saturated
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.sum(0), torch.ones(n), rtol=0, atol=1e-6)
        assert (w_r * (1 - lambda_) <= 1 + 1e-6).all()
        assert (w_f * lambda_ <= 1 + 1e-6).all()


@pytest.mark.parametrize("lambda_", [0.0, 1e-6, 0.3, 0.5, 0.9, 1.0])
def test_weights_are_exact_and_their_slopes_finite_however_far_the_densities_are_apart(lambda_):
    log_ratio = torch.tensor([-math.inf, -1e6, -200.0, -1.0, 0.0, 1.0, 200.0, 1e6, math.inf])
    log_ratio = log_ratio[log_ratio <= 1.0] if lambda_ == 0 else log_ratio  # what a mixture of one side can draw
    log_ratio = log_ratio[log_ratio >= -1.0] if lambda_ == 1 else log_ratio
    value = torch.tensor(lambda_, requires_grad=True)
    w_r, w_f = siss.importance_weights(log_ratio, value)
    torch.testing.assert_close((1 - value) * w_r + value * w_f, torch.ones_like(w_r), rtol=0, atol=1e-6)
    assert (w_r[log_ratio < -150] == 1 / (1 - value)).all()
    assert (w_f[log_ratio < -150] == 0).all()
    assert (w_r[log_ratio > 150] == 0).all()
    assert (w_f[log_ratio > 150] == 1 / value).all()
    for w in (w_r, w_f):
        (slopes,) = torch.autograd.grad(w, value, torch.ones_like(w), retain_graph=True)
        assert torch.isfinite(slopes)


def test_weights_have_the_right_derivatives_where_densities_are_equal_too():
    log_ratio = torch.tensor([-30.0, -1.0, 0.0, 0.5, 30.0], dtype=torch.float64, requires_grad=True)
    for lambda_ in (0.2, 0.5):
        value = torch.tensor(lambda_, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(siss.importance_weights, (log_ratio, value))


def test_weights_map_over_runs():
    retain, forget, _, timesteps, x_t, _ = pairs(64, (1, 4, 4), 0.5)
    lambdas = torch.tensor([0.01, 0.2, 0.5, 0.9])
    mapped = torch.vmap(lambda lam: siss.mixture_targets(x_t, retain, forget, timesteps, ALPHAS, lam)[2:])(lambdas)
    for i, lam in enumerate(lambdas):
        alone = siss.mixture_targets(x_t, retain, forget, timesteps, ALPHAS, lam)[2:]
        torch.testing.assert_close([w[i] for w in mapped], list(alone))


def test_weights_equal_the_ratio_of_gaussian_densities():
    retain, forget, _, timesteps, x_t, _ = pairs(64, (2,), 0.3, timestep=800)
    _, _, w_r, w_f = siss.mixture_targets(x_t, retain, forget, timesteps, ALPHAS, 0.3)
    alpha_bar = ALPHAS[800].double()

    def density(x):
        normal = torch.distributions.Normal(alpha_bar.sqrt() * x.double(), (1 - alpha_bar).sqrt())
        return normal.log_prob(x_t.double()).sum(1).exp()

    mixture = 0.7 * density(retain) + 0.3 * density(forget)
    torch.testing.assert_close(w_r.double(), density(retain) / mixture, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w_f.double(), density(forget) / mixture, rtol=1e-4, atol=1e-5)


def test_weights_where_labels_differ_are_exactly_those_of_separate_densities():
    retain, forget, _, timesteps, x_t, k = pairs(256, (2,), 0.3)
    labels = siss.mixture_labels(k, torch.zeros(256, dtype=torch.int64), torch.ones(256, dtype=torch.int64))
    _, _, w_r, w_f = siss.mixture_targets(x_t, retain, forget, timesteps, ALPHAS, 0.3, labels=labels)
    assert torch.equal(w_r, torch.where(k, 0.0, 1 / (1 - torch.tensor(0.3))))
    assert torch.equal(w_f, torch.where(k, 1 / torch.tensor(0.3), 0.0))


@pytest.mark.parametrize("lambda_", [0.0, 1.0])
def test_the_mixture_at_its_ends_draws_one_side_only(lambda_):
    *_, k = pairs(1000, (2,), lambda_)
    assert (k == bool(lambda_)).all()


def test_a_uniform_of_zero_draws_no_forget_sample_where_none_may_be_drawn():
    x, t = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    for lambda_, drawn in ((0.0, False), (1e-6, True), (1.0, True)):
        _, k = siss.sample_mixture(x, x + 1, x, t, torch.zeros(4), ALPHAS, lambda_)
        assert (k == drawn).all()


@pytest.mark.parametrize("lambda_", [0.0, 1.0])
def test_lambda_gradients_are_finite_at_the_ends_of_the_range(lambda_):
    terms, k = terms_at(lambda_, 64, seed=0)
    gradients = siss.lambda_gradients(terms, k, lambda_, forget_scale=1.5, **coefficients())
    assert all(torch.isfinite(value) for value in gradients.values())


def test_mask_draws_are_coupled_across_lambda():
    low, high = (pairs(1000, (2,), lam)[-1] for lam in (0.2, 0.6))
    assert (high | ~low).all()
    assert 0.5 < high.float().mean() < 0.7


def coefficients():
    return {"retain_coef": 1.1, "forget_coef": 0.4}


def terms_at(lambda_: float, n: int, seed: int, spread: float = 1.0):
    """SISS terms of a fixed nonlinear predictor, with half of the pairs sharing a label."""
    retain, forget, _, timesteps, x_t, k = pairs(n, (2,), lambda_, seed, spread)
    retain_labels = torch.arange(n) % 2
    labels = siss.mixture_labels(k, retain_labels, torch.ones(n, dtype=torch.int64))
    pred = torch.tanh(x_t) + 0.3 * labels.drawn[:, None]
    targets = siss.mixture_targets(x_t, retain, forget, timesteps, ALPHAS, lambda_, labels=labels)
    return siss.siss_terms(pred, targets, forget_scale=1.5, **coefficients()), k


def losses(lambda_: float, n: int, seed: int) -> torch.Tensor:
    terms, _ = terms_at(lambda_, n, seed)
    c = coefficients()
    weighted = c["retain_coef"] * terms.retain_weight * terms.retain_errors
    return weighted - 1.5 * c["forget_coef"] * terms.forget_weight * terms.forget_errors


def test_expected_loss_does_not_depend_on_lambda():
    n = 200_000
    means, errors = [], []
    for i, lambda_ in enumerate((0.1, 0.5, 0.9)):
        values = losses(lambda_, n, seed=i)
        means.append(values.mean().item())
        errors.append(values.std().item() / math.sqrt(n))
    for mean, error in zip(means[1:], errors[1:], strict=True):
        assert abs(mean - means[0]) < 5 * math.hypot(error, errors[0])


def test_score_function_gradient_is_unbiased_and_pathwise_is_not():
    n, lambda_ = 400_000, 0.4
    terms, k = terms_at(lambda_, n, seed=3)
    gradients = siss.lambda_gradients(terms, k, lambda_, forget_scale=1.5, **coefficients())
    assert abs(gradients["score_function"]) < 0.05  # its expectation is 0; its standard error here about 0.01
    assert gradients["pathwise"] > 0.5  # pushes λ down
    assert gradients["kl_only"] == 0


def test_score_function_gradient_vanishes_sample_by_sample_where_weights_are_saturated():
    retain, forget, _, timesteps, x_t, k = pairs(64, (2,), 0.3)
    labels = siss.mixture_labels(k, torch.zeros(64, dtype=torch.int64), torch.ones(64, dtype=torch.int64))
    for i in range(64):
        one = slice(i, i + 1)
        targets = siss.mixture_targets(
            x_t[one], retain[one], forget[one], timesteps[one], ALPHAS, 0.3,
            labels=siss.PairLabels(*(v[one] for v in labels)),
        )  # fmt: skip
        terms = siss.siss_terms(torch.tanh(x_t[one]), targets, forget_scale=1.5, **coefficients())
        gradients = siss.lambda_gradients(terms, k[one], 0.3, forget_scale=1.5, **coefficients())
        assert gradients["pathwise"] > 0
        assert abs(gradients["score_function"]) < 1e-4 * gradients["pathwise"]


def test_pathwise_gradient_is_the_derivative_with_the_mask_fixed():
    retain, forget, _, timesteps, x_t, k = pairs(64, (2,), 0.4)
    pred, lam = torch.tanh(x_t), torch.tensor(0.4, requires_grad=True)
    targets = siss.mixture_targets(x_t, retain, forget, timesteps, ALPHAS, lam)
    terms = siss.siss_terms(pred, targets, forget_scale=1.5, **coefficients())
    (expected,) = torch.autograd.grad(terms.siss_loss, lam)
    detached = siss.SISSTerms(*(t.detach() for t in terms))
    found = siss.lambda_gradients(detached, k, 0.4, forget_scale=1.5, **coefficients())["pathwise"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_output_gradients_are_those_of_the_losses():
    retain, forget, _, timesteps, x_t, _ = pairs(32, (1, 4, 4), 0.4)
    pred = torch.tanh(x_t).requires_grad_()
    targets = siss.mixture_targets(x_t, retain, forget, timesteps, ALPHAS, 0.4)
    terms = siss.siss_terms(pred, targets, **coefficients())
    expected = [
        torch.autograd.grad(loss, pred, retain_graph=True)[0] for loss in (terms.retain_loss, terms.forget_loss)
    ]
    torch.testing.assert_close(list(siss.output_gradients(terms, **coefficients())), expected)


def test_second_moment_from_one_lambda_predicts_that_of_another():
    lambdas = torch.tensor([0.2, 0.5, 0.8])
    direct, predicted = [], []
    for lambda_ in lambdas.tolist():
        terms, _ = terms_at(lambda_, 400_000, seed=5)
        products = siss.output_gradient_products(terms, **coefficients())
        direct.append(siss.combine_products(products, 1.5).mean())
        predicted.append(siss.combine_products(siss.gradient_second_moment(terms, products, lambdas), 1.5))
    for row in predicted:
        torch.testing.assert_close(row, torch.stack(direct), rtol=0.03, atol=0)


def test_combined_products_are_the_squared_difference():
    terms, _ = terms_at(0.4, 100, seed=6)
    products = siss.output_gradient_products(terms, **coefficients())
    g_r, g_f = siss.output_gradients(terms, **coefficients())
    scale = terms.retain_residual.numel() / 2  # output_gradients are of the batch's mean
    expected = (scale * (g_r - 1.5 * g_f)).square().mean(1)
    torch.testing.assert_close(siss.combine_products(products, 1.5), expected, rtol=1e-3, atol=1e-5)


def test_second_moment_slope_is_the_curves_slope():
    terms, _ = terms_at(0.4, 1000, seed=6)
    products = siss.output_gradient_products(terms, **coefficients())
    curve = siss.combine_products(siss.gradient_second_moment(terms, products, torch.tensor([0.399, 0.401])), 1.5)
    slope = siss.second_moment_slope(terms, products, 1.5)
    torch.testing.assert_close(slope, (curve[1] / curve[0]).log() / 0.002, rtol=1e-2, atol=1e-3)
