"""A Gymnasium environment around a live machine-unlearning run of a diffusion model.

Importing this package registers ``SISSUnlearn-v0`` and loads neither torch nor any data.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from unlearn_gym.system.interrupts import quiet_until_begun

quiet_until_begun()  # before all that takes time

import gymnasium  # noqa: E402

try:
    __version__ = version("unlearn_gym")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

ENV_ID = "SISSUnlearn-v0"


def register_envs() -> None:
    """Register the environment ids; calling it again changes nothing."""
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(
            id=ENV_ID,
            entry_point="unlearn_gym.envs.siss_unlearn:SISSUnlearnEnv",
            vector_entry_point="unlearn_gym.envs.vector:SISSUnlearnVectorEnv",
        )


register_envs()
