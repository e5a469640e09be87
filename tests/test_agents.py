"""Training an agent, using it as a policy, and agents that do not fit."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from agents.callbacks import UnlearnScalars
from agents.config import ALGORITHMS, _constructor_arguments, algorithm_class, load_config
from agents.enjoy import enjoy
from agents.hyperparameters import RANGES
from agents.main import run_command
from agents.train import train as train_command
from agents.training import FIRST_VALIDATION_SEED, Plan, read_stages, static_returns, train_agent
from unlearn_gym.comparison.comparison import Comparison
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import LockError, PolicyError, SettingsError
from unlearn_gym.files import sha256
from unlearn_gym.policies import make_policy
from unlearn_gym.policies.episode import policy_context, run_episode
from unlearn_gym.policies.registry import SHIPPED_AGENTS
from unlearn_gym.tasks.instances import load_instances
from unlearn_gym.tasks.saving import load_model

from .conftest import TASKS
from .test_policies import CONTEXT, OBS, info

LOW, HIGH = np.float32(-1), np.float32(1)
ROOT = Path(__file__).resolve().parent.parent


def rescaled(task: str = "gaussians-2d"):
    return gym.wrappers.RescaleAction(gym.make("SISSUnlearn-v0", task=task, horizon=4), LOW, HIGH)


SMALL = {
    "ppo": {"n_steps": 8, "batch_size": 8}, "a2c": {"n_steps": 8}, "ppo_lstm": {"n_steps": 8, "batch_size": 8},
    "sac": {"learning_starts": 6, "batch_size": 8, "train_freq": 4}, "td3": {"learning_starts": 6, "batch_size": 8},
}  # fmt: skip


def small_plan(algorithm: str, **changes: Any) -> Plan:
    config = load_config(algorithm, "gaussians-2d", **SMALL[algorithm])
    return dataclasses.replace(Plan(config, ("gaussians-2d",), None, {"horizon": 4}, 0, 2, 16, 2), **changes)


def parameters(agent: BaseAlgorithm) -> list[Any]:
    return [p.detach().clone() for p in agent.policy.parameters()]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_interrupted_and_resumed_training_equals_uninterrupted(algorithm, tmp_path):
    def stop(stage):
        raise KeyboardInterrupt

    plan = small_plan(algorithm, n_envs=1)
    whole = train_agent(plan, tmp_path / "whole", 48, callbacks=[], stage_done=lambda stage: None)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_agent(plan, tmp_path / "parts", 48, callbacks=[], stage_done=stop)
    parts = train_agent(plan, tmp_path / "parts", 48, callbacks=[], stage_done=lambda stage: None)
    assert whole.num_timesteps == parts.num_timesteps >= 48
    assert all(map(torch.equal, parameters(whole), parameters(parts)))
    assert len(read_stages(plan, tmp_path / "parts")) == 3
    untrained = plan.config.make(plan.make_env(), seed=plan.stage_seed(0))
    assert not all(map(torch.equal, parameters(whole), parameters(untrained)))


@pytest.mark.parametrize(
    "what",
    [
        {"tasks": (), "instances": "gaussians-2d/train", "options": {}, "n_envs": 1, "eval_episodes": 1},
        {"tasks": ("gaussians-2d", "gaussians-2d:3"), "n_envs": 2},
    ],
)
def test_training_on_a_set_resumes_exactly_too(what, tmp_path):
    plan = small_plan("ppo", **what)
    whole = train_agent(plan, tmp_path / "whole", 32, callbacks=[], stage_done=lambda stage: None)
    train_agent(plan, tmp_path / "parts", 16, callbacks=[], stage_done=lambda stage: None)
    parts = train_agent(plan, tmp_path / "parts", 32, callbacks=[], stage_done=lambda stage: None)
    assert all(map(torch.equal, parameters(whole), parameters(parts)))


def test_a_worker_that_dies_does_not_end_the_training(tmp_path):
    class Kill(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 8:
                self.training_env.venv.env.envs.workers[0].process.kill()
            return True

    plan = small_plan("ppo")
    with pytest.warns(UserWarning, match="worker 0 died"):
        agent = train_agent(plan, tmp_path, 16, callbacks=[Kill(), UnlearnScalars()], stage_done=lambda stage: None)
    assert agent.num_timesteps == 16


def test_a_killed_training_goes_on_to_the_same_agent(tmp_path):
    """Killed by the system between the checkpoint and the note that names it: that stage is made again."""
    script = (
        "import os, sys; from pathlib import Path; import agents.training as t\n"
        "from tests.test_agents import small_plan\n"
        "t.write_json = lambda *a: os.kill(os.getpid(), 9)\n"
        "t.train_agent(small_plan('sac', n_envs=1), Path(sys.argv[1]), 32, callbacks=[], stage_done=print)\n"
    )
    plan = small_plan("sac", n_envs=1)
    train_agent(plan, tmp_path / "parts", 16, callbacks=[], stage_done=lambda stage: None)
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "parts")], cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert [p.name for p in (tmp_path / "parts" / "checkpoints").iterdir() if p.name != "16"]
    parts = train_agent(plan, tmp_path / "parts", 32, callbacks=[], stage_done=lambda stage: None)
    whole = train_agent(plan, tmp_path / "whole", 32, callbacks=[], stage_done=lambda stage: None)
    assert all(map(torch.equal, parameters(whole), parameters(parts)))


def test_changed_instances_are_another_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for horizon in (4, 5):
        one = {"task": "gaussians-2d", "horizon": horizon}
        Path("mine.json").write_text(json.dumps({"train": [one], "test": [{"task": "gaussians-2d:3"}]}))
        plan = small_plan("ppo", tasks=(), instances="mine.json/train", options={})
        if horizon == 4:
            train_agent(plan, tmp_path / "out", 16, callbacks=[], stage_done=lambda stage: None)
    with pytest.raises(SettingsError, match="another instances"):
        train_agent(plan, tmp_path / "out", 16, callbacks=[], stage_done=lambda stage: None)


def test_enjoy_leaves_a_gif_and_the_trace(tmp_path):
    enjoy("static:0.3", task="gaussians-2d", frame_every=30, out=tmp_path)
    with Image.open(tmp_path / "episode.gif") as gif:
        assert gif.n_frames == 3
    rows = list(csv.DictReader((tmp_path / "lambda.csv").read_text().splitlines()))
    assert [float(row["lambda_"]) for row in rows] == pytest.approx([0.3] * 60)
    env = SISSUnlearnEnv("gaussians-2d")
    run_episode(env, make_policy("static:0.3", policy_context(env)), seed=0)
    found, expected = load_model(tmp_path / "model.safetensors").state_dict(), env.run.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(SettingsError, match="instance=99"):
        enjoy("static:0.3", instances="gaussians-2d/test", instance=99, out=tmp_path)
    with pytest.raises(SettingsError, match="instance=1 goes with"):
        enjoy("static:0.3", task="gaussians-2d", instance=1, out=tmp_path)


def test_stages_draw_episodes_of_their_own_and_none_of_another_training():
    plans = [small_plan("ppo", seed=seed) for seed in range(3)]
    seeds = [plan.stage_seed(stage) + env for plan in plans for stage in range(50) for env in range(plan.n_envs)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 1_000_000
    assert max(seeds) < FIRST_VALIDATION_SEED


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The plan and the folder of a training that stopped after its first stage."""
    plan, folder = small_plan("sac"), tmp_path_factory.mktemp("stopped")
    train_agent(plan, folder, 16, callbacks=[], stage_done=lambda stage: None)
    return plan, folder


