"""Sizes that no machine holds, and messages of any length."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from unlearn_gym import cli
from unlearn_gym.cli.arguments import set_threads
from unlearn_gym.comparison.comparison import Comparison, seed_range
from unlearn_gym.envs import SISSUnlearnEnv, SISSUnlearnVectorEnv
from unlearn_gym.errors import (
    LONGEST_LINE,
    ResultsError,
    SettingsError,
    UnlearnGymError,
    shown,
)
from unlearn_gym.making.pretraining import Pretraining, PretrainSettings
from unlearn_gym.metrics.judge import EvaluationSettings, Judge
from unlearn_gym.settings import RunSettings
from unlearn_gym.system import memory
from unlearn_gym.tasks import get_task, load_data

from .conftest import fails, label

HUGE = 10**9


def test_sizes_that_no_memory_holds_are_refused_before_anything_is_allocated(monkeypatch):
    def make_many(**more):
        return SISSUnlearnVectorEnv(**{"task": "gaussians-2d", "num_envs": 2, **more})

    monkeypatch.setattr(memory, "total_memory", lambda device="cpu": 16 * 2.0**30)
    task = get_task("gaussians-2d")
    data = load_data(task)
    for backend in ("processes", "serial", "stacked"):
        assert "num_envs=1000000 needs about" in fails(SettingsError, make_many, num_envs=10**6, backend=backend)
    assert "batch_size" in fails(SettingsError, make_many, num_envs=1000, backend="stacked", batch_size=64 * 1000)
    assert "num_workers" in fails(SettingsError, make_many, num_envs=4000, num_workers=4000)
    for size in (HUGE, 10**30, 10**400):
        assert "num_envs=" in fails(SettingsError, make_many, num_envs=size)
        assert "batch_size=" in fails(SettingsError, SISSUnlearnEnv, "gaussians-2d", batch_size=size)
        settings = PretrainSettings(batch_size=size)
        assert "batch_size=" in fails(SettingsError, Pretraining, task, data.retain, None, settings)
    for name in ("num_forget_samples", "num_quality_samples", "num_likelihood_samples", "batch_size"):
        size = EvaluationSettings(**{name: 10**12})
        assert f"{name}=1000000000000" in fails(SettingsError, Judge, task, data, size)
        fails(SettingsError, Comparison("gaussians-2d", ("static:0.5",), (0,), evaluation=size).validate)


def test_what_a_batch_takes_is_measured_and_grows_with_it(make_run):
    small, large = make_run(batch_size=16), make_run(batch_size=160)
    assert large.update_bytes == pytest.approx(10 * small.update_bytes, rel=0.5)
    hidden = sum(get_task("gaussians-2d").network.hidden)
    assert small.update_bytes / 16 > 4 * hidden  # activations in float32, once at least
    assert small.update_bytes / 16 < 100 * hidden
    before = small.snapshot()
    small.update_bytes  # noqa: B018 - must change nothing
    after = small.snapshot()
    assert torch.equal(before.vector, after.vector)
    assert all(map(torch.equal, before.generators, after.generators))


def test_ordinary_sizes_are_within_any_machine(monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device="cpu": 2.0**30)
    env = SISSUnlearnVectorEnv(16, "gaussians-2d", backend="stacked", batch_size=256)
    env.close()


def test_counts_without_reason_are_refused():
    for count in (HUGE, 0, -1, 10**30):
        assert "seeds=" in fails(ResultsError, seed_range, 0, count)
    assert seed_range(3, 2) == (3, 4)
    fails(ResultsError, Comparison("gaussians-2d", ("static:0.5",), (2**64,)).validate)
    fails(ResultsError, Comparison("gaussians-2d", ("static:0.5",), tuple(range(10_001))).validate)
    assert "horizon=1000000000" in fails(SettingsError, RunSettings().override, horizon=HUGE)
    fails(SettingsError, RunSettings().override, forget_grad_rule="loss", grad_norms="every:" + "9" * 5000)
    for threads in (0, HUGE, 2**40):
        assert "threads=" in fails(SettingsError, set_threads, threads)


@pytest.mark.parametrize(
    "value", ["x" * 10**7, list(range(10**6)), 10**10_000, dict.fromkeys(range(1000), "y" * 100), np.eye(9)], ids=label
)
def test_messages_shorten_values(value):
    assert len(shown(value)) <= 161
    assert "\n" not in shown(value)


def test_every_error_of_the_package_is_one_line_of_a_sane_length():
    error = UnlearnGymError("begin" + "\nx" * 10**6 + " remedy")
    assert str(error).startswith("begin x")
    assert str(error).endswith("x remedy")
    assert len(str(error)) <= LONGEST_LINE
    assert str(UnlearnGymError("a  b\nc")) == "a b c"


def test_a_value_whose_repr_fails_is_shown_all_the_same():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert "Broken" in shown(Broken())


def command(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["unlearn-gym", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert len(printed) <= LONGEST_LINE + 20
    return printed


def test_commands_refuse_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    points = ("compare", "--task", "gaussians-2d", "--policies", "static:0.5")
    assert "not UTF-8" in command(monkeypatch, capsys, *points, "--out", "a\udcffb")
    assert "seeds=1000000000" in command(monkeypatch, capsys, *points, "--seeds", str(HUGE))
    assert "num_forget_samples=1000000000000" in command(monkeypatch, capsys, *points, "--forget-samples", str(10**12))
    assert "batch_size=1000000000" in command(monkeypatch, capsys, *points, "--option", f"batch_size={HUGE}")
    assert "threads=" in command(monkeypatch, capsys, "pretrain", "--task", "gaussians-2d", "--threads", str(2**40))
    assert "batch_size=" in command(
        monkeypatch, capsys, "pretrain", "--task", "gaussians-2d", "--batch-size", str(HUGE), "--out", "out"
    )
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "results.json").write_text("[" * 100_000)
    assert "nested too deeply" in command(monkeypatch, capsys, "report", "x")
    (tmp_path / "bomb.yaml").write_text("[" * 2000)
    assert "levels deep" in command(monkeypatch, capsys, "experiment", "bomb.yaml")
    assert "yyy" in command(monkeypatch, capsys, "report", "y" * 5000)


def test_what_a_sample_takes_is_told_from_what_every_batch_takes():
    weight = torch.ones(10_000, requires_grad=True)

    def function(batch_size):
        fixed = (weight * weight).sum()
        return fixed + torch.ones(batch_size, 100, requires_grad=True).square().sum()

    assert memory.bytes_per_sample(function) == 400
