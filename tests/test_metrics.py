"""Laws of the metrics."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from unlearn_gym.comparison.results import load_results
from unlearn_gym.errors import ResultsError, TaskError
from unlearn_gym.math.diffusion import reconstruct
from unlearn_gym.math.statistics import wilson_interval
from unlearn_gym.metrics.catalogue import BY_NAME, MEASURED, METRICS
from unlearn_gym.metrics.evaluator import Evaluator, Figures
from unlearn_gym.metrics.forgetting import copy_threshold, membership_auc, nearest, reconstruction_distance
from unlearn_gym.metrics.inception import inception_features
from unlearn_gym.metrics.judge import EvaluationSettings, Judge, Judged, judged_reference
from unlearn_gym.metrics.probe import probe_grid
from unlearn_gym.metrics.quality import (
    class_score,
    class_shares,
    fid,
    kid,
    precision_recall,
    ssim,
    total_variation,
)
from unlearn_gym.models.classifier import GARMENTS, TROUSERS, classify
from unlearn_gym.tasks import get_task, load_data, to_model_range


def normal(n: int, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn((n, 4), generator=torch.Generator().manual_seed(seed)) + mean


def test_fid_of_a_set_with_itself_is_zero():
    assert fid(normal(500), normal(500)) == pytest.approx(0, abs=1e-6)


def test_fid_of_a_shift_is_its_squared_length():
    assert fid(normal(500), normal(500) + 0.5) == pytest.approx(4 * 0.25, rel=1e-6)


def test_kid_is_unbiased_around_zero_for_equal_distributions_and_grows_with_distance():
    values = [kid(normal(400, seed=2 * i), normal(400, seed=2 * i + 1)) for i in range(20)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert min(values) < 0
    assert kid(normal(400), normal(400, 0.5, seed=1)) > 10 * np.std(values)


@pytest.mark.parametrize("seed", [0, 3])
def test_kid_is_torch_fidelitys(seed):
    samples, reference = 2 * normal(300), normal(250, 0.3, seed=1)
    expected = kid_features_to_metric(
        samples.double(), reference.double(), kid_subsets=50, kid_subset_size=200, rng_seed=seed, verbose=False
    )
    assert kid(samples, reference, seed=seed) == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)


@pytest.mark.parametrize(("metric", "n", "match"), [(fid, 4, "more than 4 samples"), (kid, 150, "not 150")])
def test_too_few_samples_are_refused(metric, n, match):
    with pytest.raises(ResultsError, match=match):
        metric(normal(n), normal(500))


def test_wilson_interval_against_its_closed_form():
    n, p, z = 500, 0.01, 1.959964
    center, half = (p + z * z / 2 / n), z * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    expected = ((center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n))
    assert wilson_interval(5, 500) == pytest.approx(expected, rel=1e-4)
    assert wilson_interval(0, 500)[1] > 0


def test_class_score_is_one_for_certain_equal_classes_and_the_number_of_classes_for_all_of_them():
    certain = 50.0 * torch.eye(5).repeat(200, 1)
    assert class_score(certain) == pytest.approx(5, rel=0.05)
    assert class_score(certain[:1].repeat(100, 1)) == pytest.approx(1)
    assert class_score(torch.zeros(100, 5)) == pytest.approx(1)


def test_fid_of_one_feature_is_that_of_two_normals_of_the_line():
    a, b = normal(500)[:, :1], 3 * normal(500, seed=1)[:, :1] + 2
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert fid(a, b) == pytest.approx(expected.item(), rel=1e-5)
    assert np.isfinite([kid(a, b), *precision_recall(a, b)]).all()


@pytest.mark.parametrize("size", [1e4, 1e30, np.inf])
def test_class_score_does_not_depend_on_how_certain_a_certain_classifier_is(size):
    certain = torch.full((100, 5), -size)
    certain[:, 0] = 0
    assert class_score(certain) == pytest.approx(1)
    certain = torch.where(torch.eye(5, dtype=torch.bool).repeat(20, 1), 0.0, -size)
    assert class_score(certain) == pytest.approx(class_score(certain.clamp(min=-50)), rel=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("metric", [fid, kid, precision_recall, lambda x, _: class_score(x)])
def test_features_that_are_not_finite_are_refused_in_one_line(metric, value):
    broken = normal(500)
    broken[3, 1] = value
    with pytest.raises(ResultsError, match="are not finite"):
        metric(broken, normal(500))


@pytest.mark.parametrize("metric", [fid, kid, precision_recall])
@pytest.mark.parametrize("other", [normal(500)[:, :3], normal(500)[:, :0], normal(500)[:, 0]])
def test_features_of_other_widths_are_refused_in_one_line(metric, other):
    with pytest.raises(ResultsError, match=r"must be \(N, F\) and \(M, F\)"):
        metric(other, normal(500))


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    reference = torch.cat([normal(300), normal(300, 50.0)])
    assert precision_recall(normal(600, seed=1), reference)[0] > 0.9  # every sample lies in one half of the reference
    assert precision_recall(normal(600, seed=1), reference)[1] < 0.6
    both = torch.cat([normal(300, seed=2), normal(300, 50.0, seed=3), normal(300, -50.0, seed=4)])
    precision, recall = precision_recall(both, reference)
    assert precision < 0.8 < recall
    assert precision_recall(reference, reference) == (1.0, 1.0)


def test_total_variation_is_a_distance_in_0_1():
    a, b = (class_shares(torch.tensor(c), 3) for c in ([0, 0, 1, 1], [2, 2, 2, 2]))
    assert (total_variation(a, a), total_variation(a, b), total_variation(b, a)) == (0.0, 1.0, 1.0)
    assert total_variation(a, class_shares(torch.tensor([0, 0, 0, 1]), 3)) == pytest.approx(0.25)


def test_ssim_of_an_image_with_itself_is_one_and_with_noise_small():
    images = to_model_range(load_data(get_task("mnist-trousers")).forget[:8])
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(ssim(images, images), torch.ones(8))
    assert ssim(images, noise).abs().max() < 0.3


def test_auc_of_identical_sets_is_one_half_and_follows_the_order():
    losses = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert membership_auc(losses, losses) == pytest.approx(0.5)
    assert membership_auc(losses, losses + 2) == 1.0  # members with low losses are found out
    assert membership_auc(losses + 2, losses) == 0.0
    others = torch.rand(70, generator=torch.Generator().manual_seed(1))
    assert membership_auc(losses, others) + membership_auc(others, losses) == pytest.approx(1)


def test_copies_are_found_and_retain_data_is_not_called_copies():
    data = load_data(get_task("mnist-trousers"))
    forget, retain = to_model_range(data.forget[:100]), to_model_range(data.heldout[:2000])
    threshold = copy_threshold(retain, forget)
    close = nearest(forget + 0.01, forget)
    assert (close.distance < threshold).all()
    assert torch.equal(close.place, torch.arange(100))
    others = to_model_range(data.heldout[2000:8000])  # not those that the threshold comes from
    assert (nearest(others, forget).distance < threshold).float().mean() <= 0.004


def test_nearest_measures_pixels_in_the_unit_range():
    black, white = -torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert nearest(white, black).distance.item() == pytest.approx(4.0)  # the norm of 16 ones


def test_a_copy_is_at_distance_zero_and_a_near_copy_at_its_own():
    others = torch.rand(300, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    found = nearest(others, others)
    assert not found.distance.any()
    shifted = others.clone()
    shifted[:, 0, 0, 0] += 0.01  # 0.005 in [0, 1]
    torch.testing.assert_close(nearest(shifted, others).distance, torch.full((300,), 0.005), rtol=1e-4, atol=0)
    assert torch.equal(found.place, torch.arange(300))


def test_a_model_reconstructs_what_it_remembers():
    """The T-shirt is memorised by the pretrained model and unknown to the oracle."""
    task = get_task("mnist-tshirt")
    x, alphas_cumprod = to_model_range(load_data(task).forget[:4]), task.schedule.alphas_cumprod()
    distances = [
        reconstruction_distance(x, reconstruct(model.eval(), x, alphas_cumprod, labels=None, clip=1.0, seed=0))
        for model in (task.pretrained_model(), task.oracle_model())
    ]
    assert distances[0] < 2.0 < 3.0 < distances[1]
    assert reconstruction_distance(x, x) == 0.0


def test_a_metric_that_fails_is_absent_with_its_reason_and_stops_no_other():
    figures = Figures()
    with figures.trying("a"):
        raise ResultsError("too few")
    figures.add("b", 1.0)
    figures.add("c", float("nan"))
    assert (figures.values, figures.absent) == ({"b": 1.0}, {"a": "too few", "c": "not finite"})
    with figures.trying("b", "c", "d"):
        raise IndexError("tensors used as indices\nmust be long")
    assert figures.absent["d"] == "IndexError: tensors used as indices"
    assert (figures.values, figures.absent["c"]) == ({"b": 1.0}, "not finite")


class Broken(torch.nn.Module):
    """A network whose losses are finite, and whose samples are not: it fails at the first timestep of the way back."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x_t, timesteps, labels=None):
        out = self.model(x_t, timesteps, labels)
        return torch.where((timesteps == 199)[:, None], torch.nan, out)


