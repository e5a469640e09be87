"""Errors that a user can mend: each message is one line that names the value and the remedy."""


class UnlearnGymError(Exception):
    """Base of the package's own errors; the command line prints them without a traceback."""


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
