"""Laws of what a run draws, and of what a step reports of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from unlearn_gym.math.siss import combine_products
from unlearn_gym.run import UnlearningRun
from unlearn_gym.run.batch import draw_batch, mix
from unlearn_gym.run.gradients import clip_factor, gradient_norms
from unlearn_gym.run.terms import SECOND_MOMENT_GRID
from unlearn_gym.settings import RunSettings
from unlearn_gym.tasks import TaskData

SIZE = 20_000


def uniform(counts: torch.Tensor) -> bool:
    return bool(stats.chisquare(counts.numpy()).pvalue > 1e-3)


def test_every_sample_and_timestep_is_drawn_equally_often_and_noise_is_normal():
    data = TaskData(retain=torch.arange(50.0)[:, None], forget=torch.arange(20.0)[:, None], heldout=torch.zeros(1, 1))
    batch = draw_batch(data, SIZE, 10, torch.Generator().manual_seed(0))
    drawn = {50: batch.retain[:, 0].long(), 20: batch.forget[:, 0].long(), 10: batch.timesteps}
    for count, places in drawn.items():
        counts = places.bincount()
        assert len(counts) == count
        assert uniform(counts)
    assert torch.equal(batch.forget_index, drawn[20])
    assert stats.kstest(batch.noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(batch.uniforms.numpy(), "uniform").pvalue > 1e-3
    columns = torch.stack([*(v.double() for v in drawn.values()), batch.noise[:, 0].double(), batch.uniforms.double()])
    correlations = torch.corrcoef(columns) - torch.eye(5)
    assert correlations.abs().max() < 4.5 / SIZE**0.5


@pytest.mark.parametrize("lambda_", [0.2, 0.7])
def test_a_steps_statistics_are_those_of_its_weights_and_of_its_mask(make_run, lambda_):
    run = make_run(batch_size=64)
    twin = torch.Generator()
    twin.set_state(run.measure_generator.get_state())
    batch = run.draw(twin)
    draw = mix(batch, run.alphas_cumprod, torch.tensor(lambda_))
    terms = run.measure(lambda_)
    weights = {"retain": draw.targets.retain_weight.double(), "forget": draw.targets.forget_weight.double()}
    for side, w in weights.items():
        shares = w / w.sum()
        assert getattr(terms, f"{side}_ess") == pytest.approx(1 / shares.square().sum().item(), rel=1e-4)
        assert getattr(terms, f"{side}_weight_max") == pytest.approx(w.max().item(), rel=1e-5)
    negligible = [int((w < 1e-3).sum()) for w in weights.values()]
    assert 0 < sum(negligible) != 64
    assert terms.negligible_fraction == pytest.approx(sum(negligible) / 128)
    assert terms.forget_fraction == pytest.approx((batch.uniforms < lambda_).double().mean().item())
    assert terms.forget_fraction != 0.5


@pytest.mark.parametrize("rule", ["loss", "relative_norm", "fixed_norm"])
def test_the_variance_slope_is_that_of_the_reported_curve_at_the_multiplier_of_the_update(make_run, rule):
    run = make_run(batch_size=64, forget_grad_rule=rule, forget_scale=1.0, forget_grad_norm=0.05)
    place = len(SECOND_MOMENT_GRID) // 2
    terms = run.measure(float(SECOND_MOMENT_GRID[place]))
    curve = np.log(combine_products(terms.second_moment, terms.forget_multiplier))
    steps = [
        (curve[place + k] - curve[place - k]) / (SECOND_MOMENT_GRID[place + k] - SECOND_MOMENT_GRID[place - k])
        for k in (1, 2)
    ]
    slope = steps[0] + (steps[0] - steps[1]) / 3  # of the fourth order
    assert terms.lambda_gradients["variance"] == pytest.approx(slope, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("norm", [0.0, 1e-8, 0.3, 2.0, 1e6])
@pytest.mark.parametrize("bound", [None, 0.5, 2.0])
def test_clipping_brings_a_norm_down_to_its_bound_and_never_up(norm, bound):
    factor = clip_factor(torch.tensor(norm), bound)
    assert (factor * norm).item() == pytest.approx(norm if bound is None else min(norm, bound), rel=1e-5)
    assert factor <= 1


@pytest.mark.parametrize("rule", ["fixed_norm", "relative_norm"])
def test_a_forget_gradient_that_vanished_has_no_direction_to_go(rule):
    settings = RunSettings(forget_grad_rule=rule)
    retain = torch.arange(4.0)
    norms = gradient_norms(retain, torch.zeros(4), torch.ones(2), settings, sign=1.0, projects=False)
    assert norms.forget_multiplier == 0
    assert norms.update == norms.retain == retain.norm()


def test_terms_by_name_are_the_callers_own(make_run):
    terms = make_run().measure(0.5)
    first = terms.as_dict()
    moment, slopes = first["second_moment"].copy(), dict(first["lambda_gradients"])
    first["second_moment"][:] = -1
    first["lambda_gradients"].clear()
    assert (terms.as_dict()["second_moment"] == moment).all()
    assert terms.as_dict()["lambda_gradients"] == slopes


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_without_a_gradient_nothing_moves(make_run, optimizer):
    run = make_run(optimizer=optimizer, learning_rate=0.1)
    before = run.flat.vector.detach().clone()
    for _ in range(3):
        run.flat.vector.grad = torch.zeros_like(before)
        run.optimizer.step()
    assert torch.equal(run.flat.vector, before)


class Dropping(nn.Module):
    """A network with dropout behind it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.dropout = network, nn.Dropout(0.5)

    def forward(self, x_t, timesteps, labels=None):
        return self.dropout(self.network(x_t, timesteps, labels))


def test_dropout_is_off_whatever_mode_a_model_comes_in(make_run):
    plain = make_run()
    model = Dropping(make_run().model).train()
    run = UnlearningRun(model, plain.data, plain.alphas_cumprod, plain.settings)
    np.testing.assert_equal(run.update(0.5).as_dict(), plain.update(0.5).as_dict())