def test_samples_that_are_not_finite_are_no_forgetting():
    task = get_task("gaussians-2d")
    result = Evaluator(task, load_data(task), EvaluationSettings(200, 200)).evaluate(Broken(task.pretrained_model()))
    assert "forget_loss" in result.metrics
    assert not result.finite
    assert result.absent["forget_rate"] == result.absent["feature_kid"] == "the samples are not finite"


def one_feature(samples):
    return samples[:, :1], samples.new_zeros(len(samples), 3)


def broken_features(samples):
    features, logits = get_task("gaussians-2d").classify(samples)
    return features * torch.nan, logits


def broken_logits(samples):
    features, logits = get_task("gaussians-2d").classify(samples)
    return features, logits.where(torch.arange(len(logits))[:, None] > 0, torch.nan)


def no_classifier_at_all(samples):
    raise KeyError("weights of the user's own")


BY_FEATURES = {"feature_fid", "feature_kid", "oracle_fid", "oracle_kid", "precision", "recall"}
BY_CLASSES = {"forget_rate", "class_imbalance", "class_score"}


@pytest.mark.parametrize(
    ("classify", "absent", "reason"),
    [
        (one_feature, set(), None),
        (broken_features, BY_FEATURES, "the features are not finite"),
        (broken_logits, BY_CLASSES, "not (numbers|finite)"),
        (no_classifier_at_all, BY_FEATURES | BY_CLASSES | {"copy_rate", "copy_distance"}, "KeyError: .*user's own"),
    ],
)
def test_a_classifier_that_fails_takes_only_its_own_metrics_with_it(classify, absent, reason):
    task = dataclasses.replace(get_task("gaussians-2d"), classify=classify)
    result = Evaluator(task, load_data(task), EvaluationSettings(200, 200)).evaluate(task.pretrained_model())
    own = BY_FEATURES | BY_CLASSES | {"copy_rate", "copy_distance"}
    assert own - set(result.metrics) == absent
    assert all(re.search(reason, result.absent[name]) for name in absent)
    assert {"forget_loss", "membership_auc", "reconstruction_distance", "oracle_error"} <= set(result.metrics)
    assert result.finite
    assert set(result.metrics) | set(result.absent) == set(MEASURED)
    assert not set(result.metrics) & set(result.absent)


