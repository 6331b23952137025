"""Pure: the main figures of runs that differ in their seed alone: how far one draw lies from another."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from report.curves import Sketch
from report.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class OverSeeds:
    """One figure of `count` runs, those in which it has a basis: at least one.

    Args:
        places: decimals to print.
        std: of the sample; None: of one run there is none.
    """

    name: str
    unit: str
    places: int
    count: int
    mean: float
    std: float | None
    low: float
    high: float


Figure = tuple[str, str, int, Callable[[Statistics], float | None]]
FIGURES: tuple[Figure, ...] = (
    ("within both limits", "%", 1, lambda s: None if s.capacity is None else 100 * s.capacity),
    ("goodput", "requests/s", 3, lambda s: s.effective_per_s),
    ("goodput", "tokens/s", 0, lambda s: s.effective_tokens_per_s),
    ("rejected", "requests", 1, lambda s: s.rejected),
    ("TTFT p50", "s", 2, lambda s: None if s.ttft is None else s.ttft.p50),
    ("TTFT p90", "s", 2, lambda s: None if s.ttft is None else s.ttft.p90),
    ("TBT p90, worst tenth", "ms", 1, lambda s: None if s.tbt_worst is None else 1e3 * s.tbt_worst.p90),
    ("prefill wasted", "s", 1, lambda s: s.wasted_prefill_s),
    ("hit rate", "%", 1, lambda s: None if s.hits is None else 100 * s.hits.total),
    (
        "decode KV oscillation",
        "ktokens",
        1,
        lambda s: None if s.oscillation is None else s.oscillation.kv_tokens_std / 1e3,
    ),
)


def over_seeds(group: Sequence[Sketch]) -> list[OverSeeds]:
    """Of each figure that at least one of them has."""
    found = []
    for name, unit, places, of in FIGURES:
        values = [value for sketch in group if (value := of(sketch.statistics)) is not None]
        if values:
            found.append(
                OverSeeds(
                    name=name,
                    unit=unit,
                    places=places,
                    count=len(values),
                    mean=statistics.fmean(values),
                    std=statistics.stdev(values) if len(values) > 1 else None,
                    low=min(values),
                    high=max(values),
                )
            )
    return found
