"""pytest-benchmark: steps of many environments. Run by ``make benchmarks``, not by ``make test``."""

from __future__ import annotations

import numpy as np
import pytest

from unlearn_gym.benchmark.vector import contestants, make_ours


@pytest.mark.parametrize("num_envs", [2, 4])
@pytest.mark.parametrize("name", ["ours", "DummyVecEnv", "SubprocVecEnv", "AsyncVectorEnv"])
def test_vector_step(benchmark, name, num_envs):
    with contestants("mnist-trousers", "cpu", num_envs) as functions:
        benchmark.pedantic(functions[name], rounds=15, warmup_rounds=5)


@pytest.mark.parametrize("backend", ["processes", "stacked", "serial"])
def test_backend(benchmark, backend):
    env = make_ours("gaussians-2d", "cpu", 8, backend=backend)
    env.reset(seed=0)
    benchmark.pedantic(env.step, args=(np.full((8, 1), 0.5),), rounds=100, warmup_rounds=20)
    env.close()
