"""The figures of hand-made runs, computed in the head; and what has no basis is None, not zero."""

from __future__ import annotations

import random

import pytest

from halfmoon.types import Outcome
from report.curves import BINS_MAX, POINTS_MAX, cumulative, loads, rejected_by_stage, sketch
from report.pearson import correlation
from report.statistics import (
    Distribution,
    HitRates,
    PredictionError,
    Rejections,
    distribution,
    hit_rates,
    oscillation,
    prediction_error,
    quintiles,
    rejections,
    statistics,
)
from tests.report_runs import row, run, sample, seeded_run

LIMITS = {"slo_ttft_s": 2.0, "slo_tbt_s": 0.1}
REJECTED = {"outcome": Outcome.REJECTED, "output_tokens": 0}


def test_percentiles_are_values_that_occurred() -> None:
    found = distribution(float(n) for n in range(1, 101))
    assert found == Distribution(count=100, mean=50.5, p50=50.0, p90=90.0, p99=99.0, max=100.0)
    assert distribution([3.0, None]) == Distribution(count=1, mean=3.0, p50=3.0, p90=3.0, p99=3.0, max=3.0)
    assert distribution([None]) is None


def test_goodput_counts_what_finished_within_both_limits() -> None:
    """Four finish: one in time, one late, one slow, one of a single token (it has no gap). One was cancelled."""
    figures = statistics(
        run(
            row("in time", ttft_s=2.0, tbt_worst_s=0.1, prefill_s=1.0, **LIMITS),
            row("late", ttft_s=2.1, tbt_worst_s=0.1, prefill_s=2.0, **LIMITS),
            row("slow", ttft_s=2.0, tbt_worst_s=0.11, prefill_s=4.0, **LIMITS),
            row("single", ttft_s=1.0, output_tokens=1, prefill_s=8.0, **LIMITS),
            row("gone", outcome=Outcome.CANCELLED, ttft_s=1.0, prefill_s=16.0, **LIMITS),
        )
    )
    assert (figures.effective, figures.finished, figures.capacity) == (2, 4, 0.4)
    assert figures.served_kv_tokens == 110 + 101
    assert (figures.effective_per_s, figures.effective_tokens_per_s) == (0.2, 21.1)
    assert (figures.prefill_s, figures.wasted_prefill_s) == (31.0, 22.0)


def test_without_limits_whatever_finishes_counts() -> None:
    assert statistics(run(row(ttft_s=1e6, tbt_worst_s=1e6))).effective == 1


def test_a_prefill_of_a_request_rejected_after_it_is_wasted() -> None:
    figures = statistics(run(row(ttft_s=1.0, prefill_s=3.0), row(stage="decode", prefill_s=5.0, **REJECTED)))
    assert figures.wasted_prefill_s == 5.0


def test_rejections_are_counted_by_stage_and_reason_the_most_frequent_first() -> None:
    rows = [
        row(stage="arrival", reason="ttft", **REJECTED),
        row(stage="decode", reason="tbt", **REJECTED),
        row(stage="decode", reason="tbt", **REJECTED),
        row(**REJECTED),
        row(),
    ]
    assert rejections(rows) == (
        Rejections(stage="decode", reason="tbt", count=2),
        Rejections(stage="unnamed", reason="unnamed", count=1),
        Rejections(stage="arrival", reason="ttft", count=1),
    )
    by_stage = rejected_by_stage(statistics(run(*rows)))
    assert by_stage == {"arrival": 1, "prefill": 0, "decode": 2, "unnamed": 1}


def test_hit_rates_leave_out_requests_whose_prefill_never_ran() -> None:
    hit = row(input_tokens=300, hit_tokens_device=60, hit_tokens_dram=30, hit_tokens_remote=10, prefill_s=1.0)
    miss = row(input_tokens=100, prefill_s=1.0)
    found = hit_rates([hit, miss, row(input_tokens=10_000, **REJECTED)])
    assert found == HitRates(count=2, device=0.15, dram=0.075, remote=0.025)
    assert found.total == pytest.approx(0.25)
    assert hit_rates([row(**REJECTED)]) is None


def test_prediction_error_is_predicted_minus_actual() -> None:
    found = prediction_error([(3.0, 2.0), (1.0, 2.0), (7.0, 4.0), (None, 5.0), (5.0, None)])
    assert found == PredictionError(count=3, bias_s=1.0, mean_s=5 / 3, p90_s=3.0, relative=0.625)
    assert prediction_error([(1.0, None)]) is None
    assert prediction_error([(1.0, 0.0)]).relative is None  # type: ignore[union-attr]


