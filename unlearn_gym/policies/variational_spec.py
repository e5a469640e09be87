"""What follows ``variational:`` in a policy's name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from unlearn_gym.errors import PolicyError
from unlearn_gym.policies.variational import FEATURE_SETS, GRADIENT_ESTIMATORS

ESTIMATORS = (*GRADIENT_ESTIMATORS, "variance")
OPTIONS = f"[:features={'|'.join(FEATURE_SETS)}][:from=TASK]"
FORM = f"variational:{{{','.join(ESTIMATORS)}}}[:beta]{OPTIONS}"


@dataclass(frozen=True)
class VariationalSpec:
    """A parsed name: ``source`` is the task whose episodes train the network, None for one that learns as it goes."""

    estimator: str
    beta: float = 0.01
    features: str = "norms"
    source: str | None = None


def parse_variational(spec: str) -> VariationalSpec:
    """Read ``spec``, of the form ``FORM``; raises :class:`PolicyError` with the nearest right name.

    A task's name may hold colons, so ``from=`` takes all that follows it.
    """
    head, has_source, source = spec.partition(":from=")
    estimator, *parts = head.split(":")[1:] or [""]
    if estimator not in ESTIMATORS:
        raise PolicyError(f"policy {spec!r}: name an estimator, {FORM}{_near(estimator, ESTIMATORS)}")
    beta = parts.pop(0) if parts and "=" not in parts[0] else "0.01"
    named = _named_parts(spec, parts)
    if estimator not in GRADIENT_ESTIMATORS and (named or has_source):
        raise PolicyError(
            f"policy {spec!r}: {estimator} has no inference network; features= and from= go with "
            f"{', '.join(GRADIENT_ESTIMATORS)}"
        )
    features = named.get("features", "norms")
    if features not in FEATURE_SETS:
        raise PolicyError(
            f"policy {spec!r}: features={features} must be one of {', '.join(FEATURE_SETS)}"
            f"{_near(features, FEATURE_SETS)}"
        )
    if has_source and ("=" in source or not source):
        raise PolicyError(f"policy {spec!r}: from= takes the rest of the name as a task; put it last, as in from=TASK")
    return VariationalSpec(estimator, _beta(spec, beta), features, source if has_source else None)


def _beta(spec: str, text: str) -> float:
    try:
        beta = float(text)
    except ValueError:
        beta = -1.0
    if not 0.0 <= beta < float("inf"):
        raise PolicyError(f"policy {spec!r}: beta={text} must be a number of at least 0; after it come {OPTIONS}")
    return beta


def _named_parts(spec: str, parts: Iterable[str]) -> dict[str, str]:
    """The ``name=value`` parts, ``from=`` left out, each once."""
    named: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name != "features":
            near = _near(name, ("features", "from"))
            raise PolicyError(f"policy {spec!r}: {part!r} is no part of {FORM}{near}")
        if name in named:
            raise PolicyError(f"policy {spec!r} has {name}= twice; give it once")
        named[name] = value
    return named


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
