"""Hyper-parameters of the agents, read from ``configs/agents`` and validated against the algorithm that takes them."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, ValidationError
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise

from agents.hyperparameters import COUNT, POSITIVE, ranges
from unlearn_gym import ENV_ID
from unlearn_gym.errors import SettingsError, describe_validation_error, error_line, shown
from unlearn_gym.files import FormatError, read_yaml
from unlearn_gym.system.values import Checked
from unlearn_gym.tasks import get_task

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "agents"
ALGORITHMS = {
    "ppo": "stable_baselines3:PPO", "a2c": "stable_baselines3:A2C", "sac": "stable_baselines3:SAC",
    "td3": "stable_baselines3:TD3", "ppo_lstm": "sb3_contrib:RecurrentPPO",
}  # fmt: skip
"""Where each algorithm is, by the name that RL Baselines3 Zoo gives it."""
OUR_ARGUMENTS = (
    "self",
    "env",
    "seed",
    "device",
    "tensorboard_log",
    "verbose",
    "_init_setup_model",
    "stats_window_size",
)
RESCALE = {"gymnasium.wrappers.RescaleAction": {"min_action": -1.0, "max_action": 1.0}}
"""What the zoo has to wrap the environment in; ``agents.train`` always rescales so."""


def algorithm_class(name: str) -> type[BaseAlgorithm]:
    """The class of an algorithm; raises ``SettingsError`` with the nearest name, or how to install it."""
    if name not in ALGORITHMS:
        close = difflib.get_close_matches(name, ALGORITHMS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(ALGORITHMS)}"
        raise SettingsError(f"unknown algorithm {name!r}; {hint}")
    module, attribute = ALGORITHMS[name].split(":")
    try:
        found: type[BaseAlgorithm] = getattr(importlib.import_module(module), attribute)
    except ImportError:
        raise SettingsError(f"{name!r} needs sb3-contrib; install it with: pip install 'unlearn_gym[agents]'") from None
    return found


class AgentConfig(Checked):
    """What one entry of a config file says: ``n_timesteps``, ``n_envs``, ``policy`` and the noise of the actions as in
    the zoo, and under ``arguments`` all that goes to the algorithm's constructor.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: str
    n_timesteps: COUNT
    n_envs: COUNT = 1
    policy: str
    env_wrapper: list[dict[str, dict[str, float]]] = Field([RESCALE])
    noise_type: Literal["normal"] | None = None
    noise_std: POSITIVE = 0.1
    arguments: dict[str, Any] = Field({})

    def check_length(self, timesteps: int) -> None:
        """Raise ``SettingsError`` where a training of so many steps would learn nothing."""
        if timesteps < 1:
            raise SettingsError(f"timesteps={timesteps} must be at least 1")
        starts = self.arguments.get("learning_starts", 0)
        if timesteps <= starts:
            raise SettingsError(
                f"timesteps={timesteps} must be above learning_starts={starts}: before, nothing is learned"
            )

    def make(self, env: Any, **more: Any) -> BaseAlgorithm:
        """The agent, untrained; raises ``SettingsError`` with what the algorithm says of a value that it refuses."""
        kind: Any = algorithm_class(self.algorithm)
        if self.noise_type is not None:
            more["action_noise"] = NormalActionNoise(np.zeros(1), np.full(1, self.noise_std))
        try:
            made: BaseAlgorithm = kind(self.policy, env, **copy.deepcopy(self.arguments), **more)
        except (TypeError, ValueError, AssertionError, KeyError) as error:
            raise SettingsError(
                f"{self.algorithm} refuses its settings ({error_line(error)}); mend the config"
            ) from None
        return made


def load_config(algorithm: str, task: str, path: Path | None = None, **changes: Any) -> AgentConfig:
    """The configuration for ``task``, with ``changes`` in place of single values; raises ``SettingsError`` naming the
    key and the value.

    Files are keyed by the environment's id, as the zoo's; an entry ``"<id>@<task>"`` replaces single values for a task.
    """
    known = _constructor_arguments(algorithm)
    path = path or CONFIG_FOLDER / f"{algorithm}.yml"
    try:
        content = read_yaml(path)
    except (OSError, FormatError) as error:
        raise SettingsError(f"cannot read {path} ({error_line(error)}); name a config with --config") from None
    if not isinstance(content, dict) or ENV_ID not in content:
        raise SettingsError(f"{path} has no entry {ENV_ID!r}; key it by the environment's id")
    _check_keys(content, path)
    entry = {**content[ENV_ID], **(content.get(f"{ENV_ID}@{task}") or {}), **changes}
    if "noise_type" in entry and "action_noise" not in known:
        raise SettingsError(f"{path}: noise_type={entry['noise_type']!r} is for td3 and sac; {algorithm} has none")
    if "noise_std" in entry and "noise_type" not in entry:
        raise SettingsError(f"{path}: noise_std={entry['noise_std']!r} goes with noise_type: normal")
    own = {k: entry.pop(k) for k in list(entry) if k in AgentConfig.model_fields}
    for key in entry:
        if key not in known:
            close = difflib.get_close_matches(key, [*known, *AgentConfig.model_fields], n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"{algorithm} takes {', '.join(known)}"
            raise SettingsError(f"{path}: unknown key {shown(key)}; {hint}")
    try:
        arguments = ranges(algorithm, tuple(known)).model_validate(entry).model_dump(exclude_unset=True)
        config = AgentConfig.model_validate({**own, "algorithm": algorithm, "arguments": arguments})
    except ValidationError as error:
        raise SettingsError(f"{path}: {describe_validation_error(error)}") from None
    if config.env_wrapper != [RESCALE]:
        raise SettingsError(
            f"{path}: env_wrapper={shown(config.env_wrapper)} must be {[RESCALE]}: agents act in [-1, 1]; "
            "other wrappers, as a reward of one's own, go with stable-baselines3 itself, see docs/reward.md"
        )
    return config


def _constructor_arguments(algorithm: str) -> list[str]:
    parameters = inspect.signature(algorithm_class(algorithm).__init__).parameters
    return [name for name in parameters if name not in OUR_ARGUMENTS]


def _check_keys(content: dict[Any, Any], path: Path) -> None:
    """Every entry is the environment's, or that of one of its tasks: another would be read by nobody."""
    for key, entry in content.items():
        name, at, task = str(key).partition("@")
        if name != ENV_ID or (at and not task):
            raise SettingsError(f"{path}: nobody reads the entry {shown(key)}; name it {ENV_ID!r} or '{ENV_ID}@<task>'")
        if at:
            get_task(task)
        if not isinstance(entry, dict):
            raise SettingsError(f"{path}: the entry {key!r} is {shown(entry)}; give it keys and values")
