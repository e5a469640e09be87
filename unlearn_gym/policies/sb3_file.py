"""What the zip of a stable-baselines3 agent says in plain text, and its weights: nothing in it is unpickled.

The zip's entry ``data`` is JSON. What JSON does not know stands there as a pickle, under ``":serialized:"``, with a
description in plain text beside it. The pickles can run any code and are never decoded here; the descriptions choose
from the tables below, so that one that lies can at most make an agent that acts otherwise.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from unlearn_gym.errors import PolicyError, describe_validation_error, error_line

MAX_BYTES = {"data": 64 << 20, "policy.pth": 1 << 30}
"""Unpacked sizes above which an entry is not read: agents of some dozen observations take a hundredth."""
MAX_WIDTH, MAX_DEPTH = 4096, 16
ACTIVATIONS: dict[str, type[nn.Module]] = {
    f"<class 'torch.nn.modules.activation.{kind.__name__}'>": kind
    for kind in (nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Hardtanh)
} | {"<class 'torch.nn.modules.linear.Identity'>": nn.Identity}
"""Activations by what stands in plain text beside their pickles."""
RECURRENT = "RecurrentActorCriticPolicy"
POLICY_CLASSES = {
    "ActorCriticPolicy": "stable_baselines3.common.policies",
    "SACPolicy": "stable_baselines3.sac.policies",
    "TD3Policy": "stable_baselines3.td3.policies",
    RECURRENT: "sb3_contrib.common.recurrent.policies",
}
"""The policies that PPO, A2C, TRPO, SAC, TD3, DDPG and RecurrentPPO save, and their modules."""
ON_POLICY = ("ActorCriticPolicy", RECURRENT)
"""The policies of algorithms that learn on policy, which also give them ``use_sde``."""
FLATTEN = "<class 'stable_baselines3.common.torch_layers.FlattenExtractor'>"
TRAINING_ONLY = ("optimizer_class", "optimizer_kwargs", "device")
"""Arguments of a policy that have no part in how it acts."""


class PickleNeededError(PolicyError):
    """An agent that cannot be rebuilt from its plain text and its weights alone."""


def needs_pickles(path: Path, reason: str) -> PickleNeededError:
    """The error that says what is missing, and what opens the file all the same."""
    return PickleNeededError(
        f"{path}: {reason}; only unpickling it would tell, and that can run any code: if you trust the file's source, "
        "add --trust (in Python trust=True)"
    )


def _numbers(text: Any) -> Any:
    """``"[-5.  0.1]"``, as numpy prints an array, as numbers."""
    return tuple(float(part) for part in text.strip("[]").split()) if isinstance(text, str) else text


Size = Annotated[int, Field(strict=True, ge=1, le=MAX_WIDTH)]
Layers = Annotated[list[Size], Field(max_length=MAX_DEPTH)]
Flag = Annotated[bool, Field(strict=True)]
Bounds = Annotated[tuple[float, ...], BeforeValidator(_numbers)]


class SpaceText(BaseModel):
    """A space as its plain text has it: its shape, and of a box its bounds, row by row."""

    shape: tuple[int, ...] | None = Field(None, alias="_shape")
    low: Bounds | None = None
    high: Bounds | None = None


class NetworkArguments(BaseModel):
    """The arguments of a policy's constructor that are plain data and decide how it acts."""

    model_config = ConfigDict(extra="forbid")

    net_arch: Layers | dict[str, Layers] | None = None
    ortho_init: Flag = True
    use_sde: Flag = False
    log_std_init: float = 0.0
    full_std: Flag = True
    use_expln: Flag = False
    squash_output: Flag = False
    clip_mean: float = 2.0
    n_critics: Annotated[int, Field(strict=True, ge=1, le=64)] = 2
    share_features_extractor: Flag = True
    normalize_images: Flag = True
    lstm_hidden_size: Size = 256
    n_lstm_layers: Annotated[int, Field(strict=True, ge=1, le=MAX_DEPTH)] = 1
    shared_lstm: Flag = False
    enable_critic_lstm: Flag = True
    lstm_kwargs: dict[str, bool | Annotated[int, Field(ge=0, le=MAX_WIDTH)] | float] | None = None


class PolicyArguments(NetworkArguments):
    """The same in a zip, where classes stand as text; an argument that is not here is unknown."""

    activation_fn: str | None = None
    features_extractor_class: str = FLATTEN
    features_extractor_kwargs: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class AgentFile(NamedTuple):
    """The plain parts of a zip: the policy's class by its name in ``POLICY_CLASSES``, the keyword arguments to make it
    with, the spaces that it was trained on, and the weights.
    """

    policy_class: str
    arguments: dict[str, Any]
    observation: SpaceText
    action: SpaceText
    weights: dict[str, Tensor]