def test_another_training_in_the_folder_is_refused_and_left_alone(stopped, tmp_path):
    plan, folder = stopped
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(SettingsError, match="another seed; choose another --out"):
        train_agent(dataclasses.replace(plan, seed=1), tmp_path, 16, callbacks=[], stage_done=lambda stage: None)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("damage", [b"", b"{}", b"no json"])
@pytest.mark.parametrize(
    "file",
    ["progress.json", "checkpoints/16/agent.zip", "checkpoints/16/counters.json", "checkpoints/16/replay.npz"],
)
def test_a_damaged_checkpoint_is_named(file, damage, stopped, tmp_path):
    plan, folder = stopped
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes(damage)
    with pytest.raises(SettingsError, match="damaged") as caught:
        train_agent(plan, tmp_path, 32, callbacks=[], stage_done=lambda stage: None)
    assert "\n" not in str(caught.value)


def test_no_changed_digit_of_a_trainings_progress_is_believed(stopped, tmp_path):
    plan, folder = stopped
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "progress.json"
    content = json.loads(path.read_text())
    (stage,) = content["stages"]
    for changed in ({"returns": [0.0, 0.0]}, {"timesteps": 8}, {"returns": []}, {"timesteps": "16"}, {"seconds": None}):
        path.write_text(json.dumps({**content, "stages": [{**stage, **changed}]}))
        with pytest.raises(SettingsError, match="damaged"):
            train_agent(plan, tmp_path, 32, callbacks=[], stage_done=lambda stage: None)


