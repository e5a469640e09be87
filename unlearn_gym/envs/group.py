"""Environments of one process, stepped together: what a vector environment's backends are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from unlearn_gym.envs.siss_unlearn import SISSUnlearnEnv
from unlearn_gym.errors import SettingsError
from unlearn_gym.run.actions import Action
from unlearn_gym.run.stacked import StackedRuns

Reset = tuple[NDArray[np.float32], dict[str, Any]]


class Outcome(NamedTuple):
    """What one environment's step returns, autoreset included."""

    obs: NDArray[np.float32]
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


def finished(outcome: Outcome, fresh: Reset) -> Outcome:
    """The outcome of an episode's last step where the next one begins at once: gymnasium's SAME_STEP."""
    obs, info = fresh
    return outcome._replace(obs=obs, info={**info, "final_obs": outcome.obs, "final_info": outcome.info})


class Asked(ABC):
    """Environments whose attributes can be asked for, wherever they are."""

    @abstractmethod
    def ask(self, question: str, what: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Answers of the environments in ``what`` to "call", "get_attr" or "set_attr", each with its arguments."""

    def call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], indices: Sequence[int]) -> list[Any]:
        """The attribute ``name`` of each environment in ``indices``, called where it can be called."""
        return list(self.ask("call", dict.fromkeys(indices, (name, args, kwargs))).values())

    def get_attr(self, name: str, indices: Sequence[int]) -> list[Any]:
        """The attribute ``name`` of each environment in ``indices``."""
        return list(self.ask("get_attr", dict.fromkeys(indices, (name,))).values())

    def set_attr(self, name: str, values: Mapping[int, Any]) -> None:
        """Set the attribute ``name`` of environments to the values under their indices."""
        self.ask("set_attr", {i: (name, value) for i, value in values.items()})


class EnvGroup(Asked):
    """Environments that share one start, with gymnasium's autoreset; ``stacked`` evaluates their networks as one."""

    def __init__(self, envs: Sequence[SISSUnlearnEnv], mode: AutoresetMode, *, stacked: bool = False) -> None:
        self.envs, self.mode = list(envs), mode
        first = self.envs[0]
        for env in self.envs[1:]:
            env.share(first.start_vector, first.run.data)
        self.stack = StackedRuns([env.run for env in self.envs]) if stacked else None
        self.due = [False] * len(self.envs)
        """Which environments begin an episode at their next step, whatever the action (NEXT_STEP only)."""

    def reset(self, seeds: Mapping[int, int | None], options: dict[str, Any] | None = None) -> dict[int, Reset]:
        """Begin an episode in each environment that ``seeds`` names by its index."""
        if self.stack is not None and options and "instance" in options:
            raise SettingsError("backend='stacked' needs equal runs; with instances use 'processes' or 'serial'")
        found = {i: self.envs[i].reset(seed=seed, options=options) for i, seed in seeds.items()}
        for i in found:
            self.due[i] = False
        return found

    def begin_at_next_step(self, i: int) -> None:
        """Take the episode of environment ``i`` for ended."""
        self.due[i] = True

    def step(self, actions: Sequence[Action]) -> list[Outcome]:
        """One step of every environment; one whose episode ended begins the next one as ``mode`` has it."""
        going = {i: action for i, action in enumerate(actions) if not self.due[i]}
        stepped = self._step(going)
        return [self._autoreset(i, stepped.get(i)) for i in range(len(self.envs))]

    def _step(self, actions: Mapping[int, Action]) -> dict[int, Outcome]:
        if self.stack is None or not actions:
            return {i: Outcome(*self.envs[i].step(action)) for i, action in actions.items()}
        values = {i: self.envs[i].validate(action) for i, action in actions.items()}
        terms = self.stack.update(values)
        return {i: Outcome(*self.envs[i].advance(terms[i], stop=action.stop)) for i, action in values.items()}

    def _autoreset(self, i: int, outcome: Outcome | None) -> Outcome:
        if outcome is None:
            obs, info = self.envs[i].reset()
            self.due[i] = False
            return Outcome(obs, 0.0, False, False, info)
        if outcome.terminated or outcome.truncated:
            if self.mode is AutoresetMode.SAME_STEP:
                return finished(outcome, self.envs[i].reset())
            self.due[i] = self.mode is AutoresetMode.NEXT_STEP
        return outcome

    def ask(self, question: str, what: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Answers of the environments in ``what``."""
        return {i: _QUESTIONS[question](self.envs[i], *args) for i, args in what.items()}

    def close(self) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()


def _call(env: SISSUnlearnEnv, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value = getattr(env, name)
    return value(*args, **kwargs) if callable(value) else value


_QUESTIONS: dict[str, Callable[..., Any]] = {"call": _call, "get_attr": getattr, "set_attr": setattr}