def read_agent(path: Path) -> AgentFile:
    """The plain parts of ``path``, a zip that :meth:`stable_baselines3.PPO.save` or its like has written.

    Raises :class:`PolicyError` for another file, and :class:`PickleNeededError` for an agent whose class, network or
    spaces are told by its pickles alone.
    """
    data = read_data(path)
    observation, action = (_space(path, data, name) for name in ("observation_space", "action_space"))
    policy_class = _policy_class(path, data)
    arguments = _arguments(path, data, policy_class)
    return AgentFile(policy_class, arguments, observation, action, _weights(path))


def read_data(path: Path) -> dict[str, Any]:
    """The JSON of the entry ``data``, pickles and all, as text. Raises :class:`PolicyError`."""
    try:
        return TypeAdapter(dict[str, Any]).validate_json(_entry(path, "data"))
    except ValidationError:
        raise not_an_agent(path, "its entry 'data' is not JSON") from None


def trained_under_vec_normalize(data: dict[str, Any]) -> bool:
    """Whether a zip's ``data`` says so; False where it cannot be told.

    Algorithms that learn on policy (they alone have a ``gae_lambda``) keep the last observation before it was
    normalised, and have none otherwise; the others always keep it.
    """
    return "gae_lambda" in data and data.get("_last_original_obs") is not None


def not_an_agent(path: Path, reason: str) -> PolicyError:
    """The error for a file that no stable-baselines3 algorithm has saved."""
    return PolicyError(f"{path} is not a stable-baselines3 zip ({reason}); train one with agents.train")


def _entry(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(name).file_size
            if size > MAX_BYTES[name]:
                raise not_an_agent(
                    path, f"its entry {name!r} has {size:,} bytes, an agent's at most {MAX_BYTES[name]:,}"
                )
            return archive.read(name)
    except PolicyError:
        raise
    except Exception as error:  # whatever zipfile and its decompressors meet in a damaged file
        raise not_an_agent(path, error_line(error)) from None


def _weights(path: Path) -> dict[str, Tensor]:
    """The policy's state, through torch's own reader of tensors alone."""
    try:
        found = torch.load(io.BytesIO(_entry(path, "policy.pth")), map_location="cpu", weights_only=True)
    except PolicyError:
        raise
    except pickle.UnpicklingError:
        raise needs_pickles(path, "its weights are mixed with other objects") from None
    except Exception as error:  # torch raises whatever a damaged file makes it meet
        raise not_an_agent(path, f"its weights cannot be read: {error_line(error)}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise not_an_agent(path, "its entry 'policy.pth' holds no weights")
    return dict(found)


def _space(path: Path, data: dict[str, Any], name: str) -> SpaceText:
    if not isinstance(data.get(name), dict):
        raise not_an_agent(path, f"it has no {name!r}")
    try:
        return SpaceText.model_validate(data[name])
    except ValidationError as error:
        raise needs_pickles(
            path, f"its {name} is not told in plain text ({describe_validation_error(error)})"
        ) from None


def _policy_class(path: Path, data: dict[str, Any]) -> str:
    """The name of the policy's class, which stands in its constructor's."""
    found = data.get("policy_class")
    if not isinstance(found, dict):
        raise not_an_agent(path, "it has no 'policy_class'")
    module, constructor = str(found.get("__module__")), str(found.get("__init__"))
    for name, known in POLICY_CLASSES.items():
        if module == known and constructor.startswith(f"<function {name}.__init__ "):
            return name
    raise needs_pickles(path, f"its policy is a class of {module[:80]!r} that is not known here")


def _arguments(path: Path, data: dict[str, Any], policy_class: str) -> dict[str, Any]:
    """The policy's keyword arguments; only those that the file names, so that all others are its class's defaults."""
    found = data.get("policy_kwargs") or {}
    if not isinstance(found, dict):
        raise not_an_agent(path, "its 'policy_kwargs' are no mapping")
    named = {k: v for k, v in found.items() if k not in (*TRAINING_ONLY, ":type:", ":serialized:")}
    if policy_class in ON_POLICY:
        named["use_sde"] = data.get("use_sde", False)
    net_arch = named.get("net_arch")
    if isinstance(net_arch, list) and net_arch and isinstance(net_arch[0], dict):
        named["net_arch"] = net_arch[0]  # as files of older versions have it
    try:
        arguments = PolicyArguments.model_validate(named).model_dump(exclude_unset=True)
    except ValidationError as error:
        why = f"its policy's arguments are not plain or not known here ({describe_validation_error(error)})"
        raise needs_pickles(path, why) from None
    features = arguments.pop("features_extractor_class", FLATTEN)
    if features != FLATTEN:
        raise needs_pickles(path, f"its features come from {features[:80]}, which is not known here")
    arguments.pop("features_extractor_kwargs", None)
    if "activation_fn" in arguments:
        text = arguments["activation_fn"]
        if text not in ACTIVATIONS:
            raise needs_pickles(path, f"its activation is {str(text)[:80]}, which is not known here")
        arguments["activation_fn"] = ACTIVATIONS[text]
    return arguments
