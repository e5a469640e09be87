"""The training of an agent as a row of stages, each of which begins from seeds of its own.

A live unlearning run cannot be put into a checkpoint of its agent. So a stage ends with whole rollouts, a validation
and a checkpoint, and the next one begins with new episodes and newly seeded generators, whether the process is the
same or a later one: a training that was interrupted gives the agent of one that was not, bit by bit.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from agents.checkpoints import restore_checkpoint, save_checkpoint
from agents.config import AgentConfig
from unlearn_gym import ENV_ID
from unlearn_gym.envs import SB3VecEnv
from unlearn_gym.errors import SettingsError, shown
from unlearn_gym.files import checksum, copy_file, read_json_as, sha256, write_json
from unlearn_gym.settings import usable_device
from unlearn_gym.system.curves import curve_errors
from unlearn_gym.system.locks import folder_lock
from unlearn_gym.tasks.instances import load_instances

FIRST_TRAINING_SEED = 1_000_000
"""Training seeds begin here and validation seeds at twice that; a comparison's begin at 0."""
FIRST_VALIDATION_SEED = 2 * FIRST_TRAINING_SEED
SEEDS_PER_TRAINING = 10_000

StageDone = Callable[[dict[str, Any]], None]


class Stage(BaseModel):
    """A finished stage: environment steps in all, mean return of the last 100 training episodes, returns of its
    validation, and its checkpoint's SHA-256.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    timesteps: int = Field(ge=1)
    training_return: float | None = None
    returns: list[float] = Field(min_length=1)
    seconds: float
    sha256: str


class Progress(BaseModel):
    """What ``progress.json`` holds."""

    plan: dict[str, Any]
    stages: list[Stage]
    checksum: str | None = None

    def digest(self) -> str:
        """What the checksum must be; files of older versions have none."""
        return checksum(self.model_dump(exclude={"checksum"}))


@dataclass(frozen=True)
class Plan:
    """What makes a training the same training: all but its length and where it is kept."""

    config: AgentConfig
    tasks: tuple[str, ...]
    instances: str | None
    options: dict[str, Any]
    seed: int
    n_envs: int
    eval_every: int
    eval_episodes: int
    device: str = "cpu"

    def validate(self) -> None:
        """Raise what is out of range."""
        if bool(self.tasks) == bool(self.instances):
            raise SettingsError("give tasks, or a set of instances, and not both")
        usable_device(self.device)
        for name in ("n_envs", "eval_every", "eval_episodes"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("n_envs", "eval_episodes"):
            if getattr(self, name) > SEEDS_PER_TRAINING:
                raise SettingsError(
                    f"{name}={shown(getattr(self, name))} must be at most {SEEDS_PER_TRAINING}: a training has so many "
                    "seeds of its own"
                )
        if not 0 <= self.seed < FIRST_TRAINING_SEED // SEEDS_PER_TRAINING:
            raise SettingsError(f"seed={self.seed} must lie in 0..{FIRST_TRAINING_SEED // SEEDS_PER_TRAINING - 1}")

    def as_json(self) -> dict[str, Any]:
        """As it stands in ``progress.json``."""
        plan: dict[str, Any] = json.loads(json.dumps({**asdict(self), "config": self.config.model_dump()}))
        plan["config"].pop("n_timesteps")
        plan["instances"] = [i.as_info() for i in load_instances(self.instances)] if self.instances else None
        return plan

    def stage_seed(self, stage: int) -> int:
        """The first of a stage's seeds; there is one for each environment."""
        return FIRST_TRAINING_SEED + self.seed * SEEDS_PER_TRAINING + stage * self.n_envs % SEEDS_PER_TRAINING

    def make_env(self) -> VecEnv:
        """Monitored environments whose actions are rescaled to [-1, 1], in worker processes if more than one.

        With several tasks, or a set of instances, every episode draws one.
        """
        what = {"task": self.tasks[0]} if len(self.tasks) == 1 else {"instances": self.instances or self.tasks}
        env = gym.make_vec(
            f"unlearn_gym:{ENV_ID}", num_envs=self.n_envs, autoreset_mode="SameStep", **what, **self.options
        )
        return VecMonitor(SB3VecEnv(env))

    @property
    def name(self) -> str:
        """What it trains on, as part of a folder's name."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.instances or "+".join(self.tasks))


def train_agent(
    plan: Plan, folder: Path, timesteps: int, *, callbacks: list[BaseCallback], stage_done: StageDone
) -> BaseAlgorithm:
    """Train until ``timesteps`` environment steps, rounded up to whole rollouts, from where ``folder`` stands.

    Leaves there ``progress.json``, ``checkpoints/STEPS/`` and ``best_model.zip``, the best by mean return on the
    validation seeds. Raises ``SettingsError`` when the folder holds another training or a damaged one.
    """
    plan.validate()
    plan.config.check_length(timesteps)
    with folder_lock(folder), curve_errors(folder / "tensorboard"):
        return _train_stages(plan, folder, timesteps, callbacks, stage_done)


def _train_stages(
    plan: Plan, folder: Path, timesteps: int, callbacks: list[BaseCallback], stage_done: StageDone
) -> BaseAlgorithm:
    stages = read_stages(plan, folder)
    env, validation = plan.make_env(), plan.make_env()
    try:
        if stages:
            agent = _restore(plan, folder, stages, env)
        else:
            agent = plan.config.make(env, device=plan.device, seed=plan.stage_seed(0))
        agent.set_logger(configure(str(folder / "tensorboard"), ["tensorboard"]))
        if plan.n_envs > 1:
            torch.set_num_threads(1)  # the cores are the workers'
        while agent.num_timesteps < timesteps:
            started = time.perf_counter()
            end = min((agent.num_timesteps // plan.eval_every + 1) * plan.eval_every, timesteps)
            agent.set_random_seed(plan.stage_seed(len(stages)))
            agent._last_obs = None  # learn() then begins new episodes, with the seeds just set
            agent.learn(end - agent.num_timesteps, callback=callbacks, reset_num_timesteps=False)
            stages.append(_validate(plan, agent, validation))
            stages[-1]["seconds"] = round(time.perf_counter() - started, 1)
            _keep(plan, agent, stages, folder)
            stage_done(stages[-1])
    finally:
        env.close()
        validation.close()
    return agent


def read_stages(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """The finished stages of the same training in ``folder``; raises ``SettingsError`` for another's."""
    path = folder / "progress.json"
    if not path.is_file():
        return []
    remedy = "choose another --out or delete it"
    content = read_json_as(path, Progress, SettingsError, remedy)
    if content.checksum not in (None, content.digest()):
        raise SettingsError(f"{path} is damaged (it does not match its checksum); {remedy}")
    differing = [key for key, value in plan.as_json().items() if content.plan.get(key) != value]
    if differing:
        raise SettingsError(f"{folder} holds a training with another {', '.join(differing)}; choose another --out")
    return [stage.model_dump() for stage in content.stages]


