"""Every objective against a plain loop of its own, and the law that it is there for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from unlearn_gym.errors import PolicyError, SettingsError
from unlearn_gym.math.diffusion import ScheduleConfig, q_sample
from unlearn_gym.policies import PolicyContext, make_policy
from unlearn_gym.run.batch import Batch
from unlearn_gym.run.objectives import OBJECTIVES
from unlearn_gym.run.objectives.epsilon import EPSILON_OBJECTIVES, nearest
from unlearn_gym.run.stacked import StackedRuns
from unlearn_gym.settings import FAMILY_OPTIONS, LAMBDA_ROLES, OWN_FORGET_RULES, RunSettings
from unlearn_gym.tasks.data import to_model_range

BASELINES = tuple(name for name in EPSILON_OBJECTIVES if name != "siss")
LOSS = {"forget_grad_rule": "loss", "optimizer": "sgd", "learning_rate": 0.01}


def options_of(name, **more):
    return {"objective": name, **LOSS, "forget_scale": 0.7, **more}


def plain_loss(name, run, model, batch, lambda_):
    """The retain and the forget loss of an objective, written from its source, and the gradient that is to be taken."""
    abar = run.alphas_cumprod[batch.timesteps].view(-1, *(1,) * (batch.noise.dim() - 1))
    c_r, c_f, scale = run.retain_coef, run.forget_coef, run.settings.forget_scale

    def error(x, labels, target=None):
        x_t = abar.sqrt() * x + (1 - abar).sqrt() * batch.noise
        target = batch.noise if target is None else target(x_t)
        return (model(x_t, batch.timesteps, labels) - target).square().flatten(1).mean(1)

    def neighbours(x_t):
        pool = to_model_range(run.data.retain)
        nearby = pool[torch.cdist(batch.forget.flatten(1), pool.flatten(1)).topk(10, largest=False)[1]]
        v = (x_t[:, None] - abar[:, None].sqrt() * nearby) / (1 - abar[:, None]).sqrt()
        shares = (-0.5 * v.flatten(2).square().sum(2)).softmax(1)
        return torch.einsum("bk,bk...->b...", shares, v)

    parameters = list(model.parameters())
    gradient = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])  # noqa: E731
    retain, forget = (batch.retain, batch.retain_labels), (batch.forget, batch.forget_labels)
    if name == "naive":
        return gradient(c_r * error(*retain).mean())
    if name == "neggrad":
        return -scale * gradient(c_f * error(*forget).mean())
    if name == "siss-no-is":
        return gradient(c_r * error(*retain).mean() - scale * c_f * error(*forget).mean())
    if name == "bernoulli":
        k = batch.uniforms < lambda_
        r, f = torch.where(k, 0.0, error(*retain)), torch.where(k, error(*forget), 0.0)
        return gradient(c_r * r.mean() / (1 - lambda_) - scale * c_f * f.mean() / lambda_)
    if name == "erasediff":
        g_r = gradient(c_r * error(*retain).mean())
        g_f = gradient(c_f * error(*forget, lambda _: batch.extra).mean())
        return g_r + max(0.0, scale - (g_r @ g_f / (g_f @ g_f)).item()) * g_f
    loss = (1 - lambda_) * c_r * error(*retain).mean() + scale * lambda_ * c_f * error(*forget, neighbours).mean()
    return gradient(loss)


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
@pytest.mark.parametrize("name", BASELINES)
def test_an_update_is_that_of_a_plain_loop(make_run, task, name):
    run = make_run(task, seed=3, **options_of(name, max_grad_norm=None))
    model, generator = copy.deepcopy(run.model), torch.Generator().manual_seed(3)
    for lambda_ in (0.2, 0.7):
        gradient = plain_loss(name, run, model, run.draw(generator), lambda_)
        terms = run.update(lambda_)
        assert terms.update_norm == pytest.approx(gradient.norm().item(), rel=2e-3)
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradient.split([p.numel() for p in model.parameters()]), strict=True):
                p.sub_(0.01 * g.view_as(p))
    for found, expected in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("lambda_", [0.2, 0.7])
def test_without_importance_sampling_and_with_bernoulli_draws_the_expected_gradients_are_those_of_siss(
    make_run, lambda_
):
    means, errors = {}, {}
    for name in ("siss", "siss-no-is", "bernoulli"):
        run = make_run(batch_size=256, **options_of(name))
        with torch.no_grad():  # away from the pretrained weights, where gradients nearly vanish
            run.flat.vector.add_(
                torch.randn(run.flat.vector.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1
            )
        gradients = []
        for _ in range(60):
            run.measure(lambda_)
            gradients.append(torch.cat([run.retain_grad, run.forget_grad]).double().clone())
        stacked = torch.stack(gradients)
        means[name], errors[name] = stacked.mean(0), stacked.var(0) / len(stacked)
    for name in ("siss-no-is", "bernoulli"):
        difference = means[name] - means["siss"]
        expected = (errors[name] + errors["siss"]).sum()
        assert difference.square().sum() < 1.6 * expected  # its mean, were both unbiased
        assert means["siss"].square().sum() > 20 * expected  # the comparison says something


def test_reports_say_of_objectives_what_the_objectives_are():
    for objectives in OBJECTIVES.values():
        for name, objective in objectives.items():
            assert LAMBDA_ROLES[name] == objective.lambda_role
            assert (name in OWN_FORGET_RULES) == objective.projects
    assert set(LAMBDA_ROLES) == {name for objectives in OBJECTIVES.values() for name in objectives}
    assert set(FAMILY_OPTIONS) == set(OBJECTIVES)


@pytest.mark.parametrize("name", [n for n, o in EPSILON_OBJECTIVES.items() if o.lambda_role == "none"])
def test_lambda_does_nothing_where_it_is_said_to(make_run, name):
    runs = [make_run(**options_of(name)) for _ in range(2)]
    for _ in range(3):
        terms = [run.update(lambda_) for run, lambda_ in zip(runs, (0.1, 0.9), strict=True)]
        assert set(terms[0].lambda_gradients.values()) == {0.0}
    torch.testing.assert_close(runs[0].flat.vector, runs[1].flat.vector, rtol=0, atol=0)


@pytest.mark.parametrize("name", [n for n, o in EPSILON_OBJECTIVES.items() if o.lambda_role != "none"])
def test_lambda_does_something_where_it_is_said_to(make_run, name):
    runs = [make_run(**options_of(name)) for _ in range(2)]
    for run, lambda_ in zip(runs, (0.1, 0.9), strict=True):
        run.update(lambda_)
    assert not torch.equal(runs[0].flat.vector, runs[1].flat.vector)


def test_retracks_lambda_gradient_is_the_losss_derivative(make_run):
    losses = []
    for lambda_ in (0.3, 0.3 + 1e-2):
        terms = make_run(seed=5, **options_of("retrack")).measure(lambda_)
        losses.append(terms)
    slope = (losses[1].siss_loss - losses[0].siss_loss) / 1e-2
    assert losses[0].lambda_gradients["pathwise"] == pytest.approx(slope, rel=1e-3)  # the loss is linear in λ
    assert losses[0].lambda_gradients["score_function"] == losses[0].lambda_gradients["pathwise"]


@pytest.mark.parametrize("forget_scale", [0.01, 1.0, 30.0])
def test_erasediffs_update_descends_the_forget_term_as_fast_as_is_asked(make_run, forget_scale):
    run = make_run("mnist-trousers", **options_of("erasediff", max_grad_norm=None) | {"forget_scale": forget_scale})
    for _ in range(3):
        terms = run.update(0.5)
        update = run.retain_grad - terms.forget_multiplier * run.forget_grad
        ratio = (update @ run.forget_grad / run.forget_grad.square().sum()).item()
        assert terms.forget_multiplier <= 0
        if terms.forget_multiplier < 0:
            assert ratio == pytest.approx(forget_scale, rel=1e-3, abs=1e-4)
        else:
            assert ratio >= forget_scale


def test_retracks_target_is_what_the_retain_data_alone_would_have_predicted(make_run):
    """With all retain data as neighbours it is E[ε | x_t] of their empirical distribution, the best prediction."""
    run = make_run(batch_size=512, **options_of("retrack"))
    pool = to_model_range(run.data.retain[:64])
    batch = run.draw(run.generator)
    batch = batch._replace(extra=pool.expand(len(batch.noise), *pool.shape), forget=pool[batch.forget_index % 64])
    drawn = EPSILON_OBJECTIVES["retrack"].draw(batch, run.alphas_cumprod, torch.tensor(0.5))
    target, x_t = drawn.targets.forget_noise[512:], drawn.x_t[512:]
    torch.testing.assert_close(x_t, q_sample(batch.forget, batch.noise, batch.timesteps, run.alphas_cumprod))
    # an orthogonality that only the conditional mean has: E[(ε - target) h(x_t)] = 0
    for h in (target, x_t, x_t.sin()):
        products = ((batch.noise - target) * h).flatten()
        assert abs(products.mean()) < 4 * products.std() / len(products) ** 0.5
    assert (batch.noise - target).square().mean() > 0.05  # target is not the noise itself


def test_retracks_shares_keep_their_digits_however_many_pixels_there_are():
    """Neighbours that differ in one pixel each of 3 × 256 × 256: their shares show there."""
    g, size, k, t = torch.Generator().manual_seed(0), 2, 10, 500
    alphas = ScheduleConfig().alphas_cumprod()
    forget, noise = torch.rand(size, 3, 256, 256, generator=g), torch.randn(size, 3, 256, 256, generator=g)
    neighbours = forget.unsqueeze(1).repeat(1, k, 1, 1, 1)
    for i in range(k):
        neighbours[:, i, 0, 0, i] += (0.5 + 0.2 * i) * ((1 - alphas[t]) / alphas[t]).sqrt()
    none = torch.zeros(size).long()
    batch = Batch(forget, forget, None, None, noise, torch.full((size,), t), torch.zeros(size), none, neighbours)
    exact = batch._replace(retain=forget.double(), forget=forget.double(), noise=noise.double())
    exact = exact._replace(extra=neighbours.double())
    draw = EPSILON_OBJECTIVES["retrack"].draw
    found, expected = (
        draw(b, a, torch.tensor(0.5, dtype=a.dtype)).targets.forget_noise[size:]
        for b, a in ((batch, alphas), (exact, alphas.double()))
    )
    moved = (noise - expected)[:, 0, 0, :k].abs()
    assert (moved > 0.1).any(1).all()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_erasediffs_targets_are_uniform_and_drawn_anew(make_run):
    run = make_run(batch_size=512, **options_of("erasediff"))
    first, second = (run.draw(run.generator).extra for _ in range(2))
    assert first.min() >= 0
    assert first.max() < 1
    assert first.mean().item() == pytest.approx(1 / 2, abs=0.05)
    assert first.var().item() == pytest.approx(1 / 12, abs=0.02)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", [n for n, o in EPSILON_OBJECTIVES.items() if not o.projects])
def test_norms_in_every_third_update_change_no_update_and_keep_their_age(make_run, name):
    """Where the forget term's error is to fall as where it is to rise: one backward pass is that of both."""
    exact, rare = make_run(**options_of(name)), make_run(**options_of(name), grad_norms="every:3")
    for lambda_ in (0.2, 0.8):
        exact.update(lambda_)
        rare.update(lambda_)
    snapshot = rare.snapshot()
    ages = [rare.update(x).norms_age for x in (0.5, 0.3)]
    rare.restore(snapshot)
    assert [rare.update(x).norms_age for x in (0.5, 0.3)] == ages == [2, 0]
    for lambda_ in (0.5, 0.3):
        exact.update(lambda_)
    torch.testing.assert_close(rare.flat.vector, exact.flat.vector, rtol=1e-5, atol=1e-6)


