"""Hyper-parameters of the agents, read from ``configs/agents`` and validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unlearn_gym import ENV_ID
from unlearn_gym.errors import SettingsError
from unlearn_gym.settings import describe_validation_error

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "agents"


class PolicyKwargs(BaseModel):
    """Network of the agent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    net_arch: list[int] = Field(min_length=1)
    log_std_init: float = 0.0


class PPOConfig(BaseModel):
    """Arguments of stable-baselines3's PPO, under its names, with ``n_timesteps`` and ``n_envs`` as in the zoo."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_timesteps: int = Field(ge=1)
    n_envs: int = Field(ge=1)
    policy: Literal["MlpPolicy"] = "MlpPolicy"
    n_steps: int = Field(ge=2)
    batch_size: int = Field(ge=2)
    n_epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    gamma: float = Field(gt=0, le=1)
    gae_lambda: float = Field(ge=0, le=1)
    clip_range: float = Field(gt=0)
    ent_coef: float = 0.0
    vf_coef: float = Field(0.5, ge=0)
    max_grad_norm: float = Field(0.5, gt=0)
    policy_kwargs: PolicyKwargs

    def ppo_arguments(self) -> dict[str, Any]:
        """What PPO's constructor takes."""
        return self.model_dump(exclude={"n_timesteps", "n_envs"})


def load_config(task: str, path: Path | None = None) -> PPOConfig:
    """The configuration for ``task``; raises ``SettingsError`` naming the key and the value."""
    path = path or CONFIG_FOLDER / "ppo.yml"
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read {path} ({str(error).splitlines()[0]}); name a config with --config") from None
    if not isinstance(content, dict) or ENV_ID not in content:
        raise SettingsError(f"{path} has no entry {ENV_ID!r}; key it by the environment's id")
    try:
        return PPOConfig.model_validate({**content[ENV_ID], **content.get(f"{ENV_ID}@{task}", {})})
    except ValidationError as error:
        raise SettingsError(f"{path}: {describe_validation_error(error)}") from None
