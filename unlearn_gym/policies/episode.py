"""One episode of a policy in the environment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import ActionError, PolicyError
from unlearn_gym.policies import LambdaPolicy, PolicyContext, Transition, blaming
from unlearn_gym.system.torch_state import insulated

TRACED = (
    "lambda_", "retain_loss", "forget_loss", "siss_loss", "retain_grad_norm", "forget_grad_norm",
    "forget_multiplier", "update_norm", "retain_ess", "forget_ess", "forget_fraction",
)  # fmt: skip


PROBED = ("updates", "seconds", "forget_loss", "retain_loss")


@dataclass
class Episode:
    """What an episode left behind: the trace of each traced term, the probes, the return, and the time it took.

    ``probe`` has lists of equal length: after how many ``updates`` and ``seconds`` of environment and policy which
    ``forget_loss`` and ``retain_loss`` were measured on the run's fixed probe.
    """

    trace: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TRACED})
    probe: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PROBED})
    episode_return: float = 0.0
    diverged: bool = False
    env_seconds: float = 0.0
    policy_seconds: float = 0.0


def policy_context(env: SISSUnlearnEnv) -> PolicyContext:
    """What policies may know of ``env``."""
    s = env.settings
    low, high = (tuple(bound.tolist()) for bound in (env.observation_space.low, env.observation_space.high))
    return PolicyContext(
        env.task.name, s.lambda_min, s.lambda_max, s.horizon, low, high, env.observation_extra, s.objective
    )


@insulated
def run_episode(
    env: SISSUnlearnEnv,
    policy: LambdaPolicy,
    seed: int,
    *,
    name: str | None = None,
    steps: int | None = None,
    probe_every: int | None = None,
    on_step: Callable[[], None] | None = None,
) -> Episode:
    """Reset both with ``seed`` and run to the end; afterwards ``env.run.model`` is the unlearned model.

    ``steps`` ends it after so many. Whatever the policy raises, and a λ that the environment refuses, becomes a
    ``PolicyError`` that says which policy it was, by ``name`` (default: its class), in which call and at which step,
    counted from 1.

    With ``probe_every`` the run's probe is measured at the start, after every so many updates, and at the end: that
    draws nothing and changes nothing, and its time is not counted. ``on_step`` is called at the start and after every
    step, for what wants to look.
    """
    episode, clock = Episode(), time.perf_counter
    update: Any = getattr(policy, "update", None)
    name = name or type(policy).__name__
    with blaming(name, f"reset(seed={seed})"):
        policy.reset(seed)
    obs, info = env.reset(seed=seed)
    terminated, step = False, 0
    if probe_every is not None:
        _probe(env, episode)
    look = on_step or (lambda: None)
    look()
    while not terminated and step != steps:
        step += 1
        where = f"at step {step} of seed {seed}"
        started = clock()
        with blaming(name, f"act {where}"):
            chosen = policy.act(obs, info)
        acted = clock()
        try:
            action = env.validate(chosen)
            next_obs, reward, terminated, _, info = env.step(action)
        except ActionError as error:
            raise PolicyError(f"policy {name!r}: act {where}: {error}") from None
        stepped = clock()
        if update is not None:
            with blaming(name, f"update {where}"):
                update(Transition(obs, action, reward, next_obs, terminated, info))
        episode.policy_seconds += acted - started + clock() - stepped
        episode.env_seconds += stepped - acted
        episode.episode_return += reward
        for term, values in episode.trace.items():
            values.append(info["terms"][term])
        obs = next_obs
        if probe_every is not None and (terminated or env.run.updates % probe_every == 0):
            _probe(env, episode)
        look()
    episode.diverged = info["diverged"]
    return episode


def _probe(env: SISSUnlearnEnv, episode: Episode) -> None:
    forget, retain = env.run.probe_losses()
    values = (env.run.updates, episode.env_seconds + episode.policy_seconds, forget, retain)
    for name, value in zip(PROBED, values, strict=True):
        episode.probe[name].append(value)
