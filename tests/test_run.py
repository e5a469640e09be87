"""The live run: its update against a plain loop, its streams, its snapshots."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn_gym.errors import RunError, SettingsError
from unlearn_gym.math import siss
from unlearn_gym.math.siss import dataset_factors
from unlearn_gym.models.flat import FlatParameters
from unlearn_gym.run import UnlearningRun
from unlearn_gym.run.batch import mix
from unlearn_gym.run.gradients import inner_product
from unlearn_gym.run.terms import unpack

COMBINED = {"forget_grad_rule": "loss", "grad_norms": "every:3"}


def plain_update(model, optimizer, run, generator, lambda_, settings):
    """The SISS update as a plain training loop writes it, for comparison."""
    b = run.draw(generator)
    x_t, k = siss.sample_mixture(b.retain, b.forget, b.noise, b.timesteps, b.uniforms, run.alphas_cumprod, lambda_)
    labels = None if b.retain_labels is None else siss.mixture_labels(k, b.retain_labels, b.forget_labels)
    pred = model(x_t, b.timesteps, None if labels is None else labels.drawn)
    *_, w_r, w_f = siss.mixture_targets(
        x_t, b.retain, b.forget, b.timesteps, run.alphas_cumprod, lambda_, labels=labels
    )
    a = run.alphas_cumprod[b.timesteps].view(-1, *(1,) * (x_t.dim() - 1))
    eps = [(x_t - a.sqrt() * x) / (1 - a).sqrt() for x in (b.retain, b.forget)]
    errors = [(pred - e).square().flatten(1).mean(1) for e in eps]
    num_retain = run.data.retain_size or len(run.data.retain)
    c_r, c_f = dataset_factors(settings.dataset_factors, num_retain, len(run.data.forget))
    loss_r, loss_f = c_r * (w_r * errors[0]).mean(), c_f * (w_f * errors[1]).mean()
    parameters = list(model.parameters())
    g_r = torch.autograd.grad(loss_r, parameters, retain_graph=True)
    g_f = torch.autograd.grad(loss_f, parameters)
    norm_r, norm_f = (torch.sqrt(sum(g.square().sum() for g in gs)) for gs in (g_r, g_f))
    scale = settings.forget_scale
    if settings.forget_grad_rule != "loss":
        scale = settings.forget_grad_norm * (norm_r if settings.forget_grad_rule == "relative_norm" else 1.0) / norm_f
        scale = scale * (w_f.max() > 1e-3)
    for p, r, f in zip(parameters, g_r, g_f, strict=True):
        p.grad = r - scale * f
    if settings.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    optimizer.step()
    return loss_r, loss_f, norm_r, norm_f


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
@pytest.mark.parametrize("rule", ["loss", "fixed_norm", "relative_norm"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_update_equals_a_plain_training_loop(make_run, task, rule, clip):
    run = make_run(task, seed=3, forget_grad_rule=rule, max_grad_norm=clip, optimizer="sgd", learning_rate=0.01)
    model = copy.deepcopy(run.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(3)
    for lambda_ in (0.2, 0.5, 0.8):
        expected = plain_update(model, optimizer, run, generator, lambda_, run.settings)
        terms = run.update(lambda_)
        found = (terms.retain_loss, terms.forget_loss, terms.retain_grad_norm, terms.forget_grad_norm)
        np.testing.assert_allclose(found, [e.item() for e in expected], rtol=2e-3)
    for found, expected in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("lambda_", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_passes_without_the_samples_of_zero_weight_give_the_same_gradients(make_run, lambda_, batch_size):
    run, whole = (make_run("mnist-trousers", skip_zero_weights=s, batch_size=batch_size) for s in (True, False))
    for _ in range(2 if batch_size > 1 else 8):  # of one pair each, so that a side is now there and now left out
        found, expected = run.measure(lambda_), whole.measure(lambda_)
        for a, b in ((run.retain_grad, whole.retain_grad), (run.forget_grad, whole.forget_grad)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * max(b.abs().max().item(), 1e-8))
        np.testing.assert_allclose(found.second_moment, expected.second_moment, rtol=1e-4, atol=1e-12)


def test_most_weights_are_exactly_zero_where_labels_differ(make_run):
    run = make_run("mnist-trousers", batch_size=1024)
    draw = mix(run.draw(run.generator), run.alphas_cumprod, torch.tensor(0.5))
    rows = run._weighted_rows(draw.targets)
    assert rows is not None
    assert sum(len(r) for r in rows) < 1.2 * 1024
    assert make_run("mnist-trousers", skip_zero_weights=False)._weighted_rows(draw.targets) is None
    everything = draw.targets._replace(retain_weight=torch.ones(1024), forget_weight=torch.ones(1024))
    assert run._weighted_rows(everything) is None


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
def test_one_combined_backward_pass_makes_the_same_updates(make_run, task, clip):
    options = {"optimizer": "sgd", "learning_rate": 1e-3, "max_grad_norm": clip, "forget_scale": 30.0}
    run, exact = make_run(task, **options, **COMBINED), make_run(task, **options, forget_grad_rule="loss")
    for _ in range(7):
        found, expected = run.update(0.4), exact.update(0.4)
        np.testing.assert_allclose(found.update_norm, expected.update_norm, rtol=1e-3)
        np.testing.assert_allclose(found.siss_loss, expected.siss_loss, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(run.flat.vector, exact.flat.vector, rtol=1e-4, atol=1e-6)


def test_norms_between_measurements_are_the_last_ones_and_say_their_age(make_run):
    run, exact = make_run(**COMBINED), make_run(forget_grad_rule="loss")
    terms = [run.update(0.4) for _ in range(7)]
    assert [t.norms_age for t in terms] == [0, 1, 2, 0, 1, 2, 0]
    assert len({t.retain_grad_norm for t in terms}) == 3
    assert terms[1].forget_grad_norm == terms[0].forget_grad_norm != terms[3].forget_grad_norm
    assert run.measure(0.4).norms_age == 0
    assert run.update(0.4).retain_grad_norm == terms[-1].retain_grad_norm
    assert {exact.update(0.4).norms_age for _ in range(4)} == {0}


@pytest.mark.parametrize("value", ["every", "every:0", "every:x", "sometimes"])
def test_a_bad_grad_norms_is_named(make_run, value):
    with pytest.raises(SettingsError, match=f"grad_norms='{value}': must be 'exact' or 'every:k'"):
        make_run(grad_norms=value, forget_grad_rule="loss")


@pytest.mark.parametrize("rule", ["fixed_norm", "relative_norm"])
def test_a_rule_that_needs_norms_refuses_to_go_without(make_run, rule):
    with pytest.raises(SettingsError, match=f"forget_grad_rule='loss' only: '{rule}' needs both norms"):
        make_run(grad_norms="every:4", forget_grad_rule=rule)


class HostSynchronisations(TorchDispatchMode):
    """Counts the operations that make a host wait for its accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name.split("::")[1] in {
            "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2",
        }:  # fmt: skip
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"forget_grad_rule": "fixed_norm"}, COMBINED, {"max_grad_norm": None}])
def test_an_update_waits_for_the_device_only_once_at_its_end(make_run, options, monkeypatch):
    run = make_run(skip_zero_weights=False, **options)
    transfers = []
    monkeypatch.setattr("unlearn_gym.run.run.unpack", lambda *a: transfers.append(a) or unpack(*a))
    with HostSynchronisations() as mode:
        run.update(0.4)
        run.update(0.4)
    assert mode.found == []
    assert len(transfers) == 2
    with HostSynchronisations() as mode:
        make_run(skip_zero_weights=True).update(0.4)
    assert mode.found  # it does see what it is to see


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_flat_optimizer_equals_the_per_parameter_one(make_run, optimizer):
    run = make_run(optimizer=optimizer, learning_rate=1e-3, max_grad_norm=None, forget_grad_rule="loss")
    model = copy.deepcopy(run.model)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    twin = kind(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(5):
        run.update(0.5)
        views = run.flat.gradient_views(run.update_grad)
        for p, g in zip(model.parameters(), views, strict=True):
            p.grad = g.clone()
        twin.step()
    for found, expected in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
@pytest.mark.parametrize("options", [{}, COMBINED])
def test_restored_run_continues_bit_for_bit(make_run, task, options):
    run = make_run(task, **options)
    for _ in range(4):
        run.update(0.4)
    snapshot = run.snapshot()
    first = [run.update(0.6) for _ in range(3)] + [run.measure(0.5)]
    weights = run.flat.vector.detach().clone()
    run.restore(snapshot)
    second = [run.update(0.6) for _ in range(3)] + [run.measure(0.5)]
    assert torch.equal(weights, run.flat.vector)
    assert run.updates == 7
    for a, b in zip(first, second, strict=True):
        np.testing.assert_equal(a.as_dict(), b.as_dict())


@pytest.mark.parametrize("task", ["gaussians-2d", "sfd-mnist-digits"])
def test_whole_numbers_are_lambdas_too(make_run, task):
    runs = [make_run(task, batch_size=2) for _ in range(2)]
    assert [runs[0].update(x).siss_loss for x in (0, 1)] == [runs[1].update(x).siss_loss for x in (0.0, 1.0)]


def test_a_snapshot_of_another_optimizer_is_refused(make_run):
    with pytest.raises(RunError, match="with optimizer 'sgd', this one has 'adamw'"):
        make_run().restore(make_run(optimizer="sgd").snapshot())


def test_snapshot_restores_into_another_run(make_run):
    run, other = make_run(seed=0), make_run(seed=9)
    for _ in range(4):
        run.update(0.3)
    other.restore(run.snapshot())
    np.testing.assert_equal(run.update(0.7).as_dict(), other.update(0.7).as_dict())
    assert torch.equal(run.flat.vector, other.flat.vector)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
def test_a_copy_is_a_run_of_its_own_that_continues_alike(make_run, duplicate):
    run = make_run()
    run.update(0.5)
    twin = duplicate(run)
    before = run.flat.vector.detach().clone()
    terms = [twin.update(0.4) for _ in range(2)]
    assert torch.equal(before, run.flat.vector)
    np.testing.assert_equal([t.as_dict() for t in terms], [run.update(0.4).as_dict() for _ in range(2)])
    assert torch.equal(torch.cat([p.flatten() for p in twin.model.parameters()]), twin.flat.vector)


def test_buffers_are_part_of_a_snapshot(make_run):
    run = make_run()
    run.model.register_buffer("seen", torch.zeros(1))
    snapshot = run.snapshot()
    run.model.seen += 1
    run.restore(snapshot)
    assert run.model.seen == 0


def test_update_batches_do_not_depend_on_lambda_or_on_measurements(make_run):
    run, other = make_run(seed=5), make_run(seed=5)
    for _ in range(3):
        run.update(0.2)
        other.update(0.8)
        other.measure(0.5)
        other.measure_unweighted()
    a, b = run.draw(run.generator), other.draw(other.generator)
    assert torch.equal(a.retain, b.retain)
    assert torch.equal(a.noise, b.noise)
    assert torch.equal(a.timesteps, b.timesteps)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_the_two_streams_of_a_run_share_nothing_and_both_come_from_the_seed(make_run, seed):
    """A measurement must not tell of the next update's batch. (torch's CPU generator reads 32 bits of a seed.)"""
    run, twin, other = make_run(seed=seed), make_run(seed=seed), make_run(seed=seed ^ 1)
    streams = [[each.draw(each.generator) for _ in range(3)] for each in (run, twin, other)]
    measured = [[each.draw(each.measure_generator) for _ in range(3)] for each in (run, twin, other)]
    for batches in (streams, measured):
        for a, b in zip(batches[0], batches[1], strict=True):
            assert torch.equal(a.noise, b.noise)
    drawn = [batch.noise for batches in (streams[0], streams[2], measured[0], measured[2]) for batch in batches]
    rows = torch.cat([noise.flatten(1) for noise in drawn])
    assert len(rows.unique(dim=0)) == len(rows)


def test_measure_changes_nothing_but_its_own_stream(make_run):
    run, other = make_run(seed=5), make_run(seed=5)
    before = run.flat.vector.detach().clone()
    run.measure(0.5)
    assert torch.equal(before, run.flat.vector)
    np.testing.assert_equal(run.update(0.5).as_dict(), other.update(0.5).as_dict())


def test_nothing_touches_the_global_generator(make_run):
    torch.manual_seed(1)
    run = make_run()
    run.update(0.5)
    run.measure_unweighted()
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(1)))


