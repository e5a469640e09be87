"""SISSUnlearn-v0 in TorchRL: a ``GymEnv`` with transforms, and a rollout of a random policy.

pip install torchrl && python examples/torchrl_env.py
"""

from __future__ import annotations

from torchrl.envs import Compose, GymEnv, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

import unlearn_gym  # noqa: F401 - registers SISSUnlearn-v0


def main(task: str = "gaussians-2d") -> float:
    """The return of one episode."""
    env = TransformedEnv(GymEnv("SISSUnlearn-v0", task=task), Compose(StepCounter(), RewardSum()))
    check_env_specs(env)
    env.set_seed(0)
    episode = env.rollout(max_steps=1000)
    total = episode["next", "episode_reward"][-1].item()
    low, high = episode["action"].min().item(), episode["action"].max().item()
    print(f"{len(episode)} updates, λ from {low:.2f} to {high:.2f}, return {total:.2f}")
    return total


if __name__ == "__main__":
    main()
