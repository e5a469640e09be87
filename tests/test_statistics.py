"""Laws of the estimates over seeds, of the tests and of the comparison at matched forgetting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from unlearn_gym.comparison.matched import first_crossing, matched_levels
from unlearn_gym.errors import ResultsError
from unlearn_gym.math import statistics
from unlearn_gym.math.statistics import (
    bootstrap_iqm,
    bootstrap_mean,
    holm,
    paired_difference,
    paired_p_value,
    probability_of_improvement,
    spearman,
)


def normal(n: int, seed: int, mean: float = 0.0) -> list[float]:
    return list(np.random.default_rng(seed).normal(mean, 1, n))


def by_seed(values) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.mark.parametrize("estimator", [bootstrap_mean, bootstrap_iqm])
def test_intervals_of_the_mean_and_of_the_iqm_cover_at_about_their_rate(estimator):
    hits = sum(low <= 1.0 <= high for _, low, high in (estimator(normal(20, seed, mean=1)) for seed in range(400)))
    assert 0.88 <= hits / 400 <= 0.97


@pytest.mark.parametrize(("estimator", "cut"), [(bootstrap_mean, 0.0), (bootstrap_iqm, 0.25)])
def test_intervals_are_percentiles_over_resampled_lists(estimator, cut):
    values = normal(10, 0)
    resampled = stats.trim_mean(np.random.default_rng(1).choice(values, (50_000, 10)), cut, axis=1)
    assert estimator(values)[1:] == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])), abs=0.04)


@pytest.mark.parametrize("n", range(1, 14))
def test_iqm_is_the_trimmed_mean_of_scipy(n):
    assert bootstrap_iqm(normal(n, n)).mean == pytest.approx(stats.trim_mean(normal(n, n), 0.25))


def test_iqm_of_symmetric_data_is_its_mean_and_one_outlier_does_not_move_it():
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert bootstrap_iqm(values).mean == bootstrap_mean(values).mean == 5.0
    assert bootstrap_iqm([*values[:-1], 1e6]).mean == bootstrap_iqm([*values[:-1], np.inf]).mean == 5.0
    assert bootstrap_mean([*values[:-1], 1e6]).mean > 1e5


@pytest.mark.parametrize("estimator", [bootstrap_mean, bootstrap_iqm])
def test_intervals_come_from_the_seed_and_hold_their_estimate(estimator):
    values = normal(10, 0)
    estimate, low, high = estimator(values)
    statistics._draws.cache_clear()
    assert estimator(values) == (estimate, low, high) != estimator(values, seed=1)
    assert low < estimate < high


@pytest.mark.parametrize("estimator", [bootstrap_mean, bootstrap_iqm])
def test_bootstrap_of_one_value_or_none_invents_no_interval(estimator):
    assert estimator([2.0]) == estimator([2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert np.isnan(estimator([])).all()
    assert np.isnan(estimator([1.0, 2.0, 3.0, 4.0, np.nan])).all()


def test_paired_difference_uses_common_seeds_only():
    estimate = paired_difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.5, 3: 100.0})
    assert estimate == pytest.approx((0.5, 0.5, 0.5))


def test_probability_of_improvement_is_mann_whitneys_u_over_all_pairs():
    x, y = [1.0, 3.0, 3.0, 8.0, 2.0], [2.0, 3.0, 1.0, 1.0, 4.0]
    estimate = probability_of_improvement(by_seed(x), by_seed(y), higher_is_better=True)
    assert estimate.mean == stats.mannwhitneyu(x, y).statistic / 25
    assert estimate.low < estimate.mean < estimate.high


def test_probability_of_improvement_over_itself_is_a_half_and_over_a_worse_list_one():
    x = by_seed(normal(10, 0))
    shifted = {seed: value + 10 for seed, value in x.items()}
    assert probability_of_improvement(x, x, higher_is_better=True) == (0.5, 0.5, 0.5)
    assert probability_of_improvement(shifted, x, higher_is_better=True) == (1.0, 1.0, 1.0)
    assert probability_of_improvement(shifted, x, higher_is_better=False) == (0.0, 0.0, 0.0)


def test_probabilities_of_improvement_of_two_lists_on_each_other_add_up_to_one():
    x, y = ({seed: round(value) for seed, value in enumerate(normal(10, k))} for k in (0, 1))
    there = probability_of_improvement(x, y, higher_is_better=True)
    assert there.mean + probability_of_improvement(y, x, higher_is_better=True).mean == pytest.approx(1)
    assert there == pytest.approx(probability_of_improvement(y, x, higher_is_better=False))


def test_probability_of_improvement_resamples_common_seeds_jointly():
    rng = np.random.default_rng(0)
    batches = rng.normal(0, 1, 20)
    x, y, unpaired = by_seed(batches + 0.3), by_seed(batches), by_seed(rng.permutation(batches))
    paired, crossed = (probability_of_improvement(x, side, higher_is_better=True) for side in (y, unpaired))
    assert paired.mean == crossed.mean
    assert paired.high - paired.low < 0.5 * (crossed.high - crossed.low)
    assert probability_of_improvement({**x, 99: -100.0}, {**y, 98: 100.0}, higher_is_better=True) == paired
    assert np.isnan(probability_of_improvement({0: 1.0}, {1: 1.0}, higher_is_better=True)).all()


def test_an_infinite_value_counts_as_the_worst():
    x, y = by_seed([1.0, 2.0, np.inf]), by_seed([3.0, 4.0, np.inf])
    assert probability_of_improvement(x, y, higher_is_better=False).mean == pytest.approx(6.5 / 9)


def test_signed_rank_p_values_counted_by_hand():
    zero = dict.fromkeys(range(6), 0.0)
    assert paired_p_value(by_seed([1.0, 2.0, 3.0, 4.0, 5.0]), zero) == 2 / 2**5
    # Sums of {1, 2, 3, 4, 5} up to 3: {}, 1, 2, 3, 1 + 2.
    assert paired_p_value(by_seed([1.0, 2.0, -3.0, 4.0, 5.0][::-1]), zero) == 2 * 5 / 2**5
    # 0 is dropped, ties share the rank 2.5: sums of {1, 2.5, 2.5, 4, 5} up to 4.
    assert paired_p_value(by_seed([-3.0, 2.0, 2.0, 1.0, 4.0, 0.0]), zero) == 2 * 7 / 2**5


@pytest.mark.parametrize("seed", range(4))
def test_signed_rank_p_values_are_those_of_scipy(seed):
    x, y = normal(12, seed, 0.4), normal(12, seed + 100)
    assert paired_p_value(by_seed(x), by_seed(y)) == pytest.approx(stats.wilcoxon(x, y).pvalue)


def test_tied_signed_rank_p_values_are_those_of_all_signs():
    differences = np.array([1.0, -1.0, 2.0, 2.0, 2.0, -3.0, 5.0, 5.0, 6.0])
    ranks = stats.rankdata(np.abs(differences))
    sums = np.array([ranks[np.array(signs)].sum() for signs in itertools.product([True, False], repeat=9)])
    positive = ranks[differences > 0].sum()
    expected = 2 * min((sums <= positive).mean(), (sums >= positive).mean())
    assert paired_p_value(by_seed(differences), by_seed([0.0] * 9)) == pytest.approx(expected)


def test_p_values_do_not_depend_on_order_side_scale_or_other_seeds():
    x, y = by_seed(normal(10, 0, 0.5)), by_seed(normal(10, 1))
    p = paired_p_value(x, y)
    assert paired_p_value(y, x) == paired_p_value(dict(reversed(x.items())), {**y, 77: 5.0}) == p
    assert paired_p_value({s: 1e-9 * v for s, v in x.items()}, {s: 1e-9 * v for s, v in y.items()}) == p


def test_equal_differences_of_shares_are_ties_whatever_their_last_bits():
    x, y = [0.3, 0.2, 0.7, 0.1, 0.8, 0.5], [0.1, 0.4, 0.5, 0.3, 0.6, 0.3]  # ±0.2, four of six positive
    assert len({abs(a - b) for a, b in zip(x, y, strict=True)}) > 1
    assert paired_p_value(by_seed(x), by_seed(y)) == 2 * (1 + 6 + 15) / 2**6


def test_no_p_value_of_too_few_pairs_or_of_what_is_not_finite_and_one_of_equal_runs():
    x = by_seed(normal(5, 0))
    assert paired_p_value(x, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}) is None
    assert paired_p_value(x, {**x, 0: np.nan}) is None
    assert paired_p_value({**x, 0: np.inf}, {**x, 0: np.inf}) is None
    assert paired_p_value(x, x) == 1.0


def test_holm_by_hand():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({}) == {}


def test_holm_is_monotone_never_below_the_raw_values_and_bonferroni_for_the_smallest():
    rng = np.random.default_rng(0)
    for _ in range(20):
        raw = {str(i): p for i, p in enumerate(rng.uniform(0, 0.4, 7))}
        adjusted, order = holm(raw), sorted(raw, key=raw.__getitem__)
        assert all(raw[name] <= adjusted[name] <= 1 for name in raw)
        assert [adjusted[name] for name in order] == sorted(adjusted.values())
        assert adjusted[order[0]] == pytest.approx(min(1, 7 * raw[order[0]]))


def test_holm_calls_a_null_comparison_clear_in_about_a_twentieth_of_the_families_at_most():
    rng = np.random.default_rng(0)
    raw, families = [], 400
    for _ in range(families):
        baseline = by_seed(rng.normal(0, 1, 12))
        raw.append({str(k): paired_p_value(by_seed(rng.normal(0, 1, 12)), baseline) for k in range(6)})
    false = [sum(min(p.values()) <= 0.05 for p in side) / families for side in (map(holm, raw), raw)]
    assert false[0] <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / families)
    assert false[1] > 0.12  # what it corrects


@pytest.mark.parametrize("p", [-0.1, 1.1, np.nan])
def test_holm_refuses_what_is_no_p_value(p):
    with pytest.raises(ResultsError, match=r"p-value of kl is .*leave that comparison out"):
        holm({"static": 0.5, "kl": p})


def test_spearman_is_that_of_scipy_and_one_for_monotone_data():
    x, y = np.round(normal(30, 0), 1), np.round(normal(30, 1), 1)  # with ties
    assert spearman(x, y).mean == pytest.approx(stats.spearmanr(x, y).statistic)
    assert spearman(x, np.exp(x)) == pytest.approx((1, 1, 1))
    assert spearman(x, -(x**3)) == pytest.approx((-1, -1, -1))


def test_the_interval_of_spearman_is_that_of_resampled_runs():
    x, y = np.round(normal(12, 0), 1), np.round(normal(12, 1), 1) + np.round(normal(12, 0), 1)
    indices = np.random.default_rng(5).integers(12, size=(2000, 12))
    expected = np.percentile([stats.spearmanr(x[i], y[i]).statistic for i in indices], [2.5, 97.5])
    assert spearman(x, y)[1:] == pytest.approx(tuple(expected), abs=0.04)


def test_spearman_of_independent_sides_covers_zero_at_about_its_rate():
    rng = np.random.default_rng(0)
    estimates = [spearman(*rng.normal(0, 1, (2, 20))) for _ in range(100)]
    assert 0.85 <= np.mean([low <= 0 <= high for _, low, high in estimates]) <= 0.99
    assert abs(np.mean([mean for mean, _, _ in estimates])) < 0.06


def test_spearman_over_groups_counts_copies_of_a_run_as_one():
    x, y = normal(10, 0), normal(10, 1)
    copies = spearman(x * 5, y * 5, groups=list(range(10)) * 5)
    assert copies == pytest.approx(spearman(x, y), abs=1e-2)
    naive = spearman(x * 5, y * 5)
    assert naive.high - naive.low < 0.6 * (copies.high - copies.low)
    assert spearman([1, 2, 3], [1, 3, 2], groups=[0, 0, 0]) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("x", "y"),
    [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [2, 2, 2]), ([1, 2, np.nan], [1, 2, 3]), ([], [])],
)
def test_spearman_of_too_little_is_none(x, y):
    assert spearman(x, y) is None


@pytest.mark.parametrize("sides", [([1, 2, 3], [1, 2]), ([1, 2, 3], [1, 2, 3], [0, 1])])
def test_spearman_refuses_lists_that_do_not_pair_up(sides):
    with pytest.raises(ResultsError, match="do not pair up; give one of each a run"):
        spearman(*sides)


def probe(forget_loss, retain_loss=None) -> dict[str, list]:
    n = len(forget_loss)
    retain_loss = [0.1 + 0.01 * k for k in range(n)] if retain_loss is None else retain_loss
    updates, seconds = [3 * k for k in range(n)], [0.5 * k for k in range(n)]
    return {"updates": updates, "seconds": seconds, "forget_loss": forget_loss, "retain_loss": retain_loss}


@pytest.mark.parametrize("update", [0.0, 1.0, 3.0, 4.5, 9.0])
def test_the_crossing_of_a_linear_run_is_exact(update):
    run = probe([1.0, 2.0, 3.0, 4.0])
    assert first_crossing(run, 1 + update / 3) == pytest.approx((update, update / 6, 0.1 + update / 300))


def test_only_the_first_crossing_counts_and_a_run_that_never_gets_there_has_none():
    run = probe([1.0, 3.0, 0.5, 2.5, 4.0])
    assert first_crossing(run, 2.5).updates == 3 * 0.75
    assert first_crossing(run, 3.5) == pytest.approx((9 + 3 * 2 / 3, 1.5 + 0.5 * 2 / 3, 0.13 + 0.01 * 2 / 3))
    assert first_crossing(run, 4.0).updates == 12
    assert first_crossing(run, 4.01) is None


def test_a_run_that_starts_at_the_level_has_its_first_values():
    assert first_crossing(probe([2.0, 1.0, 3.0]), 1.5) == first_crossing(probe([2.0]), 2.0) == (0, 0, 0.1)


@pytest.mark.parametrize("broken", [None, float("nan"), float("inf")])
def test_a_run_has_reached_nothing_from_where_it_diverged(broken):
    for run in (probe([1.0, 2.0, broken, 4.0]), probe([1.0, 2.0, 3.0, 4.0], [0.1, 0.1, broken, 0.1])):
        assert first_crossing(run, 2.0).updates == 3
        assert first_crossing(run, 2.5) is None
    assert first_crossing(probe([broken, 2.0]), 1.5) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seconds": [0.0]}, "'seconds': 1.*give lists of one length"),
        ({"updates": [], "seconds": [], "forget_loss": [], "retain_loss": []}, "'updates': 0.*1 or more"),
        ({"retain_loss": []}, "'retain_loss': 0"),
        ({"updates": [0, 3, 3]}, "give them in increasing order"),
    ],
)
def test_a_probe_that_makes_no_sense_is_refused(change, match):
    with pytest.raises(ResultsError, match=match):
        first_crossing({**probe([1.0, 2.0, 3.0]), **change}, 1.5)


def test_a_probe_without_one_of_its_lists_and_a_level_that_is_none_are_refused():
    run = probe([1.0, 2.0])
    with pytest.raises(ResultsError, match="forget level nan is not finite"):
        first_crossing(run, float("nan"))
    del run["seconds"]
    with pytest.raises(ResultsError, match="'seconds': 0"):
        first_crossing(run, 1.5)


def test_matched_levels_lie_geometrically_between_the_untouched_model_and_the_oracle():
    assert matched_levels(0.01, 0.16) == pytest.approx([0.02, 0.04, 0.08])
    assert matched_levels(0.01, 0.16, shares=(0, 1)) == pytest.approx([0.01, 0.16])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0.2, 0.1), "0 < start < cap"),
        ((0.0, 0.1), "0 < start"),
        ((0.1, np.inf), "cap"),
        ((1, 2, (1.5,)), "in \\[0, 1\\]"),
    ],
)
def test_levels_that_have_no_meaning_are_refused(arguments, match):
    with pytest.raises(ResultsError, match=match):
        matched_levels(*arguments)
