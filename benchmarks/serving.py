"""Shell: what disaggregation costs and what it buys, on one host, on the real model.

    python -m benchmarks.serving [--pairs 30] [--streams 8] [--seconds 60] [cost] [interference]

cost: TTFT of 1P1D against one coupled worker (one thread each), in interleaved pairs; and the gap between the first
and the second token. interference: token gaps of running streams while long prompts arrive at 70 % of what the prefill
worker can take: 1P1D (one thread and one core each) against one coupled worker with two threads on both cores, at each
chunk size; the best one counts. Arrivals are the same for all.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import click
import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.record import interval, quantile, save
from cluster.local import LocalCluster
from cluster.plan import ClusterConfig
from halfmoon.client import AsyncClient

CHUNKS = (64, 128, 256, 512)
LONG_PROMPT = 2000
STREAM_PROMPT = 64
SIZES = (128, 512, LONG_PROMPT)
LOAD = 0.7
console = Console()


@asynccontextmanager
async def cluster(**settings: Any) -> AsyncIterator[AsyncClient]:
    with tempfile.TemporaryDirectory(prefix="hm-") as directory:
        config = ClusterConfig(port=0, admin_port=0, directory=directory, **settings)
        async with (
            LocalCluster(config, lambda progress: None) as running,
            AsyncClient(running.addresses["inference"]) as client,
        ):
            yield client


def prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Random ids: nothing is found in any cache."""
    return [rng.randrange(1000, 40000) for _ in range(num_tokens)]


async def first_two(client: AsyncClient, tokens: list[int]) -> tuple[float, float]:
    """TTFT and the first gap, seconds, of one request alone."""
    result = await client.complete(tokens, max_tokens=8, temperature=0.0, ignore_eos=True)
    return result.timings.ttft_s, result.timings.tbt_s[0]


async def measure_cost(pairs: int) -> dict[str, Any]:
    rng = random.Random(1)
    rows: dict[str, Any] = {}
    async with cluster(prefill=1, decode=1) as split, cluster(prefill=0, decode=0, coupled=1) as coupled:
        for size in SIZES:
            samples: dict[str, list[tuple[float, float]]] = {"1P1D": [], "coupled": []}
            for number in range(pairs + 2):
                turn = [("1P1D", split), ("coupled", coupled)]
                for name, client in turn if number % 2 else reversed(turn):
                    measured = await first_two(client, prompt(rng, size))
                    if number >= 2:  # two pairs warm up
                        samples[name].append(measured)
            rows[str(size)] = samples
    return rows


def show_cost(rows: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="The cost of disaggregation: one request alone, one thread a worker")
    for name in (
        "prompt",
        "TTFT 1P1D ms",
        "TTFT coupled ms",
        "difference ms [95 %]",
        "goal ms",
        "gap 1→2 1P1D",
        "coupled",
    ):
        table.add_column(name, justify="right")
    for size, samples in rows.items():
        split, coupled = ([t for t, _ in samples[name]] for name in ("1P1D", "coupled"))
        differences = [a - b for a, b in zip(split, coupled, strict=True)]
        low, high = interval(differences)
        base, middle = statistics.median(coupled), statistics.median(differences)
        gaps = [statistics.median(g for _, g in samples[name]) for name in ("1P1D", "coupled")]
        table.add_row(
            size, ms(statistics.median(split)), ms(base), f"{ms(middle)} [{ms(low)}, {ms(high)}]",
            f"≤ {ms(0.05 * base + 0.003)}", *(ms(g) for g in gaps),
        )  # fmt: skip
    console.print(table)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


async def stream(client: AsyncClient, tokens: list[int], until_s: float, gaps: list[float]) -> None:
    """One stream that is always running: a new request as soon as the old one ends. Gaps after the first token."""
    while time.monotonic() < until_s:
        last_s: float | None = None
        async with client.generate(tokens, max_tokens=512, temperature=0.0, ignore_eos=True) as generation:
            async for _ in generation:
                now_s = time.monotonic()
                if last_s is not None:
                    gaps.append(now_s - last_s)
                last_s = now_s
                if now_s >= until_s:
                    break