def test_a_training_in_use_is_left_alone(locked):
    with pytest.raises(LockError, match="in use"):
        train_agent(small_plan("ppo"), locked, 16, callbacks=[], stage_done=lambda stage: None)


def test_a_trained_agent_is_a_policy(tmp_path, monkeypatch):
    config = tmp_path / "ppo.yml"
    config.write_text((ROOT / "configs" / "agents" / "ppo.yml").read_text().replace("n_steps: 240", "n_steps: 120"))
    arguments = (
        "--task", "gaussians-2d", "--timesteps", "480", "--config", str(config), "--out", "agent",
        "--eval-every", "240", "--eval-episodes", "1", "--n-envs", "1",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["agents.train", *arguments])
    run_command("train", train_command)
    folder = tmp_path / "agent"
    manifest = json.loads((folder / "agent.json").read_text())
    assert manifest["timesteps"] == 480
    assert manifest["training_seeds_from"] >= 1_000_000
    assert [stage["timesteps"] for stage in manifest["validation"]] == [240, 480]
    assert (folder / "best_model.zip").exists()
    assert {p.parent.name for p in (folder / "checkpoints").rglob("agent.zip")} == {"240", "480"}
    tags = b"".join(p.read_bytes() for p in (folder / "tensorboard").rglob("events.*"))
    for tag in (
        b"unlearn/lambda",
        b"unlearn/forget_loss",
        b"rollout/ep_rew_mean",
        b"train/approx_kl",
        b"eval/mean_return",
    ):
        assert tag in tags
    env = SISSUnlearnEnv("gaussians-2d", horizon=5)
    episode = run_episode(env, make_policy(str(folder / "agent.zip"), policy_context(env)), seed=0)
    assert all(0.1 <= v <= 0.9 for v in episode.trace["lambda_"])
    before = (folder / "agent.zip").read_bytes()
    run_command("train", train_command)  # finished already
    assert sha256(folder / "best_model.zip") in {
        stage["sha256"] for stage in json.loads((folder / "progress.json").read_text())["stages"]
    }
    assert zipfile.ZipFile(io.BytesIO(before)).read("policy.pth") == zipfile.ZipFile(folder / "agent.zip").read(
        "policy.pth"
    )


@pytest.mark.parametrize("algorithm", [A2C, PPO, SAC, TD3, RecurrentPPO])
def test_every_algorithms_zip_is_recognised(algorithm, tmp_path):
    agent = algorithm("MlpLstmPolicy" if algorithm is RecurrentPPO else "MlpPolicy", rescaled(), device="cpu")
    agent.save(tmp_path / "a.zip")
    policy = make_policy(str(tmp_path / "a.zip"), CONTEXT)
    assert type(policy.network) is type(agent.policy)
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
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["sha256"] == sha256(path)
    trained_on = [i.task for i in load_instances(manifest["instances"])] if manifest["instances"] else manifest["tasks"]
    assert path.parent.name in {name.partition(":")[0] for name in trained_on}
    assert manifest["reward"] == ("potential" if path.stem.endswith("-potential") else "siss")
    assert ("-instances" in path.stem) == (manifest["instances"] is not None)
    assert path.stem.partition("-")[0] == manifest["algorithm"]
    assert min(manifest["training_seeds_from"], manifest["validation_seeds_from"]) >= 1_000_000
    env = SISSUnlearnEnv(path.parent.name, horizon=2)
    assert len(run_episode(env, make_policy(path.stem, policy_context(env)), seed=0).trace["lambda_"]) == 2


def test_an_agent_of_another_task_or_a_folder_is_named_with_the_remedy(tmp_path):
    with pytest.raises(PolicyError, match="no such agent ships for task 'gaussians-2d:2'"):
        Comparison("gaussians-2d:2", ("ppo",), (0,)).cell_keys()
    (tmp_path / "agent.zip").touch()
    with pytest.raises(PolicyError, match=r"is a folder; its agent is '.*agent\.zip'"):
        make_policy(str(tmp_path), CONTEXT)


def test_a_finished_training_is_left_as_it_is(tmp_path, capsys):
    arguments = {"task": ("gaussians-2d",), "n_envs": 1, "eval_every": 240, "eval_episodes": 1, "out": tmp_path}
    agents = train_command(timesteps=240, **arguments)
    before = agents.with_suffix(".json").read_bytes()
    train_command(timesteps=60, **arguments)
    assert "trained already" in capsys.readouterr().out
    assert agents.with_suffix(".json").read_bytes() == before


