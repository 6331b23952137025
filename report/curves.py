"""Pure: what plots need of a run, thinned to what a screen can show: the page of a long run stays small.

A sweep's worker hands back these and the statistics, not its requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from halfmoon.types import Outcome
from report.records import LoadSample, Run
from report.statistics import Statistics, statistics

POINTS_MAX = 400
"""Of one cumulative curve: finer than a pixel's height of a plot."""

BINS_MAX = 600
"""Of a plot over time: about a bin for two pixels' width."""


@dataclass(frozen=True, kw_only=True)
class Cumulative:
    """Sorted values and the share of the whole at or below each."""

    values: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Means over successive spans of `step_s` seconds; `at_s` is a span's middle."""

    step_s: float = 0.0
    at_s: tuple[float, ...] = ()
    prefill_load: tuple[float, ...] = ()
    decode_load: tuple[float, ...] = ()
    decode_kv_tokens: tuple[float, ...] = ()
    prefill_queue_s: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """One run as tables and pages show it.

    Args:
        label: what tells this run from its neighbours in a comparison.
        slo_ttft_s, slo_tbt_s: of all requests, ascending; empty where none has one.
        command: what runs it again; empty if unknown.
    """

    label: str
    title: str
    settings: Mapping[str, object]
    digest: str
    duration_s: float
    wall_s: float
    counters: Mapping[str, int]
    residuals: Mapping[str, tuple[float, float]]
    statistics: Statistics
    slo_ttft_s: tuple[float, ...]
    slo_tbt_s: tuple[float, ...]
    ttft: Cumulative = field(default_factory=Cumulative)
    tbt_worst: Cumulative = field(default_factory=Cumulative)
    ttft_error: Cumulative = field(default_factory=Cumulative)
    step_error: Cumulative = field(default_factory=Cumulative)
    loads: Loads = field(default_factory=Loads)
    command: str = ""


def sketch(run: Run, *, label: str = "", command: str = "") -> Sketch:
    """`run`, with its figures and thinned curves."""
    rows = run.requests
    return Sketch(
        label=label or run.title,
        title=run.title,
        settings=dict(run.settings),
        digest=run.digest,
        duration_s=run.duration_s,
        wall_s=run.wall_s,
        counters=dict(run.counters),
        residuals=dict(run.residuals),
        statistics=statistics(run),
        slo_ttft_s=_distinct(row.slo_ttft_s for row in rows),
        slo_tbt_s=_distinct(row.slo_tbt_s for row in rows),
        ttft=cumulative(row.ttft_s for row in rows),
        tbt_worst=cumulative(row.tbt_worst_s for row in rows),
        ttft_error=cumulative(_difference(row.predicted_ttft_s, row.ttft_s) for row in rows),
        step_error=cumulative(_difference(row.predicted_tbt_s, row.tbt_p50_s) for row in rows),
        loads=loads(run.samples),
        command=command,
    )


def cumulative(values: Iterable[float | None]) -> Cumulative:
    """The cumulative curve of the values that there are: every one of them, or as many even shares as show."""
    ordered = np.sort(np.array([value for value in values if value is not None], dtype=float))
    if not ordered.size:
        return Cumulative()
    ranks = np.unique(np.linspace(1, ordered.size, min(POINTS_MAX, ordered.size)).round().astype(int))
    return Cumulative(
        values=tuple(float(ordered[rank - 1]) for rank in ranks),
        shares=tuple(float(rank / ordered.size) for rank in ranks),
    )


def loads(samples: Sequence[LoadSample]) -> Loads:
    """Every sample, or means of so many neighbours that at most `BINS_MAX` spans are left."""
    if not samples:
        return Loads()
    width = -(-len(samples) // BINS_MAX)
    groups = [samples[start : start + width] for start in range(0, len(samples), width)]
    step = samples[1].at_s - samples[0].at_s if len(samples) > 1 else 0.0

    def means(name: str) -> tuple[float, ...]:
        return tuple(sum(getattr(s, name) for s in group) / len(group) for group in groups)

    return Loads(
        step_s=step * width,
        at_s=means("at_s"),
        prefill_load=means("prefill_load"),
        decode_load=means("decode_load"),
        decode_kv_tokens=means("decode_kv_tokens"),
        prefill_queue_s=means("prefill_queue_s"),
    )


def rejected_by_stage(figures: Statistics) -> dict[str, int]:
    """In the order in which a request meets the stages; others, if any, after them."""
    known = ("arrival", "prefill", "decode")
    counts = dict.fromkeys(known, 0)
    for entry in figures.rejections:
        counts[entry.stage] = counts.get(entry.stage, 0) + entry.count
    assert sum(counts.values()) == figures.outcomes[Outcome.REJECTED.value], counts
    return counts


def _distinct(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(sorted({value for value in values if value is not None}))


def _difference(predicted: float | None, actual: float | None) -> float | None:
    return None if predicted is None or actual is None else predicted - actual
