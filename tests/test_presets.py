"""Updates as public code makes them: ``preset=`` against plain loops written from descriptions of that code."""

from __future__ import annotations

import copy
from dataclasses import replace

import gymnasium as gym
import pytest
import torch

import unlearn_gym  # noqa: F401 - registers the environment
from tests.test_sfd import ALPHAS, tiny_run
from unlearn_gym.errors import SettingsError
from unlearn_gym.making.calibration import calibrate
from unlearn_gym.math.diffusion import q_sample
from unlearn_gym.run.stacked import StackedRuns
from unlearn_gym.settings import PRESETS, RunSettings
from unlearn_gym.tasks import get_task, load_data


def siss_loop(run, model, optimizer, batch, lambda_, forget_norm):
    """One step of the public SISS loop: errors summed over pixels, no data-set factor, the forget gradient rescaled to
    ``forget_norm``, the whole clipped at 1. Leaves the gradient in ``model``; returns the norms of both sides.
    """
    from_forget = batch.uniforms < lambda_
    a = run.alphas_cumprod[batch.timesteps].view(-1, *(1,) * (batch.noise.dim() - 1))
    noisy = {
        name: a.sqrt() * x + (1 - a).sqrt() * batch.noise for name, x in (("r", batch.retain), ("f", batch.forget))
    }
    x_t = torch.where(from_forget.view_as(a), noisy["f"], noisy["r"])
    pred = model(x_t, batch.timesteps, None)
    errors, distances = [], []
    for x in (batch.retain, batch.forget):
        errors.append((pred - (x_t - a.sqrt() * x) / (1 - a).sqrt()).square().flatten(1).sum(1))
        distances.append(((x_t - a.sqrt() * x).double().square() / (2 * (1 - a))).flatten(1).sum(1))
    ratio = (distances[0] - distances[1]).exp()
    weights = 1 / ((1 - lambda_) + lambda_ * ratio), 1 / ((1 - lambda_) / ratio + lambda_)
    parameters = list(model.parameters())
    losses = [(w.to(e) * e).sum() / len(e) for w, e in zip(weights, errors, strict=True)]
    retain, forget = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses)
    norms = [torch.cat([g.flatten() for g in side]).double().norm() for side in (retain, forget)]
    for p, r, f in zip(parameters, retain, forget, strict=True):
        p.grad = r - (forget_norm / norms[1]).to(f) * f
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return [norm.item() for norm in norms]


def away_from_the_start(run):
    """Pretrained weights have nearly no gradient: one that is mostly rounding says little."""
    size, generator = run.flat.vector.shape, torch.Generator().manual_seed(0)
    with torch.no_grad():
        run.flat.vector.add_(torch.randn(size, generator=generator), alpha=0.02)