def test_neighbours_are_the_nearest():
    generator = torch.Generator().manual_seed(0)
    samples, pool = torch.rand(300, 2, generator=generator), torch.rand(50, 2, generator=generator)
    found = nearest(samples, pool, 10)
    distances = (samples[:, None] - pool).norm(dim=2)
    torch.testing.assert_close(distances.gather(1, found), distances.sort(1)[0][:, :10])
    assert nearest(samples, pool[:3], 10).shape == (300, 3)


ROWS = {"siss": (16, 16), "siss-no-is": (32, 32), "bernoulli": (16, 16), "naive": (16, 16), "neggrad": (16, 16),
        "erasediff": (32, 32), "retrack": (32, 32)}  # fmt: skip


@pytest.mark.parametrize("name", EPSILON_OBJECTIVES)
def test_no_sample_is_shown_more_often_than_the_objective_needs(make_run, name):
    run = make_run("mnist-trousers", **options_of(name))
    shown = []
    run.model.register_forward_pre_hook(lambda _, inputs: shown.append(len(inputs[0])))
    run.update(0.5)
    low, high = (1, 16) if EPSILON_OBJECTIVES[name].rows == "mixture" else ROWS[name]
    assert low <= sum(shown) <= high


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
@pytest.mark.parametrize("name", EPSILON_OBJECTIVES)
def test_every_row_is_shown_once_and_both_terms_of_a_mixture_share_one_forward_pass(make_run, task, name):
    run = make_run(task, skip_zero_weights=False, **options_of(name))
    shown = []
    run.model.register_forward_pre_hook(lambda _, inputs: shown.append(len(inputs[0])))
    for _ in range(3):
        run.update(0.5)
    assert shown == [16] * (3 * ROWS[name][1] // 16)


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
@pytest.mark.parametrize("name", BASELINES)
def test_stacked_runs_do_the_same(make_run, task, name):
    single = [make_run(task, seed=s, **options_of(name)) for s in (0, 1)]
    stacked = StackedRuns([make_run(task, seed=s, **options_of(name)) for s in (0, 1)])
    found = stacked.update({0: 0.3, 1: 0.6})
    for i, lambda_ in enumerate((0.3, 0.6)):
        expected = single[i].update(lambda_)
        assert found[i].siss_loss == pytest.approx(expected.siss_loss, rel=1e-3, abs=1e-6)
        assert found[i].update_norm == pytest.approx(expected.update_norm, rel=2e-3)
        for name_, value in expected.lambda_gradients.items():
            assert found[i].lambda_gradients[name_] == pytest.approx(value, rel=2e-3, abs=1e-5), name_


@pytest.mark.parametrize("name", EPSILON_OBJECTIVES)
def test_a_restored_run_continues_bit_for_bit(make_run, name):
    run = make_run(**options_of(name))
    run.update(0.4)
    snapshot = run.snapshot()
    first = [run.update(x).siss_loss for x in (0.3, 0.8)]
    run.restore(snapshot)
    assert [run.update(x).siss_loss for x in (0.3, 0.8)] == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "neggrad"}, "objective='neggrad' has no retain gradient"),
        (
            {"objective": "erasediff", "grad_norms": "every:2", "forget_grad_rule": "loss"},
            "needs both gradients always",
        ),
        ({"objective": "sis"}, "objective='sis'"),
    ],
)
def test_settings_that_do_not_go_together_are_named(options, message):
    with pytest.raises(SettingsError, match=message):
        RunSettings(forget_grad_rule="relative_norm").override(**options)


