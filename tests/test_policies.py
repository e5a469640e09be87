"""Reference policies: their laws, their names, and bad input."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.errors import PolicyError
from unlearn_gym.policies import LambdaPolicy, PolicyContext, Transition, make_policy
from unlearn_gym.policies.episode import policy_context, run_episode
from unlearn_gym.run.actions import Action
from unlearn_gym.run.terms import SECOND_MOMENT_GRID

CONTEXT = PolicyContext("gaussians-2d", 0.1, 0.9, 60)
OBS = np.zeros(6, dtype=np.float32)
SPECS = (
    "static:0.3", "prior", "random", "linear", "cosine:0.2:0.8", "exponential", "variational:pathwise",
    "variational:score_function", "variational:kl_only:0.1", "variational:variance",
)  # fmt: skip


def info(gradient: float = 0.0, moment: np.ndarray | None = None):
    """What a policy sees of a step; ``moment`` is E‖g_r‖² and E‖g_f‖² on the grid, with multiplier 1."""
    names = ("pathwise", "score_function", "kl_only", "variance")
    products = np.ones((3, len(SECOND_MOMENT_GRID)))
    if moment is not None:
        products = np.stack([moment[0], np.zeros_like(moment[0]), moment[1]])
    terms = {"lambda_gradients": dict.fromkeys(names, gradient), "second_moment": products}
    return {"diverged": False, "terms": {**terms, "forget_grad_norm": 1.0, "forget_multiplier": 1.0}}


def play(policy, steps: int, gradient: float = 0.0, seed: int = 0) -> list[float]:
    policy.reset(seed)
    lambdas = []
    for _ in range(steps):
        lambdas.append(policy.act(OBS, info(gradient)))
        if hasattr(policy, "update"):
            policy.update(Transition(OBS, Action(lambdas[-1]), 0.0, OBS, False, info(gradient)))
    return lambdas


@pytest.mark.parametrize("spec", SPECS)
def test_every_policy_keeps_the_range_and_repeats_by_seed(spec):
    policy = make_policy(spec, CONTEXT)
    assert isinstance(policy, LambdaPolicy)
    lambdas = play(policy, 60, gradient=0.5, seed=3)
    assert all(0.1 <= v <= 0.9 for v in lambdas)
    assert lambdas == play(policy, 60, gradient=0.5, seed=3)
    assert lambdas == play(make_policy(spec, CONTEXT), 60, gradient=0.5, seed=3)


@pytest.mark.parametrize("spec", SPECS)
def test_every_policy_runs_an_episode(spec):
    env = SISSUnlearnEnv("gaussians-2d", horizon=8)
    episode = run_episode(env, make_policy(spec, policy_context(env)), seed=0)
    assert len(episode.trace["lambda_"]) == 8
    assert not episode.diverged


def test_schedules_go_from_start_to_end():
    for name in ("linear", "cosine", "exponential"):
        lambdas = play(make_policy(f"{name}:0.2:0.8", CONTEXT), 60)
        assert lambdas[0] == pytest.approx(0.2)
        assert lambdas[-1] == pytest.approx(0.8)
        assert (np.diff(lambdas) > 0).all()


def test_prior_is_the_mapped_sigmoid_of_a_standard_normal():
    share = (np.array(play(make_policy("prior", CONTEXT), 20_000)) - 0.1) / 0.8
    z = np.log(share / (1 - share))
    assert z.mean() == pytest.approx(0, abs=0.03)
    assert z.std() == pytest.approx(1, abs=0.03)


def test_kl_only_tends_to_the_prior():
    policy = make_policy("variational:kl_only:1.0", CONTEXT)
    play(policy, 3000)
    mu, log_variance = policy.network(__import__("torch").zeros(4))
    assert abs(float(mu.detach())) < 0.05
    assert abs(float(log_variance.detach())) < 0.05


@pytest.mark.parametrize(("gradient", "low", "high"), [(1.0, 0.1, 0.2), (-1.0, 0.8, 0.9)])
def test_variational_policy_descends_the_gradient_it_is_told(gradient, low, high):
    lambdas = play(make_policy("variational:pathwise:0.001", CONTEXT), 300, gradient)
    assert low <= np.mean(lambdas[-50:]) <= high


def test_variational_step_is_the_gradient_of_the_elbo():
    torch = __import__("torch")
    policy = make_policy("variational:pathwise:0.3", CONTEXT)
    policy.reset(1)
    policy.act(OBS, info())
    lam, mu, log_variance = policy._lambda, policy._mu, policy._log_variance
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mu, (0.5 * log_variance).exp()), normal(0.0, 1.0))
    parameters = list(policy.network.parameters())
    expected = torch.autograd.grad(2.0 * lam + 0.3 * kl, parameters, retain_graph=True)
    policy.update(Transition(OBS, Action(float(lam.detach())), 0.0, OBS, False, info(2.0)))
    for p, g in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_variance_policy_finds_the_minimiser_of_the_second_moment():
    moment = np.stack([1.0 / (1 - SECOND_MOMENT_GRID), 4.0 / SECOND_MOMENT_GRID])
    policy = make_policy("variational:variance:0", CONTEXT)
    assert policy.act(OBS, info(moment=moment)) == pytest.approx(2 / 3, abs=0.02)  # √b / (√a + √b)


def chosen_by_variance(rule: str, first: float, *, closed_loop: bool) -> float:
    """What the variance policy arrives at over batches drawn at ``first``, or at its own choices after it."""
    env = SISSUnlearnEnv("gaussians-2d", forget_grad_rule=rule, dataset_factors="none", batch_size=256)
    policy = make_policy("variational:variance:0", policy_context(env))
    policy.reset(0)
    choice = first
    for _ in range(80):
        lambda_ = choice if closed_loop else first
        choice = policy.act(OBS, {"terms": env.run.measure(lambda_).as_dict(), "diverged": False})
    return choice


def test_variance_policys_choice_does_not_depend_on_the_lambda_that_drew_the_batches():
    chosen = [chosen_by_variance("loss", lambda_, closed_loop=False) for lambda_ in (0.2, 0.5, 0.8)]
    assert max(chosen) - min(chosen) < 0.08, chosen


def test_variance_policy_arrives_at_one_point_where_the_multiplier_follows_lambda():
    chosen = [chosen_by_variance("relative_norm", lambda_, closed_loop=True) for lambda_ in (0.2, 0.8)]
    assert max(chosen) - min(chosen) < 0.08, chosen


def test_variance_policy_survives_an_unusable_estimate():
    policy = make_policy("variational:variance", CONTEXT)
    broken = np.full((2, len(SECOND_MOMENT_GRID)), np.nan)
    assert policy.act(OBS, info(moment=broken)) == pytest.approx(0.5)


def test_variance_policy_works_in_a_range_between_grid_points():
    policy = make_policy("variational:variance", PolicyContext("gaussians-2d", 0.501, 0.509, 60))
    assert 0.501 <= policy.act(OBS, info()) <= 0.509


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("statik:0.5", "did you mean 'static'"),
        ("static", "needs 1 number"),
        ("static:abc", "needs 1 number"),
        ("static:0.95", r"λ=0.95 must lie in \[0.1, 0.9\]"),
        ("static:nan", r"λ=nan must lie in"),
        ("linear:0.5", "unknown policy"),
        ("variational", "name an estimator"),
        ("variational:pathwise:-1", "beta=-1"),
        ("variational:bayes", "name an estimator"),
        ("nowhere.zip", "no agent at nowhere.zip"),
        ("no_such_module:policy", "cannot import"),
        ("json:no_such_thing", "has no 'no_such_thing'"),
        ("sys:version", "neither a function obs -> lambda_ nor an object with the methods reset"),
    ],
)
def test_bad_names_are_one_line_with_the_remedy(spec, message):
    with pytest.raises(PolicyError, match=message) as caught:
        make_policy(spec, CONTEXT)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_agent_is_named(tmp_path):
    path = tmp_path / "agent.zip"
    path.write_bytes(b"not a zip")
    with pytest.raises(PolicyError, match="not a stable-baselines3 zip"):
        make_policy(str(path), CONTEXT)


def test_users_own_policies_are_taken_by_module_and_attribute(monkeypatch):
    module = types.ModuleType("my_policies")
    module.half = lambda obs: 0.5

    class Low:
        def reset(self, seed):
            pass

        def act(self, obs, info):
            return 0.2

    module.Low, module.low = Low, Low()
    monkeypatch.setitem(sys.modules, "my_policies", module)
    assert [make_policy(f"my_policies:{a}", CONTEXT).act(OBS, info()) for a in ("half", "Low", "low")] == [
        0.5,
        0.2,
        0.2,
    ]
