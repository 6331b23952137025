"""Pure: what one run leaves behind, simulated or real: a row per request, a sample per second, and what was run.

The simulator and the load test fill these; tables, Parquet, JSON and HTML are made from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from halfmoon.types import Outcome


@dataclass(frozen=True, kw_only=True)
class RequestRow:
    """One request, from its arrival to its terminal event. Times in seconds; None: it did not come to that.

    Args:
        arrived_s: since the run's beginning.
        stage: where a rejected one was rejected: "arrival", "prefill" (queued or computing) or "decode" (after it).
        reason: the rejection's or failure's one word, as clients see it.
        ttft_s: from arrival to the first token.
        tbt_worst_s: mean of the worst 10 % of the gaps between tokens (FAST'25); `tbt_p50_s`, `tbt_max_s` beside it.
        predicted_ttft_s, predicted_tbt_s: of the placement that gave the first token. The latter is one decode step
            with what a prefill pass adds to it: a usual gap, not the worst tenth.
        hit_tokens_device, hit_tokens_dram, hit_tokens_remote: prompt tokens that were found and not computed.
        prefill_s: seconds of prefill workers spent on it, over all attempts: wasted, unless it met its limits.
    """

    request_id: str
    arrived_s: float
    input_tokens: int
    output_tokens: int
    outcome: Outcome
    priority: int = 0
    stage: str = ""
    reason: str = ""
    ttft_s: float | None = None
    tbt_p50_s: float | None = None
    tbt_worst_s: float | None = None
    tbt_max_s: float | None = None
    ended_s: float | None = None
    slo_ttft_s: float | None = None
    slo_tbt_s: float | None = None
    predicted_ttft_s: float | None = None
    predicted_tbt_s: float | None = None
    hit_tokens_device: int = 0
    hit_tokens_dram: int = 0
    hit_tokens_remote: int = 0
    prefill_s: float = 0.0
    attempts: int = 0
    preemptions: int = 0
    prefill_node: str = ""
    decode_node: str = ""

    @property
    def effective(self) -> bool:
        """Finished within both of its limits: what goodput counts."""
        late = self.slo_ttft_s is not None and (self.ttft_s is None or self.ttft_s > self.slo_ttft_s)
        slow = self.slo_tbt_s is not None and self.tbt_worst_s is not None and self.tbt_worst_s > self.slo_tbt_s
        return self.outcome is Outcome.FINISHED and not late and not slow


@dataclass(frozen=True, kw_only=True)
class LoadSample:
    """The state of both pools at one moment, sampled every second of the run's own time.

    Args:
        prefill_queue_s: seconds of work that wait or run, mean over the prefill workers.
        prefill_load, decode_load: see conductor.oscillation.pool_loads; 1 is the limit.
        decode_kv_tokens: tokens of KV of running sequences, over all decode workers.
        decode_free_blocks: that each decode worker could still give away, always in the same order; empty: not told.
    """

    at_s: float
    prefill_queue_s: float
    prefill_load: float
    decode_load: float
    decode_kv_tokens: int
    decode_sequences: int
    decode_free_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Args:
        title: one line: what was run on what.
        settings: what it takes to run it again: names and values, in the order to print them.
        digest: of the decision log, where the run is deterministic; else empty.
        counters: of events worth a line: refusals, transfers, evictions.
        residuals: prediction error by cost term: (bias, error), relative.
        duration_s: from the first arrival to the last terminal event, in the run's own time.
        wall_s: what the run itself took.
    """

    title: str
    settings: Mapping[str, object]
    requests: tuple[RequestRow, ...]
    samples: tuple[LoadSample, ...]
    duration_s: float
    wall_s: float
    digest: str = ""
    counters: Mapping[str, int] = field(default_factory=dict)
    residuals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