def test_enjoy_takes_task_and_observation_from_the_agents_manifest(tmp_path):
    arguments = {"n_envs": 1, "eval_every": 240, "eval_episodes": 1, "timesteps": 60, "out": tmp_path}
    agent = train_command(task=("gaussians-2d:3",), observation="extended", **arguments)
    enjoy(str(agent), frame_every=60, out=tmp_path / "seen")
    assert (tmp_path / "seen" / "episode.gif").is_file()


def test_options_reach_the_environment_and_the_manifest(tmp_path):
    arguments = {"task": ("gaussians-2d",), "n_envs": 1, "eval_every": 240, "eval_episodes": 1, "timesteps": 60}
    agent = train_command(option=("horizon=7", "smoothness_coef=0"), out=tmp_path, **arguments)
    manifest = json.loads(agent.with_suffix(".json").read_text())
    assert manifest["options"] == {"horizon": 7, "smoothness_coef": 0}
    assert np.isfinite(manifest["validation"][0]["training_return"])
    with pytest.raises(SettingsError, match="another options"):
        train_command(option=("horizon=8",), out=tmp_path, **arguments)


@pytest.mark.parametrize("n_envs", [1, 2, 3])
def test_a_validation_is_a_plain_loop_over_its_seeds_for_any_number_of_environments(n_envs):
    plan = small_plan("ppo", n_envs=n_envs, eval_episodes=4)
    env = SISSUnlearnEnv("gaussians-2d", horizon=4)

    def episode(lambda_: float, seed: int) -> float:
        env.reset(seed=FIRST_VALIDATION_SEED + seed)
        return sum(env.step(lambda_)[1] for _ in range(4))

    lambdas = (0.1, 0.3, 0.5, 0.7, 0.9)
    expected = {f"static:{x}": sum(episode(x, seed) for seed in range(4)) / 4 for x in lambdas}
    assert static_returns(plan) == pytest.approx(expected, rel=1e-4)


