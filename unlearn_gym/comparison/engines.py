"""Where independent calls run: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
import socket
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal, get_args

from unlearn_gym.errors import SettingsError, WorkerError, error_line, shown
from unlearn_gym.system.memory import PROCESS_BYTES, check_memory
from unlearn_gym.system.processes import follow_parent, interrupts_blocked

Engine = Literal["joblib", "ray"]
CONNECT_TIMEOUT = 10.0
RETRIES = 5
"""How often a call is made again whose Ray worker died."""
MAX_DEATHS = 3
"""A call whose process on this machine died so often is not made again."""


@dataclass
class _Call:
    """A call as it is sent to a process, and how often it has ended its process."""

    name: str
    pickled: bytes
    deaths: int = 0


def run_calls(
    engine: str,
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    jobs: int,
    name: Callable[..., str] | None = None,
) -> Generator[Any, None, None]:
    """The values of ``function(*call)`` for all ``calls``, as they come.

    ``"joblib"``: in ``jobs`` processes of this machine, or in this one if ``jobs`` is 1. ``"ray"``: as tasks of one
    core each on the cluster that ``RAY_ADDRESS`` names, or else on a local one of ``jobs`` cores. A call whose process
    dies is made again, on this machine with a warning; one that raises is not. ``name(*call)`` is what messages call
    a call. Close the generator, with ``contextlib.closing``, and its processes end.

    Raises ``SettingsError`` for another engine, for ``jobs`` below 1 and where Ray is missing; ``WorkerError`` for a
    call that ends its process again and again, that leaves by ``SystemExit`` or that cannot be sent to a process.
    """
    if jobs < 1:
        raise SettingsError(f"jobs={jobs} must be at least 1")
    if engine not in get_args(Engine):
        raise SettingsError(f"engine={engine!r} must be one of {', '.join(get_args(Engine))}")
    name = name or (lambda *call: f"a call of {function.__name__}")
    if engine == "joblib":
        check_memory(jobs * PROCESS_BYTES, f"jobs={shown(jobs)}")
    if engine == "joblib" and jobs == 1:
        return (_call(function, call) for call in calls)
    packed = [_pack(name(*call), function, call) for call in calls]
    return _on_ray(packed, jobs) if engine == "ray" else _in_processes(packed, jobs)


def _pack(name: str, function: Callable[..., Any], call: tuple[Any, ...]) -> _Call:
    import cloudpickle

    try:
        return _Call(name, cloudpickle.dumps((function, call)))
    except Exception as error:
        raise WorkerError(f"{name} cannot be sent to another process ({error_line(error)}); use jobs=1") from None


def _in_processes(calls: list[_Call], jobs: int) -> Generator[Any, None, None]:
    """Each of ``jobs`` executors has one process: when that dies, it is known which call it died of."""
    waiting = deque(calls)
    idle: list[Any] = []
    running: dict[Future[Any], tuple[_Call, Any]] = {}
    finished = False
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                call = waiting.popleft()
                future, process = _submit(call, idle, jobs)
                running[future] = call, process
            errors: list[BaseException] = []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                call, process = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    process.shutdown(wait=False, kill_workers=True)
                    error = _after_death(call, error)
                    if error is None:
                        waiting.appendleft(call)
                        continue
                else:
                    idle.append(process)
                if error is None:
                    yield future.result()
                else:
                    errors.append(error)  # raised when what else is finished has been handed over
            if errors:
                raise errors[0]
        finished = True
    finally:
        for process in [*idle, *(process for _, process in running.values())]:
            process.shutdown(wait=True, kill_workers=not finished)


def _submit(call: _Call, idle: list[Any], jobs: int) -> tuple[Future[Any], Any]:
    """Begin the call in an idle process, or else in a new one."""
    from joblib.externals.loky import ProcessPoolExecutor

    arguments = (os.getcwd(), list(sys.path), call.pickled)
    while idle:
        process = idle.pop()
        try:
            return process.submit(_call_in, *arguments), process
        except BrokenProcessPool:  # it died while it had nothing to do
            process.shutdown(wait=False, kill_workers=True)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    process = ProcessPoolExecutor(
        max_workers=1, initializer=follow_parent, initargs=(os.getpid(),), env={"OMP_NUM_THREADS": threads}
    )
    with interrupts_blocked():
        return process.submit(_call_in, *arguments), process


def _after_death(call: _Call, death: BrokenProcessPool) -> WorkerError | None:
    """What is to be raised of a call whose process died; None, and a warning, where it is to be made again."""
    codes = re.search(r"exit codes of the workers are \{(.+?)\}", str(death))
    end = codes[1] if codes else error_line(death)
    call.deaths += 1
    if call.deaths < MAX_DEATHS:
        warnings.warn(f"the process of {call.name} died ({end}); it is run again", RuntimeWarning, stacklevel=2)
        return None
    return WorkerError(
        f"{call.name}: its process died {MAX_DEATHS} times ({end}), perhaps for want of memory; "
        "try fewer jobs, or leave it out"
    )


def _on_ray(calls: list[_Call], jobs: int) -> Generator[Any, None, None]:
    if not calls:
        return
    ray = _connect(jobs)
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_call_in)
    pending = {remote.remote(os.getcwd(), sys.path, call.pickled): call.name for call in calls}
    try:
        while pending:
            for done in ray.wait(list(pending))[0]:
                name = pending.pop(done)
                try:
                    yield ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # Ray's own carries the worker's traceback in its message
                except ray.exceptions.RayError as error:
                    raise WorkerError(f"{name}: its Ray worker died again and again ({error_line(error)})") from None
    finally:
        for call in pending:
            ray.cancel(call, force=True)


def _call_in(folder: str, places: list[str], pickled: bytes) -> Any:
    """The value of a call, in the driver's folder where this machine has it, with its modules: relative paths hold."""
    if os.path.isdir(folder):
        os.chdir(folder)
    sys.path[:] = [*places, *(place for place in sys.path if place not in places)]
    function, call = pickle.loads(pickled)
    try:
        return _call(function, call)
    except Exception as error:
        raise _portable(error) from None


def _call(function: Callable[..., Any], call: tuple[Any, ...]) -> Any:
    """The value of a call; one that would end the process, and with it all others, raises ``WorkerError``."""
    try:
        return function(*call)
    except SystemExit as error:
        raise WorkerError(f"{function.__name__} was left by SystemExit({error.code!r})") from error


def _portable(error: Exception) -> Exception:
    """The error, or where it cannot be sent to another process its type and message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return WorkerError(f"{type(error).__name__}: {error_line(error)}")
    return error


def _connect(jobs: int) -> Any:
    """Ray, connected to the cluster."""
    try:
        import ray
    except ImportError:
        raise SettingsError("engine='ray' needs Ray; install it with: pip install 'unlearn_gym[distributed]'") from None
    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS")
    remedy = "start it with 'ray start --head', and set RAY_AUTH_MODE=token here if it was started so"
    what = f"cannot connect to the Ray cluster RAY_ADDRESS={address}" if address else "cannot start a local Ray"
    local: dict[str, Any] = {} if address else {"num_cpus": jobs, "include_dashboard": False}
    try:
        if address:
            _check_listening(address)
        with _own_sigterm():
            ray.init(log_to_driver=False, **local)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise SettingsError(f"{what} ({error_line(error)}){f'; {remedy}' if address else ''}") from None
    return ray


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what this process does at SIGTERM, in place of which Ray puts a handler of its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _check_listening(address: str) -> None:
    """Raise ``OSError`` where nothing answers at ``HOST:PORT``: Ray itself goes on trying for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
