"""Pure: what a trace amounts to, in the figures that papers publish of theirs."""

from __future__ import annotations

from dataclasses import dataclass

from workload.trace import Trace


@dataclass(frozen=True, kw_only=True)
class TraceStatistics:
    """Of a whole trace.

    Args:
        hit_rate: share of all block ids, partial last ones too, that were there before, under an unlimited pool.
        shared_rate: share of requests whose first block was there before.
    """

    num_requests: int
    duration_s: float
    input_tokens_mean: float
    output_tokens_mean: float
    num_blocks: int
    num_unique_blocks: int
    hit_rate: float
    shared_rate: float


def statistics(trace: Trace) -> TraceStatistics:
    """Every figure in one pass; memory grows with the unique blocks."""
    seen: set[int] = set()
    blocks = hits = shared = 0
    for request in trace.requests:
        blocks += len(request.block_ids)
        hits += sum(name in seen for name in request.block_ids)
        shared += bool(request.block_ids) and request.block_ids[0] in seen
        seen.update(request.block_ids)
    number = len(trace.requests)
    return TraceStatistics(
        num_requests=number,
        duration_s=trace.requests[-1].at_s - trace.requests[0].at_s if number else 0.0,
        input_tokens_mean=sum(r.input_tokens for r in trace.requests) / max(1, number),
        output_tokens_mean=sum(r.output_tokens for r in trace.requests) / max(1, number),
        num_blocks=blocks,
        num_unique_blocks=len(seen),
        hit_rate=hits / max(1, blocks),
        shared_rate=shared / max(1, number),
    )
