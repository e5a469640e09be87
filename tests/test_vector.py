"""Vector environments against single ones, workers that die, and the adapter for stable-baselines3."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

import unlearn_gym
from unlearn_gym.envs import SB3VecEnv, SISSUnlearnEnv, SISSUnlearnVectorEnv
from unlearn_gym.envs.infos import INFO_KEYS, VECTOR_KEYS
from unlearn_gym.envs.workers import arguments
from unlearn_gym.errors import ActionError, RunError, SettingsError, TaskError, WorkerError
from unlearn_gym.run.stacked import StackedRuns
from unlearn_gym.run.terms import unpack
from unlearn_gym.tasks import get_task, register_task

from .test_run import HostSynchronisations

N = 3
SHORT, STEPS = {"horizon": 2, "batch_size": 4}, 5
"""An episode, its successor by autoreset, and a step of that one's end: what follows repeats it."""


@pytest.fixture
def make_vec():
    made = []

    def make(task: str = "gaussians-2d", num_envs: int = N, **options) -> SISSUnlearnVectorEnv:
        made.append(gym.make_vec(unlearn_gym.ENV_ID, num_envs=num_envs, task=task, **options).unwrapped)
        return made[-1]

    yield make
    for env in made:
        env.close()


def actions(step: int, n: int = N) -> np.ndarray:
    return (0.1 + 0.8 * ((np.arange(n) * 0.37 + step * 0.23) % 1)).reshape(n, 1)


def single_rows(task: str, seed: int, index: int, steps: int, n: int = N, **options) -> list[np.ndarray]:
    """What environment ``index`` shows over ``steps`` steps of NEXT_STEP autoreset, from a single environment."""
    env = SISSUnlearnEnv(task, **options)
    rows, due = [np.array([*env.reset(seed=seed + index)[0], 0, 0, 0])], False
    for step in range(steps):
        if due:
            obs, due = env.reset()[0], False
            rows.append(np.array([*obs, 0, 0, 0]))
        else:
            obs, reward, due, _, info = env.step(actions(step, n)[index])
            rows.append(np.array([*obs, reward, due, info["terms"]["update_norm"]]))
    return rows


def vector_rows(env: SISSUnlearnVectorEnv, seed: int, steps: int) -> list[np.ndarray]:
    obs, _ = env.reset(seed=seed)
    rows = [np.column_stack([obs, np.zeros((env.num_envs, 3))])]
    for step in range(steps):
        obs, reward, terminated, _, info = env.step(actions(step, env.num_envs))
        norm = np.where(reward == 0, 0, info["terms"]["update_norm"])
        rows.append(np.column_stack([obs, reward, terminated, norm]))
    return rows


def test_the_environment_id_picks_it(make_vec):
    env = make_vec()
    assert isinstance(env, SISSUnlearnVectorEnv)
    assert env.backend == "processes"
    assert make_vec(num_envs=1).backend == "serial"
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert env.observation_space.shape == (N, 6)
    assert env.action_space.shape == (N, 1)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)


@pytest.mark.parametrize("task", ["gaussians-2d", "mnist-trousers"])
@pytest.mark.parametrize("backend", ["processes", "serial"])
def test_a_vector_environment_is_single_ones_bit_for_bit(make_vec, task, backend):
    workers = {"num_workers": 2} if backend == "processes" else {}
    found = vector_rows(make_vec(task, backend=backend, **SHORT, **workers), 5, STEPS)
    for i in range(N):
        for row, expected in zip(found, single_rows(task, 5, i, STEPS, **SHORT), strict=True):
            np.testing.assert_array_equal(row[i], expected)


PLAIN = {"forget_grad_rule": "loss", "optimizer": "sgd"}


@pytest.mark.parametrize(
    ("task", "options"),
    [*(("gaussians-2d", options) for options in ({}, PLAIN, {"reward": "potential"})),
     *(("mnist-trousers", options) for options in ({}, PLAIN))],
)  # fmt: skip
def test_stacked_runs_are_single_ones_up_to_rounding(make_vec, task, options):
    """The potential is measured of each run by itself, on images as on points."""
    found = vector_rows(make_vec(task, backend="stacked", **SHORT, **options), 5, STEPS)
    for i in range(N):
        for row, expected in zip(found, single_rows(task, 5, i, STEPS, **SHORT, **options), strict=True):
            np.testing.assert_allclose(row[i], expected, rtol=2e-3, atol=2e-3)


