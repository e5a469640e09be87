"""Agents trained with stable-baselines3 as policies."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor

from unlearn_gym.errors import PolicyError, WeightsError, error_line
from unlearn_gym.models.weights import cast_weights
from unlearn_gym.policies.base import Observation, PolicyContext
from unlearn_gym.policies.normalization import find_statistics
from unlearn_gym.policies.sb3_file import (
    POLICY_CLASSES,
    RECURRENT,
    AgentFile,
    PickleNeededError,
    SpaceText,
    needs_pickles,
    read_agent,
    read_data,
    trained_under_vec_normalize,
)
from unlearn_gym.system.torch_state import initial_weights_from, insulated

OBSERVATION_SHAPE = (6,)
ALGORITHM_MARKS = {"PPO": {"clip_range"}, "A2C": {"gae_lambda"}, "TD3": {"policy_delay"}, "SAC": {"ent_coef", "tau"}}
"""Attributes that only this algorithm's zip holds, in the order of asking."""
CLASSES: dict[str, type[BasePolicy]] = {
    "ActorCriticPolicy": ActorCriticPolicy, "SACPolicy": SACPolicy, "TD3Policy": TD3Policy
}  # fmt: skip


class SB3Policy:
    """The deterministic action of a saved agent, whose action space is the environment's or [-1, 1].

    The zip's pickles stay closed: the spaces are the environment's, held against what the zip says of its own in plain
    text, the network is built from plain text, and its weights are read as tensors alone. Statistics of
    ``VecNormalize`` beside the zip are applied (:mod:`unlearn_gym.policies.normalization`).

    Args:
        context: the environment to act in.
        path: the zip.
        trust: open pickles, which can run any code, where the agent cannot be rebuilt without.

    Raises :class:`PolicyError` for a file that is no agent, for an agent that only its pickles tell, for one of another
    observation or action space, and for one whose preprocessing is not there.
    """

    @insulated
    def __init__(self, context: PolicyContext, path: Path, *, trust: bool = False) -> None:
        self.context = context
        shape = (len(context.observation_low),) if context.observation_low else OBSERVATION_SHAPE
        normalized = trained_under_vec_normalize(read_data(path))
        self.statistics = find_statistics(path, shape[0], normalized=normalized, trust=trust)
        try:
            file = read_agent(path)
            action_space = _action_space(context, path, shape, file.observation, file.action)
            self.network = _build(path, file, _observation_space(context, shape), action_space)
        except PickleNeededError:
            if not trust:
                raise
            self.network = _open_trusted(path)
            texts = _as_text(self.network.observation_space), _as_text(self.network.action_space)
            action_space = _action_space(context, path, shape, *texts)
        self._low, self._high = float(action_space.low[0]), float(action_space.high[0])
        self._memory: Any = None

    def reset(self, seed: int) -> None:
        """Forget a recurrent agent's memory; actions are deterministic."""
        self._memory = None

    @insulated
    def act(self, obs: Observation, info: dict[str, Any]) -> float:
        """The agent's action, mapped to λ."""
        seen = obs if self.statistics is None else self.statistics.apply(obs)
        start = np.array([self._memory is None])
        action, self._memory = self.network.predict(seen, self._memory, start, deterministic=True)
        share = (float(action[0]) - self._low) / (self._high - self._low)
        return self.context.clip(self.context.from_unit(share))


def _observation_space(context: PolicyContext, shape: tuple[int, ...]) -> spaces.Box:
    if not context.observation_low:
        return spaces.Box(-np.inf, np.inf, shape)
    low, high = context.observation_low, context.observation_high
    return spaces.Box(np.array(low, np.float32), np.array(high, np.float32))


def _action_space(
    context: PolicyContext, path: Path, shape: tuple[int, ...], observation: SpaceText, action: SpaceText
) -> spaces.Box:
    """The space that the agent acts in, if it is one of this environment's and its observations are too."""
    if observation.shape != shape or action.shape != (1,):
        raise PolicyError(
            f"{path} was trained on observations {observation.shape} and actions {action.shape}, this environment "
            f"has {shape} and (1,) (grad_norms='every:k' and observation='extended' add entries); use it "
            "with the settings that it was trained with, as in 'compare --option observation=extended'"
        )
    if observation.low is None or observation.high is None or action.low is None or action.high is None:
        raise needs_pickles(path, "the bounds of its spaces are not told in plain text")
    own = (context.observation_low, context.observation_high)
    if context.observation_low and not (_same(observation.low, own[0]) and _same(observation.high, own[1])):
        raise PolicyError(
            f"{path} was trained on observations in other bounds (other features, another λ range, or a wrapper "
            f"such as NormalizeObservation): {observation.low} to {observation.high}, this environment's are "
            f"{own[0]} to {own[1]}; use it with the settings that it was trained with"
        )
    for low, high in ((context.lambda_min, context.lambda_max), (-1.0, 1.0)):
        if _same((*action.low, *action.high), (low, high)):
            return spaces.Box(np.float32(low), np.float32(high), (1,))
    raise PolicyError(
        f"{path} acts in {action.low} to {action.high}, the environment in [{context.lambda_min}, "
        f"{context.lambda_max}]; use the λ range that it was trained with"
    )


