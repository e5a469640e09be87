"""Gymnasium environments over :class:`unlearn_gym.run.UnlearningRun`: one run, many, and many for SB3."""

from typing import Any

from unlearn_gym.envs.siss_unlearn import SISSUnlearnEnv
from unlearn_gym.envs.vector import SISSUnlearnVectorEnv

__all__ = ["SB3VecEnv", "SISSUnlearnEnv", "SISSUnlearnVectorEnv"]


def __getattr__(name: str) -> Any:
    """Load the adapter when it is asked for: it imports stable-baselines3."""
    if name == "SB3VecEnv":
        from unlearn_gym.envs.sb3 import SB3VecEnv

        return SB3VecEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
