"""Pure: arrival processes: endless rising times in seconds, at a mean rate, from a seeded generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random

from halfmoon.errors import InvalidRequest

ARRIVALS = ("poisson", "uniform", "bursty")
BURST_SHAPE = 0.25
"""Of the gamma distribution of "bursty" gaps: their standard deviation is 1 / sqrt(0.25) = 2 times their mean."""


def arrival_times(process: str, rate_per_s: float, rng: Random) -> Iterator[float]:
    """poisson: exponential gaps; uniform: equal gaps; bursty: gamma gaps, twice as spread as Poisson's.

    Raises:
        InvalidRequest: an unknown process, or a rate that is not a finite number above 0.
    """
    if process not in ARRIVALS:
        raise InvalidRequest(field="arrivals", value=process, limit=", ".join(ARRIVALS))
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise InvalidRequest(field="rate_per_s", value=rate_per_s, limit="a finite number above 0")
    gap_s: dict[str, Callable[[], float]] = {
        "poisson": lambda: rng.expovariate(rate_per_s),
        "uniform": lambda: 1 / rate_per_s,
        "bursty": lambda: rng.gammavariate(BURST_SHAPE, 1 / (BURST_SHAPE * rate_per_s)),
    }
    return _accumulate(gap_s[process])


def _accumulate(gap_s: Callable[[], float]) -> Iterator[float]:
    now_s = 0.0
    while True:
        now_s += gap_s()
        yield now_s
