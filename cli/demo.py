"""Shell: the demo: real prompts through a real cluster, a table of what happened, and one JSON line."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Callable

from rich.console import Console

from cli.demo_prompts import QUESTIONS, log_book, long_prompt, shared_system
from cli.tables import requests_table
from cluster.local import LocalCluster
from cluster.plan import ClusterConfig
from cluster.process import Progress
from halfmoon.client import AsyncClient, AsyncGeneration, Result

ANSWER_TOKENS = 32
COLD_TOKENS = 2000
Named = tuple[str, Result]


async def run_demo(
    config: ClusterConfig,
    console: Console,
    show_progress: Callable[[Console], Callable[[Progress], None]],
    timeout_s: float,
) -> None:
    """Raises what the cluster or a request raises; prints the JSON line only when every request completed."""
    async with asyncio.timeout(timeout_s):
        console.print(
            f"Starting {config.model}: {config.prefill} prefill, {config.decode} decode, {config.coupled} coupled"
        )
        async with (
            LocalCluster(config, show_progress(console)) as cluster,
            AsyncClient(cluster.addresses["inference"], admin_address=cluster.addresses["admin"]) as client,
        ):
            cold, others = await _ask_everything(client, console)
        console.print(requests_table([*others, cold]))
        _explain(console)
        print(json.dumps(_summary([*others, cold], cold[1])), flush=True)


async def _ask_everything(client: AsyncClient, console: Console) -> tuple[Named, list[Named]]:
    """One request fills the cache; three run at once, two of them over its prefix; then a chat and the cold prompt."""
    system = {"role": "system", "content": shared_system()}
    first = await _show(client, console, "shared-1", [system, _user(QUESTIONS[0])])
    console.print("\n[dim]Three requests at once: they are printed as they end.[/dim]")
    together = await asyncio.gather(
        *(_gather(client, console, f"shared-{i}", [system, _user(q)]) for i, q in enumerate(QUESTIONS[1:], 2)),
        _gather(client, console, "short", [_user("What is a half moon?")]),
    )
    chat = await _two_turns(client, console)
    cold = await _cold(client, console)
    return cold, [first, *together, *chat]


async def _show(client: AsyncClient, console: Console, name: str, messages: list[dict[str, str]]) -> Named:
    stream = client.chat(messages, max_tokens=ANSWER_TOKENS, temperature=0.0)
    return name, await _stream(console, name, messages[-1]["content"], stream)


async def _gather(client: AsyncClient, console: Console, name: str, messages: list[dict[str, str]]) -> Named:
    result = await client.chat(messages, max_tokens=ANSWER_TOKENS, temperature=0.0).complete()
    _title(console, name, messages[-1]["content"])
    console.print(result.text, markup=False, style="cyan", soft_wrap=True)
    return name, result


async def _two_turns(client: AsyncClient, console: Console) -> list[Named]:
    session = client.chat_session()
    turns = []
    for name, text in (
        ("chat turn 1", "Name three things one finds in a harbour."),
        ("chat turn 2", "Tell me more about the first one."),
    ):
        stream = session.send(text, max_tokens=2 * ANSWER_TOKENS, temperature=0.0)
        turns.append((name, await _stream(console, name, text, stream)))
    return turns


async def _cold(client: AsyncClient, console: Console) -> Named:
    """A prompt of COLD_TOKENS tokens that shares nothing: how much of its KV travels while prefill still runs?"""
    tokens = long_prompt(await client.tokenize(log_book(11, COLD_TOKENS // 16)), COLD_TOKENS)
    stream = client.generate(tokens, max_tokens=ANSWER_TOKENS, temperature=0.0)
    return "cold 2000", await _stream(console, "cold 2000", f"(a log book of {COLD_TOKENS} tokens)", stream)


async def _stream(console: Console, name: str, question: str, stream: AsyncGeneration) -> Result:
    """Print the answer token by token, as it comes."""
    _title(console, name, question)
    printed = ""
    async for event in stream:
        printed += event.text
        console.print(event.text, end="", markup=False, style="cyan", soft_wrap=True)
    console.print(stream.result.text[len(printed) :], markup=False, style="cyan", soft_wrap=True)
    return stream.result


def _title(console: Console, name: str, question: str) -> None:
    console.print(f"\n[bold]{name}[/bold]: {question}", soft_wrap=True)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _explain(console: Console) -> None:
    console.print(
        "TTFT, TBT: as the client saw them. device, DRAM, remote: prompt tokens whose KV was found on the prefill\n"
        "worker or pulled from a peer. MiB: KV copied between workers for this request, over the link named.",
        style="dim",
    )


def _summary(rows: list[Named], cold: Result) -> dict[str, object]:
    results = [result for _, result in rows]
    gaps = [gap for result in results for gap in result.timings.tbt_s]
    return {
        "requests": len(rows),
        "completed": sum(result.finish_reason in ("stop", "length") for result in results),
        "prefix_hit_tokens": sum(result.usage.prefix_hit_tokens for result in results),
        "kv_bytes_pulled": sum(result.usage.kv_bytes_pulled for result in results),
        "decode_prefilled_tokens": sum(result.usage.decode_prefilled_tokens for result in results),
        "overlap": round(cold.usage.overlap, 3),
        "link": cold.usage.link,
        "ttft_s_p50": round(statistics.median(r.timings.ttft_s for r in results), 4),
        "tbt_s_p50": round(statistics.median(gaps), 4) if gaps else 0.0,
    }