def test_stacked_runs_leave_the_others_alone(make_run):
    runs = [make_run(seed=i) for i in range(3)]
    stack = StackedRuns(runs)
    before, states = runs[1].flat.vector.detach().clone(), [run.generator.get_state() for run in runs]
    stack.update({0: 0.2, 2: 0.6})
    assert (before == runs[1].flat.vector).all()
    assert [(s == run.generator.get_state()).all().item() for s, run in zip(states, runs, strict=True)] == [0, 1, 0]
    assert [run.updates for run in runs] == [1, 0, 1]
    single = make_run(seed=1)
    np.testing.assert_equal(runs[1].update(0.5).as_dict(), single.update(0.5).as_dict())
    assert (runs[1].flat.vector == single.flat.vector).all()


def test_stacked_runs_wait_for_the_device_only_once_at_their_end(make_run, monkeypatch):
    transfers = []
    monkeypatch.setattr("unlearn_gym.run.stacked.unpack", lambda *a: transfers.append(a) or unpack(*a))
    stack = StackedRuns([make_run(seed=i) for i in range(3)])
    with HostSynchronisations() as mode:
        stack.update({0: 0.2, 1: 0.4, 2: 0.6})
        stack.update({0: 0.2, 2: 0.6})
    assert mode.found == []
    assert len(transfers) == 5


def test_stacked_environments_share_data_and_start_weights(make_vec):
    first, *others = make_vec(backend="stacked").envs.envs
    assert all(env.start_vector is first.start_vector for env in others)
    assert all(env.run.data is first.run.data for env in others)


def test_stacked_runs_refuse_what_they_cannot_do(make_run):
    with pytest.raises(RunError, match="grad_norms='every:2' needs backend='processes' or 'serial'"):
        StackedRuns([make_run(forget_grad_rule="loss", grad_norms="every:2")])
    runs = [make_run(seed=i) for i in range(2)]
    runs[0].model.forward = lambda x, t, labels: x * float(x.sum() > 0)
    with pytest.raises(RunError, match="use backend='processes'"):
        StackedRuns(runs).update({0: 0.5, 1: 0.5})


@pytest.mark.parametrize("backend", ["processes", "stacked"])
def test_same_step_autoreset_gives_the_final_observation_and_info(make_vec, backend):
    env = make_vec(backend=backend, horizon=2, autoreset_mode="SameStep")
    next_step = make_vec(backend=backend, horizon=2)
    for one in (env, next_step):
        one.reset(seed=1)
    env.step(actions(0))
    next_step.step(actions(0))
    obs, reward, terminated, truncated, info = env.step(actions(1))
    last, last_reward, _, _, last_info = next_step.step(actions(1))
    assert terminated.all()
    assert not truncated.any()
    np.testing.assert_array_equal(np.stack(info["final_obs"]), last)
    np.testing.assert_array_equal(reward, last_reward)
    np.testing.assert_equal(info["final_info"]["terms"], last_info["terms"])
    fresh, zero, terminated, _, fresh_info = next_step.step(actions(2))
    assert not terminated.any()
    assert not zero.any()
    np.testing.assert_array_equal(obs, fresh)
    np.testing.assert_equal(info["terms"], fresh_info["terms"])


def test_infos_of_many_have_the_keys_that_are_listed_and_print_short(make_vec):
    env = make_vec(backend="serial", horizon=2, autoreset_mode="SameStep")
    plain = {key.path[0] for key in INFO_KEYS if not key.where}
    extra = ({"instance"}, set(), {"instance", "final_obs", "final_info"})
    for step, more in enumerate(extra):  # a reset, a step, and a step that ends and begins an episode
        info = env.step(actions(step))[4] if step else env.reset(seed=0)[1]
        assert {name for name in info if not name.startswith("_")} == plain | more
        for one in (info, info.get("final_info", info)):
            assert one["terms"]["second_moment"].shape == (N, 3, 49)
            assert repr(one["terms"]["second_moment"]) == f"<array of shape ({N}, 3, 49)>"