@pytest.mark.parametrize(("task", "objective"), [("gaussians-2d", "retrack"), ("sfd-mnist-digits", "sfd")])
def test_a_rule_that_would_undo_lambda_is_refused(make_run, task, objective):
    with pytest.raises(SettingsError, match=r"λ is the forget term's weight there, .*take forget_grad_rule='loss'"):
        make_run(task, objective=objective, forget_grad_rule="relative_norm")


def test_the_variance_policy_needs_a_mixture():
    context = PolicyContext("gaussians-2d", 0.1, 0.9, 10, objective="retrack")
    with pytest.raises(PolicyError, match="needs an objective that draws from a mixture"):
        make_policy("variational:variance", context)
    assert make_policy("variational:pathwise", context)


def test_settings_name_the_objectives_that_there_are():
    annotation = RunSettings.model_fields["objective"].annotation
    assert set(annotation.__args__) == {name for objectives in OBJECTIVES.values() for name in objectives}


@pytest.mark.parametrize("name", EPSILON_OBJECTIVES)
def test_the_environment_runs_on_each(name):
    from unlearn_gym.envs import SISSUnlearnEnv

    env = SISSUnlearnEnv("gaussians-2d", horizon=3, **options_of(name))
    env.reset(seed=0)
    steps = [env.step(0.5) for _ in range(3)]
    assert steps[-1][2]
    assert all(env.observation_space.contains(obs) and np.isfinite(reward) for obs, reward, *_ in steps)
