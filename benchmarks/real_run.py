"""Shell: plays a trace on a real cluster through the SDK, open loop: rows as the simulator makes of the same trace.

Each request is sent at its own time, whether or not the earlier ones are done. A prompt's tokens follow from its block
ids, so that prompts share prefixes as far as the trace says; an output is as long as the trace says, and asked for so.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

from conductor.config import ConductorConfig
from conductor.desk import Layout
from conductor.machine import ConductorMachine
from halfmoon._request import Options
from halfmoon.blocks import Fingerprint
from halfmoon.client import AsyncClient, AsyncGeneration
from halfmoon.errors import Rejected
from halfmoon.types import Outcome
from report.gaps import tbt_of
from report.records import RequestRow, Run
from simulator.config import SimConfig
from simulator.simulation import MakeConductor
from workload.trace import Trace, TraceRequest


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every request asks for. vocabulary: prompts are made of token ids in [first, second)."""

    vocabulary: tuple[int, int]
    slo_ttft_s: float | None = None
    slo_tbt_s: float | None = None

    def options(self, request: TraceRequest, name: str) -> Options:
        options: Options = {
            "request_id": name, "max_tokens": request.output_tokens, "temperature": 0.0, "ignore_eos": True,
            "priority": request.priority,
        }  # fmt: skip
        if self.slo_ttft_s is not None:
            options["slo_ttft_s"] = self.slo_ttft_s
        if self.slo_tbt_s is not None:
            options["slo_tbt_s"] = self.slo_tbt_s
        return options


def prompt_of(request: TraceRequest, block_tokens: int, vocabulary: tuple[int, int]) -> list[int]:
    """The prompt's token ids: each block's are drawn by its name, so equal names give equal tokens."""
    tokens: list[int] = []
    for name in request.block_ids:
        count = min(block_tokens, request.input_tokens - len(tokens))
        tokens += random.Random(f"block {name}").choices(range(*vocabulary), k=count)
    return tokens


async def play(client: AsyncClient, trace: Trace, asked: Asked, title: str) -> Run:
    """Every request of the trace, each at its time; all have ended when this returns.

    TTFT is its front end's, as in a simulation; gaps between tokens are as they came here.

    Raises:
        HalfmoonError: a request ended in anything but its last token or a rejection.
    """
    prompts = [prompt_of(request, trace.block_tokens, asked.vocabulary) for request in trace.requests]
    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_one(client, f"r{i}", request, tokens, asked, start_s))
            for i, (request, tokens) in enumerate(zip(trace.requests, prompts, strict=True))
        ]
    rows = tuple(task.result() for task in tasks)
    duration_s = max(row.ended_s or 0.0 for row in rows) - min(row.arrived_s for row in rows)
    settings = {"trace": trace.source, "requests": len(rows)}
    return Run(title=title, settings=settings, requests=rows, samples=(), duration_s=duration_s, wall_s=duration_s)


async def _one(
    client: AsyncClient, name: str, request: TraceRequest, tokens: list[int], asked: Asked, start_s: float
) -> RequestRow:
    await asyncio.sleep(max(0.0, start_s + request.at_s - time.perf_counter()))
    sent_s = time.perf_counter()
    stream = client.generate(tokens, **asked.options(request, name))
    came_s: list[float] = []
    outcome, reason = Outcome.FINISHED, ""
    try:
        async for _ in stream:
            came_s.append(time.perf_counter())
    except Rejected as refusal:
        outcome, reason = Outcome.REJECTED, refusal.reason
    tbt = tbt_of(came_s)
    row = RequestRow(
        request_id=name,
        arrived_s=sent_s - start_s,
        input_tokens=request.input_tokens,
        output_tokens=len(came_s),
        outcome=outcome,
        priority=request.priority,
        reason=reason,
        tbt_p50_s=tbt.p50_s if tbt else None,
        tbt_worst_s=tbt.worst_s if tbt else None,
        tbt_max_s=tbt.max_s if tbt else None,
        ended_s=time.perf_counter() - start_s,
        slo_ttft_s=asked.slo_ttft_s,
        slo_tbt_s=asked.slo_tbt_s,
    )
    return replace(row, **_server_side(stream)) if outcome is Outcome.FINISHED else row


def _server_side(stream: AsyncGeneration) -> dict[str, Any]:
    usage, server = stream.result.usage, stream.result.timings.server
    return {
        "ttft_s": server.ttft_s,
        "predicted_ttft_s": server.predicted_ttft_s,
        "hit_tokens_device": usage.prefix_hit_tokens_device,
        "hit_tokens_dram": usage.prefix_hit_tokens_dram,
        "hit_tokens_remote": usage.prefix_hit_tokens_remote,
        "prefill_s": server.prefill_s,
        "attempts": usage.attempts,
        "preemptions": usage.preemptions,
        "prefill_node": usage.prefill_node,
        "decode_node": usage.decode_node,
    }


def same_conductor(settings: ConductorConfig) -> MakeConductor:
    """For `simulate`: a conductor with the settings of a real one, in the place of those that a preset implies."""

    def make(
        config: SimConfig, fingerprint: Fingerprint, _factors: dict[str, float], _rng: random.Random
    ) -> ConductorMachine:
        hardware = config.hardware
        layout = Layout(block_size=hardware.block_tokens, block_bytes=hardware.block_bytes)
        return ConductorMachine(config=settings, layout=layout, conductor_id="simulated", fingerprint=fingerprint)

    return make


async def message_s(client: AsyncClient, vocabulary: tuple[int, int], probes: int = 9) -> float:
    """Seconds of one message between two processes: half of what the first token of a lone prompt takes beyond its
    pass, the median of several prompts. In it are the loops at both ends, which a simulation does not have."""
    beyond_s = []
    for i in range(probes):
        tokens = random.Random(f"probe {i}").choices(range(*vocabulary), k=24)
        server = (await client.complete(tokens, max_tokens=2, temperature=0.0, ignore_eos=True)).timings.server
        beyond_s.append(server.ttft_s - server.prefill_s)
    return statistics.median(beyond_s) / 2
