"""What follows from results: scores, the best static λ, equal forgetting, warnings; made up, with known answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from unlearn_gym.comparison.comparison import Comparison, run_comparison
from unlearn_gym.comparison.records import ORACLE, UNTOUCHED, unpack_samples
from unlearn_gym.comparison.results import CELL_FORMAT, Results, merge_results, score
from unlearn_gym.making.experiment import experiment_page
from unlearn_gym.metrics.catalogue import metrics_page
from unlearn_gym.metrics.evaluator import Evaluator
from unlearn_gym.metrics.judge import EvaluationSettings
from unlearn_gym.report import tables
from unlearn_gym.report.report import reward_lines, verdict, write_report
from unlearn_gym.report.signatures import warnings
from unlearn_gym.tasks import get_task, load_data, register_task

START, CAP, HORIZON = (0.1, 0.2), 0.5, 10
SETTINGS = {
    "potential_retain_coef": 10.0, "lambda_min": 0.1, "lambda_max": 0.9, "batch_size": 16, "horizon": HORIZON,
    "optimizer": "adamw", "learning_rate": 1e-4, "dataset_factors": "siss", "forget_grad_rule": "relative_norm",
    "forget_grad_norm": 0.5, "forget_scale": 1.0, "max_grad_norm": 1.0,
}  # fmt: skip


def cell(policy, seed=0, forget=0.3, retain=0.2, lambda_=0.5, episode_return=0.0, ess=8.0, diverged=False):
    """A run whose probe goes in a straight line from the start to its end."""
    updates = list(range(0, HORIZON + 1, 2))
    steps = np.array(updates) / HORIZON
    lambdas = list(np.broadcast_to(lambda_, HORIZON))
    return {
        "policy": policy, "seed": seed, "diverged": diverged, "key": f"{policy}{seed}",
        "metrics": {} if diverged else {"forget_loss": forget, "retain_loss": retain}, "absent": {}, "profile": [],
        "trace": {"lambda_": lambdas, "retain_ess": [ess] * HORIZON, "forget_ess": [ess] * HORIZON},
        "probe": {
            "updates": updates, "seconds": [0.1 * u for u in updates],
            "forget_loss": list(START[0] + steps * (forget - START[0])),
            "retain_loss": list(START[1] + steps * (retain - START[1])),
        },
        "episode_return": episode_return, "env_seconds": 1.0, "policy_seconds": 0.1, "evaluation_seconds": 2.0,
    }  # fmt: skip


def reference(policy, forget, retain):
    losses = {"forget_loss": forget, "retain_loss": retain}
    return {"policy": policy, "seed": 0, "metrics": losses, "diverged": False, "evaluation_seconds": 2.0, "key": policy}


def results(*cells, oracle=True):
    """Their results, with the references."""
    references = [reference(UNTOUCHED, *START), *([reference(ORACLE, CAP, 0.19)] if oracle else [])]
    evaluation = {"num_forget_samples": 300, "num_quality_samples": 300}
    return Results(
        {
            "comparison": {"task": "made-up", "evaluation": evaluation, "options": {}, "policies": [], "seeds": []},
            "format": CELL_FORMAT, "settings": SETTINGS,
            "cells": [*references, *cells], "command": "test", "versions": {"torch": "0"}, "calibration": {},
            "probe_cap": CAP, "num_retain": 1, "num_forget": 1, "num_reference": 1, "feature_dim": 2,
            "num_inference_steps": 20, "training": {"ppo": {"seconds": 60.0}},
        }
    )  # fmt: skip


def seeds(policy, forgets, retains=None, **more):
    retains = retains or [0.2] * len(forgets)
    return [cell(policy, i, f, r, **more) for i, (f, r) in enumerate(zip(forgets, retains, strict=True))]


def test_score_is_0_at_the_start_1_at_the_oracle_and_less_for_damage():
    assert score(*START, START, CAP, 10.0) == 0.0
    assert score(CAP, START[1], START, CAP, 10.0) == pytest.approx(1.0)
    assert score(2 * CAP, START[1], START, CAP, 10.0) == pytest.approx(1.0)  # over-forgetting pays nothing
    assert score(CAP, 1.05 * START[1], START, CAP, 10.0) == pytest.approx(0.5)
    assert score(CAP, 0.9 * START[1], START, CAP, 10.0) == pytest.approx(1.0)  # nor does repair


def test_the_best_static_by_hindsight_is_that_of_the_highest_mean_score():
    table = results(*seeds("static:0.1", [0.3, 0.3]), *seeds("static:0.9", [0.35, 0.31]), *seeds("prior", [0.5, 0.5]))
    assert table.best_static == "static:0.9"
    assert table.scores("static:0.9", 10.0) == table.values("static:0.9", "score")


def test_a_static_lambda_that_diverged_is_not_the_best():
    table = results(*seeds("static:0.1", [0.2, 0.2]), cell("static:0.9", 0, 0.4), cell("static:0.9", 1, diverged=True))
    assert table.best_static == "static:0.1"
    assert table.values("static:0.9", "score").keys() == {0}


def test_without_an_oracle_there_is_no_score_and_still_a_report(tmp_path):
    table = results(*seeds("static:0.5", [0.3, 0.4]), *seeds("prior", [0.3, 0.4]), oracle=False)
    assert table.values("prior", "score") == {}
    assert table.best_static == "static:0.5"
    assert tables.against_best_static(table) == ([], [])
    assert "No score: no retrained oracle." in write_report(table, tmp_path).read_text()
    assert any("Forgot most (highest forget loss)" in line for line in verdict(table))


def test_a_report_speaks_of_nothing_that_it_does_not_have(tmp_path):
    """Without an oracle and a classifier: no score and its w, no levels, no judged samples, no oracle's line."""
    parts = [*seeds("static:0.5", [0.3, 0.4]), *seeds("prior", [0.3, 0.4])]
    bare = Results({**results(*parts, oracle=False).raw, "probe_cap": None, "feature_dim": None})
    text = write_report(bare, tmp_path / "bare").read_text()
    whole = write_report(results(*parts), tmp_path / "whole").read_text()
    for phrase in ("Score: w = 10", "to each forget loss", "of the forget data's labels", "At equal forgetting"):
        assert phrase in whole
        assert phrase not in text
    assert "There are no scores, so differences are to static:0.5." in text
    assert "There are no scores" not in whole
    assert [line for line in text.splitlines() if "oracle" in line] == ["No score: no retrained oracle.  "]
    assert all("as above" not in one for one in (text, whole))
    pages = [experiment_page("mine", "?", {"arm": one}) for one in (bare, results(*parts))]
    assert ["the last two columns" in page for page in pages] == [False, True]


