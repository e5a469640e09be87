"""Processes that end when they should: with the process that started them, and by a signal as by Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import NoReturn

TERMINATION_SIGNALS = ("SIGTERM", "SIGHUP")
POLL_SECONDS = 1.0


class Terminated(KeyboardInterrupt):
    """A signal asked this process to end. It is a ``KeyboardInterrupt``, so that all is left as Ctrl-C leaves it.

    ``status`` is the exit status that a shell gives to a process that this signal ended.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.status = 128 + number


@contextlib.contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Raise :class:`Terminated` in the main thread when one of ``TERMINATION_SIGNALS`` comes. The
    same signal again is ignored; the other one raises again.

    Signals for which something else is in place, as ``nohup`` has it for SIGHUP, are left to it.
    """
    numbers = [getattr(signal, name) for name in TERMINATION_SIGNALS if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may set handlers
    for number in numbers:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # some senders signal a process, and then its group once more
    raise Terminated(number)


def follow_parent(parent: int) -> None:
    """Leave interrupts to the process ``parent``, which started this one, and end within seconds when it is gone.

    A parent that is killed cannot tell its children.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _mask("SIG_UNBLOCK")
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="follow_parent").start()


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Processes that are started here get no interrupt before they have come to :func:`follow_parent`."""
    resource_tracker.ensure_running()  # starting it, which any process's start may do, unblocks interrupts
    _mask("SIG_BLOCK")
    try:
        yield
    finally:
        _mask("SIG_UNBLOCK")


def _mask(how: str) -> None:
    if hasattr(signal, "pthread_sigmask"):  # Windows has none
        signal.pthread_sigmask(getattr(signal, how), {signal.SIGINT})


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
