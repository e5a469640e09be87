"""Errors that a user can mend: each message is one line that names the value and the remedy."""

import contextlib
import os
import tempfile


class UnlearnGymError(Exception):
    """Base of the package's own errors; the command line prints them without a traceback.

    ``details`` is the traceback of a fault in a user's own code, as text, which also comes back from other processes;
    empty for all else.
    """

    details: str = ""


class SettingsError(UnlearnGymError, ValueError):
    """An option that does not exist or has no valid value."""


class UnknownOptionError(SettingsError, TypeError):
    """An option that does not exist, in Python's words: wrappers that try options out, as TorchRL's, read them."""


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


def error_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def line_with_log(error: BaseException) -> str:
    """The error's line for the terminal; its details, if it has any, go to a new log file, which the line names."""
    details = getattr(error, "details", "")
    if not isinstance(error, UnlearnGymError) or not details:
        return error_line(error)
    path = ""
    try:
        descriptor, path = tempfile.mkstemp(prefix="unlearn_gym-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(details)
    except OSError as failure:
        with contextlib.suppress(OSError):
            os.unlink(path)
        return f"{error_line(error)}; its traceback could not be kept ({failure})"
    return f"{error_line(error)}; traceback: {path}"
