"""The extended observation: its laws, its groups, and that it changes nothing but what is seen."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from gymnasium.wrappers import RescaleAction
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check

from unlearn_gym.benchmark.suite import figures_of, load
from unlearn_gym.envs import SISSUnlearnEnv
from unlearn_gym.envs.features import (
    BAND_SAMPLES,
    DISTANCE_UNIT,
    FEATURE_CLIP,
    GROUPS,
    NUM_BANDS,
    ParameterDistance,
)
from unlearn_gym.errors import PolicyError, SettingsError
from unlearn_gym.math.diffusion import ScheduleConfig, q_sample, sample
from unlearn_gym.metrics.probe import learned_labels
from unlearn_gym.policies import make_policy
from unlearn_gym.policies.episode import policy_context
from unlearn_gym.tasks import get_task, load_data, register_task, to_model_range

from .test_vector import N, make_vec, single_rows, vector_rows

__all__ = ["make_vec"]  # a fixture

DOCS = Path(__file__).resolve().parent.parent / "docs"
FEATURE_DIMS = {"gaussians-2d": 2, "mnist-trousers": 64, "mnist-tshirt": 64}


def make(task: str = "gaussians-2d", **options) -> SISSUnlearnEnv:
    return SISSUnlearnEnv(task, observation="extended", **options)


def observations(env: SISSUnlearnEnv, steps: int = 4, seed: int = 0) -> np.ndarray:
    return np.stack([env.reset(seed=seed)[0], *(env.step(0.2 + 0.1 * (k % 5))[0] for k in range(steps))])


@pytest.mark.parametrize(("task", "dim"), FEATURE_DIMS.items())
def test_all_groups_are_zero_at_every_reset_and_move_with_the_weights(task, dim):
    env = make(task)
    assert env.observation_extra == NUM_BANDS + dim + 1
    for seed in range(2):
        rows = observations(env, 2, seed)
        assert rows.shape == (3, 6 + NUM_BANDS + dim + 1)
        assert not rows[0, 6:].any()
        assert (rows[1:, 6:] != 0).all()
        assert all(env.observation_space.contains(row) for row in rows)


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
def test_both_checkers_pass(task):
    env = gym.make("SISSUnlearn-v0", task=task, observation="extended", horizon=3, batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if task == "gaussians-2d":  # for models of images it checks nothing more
            sb3_check(RescaleAction(env, np.float32(-1), np.float32(1)))
        warnings.filterwarnings("ignore", message=".*symmetric and normalized space")
        gymnasium_check(env.unwrapped)


@pytest.mark.parametrize(
    "options",
    [{}, {"features": "fresh"}, {"reward": "potential"}, {"forget_grad_rule": "loss", "grad_norms": "every:3"}],
)
def test_it_appends_and_changes_nothing_else(options):
    env, paper = make(**options), SISSUnlearnEnv("gaussians-2d", **options)
    assert paper.observation_extra == 0
    extended, expected = observations(env), observations(paper)
    np.testing.assert_array_equal(extended[:, : expected.shape[1]], expected)
    assert (env.run.flat.vector == paper.run.flat.vector).all()
    for name in ("generator", "measure_generator"):
        assert (getattr(env.run, name).get_state() == getattr(paper.run, name).get_state()).all()


def test_equal_seeds_and_copies_give_equal_observations():
    env = make()
    rows = observations(env, seed=3)
    np.testing.assert_array_equal(rows, observations(make(), seed=3))
    np.testing.assert_array_equal(rows, observations(env, seed=3))
    np.testing.assert_array_equal(rows, observations(copy.deepcopy(env), seed=3))
    assert (rows[1:, 6:] != observations(env, seed=4)[1:, 6:]).any()


@pytest.mark.parametrize("backend", ["processes", "serial"])
def test_a_vector_environment_is_single_ones_bit_for_bit(make_vec, backend):
    options = {"horizon": 2, "observation": "extended"}
    found = vector_rows(make_vec(backend=backend, **options), 5, 5)
    for i in range(N):
        for row, expected in zip(found, single_rows("gaussians-2d", 5, i, 5, **options), strict=True):
            np.testing.assert_array_equal(row[i], expected)


def test_stacked_environments_are_single_ones_up_to_rounding(make_vec):
    options = {"horizon": 2, "observation": "extended"}
    found = vector_rows(make_vec(backend="stacked", **options), 5, 5)
    for i in range(N):
        for row, expected in zip(found, single_rows("gaussians-2d", 5, i, 5, **options), strict=True):
            np.testing.assert_allclose(row[i], expected, rtol=2e-3, atol=2e-3)


def test_the_groups_ask_of_forget_data_under_the_labels_that_it_was_learned_with():
    env = make("mnist-trousers")
    env.reset(seed=0)
    run, groups = env.run, env._extended.groups
    x, labels, *_ = groups["bands"].grid
    assert labels.tolist() == [1] * len(x)
    forget = to_model_range(run.data.forget).flatten(1)
    assert all((row == forget).all(1).any() for row in x.flatten(1))
    noise, ones = groups["samples"]._noise, torch.ones(16, dtype=torch.int64)
    drawn = sample(run.model, noise, run.alphas_cumprod, labels=ones, num_inference_steps=5, clip=1.0)
    torch.testing.assert_close(groups["samples"].features(run), env.task.classify(drawn)[0])


def test_the_groups_are_what_they_say():
    env = make()
    env.reset(seed=0)
    extended, run = env._extended, env.run
    bands, samples = extended.groups["bands"], extended.groups["samples"]
    x, _, noise, timesteps = bands.grid
    x_t = q_sample(x, noise, timesteps, run.alphas_cumprod)
    numbers = timesteps.reshape(NUM_BANDS, BAND_SAMPLES) * NUM_BANDS // len(run.alphas_cumprod)
    assert numbers.tolist() == [[band] * BAND_SAMPLES for band in range(NUM_BANDS)]
    start = samples.features(run)
    obs = env.step(0.9)[0]
    loss = (run.model(x_t, timesteps, None) - noise).square().mean(1).reshape(NUM_BANDS, -1).mean(1)
    np.testing.assert_allclose(obs[6:11], np.log(loss.detach().numpy() / bands.start_losses), atol=1e-5)
    change = samples.features(run).mean(0) - start.mean(0)
    np.testing.assert_allclose(obs[11:13], change / start.std(0), rtol=1e-4, atol=1e-5)
    moved = (run.flat.vector - env.start_vector).norm() / env.start_vector.norm()
    np.testing.assert_allclose(obs[13:], np.log1p(moved.item() / DISTANCE_UNIT), rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": None}, {"learning_rate": 1e12}]
)
def test_divergence_and_weights_beyond_all_bounds_leave_it_finite(options):
    env = make(horizon=10, **options)
    env.reset(seed=0)
    terminated = False
    while not terminated:
        obs, _, terminated, _, _ = env.step(0.5)
        assert env.observation_space.contains(obs)
        assert np.isfinite(obs).all()
    assert not env.reset(seed=0)[0][6:].any()


def test_nan_weights_count_as_the_upper_bound():
    env = make()
    env.run.flat.vector.data.fill_(float("nan"))
    np.testing.assert_array_equal(env._extended.measure(env.run, env.start_vector), FEATURE_CLIP)


def register(name: str, **changes) -> str:
    register_task(dataclasses.replace(get_task("gaussians-2d"), name=name, **changes))
    return name


@pytest.mark.parametrize("num_timesteps", [2, 4, 7])
def test_no_band_is_empty_however_short_the_schedule(num_timesteps):
    schedule = ScheduleConfig(num_train_timesteps=num_timesteps, beta_start=0.1, beta_end=0.5)
    env = make(register(f"short-{num_timesteps}", schedule=schedule))
    rows = observations(env)
    assert np.isfinite(env._extended.groups["bands"].start_losses).all()
    assert not rows[0, 6:].any()
    assert (rows[-1, 6:] != 0).all()


def test_a_task_without_a_classifier_does_without_its_features():
    env, whole = make(register("unclassified", classify=None)), make()
    assert env.observation_extra == NUM_BANDS + 1
    features = whole.observation_groups["samples"]
    np.testing.assert_array_equal(observations(env), np.delete(observations(whole), features, axis=1))


@pytest.mark.parametrize("task", FEATURE_DIMS)
def test_the_distance_is_zero_at_the_start_grows_with_a_displacement_and_knows_no_direction(task):
    env = make(task)
    env.reset(seed=0)
    group, run, start = env._extended.groups["distance"], env.run, env.start_vector
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
    direction *= start.norm() / direction.norm()

    def entry(scale):
        run.flat.vector.data.copy_(start + scale * direction)
        return group.relate(group.measure(run, start).numpy()).item()

    scales = [0.0, 1e-4, DISTANCE_UNIT, 0.01, 0.1]
    found = [entry(scale) for scale in scales]
    assert found[0] == 0
    assert found == sorted(set(found))
    np.testing.assert_allclose(found, np.log1p(np.array(scales) / DISTANCE_UNIT), rtol=1e-3)
    assert entry(-0.01) == pytest.approx(found[3], rel=1e-3)
    run.flat.vector.data.copy_(3.0 * start)
    group, start, direction = ParameterDistance(env.task, run, torch.Generator()), 3.0 * start, 3.0 * direction
    assert entry(0.01) == pytest.approx(found[3], rel=1e-3)


def test_the_distance_is_from_the_pretrained_weights_whatever_a_run_is_restored_to():
    env = make()
    env.reset(seed=0)
    env.step(0.5)
    snapshot = env.run.snapshot()
    seen = [env.step(0.5)[0][-1] for _ in range(2)]
    env.run.restore(snapshot)
    assert [env.step(0.5)[0][-1] for _ in range(2)] == seen
    assert env.reset(seed=0)[0][-1] == 0


def test_an_instance_of_another_task_is_far_from_its_own_start():
    env = make("mnist-trousers")
    obs = env.reset(seed=0, options={"instance": "mnist-sandals"})[0]
    assert obs[-1] == 0
    moved = env.step(0.5)[0][-1]
    assert 0 < moved < 1
    other = make("mnist-sandals")
    other.reset(seed=0)
    assert moved == other.step(0.5)[0][-1]


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
def test_the_groups_names_entries_and_costs_are_the_same_everywhere(task):
    env = make(task, grad_norms="every:3", forget_grad_rule="loss")
    groups = env.observation_groups
    assert list(groups) == ["paper", *GROUPS]
    assert np.concatenate([np.r_[where] for where in groups.values()]).tolist() == [
        *range(*env.observation_space.shape)
    ]
    assert env._extended.size == env.observation_extra
    measured = {figure.name: figure.value for figure in figures_of(load(DOCS / "benchmark"))}
    for name, group in GROUPS.items():
        assert group.cost[task] == round(measured[f"{task}, step and {name} / step"], 2)
    assert SISSUnlearnEnv(task).observation_groups == {"paper": slice(0, 6)}


@pytest.mark.parametrize(
    "text", [SISSUnlearnEnv.__doc__, (DOCS / "observations.md").read_text()], ids=["class", "docs"]
)
def test_the_documented_groups_are_those_that_there_are(text):
    tasks = ("gaussians-2d", "mnist-trousers")
    rows = [["group", "entries", "what", *(f"cost on `{task}`" for task in tasks)]]
    rows += [[f"`{n}`", g.entries, g.observation, *(f"{g.cost[t]:.2f}" for t in tasks)] for n, g in GROUPS.items()]
    lines = [line.strip().replace("``", "`") for line in text.splitlines()]
    assert [row for row in rows if "| " + " | ".join(row) + " |" not in lines] == []


@pytest.mark.parametrize("named", [(1,), ()])
def test_samples_are_drawn_under_the_labels_of_the_forget_data(named):
    task = dataclasses.replace(get_task("mnist-trousers"), probe_labels=named)
    assert learned_labels(task, load_data(task), 16).tolist() == [1] * 16
    assert learned_labels(get_task("gaussians-2d"), load_data(get_task("gaussians-2d")), 16) is None
    both = get_task("mnist-digits:3,7")
    assert learned_labels(both, load_data(both), 5).tolist() == [3, 7, 3, 7, 3]


def test_an_agent_of_the_papers_observation_is_refused_in_one_line(tmp_path):
    PPO("MlpPolicy", gym.make("SISSUnlearn-v0", task="gaussians-2d"), device="cpu").save(tmp_path / "a.zip")
    with pytest.raises(PolicyError, match=r"\(6,\) .* has \(14,\) .*observation='extended' add entries") as caught:
        make_policy(str(tmp_path / "a.zip"), policy_context(make()))
    assert "\n" not in str(caught.value)


def test_an_agent_of_the_extended_observation_is_used_with_it_and_refused_without(tmp_path):
    PPO("MlpPolicy", make(), device="cpu").save(tmp_path / "a.zip")
    env = make()
    assert 0.1 <= make_policy(str(tmp_path / "a.zip"), policy_context(env)).act(*env.reset(seed=0)) <= 0.9
    with pytest.raises(PolicyError, match=r"\(14,\) .* has \(6,\)"):
        make_policy(str(tmp_path / "a.zip"), policy_context(SISSUnlearnEnv("gaussians-2d")))


def test_another_value_is_named():
    with pytest.raises(SettingsError, match="observation='full'"):
        SISSUnlearnEnv("gaussians-2d", observation="full")
