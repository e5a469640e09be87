"""Policies of the user's own: found in a module, and blamed by name, as they may raise whatever they like."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from unlearn_gym.errors import PolicyError, UnlearnGymError, error_line
from unlearn_gym.policies.base import FunctionPolicy, LambdaPolicy

MAX_LINE = 300
"""Characters of another's message that are shown; the log has all of it."""


@contextlib.contextmanager
def blaming(policy: str, call: str) -> Iterator[None]:
    """Raise whatever leaves the body as a :class:`PolicyError` that names ``policy`` and the ``call`` that raised it.

    The error carries the traceback as its ``details``. An interrupt passes; ``SystemExit`` does not: a policy may not
    end the program, least of all with a status that says that all was well.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except UnlearnGymError as error:
        blamed = PolicyError(f"policy {policy!r}: {call}: {error}")
        blamed.details = error.details
        raise blamed from error
    except BaseException as error:
        blamed = PolicyError(f"policy {policy!r}: {call} raised {_described(error)}")
        blamed.details = "".join(traceback.format_exception(error))
        raise blamed from error


def _described(error: BaseException) -> str:
    """An error's type and the first line of its message, neither of which is ours."""
    try:
        line = error_line(error).strip()
    except Exception:
        line = "its message cannot be shown"
    shown = f"{type(error).__name__}: {line}" if line and line != type(error).__name__ else type(error).__name__
    return shown if len(shown) <= MAX_LINE else f"{shown[:MAX_LINE]}…"


def load_own_policy(module: str, attribute: str) -> LambdaPolicy:
    """A user's policy: an object with ``act``, a class of such, or a function ``obs -> lambda_``.

    Raises :class:`PolicyError` where there is none, and for all that the user's code raises.
    """
    name = f"{module}:{attribute}"
    with blaming(name, f"importing {module!r}"):
        holder = _import(module)
    with blaming(name, f"looking up {attribute!r}"):
        found: Any = getattr(holder, attribute, _MISSING)
    if found is _MISSING:
        close = difflib.get_close_matches(attribute, vars(holder), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PolicyError(f"policy {name!r}: {module!r} has no {attribute!r}{hint}")
    with blaming(name, f"constructing {attribute}()"):
        if inspect.isclass(found):
            found = found()
        if isinstance(found, LambdaPolicy):
            return found
    if callable(found):
        return FunctionPolicy(found)
    raise PolicyError(
        f"policy {name!r} is neither a function obs -> lambda_ nor an object with the methods reset(seed) and "
        "act(obs, info)"
    )


def module_spec(module: str) -> ModuleSpec | None:
    """Where a module comes from, found without running any of it; None where that cannot be said.

    The folder where the command runs comes first for the module that the user has named, and last, behind all that
    is installed, for the modules that it imports: a file there must not take the place of a package's own.
    """
    top, *rest = module.split(".")
    _see_working_folder()
    try:
        spec = _in_working_folder(top) or importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: a module that was made by hand
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


def _see_working_folder() -> None:
    """Find modules in the folder where the command runs, as ``python -m`` does and an installed script does not."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _in_working_folder(top: str) -> ModuleSpec | None:
    """The module or package of this name in the working folder; a mere folder of the name is none."""
    spec = PathFinder.find_spec(top, [os.getcwd()])
    return spec if spec is not None and spec.loader is not None and spec.origin is not None else None


def _import(module: str) -> ModuleType:
    top = module.split(".")[0]
    _see_working_folder()
    spec, known = _in_working_folder(top), sys.modules.get(top)
    if spec is not None and known is None:
        _load(spec)
    elif spec is not None and not _is_from(known, spec):
        taken = getattr(known, "__file__", None) or "a module of Python's own"
        raise PolicyError(f"{spec.origin} cannot be imported, as its name is taken by {taken}; rename it")
    return importlib.import_module(module)


def _is_from(module: ModuleType | None, spec: ModuleSpec) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and spec.origin is not None and os.path.samefile(file, spec.origin)


def _load(spec: ModuleSpec) -> None:
    """Import a module from where it was found, whatever else there is of its name."""
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise


_MISSING = object()
