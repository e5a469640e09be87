"""Stacked runs against single ones: any subset of them, with a past, clipped, diverged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unlearn_gym.errors import RunError
from unlearn_gym.run.stacked import StackedRuns


def alike(found, expected) -> None:
    for name in ("siss_loss", "retain_grad_norm", "forget_grad_norm", "update_norm", "forget_fraction"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_any_of_them_may_be_updated_and_those_that_have_a_past_keep_it(make_run, optimizer):
    options = {"optimizer": optimizer, "learning_rate": 1e-3, "forget_grad_rule": "loss"}
    runs, singles = ([make_run(seed=i, **options) for i in range(3)] for _ in range(2))
    for some in (runs, singles):
        for run, lambda_ in zip(some, (0.3, 0.5, 0.7), strict=True):
            run.update(lambda_)
    stack = StackedRuns(runs)
    for lambdas in ({0: 0.2, 2: 0.8}, {1: 0.4}, {2: 0.6, 1: 0.3}, {0: 0.2, 1: 0.5, 2: 0.8}):
        found = stack.update(lambdas)
        assert found.keys() == lambdas.keys()
        for i, lambda_ in lambdas.items():
            alike(found[i], singles[i].update(lambda_))
    assert [run.updates for run in runs] == [run.updates for run in singles] == [3, 4, 4]
    for run, single in zip(runs, singles, strict=True):
        torch.testing.assert_close(run.flat.vector, single.flat.vector, rtol=1e-3, atol=2e-5)


def test_a_run_that_was_updated_alone_is_left_alone_by_the_others(make_run):
    runs = [make_run(seed=i) for i in range(2)]
    stack = StackedRuns(runs)
    runs[1].update(0.5)
    before = runs[1].flat.vector.detach().clone()
    stack.update({0: 0.2})
    assert torch.equal(runs[1].flat.vector, before)


def test_each_is_clipped_by_its_own_norm(make_run):
    options = {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e-3}
    runs = [make_run(seed=i, **options) for i in range(2)]
    before = [run.flat.vector.detach().clone() for run in runs]
    terms = StackedRuns(runs).update({0: 0.3, 1: 0.6})
    for i, run in enumerate(runs):
        assert terms[i].update_norm > 2e-3
        assert (run.flat.vector - before[i]).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_one_that_diverges_says_so_takes_no_more_updates_and_harms_no_other(make_run):
    runs = [make_run(seed=i) for i in range(2)]
    stack = StackedRuns(runs)
    with torch.no_grad():
        runs[1].flat.vector[7] = float("nan")
    terms = stack.update({0: 0.3, 1: 0.6})
    assert (terms[0].diverged, terms[1].diverged) == (runs[0].diverged, runs[1].diverged) == (False, True)
    before = runs[0].flat.vector.detach().clone()
    for update in (lambda: stack.update({0: 0.3, 1: 0.6}), lambda: runs[1].update(0.5)):
        with pytest.raises(RunError, match="has diverged"):
            update()
    assert torch.equal(runs[0].flat.vector, before)
    assert np.isfinite(stack.update({0: 0.3})[0].siss_loss)