class WholeTimesteps(torch.nn.Module):
    """A network of someone's own that looks its timesteps up in a table."""

    def __init__(self, model):
        super().__init__()
        self.model, self.table = model, torch.nn.Embedding.from_pretrained(torch.arange(200.0)[:, None])

    def forward(self, x_t, timesteps, labels=None):
        return self.model(x_t, self.table(timesteps)[:, 0], labels)


def test_a_network_of_whole_timesteps_has_nearly_the_likelihood_of_the_one_that_it_wraps():
    task = dataclasses.replace(get_task("gaussians-2d"), classify=None)
    evaluator = Evaluator(task, load_data(task), EvaluationSettings(num_likelihood_samples=4))
    plain, wrapped = (
        evaluator.evaluate(m).metrics for m in (task.pretrained_model(), WholeTimesteps(task.pretrained_model()))
    )
    for name in ("nll_ode_forget", "nll_ode_retain"):
        assert wrapped[name] == pytest.approx(plain[name], abs=0.02)
        assert wrapped[name] != plain[name]


def test_a_damaged_oracle_and_a_broken_optimum_take_nothing_with_them(tmp_path):
    (tmp_path / "oracle.safetensors").write_bytes(b"damaged")
    task = dataclasses.replace(get_task("gaussians-2d"), oracle_assets=tmp_path, optimum=lambda x, a: x @ x)
    result = Evaluator(task, load_data(task), EvaluationSettings(200, 200)).evaluate(
        get_task("gaussians-2d").pretrained_model()
    )
    assert all(
        "not a readable safetensors file" in result.absent[n] for n in ("oracle_error", "oracle_fid", "oracle_kid")
    )
    assert {"optimum_error", "oracle_error", "oracle_fid", "oracle_kid"}.isdisjoint(result.metrics)
    assert BY_CLASSES | {"feature_kid", "copy_rate"} <= set(result.metrics)


