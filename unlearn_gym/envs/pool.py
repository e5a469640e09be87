"""Environments shared out among worker processes: the methods of a group, and what happens when a worker dies."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from unlearn_gym.envs.group import Asked, Outcome, Reset, finished
from unlearn_gym.envs.siss_unlearn import SISSUnlearnEnv
from unlearn_gym.envs.workers import Worker, WorkerDied, WorkerPlan, arguments
from unlearn_gym.errors import WorkerError, error_line
from unlearn_gym.run.actions import Action
from unlearn_gym.tasks import get_task

Value = TypeVar("Value")

MAX_DEATHS = 3
"""A worker that dies so often without finishing a step in between is not started again."""


class WorkerPool(Asked):
    """The methods of :class:`EnvGroup` over environments in worker processes.

    Data and start weights are written once to a file that every worker maps into its memory. A worker that
    dies is reported by a warning and replaced: episodes of its environments end as truncated, with
    ``info["worker_died"]``, and the next ones begin from a seed of ``draw_seed``; the other environments
    go on. After three deaths in a row without a finished step, :class:`WorkerError`. It cannot be copied.
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
        timeout: float | None = None,
    ) -> None:
        self.mode, self.draw_seed, self.timeout = mode, draw_seed, timeout
        self._folder = tempfile.TemporaryDirectory(prefix="unlearn_gym-", ignore_cleanup_errors=True)
        shared = Path(self._folder.name) / "shared.safetensors"
        template.run.data.save(shared, start_vector=template.start_vector)
        others = [get_task(instance.task) for instance in template.instances or ()]
        tasks = tuple(dict.fromkeys([template.task, *others]))
        plan = WorkerPlan(tasks, data_root, options, mode, threads, shared)
        try:
            self._pickled = cloudpickle.dumps(plan)
        except Exception as error:
            reason = f"task {template.task.name!r} cannot be sent to worker processes ({error_line(error)})"
            raise WorkerError(f"{reason}; use backend='serial'") from None
        self._last: list[NDArray[np.float32]] = [
            np.zeros(template.observation_space.shape, np.float32) for _ in range(num_envs)
        ]
        self._ended = [False] * num_envs
        self._orphans: dict[int, str] = {}
        self._named: dict[int, dict[str, Any]] = {}
        """Reset options last given to an environment: the instance that they name stays when a worker is replaced."""
        bounds = np.linspace(0, num_envs, num_workers + 1).round().astype(int).tolist()
        slices = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
        self.workers: list[Worker] = []
        try:
            for indices in slices:
                self.workers.append(Worker(self._pickled, indices, timeout))
            for worker in self.workers:
                self._await_start(worker)
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> Any:
        raise WorkerError("environments in worker processes cannot be copied or pickled; use backend='serial'")

    def _by_worker(self, values: Mapping[int, Value]) -> dict[int, dict[int, Value]]:
        """``values`` of environments by the number of their worker, under their indices there."""
        found: dict[int, dict[int, Value]] = {}
        for number, worker in enumerate(self.workers):
            own = {i - worker.indices.start: values[i] for i in worker.indices if i in values}
            if own:
                found[number] = own
        return found

    def _await_start(self, worker: Worker) -> None:
        try:
            worker.receive(starting=True)
        except WorkerDied:
            end = worker.describe_end()
            remedy = "; try fewer num_envs" if "memory" in end else ""
            raise WorkerError(f"a worker process did not start: {end}{remedy}") from None

    def reset(self, seeds: Mapping[int, int | None], options: dict[str, Any] | None = None) -> dict[int, Reset]:
        """Begin an episode in each environment that ``seeds`` names by its index."""
        before = self._named
        if options:
            self._named = {**before, **dict.fromkeys(seeds, options)}
        try:
            return self._reset(seeds, options)
        except Exception:
            self._named = before
            raise

    def _reset(self, seeds: Mapping[int, int | None], options: dict[str, Any] | None) -> dict[int, Reset]:
        asked = self._by_worker(seeds)
        for number, own in asked.items():
            self.workers[number].send("reset", arguments(own, options))
        found: dict[int, Reset] = {}
        for number, answer in self._answers(asked).items():
            if isinstance(answer, WorkerDied):
                answer = self._reset_after_death(number, asked[number])
            found |= {i + self.workers[number].indices.start: reset for i, reset in answer.items()}
        for i, (obs, _) in found.items():
            self._last[i], self._ended[i] = obs, False
            self._orphans.pop(i, None)
        return found

    def _reset_after_death(self, number: int, own: Mapping[int, int | None]) -> dict[int, Reset]:
        """Resets that were asked of a worker that died; the others' episodes are reported lost at the next step."""
        worker = self.workers[number]
        end = f"worker {number} died: {worker.describe_end()}"
        fresh = self._replace(number, own)
        self._orphans |= {i: end for i in worker.indices if i - worker.indices.start not in own}
        return {i: fresh[i] for i in own}

    def step(self, actions: Sequence[Action]) -> list[Outcome]:
        """One step of every environment, all workers at once."""
        for worker in self.workers:
            worker.send("step", arguments([actions[i] for i in worker.indices]))
        outcomes: list[Outcome] = []
        for number, answer in self._answers(range(len(self.workers))).items():
            if isinstance(answer, WorkerDied):
                answer = self._lost(number)
            else:
                self.workers[number].deaths = 0
            outcomes += answer
        for i, end in self._orphans.items():
            outcomes[i] = self._truncate(i, end, self._reset_one(i))
        self._orphans = {}
        self._last = [outcome.obs for outcome in outcomes]
        self._ended = [outcome.terminated or outcome.truncated for outcome in outcomes]
        return outcomes

    def _answers(self, numbers: Iterable[int]) -> dict[int, Any]:
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
        fresh = self._replace(number, {})
        return [self._truncate(i, end, fresh[i - worker.indices.start]) for i in worker.indices]

    def _truncate(self, i: int, end: str, fresh: Reset) -> Outcome:
        """What the step shows of environment ``i``, whose episode was lost and which has begun a new one."""
        if self.mode is AutoresetMode.NEXT_STEP and self._ended[i]:  # it was to begin a new one in this step
            return Outcome(fresh[0], 0.0, False, False, fresh[1])
        last = Outcome(self._last[i], 0.0, False, True, {"worker_died": end})
        if self.mode is AutoresetMode.SAME_STEP:
            return finished(last, fresh)
        if self.mode is AutoresetMode.NEXT_STEP:
            worker = self._worker_of(i)
            worker.send("begin_at_next_step", arguments(i - worker.indices.start))
            worker.receive()
        return last

    def _reset_one(self, i: int) -> Reset:
        worker = self._worker_of(i)
        worker.send("reset", arguments({i - worker.indices.start: None}))
        (fresh,) = worker.receive().values()
        return fresh

    def _worker_of(self, i: int) -> Worker:
        return next(worker for worker in self.workers if i in worker.indices)

    def _replace(self, number: int, seeds: Mapping[int, int | None]) -> dict[int, Reset]:
        """Start a new worker in place of a dead one and begin episodes in its environments, from ``seeds`` if there."""
        old = self.workers[number]
        end, names = old.describe_end(), ", ".join(map(str, old.indices))
        old.connection.close()
        deaths, old.deaths = old.deaths + 1, 0
        if deaths >= MAX_DEATHS:
            raise WorkerError(f"worker {number} (environments {names}) died {MAX_DEATHS} times in a row: {end}")
        gym.logger.warn(f"worker {number} died: {end}; environments {names} begin new episodes in a new process")
        new = self.workers[number] = Worker(self._pickled, old.indices, self.timeout)
        new.deaths = deaths
        self._await_start(new)
        fresh: dict[int, Reset] = {}
        for i, index in enumerate(new.indices):
            seed = seeds.get(i)
            new.send("reset", arguments({i: self.draw_seed() if seed is None else seed}, self._named.get(index)))
            fresh |= new.receive()
        return fresh

    def ask(self, question: str, what: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Answers of the environments in ``what``; nothing is sent before everything is known to be picklable."""
        messages = {number: arguments(question, own) for number, own in self._by_worker(what).items()}
        for number, message in messages.items():
            self.workers[number].send("ask", message)
        found: dict[int, Any] = {}
        for number, answer in self._answers(messages).items():
            worker = self.workers[number]
            if isinstance(answer, WorkerDied):
                end = worker.describe_end()
                raise WorkerError(f"worker {number} died: {end}; the next step or reset replaces it")
            found |= {i + worker.indices.start: value for i, value in answer.items()}
        return {i: found[i] for i in what}

    def close(self) -> None:
        """End all workers and remove the shared file."""
        for worker in self.workers:
            worker.farewell()
        for worker in self.workers:
            worker.join()
        self._folder.cleanup()
