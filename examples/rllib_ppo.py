"""PPO of RLlib on SISSUnlearn-v0.

    pip install "ray[rllib]" && python examples/rllib_ppo.py

RLlib pins an older Gymnasium (1.2.2 for Ray 2.60), with which this package works too.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune import register_env

import unlearn_gym


def make_env(config: dict[str, Any]) -> gym.Env:
    """The environment with actions in [-1, 1]."""
    env = gym.make(unlearn_gym.ENV_ID, **config)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def main(task: str = "gaussians-2d", iterations: int = 5) -> float:
    """Train for some iterations; the mean return of the last one."""
    register_env("unlearn", make_env)
    config = (
        PPOConfig()
        .environment("unlearn", env_config={"task": task})
        .env_runners(num_env_runners=1)
        .training(train_batch_size=480, minibatch_size=120, num_epochs=10, lr=5e-4)
    )
    algorithm = config.build_algo()
    mean = float("nan")
    for i in range(iterations):
        mean = algorithm.train()["env_runners"]["episode_return_mean"]
        print(f"iteration {i + 1}: mean return {mean:.3f}")
    algorithm.stop()
    return mean


if __name__ == "__main__":
    main()
