"""Shell: what a worker shows Prometheus: its last load report and its passes."""

from __future__ import annotations

from functools import partial

from node.loop import NodeLoop
from service.metrics import Metrics

GAUGES = {
    "queued_attempts": "Prompts waiting to be computed",
    "queued_tokens": "Prompt tokens waiting to be computed",
    "running_sequences": "Sequences in the decode batch",
    "kv_tokens": "Tokens of KV that running sequences hold",
    "free_device_blocks": "DEVICE blocks that hold nothing",
    "evictable_device_blocks": "DEVICE blocks that nobody holds",
    "free_dram_blocks": "DRAM blocks that hold nothing",
    "held_blocks": "Blocks of all tiers with at least one holder",
    "quarantined_blocks": "Blocks that a peer may still touch",
}


def instrument(loop: NodeLoop, metrics: Metrics) -> None:
    """Register `loop`'s metrics; they are read when the page is."""
    for name, text in GAUGES.items():
        metrics.gauge(f"worker_{name}", text).set_function(partial(_field, loop, name))
    metrics.gauge("worker_passes", "Engine passes since the start").set_function(lambda: loop.passes)
    metrics.gauge("worker_pass_seconds", "Time spent in engine passes since the start").set_function(
        lambda: loop.pass_s
    )


def _field(loop: NodeLoop, name: str) -> float:
    return float(getattr(loop.last_load, name))