def test_quintiles_are_fifths_by_prompt_length() -> None:
    """Ten prompts of 10 … 100 tokens; the two longest are rejected, and the one of 50 tokens is late."""
    rows = [row(f"r{n}", input_tokens=10 * n, ttft_s=9.0 if n == 5 else 1.0, **LIMITS) for n in range(1, 9)]
    rows += [row(f"r{n}", input_tokens=10 * n, **REJECTED) for n in (10, 9)]
    found = quintiles(rows)
    assert [(q.input_tokens_min, q.input_tokens_max) for q in found] == [
        (10, 20), (30, 40), (50, 60), (70, 80), (90, 100),
    ]  # fmt: skip
    assert [q.accepted for q in found] == [1, 1, 1, 1, 0]
    assert [q.effective for q in found] == [1, 1, 0.5, 1, 0]


@pytest.mark.parametrize("requests", [0, 1, 3, 7])
def test_quintiles_hold_every_request_once(requests: int) -> None:
    found = quintiles([row(f"r{n}", input_tokens=n + 1) for n in range(requests)])
    assert sum(q.count for q in found) == requests
    assert all(q.count for q in found)


def test_oscillation_is_measured_between_first_and_last_arrival() -> None:
    rows = [row("a", arrived_s=1.0), row("b", arrived_s=4.0)]
    samples = [sample(0, 9, 9, 10**9)]  # before the first
    samples += [sample(t, 1 + t % 2, 1 - t % 2, 100 + 100 * (t % 2)) for t in (1, 2, 3, 4)]
    samples += [sample(5, 9, 9, 10**9)]  # after the last
    found = oscillation(rows, samples)
    assert found is not None
    assert (found.count, found.kv_tokens_mean, found.kv_tokens_std) == (4, 150.0, 50.0)
    assert found.correlation == pytest.approx(-1.0)
    assert (found.filled_s, found.filled_std) == (0.0, 50.0)
    assert oscillation(rows, samples[:1]) is None
    assert oscillation([], samples) is None


def test_the_ramp_from_an_empty_pool_is_told_apart() -> None:
    rows = [row("a", arrived_s=1.0), row("b", arrived_s=9.0)]
    found = oscillation(rows, [sample(t, 1, 1, kv) for t, kv in enumerate((0, 0, 30, 60, 100, 110, 90, 100, 110, 90))])
    assert found is not None
    assert found.kv_tokens_mean == pytest.approx(690 / 9)
    assert found.filled_s == 3.0
    assert found.filled_std == pytest.approx((400 / 6) ** 0.5)


def test_a_load_that_never_changes_correlates_with_nothing() -> None:
    assert correlation([], []) is None
    assert correlation([1, 1, 1], [1, 2, 3]) is None
    assert correlation([0, 1, 2], [5, 7, 9]) == pytest.approx(1.0)


def test_an_empty_run_has_no_figure_out_of_nothing() -> None:
    figures = statistics(run(duration_s=0.0))
    assert figures.requests == figures.effective == figures.served_kv_tokens == 0
    missing = ("capacity", "effective_per_s", "ttft", "tbt_worst", "hits", "ttft_error", "oscillation")
    assert all(getattr(figures, name) is None for name in missing)
    assert figures.quintiles == figures.rejections == ()


def test_outcomes_add_up() -> None:
    figures = statistics(seeded_run(requests=400))
    assert sum(figures.outcomes.values()) == figures.requests == 400
    assert sum(entry.count for entry in figures.rejections) == figures.rejected > 0
    assert 0 < figures.effective < figures.finished


def test_a_cumulative_curve_is_thinned_but_never_bent() -> None:
    """Against the dumb twin: at each point, the share of all values at or below it."""
    rng = random.Random(7)
    values = [rng.expovariate(1.0) for _ in range(5 * POINTS_MAX)]
    curve = cumulative(values)
    assert len(curve.values) == POINTS_MAX
    assert (curve.values[0], curve.values[-1], curve.shares[-1]) == (min(values), max(values), 1.0)
    for value, share in zip(curve.values, curve.shares, strict=True):
        assert share == pytest.approx(sum(v <= value for v in values) / len(values))
    assert cumulative([2.0, None, 1.0]).values == (1.0, 2.0)


def test_loads_are_means_over_spans() -> None:
    found = loads([sample(t, t, 0.0, 10 * t) for t in range(2 * BINS_MAX)])
    assert (found.step_s, len(found.at_s)) == (2.0, BINS_MAX)
    assert (found.at_s[1], found.prefill_load[1], found.decode_kv_tokens[1]) == (2.5, 2.5, 25.0)
    assert loads([]).at_s == ()


def test_a_sketch_is_small_however_long_the_run() -> None:
    found = sketch(seeded_run(requests=2000), label="x")
    assert len(found.ttft.values) <= POINTS_MAX
    assert found.label == "x"
    assert (found.slo_ttft_s, found.slo_tbt_s) == ((30.0,), (0.1,))
