"""What a run costs by the time it has forgotten a stated amount: policies compared at equal forgetting.

A probe is a run measured along its updates: lists ``updates``, ``seconds``, ``forget_loss`` and ``retain_loss`` of one
length, None where a loss was not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from unlearn_gym.errors import ResultsError

Probe = Mapping[str, Sequence[float | None]]
SHARES = (0.25, 0.5, 0.75)


class Crossing(NamedTuple):
    """Where a run first reaches a forget loss: updates and seconds since its start, and its retain loss there."""

    updates: float
    seconds: float
    retain_loss: float


class _Point(NamedTuple):
    updates: float
    seconds: float
    forget_loss: float
    retain_loss: float


def _finite_points(probe: Probe) -> list[_Point]:
    """The probe row by row, up to the first that is not finite; raises for lists that do not fit together."""
    lengths = {name: len(probe[name]) if name in probe else 0 for name in _Point._fields}
    if min(lengths.values()) == 0 or len(set(lengths.values())) > 1:
        raise ResultsError(f"a probe has {lengths} points; give lists of one length, 1 or more")
    points = []
    for row in zip(*(probe[name] for name in _Point._fields), strict=True):
        finite = [float(v) for v in row if v is not None and math.isfinite(v)]
        if len(finite) < len(row):
            break
        points.append(_Point(*finite))
    updates = [p.updates for p in points]
    if any(b <= a for a, b in pairwise(updates)):
        raise ResultsError(f"updates of a probe are {updates}; give them in increasing order")
    return points


def first_crossing(probe: Probe, level: float) -> Crossing | None:
    """Where ``probe`` first reaches the forget loss ``level``; None if it never does.

    All is interpolated linearly between the last point below and the first at or above ``level``; what the run does
    later does not count. A run that starts there has its first point's values. A point that is not finite ends the
    run: it diverged, and neither that point nor what follows is something it reached. Raises
    :class:`ResultsError` for missing, empty or unequal lists, for updates that do not increase and for a ``level``
    that is not finite.
    """
    if not math.isfinite(level):
        raise ResultsError(f"forget level {level} is not finite; take it from matched_levels")
    before = None
    for point in _finite_points(probe):
        if point.forget_loss >= level:
            break
        before = point
    else:
        return None
    if before is None:
        return Crossing(point.updates, point.seconds, point.retain_loss)
    share = (level - before.forget_loss) / (point.forget_loss - before.forget_loss)
    updates, seconds, _, retain_loss = ((1 - share) * a + share * b for a, b in zip(before, point, strict=True))
    return Crossing(updates, seconds, retain_loss)


def matched_levels(start: float, cap: float, shares: Sequence[float] = SHARES) -> list[float]:
    """Forget losses at ``shares`` of the way from ``start`` to ``cap``: start · (cap / start)^share.

    ``start`` is the untouched model's forget loss, ``cap`` that of a model that never saw the data (the oracle); the
    way is geometric, as losses differ by factors. Raises :class:`ResultsError` unless 0 < start < cap, both finite,
    and every share lies in [0, 1].
    """
    if not 0 < start < cap < math.inf:
        raise ResultsError(f"forget losses {start} (start) and {cap} (cap) leave no way between; need 0 < start < cap")
    if any(not 0 <= share <= 1 for share in shares):
        raise ResultsError(f"shares {list(shares)} must lie in [0, 1]")
    return [start * (cap / start) ** share for share in shares]
