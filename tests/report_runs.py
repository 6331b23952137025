"""Runs for tests of the reports: hand-made ones whose figures can be computed in the head, and seeded ones."""

from __future__ import annotations

import math
import random

from halfmoon.types import Outcome
from report.records import LoadSample, RequestRow, Run


def row(name: str = "r", **fields: object) -> RequestRow:
    """A request of 100 + 10 tokens that finished at once, but for `fields`."""
    plain = {"arrived_s": 0.0, "input_tokens": 100, "output_tokens": 10, "outcome": Outcome.FINISHED}
    return RequestRow(request_id=name, **plain | fields)  # type: ignore[arg-type]


def sample(at_s: float, prefill: float = 0.0, decode: float = 0.0, kv_tokens: int = 0) -> LoadSample:
    return LoadSample(
        at_s=at_s, prefill_queue_s=prefill * 30, prefill_load=prefill, decode_load=decode, decode_kv_tokens=kv_tokens,
        decode_sequences=kv_tokens // 1000,
    )  # fmt: skip


def run(*rows: RequestRow, samples: tuple[LoadSample, ...] = (), **fields: object) -> Run:
    plain = {"title": "a run", "settings": {"seed": 1}, "duration_s": 10.0, "wall_s": 0.5}
    return Run(requests=rows, samples=samples, **plain | fields)  # type: ignore[arg-type]


def seeded_run(seed: int = 1, requests: int = 600, *, policy: str = "early", swing: float = 0.4) -> Run:
    """A run that looks like an overloaded cluster: two pools in anti-phase, with rejections where decode is full."""
    rng = random.Random(seed)
    seconds = 400
    rows = [_seeded_row(rng, number, seconds * number / requests, swing) for number in range(requests)]
    samples = tuple(
        sample(t, _load(t, -swing) + rng.gauss(0, 0.03), decode := _load(t, swing), int(decode * 800_000))
        for t in range(seconds)
    )
    return Run(
        title=f"a seeded trace on 8P+2D, policy {policy}",
        settings={"trace": "seeded", "prefill": 8, "decode": 2, "policy": policy, "speedup": 2.0, "seed": seed},
        requests=tuple(rows),
        samples=samples,
        duration_s=seconds + 30.0,
        wall_s=1.25,
        digest=f"{seed:064x}",
        counters={"transfers": 17_310, "evictions": 120_456, "preemptions": 12},
        residuals={"prefill": (0.18, 0.21), "decode": (-0.04, 0.09), "transfer": (0.2, 0.25)},
    )


def _load(t: float, swing: float) -> float:
    return 0.8 + swing * math.sin(t / 20)


def _seeded_row(rng: random.Random, number: int, at_s: float, swing: float) -> RequestRow:
    tokens = min(120_000, int(rng.lognormvariate(8.8, 1.0)) + 1)
    prefill_s = tokens / 9000 + (tokens / 90_000) ** 2
    plain = {"arrived_s": at_s, "input_tokens": tokens, "priority": 0, "slo_ttft_s": 30.0, "slo_tbt_s": 0.1}
    if rng.random() < _load(at_s, swing) - 0.7:
        stage = rng.choice(["arrival", "arrival", "decode", "prefill"])
        reason = {"arrival": "decode_load", "prefill": "ttft", "decode": rng.choice(["decode_room", "tbt"])}[stage]
        spent = prefill_s if stage == "decode" else 0.0
        return row(f"r{number}", outcome=Outcome.REJECTED, stage=stage, reason=reason, output_tokens=0,
                   prefill_s=spent, attempts=int(stage != "arrival"), **plain)  # fmt: skip
    ttft = prefill_s + rng.expovariate(0.5)
    tbt = 0.03 + 0.04 * max(0.0, _load(at_s, swing)) + rng.expovariate(120)
    return row(
        f"r{number}", output_tokens=rng.randrange(1, 900), ttft_s=ttft, ended_s=at_s + ttft + 20,
        tbt_p50_s=tbt * 0.8, tbt_worst_s=tbt, tbt_max_s=tbt * 1.5, predicted_ttft_s=ttft * rng.gauss(1.1, 0.2),
        predicted_tbt_s=tbt * rng.gauss(0.9, 0.1), hit_tokens_device=int(tokens * rng.choice([0, 0, 0.4])),
        hit_tokens_dram=int(tokens * rng.choice([0, 0, 0.3])), hit_tokens_remote=int(tokens * rng.choice([0, 0, 0.2])),
        prefill_s=prefill_s, attempts=1, prefill_node=f"prefill-{number % 8}", decode_node=f"decode-{number % 2}",
        **plain,
    )  # fmt: skip
