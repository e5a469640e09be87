"""Train a PPO agent: ``python -m agents.train --task mnist-trousers``."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3 import __version__ as sb3_version
from stable_baselines3.common.callbacks import CallbackList, CheckpointCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

import unlearn_gym
from agents.callbacks import UnlearnScalars
from agents.config import load_config
from unlearn_gym import ENV_ID
from unlearn_gym.envs import SB3VecEnv
from unlearn_gym.errors import SettingsError, UnlearnGymError
from unlearn_gym.files import sha256, write_json

FIRST_TRAINING_SEED = 1_000_000
"""Training seeds begin here and validation seeds at twice that; a comparison's begin at 0."""
FIRST_VALIDATION_SEED = 2 * FIRST_TRAINING_SEED


def make_vec_env(task: str, options: dict[str, Any], n_envs: int, seed: int) -> VecEnv:
    """``n_envs`` monitored environments whose actions are rescaled to [-1, 1], in worker processes if more than one."""
    env = gym.make_vec(f"unlearn_gym:{ENV_ID}", num_envs=n_envs, task=task, autoreset_mode="SameStep", **options)
    adapted = VecMonitor(SB3VecEnv(env))
    adapted.seed(seed)
    return adapted


def train(
    task: str = "mnist-trousers",
    reward: Annotated[str, tyro.conf.arg(help="'siss' (the paper's) or 'potential'")] = "siss",
    seed: int = 0,
    timesteps: Annotated[int | None, tyro.conf.arg(help="default: n_timesteps of the config")] = None,
    n_envs: Annotated[int | None, tyro.conf.arg(help="environments; default: n_envs of the config")] = None,
    config: Annotated[Path | None, tyro.conf.arg(help="default: configs/agents/ppo.yml")] = None,
    out: Annotated[Path | None, tyro.conf.arg(help="default: runs/agents/TASK-REWARD-SEED")] = None,
    eval_episodes: Annotated[int, tyro.conf.arg(help="episodes a validation, on held-out seeds")] = 5,
    eval_every: Annotated[int, tyro.conf.arg(help="environment steps between validations")] = 9600,
) -> Path:
    """Train PPO on SISSUnlearn-v0; writes agent.zip, curves and a manifest to --out.

    Steps are rounded up to whole rollouts (n_steps × n_envs). Every --eval-every steps come a validation, which keeps
    the best agent so far as best_model.zip, and a checkpoint.
    """
    settings = load_config(task, config)
    total = settings.n_timesteps if timesteps is None else timesteps
    workers = settings.n_envs if n_envs is None else n_envs
    folder = out or Path("runs/agents") / f"{task}-{reward}-{seed}"
    if total < 1 or workers < 1:
        raise SettingsError(f"timesteps={total} and n_envs={workers} must be at least 1")
    options = {"reward": reward}
    first_seed = FIRST_TRAINING_SEED + seed * 1000
    env = make_vec_env(task, options, workers, first_seed)
    validation = make_vec_env(task, options, workers, FIRST_VALIDATION_SEED)
    folder.mkdir(parents=True, exist_ok=True)
    if workers > 1:
        torch.set_num_threads(1)  # the cores are the workers'
    agent = PPO(
        env=env, seed=first_seed, tensorboard_log=str(folder / "tensorboard"), device="cpu", **settings.ppo_arguments()
    )  # fmt: skip
    started = time.perf_counter()
    try:
        callbacks = _callbacks(folder, validation, eval_episodes, max(eval_every // workers, 1))
        agent.learn(total_timesteps=total, callback=callbacks, tb_log_name="ppo")
    finally:
        env.close()
        validation.close()
    path = folder / "agent.zip"
    agent.save(path)
    manifest = {
        "command": shlex.join(["python", "-m", "agents.train", *sys.argv[1:]]), "task": task, "reward": reward,
        "seed": seed, "training_seeds_from": first_seed, "validation_seeds_from": FIRST_VALIDATION_SEED,
        "timesteps": agent.num_timesteps, "n_envs": workers, "config": settings.model_dump(),
        "seconds": round(time.perf_counter() - started, 1),
        "mean_return_last_100": float(np.mean([info["r"] for info in agent.ep_info_buffer or ()] or [np.nan])),
        "versions": {"unlearn_gym": unlearn_gym.__version__, "stable_baselines3": sb3_version},
        "sha256": sha256(path),
    }  # fmt: skip
    write_json(path.with_suffix(".json"), manifest)
    print(f"{path}: {agent.num_timesteps} steps in {manifest['seconds']} s")
    return path


def _callbacks(folder: Path, validation: VecEnv, eval_episodes: int, every: int) -> CallbackList:
    """Curves, checkpoints, validation on held-out seeds and a progress bar; ``every`` in steps of the vector."""
    evaluate = EvalCallback(
        validation, best_model_save_path=str(folder), log_path=str(folder), n_eval_episodes=eval_episodes,
        eval_freq=every, verbose=0, warn=False,
    )  # fmt: skip
    checkpoint = CheckpointCallback(every, str(folder / "checkpoints"), name_prefix="ppo")
    return CallbackList([UnlearnScalars(), checkpoint, evaluate, ProgressBarCallback()])


def main() -> None:
    """Entry point: a known error becomes one line and exit status 2."""
    try:
        tyro.cli(train, description=train.__doc__)
    except UnlearnGymError as error:
        print(f"agents.train: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