@pytest.mark.parametrize("evaluated", [30, 250])
def test_without_a_classifier_a_report_shows_before_and_after_all_the_same(evaluated, tmp_path):
    plain = replace(
        get_task("gaussians-2d"), name=f"plain-{evaluated}", classify=None, oracle_assets=tmp_path / "none"
    )  # fmt: skip
    register_task(plain)
    comparison = Comparison(plain.name, ("static:0.5",), (0,), {"horizon": 3}, EvaluationSettings(evaluated, 250))
    found = run_comparison(comparison, tmp_path / "out")
    shown = {c["policy"]: unpack_samples(c["pictures"]["forget"]) for c in found.cells}
    assert {name: samples.shape for name, samples in shown.items()} == dict.fromkeys(
        (UNTOUCHED, "static:0.5"), (evaluated, 2)
    )
    assert (shown[UNTOUCHED] != shown["static:0.5"]).any()
    text = write_report(found, tmp_path / "out").read_text()
    assert "![samples](samples.png)" in text
    assert (tmp_path / "out" / "samples.png").stat().st_size > 10_000
    assert "Samples: for the pictures alone;" in text


def test_images_without_a_classifier_are_shown_by_the_labels_that_there_are(tmp_path):
    task = replace(get_task("mnist-trousers"), classify=None)
    judges = Evaluator(task, load_data(task), EvaluationSettings(20, 200, num_inference_steps=2))
    forget, quality = judges.draw(task.pretrained_model(), 100, 40)
    assert (forget.shape, quality.shape) == ((20, 1, 28, 28), (40, 1, 28, 28))


def test_a_clear_difference_is_starred_and_noise_is_not():
    rng = np.random.default_rng(0)
    base = list(0.3 + 0.01 * rng.normal(size=10))
    table = results(
        *seeds("static:0.5", base), *seeds("prior", [x + 0.02 for x in base]),
        *seeds("random", [x + 0.001 * n for x, n in zip(base, rng.normal(size=10), strict=True)]),
    )  # fmt: skip
    rows = {row[0]: row for row in tables.paired(table)[1]}
    assert "*" in rows["prior"][2]
    assert "*" not in rows["random"][2]
    against = {row[0]: row for row in tables.against_best_static(table)[1]}
    assert against["static:0.5"][3] == "best static"
    assert float(against["prior"][5]) < 0.05 < float(against["random"][5])


