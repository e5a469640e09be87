"""A run on an accelerator is the run on the CPU up to rounding: ``make gpu``.

These tests are skipped without a CUDA device; ``UNLEARN_GYM_DEVICE=cpu`` runs them on the CPU, to check themselves.
"""

from __future__ import annotations

import os
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import unlearn_gym  # noqa: F401 - registers the environment
from unlearn_gym.envs import SISSUnlearnEnv, SISSUnlearnVectorEnv
from unlearn_gym.metrics.evaluator import Evaluator
from unlearn_gym.metrics.judge import EvaluationSettings
from unlearn_gym.run import UnlearningRun
from unlearn_gym.run.actions import Action
from unlearn_gym.tasks import get_task, load_data
from unlearn_gym.tasks.saving import load_model

DEVICE = os.environ.get("UNLEARN_GYM_DEVICE", "cuda")
TASKS = ("gaussians-2d", "mnist-trousers", "mnist-tshirt", "vae-mnist-trousers", "sfd-mnist-digits")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def run_on(task: str, device: str, **options: Any) -> UnlearningRun:
    chosen = get_task(task)
    settings = chosen.settings.override(device=device, batch_size=8, **options)
    return UnlearningRun(chosen.pretrained_model(), load_data(chosen), chosen.schedule.alphas_cumprod(), settings, 0)


@pytest.mark.parametrize("task", TASKS)
def test_the_pretrained_model_has_the_losses_that_it_has_on_the_cpu(task):
    """The probe's samples and noise are the same on every device."""
    found, expected = (run_on(task, device).probe_losses() for device in (DEVICE, "cpu"))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_learns_there_and_is_replayed_to_the_bit(task):
    one, other = (run_on(task, DEVICE) for _ in range(2))
    snapshot, start = one.snapshot(), one.flat.vector.detach().clone()
    for run in (one, other):
        terms = [run.update(Action(lambda_, step_scale=0.5)) for lambda_ in (0.3, 0.5, 0.7)]
        assert not any(term.diverged for term in terms)
    assert one.flat.vector.device.type == DEVICE
    assert not torch.equal(one.flat.vector, start)
    torch.testing.assert_close(one.flat.vector, other.flat.vector, rtol=1e-4, atol=1e-6)
    one.restore(snapshot)
    assert torch.equal(one.flat.vector, start)


@pytest.mark.parametrize("task", TASKS[:3])
def test_stacked_runs_are_single_ones_up_to_rounding(task):
    options = {"task": task, "device": DEVICE, "batch_size": 8, "horizon": 3}
    vector = SISSUnlearnVectorEnv(2, backend="stacked", **options)
    single = SISSUnlearnEnv(**options)
    vector.reset(seed=0)
    single.reset(seed=0)
    for lambda_ in (0.3, 0.6):
        rewards = vector.step(np.full((2, 1), lambda_, np.float32))[1]
        assert rewards[0] == pytest.approx(single.step(lambda_)[1], rel=2e-3, abs=1e-4)
    vector.close()


def test_an_episode_ends_with_a_model_that_is_saved_and_judged(tmp_path):
    env = gym.make("SISSUnlearn-v0", task="mnist-trousers", device=DEVICE, horizon=3, observation="extended")
    env.reset(seed=0)
    for _ in range(3):
        obs, *_ = env.step(np.array([0.5], np.float32))
        assert env.observation_space.contains(obs)
    saved = load_model(env.unwrapped.save(tmp_path / "unlearned.safetensors"))
    for name, value in env.unwrapped.run.export().state_dict().items():
        assert torch.equal(saved.state_dict()[name], value.cpu())
    task = get_task("mnist-trousers")
    evaluator = Evaluator(task, load_data(task), EvaluationSettings(50, 200, num_inference_steps=5))
    figures = [evaluator.evaluate(saved.to(device)).metrics["retain_loss"] for device in (DEVICE, "cpu")]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)
