"""The benchmark suite: what can be stated without a clock, and that it runs from end to end."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unlearn_gym.benchmark import evaluation, growth, objectives, observation, step, timing, vector
from unlearn_gym.benchmark.field_loop import FieldLoop
from unlearn_gym.benchmark.figures import Figure, markdown
from unlearn_gym.benchmark.suite import figures_of, load, report, run_suite
from unlearn_gym.envs.features import GROUPS
from unlearn_gym.errors import SettingsError
from unlearn_gym.run.objectives.epsilon import EPSILON_OBJECTIVES


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
def test_a_step_makes_one_forward_and_two_backward_passes_and_no_other_network_arithmetic(task):
    env = step.make_env(task, "cpu", skip_zero_weights=False)
    bare = flops(step.bare_passes(env))
    assert flops(lambda: env.step(0.5)) == bare
    assert flops(lambda: env.run.measure(0.5)) == bare


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
@pytest.mark.parametrize("name", EPSILON_OBJECTIVES)
def test_an_update_of_an_objective_makes_its_own_passes_and_no_others(task, name):
    env = step.make_env(task, "cpu", skip_zero_weights=False, **objectives.options_of(name))
    assert flops(lambda: env.run.update(0.5)) == flops(objectives.bare_update(env))


def test_objectives_are_compared_with_siss_and_groups_with_a_step_without():
    found = {figure.name: figure for figure in objectives.objectives("gaussians-2d", "cpu", 3)}
    assert len(found) == 1 + 2 * len(EPSILON_OBJECTIVES)
    assert found["gaussians-2d, siss: update / update of siss, both as shipped"].value == 1.0
    (goal,) = [figure for figure in found.values() if figure.goal is not None]
    assert goal.value == max(figure.value for figure in found.values() if "all samples" in figure.name)
    assert len(observation.groups("gaussians-2d", "cpu", 3)) == len(GROUPS) + 1


def test_seconds_of_the_process_are_not_those_of_others():
    turns = timing.take_turns({"sleep": lambda: time.sleep(0.01)}, 3, clock=timing.own_clock("cpu"))
    assert turns.median("sleep") < 0.005


def test_skipping_zero_weights_saves_arithmetic():
    env, whole = (step.make_env("mnist-trousers", "cpu", skip_zero_weights=s) for s in (True, False))
    found = np.mean([flops(lambda: env.step(0.5)) for _ in range(4)])
    assert found < 0.75 * flops(lambda: whole.step(0.5))


def test_every_fourth_measurement_saves_a_backward_pass_of_the_others():
    options = {"skip_zero_weights": False, "forget_grad_rule": "loss"}
    exact = step.make_env("mnist-trousers", "cpu", **options)
    env = step.make_env("mnist-trousers", "cpu", grad_norms="every:4", **options)
    whole = flops(lambda: exact.step(0.5))
    shares = [flops(lambda: env.step(0.5)) / whole for _ in range(5)]
    assert shares[0] == shares[4] == 1
    assert max(shares[1:4]) < 0.65


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
def test_the_loop_of_the_field_makes_the_same_updates(make_run, task):
    run = make_run(task, seed=3)
    loop = FieldLoop(make_run(task), copy.deepcopy(run.model), seed=3)
    for lambda_ in (0.2, 0.5, 0.8):
        logged, terms = loop.update(lambda_), run.update(lambda_)
        for name, value in logged.items():
            np.testing.assert_allclose(value, getattr(terms, name), rtol=5e-3)
    for a, b in zip(loop.model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=4 * run.settings.learning_rate)


def test_turns_are_taken_in_turn_and_compared_within_their_round(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow(name, seconds):
        def function():
            calls.append(name)
            clock[0] += seconds * (1 + len(calls) // 6)  # the machine gets slower and slower

        return function

    turns = timing.take_turns({"a": slow("a", 1.0), "b": slow("b", 3.0)}, 6, warmup=1)
    assert calls == ["a", "b"] * 7
    assert turns.ratio("b", "a") == 3.0
    assert len(turns.seconds["a"]) == 6


def test_a_missed_goal_shows_why():
    row = markdown([Figure("7", "x", 1.0002, "×", 1.0)])
    assert "| 1.0002 × | ≤ 1 | missed |" in row


def test_figures_say_whether_their_goal_is_met():
    assert Figure("1", "x", 1.0, "×", 1.06).verdict == "met"
    assert Figure("1", "x", 1.1, "×", 1.06).verdict == "missed"
    assert Figure("1", "x", 1.1, "×", 1.06, at_least=True).verdict == "met"
    assert Figure("1", "x", 1.1).verdict == "–"
    assert "| 1 | x | 0.500 × | ≥ 1.06 | missed |" in markdown([Figure("1", "x", 0.5, "×", 1.06, at_least=True)])


def test_sampler_steps_are_judged_by_the_models_that_swap_places_ties_apart():
    finest = {"a": 1.0, "b": 1.01, "c": 2.0, "d": 3.0}
    table = {
        steps: {name: {"feature_kid": v, "feature_fid": v} for name, v in values.items()}
        for steps, values in ((10, {"a": 1.2, "b": 1.1, "c": 3.5, "d": 3.0}), (50, finest))
    }
    difference, swaps, *_ = evaluation.sampler_figures(table, shipped=10)
    assert difference.value == pytest.approx(1.5 / 2.0)
    assert swaps.value == 1
    assert swaps.verdict == "missed"
    assert "of 5 pairs" in swaps.name


def test_the_exponent_of_a_power_law_is_found():
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert growth.exponent((sizes, [3 * s**0.7 for s in sizes])) == pytest.approx(0.7)


def test_further_workers_need_less_memory_than_the_first():
    figures = {figure.name: figure.value for figure in vector.memory("gaussians-2d")}
    if figures:
        first, further, peak, shared = figures.values()
        assert 0 < further < first < 2 * peak
        assert shared > 0


def test_every_vector_environment_of_item_4_steps():
    with vector.contestants("gaussians-2d", "cpu", 2) as functions:
        assert len(functions) == 4
        for function in functions.values():
            assert len(function()[0]) == 2


def test_the_suite_writes_what_it_prints_and_completes_what_is_there(tmp_path):
    def run(command, *items):
        return run_suite("gaussians-2d", tmp_path, items=items, quick=True, command=command, progress=lambda _: None)

    first = run("one", "1", "7")
    result = load(tmp_path)
    assert [figure.as_dict() for figure in figures_of(result)] == [figure.as_dict() for figure in first]
    assert result["machine"]["processor"]
    assert (tmp_path / "bench.md").read_text() == report(result) + "\n"
    assert markdown(first) in report(result)
    again = run("two", "7")
    result = load(tmp_path)
    assert [item["command"] for item in result["items"].values()] == ["one", "two"]
    kept = [figure for figure in first if figure.item == "1"]
    assert [figure.value for figure in figures_of(result)] == [figure.value for figure in [*kept, *again]]
    assert "items 1 by `one`; items 7 by `two`" in report(result)


def test_an_unknown_item_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"unknown item '12'; items are 1 \(overhead"):
        run_suite("gaussians-2d", tmp_path / "out", items=("12",))
    assert not (tmp_path / "out").exists()