def test_weighted_terms_are_unbiased_estimates_of_the_unweighted_ones(make_run):
    run = make_run(batch_size=4096)
    unweighted = np.mean([run.measure_unweighted()[:2] for _ in range(8)], axis=0)
    for lambda_ in (0.2, 0.8):
        terms = [run.measure(lambda_) for _ in range(8)]
        weighted = [np.mean([t.retain_loss for t in terms]), np.mean([t.forget_loss for t in terms])]
        np.testing.assert_allclose(weighted, unweighted, rtol=0.06)


def test_statistics_of_the_weights_are_within_their_ranges(make_run):
    run = make_run()
    for lambda_ in (0.1, 0.5, 0.9):
        terms = run.update(lambda_)
        assert 0 < terms.retain_weight_max <= 1 / (1 - lambda_) + 1e-3
        assert 0 <= terms.forget_weight_max <= 1 / lambda_ + 1e-2
        assert 0 <= terms.forget_ess <= 16 + 1e-3
        assert 1 - 1e-3 <= terms.retain_ess <= 16 + 1e-3
        assert 0 <= terms.negligible_fraction <= 1
        assert set(terms.lambda_gradients) == {"pathwise", "score_function", "kl_only", "variance"}


def test_dataset_factors_are_those_of_their_sources():
    assert dataset_factors("siss", 600, 60) == (660 / 600, 60 / 600)
    assert dataset_factors("inverse_size", 600, 60) == (660 / 600, 660 / 60)
    assert dataset_factors("none", 600, 60) == (1.0, 1.0)