@pytest.mark.parametrize("backend", ["processes", "serial"])
def test_without_autoreset_a_mask_says_which_begin_anew(make_vec, backend):
    env = make_vec(backend=backend, horizon=1, autoreset_mode=AutoresetMode.DISABLED)
    start, _ = env.reset(seed=1)
    last, _, terminated, _, _ = env.step(actions(0))
    assert terminated.all()
    with pytest.raises(gym.error.ResetNeeded, match=r"environments \[0, 1, 2\] have no episode"):
        env.step(actions(1))
    mask = np.array([False, True, False])
    obs, info = env.reset(seed=1, options={"reset_mask": mask})
    np.testing.assert_array_equal(obs, np.where(mask[:, None], start, last))
    np.testing.assert_array_equal(info["_terms"], mask)
    with pytest.raises(gym.error.ResetNeeded, match=r"environments \[0, 2\]"):
        env.step(actions(1))
    env.reset(options={"reset_mask": ~mask})
    assert env.step(actions(1))[2].all()  # the one that had an episode has not stepped in between


def kill_worker(env: SISSUnlearnVectorEnv, number: int) -> None:
    process = env.envs.workers[number].process
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_worker_that_dies_is_replaced_and_the_others_go_on(make_vec, mode):
    env, whole = (make_vec(num_workers=3, horizon=9, autoreset_mode=mode) for _ in range(2))
    for one in (env, whole):
        one.reset(seed=3)
    before = env.step(actions(0))[0]
    whole.step(actions(0))
    kill_worker(env, 1)
    with pytest.warns(UserWarning, match="worker 1 died: killed by SIGKILL .*; environments 1 begin new episodes"):
        obs, reward, terminated, truncated, info = env.step(actions(1))
    expected = whole.step(actions(1))
    np.testing.assert_array_equal(truncated, [False, True, False])
    assert not terminated.any()
    assert reward[1] == 0
    last = info["final_obs"][1] if mode is AutoresetMode.SAME_STEP else obs[1]
    np.testing.assert_array_equal(last, before[1])
    died = info["final_info"] if mode is AutoresetMode.SAME_STEP else info
    assert "SIGKILL" in died["worker_died"][1]
    if mode is AutoresetMode.SAME_STEP:
        assert {key.path[0] for key in VECTOR_KEYS} <= {*info, *died}
    others = [0, 2]
    np.testing.assert_array_equal(obs[others], expected[0][others])
    if mode is AutoresetMode.DISABLED:
        env.reset(options={"reset_mask": np.array([False, True, False])})
    for step in range(2, 5):
        found, expected = env.step(actions(step)), whole.step(actions(step))
        for a, b in zip(found[:4], expected[:4], strict=True):
            np.testing.assert_array_equal(a[others], b[others])
    progress = found[0][1, 5] * 9
    assert progress == pytest.approx(3 if mode is not AutoresetMode.NEXT_STEP else 2)