def _same(found: tuple[float, ...], expected: tuple[float, ...]) -> bool:
    """Whether bounds are the same as far as numpy prints them, which is to eight digits."""
    return len(found) == len(expected) and np.allclose(found, expected, rtol=1e-6, atol=1e-7)


def _as_text(space: Any) -> SpaceText:
    low, high = (tuple(np.ravel(getattr(space, name, ())).tolist()) or None for name in ("low", "high"))
    return SpaceText(_shape=space.shape, low=low, high=high)


def _build(path: Path, file: AgentFile, observation: spaces.Box, action: spaces.Box) -> BasePolicy:
    """The policy with its weights."""
    kind = _recurrent_class(path) if file.policy_class == RECURRENT else CLASSES[file.policy_class]
    try:
        _check_size(file)
        with initial_weights_from(None):
            network = kind(observation, action, lambda progress: 0.0, **file.arguments)
        network.load_state_dict(_checked_weights(path, file.weights, network.state_dict()), strict=True)
    except PolicyError:
        raise
    except Exception as error:  # whatever a constructor says of arguments that go with another class
        raise needs_pickles(
            path, f"its weights are not those of the network that its plain text tells ({error_line(error)})"
        ) from None
    network.set_training_mode(False)
    return network


def _check_size(file: AgentFile) -> None:
    """Raise ValueError for layers of more weights than the file holds, lest a text of a few bytes takes gigabytes.

    What the file holds is what its tensors store: one of any size may show the same number again and again.
    """
    arguments = file.arguments
    net_arch, hidden = arguments.get("net_arch") or [], arguments.get("lstm_hidden_size", 0)
    layers = net_arch if isinstance(net_arch, dict) else {"": net_arch}
    times = {"qf": arguments.get("n_critics", 1)}
    needed = sum(times.get(name, 1) * a * b for name, widths in layers.items() for a, b in pairwise(widths))
    needed += 4 * hidden**2 * arguments.get("n_lstm_layers", 1)
    stored = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() // w.itemsize for w in file.weights.values()}
    if needed > sum(stored.values()):
        raise ValueError(f"its layers have {needed:,} weights and more")


def _checked_weights(path: Path, found: dict[str, Tensor], outline: dict[str, Tensor]) -> dict[str, Tensor]:
    """``found`` as the network of ``outline`` has them; raises for other names and shapes, and for unusable values."""
    shapes, wanted = ({name: tuple(value.shape) for name, value in all_.items()} for all_ in (found, outline))
    if shapes != wanted:
        name = min(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
        raise ValueError(f"{name!r} is {shapes.get(name, 'not there')}, and is to be {wanted.get(name, 'not there')}")
    try:
        return {name: cast_weights(value, outline[name].dtype, f"{path}: {name!r}") for name, value in found.items()}
    except WeightsError as error:
        raise PolicyError(f"{error}; retrain or re-export the agent") from None


def _recurrent_class(path: Path) -> Any:
    try:
        return getattr(importlib.import_module(POLICY_CLASSES[RECURRENT]), RECURRENT)
    except ImportError:
        raise PolicyError(f"{path} is a recurrent agent; it needs sb3-contrib: pip install sb3-contrib") from None


def _open_trusted(path: Path) -> BasePolicy:
    """The policy as stable-baselines3 loads it, pickles and all."""
    data = read_data(path)
    policy_class = data.get("policy_class")
    module = str(policy_class.get("__module__")) if isinstance(policy_class, dict) else ""
    if module == POLICY_CLASSES[RECURRENT]:
        _recurrent_class(path)
        algorithm = importlib.import_module("sb3_contrib").RecurrentPPO
    else:
        name = next((name for name, marks in ALGORITHM_MARKS.items() if marks <= data.keys()), None)
        if name is None:
            raise PolicyError(
                f"{path} was saved by an algorithm other than PPO, RecurrentPPO, A2C, TD3 or SAC; wrap it as "
                "module:attribute"
            )
        algorithm = getattr(importlib.import_module("stable_baselines3"), name)
    try:
        network: BasePolicy = algorithm.load(path, device="cpu").policy
    except Exception as error:  # sb3 raises whatever unpickling raises
        raise PolicyError(
            f"stable-baselines3 cannot load {path} ({error_line(error)}); retrain or re-export it"
        ) from None
    return network