def test_dataset_factors_of_shipped_data_are_those_of_the_data_that_was_learned(make_run):
    run = make_run("mnist-trousers")
    assert (run.retain_coef, run.forget_coef) == (60_674 / 60_000, 674 / 60_000)


def test_dataset_factors_of_a_part_are_those_of_the_whole_that_it_stands_for(make_run):
    part = make_run()
    data = dataclasses.replace(part.data, retain_size=600, forget_size=60)
    run = UnlearningRun(part.model, data, part.alphas_cumprod, part.settings.override(dataset_factors="siss"))
    assert (run.retain_coef, run.forget_coef) == (660 / 600, 60 / 600)
    run = UnlearningRun(part.model, part.data, part.alphas_cumprod, part.settings.override(dataset_factors="siss"))
    retain, forget = len(part.data.retain), len(part.data.forget)
    assert (run.retain_coef, run.forget_coef) == ((retain + forget) / retain, forget / retain)


@pytest.mark.parametrize("lambda_", [-0.1, 1.1, float("nan")])
def test_lambda_out_of_range_is_named_and_changes_nothing(make_run, lambda_):
    run = make_run()
    before = run.snapshot()
    with pytest.raises(RunError, match=r"lambda_=.* must lie in \[0, 1\]"):
        run.update(lambda_)
    assert torch.equal(before.generators[0], run.generator.get_state())
    assert torch.equal(before.vector, run.flat.vector)


