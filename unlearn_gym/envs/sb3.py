"""The vector environment as stable-baselines3 wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.utils import rescale_box
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from unlearn_gym.envs.vector import SISSUnlearnVectorEnv
from unlearn_gym.errors import SettingsError
from unlearn_gym.system.values import numbers_of


class SB3VecEnv(VecEnv):
    """A :class:`SISSUnlearnVectorEnv` with ``autoreset_mode="SameStep"`` as an SB3 ``VecEnv``.

    With ``rescale_actions`` (default) agents act in [-1, 1], mapped linearly to [lambda_min, lambda_max].
    Wrap it in SB3's ``VecMonitor`` for episode statistics. Raises ``SettingsError`` for another autoreset mode
    or another environment.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], *, rescale_actions: bool = True) -> None:
        if not isinstance(env, SISSUnlearnVectorEnv):
            raise SettingsError(f"{env} is no SISSUnlearnVectorEnv; make one with gym.make_vec and do not wrap it")
        mode = env.metadata["autoreset_mode"]
        if mode is not AutoresetMode.SAME_STEP:
            raise SettingsError(f"stable-baselines3 needs autoreset_mode='SameStep', not {mode.value!r}")
        self.env, self.rescale_actions = env, rescale_actions
        own: Any = env.single_action_space
        action_space = own
        if rescale_actions:
            action_space, _, self._to_lambda = rescale_box(own, np.float32(-1), np.float32(1))
        super().__init__(env.num_envs, env.single_observation_space, action_space)
        self.render_mode = env.render_mode
        self._actions: NDArray[Any] = np.zeros((env.num_envs, 1), dtype=np.float32)

    def reset(self) -> NDArray[np.float32]:
        """Begin an episode in every environment, with the seeds of the last :meth:`seed`."""
        options = next((given for given in self._options if given), None)
        obs, self.reset_infos = self.env.reset_list(seed=self._seeds, options=options)
        self._reset_seeds()
        self._reset_options()
        return obs

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions ``(N, 1)`` for :meth:`step_wait`; raises ``ActionError`` for what is none."""
        if not isinstance(actions, np.ndarray) or actions.dtype.kind != "f":
            actions = np.array(numbers_of(actions, self.num_envs), dtype=np.float32)[:, None]
        self._actions = self._to_lambda(actions) if self.rescale_actions else actions

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """One step of every environment; those that ended have ``terminal_observation`` in their info."""
        obs, rewards, terminated, truncated, infos = self.env.step_list(self._actions)
        dones = terminated | truncated
        for i in np.flatnonzero(dones).tolist():
            self.reset_infos[i] = infos[i]
            last, obs_of_last = infos[i].pop("final_info"), infos[i].pop("final_obs")
            infos[i] = {**last, "terminal_observation": obs_of_last}
        for i, info in enumerate(infos):
            info["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return obs, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """End the workers."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the environments named by ``indices`` (None: all)."""
        return self.env.envs.get_attr(attr_name, list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the environments named by ``indices``."""
        self.env.envs.set_attr(attr_name, dict.fromkeys(self._get_indices(indices), value))

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of the environments named by ``indices``."""
        return self.env.envs.call(method_name, args, kwargs, list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No environment is wrapped."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """A frame of every environment."""
        return list(self.env.render())
