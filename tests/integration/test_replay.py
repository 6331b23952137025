"""Parity, part one: what a real cluster's conductor was told, told to a fresh machine, gives bit-equal decisions."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest
import redis.asyncio
from click.testing import CliRunner

from cli.main import main
from cli.replay_commands import lines_of
from conductor.config import ConductorConfig, Fit
from conductor.replay import Replayed, replay
from conductor.settings import RecordsConfig
from core.cost import CostPrior
from halfmoon.client import AsyncClient
from halfmoon.errors import Rejected
from tests.clusters import at_rest, run, running, until
from tests.integration.test_local_cluster import prompt

pytestmark = pytest.mark.cluster

WAVES, PATIENT, IMPATIENT = 6, 5, 4
PROFILE = CostPrior(prefill=(0.03, 1e-6, 1e-12), decode=(0.03, 1e-6, 1e-12), transfer=(1e-3, 1e-9))
"""What a pass of the fake engine takes, believed whatever the host is busy with: a queue of one pass costs more than a
fetch, so prefixes are fetched, and nobody behind a queue has a first token within 20 ms."""


async def ask(client: AsyncClient, name: str, tokens: list[int], ttft_s: float = 20.0) -> None:
    with contextlib.suppress(Rejected):
        await client.complete(
            tokens, max_tokens=12, temperature=0.0, ignore_eos=True, request_id=name, slo_ttft_s=ttft_s
        )


async def wave(client: AsyncClient, number: int) -> None:
    """One worker computes a long prefix; then everybody wants it at once, the last ones sooner than can be."""
    shared = prompt(640, number)
    await ask(client, f"wave-{number}", shared)
    limits = [20.0] * PATIENT + [0.02] * IMPATIENT
    suffixes = (prompt(120, 100 + i) for i in range(len(limits)))
    await asyncio.gather(
        *(
            ask(client, f"wave-{number}-{i}", shared + suffix, ttft_s)
            for i, (suffix, ttft_s) in enumerate(zip(suffixes, limits, strict=True))
        )
    )


def test_a_recorded_run_of_a_real_cluster_is_decided_again_bit_by_bit(tmp_path: Path) -> None:
    recording, records = tmp_path / "run.jsonl", tmp_path / "records.jsonl"
    conductor = ConductorConfig(record=str(recording), slow_start_s=0.5, prior=PROFILE, fit=Fit.FROZEN)

    async def story() -> None:
        exports = RecordsConfig(file=str(records), stream="records")
        settings = {"conductor": conductor, "records": exports, "fake_pass_s": 0.03, "tokens_per_pass_max": 128}
        async with running(prefill=4, decode=2, **settings) as (cluster, client):
            for number in range(WAVES):
                await wave(client, number)
            await until(client, at_rest)
            told = await client.explain("wave-0")
            assert told["terms"]["ttft_s"]["actual_s"] > 0.0
            assert cluster.registry is not None
            async with redis.asyncio.Redis.from_url(cluster.registry.url, decode_responses=True) as valkey:
                entries = await valkey.xrange("halfmoon:default:stream:records")
            assert told in [json.loads(entry["record"]) for _, entry in entries]

    run(story())
    result = replay(lines_of(recording))
    print(f"{result.calls} calls, {result.effects} effects, {dict(result.outcomes)}, {dict(result.hit_tokens)}")
    assert result.difference is None
    assert result.ended == "the conductor stopped"
    check_it_was_worth_replaying(result)
    exported = [json.loads(line) for line in records.read_text().splitlines()]
    assert exported == list(result.records)
    shown = CliRunner().invoke(main, ["replay", str(recording)])
    assert shown.exit_code == 0
    assert f"digest {result.digest}" in shown.output


def check_it_was_worth_replaying(result: Replayed) -> None:
    """At least 10 % rejections, at least 30 % of the hits remote."""
    requests, hits = sum(result.outcomes.values()), result.hit_tokens
    assert requests > WAVES * (1 + PATIENT + IMPATIENT)  # a canary too
    assert result.outcomes["rejected"] >= 0.1 * requests, result.outcomes
    assert hits["remote"] >= 0.3 * sum(hits.values()), hits