def test_a_diverged_run_says_so_and_restores(make_run):
    run = make_run(optimizer="sgd", learning_rate=1e30, max_grad_norm=None)
    start = run.snapshot()
    while not run.update(0.5).diverged:
        assert run.updates < 20
    with pytest.raises(RunError, match="restore a snapshot"):
        run.update(0.5)
    run.restore(start)
    assert torch.isfinite(run.flat.vector).all()
    assert np.isfinite(run.measure(0.5).siss_loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1000, -1])
@pytest.mark.parametrize("options", [{}, COMBINED])
def test_one_parameter_that_is_not_finite_is_divergence_though_no_loss_shows_it(make_run, value, place, options):
    run = make_run(**options)
    run.update(0.5)
    step = run.optimizer.step

    def poisoned_step():
        step()
        run.flat.vector.data[place] = value

    run.optimizer.step = poisoned_step
    terms = run.update(0.5)
    assert np.isfinite([terms.siss_loss, terms.update_norm, *terms.second_moment.flatten()]).all()
    assert terms.diverged
    assert run.diverged


@pytest.mark.parametrize("task", ["gaussians-2d", "vae-mnist-trousers"])
def test_the_probe_losses_are_of_the_forget_set_and_of_heldout_retain_data_in_that_order(make_run, task):
    run = make_run(task, batch_size=2)
    data = run.data
    changed = {
        name: UnlearningRun(
            run.model, dataclasses.replace(data, **{name: torch.zeros_like(getattr(data, name))}), run.alphas_cumprod,
            run.settings,
        ).probe_losses()
        for name in ("retain", "forget", "heldout")
    }  # fmt: skip
    forget, retain = run.probe_losses()
    assert changed["retain"] == pytest.approx((forget, retain), rel=1e-5)
    assert changed["forget"] == (pytest.approx(changed["forget"][0]), pytest.approx(retain, rel=1e-5))
    assert changed["heldout"] == (pytest.approx(forget, rel=1e-5), pytest.approx(changed["heldout"][1]))
    assert abs(changed["forget"][0] / forget - 1) > 0.01
    assert abs(changed["heldout"][1] / retain - 1) > 0.01


