"""Agents trained with stable-baselines3 as policies."""

from __future__ import annotations

import importlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from unlearn_gym.errors import PolicyError
from unlearn_gym.policies.base import Observation, PolicyContext
from unlearn_gym.torch_state import insulated

OBSERVATION_SHAPE = (6,)
ALGORITHM_MARKS = {"PPO": {"clip_range"}, "A2C": {"gae_lambda"}, "TD3": {"policy_delay"}, "SAC": {"ent_coef", "tau"}}
"""Attributes that only this algorithm's zip holds, in the order of asking."""
RECURRENT_POLICIES = "sb3_contrib.common.recurrent"


def _algorithm(path: Path) -> Any:
    """The class of the algorithm that saved the zip, by the attributes only it has and where its policy is from."""
    try:
        with zipfile.ZipFile(path) as archive:
            data = json.loads(archive.read("data"))
        recurrent = str(data["policy_class"]["__module__"]).startswith(RECURRENT_POLICIES)
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise PolicyError(f"{path} is not a stable-baselines3 zip ({error}); train one with agents.train") from None
    if recurrent:
        try:
            return importlib.import_module("sb3_contrib").RecurrentPPO
        except ImportError:
            raise PolicyError(f"{path} is a recurrent agent; it needs sb3-contrib: pip install sb3-contrib") from None
    for name, marks in ALGORITHM_MARKS.items():
        if marks <= data.keys():
            return getattr(importlib.import_module("stable_baselines3"), name)
    raise PolicyError(
        f"{path} was saved by an algorithm other than PPO, RecurrentPPO, A2C, TD3 or SAC; wrap it as module:attribute"
    )


class SB3Policy:
    """The deterministic action of a saved agent, whose action space is the environment's or [-1, 1].

    Loading an agent unpickles it, as stable-baselines3 does: load only files that you trust. Raises
    :class:`PolicyError` for a file that is no agent or an agent of another observation or action space.
    """

    def __init__(self, context: PolicyContext, path: Path) -> None:
        self.context = context
        try:
            self.agent = _algorithm(path).load(path, device="cpu")
        except PolicyError:
            raise
        except Exception as error:  # sb3 raises whatever unpickling raises
            raise PolicyError(f"stable-baselines3 cannot load {path} ({error}); retrain or re-export it") from None
        observation, action = self.agent.observation_space, self.agent.action_space
        expected = (len(context.observation_low),) if context.observation_low else OBSERVATION_SHAPE
        if observation.shape != expected or action.shape != (1,):
            raise PolicyError(
                f"{path} was trained on observations {observation.shape} and actions {action.shape}, this environment "
                f"has {expected} and (1,) (grad_norms='every:k' and observation='extended' add entries); use it "
                "with the settings that it was trained with, as in 'compare --option observation=extended'"
            )
        bounds = (tuple(observation.low.tolist()), tuple(observation.high.tolist()))
        if context.observation_low and bounds != (context.observation_low, context.observation_high):
            raise PolicyError(
                f"{path} was trained on observations in other bounds (other features or λ range): {bounds[0]} to "
                f"{bounds[1]}; use it with the settings that it was trained with"
            )
        self._low, self._high = float(action.low[0]), float(action.high[0])
        self._memory: Any = None
        own_range = np.allclose([self._low, self._high], [context.lambda_min, context.lambda_max])
        if not own_range and (self._low, self._high) != (-1.0, 1.0):
            raise PolicyError(
                f"{path} acts in [{self._low:.3g}, {self._high:.3g}], the environment in "
                f"[{context.lambda_min}, {context.lambda_max}]; use the λ range that it was trained with"
            )

    def reset(self, seed: int) -> None:
        """Forget a recurrent agent's memory; actions are deterministic."""
        self._memory = None

    @insulated
    def act(self, obs: Observation, info: dict[str, Any]) -> float:
        """The agent's action, mapped to λ."""
        start = np.array([self._memory is None])
        action, self._memory = self.agent.predict(obs, self._memory, start, deterministic=True)
        share = (float(action[0]) - self._low) / (self._high - self._low)
        return self.context.clip(self.context.from_unit(share))
