"""Pure: the time between tokens of one request, under the definitions that are published."""

from __future__ import annotations

from collections.abc import Sequence
from operator import sub
from typing import NamedTuple

WORST_ONE_IN = 10
"""FAST'25: a request's TBT is the average of the longest 10 % of its token-arrival intervals."""


class Tbt(NamedTuple):
    """Seconds: the median gap, the mean of the worst tenth (at least one gap), the longest."""

    p50_s: float
    worst_s: float
    max_s: float


def tbt_of(arrivals_s: Sequence[float]) -> Tbt | None:
    """Of the moments at which a request's tokens came, in order; None: fewer than two."""
    gaps = sorted(map(sub, arrivals_s[1:], arrivals_s))
    if not gaps:
        return None
    worst = gaps[len(gaps) - (len(gaps) + WORST_ONE_IN - 1) // WORST_ONE_IN :]
    return Tbt(p50_s=gaps[len(gaps) // 2], worst_s=sum(worst) / len(worst), max_s=gaps[-1])
