"""The environment: both checkers, determinism, its contract, and bad input."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.wrappers import RescaleAction
from stable_baselines3.common.env_checker import check_env as sb3_check

import unlearn_gym
from unlearn_gym.envs.infos import INFO_KEYS
from unlearn_gym.errors import ActionError, SettingsError, TaskError
from unlearn_gym.math.diffusion import ScheduleConfig
from unlearn_gym.metrics.pictures import image_grid
from unlearn_gym.run import UnlearningRun
from unlearn_gym.tasks import get_task, load_data, register_task


def make(task: str = "gaussians-2d", **options):
    return gym.make(unlearn_gym.ENV_ID, task=task, **options)


def rollout(env, actions, seed):
    rows = [env.reset(seed=seed)[0]]
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        rows.append(np.array([*obs, reward, terminated, truncated, info["terms"]["update_norm"]]))
    return rows


KINDS = ("gaussians-2d", "mnist-trousers", "mnist-tshirt", "sfd-mnist-digits", "vae-mnist-trousers")
"""One task of each kind of model, with labels and without: others of a kind differ in weights and data alone."""
FEW = {"batch_size": 2, "horizon": 3}
"""Enough for what does not depend on the batch's size."""


@pytest.mark.parametrize("task", KINDS)
def test_gymnasium_checker_passes_with_no_warning_but_its_advice_on_action_ranges(task):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gymnasium_check(make(task, **FEW).unwrapped)
    messages = [str(w.message) for w in caught]
    assert all("we recommend using a symmetric and normalized space" in m for m in messages), messages


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
def test_sb3_checker_passes_with_no_warning_once_actions_are_rescaled(task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_check(RescaleAction(make(task, **FEW), np.float32(-1), np.float32(1)))


def test_sb3_checker_passes_on_the_environment_itself():
    with pytest.warns(UserWarning, match="symmetric and normalized Box action space"):
        sb3_check(make(**FEW))


@pytest.mark.parametrize("task", KINDS)
def test_the_same_seed_gives_the_same_episode_in_two_environments(task):
    actions = np.linspace(0.1, 0.9, 4)
    envs = [make(task, batch_size=4) for _ in range(2)]
    for a, b in zip(*(rollout(env, actions, 11) for env in envs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reseeding_equals_a_fresh_environment():
    env = make()
    rollout(env, [0.2] * 7, 1)
    for a, b in zip(rollout(env, [0.4] * 5, 2), rollout(make(), [0.4] * 5, 2), strict=True):
        np.testing.assert_array_equal(a, b)


def test_norms_measured_now_and_then_come_with_their_age():
    env = make(forget_grad_rule="loss", grad_norms="every:4", horizon=6)
    ages = [rows[6] for rows in rollout(env, [0.5] * 6, 0)[:-1]] + [env.unwrapped._observation()[6]]
    np.testing.assert_array_equal(ages, [0, 0, 0.25, 0.5, 0.75, 0, 0.25])
    assert env.observation_space.shape == (7,)
    sb3_check(RescaleAction(env, np.float32(-1), np.float32(1)))


def test_an_unseeded_reset_begins_another_episode():
    env = make()
    env.reset(seed=0)
    first = env.step(0.5)[0]
    env.reset()
    assert not np.array_equal(first, env.step(0.5)[0])


@pytest.mark.parametrize("task", KINDS)
def test_the_environment_equals_a_plain_loop_over_the_run(task):
    env = make(task, batch_size=4)
    env.reset(seed=4)
    chosen = get_task(task)
    settings = chosen.settings.override(batch_size=4)
    run = UnlearningRun(chosen.pretrained_model(), load_data(chosen), chosen.schedule.alphas_cumprod(), settings)
    run.seed(int(np.random.Generator(np.random.PCG64(np.random.SeedSequence(4))).integers(2**32)))
    for lambda_ in (0.5, 0.2, 0.7):
        _, reward, _, _, info = env.step(lambda_)
        terms = run.update(lambda_)
        np.testing.assert_equal(info["terms"], terms.as_dict())
        assert info["reward_terms"]["siss"] == -terms.siss_loss
        assert reward == sum(info["reward_terms"].values())


def test_observation_holds_what_design_says():
    env = make()
    obs, info = env.reset(seed=0)
    constants, run = get_task("gaussians-2d").constants, env.unwrapped.run
    expected = math.log(info["terms"]["forget_loss"] / (constants.forget_loss * run.forget_coef))
    assert obs[1] == pytest.approx(expected, rel=1e-4)
    assert list(obs[4:]) == [0.5, 0.0]
    obs, _, _, _, info = env.step(np.array([0.8], dtype=np.float32))
    assert obs[4] == np.float32(0.8)
    assert obs[5] == pytest.approx(1 / 60)
    assert info["reward_terms"]["smoothness"] == pytest.approx(-0.1 * 0.3**2, rel=1e-4)
    raw = make(normalize_features=False)
    raw_obs, info = raw.reset(seed=0)
    assert raw_obs[0] == pytest.approx(info["terms"]["retain_loss"], rel=1e-6)


ENTRIES = ("retain_loss", "forget_loss", "retain_grad_norm", "forget_grad_norm")


def test_every_measured_entry_stands_at_its_own_index():
    """Raw: the term itself; normalised: exp of the entry times the constant of its own name and side's factor."""
    raw, normalised = make(normalize_features=False), make()
    task, run = get_task("gaussians-2d"), normalised.unwrapped.run
    unit = {"retain": run.retain_coef, "forget": run.forget_coef}
    scale = [getattr(task.constants, name) * unit[name.split("_")[0]] for name in ENTRIES]
    shown = [env.reset(seed=3) for env in (raw, normalised)]
    for lambda_ in (0.3, 0.8, None):
        for (obs, info), factor in zip(shown, (None, scale), strict=True):
            terms = [info["terms"][name] for name in ENTRIES]
            assert len(set(terms)) == 4
            found = obs[:4] if factor is None else np.exp(obs[:4].astype(float)) * factor
            np.testing.assert_allclose(found, terms, rtol=1e-4)
        if lambda_ is not None:
            shown = [(lambda rows: (rows[0], rows[4]))(env.step(lambda_)) for env in (raw, normalised)]


def test_fresh_entries_are_losses_and_gradient_norms_of_each_sides_own_data():
    env = make(normalize_features=False, features="fresh").unwrapped
    env.reset(seed=3)
    run = env.run
    for lambda_ in (0.2, 0.9):
        twin = torch.Generator()
        twin.set_state(run.measure_generator.get_state())
        obs = env.step(lambda_)[0]
        batch, losses, norms = run.draw(twin), [], []
        a = run.alphas_cumprod[batch.timesteps][:, None]
        for x, factor in ((batch.retain, run.retain_coef), (batch.forget, run.forget_coef)):
            x_t = a.sqrt() * x + (1 - a).sqrt() * batch.noise
            loss = factor * (run.model(x_t, batch.timesteps, None) - batch.noise).square().mean()
            gradient = torch.autograd.grad(loss, list(run.model.parameters()))
            losses.append(loss.item())
            norms.append(torch.cat([g.flatten() for g in gradient]).norm().item())
        np.testing.assert_allclose(obs[:4], [*losses, *norms], rtol=1e-3)
        assert obs[4] == np.float32(lambda_)


def test_the_horizon_terminates_and_a_step_beyond_it_is_refused():
    env = make(horizon=3).unwrapped
    env.reset(seed=0)
    ends = [env.step(0.5)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (True, False)]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0.5)


def test_divergence_ends_the_episode_cleanly_and_harms_no_other():
    env, other = (make(optimizer="sgd", learning_rate=lr, max_grad_norm=None) for lr in (1e30, 1e-3))
    env.reset(seed=0)
    other.reset(seed=0)
    terminated, steps = False, 0
    while not terminated:
        obs, reward, terminated, truncated, info = env.step(0.5)
        steps += 1
        assert env.observation_space.contains(obs)
        assert math.isfinite(reward)
    assert info["diverged"]
    assert not truncated
    assert steps < 60
    assert reward == -env.unwrapped.settings.divergence_penalty
    assert math.isfinite(other.step(0.5)[1])
    obs, info = env.reset(seed=1)
    assert not info["diverged"]
    assert env.observation_space.contains(obs)


def test_a_probe_loss_beyond_all_bounds_is_divergence_under_the_potential_reward():
    env = make(reward="potential", learning_rate=1e12)
    env.reset(seed=0)
    obs, reward, terminated, _, info = env.step(0.5)
    assert (reward, terminated, info["diverged"]) == (-10.0, True, True)
    assert env.observation_space.contains(obs)


def test_a_copied_environment_goes_its_own_way():
    env = make()
    env.reset(seed=0)
    twin = copy.deepcopy(env)
    expected = [env.step(v)[0] for v in (0.3, 0.6)]
    np.testing.assert_array_equal(expected, [twin.step(v)[0] for v in (0.3, 0.6)])
    assert env.unwrapped.run.model is not twin.unwrapped.run.model


@pytest.mark.parametrize("reward", ["siss", "potential"])
@pytest.mark.parametrize("features", ["lagged", "fresh"])
def test_every_form_of_reward_and_features_stays_in_its_spaces(reward, features):
    env = make(reward=reward, features=features)
    env.reset(seed=0)
    for lambda_ in (0.1, 0.5, 0.9):
        obs, value, *_ = env.step(lambda_)
        assert env.observation_space.contains(obs)
        assert math.isfinite(value)


def test_potential_rewards_telescope_to_the_potential():
    env = make(reward="potential", smoothness_coef=0.0).unwrapped
    env.reset(seed=0)
    total = sum(env.step(0.5)[1] for _ in range(20))
    f0, r0 = env._start_potential
    forget, retain = env.run.probe_losses()
    cap = env.task.constants.unseen_forget_loss
    expected = (min(forget, cap) - f0) / (cap - f0) - 10.0 * max(0.0, retain / r0 - 1.0)
    assert total == pytest.approx(expected, abs=1e-6)


def potential_of(forget: float, retain: float, **options) -> float:
    """What an episode of one step pays whose probe losses end at these multiples of the cap and of their start."""
    env = make(reward="potential", smoothness_coef=0.0, **options).unwrapped
    env.reset(seed=0)
    _, r0 = env._start_potential
    env.run.probe_losses = lambda: (forget * env.task.constants.unseen_forget_loss, retain * r0)
    return env.step(0.5)[1]


@pytest.mark.parametrize("reward", ["siss", "potential"])
def test_the_penalty_is_on_the_change_from_one_lambda_to_the_next(reward):
    env = make(reward=reward, smoothness_coef=2.0, lambda_init=0.4)
    for seed in range(2):
        env.reset(seed=seed)
        before = 0.4
        for lambda_ in (0.2, 0.9, 0.8, 0.8):
            _, total, _, _, info = env.step(lambda_)
            assert info["reward_terms"]["smoothness"] == pytest.approx(-2.0 * (lambda_ - before) ** 2)
            assert total == pytest.approx(info["reward_terms"][reward] - 2.0 * (lambda_ - before) ** 2)
            before = lambda_


@pytest.mark.parametrize("options", [{"reward": "potential"}, {"features": "fresh"}, {"objective": "retrack"}])
def test_an_episode_does_not_depend_on_those_before(options):
    used, fresh = (make(forget_grad_rule="loss", **options) for _ in range(2))
    rollout(used, [0.9] * 5, 1)
    for a, b in zip(rollout(used, [0.2, 0.6], 2), rollout(fresh, [0.2, 0.6], 2), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(used.unwrapped.history) == 2


def test_a_loss_that_an_objective_leaves_out_is_at_the_lower_bound():
    env = make(objective="neggrad", forget_grad_rule="loss")
    for obs in (env.reset(seed=0)[0], env.step(0.5)[0]):
        assert list(obs[[0, 2]]) == [-5, -5]
        assert (obs[[1, 3]] > -5).all()


def test_what_is_forgotten_beyond_the_cap_pays_nothing_more():
    assert potential_of(1.0, 1.0) == pytest.approx(1.0)
    for forget in (1.01, 2.0, 1e6):
        assert potential_of(forget, 1.0) == pytest.approx(1.0)
    assert potential_of(0.9, 1.0) < 1.0


def test_damage_costs_its_share_of_the_start_and_repair_pays_nothing():
    for retain in (1.01, 1.5, 3.0):
        assert potential_of(1.0, retain) == pytest.approx(1 - 10 * (retain - 1))
        assert potential_of(1.0, retain, potential_retain_coef=2.0) == pytest.approx(1 - 2 * (retain - 1))
    for retain in (0.99, 0.5, 0.0):
        assert potential_of(1.0, retain) == pytest.approx(1.0)


@pytest.mark.parametrize("action", [0.05, 0.95, 0.09999, 0.90001, float("nan"), [0.5, 0.5], [[0.5]], [], "high"])
def test_a_bad_action_is_named_and_changes_nothing(action):
    env = make().unwrapped
    env.reset(seed=0)
    with pytest.raises(ActionError, match=r"λ=|shape|not a number"):
        env.step(action)
    assert env.run.updates == 0


def test_an_action_that_is_off_by_rounding_becomes_the_bound():
    for low, high in ((0.1, 0.9), (0.0, 1.0)):
        env = make(lambda_min=low, lambda_max=high, lambda_init=0.5).unwrapped
        env.reset(seed=0)
        for action, lambda_ in ((low - 5e-7, low), (high + 5e-7, high), (np.float32(0.3), float(np.float32(0.3)))):
            assert env.step(action)[4]["terms"]["lambda_"] == lambda_


def test_float32_bounds_of_the_action_space_are_valid_actions():
    env = make().unwrapped
    env.reset(seed=0)
    for bound, lambda_ in ((env.action_space.low, 0.1), (env.action_space.high, 0.9)):
        assert env.step(bound)[4]["terms"]["lambda_"] == pytest.approx(lambda_)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "mnist-trouser"}, "did you mean 'mnist-trousers'"),
        ({"horizont": 5}, "did you mean 'horizon'"),
        ({"horizon": 0}, "horizon=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"lambda_min": 0.9, "lambda_max": 0.2}, "lambda_min=0.9 must be below"),
        ({"lambda_init": 0.95}, "lambda_init=0.95 must lie in"),
        ({"device": "warp"}, "device 'warp'"),
        ({"forget_grad_rule": "none"}, "forget_grad_rule='none'"),
        ({"render_mode": "human"}, "render_mode='human'"),
        ({"reward": "potential", "potential_cap": 0.01}, "potential_cap=0.01"),
    ],
)
def test_bad_options_are_one_line_with_value_and_remedy(options, message):
    from unlearn_gym.envs import SISSUnlearnEnv

    with pytest.raises((SettingsError, TaskError), match=message) as caught:
        SISSUnlearnEnv(**{"task": "gaussians-2d", **options}).reset(seed=0)
    assert "\n" not in str(caught.value)


