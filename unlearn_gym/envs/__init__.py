"""Gymnasium environments over :class:`unlearn_gym.run.UnlearningRun`."""

from unlearn_gym.envs.siss_unlearn import SISSUnlearnEnv

__all__ = ["SISSUnlearnEnv"]