def test_the_static_lambda_of_the_other_seeds_does_not_know_the_seed_it_is_scored_on():
    """static:0.9 is best by hindsight through its luck at seed 0 alone: chosen without that seed it is not taken."""
    table = results(*seeds("static:0.1", [0.30, 0.30, 0.30]), *seeds("static:0.9", [0.50, 0.29, 0.29]))
    assert table.best_static == "static:0.9"
    scores = {p: table.values(p, "score") for p in ("static:0.1", "static:0.9")}
    assert table.fair_static == {0: scores["static:0.1"][0], 1: scores["static:0.9"][1], 2: scores["static:0.9"][2]}
    assert np.mean(list(table.fair_static.values())) < np.mean(list(scores["static:0.9"].values()))


def test_how_many_static_lambdas_run_does_not_change_the_p_values_of_the_others():
    rng = np.random.default_rng(1)
    base = list(0.3 + 0.01 * rng.normal(size=8))
    own = [*seeds("static:0.5", base), *seeds("prior", [x + 0.01 for x in base]), *seeds("random", base[::-1])]
    more = [c for i in range(1, 5) for c in seeds(f"static:0.{i}", [x - 0.01 * i for x in base])]
    p_values = []
    for table in (results(*own), results(*own, *more)):
        assert table.best_static == "static:0.5"
        p_values.append({row[0]: row[5] for row in tables.against_best_static(table)[1]})
    assert {p: p_values[1][p] for p in ("prior", "random")} == {p: p_values[0][p] for p in ("prior", "random")}


def test_the_verdict_answers_the_question_and_names_a_baseline_that_does_better():
    base = [0.30 + 0.001 * i for i in range(8)]
    table = results(*seeds("static:0.5", base), *seeds("prior", [x + 0.02 for x in base]))
    assert tables.clearly_better(table) == ["prior"]
    assert any(
        "Clearly better than the best static λ by hindsight, static:0.5: **prior**." in v for v in verdict(table)
    )
    harmful = results(*seeds("static:0.5", base, [0.25] * 8), *seeds("finetune", [0.11] * 8, [0.2] * 8))
    assert any("better than all by this score: untouched (0.000)" in line for line in verdict(harmful))
    assert any("better than all by this score: finetune" in line for line in verdict(harmful))


def test_equal_forgetting_compares_the_damage_where_both_have_come_to():
    table = results(
        *seeds("static:0.5", [0.4] * 3, [0.204] * 3), *seeds("prior", [0.4] * 3, [0.208] * 3),
        *seeds("static:0.9", [0.12] * 3, [0.2] * 3),
    )  # fmt: skip
    level = table.levels[1]
    assert level == pytest.approx((0.1 * 0.5) ** 0.5)
    assert tables.best_static_at(table, level) == "static:0.5"  # static:0.9 never gets there
    rises = [tables.retain_rises(table, p, level)[0] for p in ("static:0.5", "prior")]
    assert rises[1] == pytest.approx(2 * rises[0])
    assert tables.crossings(table, "prior", level)[0].updates == pytest.approx(HORIZON * (level - 0.1) / 0.3)
    header, rows = tables.matched(table)
    assert header[4:7] == [f"reach {level:.4f}", "retain rise", "− static:0.5"]
    assert {row[0]: row[4] for row in rows} == {"static:0.5": "3/3", "prior": "3/3", "static:0.9": "0/3"}


def test_the_exchange_rate_decides_between_forgetting_and_damage():
    table = results(
        *seeds("static:0.1", [0.2] * 6, [0.2] * 6), *seeds("static:0.9", [0.4] * 6, [0.22] * 6),
        *seeds("prior", [0.41 + 0.001 * i for i in range(6)], [0.22] * 6),
    )  # fmt: skip
    best = {row[0]: row[1] for row in tables.exchange_rates(table)[1]}
    assert best == {"1": "static:0.9", "3": "static:0.9", "10": "static:0.1", "30": "static:0.1"}
    assert {row[0]: row[5] for row in tables.exchange_rates(table)[1]}["1"] == "prior"


