"""Items 4, 5 and the second half of 7: many environments, training on them, and their memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import gymnasium as gym
import joblib
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv

from unlearn_gym import ENV_ID
from unlearn_gym.benchmark.figures import Figure
from unlearn_gym.benchmark.step import ENDLESS, make_env, stepping
from unlearn_gym.benchmark.timing import repeated, take_turns, threads
from unlearn_gym.envs import SISSUnlearnVectorEnv
from unlearn_gym.envs.pool import WorkerPool
from unlearn_gym.envs.workers import PRELOADED

OURS, ONE = "ours", "one"


def make_single(task: str, device: str, threads: int | None) -> gym.Env[Any, Any]:
    """An environment for a worker process of another library's vector environment."""
    if threads is not None:
        torch.set_num_threads(threads)
    return gym.make(f"unlearn_gym:{ENV_ID}", task=task, device=device, horizon=ENDLESS)


def make_ours(task: str, device: str, num_envs: int, **options: Any) -> SISSUnlearnVectorEnv:
    """Our vector environment, by its id."""
    env = gym.make_vec(ENV_ID, num_envs=num_envs, task=task, device=device, **({"horizon": ENDLESS} | options))
    assert isinstance(env.unwrapped, SISSUnlearnVectorEnv)
    return env.unwrapped