@pytest.mark.parametrize(("task", "options"), [("gaussians-2d", {}), ("mnist-tshirt", {"batch_size": 8})])
@pytest.mark.parametrize("forget_norm", [5.0, 0.2])
def test_siss_code_is_the_public_loop(make_run, task, options, forget_norm):
    options = {"preset": "siss-code", "forget_grad_norm": forget_norm, "learning_rate": 5e-5, **options}
    run = make_run(task, seed=3, **options)
    away_from_the_start(run)
    model = copy.deepcopy(run.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    generator = torch.Generator().manual_seed(3)
    start = run.flat.vector.detach().clone()
    for lambda_ in (0.5, 0.3, 0.5):
        norms = siss_loop(run, model, optimizer, run.draw(generator), lambda_, forget_norm)
        terms = run.update(lambda_)
        assert [terms.retain_grad_norm, terms.forget_grad_norm] == pytest.approx(norms, rel=1e-5)
        expected = flat([p.grad for p in model.parameters()])
        found = flat(run.flat.gradient_views(run.update_grad))
        assert (found - expected).norm() < 1e-5 * expected.norm()
    moved = flat(run.flat.gradient_views(run.flat.vector.detach() - start))
    theirs = flat(model.parameters()) - flat(run.flat.gradient_views(start))
    assert (moved - theirs).norm() < 1e-3 * theirs.norm()  # Adam divides small gradients by their own size


def flat(parts):
    return torch.cat([part.detach().flatten() for part in parts])


def test_siss_code_is_what_means_over_pixels_with_norms_divided_by_their_number_are(make_run):
    """Without Adam, whose ε they would be measured against: the gradient is smaller by D, the step by a D-th larger."""
    summed = make_run("mnist-tshirt", preset="siss-code", optimizer="sgd", learning_rate=1e-4, batch_size=4)
    pixels = 28 * 28
    mean = make_run(
        "mnist-tshirt", dataset_factors="none", forget_grad_rule="fixed_norm", forget_grad_norm=5 / pixels,
        max_grad_norm=1 / pixels, optimizer="sgd", learning_rate=1e-4 * pixels, batch_size=4,
    )  # fmt: skip
    away_from_the_start(summed)
    away_from_the_start(mean)
    start = summed.flat.vector.detach().clone()
    for _ in range(3):
        terms = [run.update(0.5) for run in (summed, mean)]
        assert terms[0].siss_loss == pytest.approx(pixels * terms[1].siss_loss, rel=1e-4)
        assert terms[0].update_norm == pytest.approx(pixels * terms[1].update_norm, rel=1e-4)
    moved = [run.flat.vector.detach() - start for run in (summed, mean)]
    assert (moved[0] - moved[1]).norm() < 1e-4 * moved[0].norm()


def sfd_loop(model, batch, lambda_, optimizers, alpha):
    """One step of the public loop of score forgetting distillation, both networks' entries clipped at 1."""

    def x0(network, x_t, t, y):
        a = ALPHAS[t].view(-1, 1, 1, 1)
        return (x_t - (1 - a).sqrt() * network(x_t, t, y)) / a.sqrt()

    def make(noise, labels):
        t = torch.full((len(labels),), model.start)
        return x0(model.generator, (1 - ALPHAS[model.start]).sqrt() * noise, t, labels)

    def timesteps(shares):
        return (38 + shares * (712 - 38)).long()

    def step(network, optimizer, loss):
        optimizer.zero_grad()
        loss.backward(inputs=list(network.parameters()))
        torch.nn.utils.clip_grad_value_(network.parameters(), 1.0)
        optimizer.step()

    loss = 0.0
    for d, weight in zip(batch.extra, (1.0, 0.01), strict=True):
        x, t = make(d.fake_start, d.labels).detach(), timesteps(d.fake_timesteps)
        error = model.fake(q_sample(x, d.fake_noise, t, ALPHAS), t, d.labels) - d.fake_noise
        loss = loss + weight * error.square().sum((1, 2, 3)).mean()
    step(model.fake, optimizers[0], loss)
    loss = 0.0
    for d, weight in zip(batch.extra, (1 - lambda_, lambda_), strict=True):
        x, t = make(d.noise, d.labels), timesteps(d.timesteps)
        x_t = q_sample(x, d.score_noise, t, ALPHAS)
        real, fake = x0(model.teacher, x_t, t, d.teacher_labels), x0(model.fake, x_t, t, d.labels)
        omega = (x - real).detach().abs().mean((1, 2, 3), keepdim=True)
        loss = loss + weight * ((real - fake) * ((real - x) - alpha * (real - fake)) / omega).sum((1, 2, 3)).mean()
    step(model.generator, optimizers[1], loss)


def test_sfd_code_is_the_public_loop():
    run = tiny_run(**PRESETS["sfd-code"], learning_rate=1e-5, seed=3)
    model, generator, lambda_ = copy.deepcopy(run.model), torch.Generator().manual_seed(3), 0.01 / 1.01
    networks = ("fake", "generator")
    optimizers = [
        torch.optim.Adam(getattr(model, name).parameters(), lr=1e-5, betas=(0.0, 0.999), eps=1e-8) for name in networks
    ]
    for _ in range(3):
        batch = run.draw(generator)
        sfd_loop(model, batch, lambda_, optimizers, 1.2)
        run.update(lambda_)
        for name, found in (("fake", run.learner), ("generator", run)):
            gradient = run.update_grad if name == "generator" else run.learner.gradient
            expected = flat([p.grad for p in getattr(model, name).parameters()])
            assert (flat(found.flat.gradient_views(gradient)) - expected).norm() < 1e-4 * expected.norm()
            assert gradient.abs().max() <= 1.0
    assert run.learner.gradient.abs().max() == 1.0  # the clip was there
    assert not torch.equal(batch.extra[0].fake_start, batch.extra[0].noise)


def test_options_beside_a_preset_go_before_it_and_settings_hold_what_it_stands_for():
    settings = RunSettings().override(preset="siss-code", forget_grad_norm=500.0)
    assert settings.forget_grad_norm == 500.0
    assert settings.loss_reduction == "sum"
    assert settings == RunSettings().override(**{**PRESETS["siss-code"], "forget_grad_norm": 500.0})
    assert settings.override(horizon=3).forget_grad_norm == 500.0
    assert hash(settings) == hash(RunSettings().override(**settings.model_dump(mode="json")))


@pytest.mark.parametrize("name", ["siss", 3, ["siss-code"]])
def test_a_preset_that_there_is_not_is_named(name):
    with pytest.raises(SettingsError, match="must be one of 'siss-code', 'sfd-code'"):
        RunSettings().override(preset=name)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_made_of_settings_that_fit_together(name):
    settings = RunSettings().override(preset=name)
    assert {option: getattr(settings, option) for option in PRESETS[name]} == PRESETS[name]


def test_environments_take_presets_and_observe_what_they_would_without():
    """Ratios to start values, both of which are D times larger."""
    envs = [
        gym.make("SISSUnlearn-v0", task="gaussians-2d", horizon=3, loss_reduction=reduction)
        for reduction in ("mean", "sum")
    ]
    first, second = (env.reset(seed=0)[0] for env in envs)
    assert first == pytest.approx(second, abs=1e-5)
    env = gym.make("SISSUnlearn-v0", task="gaussians-2d", preset="siss-code")
    assert env.spec.kwargs["preset"] == "siss-code"
    assert env.unwrapped.settings.forget_grad_norm == 5.0
    env.reset(seed=0)
    assert env.step([0.5])[4]["terms"]["forget_multiplier"] > 0


def test_constants_are_of_means_whatever_a_tasks_own_settings_are():
    """A run multiplies them by its own factors: those of a task's settings would count twice."""
    task = get_task("gaussians-2d")
    summed = replace(task, settings=task.settings.override(loss_reduction="sum"))
    found = [calibrate(t, load_data(task), num_batches=64).forget_loss for t in (task, summed)]
    assert found[0] == found[1]


def test_entries_are_clipped_in_single_and_in_stacked_runs_alike(make_run):
    options = {"max_grad_value": 1e-3, "max_grad_norm": None, "optimizer": "sgd", "learning_rate": 1.0}
    single, stacked = make_run(**options), StackedRuns([make_run(**options), make_run(seed=1, **options)])
    before = single.flat.vector.detach().clone()
    single.update(0.5)
    stacked.update({0: 0.5, 1: 0.5})
    moved = (single.flat.vector.detach() - before).abs()
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-3)
    assert (moved > 0.9e-3).float().mean() > 0.1
    torch.testing.assert_close(stacked.runs[0].flat.vector, single.flat.vector, rtol=1e-4, atol=1e-6)


def test_clipping_by_the_norm_is_the_same_at_every_scale(make_run):
    """As ``loss_reduction`` has it: an ε beside the norm would count D times as much for means."""
    for factor in (1.0, 1e-6):
        run = make_run(
            "gaussians-2d", max_grad_norm=1e-2 * factor, forget_grad_rule="loss", optimizer="sgd",
            learning_rate=1 / factor,
        )  # fmt: skip
        run.retain_coef = run._coefs["retain_coef"] = factor
        run.forget_coef = run._coefs["forget_coef"] = factor
        run.update(0.5)
        assert run.update_grad.norm().item() == pytest.approx(1e-2 * factor, rel=1e-5)