def test_every_metric_has_a_value_or_a_reason():
    for name in ("gaussians-2d", "gaussians-2d:2,5"):
        task = get_task(name)
        for chosen in (task, dataclasses.replace(task, classify=None)):
            result = Evaluator(chosen, load_data(chosen), EvaluationSettings(200, 200)).evaluate(
                task.pretrained_model()
            )
            assert set(result.metrics) | set(result.absent) == set(MEASURED)
            assert not set(result.metrics) & set(result.absent)


def test_few_heldout_samples_leave_metrics_out_and_stop_nothing():
    task = get_task("gaussians-2d")
    data = dataclasses.replace(load_data(task), heldout=load_data(task).heldout[:4])
    result = Evaluator(task, data, EvaluationSettings(200, 200)).evaluate(task.pretrained_model())
    assert "precision and recall need at least 5 samples" in result.absent["precision"]
    assert "forget_rate" in result.metrics


def test_missing_torchmetrics_leaves_ssim_out_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    figures = Figures()
    with figures.trying("ssim_copy"):
        ssim(torch.zeros(1, 1, 28, 28), torch.zeros(1, 1, 28, 28))
    assert "pip install 'unlearn_gym[metrics]'" in figures.absent["ssim_copy"]


def test_inception_weights_that_are_not_the_published_file_are_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"pickle of unknown origin")
    for path in (tmp_path / "weights.pth", tmp_path / "missing.pth"):
        with pytest.raises(ResultsError, match="is not torch-fidelity's weights-inception"):
            inception_features(torch.zeros(1, 1, 28, 28), path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (EvaluationSettings(num_forget_samples=0), "num_forget_samples=0"),
        (EvaluationSettings(num_quality_samples=100), "too few for KID; take at least 200"),
        (EvaluationSettings(num_likelihood_samples=-1), "num_likelihood_samples=-1"),
    ],
)
def test_sizes_from_which_nothing_follows_are_refused(settings, match):
    with pytest.raises(ResultsError, match=match):
        settings.validate()


def test_the_shipped_classifier_tells_trousers_from_digits():
    data = load_data(get_task("mnist-trousers"))
    forget = classify(to_model_range(data.forget))[1].argmax(1)
    features, logits = classify(to_model_range(data.heldout[:2000]))
    digits = logits.argmax(1)
    assert (features.shape, logits.shape) == ((2000, 64), (2000, 20))
    assert (forget == TROUSERS).float().mean() > 0.95
    assert (digits == data.heldout_labels[:2000]).float().mean() > 0.98
    assert not torch.isin(digits, torch.tensor(GARMENTS)).any()
    assert torch.isin(forget, torch.tensor(GARMENTS)).float().mean() > 0.99


def test_reference_features_are_computed_once_per_content():
    calls = []

    def classify(samples):
        calls.append(len(samples))
        return samples, torch.zeros(len(samples), 3)

    task = dataclasses.replace(get_task("gaussians-2d"), classify=classify)
    data = load_data(task)
    first = judged_reference(task, data)
    assert judged_reference(task, dataclasses.replace(data, heldout=data.heldout.clone())) is first
    assert len(calls) == 1
    judged_reference(task, dataclasses.replace(data, heldout=data.heldout + 1))
    assert len(calls) == 2
    another = dataclasses.replace(task, classify=lambda samples: (2 * samples, torch.ones(len(samples), 3)))
    assert (judged_reference(another, data).logits == 1).all()