async def long_prompts(client: AsyncClient, arrivals_s: list[float], rng: random.Random, ttfts: list[float]) -> None:
    """Open loop: each prompt is sent at its own time, whether or not the earlier ones are done."""
    start_s = time.monotonic()

    async def one(at_s: float, tokens: list[int]) -> None:
        await asyncio.sleep(max(0.0, start_s + at_s - time.monotonic()))
        await client.complete(tokens, max_tokens=1, temperature=0.0)
        ttfts.append(time.monotonic() - start_s - at_s)

    async with asyncio.TaskGroup() as group:
        for at_s in arrivals_s:
            group.create_task(one(at_s, prompt(rng, LONG_PROMPT)))


async def interference(
    settings: dict[str, Any], arrivals_s: list[float], streams: int, seconds: float
) -> dict[str, Any]:
    gaps: list[float] = []
    ttfts: list[float] = []
    rng = random.Random(5)
    async with cluster(**settings) as client:
        until_s = time.monotonic() + seconds + 5
        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(stream(client, prompt(rng, STREAM_PROMPT), until_s, gaps))
            await asyncio.sleep(5)  # the streams are running before the first long prompt comes
            gaps.clear()
            group.create_task(long_prompts(client, arrivals_s, rng, ttfts))
    return {"settings": settings, "gaps_s": [round(g, 5) for g in gaps], "ttfts_s": [round(t, 4) for t in ttfts]}


async def capacity() -> float:
    """Long prompts a second that one prefill worker takes, one after the other."""
    rng = random.Random(3)
    async with cluster(prefill=1, decode=1) as client:
        times = []
        for _ in range(4):
            start_s = time.monotonic()
            await client.complete(prompt(rng, LONG_PROMPT), max_tokens=1, temperature=0.0)
            times.append(time.monotonic() - start_s)
    return 1 / statistics.median(times[1:])


async def measure_interference(streams: int, seconds: float) -> dict[str, Any]:
    rate = LOAD * await capacity()
    rng = random.Random(9)
    arrivals_s = [rng.expovariate(rate)]
    while arrivals_s[-1] < seconds:
        arrivals_s.append(arrivals_s[-1] + rng.expovariate(rate))
    arrivals_s.pop()
    runs = {"1P1D": await interference({"prefill": 1, "decode": 1, "threads": 1}, arrivals_s, streams, seconds)}
    for chunk in CHUNKS:
        coupled = {"prefill": 0, "decode": 0, "coupled": 1, "threads": 2, "tokens_per_pass_max": chunk}
        runs[f"coupled, 2 threads, chunk {chunk}"] = await interference(coupled, arrivals_s, streams, seconds)
    return {"rate_per_s": rate, "arrivals_s": arrivals_s, "runs": runs}


def show_interference(data: dict[str, Any]) -> None:
    title = f"Token gaps of running streams while {len(data['arrivals_s'])} prompts of {LONG_PROMPT} tokens arrive"
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for name in ("cluster", "tokens", "TBT p50 ms", "p90", "p99", "max", "long prompt TTFT p50 s"):
        table.add_column(name, justify="right")
    for name, run in data["runs"].items():
        gaps, ttfts = run["gaps_s"], run["ttfts_s"]
        shares = [ms(quantile(gaps, s)) for s in (0.5, 0.9, 0.99)]
        table.add_row(name, str(len(gaps)), *shares, ms(max(gaps)), f"{quantile(ttfts, 0.5):.2f}" if ttfts else "-")
    console.print(table)
    p99 = {name: quantile(run["gaps_s"], 0.99) for name, run in data["runs"].items()}
    best = min((v, k) for k, v in p99.items() if k != "1P1D")
    console.print(f"p99 of 1P1D / best coupled ({best[1]}): {p99['1P1D'] / best[0]:.2f} (goal: at most 0.5)")


@click.command()
@click.argument("parts", nargs=-1)
@click.option("--pairs", default=30, show_default=True)
@click.option("--streams", default=8, show_default=True)
@click.option("--seconds", default=60.0, show_default=True)
def main(parts: tuple[str, ...], pairs: int, streams: int, seconds: float) -> None:
    if not parts or "cost" in parts:
        rows = uvloop.run(measure_cost(pairs))
        show_cost(rows)
        console.print(f"raw: {save('serving-cost', {'pairs': pairs, 'seconds': rows})}")
    if not parts or "interference" in parts:
        data = uvloop.run(measure_interference(streams, seconds))
        show_interference(data)
        console.print(f"raw: {save('serving-interference', data)}")


if __name__ == "__main__":
    main()
