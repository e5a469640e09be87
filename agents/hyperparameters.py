"""What each algorithm takes from a config file, and in which range: stable-baselines3 itself checks few."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from unlearn_gym.policies.sb3_file import NetworkArguments


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("give a number, without quotation marks")
    return value


def _at_least(least: int) -> Any:
    return Annotated[int, BeforeValidator(_number), Field(ge=least)]


def _real(gt: float | None = None, ge: float | None = None, le: float | None = None) -> Any:
    return Annotated[float, BeforeValidator(_number), Field(gt=gt, ge=ge, le=le, allow_inf_nan=False)]


COUNT = Annotated[int, BeforeValidator(_number), Field(ge=1)]
"""A whole number from 1 on, also as ``1.0e+6``."""
POSITIVE = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NOT_NEGATIVE, SHARE = _real(ge=0), _real(ge=0, le=1)
FLAG = Annotated[bool, Field(strict=True)]


class PolicyKwargs(NetworkArguments):
    """``policy_kwargs``: the network, and what its optimizer takes."""

    optimizer_kwargs: dict[str, Any] | None = None


RANGES: dict[str, Any] = {
    "learning_rate": POSITIVE, "n_steps": COUNT, "batch_size": COUNT, "n_epochs": COUNT,
    "gamma": SHARE, "gae_lambda": SHARE, "clip_range": POSITIVE, "clip_range_vf": POSITIVE | None,
    "normalize_advantage": FLAG, "ent_coef": NOT_NEGATIVE, "vf_coef": NOT_NEGATIVE, "max_grad_norm": POSITIVE,
    "use_sde": FLAG, "sde_sample_freq": _at_least(-1), "target_kl": POSITIVE | None,
    "rms_prop_eps": POSITIVE, "use_rms_prop": FLAG,
    "buffer_size": COUNT, "learning_starts": _at_least(0), "tau": _real(gt=0, le=1),
    "train_freq": COUNT | tuple[COUNT, Literal["step", "episode"]],
    "gradient_steps": Literal[-1] | COUNT, "optimize_memory_usage": FLAG,
    "target_update_interval": COUNT, "target_entropy": Literal["auto"] | _real(), "use_sde_at_warmup": FLAG,
    "policy_delay": COUNT, "target_policy_noise": NOT_NEGATIVE, "target_noise_clip": NOT_NEGATIVE,
    "policy_kwargs": PolicyKwargs | None,
    "rollout_buffer_kwargs": dict[str, Any] | None, "replay_buffer_kwargs": dict[str, Any] | None,
    "rollout_buffer_class": None, "replay_buffer_class": None, "action_noise": None,  # objects: not from a file
}  # fmt: skip
OWN_RANGES: dict[str, dict[str, Any]] = {
    "sac": {"ent_coef": Annotated[str, Field(pattern=r"^auto(_\d+(\.\d+)?)?$")] | NOT_NEGATIVE},
    "ppo_lstm": {"batch_size": COUNT | None},
}
"""What means something else for one algorithm."""


@cache
def ranges(algorithm: str, names: tuple[str, ...]) -> type[BaseModel]:
    """A schema of an algorithm's constructor arguments ``names``, none of them required."""
    kinds = {**RANGES, **OWN_RANGES.get(algorithm, {})}
    fields: dict[str, Any] = {name: (kinds.get(name, Any), None) for name in names}
    return create_model(f"{algorithm}_arguments", __config__=ConfigDict(extra="forbid"), **fields)