def test_a_training_interrupted_while_static_policies_are_measured_is_finished_by_the_same_command(
    tmp_path, monkeypatch
):
    arguments = {"task": ("gaussians-2d",), "n_envs": 1, "eval_every": 240, "eval_episodes": 1, "out": tmp_path}
    train_command(timesteps=240, **arguments)

    def interrupt(plan):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("agents.train.static_returns", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_command(timesteps=480, **arguments)
    agent = train_command(timesteps=480, **arguments)
    manifest = json.loads(agent.with_suffix(".json").read_text())
    assert manifest["timesteps"] == 480
    assert manifest["sha256"] == sha256(agent)


def test_an_episode_that_a_dying_worker_spoilt_is_validated_again(monkeypatch):
    plan = small_plan("ppo", options={"horizon": 20}, eval_episodes=4)
    expected = static_returns(plan)
    env = plan.make_env()
    monkeypatch.setattr(Plan, "make_env", lambda self: env)
    killed = []
    real = type(env).step_wait

    def step_wait(self):
        if not killed:
            killed.append(env.venv.env.envs.workers[0].process.pid)
            os.kill(killed[0], 9)
        return real(self)

    monkeypatch.setattr(type(env), "step_wait", step_wait)
    with pytest.warns(UserWarning, match="died"):
        assert static_returns(plan) == pytest.approx(expected, rel=1e-4)


def test_enjoy_pays_the_reward_that_the_agent_was_trained_on(tmp_path, capsys):
    arguments = {"n_envs": 1, "eval_every": 240, "eval_episodes": 1, "timesteps": 60, "out": tmp_path}
    agent = train_command(task=("gaussians-2d",), reward="potential", option=("smoothness_coef=0",), **arguments)
    episode = enjoy(str(agent), frame_every=60, out=tmp_path / "seen")
    env = SISSUnlearnEnv("gaussians-2d", reward="potential", smoothness_coef=0)
    again = run_episode(env, make_policy(str(agent), policy_context(env)), seed=0)
    assert episode.episode_return == pytest.approx(again.episode_return)


def test_enjoy_shows_an_agent_of_several_tasks_or_of_a_set_on_what_it_was_trained_on(tmp_path, capsys):
    arguments = {"n_envs": 1, "eval_every": 240, "eval_episodes": 1, "timesteps": 60}
    several = train_command(task=("gaussians-2d:3", "gaussians-2d"), out=tmp_path / "a", **arguments)
    own_set = train_command(instances="gaussians-2d/train", out=tmp_path / "b", **arguments)
    assert "best static λ: static:" in capsys.readouterr().out
    for agent, task in ((several, "gaussians-2d:3"), (own_set, load_instances("gaussians-2d/train")[0].task)):
        enjoy(str(agent), frame_every=60, out=tmp_path / "seen")
        assert capsys.readouterr().out.startswith(f"task {task},")
    with pytest.raises(SettingsError, match="beside instances"):
        enjoy("static:0.5", task="gaussians-2d", instances="gaussians-2d/test", out=tmp_path / "seen")


def test_the_default_task_has_a_shipped_agent():
    assert (SHIPPED_AGENTS / "mnist-trousers" / "ppo.zip").is_file()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("task", TASKS)
def test_every_config_makes_an_agent_for_every_task(algorithm, task):
    config = load_config(algorithm, task)
    agent = config.make(rescaled("gaussians-2d"), device="cpu")
    assert type(agent) is algorithm_class(algorithm)
    for name in ("gamma", "learning_rate"):
        assert getattr(agent, name) == config.arguments[name]


@pytest.mark.parametrize(
    ("algorithm", "text", "message"),
    [
        ("ppo", "SISSUnlearn-v0: {n_timesteps: 9, policy: MlpPolicy, n_step: 3}", "'n_step'; did you mean 'n_steps'"),
        ("sac", "SISSUnlearn-v0: {n_timesteps: 9, policy: MlpPolicy, clip_range: 3}", "'clip_range'; sac takes"),
        ("ppo", "SISSUnlearn-v0: {n_timesteps: 9, policy: MlpPolicy, noise_type: normal}", "noise_type='normal'"),
        ("ppo", "SISSUnlearn-v0: {policy: MlpPolicy}", "n_timesteps"),
        ("ppo", "SISSUnlearn-v0: {n_timesteps: many, policy: MlpPolicy}", "n_timesteps='many'"),
        ("ppo", "Pendulum-v1: {}", "no entry 'SISSUnlearn-v0'"),
        (
            "ppo",
            "{SISSUnlearn-v0: {n_timesteps: 9, policy: MlpPolicy}, Pendulum-v1: {}}",
            "nobody reads the entry 'Pend",
        ),
        ("ppo", "SISSUnlearn-v0: {n_timesteps: 9, policy: MlpPolicy, env_wrapper: [a]}", "env_wrapper"),
        ("ppo", "a: [", "cannot read"),
        ("ppo", "{SISSUnlearn-v0: {n_timesteps: 9, policy: MlpPolicy}, SISSUnlearn-v0@gaussians-2d: [1]}", r"is \[1\]"),
        ("td3", "SISSUnlearn-v0: {n_timesteps: 9, policy: MlpPolicy, noise_std: 1}", "noise_std=1 goes with"),
        ("pppo", "", "did you mean 'ppo'"),
    ],
)
def test_a_bad_config_is_named(algorithm, text, message, tmp_path):
    (tmp_path / "c.yml").write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_config(algorithm, "gaussians-2d", tmp_path / "c.yml")
    assert "\n" not in str(caught.value)


def test_a_value_that_the_algorithm_refuses_is_one_line():
    with pytest.raises(SettingsError, match="ppo refuses its settings"):
        load_config("ppo", "gaussians-2d", policy="MlpPolice").make(rescaled())
    with pytest.raises(SettingsError, match="ppo refuses its settings"):
        load_config("ppo", "gaussians-2d", batch_size=1).make(rescaled())


OUT_OF_RANGE = [
    ("ppo", "gamma", 5), ("ppo", "gamma", -0.1), ("ppo", "gamma", float("nan")), ("ppo", "gamma", "0.9"),
    ("ppo", "n_epochs", -1), ("ppo", "n_epochs", 0), ("ppo", "n_epochs", 1.5), ("ppo", "n_epochs", True),
    ("ppo", "clip_range", -5), ("ppo", "clip_range", 0), ("ppo", "clip_range_vf", -1), ("ppo", "gae_lambda", 1.1),
    ("ppo", "learning_rate", "fast"), ("ppo", "learning_rate", "1e-3"), ("ppo", "learning_rate", float("inf")),
    ("ppo", "learning_rate", -1), ("ppo", "n_steps", 0), ("ppo", "batch_size", None), ("ppo", "ent_coef", -1),
    ("ppo", "ent_coef", "auto"), ("ppo", "vf_coef", -1), ("ppo", "max_grad_norm", 0), ("ppo", "target_kl", -1),
    ("ppo", "normalize_advantage", 1), ("ppo", "use_sde", "yes"), ("ppo", "sde_sample_freq", -2),
    ("ppo", "rollout_buffer_class", "mine"), ("ppo", "policy_kwargs", {"net_arch": [0]}),
    ("ppo", "policy_kwargs", {"net_arch": [10**6]}), ("ppo", "policy_kwargs", {"net_arc": [8]}),
    ("ppo", "n_envs", "4"), ("ppo", "n_envs", True), ("ppo", "n_timesteps", 0), ("a2c", "rms_prop_eps", 0),
    ("sac", "tau", 0), ("sac", "tau", 2), ("sac", "ent_coef", "auto_x"), ("sac", "ent_coef", -1),
    ("sac", "train_freq", 0), ("sac", "train_freq", [1, "day"]), ("sac", "gradient_steps", 0),
    ("sac", "gradient_steps", -2), ("sac", "learning_starts", -1), ("sac", "buffer_size", 0),
    ("sac", "action_noise", 0.1), ("sac", "target_update_interval", 0), ("td3", "policy_delay", 0),
    ("td3", "target_policy_noise", -0.1), ("td3", "target_noise_clip", -1), ("td3", "noise_std", float("inf")),
    ("ppo_lstm", "policy_kwargs", {"lstm_hidden_size": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "name", "value"), OUT_OF_RANGE)
def test_a_hyper_parameter_out_of_its_range_is_refused_by_name_and_value(algorithm, name, value):
    with pytest.raises(SettingsError, match=name) as caught:
        load_config(algorithm, "gaussians-2d", **{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("sac", {"ent_coef": "auto_0.1", "train_freq": [1, "episode"], "gradient_steps": -1, "target_entropy": -2}),
        ("ppo", {"gamma": 1, "n_steps": 64.0, "batch_size": 64, "clip_range_vf": None, "target_kl": 0.1}),
        ("ppo_lstm", {"policy_kwargs": {"n_lstm_layers": 2, "optimizer_kwargs": {"eps": 1e-5}}}),
        ("a2c", {"policy_kwargs": {"net_arch": {"pi": [4], "vf": [4, 4]}}, "use_rms_prop": False}),
    ],
)
def test_a_hyper_parameter_within_its_range_reaches_the_algorithm(algorithm, changes):
    agent = load_config(algorithm, "gaussians-2d", **changes).make(rescaled(), device="cpu")
    if algorithm == "sac":
        assert (agent.train_freq.frequency, agent.train_freq.unit.value) == (1, "episode")
    if algorithm == "ppo":
        assert (agent.n_steps, agent.gamma, agent.target_kl) == (64, 1, 0.1)
    if algorithm == "a2c":
        assert agent.policy_kwargs == changes["policy_kwargs"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_argument_of_every_algorithm_has_a_range(algorithm):
    assert set(_constructor_arguments(algorithm)) - {"policy"} <= RANGES.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nothing"], "unknown task"),
        (["--reward", "money"], "reward='money'"),
        (["--n-envs", "0"], "n_envs=0"),
        (["--algo", "sca"], "did you mean 'sac'"),
        (["--eval-episodes", "0"], "eval_episodes=0"),
        (["--timesteps", "0"], "timesteps=0"),
        (["--seed", "100"], "seed=100"),
        (["--device", "nope"], "device 'nope' cannot be used"),
        (["--task", "gaussians-2d", "--task", "nonsense"], "unknown task"),
        (["--task", "gaussians-2d", "--instances", "gaussians-2d/train"], "not both"),
        (["--algo", "sac", "--timesteps", "600"], "timesteps=600 must be above learning_starts=600"),
        (["--instances", "gaussians-2d/tray"], "must end in /train or /test"),
        (["--option", "reward=potential"], "give it as --reward"),
        (["--option", "horizn=5"], "did you mean 'horizon'"),
        (["--option", "horizon"], "must be name=value"),
        (["--option", "task=gaussians-2d"], "'task' is no run setting"),
        (["--option", "render_mode=rgb_array"], "'render_mode' is no run setting"),
        (["--option", "backend=serial"], "'backend' is no run setting"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing_behind(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["agents.train", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command("train", train_command)
    printed = capsys.readouterr().err
    assert ended.value.code == 2, printed
    assert message in printed.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_bad_arguments_of_the_command_itself(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "agents.train", "--n-envs", "0"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("agents.train: n_envs=0")
    assert "Traceback" not in done.stderr