@pytest.mark.parametrize("rule", ["fixed_norm", "relative_norm"])
def test_norm_rules_do_not_blow_up_a_batch_without_forget_data(make_run, rule):
    run = make_run("mnist-trousers", forget_grad_rule=rule, batch_size=4)
    terms = [run.measure(0.1) for _ in range(30)]
    silent = [t for t in terms if t.forget_weight_max < 1e-3]
    assert silent
    assert all(t.forget_multiplier == 0 for t in silent)
    assert all(t.forget_multiplier > 0 for t in terms if t not in silent)


@pytest.mark.parametrize("size", [1, 10_000, 5_000_000])
def test_norms_keep_their_digits_however_many_parameters_there_are(size):
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(size, generator=generator)
    b = a * (torch.rand(size, generator=generator) - 0.3)
    assert inner_product(a, a).item() == pytest.approx((a.double() @ a.double()).item(), rel=2e-6)
    assert inner_product(a, b).item() == pytest.approx((a.double() @ b.double()).item(), rel=2e-6)
    mapped = torch.vmap(inner_product)(torch.stack([a, b]), torch.stack([b, a]))
    torch.testing.assert_close(mapped, inner_product(a, b).expand(2), rtol=1e-5, atol=0)


def test_flat_parameters_are_views_in_both_layouts():
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    expected = conv.weight.detach().clone()
    flat = FlatParameters(conv)
    assert torch.equal(conv.weight, expected)
    with torch.no_grad():
        flat.vector.zero_()
    assert conv.weight.abs().sum() == 0