def test_spec_survives_json_and_pickle():
    env = make(horizon=5, smoothness_coef=0.2)
    spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    assert json.loads(env.spec.to_json())["kwargs"]["horizon"] == 5
    copies = [gym.make(spec), gym.make(pickle.loads(pickle.dumps(env.spec)))]
    expected = rollout(env, [0.3, 0.6], 0)
    for remade in copies:
        for a, b in zip(rollout(remade, [0.3, 0.6], 0), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_module_prefix_registers_on_demand():
    assert gym.make("unlearn_gym:SISSUnlearn-v0", task="gaussians-2d").spec.id == unlearn_gym.ENV_ID
    before = dict(gym.registry)
    unlearn_gym.register_envs()
    assert gym.registry == before


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers", "vae-mnist-trousers"])
def test_a_frame_is_a_picture_that_changes_with_the_run(task):
    env = make(task, render_mode="rgb_array", batch_size=4)
    env.reset(seed=0)
    first = env.render()
    env.step(0.7)
    second = env.render()
    assert first.shape == (540, 960, 3)
    assert first.dtype == np.uint8
    assert (first != second).any()
    assert first.std() > 10


def test_a_schedule_shorter_than_the_samplers_steps_is_rendered_and_evaluated_in_fewer():
    short = dataclasses.replace(
        get_task("gaussians-2d"), name="short", schedule=ScheduleConfig(num_train_timesteps=10, beta_end=0.5)
    )
    assert short.num_inference_steps == 10
    register_task(short)
    env = make("short", render_mode="rgb_array", normalize_features=False)
    env.reset(seed=0)
    assert env.render().ndim == 3


@pytest.mark.parametrize(("channels", "shape"), [(1, (9, 9)), (2, (9, 9)), (3, (9, 9, 3)), (5, (9, 9))])
def test_pictures_of_any_number_of_channels_are_shown(channels, shape):
    assert image_grid(torch.zeros(4, channels, 4, 4), 2).shape == shape


def test_rendering_does_not_change_the_run():
    env, other = make(render_mode="rgb_array"), make()
    env.reset(seed=0)
    other.reset(seed=0)
    env.render()
    np.testing.assert_array_equal(env.step(0.5)[0], other.step(0.5)[0])


def test_gymnasium_vector_environments_work():
    env = gym.make_vec(unlearn_gym.ENV_ID, num_envs=2, task="gaussians-2d", vectorization_mode="sync")
    obs, _ = env.reset(seed=0)
    single = make().reset(seed=1)[0]
    np.testing.assert_array_equal(obs[1], single)


def paths(info, at=()):
    """The keys of ``info`` and of the dicts that :data:`INFO_KEYS` looks into."""
    looked_into = {key.path[:-1] for key in INFO_KEYS}
    for name, value in info.items():
        yield (*at, name)
        if (*at, name) in looked_into:
            yield from paths(value, (*at, name))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, 'with `reward="siss"`'),
        ({"reward": "potential"}, 'with `reward="potential"`'),
        ({"learning_rate": 1e30, "optimizer": "sgd"}, "that diverged"),
    ],
)
def test_info_has_the_keys_that_are_listed_and_no_other(options, kind):
    env = make(**options)
    found = {"reset": set(paths(env.reset(seed=0)[1])), "step": set()}
    diverges = kind == "that diverged"
    for _ in range(5 if diverges else 1):
        info = env.step(0.5)[4]
        found["step"] = set(paths(info))
        if info["diverged"]:
            break
    assert info["diverged"] == diverges
    always = {key.path for key in INFO_KEYS if not key.where}
    own = {key.path for key in INFO_KEYS if key.where.startswith("step") and kind in key.where}
    smoothness = set() if diverges else {("reward_terms", "smoothness")}
    assert found == {"reset": always | {("instance",)}, "step": always | own | smoothness}


def test_an_info_is_printed_in_a_few_lines_and_holds_its_arrays_all_the_same():
    env, other = make(), make()
    info, theirs = (e.reset(seed=0)[1] for e in (env, other))
    assert len(repr(info)) < 1200
    assert "<array of shape (3, 49)>" in repr(info)
    moment = info["terms"]["second_moment"]
    assert isinstance(moment, np.ndarray)
    assert "\n" in str(moment)  # print shows the values
    assert data_equivalence(info, theirs)
    for copied in (pickle.loads(pickle.dumps(info)), copy.deepcopy(info)):
        assert data_equivalence(copied, info)
        assert repr(copied) == repr(info)
    moment += 1.0  # the caller's own
    assert not data_equivalence(info, theirs)
    assert data_equivalence(env.step(0.5)[4], other.step(0.5)[4])
