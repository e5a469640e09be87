"""Variational policies by what they see, and networks trained on one task and used on another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import PolicyError
from unlearn_gym.policies import PolicyContext, Transition, make_policy, policy_sources, transfer
from unlearn_gym.policies.episode import policy_context, run_episode
from unlearn_gym.policies.variational import GRADIENT_ESTIMATORS, InferenceNetwork
from unlearn_gym.policies.variational_spec import VariationalSpec, parse_variational
from unlearn_gym.tasks import get_task

from .test_policies import CONTEXT, info, play

EXTENDED = PolicyContext("gaussians-2d", 0.1, 0.9, 60, observation_extra=8)
FROM = "variational:pathwise:0.1:features=losses:from=gaussians-2d:0,3"


@pytest.fixture
def short_training(monkeypatch):
    """Two episodes for each network, trained anew in this test."""
    monkeypatch.setattr(transfer, "NUM_EPISODES", 2)
    monkeypatch.setattr(
        transfer, "SISSUnlearnEnv", lambda task, **o: SISSUnlearnEnv(task, horizon=6, normalize_features=False, **o)
    )
    transfer.trained_network.cache_clear()
    yield
    transfer.trained_network.cache_clear()


def first_lambda(spec: str, obs: np.ndarray, context: PolicyContext = CONTEXT) -> float:
    policy = make_policy(spec, context)
    policy.reset(0)
    return policy.act(obs.astype(np.float32), info())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("variational:pathwise", VariationalSpec("pathwise")),
        ("variational:kl_only:0.1", VariationalSpec("kl_only", 0.1)),
        ("variational:kl_only:features=losses", VariationalSpec("kl_only", features="losses")),
        ("variational:variance:0", VariationalSpec("variance", 0.0)),
        (FROM, VariationalSpec("pathwise", 0.1, "losses", "gaussians-2d:0,3")),
        ("variational:score_function:from=mnist-tshirt", VariationalSpec("score_function", source="mnist-tshirt")),
    ],
)
def test_names_are_read_as_they_are_meant(spec, expected):
    assert parse_variational(spec) == expected


@pytest.mark.parametrize("estimator", GRADIENT_ESTIMATORS)
def test_norms_are_the_default(estimator):
    name = f"variational:{estimator}:0.1"
    env = SISSUnlearnEnv("gaussians-2d", horizon=8)
    traces = [
        run_episode(env, make_policy(spec, policy_context(env)), seed=2).trace
        for spec in (name, f"{name}:features=norms")
    ]
    assert traces[0] == traces[1]


def test_what_is_seen_decides_which_entries_matter():
    obs = np.linspace(-1, 1, 14)
    seen = {"losses": {0, 1}, "norms": {0, 1, 2, 3}, "extended": {0, 1, 2, 3, *range(6, 14)}}
    for features, expected in seen.items():
        spec = f"variational:pathwise:features={features}"
        start = first_lambda(spec, obs, EXTENDED)
        changed = {i for i in range(14) if first_lambda(spec, obs + 0.5 * np.eye(14)[i], EXTENDED) != start}
        assert changed == expected


@pytest.mark.parametrize("age", [{}, {"forget_grad_rule": "loss", "grad_norms": "every:2"}])
def test_extended_features_are_the_observations_last(age):
    env = SISSUnlearnEnv("gaussians-2d", observation="extended", horizon=4, **age)
    policy = make_policy("variational:pathwise:features=extended", policy_context(env))
    assert policy.network.net[0].in_features == 4 + env.observation_extra == 12
    assert len(run_episode(env, policy, seed=0).trace["lambda_"]) == 4


@pytest.mark.usefixtures("short_training")
def test_a_frozen_network_stays_as_it_is_and_z_is_drawn():
    policy = make_policy(FROM, CONTEXT)
    before = [p.clone() for p in policy.network.parameters()]
    lambdas = play(policy, 20, gradient=5.0, seed=3)
    assert len(set(lambdas)) == 20
    assert lambdas == play(policy, 20, gradient=-5.0, seed=3)
    assert lambdas != play(policy, 20, seed=4)
    assert all((a == b).all() for a, b in zip(before, policy.network.parameters(), strict=True))
    assert not any(p.requires_grad for p in policy.network.parameters())


@pytest.mark.usefixtures("short_training")
def test_training_is_the_same_each_time_and_once_a_process():
    first = make_policy(FROM, CONTEXT).network
    assert make_policy(FROM, CONTEXT).network is first
    assert make_policy(FROM.replace("0,3", "3,0"), CONTEXT).network is first  # one task
    transfer.trained_network.cache_clear()
    global_state = torch.random.get_rng_state()
    again = make_policy(FROM, CONTEXT).network
    assert (torch.random.get_rng_state() == global_state).all()
    assert again is not first
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert (a == b).all()
    other = make_policy(FROM.replace("0,3", "0,4"), CONTEXT).network
    assert any((a != b).any() for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.usefixtures("short_training")
def test_training_carries_network_and_optimizer_through_its_episodes():
    trained = make_policy("variational:kl_only:from=gaussians-2d", CONTEXT).network
    env = SISSUnlearnEnv("gaussians-2d", horizon=6, normalize_features=False)
    policy = make_policy("variational:kl_only", policy_context(env))
    policy.reset(1_000_000)
    for seed in (1_000_000, 1_000_001):
        policy.reseed(seed)
        obs, seen = env.reset(seed=seed)
        for _ in range(6):
            lambda_ = policy.act(obs, seen)
            next_obs, reward, terminated, _, seen = env.step(lambda_)
            policy.update(Transition(obs, lambda_, reward, next_obs, terminated, seen))
            obs = next_obs
    for a, b in zip(trained.parameters(), policy.network.parameters(), strict=True):
        assert (a == b).all()


def test_training_runs_whole_episodes_at_the_tasks_own_settings():
    env = SISSUnlearnEnv("gaussians-2d", horizon=3)
    policy = make_policy("variational:pathwise:features=losses:from=gaussians-2d", policy_context(env))
    assert isinstance(policy.trained, InferenceNetwork)
    untrained = make_policy("variational:pathwise:features=losses", policy_context(env))
    untrained.reset(transfer.FIRST_SEED)
    assert any((a != b).any() for a, b in zip(policy.network.parameters(), untrained.network.parameters(), strict=True))
    assert len(run_episode(env, policy, seed=0).trace["lambda_"]) == 3


@pytest.mark.usefixtures("short_training")
def test_extended_features_transfer_where_their_number_is_the_same():
    spec = "variational:pathwise:features=extended:from=gaussians-2d"
    assert 0.1 <= first_lambda(spec, np.zeros(14), EXTENDED) <= 0.9
    mnist = PolicyContext("mnist-trousers", 0.1, 0.9, 60, observation_extra=70)
    with pytest.raises(PolicyError, match=r"are 12 values on 'gaussians-2d' and 74 in this .* use features=norms"):
        make_policy(spec, mnist)


def test_what_a_transferred_policy_comes_from_is_its_tasks_weights():
    task = get_task("gaussians-2d")
    assert policy_sources(FROM, "mnist-trousers") == [task.pretrained_path, task.assets / "constants.json"]
    assert policy_sources("variational:pathwise:features=losses", "mnist-trousers") == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("variational:pathwis", r"did you mean 'pathwise'\?"),
        ("variational:from=gaussians-2d", "name an estimator"),
        ("variational:pathwise:0.1:0.2", "'0.2' is no part of variational:"),
        ("variational:pathwise:losses", r"beta=losses must be a number .*:features=losses\|norms\|extended"),
        ("variational:pathwise:feature=losses", r"'feature=losses' is no part of .*; did you mean 'features'\?"),
        ("variational:pathwise:fron=gaussians-2d", r"did you mean 'from'\?"),
        ("variational:pathwise:features=loss", r"features=loss must be one of .*; did you mean 'losses'\?"),
        ("variational:pathwise:features=losses:features=norms", "has features= twice"),
        ("variational:pathwise:from=gaussians-2d:features=losses", "put it last"),
        ("variational:pathwise:from=gaussians-2d:from=mnist-tshirt", "put it last"),
        ("variational:pathwise:from=", "put it last"),
        ("variational:pathwise:from=gaussian-2d", "did you mean 'gaussians-2d'"),
        ("variational:pathwise:from=gaussians-2d:9", "name different classes in 0..7"),
        ("variational:pathwise:features=extended", "needs an environment with the setting observation='extended'"),
        ("variational:pathwise:features=extended:from=gaussians-2d", "setting observation='extended'"),
        ("variational:variance:features=losses", "variance has no inference network"),
        ("variational:variance:0.1:from=gaussians-2d", "variance has no inference network"),
    ],
)
def test_bad_names_are_one_line_with_the_remedy(spec, message):
    with pytest.raises(PolicyError, match=message) as caught:
        make_policy(spec, CONTEXT)
    assert "\n" not in str(caught.value)
