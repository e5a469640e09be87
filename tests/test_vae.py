"""The VAE, its bound, and SISS in its latent space: identities, unbiased gradients, plain loops."""

from __future__ import annotations

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import unlearn_gym  # noqa: F401 - registers the environment
from unlearn_gym.errors import SettingsError
from unlearn_gym.math.elbo import Posterior, negative_elbo
from unlearn_gym.math.siss import PairLabels
from unlearn_gym.metrics.vae_likelihood import importance_weighted_nll
from unlearn_gym.models import ConvVAE, VAEConfig
from unlearn_gym.models.families import family_of
from unlearn_gym.run import UnlearningRun
from unlearn_gym.run.batch import Batch
from unlearn_gym.run.objectives import OBJECTIVES, Context, latent
from unlearn_gym.run.objectives.latent import latent_weights
from unlearn_gym.settings import RunSettings
from unlearn_gym.tasks import TaskData, get_task, load_data

TINY = VAEConfig(image_size=8, channels=(8, 8), latent_dim=3, hidden_dim=16, num_classes=2, std=0.5)
ALPHAS = torch.linspace(0.99, 0.01, 10)
PLAIN = {"forget_grad_rule": "loss", "optimizer": "sgd", "learning_rate": 0.01, "max_grad_norm": None}


def tiny_data(labels: bool = True) -> TaskData:
    g = torch.Generator().manual_seed(0)
    sets = {name: torch.rand(20, 1, 8, 8, generator=g) * 2 - 1 for name in ("retain", "forget", "heldout")}
    if labels:
        sets |= {f"{name}_labels": torch.randint(2, (20,), generator=g) for name in ("retain", "forget", "heldout")}
    return TaskData(**sets)


def tiny_run(*, labels: bool = True, seed: int = 0, **options) -> UnlearningRun:
    torch.manual_seed(1)
    model = ConvVAE(TINY if labels else TINY.model_copy(update={"num_classes": None}))
    return UnlearningRun(model, tiny_data(labels), ALPHAS, RunSettings(**{**PLAIN, **options}), seed)


def random_posterior(generator, size=50, dim=3, spread=1.0) -> Posterior:
    return Posterior(*(spread * torch.randn(2, size, dim, generator=generator, dtype=torch.float64)))


def test_the_posterior_is_torchs_gaussian():
    g = torch.Generator().manual_seed(0)
    posterior = random_posterior(g)
    normal = Normal(posterior.mean, (0.5 * posterior.log_variance).exp())
    z = posterior.draw(torch.randn(50, 3, generator=g, dtype=torch.float64))
    torch.testing.assert_close(posterior.log_density(z), normal.log_prob(z).sum(1))
    prior = Normal(torch.zeros(3, dtype=torch.float64), 1.0)
    torch.testing.assert_close(posterior.divergence(), kl_divergence(normal, prior).sum(1))


