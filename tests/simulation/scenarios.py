"""Small worlds for the simulator's tests: a node that is easy to reckon with, and chats that share prefixes."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import Any

from report.records import Run
from simulator.config import SimConfig
from simulator.faults import parse_faults
from simulator.hardware_values import Hardware
from simulator.run import simulate
from workload.trace import Trace, TraceRequest

HARDWARE = Hardware(
    name="small",
    source="made up",
    prefill_pass_s=0.002,
    prefill_token_s=2e-4,
    prefill_pair_s=1e-7,
    decode_step_s=0.01,
    decode_sequence_s=1e-4,
    decode_token_s=1e-6,
    kv_token_bytes=1000,
    link_s=2e-4,
    link_bytes_per_s=1e8,
    move_s_per_byte=1e-8,
    message_s=5e-4,
    block_tokens=16,
    prefill_blocks=300,
    decode_blocks=200,
    tokens_per_pass_max=256,
    prompts_per_pass_max=4,
    sequences_max=16,
    batch_blocks=4,
)


def chats(seed: int, count: int, every_s: float = 0.1) -> Trace:
    """Prompts of 1 to 20 blocks of 16 tokens, of which up to 8 are shared, and outputs of 1 to 60 tokens."""
    rng = random.Random(seed)
    requests, fresh, at_s = [], 1000, 0.0
    for _ in range(count):
        at_s += rng.expovariate(1.0 / every_s)
        own = rng.randint(1, 12)
        stem = rng.randrange(4) * 10
        ids = (*range(stem, stem + rng.randint(0, 8)), *range(fresh, fresh + own))
        fresh += own
        requests.append(
            TraceRequest(
                at_s=at_s,
                input_tokens=len(ids) * 16 - rng.randint(0, 15),
                output_tokens=rng.choice((1, 2, rng.randint(3, 60))),
                block_ids=ids,
            )
        )
    return Trace(source="chats", block_tokens=16, requests=tuple(requests))


def config(faults: str = "", hardware: dict[str, Any] | None = None, **settings: Any) -> SimConfig:
    """2P+2D without limits, invariants checked."""
    defaults: dict[str, Any] = {
        "prefill": 2,
        "decode": 2,
        "jitter_s": 0.0,
        "deadline_s": 120.0,
        "slo_ttft_s": None,
        "slo_tbt_s": None,
        "check": True,
    }
    return SimConfig(
        hardware=replace(HARDWARE, **(hardware or {})), faults=parse_faults(faults), **{**defaults, **settings}
    )


def run(seed: int, count: int = 120, faults: str = "", hardware: dict[str, Any] | None = None, **settings: Any) -> Run:
    return simulate(chats(seed, count, settings.pop("every_s", 0.1)), config(faults, hardware, seed=seed, **settings))


def fingerprint(run: Run) -> str:
    """Of every decision, every row and every sample."""
    seen = repr((run.digest, run.requests, run.samples, run.duration_s, run.residuals))
    return hashlib.blake2b(seen.encode(), digest_size=8).hexdigest()
