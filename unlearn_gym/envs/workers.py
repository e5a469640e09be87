"""A worker process: a group of environments at the other end of a pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, util
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode

from unlearn_gym.envs.group import EnvGroup
from unlearn_gym.envs.siss_unlearn import SISSUnlearnEnv
from unlearn_gym.errors import UnlearnGymError, WorkerError, error_line
from unlearn_gym.tasks import Task, TaskData, provide_data, register_task, task_names

PRELOADED = [__name__, "torch._dynamo"]
"""Imported once and shared by all workers; torch's optimizers load the second when the first one is made."""
MAX_STARTS = 3
"""Attempts to start a worker: the fork server, out of which it comes, may die in between."""


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker needs to make its environments: all tasks that their instances name, the first of which is where
    they begin; its data and start weights are in the file ``shared``.
    """

    tasks: tuple[Task, ...]
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
    shared: list[Path] = []
    with contextlib.suppress(EOFError, OSError):
        try:
            plan = cloudpickle.loads(pickled)
            shared = [plan.shared.parent]
            group = _make_group(plan, size)
        except Exception as error:
            connection.send((0, False, _portable(error)))
            return
        connection.send((0, True, None))
        while True:
            ticket, name, message = connection.recv()
            if name == "close":
                return
            try:
                args, kwargs = cloudpickle.loads(message)
                answer = ForkingPickler.dumps((ticket, True, getattr(group, name)(*args, **kwargs)))
            except Exception as error:
                answer = ForkingPickler.dumps((ticket, False, _portable(error)))
            connection.send_bytes(answer)
    _tidy_up_after_parent(shared)


def _tidy_up_after_parent(shared: list[Path]) -> None:
    """Remove what a parent that was killed could not: the shared file, and the folder of the fork server's socket."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join(timeout=1)
        if not parent.is_alive():
            shared = [*shared, Path(util.get_temp_dir())]  # the parent's, which its processes have in common
    for folder in shared:
        shutil.rmtree(folder, ignore_errors=True)


def _make_group(plan: WorkerPlan, size: int) -> EnvGroup:
    torch.set_num_threads(plan.threads)
    for task in plan.tasks:
        if task.name not in task_names():
            register_task(task)
    data, more = TaskData.load(plan.shared)
    provide_data(plan.tasks[0], plan.data_root, data)
    name = None if plan.options.get("instances") is not None else plan.tasks[0].name
    envs = [SISSUnlearnEnv(name, data_root=plan.data_root, **plan.options) for _ in range(size)]
    envs[0].share(more["start_vector"], envs[0].run.data)
    return EnvGroup(envs, plan.mode)


def _portable(error: Exception) -> Exception:
    """The package's and gymnasium's own errors as they are, others by type and message."""
    if isinstance(error, AttributeError):
        return AttributeError(str(error))  # what asks for an attribute expects it
    if isinstance(error, UnlearnGymError | gym.error.Error):
        return error
    return WorkerError(f"a worker failed: {type(error).__name__}: {error}")


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Start processes that do not import the caller's script again: they need nothing of it, and a script
    without ``if __name__ == "__main__"`` would start workers of its own there.
    """
    with _MAIN_LOCK:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


_MAIN_LOCK = threading.Lock()


def _start(pickled: bytes, size: int) -> tuple[Connection, BaseProcess]:
    """A process that serves ``size`` environments, and the pipe to it."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()  # takes seconds, the first time: not while the main module is hidden
    ours, theirs = context.Pipe()
    process: BaseProcess = context.Process(  # type: ignore[attr-defined]
        target=serve, args=(theirs, pickled, size), daemon=True
    )
    with _hidden_main():
        process.start()
    theirs.close()
    return ours, process


class Worker:
    """One process and the pipe to it. ``timeout``: seconds within which it must answer (None: any time)."""

    def __init__(self, pickled: bytes, indices: range, timeout: float | None = None) -> None:
        self.indices, self.timeout = indices, timeout
        self.deaths = 0
        self._ticket = 0
        for attempt in range(1, MAX_STARTS + 1):
            try:
                self.connection, self.process = _start(pickled, len(indices))
                return
            except (EOFError, OSError) as error:  # what the fork server's death raises here
                if attempt == MAX_STARTS:
                    reason = error_line(error)
                    raise WorkerError(
                        f"no worker process could be started in {MAX_STARTS} attempts ({reason}: was the fork server "
                        "killed, or is the machine out of memory or open files?); use backend='serial'"
                    ) from None
                time.sleep(0.2)  # until it is known to have died, and is started anew

    def send(self, name: str, message: bytes) -> None:
        """Ask for ``name`` of the worker's group with the arguments in ``message`` (:func:`arguments`).

        A process that is gone shows when the answer is awaited.
        """
        self._ticket += 1
        with contextlib.suppress(OSError):
            self.connection.send((self._ticket, name, message))

    def receive(self, *, starting: bool = False) -> Any:
        """The answer to the last question, or the error that the worker raised; raises :class:`WorkerDied`.

        Answers to earlier questions, which an interrupt kept from being received, are dropped.
        """
        ticket = -1
        while ticket != self._ticket:
            try:
                if not starting and not self.connection.poll(self.timeout):
                    self.process.kill()
                    raise WorkerDied
                ticket, succeeded, answer = self.connection.recv()
            except (EOFError, OSError):
                raise WorkerDied from None
        if not succeeded:
            raise answer
        return answer

    def farewell(self) -> None:
        """Let the process end; it may hold the only end of the pipe that a hang-up would not reach."""
        self.send("close", b"")
        self.connection.close()

    def join(self) -> None:
        """Wait for the end, and force it where it does not come."""
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def describe_end(self) -> str:
        """How the process ended."""
        self.process.join(timeout=5)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"exit status {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:  # a real-time signal
            name = f"signal {-code}"
        return f"killed by {name}" + (" (out of memory, or no answer in time?)" if code == -9 else "")


def arguments(*args: Any, **kwargs: Any) -> bytes:
    """The arguments of a question, whatever they hold, objects of the caller's script included."""
    return bytes(cloudpickle.dumps((args, kwargs)))
