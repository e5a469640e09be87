"""Worker processes, each with a group of environments: every core busy, none of them waiting for another's."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from unlearn_gym.envs.group import EnvGroup, Outcome, Reset, finished
from unlearn_gym.envs.siss_unlearn import SISSUnlearnEnv
from unlearn_gym.errors import UnlearnGymError, WorkerError
from unlearn_gym.tasks import Task, TaskData, provide_data, register_task, task_names

PRELOADED = [__name__, "torch._dynamo"]
"""Imported once and shared by all workers; torch's optimizers load the second when the first one is made."""

MAX_DEATHS = 3
"""A worker that dies so often without finishing a step in between is not started again."""


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker needs to make its environments; data and start weights are in the file ``shared``."""

    task: Task
    data_root: str | None
    options: dict[str, Any]
    mode: AutoresetMode
    threads: int
    shared: Path


class WorkerDied(Exception):
    """The process at the other end is gone."""


def serve(connection: Connection, pickled: bytes, size: int) -> None:
    """A worker's life: make ``size`` environments, then answer until the other end hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    with contextlib.suppress(EOFError, OSError):
        try:
            group = _make_group(cloudpickle.loads(pickled), size)
        except Exception as error:
            connection.send((0, False, _portable(error)))
            return
        connection.send((0, True, None))
        while True:
            ticket, name, args, kwargs = connection.recv()
            try:
                answer = ForkingPickler.dumps((ticket, True, getattr(group, name)(*args, **kwargs)))
            except Exception as error:
                answer = ForkingPickler.dumps((ticket, False, _portable(error)))
            connection.send_bytes(answer)


def _make_group(plan: WorkerPlan, size: int) -> EnvGroup:
    torch.set_num_threads(plan.threads)
    if plan.task.name not in task_names():
        register_task(plan.task)
    data, more = TaskData.load(plan.shared)
    provide_data(plan.task, plan.data_root, data)
    envs = [SISSUnlearnEnv(plan.task.name, data_root=plan.data_root, **plan.options) for _ in range(size)]
    envs[0].share(more["start_vector"], envs[0].run.data)
    return EnvGroup(envs, plan.mode)


def _portable(error: Exception) -> Exception:
    """The package's and gymnasium's own errors as they are, others by type and message."""
    if isinstance(error, UnlearnGymError | gym.error.Error):
        return error
    return WorkerError(f"a worker failed: {type(error).__name__}: {error}")


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Start processes that do not import the caller's script again: they need nothing of it, and a script
    without ``if __name__ == "__main__"`` would start workers of its own there.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Worker:
    """One process and the pipe to it."""

    def __init__(self, pickled: bytes, indices: range) -> None:
        self.indices = indices
        self.deaths = 0
        self._ticket = 0
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload(PRELOADED)
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(  # type: ignore[attr-defined]
            target=serve, args=(theirs, pickled, len(indices)), daemon=True
        )
        with _hidden_main():
            self.process.start()
        theirs.close()

    def send(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Ask for ``name`` of the worker's group; a process that is gone shows when the answer is awaited."""
        self._ticket += 1
        with contextlib.suppress(OSError):
            self.connection.send((self._ticket, name, args, kwargs))

    def receive(self) -> Any:
        """The answer to the last question, or the error that the worker raised; raises :class:`WorkerDied`.

        Answers to earlier questions, which an interrupt kept from being received, are dropped.
        """
        ticket = -1
        while ticket != self._ticket:
            try:
                ticket, succeeded, answer = self.connection.recv()
            except (EOFError, OSError):
                raise WorkerDied from None
        if not succeeded:
            raise answer
        return answer

    def stop(self) -> None:
        """End the process, by force where it does not end by itself."""
        self.connection.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def describe_end(self) -> str:
        """How the process ended."""
        self.process.join(timeout=5)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -9 else "")
        return f"exit status {code}"