def test_an_answer_that_an_interrupt_kept_from_being_received_is_dropped(make_vec):
    env, whole = (make_vec(num_workers=2) for _ in range(2))
    for one in (env, whole):
        one.reset(seed=3)
    for worker in env.envs.workers:
        worker.send("step", arguments([0.5] * len(worker.indices)))  # and Ctrl-C before the answers were read
    for one in (env, whole):
        one.reset(seed=4)
    for a, b in zip(env.step(actions(0))[:4], whole.step(actions(0))[:4], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_worker_that_dies_before_a_reset_loses_nothing(make_vec):
    env = make_vec(num_workers=2)
    expected, _ = env.reset(seed=3)
    kill_worker(env, 0)
    with pytest.warns(UserWarning, match="worker 0 died"):
        found, _ = env.reset(seed=3)
    np.testing.assert_array_equal(found, expected)


def test_a_partial_reset_after_a_death_hides_no_lost_episode(make_vec):
    env = make_vec(num_workers=1, autoreset_mode="Disabled")
    env.reset(seed=3)
    env.step(actions(0))
    kill_worker(env, 0)
    with pytest.warns(UserWarning, match="worker 0 died"):
        env.reset(options={"reset_mask": np.array([True, False, False])})
    _, reward, _, truncated, info = env.step(actions(1))
    np.testing.assert_array_equal(truncated, [False, True, True])
    np.testing.assert_array_equal(info["_worker_died"], [False, True, True])
    assert not reward[1:].any()
    with pytest.raises(gym.error.ResetNeeded, match=r"\[1, 2\]"):
        env.step(actions(2))


def test_an_episode_that_had_ended_is_not_lost_again(make_vec):
    env = make_vec(num_workers=1, horizon=2)
    env.reset(seed=3)
    env.step(actions(0))
    assert env.step(actions(1))[2].all()
    kill_worker(env, 0)
    with pytest.warns(UserWarning, match="worker 0 died"):
        obs, _, terminated, truncated, _ = env.step(actions(2))
    assert not (terminated | truncated).any()
    assert not obs[:, 5].any()
    np.testing.assert_array_equal(env.step(actions(3))[0][:, 5], [0.5] * N)


def test_deaths_with_a_step_in_between_never_add_up(make_vec):
    env = make_vec(num_envs=1, num_workers=1, autoreset_mode="SameStep")
    env.reset(seed=0)
    for step in range(4):
        kill_worker(env, 0)
        with pytest.warns(UserWarning, match="worker 0 died"):
            assert env.step(actions(step, 1))[3].all()
        assert not env.step(actions(step, 1))[3].any()


def test_episodes_that_begin_after_a_death_come_from_the_seed(make_vec):
    found = []
    for _ in range(2):
        env = make_vec(num_envs=2, num_workers=2, autoreset_mode="SameStep")
        env.reset(seed=3)
        kill_worker(env, 1)
        with pytest.warns(UserWarning, match="worker 1 died"):
            found.append([env.step(actions(0, 2))[0], env.step(actions(1, 2))[0]])
    np.testing.assert_array_equal(*found)


def test_a_reset_of_episodes_that_had_ended_is_their_only_one(make_vec):
    env = make_vec(backend="serial", horizon=2)
    env.reset(seed=3)
    assert not env.step(actions(0))[2].any()
    assert env.step(actions(1))[2].all()
    env.reset(seed=4)
    np.testing.assert_array_equal(env.step(actions(2))[0][:, 5], [0.5] * N)


@pytest.mark.parametrize("backend", ["serial", "stacked"])
def test_what_a_step_returns_is_the_callers_own(make_vec, backend):
    env = make_vec(backend=backend, autoreset_mode="Disabled")
    env.reset(seed=3)
    obs = env.step(actions(0))[0]
    expected = obs.copy()
    obs[:] = 99
    again = env.reset(options={"reset_mask": np.array([True, False, False])})[0]
    np.testing.assert_array_equal(again[1:], expected[1:])
    again[:] = 99
    assert (env.step(actions(1))[0] != 99).all()


def test_a_worker_that_does_not_answer_in_time_counts_as_dead(make_vec):
    env = make_vec(num_workers=3, worker_timeout=1.0)
    env.reset(seed=3)
    os.kill(env.envs.workers[1].process.pid, signal.SIGSTOP)
    with pytest.warns(UserWarning, match="worker 1 died: killed by SIGKILL .*no answer in time"):
        truncated = env.step(actions(0))[3]
    np.testing.assert_array_equal(truncated, [False, True, False])


def test_a_worker_killed_by_a_signal_without_a_name_is_replaced(make_vec):
    env = make_vec(num_workers=3)
    env.reset(seed=3)
    os.kill(env.envs.workers[0].process.pid, signal.SIGRTMIN + 6)
    with pytest.warns(UserWarning, match=r"worker 0 died: killed by (signal|SIG)"):
        env.step(actions(0))


def test_an_interrupted_step_asks_for_a_reset(make_vec, monkeypatch):
    env = make_vec()
    env.reset(seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(env.envs, "_answers", lambda numbers: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            env.step(actions(0))
    with pytest.raises(gym.error.ResetNeeded):
        env.step(actions(0))
    expected = env.reset(seed=4)[0]
    np.testing.assert_array_equal(env.reset(seed=4)[0], expected)


def test_environments_in_workers_refuse_to_be_copied_and_go_on(make_vec):
    env = make_vec()
    env.reset(seed=3)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(WorkerError, match="use backend='serial'"):
            duplicate(env)
    env.step(actions(0))


@pytest.mark.parametrize("backend", ["stacked", "serial"])
def test_a_copy_of_environments_in_one_process_trains_alike(make_vec, backend):
    env = make_vec(backend=backend)
    env.reset(seed=3)
    env.step(actions(0))
    twin = copy.deepcopy(env)
    for step in range(1, 4):
        found, expected = twin.step(actions(step)), env.step(actions(step))
        for a, b in zip(found[:4], expected[:4], strict=True):
            np.testing.assert_array_equal(a, b)
    assert (twin.envs.envs[0].run.flat.vector == env.envs.envs[0].run.flat.vector).all()
    assert not (twin.envs.envs[0].run.flat.vector == twin.envs.envs[0].start_vector).all()


def test_threads_that_make_environments_leave_the_main_module_alone(make_vec):
    main = sys.modules["__main__"]
    threads = [threading.Thread(target=make_vec) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.modules["__main__"] is main


def test_a_daemonic_process_gets_its_environments_in_itself(make_vec, monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert make_vec().backend == "serial"
    with pytest.raises(SettingsError, match="can start no workers; use backend='serial'"):
        make_vec(backend="processes")


def test_closing_is_quick_though_another_process_holds_the_pipes(make_vec):
    env = make_vec(num_workers=2)
    env.reset(seed=0)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    started = time.monotonic()
    env.close()
    assert time.monotonic() - started < 4
    child.kill()
    child.join()


def test_a_worker_that_dies_again_and_again_is_an_error(make_vec):
    env = make_vec(num_workers=2)
    env.reset(seed=0)
    for _ in range(2):
        kill_worker(env, 1)
        with pytest.warns(UserWarning, match="worker 1 died"):
            env.step(actions(0))
    kill_worker(env, 1)
    with pytest.raises(WorkerError, match=r"worker 1 \(environments .*\) died 3 times in a row"):
        env.step(actions(0))
    with pytest.raises(gym.error.ResetNeeded):
        env.step(actions(0))
    with pytest.warns(UserWarning, match="worker 1 died"):
        env.reset(seed=0)
    env.step(actions(0))


def test_a_dead_worker_is_named_where_nothing_can_replace_its_answer(make_vec):
    env = make_vec(num_workers=2)
    env.reset(seed=0)
    kill_worker(env, 1)
    with pytest.raises(WorkerError, match="worker 1 died: killed by SIGKILL"):
        env.get_attr("history")


@pytest.mark.parametrize("backend", ["stacked", "serial"])
def test_an_environment_that_diverges_is_reported_and_the_others_go_on(make_vec, backend):
    env, whole = (make_vec(backend=backend) for _ in range(2))
    for one in (env, whole):
        one.reset(seed=3)
    env.envs.envs[1].run.flat.vector.data.fill_(float("nan"))
    obs, reward, terminated, _, info = env.step(actions(0))
    expected = whole.step(actions(0))
    np.testing.assert_array_equal(terminated, [False, True, False])
    np.testing.assert_array_equal(info["diverged"], [False, True, False])
    assert reward[1] == -10
    assert np.isfinite(obs).all()
    np.testing.assert_array_equal(obs[[0, 2]], expected[0][[0, 2]])
    found, expected = env.step(actions(1)), whole.step(actions(1))
    np.testing.assert_array_equal(found[0][[0, 2]], expected[0][[0, 2]])
    assert not env.step(actions(2))[2].any()


def test_divergence_in_workers_begins_a_new_episode(make_vec):
    env = make_vec(optimizer="sgd", learning_rate=1e30, max_grad_norm=None, autoreset_mode="SameStep")
    env.reset(seed=0)
    for step in range(20):
        obs, _, terminated, _, info = env.step(actions(step))
        if terminated.any():
            break
    first = int(np.flatnonzero(terminated)[0])
    assert info["final_info"]["diverged"][first]
    assert obs[first, 5] == 0


@pytest.mark.parametrize("backend", ["processes", "stacked", "serial"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[0.5], [2.0], [0.5]], r"environment 1: λ=2.0 must lie in \[0.1, 0.9\]"),
        ([[0.5], [0.5], [np.nan]], "environment 2: λ=nan"),
        ([[0.5], [0.5]], r"actions of shape \(2, 1\); give one λ for each of 3"),
        (0.5, "give one λ for each"),
    ],
)
def test_a_bad_action_is_named_before_anything_steps(make_vec, backend, bad, message):
    env, whole = (make_vec(backend=backend) for _ in range(2))
    for one in (env, whole):
        one.reset(seed=3)
    with pytest.raises(ActionError, match=message):
        env.step(np.array(bad) if bad != 0.5 else bad)
    np.testing.assert_array_equal(env.step(actions(0))[0], whole.step(actions(0))[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_envs": 0}, SettingsError, "num_envs=0"),
        ({"num_envs": 2.0}, SettingsError, "num_envs=2.0 must be a whole number"),
        ({"max_episode_steps": 5}, SettingsError, "vectorization_mode='sync'; horizon="),
        ({"backend": "threads"}, SettingsError, "backend='threads' must be one of"),
        ({"num_workers": 2, "backend": "serial"}, SettingsError, "goes with backend='processes', not 'serial'"),
        ({"worker_timeout": 0}, SettingsError, "worker_timeout=0 must be a number of seconds above 0"),
        ({"num_workers": 4}, SettingsError, r"num_workers=4 must lie in 1..num_envs=3"),
        ({"autoreset_mode": "never"}, SettingsError, "autoreset_mode='never' must be one of 'NextStep'"),
        ({"horizont": 3}, SettingsError, "did you mean 'horizon'"),
        ({"workers": 1}, SettingsError, "did you mean 'num_workers'"),
        ({"vectorization_mode": "sync", "backend": "serial"}, SettingsError, "argument of gym.make_vec without"),
        ({"task": "gaussian-2d"}, TaskError, "did you mean 'gaussians-2d'"),
    ],
)
def test_bad_arguments_are_named(make_vec, options, error, message):
    with pytest.raises(error, match=message):
        make_vec(**options)


def test_bad_resets_are_named(make_vec):
    env = make_vec()
    with pytest.raises(gym.error.ResetNeeded, match=r"environments \[0, 1, 2\] have no episode"):
        env.step(actions(0))
    with pytest.raises(SettingsError, match="2 seeds for 3 environments"):
        env.reset(seed=[1, 2])
    with pytest.raises(SettingsError, match="seed='a' must be a whole number"):
        env.reset(seed="a")
    env.reset(seed=0)
    for bad in (-1, [1, -2, 3], [1, 2.5, 3], 1.5):
        with pytest.raises(SettingsError, match=r"seed=.* must be a whole number"):
            env.reset(seed=bad)
    assert not env.step(actions(0))[0][:, 5].std()
    with pytest.raises(SettingsError, match="reset_mask"):
        env.reset(options={"reset_mask": np.array([1, 0, 1])})
    env.reset(seed=0)
    with pytest.raises(SettingsError, match="instance=3: this environment has a set of 0"):
        env.reset(seed=1, options={"instance": 3})
    env.step(actions(0))
    assert env.reset(seed=[4, None, 6])[0].shape == (N, 6)


def test_a_closed_environment_says_so(make_vec):
    env = make_vec()
    env.reset(seed=0)
    processes = [worker.process for worker in env.envs.workers]
    folder = Path(env.envs._folder.name)
    assert (folder / "shared.safetensors").is_file()
    env.close()
    env.close()
    assert not any(process.is_alive() for process in processes)
    assert not folder.exists()
    with pytest.raises(gym.error.ClosedEnvironmentError):
        env.step(actions(0))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_workers_map_one_copy_of_data_and_start_weights(make_vec):
    env = make_vec("mnist-trousers", num_workers=2)
    shared = [Path(f"/proc/{w.process.pid}/maps").read_text().count("shared.safetensors") for w in env.envs.workers]
    assert min(shared) > 0


def test_attributes_of_all_environments(make_vec):
    env = make_vec(num_workers=2)
    env.reset(seed=0)
    env.step(actions(0))
    assert [len(history) for history in env.get_attr("history")] == [1, 1, 1]
    env.set_attr("marked", ["a", "b", "c"])
    assert env.get_attr("marked") == ("a", "b", "c")
    env.set_attr("marked", 1)
    assert env.get_attr("marked") == (1, 1, 1)
    env.set_attr("marked", [lambda: 4, 5, 6])
    assert env.call("marked") == (4, 5, 6)
    with pytest.raises(TypeError, match="pickle"):
        env.set_attr("marked", [7, 8, threading.Lock()])
    assert env.call("marked") == (4, 5, 6)
    with pytest.raises(AttributeError, match="'nothing'"):
        env.get_attr("nothing")
    with pytest.raises(WorkerError, match="a worker failed: TypeError"):
        env.call("validate")
    with pytest.raises(SettingsError, match="2 values for 3"):
        env.set_attr("marked", [1, 2])
    assert make_vec(render_mode="rgb_array", num_envs=2).render()[1].shape == (540, 960, 3)


def test_a_task_of_the_users_own_works_in_workers(make_vec):
    task = dataclasses.replace(get_task("gaussians-2d"), name="mine-in-workers")
    register_task(dataclasses.replace(task, load_data=lambda root, download: task.load_data(root, download)))
    found, _ = make_vec("mine-in-workers").reset(seed=0)
    np.testing.assert_array_equal(found, make_vec(backend="serial").reset(seed=0)[0])


SCRIPT = """
import gymnasium as gym, numpy as np, unlearn_gym
env = gym.make_vec("SISSUnlearn-v0", num_envs=2, task="gaussians-2d")
env.reset(seed=0)
print("pids", *(worker.process.pid for worker in env.unwrapped.envs.workers), flush=True)
for _ in range({steps}):
    env.step(np.full((2, 1), 0.5))
env.close()
print("done")
"""


def test_a_script_needs_no_main_guard(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(steps=3))
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[1] == "done"
    assert done.stderr == ""


def test_workers_end_with_the_process_that_made_them(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(steps=10**9))
    parent = subprocess.Popen(
        [sys.executable, "script.py"], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()[1:]]
    assert list(tmp_path.glob("unlearn_gym-*/shared.safetensors"))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not [path for name in ("unlearn_gym-*", "pymp-*") for path in tmp_path.glob(name)]


def kill_fork_servers(monkeypatch, times: int) -> None:
    """Kill the fork server, as often, when it has been asked for a worker and not answered."""
    ensure_running, read_signed, left = forkserver.ensure_running, forkserver.read_signed, [times]

    def signal_it(number: int) -> None:
        if left[0]:
            os.kill(forkserver._forkserver._forkserver_pid, number)

    def ensure_it_runs() -> None:
        ensure_running()
        signal_it(signal.SIGSTOP)

    def read_answer(descriptor: int) -> int:
        signal_it(signal.SIGKILL)
        left[0] -= bool(left[0])
        return read_signed(descriptor)

    monkeypatch.setattr(forkserver, "ensure_running", ensure_it_runs)
    monkeypatch.setattr(forkserver, "read_signed", read_answer)


def test_a_fork_server_that_is_killed_is_started_anew(make_vec, monkeypatch):
    kill_fork_servers(monkeypatch, 1)
    found, _ = make_vec(num_workers=2).reset(seed=0)
    np.testing.assert_array_equal(found, make_vec(backend="serial").reset(seed=0)[0])


def test_a_fork_server_that_is_killed_again_and_again_is_an_error(make_vec, monkeypatch):
    kill_fork_servers(monkeypatch, 99)
    with pytest.raises(WorkerError, match=r"^no worker process could be started in 3 attempts .*backend='serial'$"):
        make_vec()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_sb3_sees_what_it_sees_of_single_environments(make_vec):
    def single():
        env = gym.make(unlearn_gym.ENV_ID, task="gaussians-2d", horizon=3)
        return Monitor(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))

    ours = VecMonitor(SB3VecEnv(make_vec(horizon=3, autoreset_mode="SameStep")))
    theirs = DummyVecEnv([single] * N)
    assert ours.action_space == theirs.action_space
    assert ours.observation_space == theirs.observation_space
    for env in (ours, theirs):
        env.seed(7)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    for step in range(7):
        chosen = (actions(step) * 2 - 1).astype(np.float32)
        (obs, reward, done, infos), expected = ours.step(chosen), theirs.step(chosen)
        np.testing.assert_array_equal(obs, expected[0])
        np.testing.assert_array_equal(reward, expected[1])
        np.testing.assert_array_equal(done, expected[2])
        for info, other in zip(infos, expected[3], strict=True):
            assert info.keys() == other.keys()
            np.testing.assert_equal(info["diverged"], other["diverged"])
            if "terminal_observation" in other:
                np.testing.assert_array_equal(info["terminal_observation"], other["terminal_observation"])
                assert info["TimeLimit.truncated"] is other["TimeLimit.truncated"] is False
                assert info["episode"]["r"] == pytest.approx(other["episode"]["r"], abs=1e-4)
        for info, other in zip(ours.venv.reset_infos, theirs.reset_infos, strict=True):
            assert info.keys() == other.keys()
            np.testing.assert_equal(info["terms"], other["terms"])
    np.testing.assert_array_equal(ours.reset(), theirs.reset())  # the seeds were for one reset
    ours.seed(7)
    first = ours.reset()
    assert (first != ours.reset()).any()


def test_sb3_takes_the_end_of_a_dead_workers_episode_for_a_truncation(make_vec):
    env = make_vec(num_workers=3, autoreset_mode="SameStep")
    adapted = SB3VecEnv(env)
    assert not adapted.has_attr("nothing")
    adapted.reset()
    kill_worker(env, 0)
    with pytest.warns(UserWarning, match="worker 0 died"):
        _, _, done, infos = adapted.step(np.zeros((N, 1), np.float32))
    np.testing.assert_array_equal(done, [True, False, False])
    assert infos[0]["TimeLimit.truncated"] is True
    assert infos[0]["terminal_observation"].shape == (6,)


def test_ppo_learns_on_it(make_vec):
    env = VecMonitor(SB3VecEnv(make_vec(num_envs=2, horizon=5, autoreset_mode="SameStep")))
    agent = PPO("MlpPolicy", env, n_steps=10, batch_size=10, n_epochs=1, seed=0, device="cpu").learn(20)
    assert agent.num_timesteps == 20
    assert len(agent.ep_info_buffer) == 4
    assert env.get_attr("render_mode") == [None, None]
    assert env.env_is_wrapped(Monitor) == [False, False]
    env.set_attr("marked", 3)
    env.set_attr("marked", 4, [0])
    assert env.get_attr("marked") == [4, 3]
    assert env.get_attr("marked", [1]) == [3]
    assert callable(env.get_attr("reset", [0])[0])
    env.reset()
    env.step(np.zeros((2, 1), np.float32))
    env.env_method("reset", indices=[0])
    np.testing.assert_allclose(env.step(np.zeros((2, 1), np.float32))[0][:, 5], [0.2, 0.4])
    env.set_options({"instance": 3})
    with pytest.raises(SettingsError, match="instance=3: this environment has a set of 0"):
        env.reset()


def test_sb3_refuses_another_autoreset_mode(make_vec):
    with pytest.raises(SettingsError, match="needs autoreset_mode='SameStep', not 'NextStep'"):
        SB3VecEnv(make_vec())
    with pytest.raises(SettingsError, match="is no SISSUnlearnVectorEnv"):
        SB3VecEnv(gym.wrappers.vector.RescaleAction(make_vec(), np.float32(-1), np.float32(1)))
