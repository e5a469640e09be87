"""Where independent calls run: in processes of this machine by joblib, or on a Ray cluster."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

from unlearn_gym.errors import SettingsError, error_line

Engine = Literal["joblib", "ray"]
CONNECT_TIMEOUT = 10.0
RETRIES = 5
"""How often a call is made again whose Ray worker died."""


def run_calls(engine: str, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    """The values of ``function(*call)`` for all ``calls``, as they come.

    ``"joblib"``: in ``jobs`` processes of this machine. ``"ray"``: as tasks of one core each on the cluster that
    ``RAY_ADDRESS`` names, or else on a local one of ``jobs`` cores; a call whose worker dies is made again, one that
    raises is not. Raises ``SettingsError`` for another engine, for ``jobs`` below 1 and where Ray is missing.
    """
    if jobs < 1:
        raise SettingsError(f"jobs={jobs} must be at least 1")
    if engine not in get_args(Engine):
        raise SettingsError(f"engine={engine!r} must be one of {', '.join(get_args(Engine))}")
    if engine == "ray":
        return _on_ray(function, calls, jobs)
    import joblib

    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    return iter(parallel(joblib.delayed(function)(*call) for call in calls))


def _on_ray(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    import cloudpickle

    ray = _connect(jobs)
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_call_in)
    pending = [remote.remote(os.getcwd(), sys.path, cloudpickle.dumps((function, call))) for call in calls]
    try:
        while pending:
            done, pending = ray.wait(pending)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # Ray's own carries the worker's traceback in its message
    finally:
        for call in pending:
            ray.cancel(call, force=True)


def _call_in(folder: str, places: list[str], pickled: bytes) -> Any:
    """The value of a call, in the driver's folder where this machine has it, with its modules: relative paths hold."""
    if os.path.isdir(folder):
        os.chdir(folder)
    sys.path[:] = [*places, *(place for place in sys.path if place not in places)]
    function, call = pickle.loads(pickled)
    return function(*call)


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
        ray.init(log_to_driver=False, **local)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise SettingsError(f"{what} ({error_line(error)}){f'; {remedy}' if address else ''}") from None
    return ray


def _check_listening(address: str) -> None:
    """Raise ``OSError`` where nothing answers at ``HOST:PORT``: Ray itself goes on trying for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
