"""Ctrl-C while a command is still importing, which takes seconds: one line and no traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as a shell has it."""


def command_name(argv0: str, original: list[str]) -> str | None:
    """The package's command that this process was started as, such as ``agents.tune``; None for other programs.

    ``sys.orig_argv`` decides, because workers inherit their parent's ``sys.argv``. ``sys.argv[0]`` is ``-m`` while
    Python still locates the module.
    """
    if len(original) > 1 and Path(original[1]).name == "unlearn-gym":
        return "unlearn-gym"
    module = original[original.index("-m") + 1] if argv0 == "-m" and "-m" in original[:-1] else ""
    if module.startswith("agents."):
        return module
    return "unlearn-gym" if module.startswith("unlearn_gym") else None


def _leave(number: int, frame: FrameType | None) -> None:
    """Nothing is to be cleaned up yet, and an exception might end up in somebody's import: leave at once."""
    name = command_name(_ARGV0, sys.orig_argv)
    os.write(2, f"{name}: interrupted before it began; give the same command again\n".encode())
    os._exit(INTERRUPTED)


def quiet_until_begun() -> None:
    """From now on Ctrl-C ends this process with one line, if it is one of the package's commands."""
    in_main = threading.current_thread() is threading.main_thread()
    is_default = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default and command_name(_ARGV0, sys.orig_argv) is not None:
        signal.signal(signal.SIGINT, _leave)


def restore_interrupts() -> None:
    """The command itself begins: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_ARGV0 = sys.argv[0] if sys.argv else ""