def test_efforts_tell_the_training_beside_the_run():
    header, rows = tables.efforts(results(*seeds("ppo", [0.4]), *seeds("prior", [0.11])))
    by_policy = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert by_policy["ppo"]["training s"] == "60.0"
    assert by_policy["prior"]["training s"] == by_policy["prior"][header[1]] == "–"
    assert by_policy["ppo"][header[1]].endswith("s (1)")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (cell("prior", diverged=True), "1 of 1 runs diverged"),
        (cell("prior", lambda_=0.1), "stays at its lower bound 0.1 in the second half of 1 of 1 runs"),
        (cell("prior", lambda_=0.899), "upper bound"),
        (cell("prior", ess=1.5), "retain gradient of an update comes from 1.5 effective samples of 16"),
        (cell("prior", retain=0.23), "rose to 1.15 times"),
        (cell("prior", forget=0.6), "over-forgetting in 1 of 1 runs"),
    ],
)
def test_each_signature_of_failure_is_a_warning(made, expected):
    assert any(expected in line for line in warnings(results(made)))


def test_a_side_that_the_objective_leaves_out_has_no_concentrated_weights():
    assert warnings(results(cell("static:0.5", ess=0.0))) == []


@pytest.mark.parametrize("objective", ["siss", "naive", "retrack", "erasediff"])
def test_a_report_says_what_was_minimised_and_what_lambda_was(objective, tmp_path):
    table = results(*seeds("static:0.5", [0.3, 0.4]), *seeds("prior", [0.3, 0.4]), oracle=False)
    made = Results({**table.raw, "settings": {**SETTINGS, "objective": objective}, "command": ""})
    text = write_report(made, tmp_path).read_text()
    assert f"objective `{objective}`: λ " in text
    assert ("λ does nothing" in text) == (objective in ("naive", "erasediff"))
    assert ("forget gradient rule" in text) == (objective != "erasediff")
    assert "Made from Python with torch 0" in text


def test_a_sound_run_and_a_static_lambda_at_its_bound_are_no_failure():
    assert warnings(results(cell("prior"), cell("static:0.1", lambda_=0.1))) == []


def test_the_return_of_runs_in_order_of_their_score_correlates_with_it():
    runs = [cell("prior", i, 0.2 + 0.02 * i, episode_return=float(i)) for i in range(8)]
    assert "score: Spearman +1.00" in reward_lines(results(*runs))[0]
    assert reward_lines(results(cell("prior"))) == ["Too few runs to say."]


def test_a_diverged_run_is_in_no_figure():
    table = results(cell("prior", 0, diverged=True, episode_return=-1e20), cell("prior", 1, episode_return=1.0))
    assert table.values("prior", "episode_return") == {1: 1.0}
    assert table.values("prior", "mean_lambda").keys() == {1}


def test_policies_of_different_seeds_are_not_compared_by_their_means_without_a_word():
    a = results(*seeds("static:0.5", [0.3, 0.3]))
    b = results(cell("prior", 5, 0.4), cell("prior", 6, 0.4))
    assert any("ran on different seeds" in line for line in verdict(merge_results([a, b], ["a", "b"])))
    assert not any("ran on different seeds" in line for line in verdict(a))


def test_a_merge_keeps_what_each_part_knows():
    a, b = results(cell("prior", 0)), results(cell("ppo", 0))
    for part, policy in ((a, "prior"), (b, "ppo")):
        part.raw["comparison"] |= {"policies": [policy], "seeds": [0]}
        part.raw["training"] = {policy: {"seconds": 1.0}}
    merged = merge_results([a, b], ["a", "b"]).raw
    assert merged["training"].keys() == set(merged["comparison"]["policies"]) == {"prior", "ppo"}


def test_a_metric_that_only_some_runs_have_is_named(tmp_path):
    some = cell("prior", 1)
    some["absent"] = {"copy_rate": "because"}
    have = cell("prior", 0)
    have["metrics"]["copy_rate"] = 0.1
    text = write_report(results(have, some), tmp_path).read_text()
    assert "copy_rate is absent in 1 of 4 runs (because)." in text


def test_policies_that_all_diverged_do_not_rank():
    assert verdict(results(cell("prior", diverged=True))) == ["No policy finished all its runs."]


def test_the_metrics_page_is_that_of_the_catalogue():
    from pathlib import Path

    assert (Path(__file__).parent.parent / "docs" / "metrics.md").read_text() == metrics_page()
