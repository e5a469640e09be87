"""pytest-benchmark: steps and resets of one environment. Run by ``make benchmarks``, not by ``make test``."""

from __future__ import annotations

import pytest

from unlearn_gym.benchmark.field_loop import FieldLoop
from unlearn_gym.benchmark.step import bare_passes, make_env

WHOLE = {"skip_zero_weights": False}
OPTIONS = {
    "as shipped": {},
    "all samples in all passes": WHOLE,
    "every:4": {"forget_grad_rule": "loss", "grad_norms": "every:4"},
    "batch 64": {"batch_size": 64},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step(benchmark, options):
    env = make_env("mnist-trousers", "cpu", **options)
    benchmark.pedantic(env.step, args=(0.5,), rounds=30, warmup_rounds=10)


def test_step_of_gaussians(benchmark):
    env = make_env("gaussians-2d", "cpu")
    benchmark.pedantic(env.step, args=(0.5,), rounds=500, warmup_rounds=50)


def test_bare_passes(benchmark):
    benchmark.pedantic(bare_passes(make_env("mnist-trousers", "cpu", **WHOLE)), rounds=30, warmup_rounds=5)


def test_loop_of_the_field(benchmark):
    env = make_env("mnist-trousers", "cpu")
    loop = FieldLoop(env.run, env.task.pretrained_model())
    benchmark.pedantic(loop.update, args=(0.5,), rounds=30, warmup_rounds=5)


def test_reset(benchmark):
    benchmark.pedantic(make_env("mnist-trousers", "cpu").reset, rounds=30, warmup_rounds=5)
