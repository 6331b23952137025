"""Pure: a run's figures in words, one line each: tables and pages print the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from halfmoon.types import Outcome
from report.curves import Sketch, rejected_by_stage
from report.statistics import Distribution, PredictionError, Statistics

NONE = "–"
"""A figure without a basis: nothing got that far."""

STAGES = {"arrival": "on arrival", "prefill": "before prefill’s end", "decode": "after prefill"}
"""Stage -> in words."""


class Line(NamedTuple):
    """One figure of one run. `group` is the heading it stands under; `unit` may be empty."""

    group: str
    name: str
    unit: str
    text: str


def lines(sketch: Sketch) -> list[Line]:
    """Every figure, in the same order and number for every run: comparisons put them side by side."""
    figures = sketch.statistics
    return [
        *_outcomes(figures),
        *_goodput(figures),
        *_latencies(figures),
        *_cache(figures),
        *_errors(figures),
        *_fairness(figures),
        *_pools(figures),
        *_run(sketch),
    ]


def _outcomes(figures: Statistics) -> Iterator[Line]:
    group = "Requests"
    yield Line(group, "all", "", count(figures.requests))
    for outcome in Outcome:
        yield Line(group, outcome.value, "", count(figures.outcomes[outcome.value]))
    for stage, number in rejected_by_stage(figures).items():
        if stage in STAGES:
            yield Line(group, f"rejected {STAGES[stage]}", "", count(number))


def _goodput(figures: Statistics) -> Iterator[Line]:
    group = "Within both limits"
    yield Line(group, "effective requests", "", count(figures.effective))
    yield Line(group, "effective request capacity", "%", percent(figures.capacity))
    yield Line(group, "goodput", "requests/s", decimal(figures.effective_per_s, 3))
    yield Line(group, "goodput", "tokens/s", decimal(figures.effective_tokens_per_s, 0))
    yield Line(group, "served KV", "tokens", count(figures.served_kv_tokens))
    yield Line(group, "prefill", "s", decimal(figures.prefill_s, 1))
    yield Line(group, "prefill wasted", "s", decimal(figures.wasted_prefill_s, 1))
    share = figures.wasted_prefill_s / figures.prefill_s if figures.prefill_s else None
    yield Line(group, "prefill wasted", "%", percent(share))


def _latencies(figures: Statistics) -> Iterator[Line]:
    named = (("TTFT", "s", figures.ttft, 1.0, 2), ("TBT, worst tenth", "ms", figures.tbt_worst, 1e3, 1))
    for name, unit, found, scale, places in named:
        for percentile in ("p50", "p90", "p99"):
            yield Line("Latency", f"{name}, {percentile}", unit, of(found, percentile, scale, places))


def _cache(figures: Statistics) -> Iterator[Line]:
    for tier in ("total", "device", "dram", "remote"):
        name = {"total": "hit rate", "dram": "in DRAM", "device": "on device", "remote": "on another node"}[tier]
        share = None if figures.hits is None else getattr(figures.hits, tier)
        yield Line("Prompt tokens found", name, "%", percent(share))


def _errors(figures: Statistics) -> Iterator[Line]:
    group = "Prediction error"
    named = (("TTFT", "s", figures.ttft_error, 1.0, 2), ("decode step", "ms", figures.step_error, 1e3, 1))
    for name, unit, error, scale, places in named:
        yield Line(group, f"{name}, bias", unit, signed(None if error is None else error.bias_s * scale, places))
        yield Line(group, f"{name}, mean size", unit, of(error, "mean_s", scale, places))
        yield Line(group, f"{name}, of what happened", "%", percent(None if error is None else error.relative))


def _fairness(figures: Statistics) -> Iterator[Line]:
    for index in range(5):
        found = figures.quintiles[index] if index < len(figures.quintiles) else None
        words = ("shortest fifth", "second", "third", "fourth", "longest fifth")[index]
        yield Line("Accepted, by prompt length", words, "%", percent(None if found is None else found.accepted))


def _pools(figures: Statistics) -> Iterator[Line]:
    group, swing = "Pools", figures.oscillation
    yield Line(group, "decode KV, mean", "tokens", decimal(None if swing is None else swing.kv_tokens_mean, 0))
    yield Line(group, "oscillation (its std)", "tokens", decimal(None if swing is None else swing.kv_tokens_std, 0))
    yield Line(group, "the same once it is filled", "tokens", decimal(None if swing is None else swing.filled_std, 0))
    yield Line(group, "correlation of loads", "", signed(None if swing is None else swing.correlation, 2))
    yield Line(group, "attempts", "", count(figures.attempts))
    yield Line(group, "preemptions", "", count(figures.preemptions))


def _run(sketch: Sketch) -> Iterator[Line]:
    yield Line("Run", "duration", "s", decimal(sketch.duration_s, 1))
    yield Line("Run", "took", "s", decimal(sketch.wall_s, 1))
    yield Line("Run", "decision log", "", sketch.digest[:12] or NONE)


def headline(sketch: Sketch) -> list[tuple[str, str, str]]:
    """What one looks for first: (name, value with its unit, what stands behind it)."""
    figures = sketch.statistics
    wasted = figures.wasted_prefill_s / figures.prefill_s if figures.prefill_s else None
    swing = figures.oscillation
    return [
        ("Effective capacity", with_unit(percent(figures.capacity), "%"), f"{count(figures.effective)} of "
         f"{count(figures.requests)} requests finished within both limits"),
        ("Goodput", with_unit(decimal(figures.effective_per_s, 2), "requests/s"),
         f"{decimal(figures.effective_tokens_per_s, 0)} tokens/s; {count(figures.served_kv_tokens)} tokens served"),
        ("Rejected", count(figures.rejected), f"{percent(_share(figures.rejected, figures.requests))} % of all"),
        ("TTFT p90", with_unit(of(figures.ttft, "p90", 1.0, 2), "s"), limits_text(sketch.slo_ttft_s, "s", 1.0)),
        ("TBT p90", with_unit(of(figures.tbt_worst, "p90", 1e3, 1), "ms"),
         f"mean of a request’s worst tenth; {limits_text(sketch.slo_tbt_s, 'ms', 1e3)}"),
        ("Prefill wasted", with_unit(decimal(figures.wasted_prefill_s, 0), "s"),
         f"{percent(wasted)} % of {decimal(figures.prefill_s, 0)} s went to requests outside their limits"),
        ("Hit rate", with_unit(percent(None if figures.hits is None else figures.hits.total), "%"),
         "of prompt tokens were found and not computed"),
        ("Oscillation", with_unit(decimal(None if swing is None else swing.kv_tokens_std, 0), "tokens"),
         f"standard deviation of the decode pool’s KV; loads correlate "
         f"{signed(None if swing is None else swing.correlation, 2)}"),
    ]  # fmt: skip


def limits_text(limits: Sequence[float], unit: str, scale: float) -> str:
    """The limits that requests had, in words."""
    if not limits:
        return "no limit"
    if len(limits) > 2:
        return f"limits {limits[0] * scale:g} to {limits[-1] * scale:g} {unit}"
    return ("limit " if len(limits) == 1 else "limits ") + " and ".join(f"{v * scale:g}" for v in limits) + f" {unit}"


def count(number: int) -> str:
    return f"{number:,}"


def decimal(value: float | None, places: int) -> str:
    return NONE if value is None else f"{value:,.{places}f}"


def signed(value: float | None, places: int) -> str:
    return NONE if value is None else f"{value:+,.{places}f}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share * 100:.1f}"


def with_unit(text: str, unit: str) -> str:
    return text if text == NONE else f"{text} {unit}"


def of(found: Distribution | PredictionError | None, name: str, scale: float, places: int) -> str:
    """One field of a distribution, in the unit that `scale` leads to."""
    return decimal(None if found is None else getattr(found, name) * scale, places)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