def test_samples_do_not_depend_on_the_batches_that_they_are_drawn_in():
    task = get_task("gaussians-2d")
    data, model = load_data(task), task.pretrained_model()
    drawn = [
        Judge(task, data, EvaluationSettings(batch_size=size)).draw(model, None, 100, seed=3) for size in (100, 33)
    ]
    for a, b in zip(*drawn, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_task_without_a_classifier_has_the_metrics_of_its_predictions():
    task = dataclasses.replace(get_task("gaussians-2d"), classify=None)
    evaluator = Evaluator(task, load_data(task))
    result = evaluator.evaluate(task.pretrained_model())
    assert {"forget_loss", "retain_loss", "membership_auc", "optimum_error", "oracle_error"} <= set(result.metrics)
    assert "forget_rate" not in result.metrics
    assert result.absent["feature_kid"] == "the task has no classifier"
    with pytest.raises(TaskError, match="has no classifier"):
        evaluator.judge.calibration()


def test_evaluation_is_deterministic_and_ranks_the_oracle_before_the_untouched_model():
    task = get_task("gaussians-2d")
    evaluator = Evaluator(task, load_data(task), EvaluationSettings(600, 600))
    untouched, again = (evaluator.evaluate(task.pretrained_model()) for _ in range(2))
    assert untouched.metrics == again.metrics
    before, oracle = untouched.metrics, evaluator.evaluate(task.oracle_model()).metrics
    assert 0.08 < before["forget_rate"] < 0.17
    assert oracle["forget_rate"] < 0.01
    assert oracle["forget_loss"] > before["forget_loss"]
    for lower in ("feature_kid", "oracle_kid", "oracle_error", "optimum_error", "class_imbalance", "copy_rate"):
        assert oracle[lower] < before[lower], lower
    assert oracle["oracle_error"] == 0.0
    assert np.mean(untouched.profile) == pytest.approx(before["forget_loss"], rel=1e-5)


def test_the_oracle_and_the_models_and_both_sets_of_samples_come_from_noises_of_their_own():
    """Else the oracle's own row would show no distance at all, and a model near it less than that of two draws."""
    task = get_task("gaussians-2d")
    evaluator = Evaluator(task, load_data(task), EvaluationSettings(200, 200))
    oracle = task.oracle_model()
    result = evaluator.evaluate(oracle)
    sets = [evaluator.oracle_samples.samples, result.forget_samples, result.quality_samples]
    everything = torch.cat([samples[:200] for samples in sets])
    assert len(everything.unique(dim=0)) == len(everything) == 600
    assert result.metrics["oracle_fid"] > 1e-4
    assert result.metrics["oracle_kid"] != 0.0


def test_losses_errors_and_the_attack_are_those_of_their_own_sets():
    task = get_task("gaussians-2d")
    data = load_data(task)
    stranger = dataclasses.replace(data, unseen=3 * data.unseen)  # which no model of the ring has learned
    evaluator = Evaluator(task, stranger, EvaluationSettings(200, 200))
    model = task.pretrained_model()
    result = evaluator.evaluate(model)
    assert result.metrics["membership_auc"] > 0.95
    grid = probe_grid(model, data.forget, None, evaluator.alphas_cumprod, seed=7)
    np.testing.assert_allclose(result.profile, grid.mean(1), rtol=1e-5)
    assert len(result.profile) == 10
    errors = [
        probe_grid(
            model, samples, None, evaluator.alphas_cumprod, seed=7, num_samples=100, target=task.oracle_model()
        ).mean().item()
        for samples in (data.forget, data.heldout)
    ]  # fmt: skip
    assert errors[0] != pytest.approx(errors[1], rel=0.1)
    assert result.metrics["oracle_error"] == pytest.approx(np.mean(errors), rel=1e-4)


def test_the_distance_to_the_nearest_copy_is_a_median():
    task = get_task("gaussians-2d")
    evaluator, figures = Evaluator(task, load_data(task)), Figures()
    samples = torch.cat([evaluator.judge.forget[:9], torch.full((1, 2), 1e4)])
    evaluator._forgetting(Judged(samples, *task.classifier(samples)), figures)
    assert figures.values["copy_distance"] < 1e-3
    assert figures.values["copy_rate"] == pytest.approx(0.9)


def test_copies_are_judged_against_retain_data_under_the_labels_of_the_forget_data():
    task = get_task("mnist-trousers")
    data = load_data(task)
    few = {name: getattr(data, name)[:400] for name in ("heldout", "heldout_labels", "forget", "forget_labels")}
    judge = Judge(task, dataclasses.replace(data, unseen=None, **few))
    alike = few["heldout_labels"] == 1
    assert 0 < alike.sum() < 400
    assert judge.calibration()["num_retain"] == alike.sum()
    assert judge.copy_threshold == copy_threshold(to_model_range(few["heldout"][alike]), judge.forget)


def test_a_pixel_beyond_the_range_counts_as_the_nearest_within():
    images = to_model_range(load_data(get_task("mnist-trousers")).forget[:4])
    beyond = torch.where(images > 0.99, 7.0, torch.where(images < -0.99, -5.0, images))
    assert (beyond != images).any()
    within = beyond.clamp(-1, 1)
    assert torch.equal(nearest(beyond, images).distance, nearest(within, images).distance)
    assert torch.equal(ssim(beyond, images), ssim(within, images))


def test_the_closed_form_optimum_has_no_error_and_no_model_a_lower_loss():
    """The optimum of the retain-only mixture predicts noise at least as well as anything, its own oracle included."""
    task = get_task("gaussians-2d:0,4")
    evaluator = Evaluator(task, load_data(task), EvaluationSettings(250, 250))

    class Optimum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x_t, timesteps, labels=None):
            return task.optimum(x_t, evaluator.alphas_cumprod[timesteps])

    optimum, pretrained = (evaluator.evaluate(m).metrics for m in (Optimum(), task.pretrained_model()))
    assert optimum["optimum_error"] == 0.0
    assert optimum["retain_loss"] < pretrained["retain_loss"]
    assert optimum["forget_rate"] == 0.0
    assert pretrained["forget_rate"] == pytest.approx(2 / 8, abs=0.08)
    assert optimum["class_imbalance"] < 0.12 < pretrained["class_imbalance"]


