"""Usage and timings from what workers report."""

from __future__ import annotations

from conductor.effects import RequestSummary
from conductor.usage import Moments, timings_of, usage_of
from core.messages import AttemptStats
from halfmoon.types import NodeId

PREFILL = AttemptStats(
    node_id=NodeId("p"), queue_s=0.5, fetch_s=0.25, compute_s=1.0, computed_tokens=60, hit_tokens_device=32,
    hit_tokens_dram=16, hit_tokens_remote=4,
)  # fmt: skip
DECODE = AttemptStats(
    node_id=NodeId("d"), pull_s=0.125, pulled_blocks=7, pulled_bytes=700, link="shm", overlap=1.0, preemptions=1,
    compute_s=9.0, computed_tokens=9, hit_tokens_device=16, decode_prefilled_tokens=2,
)  # fmt: skip
EARLIER = AttemptStats(node_id=NodeId("e"), pulled_blocks=1, pulled_bytes=100, link="torch", overlap=0.2)
SUMMARY = RequestSummary(attempts=2, prefill_node="p", decode_node="d", stats=(), predicted_ttft_s=1.5)


def test_sums_over_workers_and_attempts() -> None:
    usage = usage_of(
        num_prompt_tokens=112,
        num_output_tokens=9,
        prefill_stats=[PREFILL],
        decode_stats=[EARLIER, DECODE],
        summary=SUMMARY,
    )
    assert (usage.prompt_tokens, usage.completion_tokens, usage.computed_prompt_tokens) == (112, 9, 60)
    hits = (usage.prefix_hit_tokens_device, usage.prefix_hit_tokens_dram, usage.prefix_hit_tokens_remote)
    assert hits == (32, 16, 4)
    assert (usage.kv_blocks_pulled, usage.kv_bytes_pulled, usage.link) == (8, 800, "shm")
    assert abs(usage.overlap - 0.9) < 1e-12  # weighted by bytes
    assert (usage.attempts, usage.prefill_node, usage.decode_node, usage.preemptions) == (2, "p", "d", 1)
    assert usage.decode_prefilled_tokens == 2


def test_timings_count_from_arrival() -> None:
    moments = Moments(arrived_s=10.0, tokenized_s=10.5, first_token_s=12.0, ended_s=15.0)
    timings = timings_of(moments, prefill_stats=[PREFILL], decode_stats=[DECODE], predicted_ttft_s=None)
    assert (timings.tokenize_s, timings.ttft_s, timings.total_s) == (0.5, 2.0, 5.0)
    assert (timings.queue_s, timings.fetch_s, timings.prefill_s, timings.pull_s) == (0.5, 0.25, 1.0, 0.125)
    assert not timings.HasField("predicted_ttft_s")