def _validate(plan: Plan, agent: BaseAlgorithm, validation: VecEnv) -> dict[str, Any]:
    """Returns of the deterministic agent on the validation seeds, the same at every stage."""
    returns = _episode_returns(agent, validation, plan.eval_episodes)
    agent.logger.record("eval/mean_return", float(np.mean(returns)))
    agent.logger.record("eval/std_return", float(np.std(returns)))
    agent.logger.dump(agent.num_timesteps)
    episodes = [float(episode["r"]) for episode in agent.ep_info_buffer or ()]
    training_return = float(np.mean(episodes)) if episodes else None
    return {"timesteps": agent.num_timesteps, "training_return": training_return, "returns": returns}


def _episode_returns(policy: PolicyPredictor, env: VecEnv, episodes: int) -> list[float]:
    """Returns of the episodes of the first validation seeds, one each: the same ones for any number of environments.

    A part of them that a dead worker spoilt is run again.
    """
    returns: list[float] = []
    while len(returns) < episodes:
        env.seed(FIRST_VALIDATION_SEED + len(returns))
        obs: Any = env.reset()
        state, starts = None, np.ones(env.num_envs, dtype=bool)
        found: dict[int, float] = {}
        whole = True
        while len(found) < env.num_envs:
            actions, state = policy.predict(obs, state, starts, deterministic=True)
            obs, _, starts, infos = env.step(actions)
            for i in np.flatnonzero(starts).tolist():
                whole &= i in found or not infos[i].get("worker_died", False)
                found.setdefault(i, float(infos[i]["episode"]["r"]))
        if whole:
            returns += [found[i] for i in range(env.num_envs)]
    return returns[:episodes]


class _Static:
    """A policy of SB3's evaluation that holds one λ, as the action in [-1, 1]."""

    def __init__(self, action: float) -> None:
        self._action = action

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        return np.full((len(observation), 1), self._action, dtype=np.float32), state


def static_returns(plan: Plan) -> dict[str, float]:
    """Mean returns on the validation seeds of five static λ, evenly from λ_min to λ_max, by their names."""
    env = plan.make_env()
    space = env.get_attr("action_space", [0])[0]
    try:
        means = {}
        for action in (-1.0, -0.5, 0.0, 0.5, 1.0):
            lambda_ = float(space.low[0] + (action + 1) / 2 * (space.high[0] - space.low[0]))
            means[f"static:{lambda_:.6g}"] = float(np.mean(_episode_returns(_Static(action), env, plan.eval_episodes)))
        return means
    finally:
        env.close()


def _keep(plan: Plan, agent: BaseAlgorithm, stages: list[dict[str, Any]], folder: Path) -> None:
    """A checkpoint that counts once ``progress.json`` names it, and the best agent so far."""
    checkpoint = folder / "checkpoints" / str(agent.num_timesteps)
    save_checkpoint(agent, checkpoint)
    means = [np.mean(stage["returns"]) for stage in stages]
    if int(np.argmax(means)) == len(means) - 1:
        copy_file(checkpoint / "agent.zip", folder / "best_model.zip")
    stages[-1]["sha256"] = sha256(checkpoint / "agent.zip")
    progress = Progress(plan=plan.as_json(), stages=[Stage(**stage) for stage in stages])
    progress.checksum = progress.digest()
    write_json(folder / "progress.json", progress.model_dump())
    for older in folder.glob("checkpoints/*/replay.npz"):
        if older.parent != checkpoint:
            older.unlink()  # only the last one is ever read


def _restore(plan: Plan, folder: Path, stages: list[dict[str, Any]], env: VecEnv) -> BaseAlgorithm:
    """The agent of the last checkpoint, made anew from the plan; raises ``SettingsError`` when a file of the checkpoint
    is not the one that was written.
    """
    checkpoint = folder / "checkpoints" / str(stages[-1]["timesteps"])
    agent = plan.config.make(env, device=plan.device, seed=plan.stage_seed(0))
    restore_checkpoint(agent, checkpoint, stages[-1]["sha256"])
    return agent