@pytest.mark.parametrize("lambda_", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_weights_make_one_and_keep_their_bounds(lambda_):
    g = torch.Generator().manual_seed(0)
    retain, forget, value = random_posterior(g), random_posterior(g), torch.tensor(lambda_, dtype=torch.float64)
    from_forget = torch.rand(50, generator=g) < lambda_
    noise = torch.randn(50, 3, generator=g, dtype=torch.float64)
    z = torch.where(from_forget[:, None], forget.draw(noise), retain.draw(noise))
    w_r, w_f = latent_weights(z, retain, forget, value, None)
    torch.testing.assert_close((1 - lambda_) * w_r + lambda_ * w_f, torch.ones_like(w_r))
    if 0 < lambda_ < 1:
        assert w_r.max() <= 1 / (1 - lambda_) + 1e-9
        assert w_f.max() <= 1 / lambda_ + 1e-9
    labels = PairLabels(*(torch.where(from_forget, 1, 0), torch.zeros(50).long(), torch.ones(50).long()))
    w_r, w_f = latent_weights(z, retain, forget, value, labels)
    assert torch.equal(w_r > 0, ~from_forget)
    assert torch.equal(w_f > 0, from_forget)


@pytest.mark.parametrize("lambda_", [0.2, 0.5])
def test_weights_keep_their_digits_in_large_latents(lambda_):
    g, size, dim = torch.Generator().manual_seed(0), 20, 20_000
    retain = Posterior(*torch.randn(2, size, dim, generator=g))
    forget = Posterior(*(v + 0.01 * torch.randn(size, dim, generator=g) for v in retain))
    z = retain.draw(torch.randn(size, dim, generator=g))
    found = latent_weights(z, retain, forget, torch.tensor(lambda_), None)
    exact = [Posterior(*(v.double() for v in side)).log_density(z.double()) for side in (retain, forget)]
    expected = torch.softmax(torch.stack([math.log(1 - lambda_) + exact[0], math.log(lambda_) + exact[1]]), 0)
    assert (expected > 1e-3).any(1).all()
    torch.testing.assert_close(((1 - lambda_) * found[0]).double(), expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close((lambda_ * found[1]).double(), expected[1], rtol=0, atol=1e-5)


def test_weights_stay_finite_where_densities_vanish():
    far = Posterior(torch.full((4, 3), 40.0), torch.full((4, 3), -9.0))
    near = Posterior(torch.zeros(4, 3), torch.full((4, 3), -9.0))
    w_r, w_f = latent_weights(near.draw(torch.zeros(4, 3)), near, far, torch.tensor(0.25), None)
    torch.testing.assert_close(w_r, torch.full((4,), 1 / 0.75))
    assert not w_f.any()


class LinearVAE(torch.nn.Module):
    """q(z|x) = N(a x, e^c), p(x|z) = N(w z, std²) on single numbers: its bound has a closed form."""

    family = "vae"
    config = VAEConfig(latent_dim=1, std=0.5)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.w = (torch.nn.Parameter(torch.tensor(v)) for v in (0.4, -0.6, 1.3))

    def encode(self, x, labels=None):
        return self.a * x.flatten(1), self.c.expand(len(x), 1)

    def decode(self, z, labels=None):
        return self.w * z.view(-1, 1, 1, 1)

    def bound(self, x: float, kl_coef: float) -> torch.Tensor:
        error = ((x - self.w * self.a * x) ** 2 + self.w**2 * self.c.exp()) / (2 * self.config.std**2)
        return error + 0.5 * kl_coef * ((self.a * x) ** 2 + self.c.exp() - 1 - self.c)


def linear_gradients(lambda_: float, size: int = 4000, batches: int = 100, **options):
    """Means over batches of both losses' gradients by (a, c, w), their squared standard errors, and the exact ones."""
    model, g, x = LinearVAE(), torch.Generator().manual_seed(0), (0.9, -0.6)
    context = Context(RunSettings(kl_coef=0.7, **options), ALPHAS, 1.0, 1.0)
    pair = [torch.full((size, 1, 1, 1), value) for value in x]
    rows = []
    for _ in range(batches):
        noise, uniforms = torch.randn(size, 1, generator=g), torch.rand(size, generator=g)
        batch = Batch(*pair, None, None, noise, torch.zeros(size).long(), uniforms, torch.zeros(size).long())
        passes = OBJECTIVES["vae"]["siss"].passes(model, batch, torch.tensor(lambda_), context, None)
        gradients = [
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
            for loss in (passes.retain, passes.forget)
        ]
        rows.append(torch.tensor([0.0 if v is None else v.item() for side in gradients for v in side]))
    exact = [torch.autograd.grad(model.bound(value, 0.7), list(model.parameters())) for value in x]
    stacked = torch.stack(rows)
    return stacked.mean(0), stacked.std(0) / batches**0.5, torch.tensor([v.item() for side in exact for v in side])


@pytest.mark.parametrize("lambda_", [0.3, 0.6])
def test_the_full_gradient_is_in_expectation_that_of_each_sides_own_bound(lambda_):
    mean, error, exact = linear_gradients(lambda_)
    assert ((mean - exact).abs() < 4 * error + 1e-4).all()
    assert (exact.abs() > 20 * error).all()


@pytest.mark.parametrize("lambda_", [0.3, 0.6])
def test_the_stopped_gradient_is_so_for_the_decoder_and_the_encoder_has_none(lambda_):
    mean, error, exact = linear_gradients(lambda_, encoder_gradient="stopped")
    assert not mean[[0, 1, 3, 4]].any()
    assert ((mean - exact)[[2, 5]].abs() < 4 * error[[2, 5]] + 1e-4).all()


def test_a_gradient_through_z_alone_would_be_biased(monkeypatch):
    """What is neither version: weights held constant while z passes the gradient on."""
    monkeypatch.setattr(latent, "latent_weights", lambda *args: tuple(w.detach() for w in latent_weights(*args)))
    mean, error, exact = linear_gradients(0.3)
    assert ((mean - exact).abs() > 20 * error).any()
    assert ((mean - exact)[[2, 5]].abs() < 4 * error[[2, 5]] + 1e-4).all()  # the decoder's is none the worse


def test_weights_in_that_test_are_not_saturated():
    model, noise = LinearVAE(), torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    sides = [Posterior(*model.encode(torch.full((500, 1, 1, 1), x))) for x in (0.9, -0.6)]
    w_r, _ = latent_weights(sides[0].draw(noise), *sides, torch.tensor(0.3), None)
    assert w_r.std() > 0.1


@pytest.mark.parametrize("objective", ["siss", "siss-no-is", "naive", "neggrad"])
@pytest.mark.parametrize("encoder_gradient", ["full", "stopped"])
def test_only_the_full_version_moves_the_encoder(encoder_gradient, objective):
    run = tiny_run(encoder_gradient=encoder_gradient, objective=objective)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.update(0.5)
    moved = {name.split(".")[0] for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    decoder = {"expand", "decoder"}
    assert moved == (decoder | {"encoder", "posterior"} if encoder_gradient == "full" else decoder)


@pytest.mark.parametrize("name", ["siss-no-is", "naive", "neggrad"])
def test_a_baselines_update_is_that_of_a_plain_loop_on_the_bound(name):
    run = tiny_run(objective=name, seed=3, forget_scale=0.7, kl_coef=1.3)
    model, generator = copy.deepcopy(run.model), torch.Generator().manual_seed(3)
    for lambda_ in (0.2, 0.7):
        batch = run.draw(generator)
        parts = [
            (sign * coef, negative_elbo(model, x, y, batch.noise, 1.3).mean())
            for side, sign, coef, x, y in (
                ("neggrad", 1.0, run.retain_coef, batch.retain, batch.retain_labels),
                ("naive", -0.7, run.forget_coef, batch.forget, batch.forget_labels),
            )
            if name != side
        ]
        loss = sum(factor * value for factor, value in parts)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        terms = run.update(lambda_)
        assert terms.siss_loss == pytest.approx(loss.item(), rel=1e-4)
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(0.01 * g)
    for found, expected in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_at_lambda_0_it_is_training_on_retain_data():
    runs = [tiny_run(objective=name, forget_scale=0.0) for name in ("siss", "naive")]
    for _ in range(3):
        for run in runs:
            run.update(0.0)
    torch.testing.assert_close(runs[0].flat.vector, runs[1].flat.vector, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("rule", "factors"), [("siss", (2.0, 1.0)), ("inverse_size", (2.0, 2.0)), ("none", (1, 1))])
def test_both_conventions_of_data_set_factors(rule, factors):
    run, plain = tiny_run(dataset_factors=rule), tiny_run(dataset_factors="none")
    found, expected = run.measure(0.5), plain.measure(0.5)
    assert found.retain_loss == pytest.approx(factors[0] * expected.retain_loss, rel=1e-5)
    assert found.forget_loss == pytest.approx(factors[1] * expected.forget_loss, rel=1e-5)


@pytest.mark.parametrize("encoder_gradient", ["full", "stopped"])
def test_restored_runs_and_every_k_measurements_continue_exactly(encoder_gradient):
    run = tiny_run(encoder_gradient=encoder_gradient, optimizer="adamw", grad_norms="every:2")
    run.update(0.3)
    snapshot = run.snapshot()
    first = [run.update(x) for x in (0.2, 0.8, 0.5)]
    run.restore(snapshot)
    again = [run.update(x) for x in (0.2, 0.8, 0.5)]
    assert [t.siss_loss for t in first] == [t.siss_loss for t in again]


def test_fresh_features_are_the_terms_of_each_sides_own_bound_at_the_runs_settings():
    options = {"kl_coef": 5.0, "encoder_gradient": "stopped"}
    found = tiny_run(**options).measure_unweighted()
    terms = tiny_run(objective="siss-no-is", **options).measure(0.5)
    expected = [terms.retain_loss, terms.forget_loss, terms.retain_grad_norm, terms.forget_grad_norm]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("option", [{"hybrid_coef": 0.5}, {"score_alpha": 1.0}, {"override_classes": {1: 2}}])
def test_options_of_another_family_are_refused(option):
    with pytest.raises(
        SettingsError, match="is for models of the family generator, and this task's model is of the family vae"
    ):
        tiny_run(**option)
    with pytest.raises(SettingsError, match=r"is for models of the family vae, and this .* of the family diffusion"):
        gym.make("SISSUnlearn-v0", task="gaussians-2d", kl_coef=2.0)


def test_norms_measured_seldom_change_no_update():
    runs = [tiny_run(grad_norms=value) for value in ("exact", "every:3")]
    for lambda_ in (0.2, 0.5, 0.8, 0.3):
        for run in runs:
            run.update(lambda_)
    torch.testing.assert_close(runs[0].flat.vector, runs[1].flat.vector, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def shipped():
    task = get_task("vae-mnist-trousers")
    return task, load_data(task), task.pretrained_model().eval()


def test_the_importance_weighted_figure_is_the_bound_at_one_and_falls(shipped):
    _, data, model = shipped
    x, y = data.heldout[:64].float() / 127.5 - 1, data.heldout_labels[:64]
    figures = [
        importance_weighted_nll(
            model, x, labels=y, generator=torch.Generator().manual_seed(0), num_importance=k
        ).mean().item()
        for k in (1, 10, 100)
    ]  # fmt: skip
    assert figures[0] > figures[1] > figures[2]


def test_one_importance_sample_is_the_negative_bound_in_expectation():
    torch.manual_seed(0)
    model = ConvVAE(TINY)
    x, y = torch.rand(200, 1, 8, 8) * 2 - 1, torch.randint(2, (200,))
    found = importance_weighted_nll(
        model, x, labels=y, generator=torch.Generator().manual_seed(0), num_importance=1, num_levels=None
    )
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    bound = negative_elbo(model, x, y, noise) + math.log(0.5) + 0.5 * math.log(2 * math.pi)
    assert found.mean().item() == pytest.approx((bound / math.log(2)).mean().item(), abs=0.02)


def test_grey_values_have_probabilities_that_sum_to_one():
    class Fixed:
        config = VAEConfig(latent_dim=1, std=0.3)

        def encode(self, x, labels):
            return torch.zeros(len(x), 1), torch.zeros(len(x), 1)

        def decode(self, z, labels):
            return torch.full((len(z), 1), 0.2)

    greys = (torch.arange(256).float() / 127.5 - 1)[:, None]
    bits = importance_weighted_nll(Fixed(), greys, generator=torch.Generator().manual_seed(0), num_importance=1)
    assert (2.0**-bits).sum().item() == pytest.approx(1.0, abs=1e-4)


def test_the_environment_runs_it_with_the_same_observation_and_policies(shipped):
    env = gym.make("SISSUnlearn-v0", task="vae-mnist-trousers", horizon=3, reward="potential")
    obs, _ = env.reset(seed=0)
    assert obs.shape == (6,)
    for lambda_ in (0.2, 0.5, 0.8):
        obs, reward, terminated, _, info = env.step(np.array([lambda_], dtype=np.float32))
        assert np.isfinite(obs).all()
        assert math.isfinite(reward)
    assert terminated
    assert info["terms"]["second_moment"].any()


@pytest.mark.parametrize("name", sorted(set(RunSettings.model_fields["objective"].annotation.__args__)))
def test_an_objective_of_another_family_is_refused_in_one_line(shipped, name):
    if name in OBJECTIVES["vae"]:
        gym.make("SISSUnlearn-v0", task="vae-mnist-trousers", objective=name, forget_grad_rule="loss")
    else:
        with pytest.raises(SettingsError, match=f"objective='{name}' is for models of the family") as caught:
            gym.make("SISSUnlearn-v0", task="vae-mnist-trousers", objective=name)
        assert "\n" not in str(caught.value)


def test_vector_environments_equal_single_ones_and_stacked_ones_are_refused(shipped):
    options = {"task": "vae-mnist-trousers", "num_envs": 2, "horizon": 2}
    serial, processes = (gym.make_vec("SISSUnlearn-v0", backend=b, **options) for b in ("serial", "processes"))
    for envs in (serial, processes):
        envs.reset(seed=5)
    action = np.full((2, 1), 0.4, dtype=np.float32)
    np.testing.assert_allclose(serial.step(action)[0], processes.step(action)[0], rtol=1e-5)
    processes.close()
    with pytest.raises(Exception, match="stacked runs are of ε-networks"):
        gym.make_vec("SISSUnlearn-v0", backend="stacked", **options)


def test_samples_are_the_decoders_at_the_prior(shipped):
    _, _, model = shipped
    family = family_of(model)
    noise = torch.randn(5, *family.noise_shape(model, torch.Size((1, 28, 28))))
    labels = torch.arange(5)
    torch.testing.assert_close(family.sample(model, noise, ALPHAS, labels=labels), model.decode(noise, labels))