class WorkerPool:
    """The methods of :class:`EnvGroup` over environments in worker processes.

    Data and start weights are written once to a file that every worker maps into its memory. A worker that
    dies is reported by a warning and replaced: episodes of its environments end as truncated, with
    ``info["worker_died"]``, and the next ones begin from a seed of ``draw_seed``; the other environments
    go on. After three deaths in a row without a finished step, :class:`WorkerError`.
    """

    def __init__(
        self,
        template: SISSUnlearnEnv,
        data_root: str | None,
        options: dict[str, Any],
        num_envs: int,
        mode: AutoresetMode,
        *,
        num_workers: int,
        threads: int,
        draw_seed: Callable[[], int],
    ) -> None:
        self.mode, self.draw_seed = mode, draw_seed
        self._folder = tempfile.TemporaryDirectory(prefix="unlearn_gym-")
        shared = Path(self._folder.name) / "shared.safetensors"
        template.run.data.save(shared, start_vector=template.start_vector)
        self._pickled = cloudpickle.dumps(WorkerPlan(template.task, data_root, options, mode, threads, shared))
        self._last: list[NDArray[np.float32]] = [
            np.zeros(template.observation_space.shape, np.float32) for _ in range(num_envs)
        ]
        bounds = np.linspace(0, num_envs, num_workers + 1).round().astype(int).tolist()
        slices = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
        self.workers: list[Worker] = []
        try:
            for indices in slices:
                self.workers.append(Worker(self._pickled, indices))
            for worker in self.workers:
                self._await_start(worker)
        except BaseException:
            self.close()
            raise

    def _await_start(self, worker: Worker) -> None:
        try:
            worker.receive()
        except WorkerDied:
            raise WorkerError(f"a worker process did not start: {worker.describe_end()}; try fewer num_envs") from None

    def reset(self, seeds: Mapping[int, int | None], options: dict[str, Any] | None = None) -> dict[int, Reset]:
        """Begin an episode in each environment that ``seeds`` names by its index."""
        asked = {}
        for number, worker in enumerate(self.workers):
            own = {i - worker.indices.start: seeds[i] for i in worker.indices if i in seeds}
            if own:
                asked[number] = own
                worker.send("reset", own, options)
        found: dict[int, Reset] = {}
        for number, answer in self._answers(asked).items():
            own = asked[number]
            if isinstance(answer, WorkerDied):
                answer = self._replace(number, {i: self.draw_seed() if s is None else s for i, s in own.items()})
            found |= {i + self.workers[number].indices.start: reset for i, reset in answer.items()}
        for i, (obs, _) in found.items():
            self._last[i] = obs
        return found

    def step(self, lambdas: Sequence[float]) -> list[Outcome]:
        """One step of every environment, all workers at once."""
        for worker in self.workers:
            worker.send("step", [lambdas[i] for i in worker.indices])
        outcomes: list[Outcome] = []
        for number, answer in self._answers(range(len(self.workers))).items():
            if isinstance(answer, WorkerDied):
                answer = self._lost(number)
            else:
                self.workers[number].deaths = 0
            outcomes += answer
        self._last = [outcome.obs for outcome in outcomes]
        return outcomes

    def _answers(self, numbers: Any) -> dict[int, Any]:
        """The answer of each worker asked; an error is raised only after all have answered."""
        answers: dict[int, Any] = {}
        errors: list[Exception] = []
        for number in numbers:
            try:
                answers[number] = self.workers[number].receive()
            except WorkerDied as death:
                answers[number] = death
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return answers

    def _lost(self, number: int) -> list[Outcome]:
        """Outcomes of the environments of a worker that died: truncated episodes, and new ones begun."""
        worker = self.workers[number]
        end = f"worker {number} died: {worker.describe_end()}"
        fresh = self._replace(number, {i: self.draw_seed() for i in range(len(worker.indices))})
        last = [Outcome(self._last[i], 0.0, False, True, {"worker_died": end}) for i in worker.indices]
        if self.mode is AutoresetMode.SAME_STEP:
            return [finished(outcome, fresh[i]) for i, outcome in enumerate(last)]
        if self.mode is AutoresetMode.NEXT_STEP:
            self.workers[number].send("begin_at_next_step")
            self.workers[number].receive()
        return last

    def _replace(self, number: int, seeds: Mapping[int, int | None]) -> dict[int, Reset]:
        """Start a new worker in place of a dead one and begin episodes in its environments."""
        old = self.workers[number]
        end, names = old.describe_end(), ", ".join(map(str, old.indices))
        old.stop()
        if old.deaths + 1 >= MAX_DEATHS:
            raise WorkerError(f"worker {number} (environments {names}) died {MAX_DEATHS} times in a row: {end}")
        gym.logger.warn(f"worker {number} died: {end}; environments {names} begin new episodes in a new process")
        new = self.workers[number] = Worker(self._pickled, old.indices)
        new.deaths = old.deaths + 1
        self._await_start(new)
        new.send("reset", {i: seeds[i] if i in seeds else self.draw_seed() for i in range(len(new.indices))})
        return {i: reset for i, reset in new.receive().items() if i in seeds}

    def call(self, name: str, *args: Any, **kwargs: Any) -> list[Any]:
        """The attribute ``name`` of every environment, called with the arguments where it can be called."""
        for worker in self.workers:
            worker.send("call", name, *args, **kwargs)
        return [value for answer in self._living_answers() for value in answer]

    def set_attr(self, name: str, values: Sequence[Any]) -> None:
        """Set the attribute ``name`` of each environment to its value."""
        for worker in self.workers:
            worker.send("set_attr", name, [values[i] for i in worker.indices])
        self._living_answers()

    def _living_answers(self) -> list[Any]:
        answers = self._answers(range(len(self.workers)))
        for number, answer in answers.items():
            if isinstance(answer, WorkerDied):
                end = self.workers[number].describe_end()
                raise WorkerError(f"worker {number} died: {end}; the next step or reset replaces it")
        return list(answers.values())

    def close(self) -> None:
        """End all workers and remove the shared file."""
        for worker in self.workers:
            worker.stop()
        self._folder.cleanup()
