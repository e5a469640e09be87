"""Calls and cells in other processes, on a local Ray too: as in one, whatever happens to a worker or to the driver."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import pytest

from agents.tune import tune
from unlearn_gym.comparison import engines
from unlearn_gym.comparison.comparison import run_comparison
from unlearn_gym.comparison.engines import _call_in, run_calls
from unlearn_gym.errors import SettingsError, WorkerError

from .test_comparison import small, without_times

pytestmark = pytest.mark.filterwarnings("ignore")


# Sent by value, so that other processes need not import this module: torch takes seconds.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    before = signal.getsignal(signal.SIGTERM)
    ray = engines._connect(1)
    assert signal.getsignal(signal.SIGTERM) == before  # Ray puts a handler of its own
    yield
    ray.shutdown()


def square(number: int) -> int:
    return number**2


def die_once(folder: Path, number: int) -> int:
    """Kills its own process the first time that it is asked for 1."""
    mark = folder / "died"
    if number == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def leave(number: int) -> None:
    sys.exit(0)


class Untransportable(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def raise_untransportable(number: int) -> None:
    raise Untransportable(number, 4)


def refuse(number: int) -> int:
    error = SettingsError(f"number={number}")
    error.details = "a traceback"
    raise error


@pytest.mark.parametrize("engine", ["joblib", "ray"])
def test_every_call_is_made_once(engine):
    assert sorted(run_calls(engine, square, [(i,) for i in range(7)], 2)) == [0, 1, 4, 9, 16, 25, 36]


@pytest.mark.parametrize("engine", ["joblib", "ray"])
def test_a_killed_workers_calls_are_made_again(engine, tmp_path):
    assert sorted(run_calls(engine, die_once, [(tmp_path, i) for i in range(4)], 2)) == [0, 1, 4, 9]
    assert (tmp_path / "died").exists()


def test_a_call_that_ends_its_process_again_and_again_is_named_and_costs_no_other_call(tmp_path):
    def die_always(number: int) -> int:
        """Kills its own process whenever it is asked for 1, once the others have been asked for."""
        if number == 1:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2

    found = []
    calls = run_calls("joblib", die_always, [(i,) for i in range(4)], 2, lambda i: f"number {i}")
    with pytest.raises(WorkerError, match=r"^number 1: its process died 3 times \(SIGKILL\(-9\)\)"):
        found.extend(calls)
    assert sorted(found) == [0, 4, 9]


@pytest.mark.parametrize(("engine", "jobs"), [("joblib", 1), ("joblib", 2), ("ray", 2)])
def test_a_call_that_asks_python_to_exit_is_an_error(engine, jobs):
    with pytest.raises(WorkerError, match=r"^leave was left by SystemExit\(0\)$"):
        list(run_calls(engine, leave, [(3,)], jobs))


def test_an_error_that_cannot_travel_is_no_death():
    with pytest.raises(WorkerError, match=r"^Untransportable: 3 and 4$"):
        list(run_calls("joblib", raise_untransportable, [(3,)], 2))


def test_a_call_that_cannot_be_sent_is_named():
    with pytest.raises(WorkerError, match=r"^a call of square cannot be sent to another process \(.*\); use jobs=1$"):
        run_calls("joblib", square, [(threading.Lock(),)], 2)


def test_a_closed_row_of_calls_leaves_no_process():
    def own_process(seconds: float) -> int:
        time.sleep(seconds)
        return os.getpid()

    calls = run_calls("joblib", own_process, [(0,), (0,), (60,), (60,)], 2)
    processes = [next(calls), next(calls)]
    calls.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.parametrize("engine", ["joblib", "ray"])
def test_an_error_of_a_call_arrives_as_it_is(engine):
    with pytest.raises(SettingsError, match=r"^number=3$") as caught:
        list(run_calls(engine, refuse, [(3,)], 2))
    assert caught.value.details == "a traceback"


def test_cells_on_ray_are_those_of_one_process_and_a_restarted_driver_runs_none_twice(tmp_path):
    def interrupt(cell, done, total):
        if done == 3:
            raise KeyboardInterrupt

    serial = run_comparison(small(), tmp_path / "serial")
    with pytest.raises(KeyboardInterrupt):
        run_comparison(small(), tmp_path / "ray", jobs=2, engine="ray", progress=interrupt)
    kept = {p: p.read_bytes() for p in (tmp_path / "ray" / "cells").iterdir()}
    assert len(kept) >= 3
    finished_here = run_comparison(small(), tmp_path / "ray")
    assert without_times(finished_here) == without_times(serial)
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_a_search_on_ray(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = tune(out=Path("found"), trials=1, engine="ray", timesteps=60, stages=1, eval_episodes=1, n_envs=1)
    assert best.is_file()
    assert len(json.loads(Path("found/study.json").read_text())["trials"]) == 1


def test_another_engine_is_named():
    with pytest.raises(SettingsError, match="engine='dask' must be one of joblib, ray"):
        run_calls("dask", square, [(1,)], 1)
    with pytest.raises(SettingsError, match="jobs=0"):
        run_calls("ray", square, [(1,)], 0)


@pytest.mark.parametrize("error", [ConnectionError("no cluster"), RuntimeError("no cluster"), ValueError("no cluster")])
def test_a_cluster_that_cannot_be_reached_is_named_with_the_remedy(error, monkeypatch):
    import ray

    def refuse(**_):
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.1.2.3:6379")
    with pytest.raises(SettingsError, match=r"RAY_ADDRESS=ray://10.1.2.3:6379 \(no cluster\); .*RAY_AUTH_MODE=token"):
        list(run_calls("ray", abs, [(1,)], 1))


def test_a_local_ray_that_does_not_start_is_no_cluster(monkeypatch):
    import ray

    def refuse(**_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SettingsError, match=r"cannot start a local Ray \(no space left\)$"):
        list(run_calls("ray", abs, [(1,)], 1))


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(SettingsError, match="refused"):
        list(run_calls("ray", abs, [(1,)], 1))


def test_a_call_finds_the_drivers_modules_before_those_of_the_same_name_elsewhere(tmp_path, monkeypatch):
    for place in ("driver", "worker"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "twin_of_two.py").write_text(f"def where():\n    return {place!r}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "worker"), *sys.path])
    call = b"\x80\x04\x8c\x0btwin_of_two\x8c\x05where\x93)\x86."  # pickle of (where, ()), by name
    try:
        assert _call_in(str(tmp_path), [str(tmp_path / "driver")], call) == "driver"
    finally:
        sys.modules.pop("twin_of_two", None)
