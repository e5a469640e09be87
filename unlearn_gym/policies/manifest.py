"""What stands beside an agent's zip: a JSON file of the same name that says how it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from unlearn_gym.errors import PolicyError
from unlearn_gym.files import read_json_as


class Validation(BaseModel):
    """The end of a stage of training: environment steps so far, and returns on the validation's seeds."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    timesteps: int = Field(ge=0)
    returns: list[float] = Field(min_length=1)


class AgentManifest(BaseModel):
    """How an agent was trained, as far as anything is read from it; what is None is not known."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    algorithm: str | None = None
    task: str | None = None
    tasks: list[str] | None = None
    instances: str | None = None
    options: dict[str, Any] | None = None
    reward: str | None = None
    observation: str | None = None
    seed: int | None = None
    timesteps: int | None = Field(None, ge=0)
    seconds: float | None = Field(None, ge=0)
    sha256: str | None = None
    validation: list[Validation] | None = None
    static_returns: dict[str, float] | None = None


class ShippedManifest(AgentManifest):
    """The manifest of an agent that ships: every field that is displayed is required."""

    algorithm: str
    reward: str
    seed: int
    timesteps: int = Field(ge=0)
    seconds: float = Field(ge=0)
    sha256: str
    validation: list[Validation] = Field(min_length=1)
    static_returns: dict[str, float] = Field(min_length=1)


def read_manifest(agent: Path) -> AgentManifest:
    """The manifest of the agent in the file ``agent``; an empty one if there is no file.

    Raises :class:`PolicyError` for a file of that name that is no manifest.
    """
    try:
        return read_json_as(
            agent.with_suffix(".json"), AgentManifest, PolicyError, f"restore it, or move it from {agent}"
        )
    except FileNotFoundError:
        return AgentManifest()
