"""Pure: the figures of one run, each computed in one place: tables, JSON and pages only print them.

A figure that has no basis (no request got that far) is None, never zero. Definitions stand beside the fields and, for
people, in docs/glossary.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from halfmoon.types import Outcome
from report.pearson import correlation
from report.records import LoadSample, RequestRow, Run

QUINTILES = 5


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Of `count` values, at least one; percentiles are nearest-rank, so each is a value that occurred."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Rejections:
    """How many requests were rejected at one stage for one reason."""

    stage: str
    reason: str
    count: int


@dataclass(frozen=True, kw_only=True)
class PredictionError:
    """Of predicted minus actual, over the requests that have both.

    Args:
        bias_s: mean error; above zero: the prediction was too high.
        mean_s, p90_s: of the error's size.
        relative: the sum of the errors' sizes over the sum of what happened; None where that sum is zero.
    """

    count: int
    bias_s: float
    mean_s: float
    p90_s: float
    relative: float | None


@dataclass(frozen=True, kw_only=True)
class Quintile:
    """One fifth of all requests by prompt length, shortest first; equal lengths are split in order of arrival.

    Args:
        input_tokens_min, input_tokens_max: of its prompts.
        accepted: share that was rejected at no stage.
        effective: share that finished within both limits.
    """

    count: int
    input_tokens_min: int
    input_tokens_max: int
    accepted: float
    effective: float


@dataclass(frozen=True, kw_only=True)
class HitRates:
    """Prompt tokens found in each tier, as shares of the prompt tokens of the `count` requests that prefill ran for."""

    count: int
    device: float
    dram: float
    remote: float

    @property
    def total(self) -> float:
        return self.device + self.dram + self.remote


@dataclass(frozen=True, kw_only=True)
class Oscillation:
    """The swing of the pools between first and last arrival, from the samples of every second.

    Args:
        count: samples in that time.
        kv_tokens_mean, kv_tokens_std: of the decode pool's KV load; the standard deviation is the oscillation.
        filled_s: from the first arrival until the load first was at that mean: the ramp from an empty pool.
        filled_std: the standard deviation from then on. A ramp of r of T seconds alone makes one of about
            mean * sqrt(r / 3T), whatever the policy does later.
        correlation: Pearson's, of the two pools' loads; towards -1: in anti-phase, as in the paper's Figure 9.
            None where one of them never changes.
    """

    count: int
    kv_tokens_mean: float
    kv_tokens_std: float
    filled_s: float
    filled_std: float
    correlation: float | None


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """One run in figures.

    Args:
        effective: finished within both limits; the rest of `finished` was late or slow.
        capacity: effective / requests (effective request capacity, FAST'25); None for a run without requests.
        effective_per_s, effective_tokens_per_s: goodput, over the run's duration; None where it has none.
        served_kv_tokens: prompt and output tokens of effective requests.
        prefill_s, wasted_prefill_s: seconds of prefill workers; wasted: spent on requests that are not effective,
            rejected after prefill among them.
        tbt_worst: over requests, of the mean of the worst 10 % of their gaps; `tbt_p50`, `tbt_max`: of their median
            and of their longest gap.
        step_error: of the predicted decode step, against the median gap. Nobody predicts `tbt_worst`.
    """

    requests: int
    outcomes: dict[str, int]
    effective: int
    capacity: float | None
    effective_per_s: float | None
    effective_tokens_per_s: float | None
    served_kv_tokens: int
    prefill_s: float
    wasted_prefill_s: float
    ttft: Distribution | None
    tbt_p50: Distribution | None
    tbt_worst: Distribution | None
    tbt_max: Distribution | None
    rejections: tuple[Rejections, ...]
    failures: dict[str, int]
    hits: HitRates | None
    ttft_error: PredictionError | None
    step_error: PredictionError | None
    quintiles: tuple[Quintile, ...]
    oscillation: Oscillation | None
    attempts: int
    preemptions: int

    @property
    def rejected(self) -> int:
        return self.outcomes[Outcome.REJECTED.value]

    @property
    def finished(self) -> int:
        return self.outcomes[Outcome.FINISHED.value]


def statistics(run: Run) -> Statistics:
    """Every figure of `run`."""
    rows = run.requests
    effective = [row for row in rows if row.effective]
    served = sum(row.input_tokens + row.output_tokens for row in effective)
    prefill_s = sum(row.prefill_s for row in rows)
    lasted = run.duration_s > 0
    return Statistics(
        requests=len(rows),
        outcomes={o.value: sum(row.outcome is o for row in rows) for o in Outcome},
        effective=len(effective),
        capacity=len(effective) / len(rows) if rows else None,
        effective_per_s=len(effective) / run.duration_s if lasted else None,
        effective_tokens_per_s=served / run.duration_s if lasted else None,
        served_kv_tokens=served,
        prefill_s=prefill_s,
        wasted_prefill_s=sum(row.prefill_s for row in rows if not row.effective),
        ttft=distribution(row.ttft_s for row in rows),
        tbt_p50=distribution(row.tbt_p50_s for row in rows),
        tbt_worst=distribution(row.tbt_worst_s for row in rows),
        tbt_max=distribution(row.tbt_max_s for row in rows),
        rejections=rejections(rows),
        failures=dict(sorted(Counter(r.reason or "unnamed" for r in rows if r.outcome is Outcome.FAILED).items())),
        hits=hit_rates(rows),
        ttft_error=prediction_error((row.predicted_ttft_s, row.ttft_s) for row in rows),
        step_error=prediction_error((row.predicted_tbt_s, row.tbt_p50_s) for row in rows),
        quintiles=quintiles(rows),
        oscillation=oscillation(rows, run.samples),
        attempts=sum(row.attempts for row in rows),
        preemptions=sum(row.preemptions for row in rows),
    )


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Of the values that there are; None if there is none."""
    known = np.array([value for value in values if value is not None], dtype=float)
    if not known.size:
        return None
    p50, p90, p99 = (percentile(known, share) for share in (0.5, 0.9, 0.99))
    return Distribution(
        count=known.size, mean=float(known.mean()), p50=p50, p90=p90, p99=p99, max=float(known.max())
    )  # fmt: skip


def percentile(values: Sequence[float] | np.ndarray, share: float) -> float:
    """The nearest-rank percentile, a value that occurred; `values` is not empty."""
    return float(np.quantile(values, share, method="inverted_cdf"))


def rejections(rows: Sequence[RequestRow]) -> tuple[Rejections, ...]:
    """By stage and reason, the most frequent first."""
    counts = Counter((row.stage, row.reason) for row in rows if row.outcome is Outcome.REJECTED)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(
        Rejections(stage=stage or "unnamed", reason=reason or "unnamed", count=n) for (stage, reason), n in ordered
    )


def hit_rates(rows: Sequence[RequestRow]) -> HitRates | None:
    """Requests that prefill never ran for found nothing because nobody looked: they are left out."""
    ran = [row for row in rows if row.prefill_s > 0]
    if not ran:
        return None
    tokens = sum(row.input_tokens for row in ran)
    return HitRates(
        count=len(ran),
        device=sum(row.hit_tokens_device for row in ran) / tokens,
        dram=sum(row.hit_tokens_dram for row in ran) / tokens,
        remote=sum(row.hit_tokens_remote for row in ran) / tokens,
    )


def prediction_error(pairs: Iterable[tuple[float | None, float | None]]) -> PredictionError | None:
    """Of (predicted, actual) seconds, over the pairs that have both; None if there is none."""
    known = [(predicted, actual) for predicted, actual in pairs if predicted is not None and actual is not None]
    if not known:
        return None
    predicted, actual = np.array(known, dtype=float).T
    error = predicted - actual
    size, happened = np.abs(error), float(actual.sum())
    return PredictionError(
        count=len(known),
        bias_s=float(error.mean()),
        mean_s=float(size.mean()),
        p90_s=percentile(size, 0.9),
        relative=float(size.sum()) / happened if happened > 0 else None,
    )


def quintiles(rows: Sequence[RequestRow]) -> tuple[Quintile, ...]:
    """Fifths by prompt length; fewer than five where there are fewer requests."""
    ordered = sorted(rows, key=lambda row: (row.input_tokens, row.arrived_s, row.request_id))
    edges = [len(ordered) * i // QUINTILES for i in range(QUINTILES + 1)]
    groups = [ordered[start:end] for start, end in pairwise(edges) if start < end]
    return tuple(
        Quintile(
            count=len(group),
            input_tokens_min=group[0].input_tokens,
            input_tokens_max=group[-1].input_tokens,
            accepted=sum(row.outcome is not Outcome.REJECTED for row in group) / len(group),
            effective=sum(row.effective for row in group) / len(group),
        )
        for group in groups
    )


def oscillation(rows: Sequence[RequestRow], samples: Sequence[LoadSample]) -> Oscillation | None:
    """None where no sample lies between first and last arrival."""
    if not rows:
        return None
    first, last = min(row.arrived_s for row in rows), max(row.arrived_s for row in rows)
    within = [sample for sample in samples if first <= sample.at_s <= last]
    if not within:
        return None
    kv = np.array([sample.decode_kv_tokens for sample in within], dtype=float)
    filled = int(np.argmax(kv >= kv.mean()))
    return Oscillation(
        count=len(within),
        kv_tokens_mean=float(kv.mean()),
        kv_tokens_std=float(kv.std()),
        filled_s=within[filled].at_s - first,
        filled_std=float(kv[filled:].std()),
        correlation=correlation([s.prefill_load for s in within], [s.decode_load for s in within]),
    )
