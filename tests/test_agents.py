"""Training an agent, using it as a policy, and agents that do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml
from stable_baselines3 import A2C, PPO, SAC, TD3

from agents.config import load_config
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import PolicyError, SettingsError
from unlearn_gym.evaluation.episode import policy_context, run_episode
from unlearn_gym.policies import make_policy
from unlearn_gym.policies.registry import SHIPPED_AGENTS

from .conftest import TASKS
from .test_policies import CONTEXT, OBS, info

LOW, HIGH = np.float32(-1), np.float32(1)
ROOT = Path(__file__).resolve().parent.parent


def rescaled(task: str = "gaussians-2d"):
    return gym.wrappers.RescaleAction(gym.make("SISSUnlearn-v0", task=task, horizon=4), LOW, HIGH)


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agents.train", *arguments], capture_output=True, text=True, cwd=cwd, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_trained_agent_is_a_policy(tmp_path):
    config = tmp_path / "ppo.yml"
    config.write_text((ROOT / "configs" / "agents" / "ppo.yml").read_text().replace("n_steps: 240", "n_steps: 120"))
    done = train(
        "--task", "gaussians-2d", "--timesteps", "480", "--config", str(config), "--out", "agent",
        "--eval-every", "240", "--eval-episodes", "1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "agent"
    manifest = json.loads((folder / "agent.json").read_text())
    assert manifest["timesteps"] == 480
    assert manifest["training_seeds_from"] >= 1_000_000
    assert (folder / "best_model.zip").exists()
    assert list((folder / "checkpoints").glob("*.zip"))
    tags = b"".join(p.read_bytes() for p in (folder / "tensorboard").rglob("events.*"))
    assert b"unlearn/lambda" in tags
    assert b"unlearn/forget_loss" in tags
    env = SISSUnlearnEnv("gaussians-2d", horizon=5)
    episode = run_episode(env, make_policy(str(folder / "agent.zip"), policy_context(env)), seed=0)
    assert all(0.1 <= v <= 0.9 for v in episode.trace["lambda_"])


@pytest.mark.parametrize("algorithm", [A2C, PPO, SAC, TD3])
def test_every_algorithms_zip_is_recognised(algorithm, tmp_path):
    agent = algorithm("MlpPolicy", rescaled(), device="cpu")
    agent.save(tmp_path / "a.zip")
    policy = make_policy(str(tmp_path / "a.zip"), CONTEXT)
    assert type(policy.agent) is algorithm
    assert 0.1 <= policy.act(OBS, info()) <= 0.9


def test_an_agent_on_the_environments_own_range_acts_in_it(tmp_path):
    PPO("MlpPolicy", gym.make("SISSUnlearn-v0", task="gaussians-2d"), device="cpu").save(tmp_path / "a.zip")
    assert 0.1 <= make_policy(str(tmp_path / "a.zip"), CONTEXT).act(OBS, info()) <= 0.9


@pytest.mark.parametrize(("env", "message"), [("Pendulum-v1", r"observations \(3,\)"), ("CartPole-v1", r"\(4,\)")])
def test_an_agent_of_another_environment_is_refused(env, message, tmp_path):
    PPO("MlpPolicy", env, device="cpu").save(tmp_path / "a.zip")
    with pytest.raises(PolicyError, match=message):
        make_policy(str(tmp_path / "a.zip"), CONTEXT)


@pytest.mark.parametrize("options", [{"lambda_min": 0.3}, {"normalize_features": False}])
@pytest.mark.parametrize("wrap", [lambda env: env, lambda env: gym.wrappers.RescaleAction(env, LOW, HIGH)])
def test_an_agent_of_other_observations_or_another_lambda_range_is_refused(options, wrap, tmp_path):
    PPO("MlpPolicy", wrap(gym.make("SISSUnlearn-v0", task="gaussians-2d", **options)), device="cpu").save(
        tmp_path / "a.zip"
    )
    with pytest.raises(PolicyError, match="observations in other bounds"):
        make_policy(str(tmp_path / "a.zip"), policy_context(SISSUnlearnEnv("gaussians-2d")))


def test_an_agent_trained_with_the_norms_age_is_used_with_it_and_refused_without(tmp_path):
    options = {"forget_grad_rule": "loss", "grad_norms": "every:4"}
    PPO("MlpPolicy", gym.make("SISSUnlearn-v0", task="gaussians-2d", **options), device="cpu").save(tmp_path / "a.zip")
    env = SISSUnlearnEnv("gaussians-2d", horizon=3, **options)
    assert (
        len(run_episode(env, make_policy(str(tmp_path / "a.zip"), policy_context(env)), seed=0).trace["lambda_"]) == 3
    )
    with pytest.raises(PolicyError, match=r"observations \(7,\) .* has \(6,\) and \(1,\) \(grad_norms='every:k'"):
        make_policy(str(tmp_path / "a.zip"), policy_context(SISSUnlearnEnv("gaussians-2d")))


@pytest.mark.parametrize("path", sorted(SHIPPED_AGENTS.rglob("*.zip")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_shipped_agents_are_those_of_their_manifest_and_act(path):
    from unlearn_gym.files import sha256

    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["sha256"] == sha256(path)
    assert manifest["task"] == path.parent.name
    assert manifest["reward"] == ("potential" if path.stem == "ppo-potential" else "siss")
    assert min(manifest["training_seeds_from"], manifest["validation_seeds_from"]) >= 1_000_000
    env = SISSUnlearnEnv(manifest["task"], horizon=2)
    assert len(run_episode(env, make_policy(path.stem, policy_context(env)), seed=0).trace["lambda_"]) == 2


def test_the_default_task_has_a_shipped_agent():
    assert (SHIPPED_AGENTS / "mnist-trousers" / "ppo.zip").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "agents").glob("*.yml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("task", TASKS)
def test_every_config_loads_for_every_task_and_holds_no_key_that_nobody_reads(path, task):
    config = load_config(task, path)
    agent = PPO(env=rescaled(task), device="cpu", **config.ppo_arguments())
    assert (agent.n_steps, agent.gamma) == (config.n_steps, config.gamma)
    content = yaml.safe_load(path.read_text())
    assert set(content) <= {"SISSUnlearn-v0", *(f"SISSUnlearn-v0@{name}" for name in TASKS)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SISSUnlearn-v0: {n_step: 3}", "n_step"),
        ("Pendulum-v1: {}", "no entry 'SISSUnlearn-v0'"),
        ("a: [", "cannot read"),
    ],
)
def test_a_bad_config_is_named(text, message, tmp_path):
    (tmp_path / "c.yml").write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_config("gaussians-2d", tmp_path / "c.yml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nothing"], "unknown task"),
        (["--reward", "money"], "reward='money'"),
        (["--n-envs", "0"], "n_envs=0"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing_behind(arguments, message, tmp_path):
    done = train(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
