"""Errors that a user can mend: each message is one line that names the value and the remedy."""

from __future__ import annotations

import contextlib
import difflib
import os
import reprlib
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

LONGEST_LINE = 1000
"""Characters of a message: enough for the names of all settings."""


def one_line(text: str, limit: int = LONGEST_LINE) -> str:
    """``text`` without line breaks and, beyond ``limit`` characters, without its middle: a remedy is at the end."""
    # far more than is shown, and little enough that a message of many megabytes costs no time
    text = text if len(text) <= 8 * limit else f"{text[: 4 * limit]} … {text[-4 * limit :]}"
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit * 2 // 3]} … {line[-limit // 4 :]}"


class _Shown(reprlib.Repr):
    """``repr`` of anything in a few characters: containers by their first entries, and never an error."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 80, 80, 80
        self.maxtuple = self.maxlist = self.maxarray = self.maxdict = self.maxset = self.maxfrozenset = 6

    def repr_int(self, value: int, level: int) -> str:
        """Python refuses to write numbers of more than some thousand digits."""
        bits = value.bit_length()
        return repr(value) if bits <= 200 else f"<a whole number of {bits} bits>"

    def repr_bytes(self, value: bytes, level: int) -> str:
        """As text is shown."""
        return repr(value) if len(value) <= self.maxstring else f"{value[: self.maxstring]!r}…"


_shown = _Shown()


def shown(value: Any) -> str:
    """``value`` as an error prints it: what ``repr`` says, in one line of at most 160 characters."""
    try:
        return one_line(_shown.repr(value), 160)
    except Exception:  # a repr that fails must not take the place of the error that wants to show the value
        return f"<{type(value).__name__}>"


def check_texts(texts: Iterable[str]) -> None:
    """Raise :class:`SettingsError` for a text that is not UTF-8: no file of results could hold it."""
    for text in texts:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise SettingsError(f"the argument {shown(text)} is not UTF-8; re-encode it as UTF-8, or rename the file")


class UnlearnGymError(Exception):
    """Base of the package's own errors; the command line prints them without a traceback.

    The message is made one line of at most :data:`LONGEST_LINE` characters, whatever values it quotes. ``details`` is
    the traceback of a fault in a user's own code, as text, which also comes back from other processes; empty for all
    else.
    """

    details: str = ""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(one_line(arg) if isinstance(arg, str) else arg for arg in args))


class SettingsError(UnlearnGymError, ValueError):
    """An option that does not exist or has no valid value."""


class UnknownOptionError(SettingsError, TypeError):
    """An option that does not exist; worded like Python's TypeError, because wrappers such as TorchRL's parse it."""


class TaskError(UnlearnGymError, LookupError):
    """A task that is not registered, or one that cannot do what it is asked."""


class DataError(UnlearnGymError, RuntimeError):
    """Data that is missing, empty or damaged."""


class WeightsError(UnlearnGymError, RuntimeError):
    """A weights file that is missing, damaged or made for another network."""


class RunError(UnlearnGymError, RuntimeError):
    """A run that was asked for what it cannot do."""


class ActionError(UnlearnGymError, ValueError):
    """An action that is not one finite λ within the range."""


class WorkerError(UnlearnGymError, RuntimeError):
    """Worker processes that cannot be started, or that die again and again."""


class PolicyError(UnlearnGymError, ValueError):
    """A policy that does not exist, or an agent that does not fit the environment."""


class ResultsError(UnlearnGymError, ValueError):
    """Results that cannot be used together, or too few to compute a figure from."""


class FileError(UnlearnGymError, OSError):
    """A file that cannot be written."""


class LockError(UnlearnGymError, RuntimeError):
    """A folder that another process is writing to."""


def error_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0] if lines else type(error).__name__, 300)


def line_with_log(error: BaseException) -> str:
    """The error's line for the terminal; its details, if it has any, go to a new log file, which the line names."""
    if not isinstance(error, UnlearnGymError):
        return error_line(error)
    line, details = str(error), error.details
    if not details:
        return line
    path = ""
    try:
        descriptor, path = tempfile.mkstemp(prefix="unlearn_gym-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(details)
    except OSError as failure:
        with contextlib.suppress(OSError):
            os.unlink(path)
        return f"{line}; its traceback could not be kept ({failure})"
    return f"{line}; traceback: {path}"


def describe_validation_error(error: ValidationError, known: Iterable[str] = ()) -> str:
    """The first problem of a pydantic error as one line: the field, and its value or the nearest of the ``known``."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where} is missing; give it"
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(first["loc"][-1]), list(known), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}" if known else ""
        return f"there is no field {shown(where)}{hint}"
    return f"{where}={shown(first['input'])}: {message}" if where else message
