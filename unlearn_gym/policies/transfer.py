"""An inference network that was trained on one task, to be used on another."""

from __future__ import annotations

import time
from functools import cache

from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import PolicyError
from unlearn_gym.policies.base import PolicyContext, Transition
from unlearn_gym.policies.variational import InferenceNetwork, VariationalPolicy
from unlearn_gym.system.torch_state import insulated

NUM_EPISODES = 3
FIRST_SEED = 1_000_000
"""Seeds of the training episodes begin here; those of a comparison begin at 0."""


@cache
@insulated
def trained_network(
    task: str, estimator: str, kl_coef: float, features: str, num_inputs: int
) -> tuple[InferenceNetwork, float]:
    """The network after ``NUM_EPISODES`` episodes of ``task`` at its default settings, and the seconds that took.

    Trained once per process; network and optimizer go on from one episode to the next. Raises :class:`PolicyError`
    when ``features`` of ``task`` are not ``num_inputs`` values, and what :class:`SISSUnlearnEnv` raises.
    """
    started = time.perf_counter()
    env = SISSUnlearnEnv(task, observation="extended" if features == "extended" else "paper")
    s = env.settings
    context = PolicyContext(task, s.lambda_min, s.lambda_max, s.horizon, observation_extra=env.observation_extra)
    policy = VariationalPolicy(context, estimator, kl_coef=kl_coef, features=features)
    if len(policy.entries) != num_inputs:
        raise PolicyError(
            f"features={features} are {len(policy.entries)} values on {task!r} and {num_inputs} in this environment; "
            "train on a task of equal classifier features, or use features=norms"
        )
    policy.reset(FIRST_SEED)
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_EPISODES):
        policy.reseed(seed)
        _run(env, policy, seed)
    return policy.network, time.perf_counter() - started


def _run(env: SISSUnlearnEnv, policy: VariationalPolicy, seed: int) -> None:
    """One episode in which ``policy`` learns."""
    obs, info = env.reset(seed=seed)
    terminated = False
    while not terminated:
        action = env.validate(policy.act(obs, info))
        next_obs, reward, terminated, _, info = env.step(action)
        policy.update(Transition(obs, action, reward, next_obs, terminated, info))
        obs = next_obs