@pytest.mark.parametrize(
    ("name", "absent"), [("gaussians-2d", "nll_elbo_forget"), ("vae-mnist-trousers", "optimum_error")]
)
def test_the_catalogue_explains_every_metric_that_an_evaluation_gives(name, absent):
    task = get_task(name)
    settings, data = EvaluationSettings(8, 200, num_inference_steps=2, num_likelihood_samples=1), load_data(task)
    labels = None if data.heldout_labels is None else data.heldout_labels[:300]
    few = dataclasses.replace(data, heldout=data.heldout[:300], heldout_labels=labels)
    result = Evaluator(task, few, settings).evaluate(task.pretrained_model())
    assert set(result.metrics) | set(result.absent) == set(MEASURED)
    assert result.absent[absent] == "not for this kind of task"
    assert set(BY_NAME) - set(MEASURED) == {"score", "mean_lambda", "episode_return"}
    assert all(m.meaning and m.range and m.cost and m.source for m in METRICS)


COMMITTED = Path(__file__).resolve().parent.parent / "docs" / "experiments"
OTHERS = ("rl-against-vi/mnist-trousers", "likelihood/mnist-trousers", "objectives/vae-siss", "objectives/sfd")


def bounds(text: str, task: str, policy: str, settings: dict[str, float]) -> tuple[float, float]:
    """The numbers that a stated range means for the metric of one policy of a task."""
    shape, classes = (2, 8) if task.startswith("gaussians-2d") else (784, 20)
    usual, _, other = text.partition("; ")
    for whose, applies in (("of points ", shape == 2), ("of `finetune` ", policy == "finetune")):
        if other.startswith(whose) and applies:
            usual = other.removeprefix(whose)
    if usual == "any":
        return -math.inf, math.inf
    named = {"√D": math.sqrt(shape), "C": classes, "λ_min": settings["lambda_min"], "λ_max": settings["lambda_max"]}
    numbers = [float(named.get(word, word)) for word in usual.replace(" to ", " ").split() if word not in "≥≤"]
    return {"≥": (numbers[0], math.inf), "≤": (-math.inf, numbers[0])}.get(usual[0], (numbers[0], numbers[-1]))


@pytest.mark.parametrize(
    "folder",
    [*sorted(p.parent for p in COMMITTED.glob("*/gaussians-2d*/results.json")), *(COMMITTED / name for name in OTHERS)],
    ids=lambda p: f"{p.parent.name}-{p.name}",
)
def test_every_committed_figure_lies_in_its_stated_range(folder):
    found = load_results(folder)
    rounding = 1e-6
    outside = []
    for policy in found.policies:
        for metric in METRICS:
            low, high = bounds(metric.range, found.task, policy, found.settings)
            values = found.values(policy, metric.name).values()
            outside += [(policy, metric.name, v) for v in values if not low - rounding <= v <= high + rounding]
    assert outside == []


def test_every_stated_range_says_numbers():
    settings = {"lambda_min": 0.1, "lambda_max": 0.9}
    for metric in METRICS:
        for task in ("gaussians-2d", "mnist-trousers"):
            low, high = bounds(metric.range, task, "static:0.5", settings)
            assert low < high, metric
