"""Pure: the usage and timings that end a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conductor.effects import RequestSummary
from core.messages import AttemptStats
from halfmoon.v1 import inference_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Seconds of the front end's clock."""

    arrived_s: float
    tokenized_s: float
    first_token_s: float | None
    ended_s: float


def usage_of(
    *,
    num_prompt_tokens: int,
    num_output_tokens: int,
    prefill_stats: Sequence[AttemptStats],
    decode_stats: Sequence[AttemptStats],
    summary: RequestSummary,
) -> pb.Usage:
    """Sums over all attempts. What became of the prompt is told by prefill workers alone: a decode worker's hits save
    transfers, its computed tokens are output. `overlap` is the decode workers', weighted by pulled bytes."""
    stats = [*prefill_stats, *decode_stats]
    decode_bytes = sum(s.pulled_bytes for s in decode_stats)
    weighted = sum(s.overlap * s.pulled_bytes for s in decode_stats)
    return pb.Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_output_tokens,
        prefix_hit_tokens_device=sum(s.hit_tokens_device for s in prefill_stats),
        prefix_hit_tokens_dram=sum(s.hit_tokens_dram for s in prefill_stats),
        prefix_hit_tokens_remote=sum(s.hit_tokens_remote for s in prefill_stats),
        computed_prompt_tokens=sum(s.computed_tokens for s in prefill_stats),
        decode_prefilled_tokens=sum(s.decode_prefilled_tokens for s in stats),
        kv_blocks_pulled=sum(s.pulled_blocks for s in stats),
        kv_bytes_pulled=sum(s.pulled_bytes for s in stats),
        link=next((s.link for s in reversed(stats) if s.link), ""),
        overlap=weighted / decode_bytes if decode_bytes else 0.0,
        attempts=summary.attempts,
        preemptions=sum(s.preemptions for s in stats),
        prefill_node=summary.prefill_node,
        decode_node=summary.decode_node,
    )


def timings_of(
    moments: Moments,
    *,
    prefill_stats: Sequence[AttemptStats],
    decode_stats: Sequence[AttemptStats],
    predicted_ttft_s: float | None,
) -> pb.Timings:
    """Server-side seconds from the request's arrival; attempts are added up."""
    first_s = moments.ended_s if moments.first_token_s is None else moments.first_token_s
    return pb.Timings(
        tokenize_s=moments.tokenized_s - moments.arrived_s,
        queue_s=sum(s.queue_s for s in prefill_stats),
        fetch_s=sum(s.fetch_s for s in prefill_stats),
        prefill_s=sum(s.compute_s for s in prefill_stats),
        pull_s=sum(s.pull_s for s in decode_stats),
        ttft_s=first_s - moments.arrived_s,
        total_s=moments.ended_s - moments.arrived_s,
        predicted_ttft_s=predicted_ttft_s,
    )