@contextlib.contextmanager
def contestants(task: str, device: str, num_envs: int) -> Iterator[dict[str, Callable[[], Any]]]:
    """A step function of each vector environment, all of them ready at once; each sleeps while another works."""
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    multiprocessing.set_forkserver_preload(PRELOADED)  # for all alike, whoever starts the server
    each = max(1, joblib.cpu_count() // num_envs)
    here, there = partial(make_single, task, device, None), partial(make_single, task, device, each)
    actions = np.full((num_envs, 1), 0.5, dtype=np.float32)
    with contextlib.ExitStack() as stack:
        steps: dict[str, Callable[[], Any]] = {}
        makers: dict[str, Callable[[], Any]] = {
            OURS: lambda: make_ours(task, device, num_envs),
            "DummyVecEnv": lambda: DummyVecEnv([here] * num_envs),
            "SubprocVecEnv": lambda: SubprocVecEnv([there] * num_envs, start_method="forkserver"),
            "AsyncVectorEnv": lambda: AsyncVectorEnv([there] * num_envs, context="forkserver"),
        }
        for name, make in makers.items():
            with threads(torch.get_num_threads()):  # AsyncVectorEnv calls its first maker here, too
                env = make()
            stack.callback(env.close)
            if isinstance(env, gym.vector.VectorEnv):
                env.reset(seed=0)  # equal seeds: equal batches, hence equal work
            else:
                env.seed(0)
                env.reset()
            steps[name] = partial(env.step, actions)
        yield steps


def many(
    task: str, device: str, counts: tuple[int, ...], rounds: int, steps: int
) -> tuple[list[Figure], dict[str, Any]]:
    """Item 4: steps a second of vector environments against each other and against one environment.

    A turn is about ``steps`` steps in all, so that threads which slept while others worked are awake for most of it.
    Returns also the seconds of every turn.
    """
    single = make_env(task, device)
    figures, raw = [], {}
    for n in counts:
        times = -(-steps // n)
        with contestants(task, device, n) as functions:
            blocks = {name: repeated(function, times) for name, function in functions.items()}
            one = repeated(stepping(single), times * n)
            turns = take_turns({ONE: one, **blocks}, rounds, device=device, warmup=1)
        raw[f"{task}, {n} environments"] = {"steps": n * times, "seconds": turns.seconds}
        rates = {name: n * times / turns.median(name) for name in (ONE, *blocks)}
        figures += [Figure("4", f"{task}, {n} envs, {name}", rates[name], "steps/s") for name in blocks]
        others = min(turns.ratio(name, OURS) for name in blocks if name != OURS)
        figures.append(
            Figure("4", f"{task}, {n} envs, ours / best of the three others", others, "×", 1.0, at_least=True)
        )
        if n > 1:
            title = f"{task}, {n} envs, ours / one environment with all threads"
            figures.append(Figure("4", title, turns.ratio(ONE, OURS), "×", 1.6, at_least=True))
    figures.append(Figure("4", f"{task}, one environment, all threads", rates[ONE], "steps/s"))
    return [*figures, _bound(task, device, rounds, steps)], raw


def _bound(task: str, device: str, rounds: int, steps: int) -> Figure:
    """What full use of every core would give over one environment on all threads."""
    cores, env = joblib.cpu_count(), make_env(task, device)

    def with_threads(count: int) -> Callable[[], None]:
        def block() -> None:
            with threads(count):
                repeated(stepping(env), steps)()

        return block

    turns = take_turns({"one": with_threads(1), "all": with_threads(cores)}, rounds, device=device)
    title = f"{task}, {cores} × rate with one thread / rate with all threads, one environment"
    return Figure("4", title, cores * turns.ratio("all", "one"), "×")


def training(task: str, device: str, rollouts: int) -> list[Figure]:
    """Item 5: steps a second inside SB3 PPO's ``learn``, with the shipped settings' sizes, over those outside."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecMonitor

    from unlearn_gym.envs import SB3VecEnv

    n_envs, n_steps = 2, 240
    env = make_ours(task, device, n_envs, horizon=60, autoreset_mode="SameStep")
    adapted = VecMonitor(SB3VecEnv(env))
    adapted.seed(0)
    agent = PPO(
        "MlpPolicy", adapted, n_steps=n_steps, batch_size=120, n_epochs=10, seed=0, device="cpu",
        policy_kwargs={"net_arch": [32, 32]},
    )  # fmt: skip
    actions, seconds = np.full((n_envs, 1), 0.5), {"alone": 0.0, "learn": 0.0}
    before = torch.get_num_threads()
    for turn in range(rollouts + 1):  # the first one warms up
        env.reset(seed=0)
        started = time.perf_counter()
        for _ in range(n_steps):
            env.step(actions)
        between = time.perf_counter()
        torch.set_num_threads(1)  # as agents.train does: the cores are the workers'
        agent.learn(n_envs * n_steps, reset_num_timesteps=False)
        torch.set_num_threads(before)
        if turn:
            seconds["alone"] += between - started
            seconds["learn"] += time.perf_counter() - between
    adapted.close()
    rate = rollouts * n_envs * n_steps / seconds["learn"]
    share = seconds["alone"] / seconds["learn"]
    return [
        Figure("5", f"{task}, PPO learn / vector environment alone", share, "×", 0.9, at_least=True),
        Figure("5", f"{task}, PPO learn", rate, "steps/s"),
    ]  # fmt: skip


def memory(task: str) -> list[Figure]:
    """Item 7, second half: proportional set size (PSS) of worker processes with one environment each, and of
    the fork server, which holds the imports that they share.

    Read from Linux's ``/proc``; elsewhere there is nothing to report.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        return []
    used = []
    for n in (1, 2, 3):
        env = make_ours(task, "cpu", n, backend="processes", num_workers=n)
        env.reset(seed=0)
        for _ in range(3):
            env.step(np.full((n, 1), 0.5))
        assert isinstance(env.envs, WorkerPool)
        pids = [worker.process.pid for worker in env.envs.workers]
        server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        used.append(sum(_kilobytes(pid, "smaps_rollup", "Pss") for pid in [server, *pids]) / 1024)
        peak, shared = _kilobytes(pids[-1], "status", "VmHWM") / 1024, _mapped(pids[-1])
        env.close()
    return [
        Figure("7", f"{task}, memory of one worker with one environment and of the imports", used[0], "MB"),
        Figure("7", f"{task}, memory of each further one", (used[2] - used[0]) / 2, "MB"),
        Figure("7", f"{task}, peak resident set of one, with all that it shares", peak, "MB"),
        Figure("7", f"{task}, data and start weights, mapped from one file by all", shared, "MB"),
    ]


def _kilobytes(pid: int | None, file: str, name: str) -> int:
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _mapped(pid: int | None) -> float:
    """Size in MB of what process ``pid`` maps from the workers' shared file."""
    regions = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "shared.safe" in line]
    bounds = [[int(end, 16) for end in region[0].split("-")] for region in regions]
    return sum(stop - start for start, stop in bounds) / 2**20
