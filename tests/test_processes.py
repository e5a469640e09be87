"""Processes that are killed, and those that they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unlearn_gym.cli import COMMANDS, main
from unlearn_gym.system.processes import Terminated, signals_as_interrupts


@pytest.fixture(autouse=True)
def default_signals():
    """Libraries that earlier tests of this process have used may have put handlers of their own."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers[:2]:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


PARENT = """
import sys, time
from pathlib import Path
from unlearn_gym import cli
from unlearn_gym.comparison.engines import run_calls

def sleep(number):
    Path(f"begun-{number}").touch()
    time.sleep(60)

def command() -> None:
    list(run_calls("joblib", sleep, [(0,), (1,)], 2))

cli.COMMANDS["compare"] = command
sys.argv = ["unlearn-gym", "compare"]
cli.main()
"""


def processes_in(folder: Path) -> list[int]:
    """Processes whose TMPDIR is ``folder``: all that come of a command that was given it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            mine = f"TMPDIR={folder}".encode() in path.read_bytes().split(b"\0")
        except OSError:
            continue
        if mine:
            found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_a_command_that_is_killed_leaves_no_process_and_no_file(number, tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    wait_until(lambda: len(list(tmp_path.glob("begun-*"))) == 2, 60)
    assert len(processes_in(temporary)) >= 3
    parent.send_signal(number)
    wait_until(lambda: parent.poll() is not None, 10)
    wait_until(lambda: not processes_in(temporary), 10)
    assert not [path for path in temporary.iterdir() if path.name.startswith(("pymp-", "joblib", "unlearn_gym-"))]
    assert parent.stderr is not None
    printed = parent.stderr.read()
    parent.stderr.close()
    if number == signal.SIGTERM:
        assert parent.returncode == 143
        assert "unlearn-gym: ended by SIGTERM; the same command resumes\n" in printed
    assert "Traceback" not in printed


def ended_twice(seen: list[str]) -> None:
    with signals_as_interrupts():
        os.kill(os.getpid(), signal.SIGHUP)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append("cleaned up")


def test_a_signal_interrupts_once_and_handlers_of_others_stay():
    seen: list[str] = []
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, lambda *_: seen.append("another's"))
        with pytest.raises(Terminated, match="ended by SIGTERM") as ended:
            ended_twice(seen)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == ["another's", "cleaned up"]
    assert ended.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_commands_of_both_kinds_say_that_they_were_ended(monkeypatch, capsys):
    from agents.main import run_command

    monkeypatch.setitem(COMMANDS, "metrics", terminated)
    monkeypatch.setattr(sys, "argv", ["unlearn-gym", "metrics"])
    with pytest.raises(SystemExit) as ended:
        main()
    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as agents_ended:
        run_command("train", terminated)
    assert ended.value.code == agents_ended.value.code == 143
    assert capsys.readouterr().err.splitlines() == [
        "unlearn-gym: ended by SIGTERM; the same command resumes",
        "agents.train: ended by SIGTERM; the same command goes on",
    ]
