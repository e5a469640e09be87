"""Laws of the metrics and of the statistics."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from unlearn_gym.errors import ResultsError, TaskError
from unlearn_gym.evaluation.metrics import EvaluationSettings, Evaluator, fid, kid, wilson_interval
from unlearn_gym.evaluation.statistics import bootstrap_mean, paired_difference
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


def test_bootstrap_interval_covers_at_about_its_rate():
    rng = np.random.default_rng(0)
    hits = sum(low <= 1.0 <= high for _, low, high in (bootstrap_mean(list(rng.normal(1, 1, 20))) for _ in range(200)))
    assert 0.86 <= hits / 200 <= 0.99


def test_bootstrap_of_one_value_or_none_invents_no_interval():
    assert bootstrap_mean([2.0]) == (2.0, 2.0, 2.0)
    assert np.isnan(bootstrap_mean([]).mean)


def test_paired_difference_uses_common_seeds_only():
    estimate = paired_difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.5, 3: 100.0})
    assert estimate.mean == pytest.approx(0.5)


def test_the_shipped_classifier_tells_trousers_from_digits():
    data = load_data(get_task("mnist-trousers"))
    _, forget = classify(to_model_range(data.forget))
    features, digits = classify(to_model_range(data.heldout[:2000]))
    assert features.shape == (2000, 64)
    assert (forget == TROUSERS).float().mean() > 0.95
    assert (digits == data.heldout_labels[:2000]).float().mean() > 0.98
    assert not torch.isin(digits, torch.tensor(GARMENTS)).any()
    assert torch.isin(forget, torch.tensor(GARMENTS)).float().mean() > 0.99


def test_reference_features_are_computed_once_per_content():
    calls = []

    def classify(samples):
        calls.append(len(samples))
        return samples, torch.zeros(len(samples), dtype=torch.int64)

    task = dataclasses.replace(get_task("gaussians-2d"), classify=classify)
    data = load_data(task)
    first = Evaluator(task, data).reference
    copied = dataclasses.replace(data, heldout=data.heldout.clone())
    assert Evaluator(task, copied).reference is first
    assert len(calls) == 1
    Evaluator(task, dataclasses.replace(data, heldout=data.heldout + 1))
    assert len(calls) == 2


def test_samples_do_not_depend_on_the_batches_that_they_are_drawn_in():
    task = get_task("gaussians-2d")
    data, model = load_data(task), task.pretrained_model()
    drawn = [
        Evaluator(task, data, EvaluationSettings(batch_size=size)).draw(model, None, 100, seed=3) for size in (100, 33)
    ]
    for a, b in zip(*drawn, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_task_without_a_classifier_has_losses_only():
    task = dataclasses.replace(get_task("gaussians-2d"), classify=None)
    evaluator = Evaluator(task, load_data(task))
    assert set(evaluator.evaluate(task.pretrained_model()).metrics) == {"forget_loss", "retain_loss"}
    with pytest.raises(TaskError, match="has no classifier"):
        evaluator.calibration()


def test_evaluation_is_deterministic_and_ranks_the_oracle_before_the_untouched_model():
    task = get_task("gaussians-2d")
    evaluator = Evaluator(task, load_data(task), EvaluationSettings(600, 600))
    untouched, again = (evaluator.evaluate(task.pretrained_model()).metrics for _ in range(2))
    oracle = evaluator.evaluate(task.oracle_model()).metrics
    assert untouched == again
    assert 0.08 < untouched["forget_rate"] < 0.17
    assert oracle["forget_rate"] < 0.01
    assert oracle["forget_loss"] > untouched["forget_loss"]
    assert oracle["kid"] < untouched["kid"]
