"""Many unlearning runs at once: ``gym.make_vec("SISSUnlearn-v0", num_envs=N)``."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import joblib
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from unlearn_gym.envs.actions import parse_action
from unlearn_gym.envs.group import EnvGroup
from unlearn_gym.envs.pool import WorkerPool
from unlearn_gym.envs.siss_unlearn import SISSUnlearnEnv, reset_options
from unlearn_gym.errors import ActionError, SettingsError, shown
from unlearn_gym.run.actions import Action
from unlearn_gym.run.terms import Moments
from unlearn_gym.system.memory import PROCESS_BYTES, check_memory
from unlearn_gym.system.torch_state import insulated
from unlearn_gym.system.values import is_real, is_whole, numbers_of
from unlearn_gym.tasks import resolve_data_root

BACKENDS = ("auto", "processes", "stacked", "serial")
LONGEST_TIMEOUT = 1_000_000
"""Seconds; the operating system's own timers end at two million."""
ENV_BYTES = 64 * 1024
"""What an environment takes beside its run: spaces, generators, observations, history."""

Array = NDArray[Any]


class SISSUnlearnVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.float32], Array]):
    """``num_envs`` copies of :class:`SISSUnlearnEnv`, each a live run of its own.

    ``reset(seed=s)`` gives environment i the seed s + i (or pass a list); each then runs the episodes that a
    single environment of that seed runs, bit for bit under ``backend="processes"`` and ``"serial"`` on a CPU
    with equal torch threads, and up to rounding under ``"stacked"``.

    ## Arguments
    Those of :class:`SISSUnlearnEnv`, and:

    ``backend``: ``"processes"``: worker processes, one for each core or less, which share out the environments
    and the cores; ``"stacked"``: all runs in this process, their networks evaluated as one over stacked parameters
    (:class:`unlearn_gym.run.stacked.StackedRuns`); ``"serial"``: one after the other in this process; ``"auto"``:
    processes on a CPU, stacked elsewhere, serial for one environment.
    ``num_workers``: worker processes; default: the cores that this process may use, at most ``num_envs``.
    ``worker_timeout``: seconds after which a worker that has not answered counts as dead (default: never).
    ``autoreset_mode``: gymnasium's ``AutoresetMode`` or its value, ``"NextStep"`` (default), ``"SameStep"`` (with
    ``final_obs`` and ``final_info``) or ``"Disabled"`` (reset with ``options={"reset_mask": ...}``).

    ## What is shared, and what happens when a worker dies
    Workers map data and start weights (of a one-step model, the generator's) into memory from one file.
    A worker that dies is reported by a warning
    and replaced: its environments' episodes end as truncated with ``info["worker_died"]`` and new ones begin;
    the others go on. An invalid action raises :class:`ActionError` before any environment steps.

    Raises what :class:`SISSUnlearnEnv` raises, and ``WorkerError`` when workers cannot be kept alive.
    """

    @insulated
    def __init__(
        self,
        num_envs: int = 1,
        task: str | None = None,
        *,
        instances: str | Sequence[Any] | None = None,
        backend: str = "auto",
        num_workers: int | None = None,
        worker_timeout: float | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        data_root: str | os.PathLike[str] | None = None,
        download: bool = False,
        **options: Any,
    ) -> None:
        if not is_whole(num_envs) or num_envs < 1:
            raise SettingsError(f"num_envs={shown(num_envs)} must be a whole number of at least 1")
        if num_workers is not None and not (is_whole(num_workers) and 1 <= num_workers <= num_envs):
            raise SettingsError(f"num_workers={shown(num_workers)} must lie in 1..num_envs={shown(num_envs)}")
        if worker_timeout is not None and not _is_timeout(worker_timeout):
            raise SettingsError(
                f"worker_timeout={shown(worker_timeout)} must be a number of seconds above 0 and up to "
                f"{LONGEST_TIMEOUT:,}, or None to wait for ever"
            )
        if not isinstance(backend, str) or backend not in BACKENDS:
            raise SettingsError(f"backend={shown(backend)} must be one of {', '.join(BACKENDS)}")
        mode = _parse_mode(autoreset_mode)
        options = {"instances": instances, "render_mode": render_mode, **options}
        first = SISSUnlearnEnv(task, data_root=data_root, download=download, **options)
        num_envs = int(num_envs)
        self.num_envs, self.render_mode, self.settings = num_envs, render_mode, first.settings
        self.backend = self._choose(backend, num_workers, instances is not None)
        cores = joblib.cpu_count()
        workers = min(int(num_workers or cores), num_envs) if self.backend == "processes" else 0
        _check_size(first, num_envs, workers, stacked=self.backend == "stacked")
        self.metadata = {**SISSUnlearnEnv.metadata, "autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = first.observation_space, first.action_space
        self.observation_space = batch_space(first.observation_space, num_envs)
        self.action_space = batch_space(first.action_space, num_envs)
        root = resolve_data_root(data_root)
        self._data_root = None if root is None else str(root.resolve())
        if self.backend == "processes":
            self.envs: EnvGroup | WorkerPool = WorkerPool(
                first, self._data_root, options, num_envs, mode,
                num_workers=workers, threads=max(1, cores // workers), draw_seed=self._draw_seed,
                timeout=worker_timeout,
            )  # fmt: skip
        else:
            rest = [SISSUnlearnEnv(task, data_root=data_root, **options) for _ in range(num_envs - 1)]
            self.envs = EnvGroup([first, *rest], mode, stacked=self.backend == "stacked")
        self._obs = np.zeros(self.observation_space.shape or (), dtype=np.float32)
        self._needs_reset = np.ones(num_envs, dtype=np.bool_)

    def _choose(self, backend: str, num_workers: int | None, many_instances: bool) -> str:
        if num_workers is not None and backend not in ("auto", "processes"):
            raise SettingsError(f"num_workers={num_workers} goes with backend='processes', not {backend!r}")
        if many_instances and backend == "stacked":
            raise SettingsError("backend='stacked' needs equal runs; with instances use 'processes' or 'serial'")
        within_a_pool = multiprocessing.current_process().daemon
        if within_a_pool and (backend == "processes" or num_workers is not None):
            raise SettingsError("a daemonic process can start no workers; use backend='serial' here")
        if backend != "auto" or num_workers is not None:
            return backend if backend != "auto" else "processes"
        if self.num_envs == 1 or within_a_pool:
            return "serial"
        if torch.device(self.settings.device).type == "cpu":
            return "processes"
        return "stacked" if self.settings.norms_period == 1 and not many_instances else "serial"

    def _draw_seed(self) -> int:
        return int(self.np_random.integers(2**32))

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode in every environment, or where ``options["reset_mask"]``, bool ``(N,)``, is True."""
        obs, infos = self.reset_list(seed=seed, options=options)
        return obs, self._batch_infos(infos)

    def reset_list(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
        """As :meth:`reset`, with the infos as a list, one dict for each environment."""
        self._check_open()
        options = reset_options(options)
        given = options.pop("reset_mask", np.ones(self.num_envs, dtype=np.bool_))
        try:
            mask = np.asarray(given)
        except (TypeError, ValueError, RuntimeError):  # of different lengths
            mask = np.zeros(0, dtype=np.bool_)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise SettingsError(
                f"reset_mask={shown(given)} must be {self.num_envs} booleans, at least one of them True"
            )
        seeds = self._spread(seed)
        asked = {i: seeds[i] for i in range(self.num_envs) if mask[i]}
        before = self._needs_reset.copy()
        self._needs_reset[list(asked)] = True
        try:
            found = self.envs.reset(asked, options or None)
        except SettingsError:  # raised before any environment changed
            self._needs_reset = before
            raise
        self._obs = self._obs.copy()
        for i, (obs, _) in found.items():
            self._obs[i], self._needs_reset[i] = obs, False
        return self._obs.copy(), [found[i][1] if i in found else {} for i in range(self.num_envs)]

    def _spread(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        """The seed of each environment."""
        if seed is None:
            return [None] * self.num_envs
        if is_whole(seed):
            seeds: list[Any] = [int(seed) + i for i in range(self.num_envs)]
        elif isinstance(seed, list | tuple | np.ndarray):
            seeds = [int(one) if is_whole(one) else one for one in seed]
        else:
            raise SettingsError(f"seed={shown(seed)} must be a whole number, or a list of one for each environment")
        if len(seeds) != self.num_envs:
            raise SettingsError(f"{len(seeds)} seeds for {self.num_envs} environments; give one for each")
        for one in seeds:
            if one is not None and (not is_whole(one) or one < 0):
                raise SettingsError(f"seed={shown(one)} must be a whole number of at least 0, or None")
        if is_whole(seed):
            super().reset(seed=int(seed))  # for what this class draws itself
        return seeds

    def step(self, actions: NDArray[np.float32]) -> tuple[NDArray[np.float32], Array, Array, Array, dict[str, Any]]:
        """One step of every environment; ``actions (N, 1)``, or ``(N,)``."""
        obs, rewards, terminated, truncated, infos = self.step_list(actions)
        return obs, rewards, terminated, truncated, self._batch_infos(infos)

    def step_list(self, actions: NDArray[Any]) -> tuple[NDArray[np.float32], Array, Array, Array, list[dict[str, Any]]]:
        """As :meth:`step`, with the infos as a list, one dict for each environment."""
        self._check_open()
        if self._needs_reset.any():
            indices = np.flatnonzero(self._needs_reset).tolist()
            raise gym.error.ResetNeeded(
                f"environments {shown(indices)} have no episode; call reset() before the next step"
            )
        parsed = self._parse(actions)
        try:
            outcomes = self.envs.step(parsed)
        except BaseException:  # an interrupt, too: some environments may have stepped
            self._needs_reset[:] = True
            raise
        obs, rewards, terminated, truncated, infos = zip(*outcomes, strict=True)
        self._obs = np.stack(obs)
        if self.metadata["autoreset_mode"] is AutoresetMode.DISABLED:
            self._needs_reset = np.array(terminated) | np.array(truncated)
        return (
            self._obs.copy(), np.array(rewards, dtype=np.float64), np.array(terminated, dtype=np.bool_),
            np.array(truncated, dtype=np.bool_), list(infos),
        )  # fmt: skip

    def _parse(self, actions: Any) -> list[Action]:
        parsed = []
        for i, action in enumerate(numbers_of(actions, self.num_envs)):
            try:
                parsed.append(parse_action(action, self.settings.lambda_min, self.settings.lambda_max))
            except ActionError as error:
                raise ActionError(f"environment {i}: {error}") from None
        return parsed

    def _batch_infos(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        batched: dict[str, Any] = {}
        for i, info in enumerate(infos):
            batched = self._add_info(batched, info, i)
        return batched

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        """As gymnasium has it; batches of moments print as short as one does."""
        batched = super()._add_info(vector_infos, env_info, env_num)
        if "second_moment" in env_info:
            batched["second_moment"] = batched["second_moment"].view(Moments)
        return batched

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The attribute ``name`` of every environment, called with the arguments where it can be called."""
        self._check_open()
        return tuple(self.envs.call(name, args, kwargs, range(self.num_envs)))

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """The attribute ``name`` of every environment."""
        self._check_open()
        return tuple(self.envs.get_attr(name, range(self.num_envs)))

    def set_attr(self, name: str, values: Any) -> None:
        """Set the attribute ``name`` of each environment to its of ``values``, or all to the one value."""
        self._check_open()
        spread = list(values) if isinstance(values, list | tuple) else [values] * self.num_envs
        if len(spread) != self.num_envs:
            raise SettingsError(f"{len(spread)} values for {self.num_envs} environments; give one for each")
        self.envs.set_attr(name, dict(enumerate(spread)))

    def render(self) -> tuple[Any, ...]:
        """A frame of every environment, see :meth:`SISSUnlearnEnv.render`."""
        return self.call("render")

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every environment's model to ``folder/env-I.safetensors``, see :meth:`SISSUnlearnEnv.save`.

        Where an episode has ended, that is before the autoreset; with ``"SameStep"`` the next one has begun.
        """
        self._check_open()
        paths = [Path(folder).absolute() / f"env-{i}.safetensors" for i in range(self.num_envs)]
        for i, path in enumerate(paths):
            self.envs.call("save", (path,), {}, [i])
        return paths

    def _check_open(self) -> None:
        if self.closed:
            raise gym.error.ClosedEnvironmentError("this vector environment is closed; make a new one")

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers."""
        if hasattr(self, "envs"):
            self.envs.close()


def _is_timeout(value: Any) -> bool:
    return is_real(value) and 0 < value <= LONGEST_TIMEOUT


def _check_size(first: SISSUnlearnEnv, num_envs: int, workers: int, *, stacked: bool) -> None:
    """Raise :class:`SettingsError` where ``num_envs`` environments like ``first`` do not go into memory."""
    device, name = first.settings.device, f"num_envs={shown(num_envs)}"
    if num_envs > 1:
        check_memory(num_envs * first.run.state_bytes, name, device)
        check_memory(num_envs * ENV_BYTES + workers * PROCESS_BYTES, f"{name}, num_workers={workers}")
    if stacked:
        check_memory(num_envs * first.run.update_bytes, f"{name}, batch_size={first.settings.batch_size}", device)


def _parse_mode(mode: AutoresetMode | str) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError:
        known = ", ".join(repr(m.value) for m in AutoresetMode)
        raise SettingsError(f"autoreset_mode={shown(mode)} must be one of {known}") from None
