"""pytest-benchmark: sampling and metrics. Run by ``make benchmarks``, not by ``make test``."""

from __future__ import annotations

import pytest

from unlearn_gym.metrics.judge import EvaluationSettings, Judge, judged_reference
from unlearn_gym.metrics.quality import fid, kid
from unlearn_gym.tasks import get_task, load_data

TASK = get_task("mnist-trousers")


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_sampling(benchmark, steps):
    judge = Judge(TASK, load_data(TASK), EvaluationSettings(num_quality_samples=250, num_inference_steps=steps))
    labels = judge.quality_labels()
    benchmark.pedantic(judge.draw, args=(TASK.pretrained_model(), labels, 250, 0), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("metric", [fid, kid])
def test_metric(benchmark, metric):
    reference = judged_reference(TASK, load_data(TASK)).features
    benchmark.pedantic(metric, args=(reference[:500], reference[500:]), rounds=5, warmup_rounds=1)
