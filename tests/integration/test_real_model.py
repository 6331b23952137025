"""The real model on real processes: the demo as a new user runs it, chats found again across workers, kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.default_model import default_model_directory
from halfmoon.client import AsyncClient, Result
from tests.clusters import at_rest, run, running, until

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(600)]

MODEL = "smollm2-135m-instruct"
POOLS = {"device_mib": 600, "dram_mib": 300}
BLOCK = 16


@pytest.fixture(scope="module", autouse=True)
def converted() -> None:
    default_model_directory()


def processes_of(directory: Path) -> list[str]:
    """Command lines of living processes that mention the directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(directory) in line and str(os.getpid()) not in entry.parts:
            found.append(line)
    return found


def test_the_demo_does_what_it_says(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    command = [sys.executable, "-m", "cli.main", "demo", "--directory", str(directory), "--device-mib", "600"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(last) == {
        "requests", "completed", "prefix_hit_tokens", "kv_bytes_pulled", "decode_prefilled_tokens", "overlap", "link",
        "ttft_s_p50", "tbt_s_p50",
    }  # fmt: skip
    assert last["completed"] == last["requests"] >= 6
    assert last["decode_prefilled_tokens"] == 0
    assert last["prefix_hit_tokens"] > 1000
    assert last["overlap"] >= 0.7
    assert last["link"] == "shm"
    assert processes_of(directory) == []


async def turn(client: AsyncClient, session: object, text: str) -> Result:
    stream = session.send(text, max_tokens=48, temperature=0.0, ignore_eos=True)  # type: ignore[attr-defined]
    return await stream.complete()


def test_the_second_turn_finds_the_answer_of_the_first_through_the_other_prefill_worker() -> None:
    async def story() -> None:
        async with running(model=MODEL, prefill=2, decode=2, **POOLS) as (_, client):
            session = client.chat_session()
            first = await turn(client, session, "Name a harbour, and say in a few sentences what it is known for.")
            at_home = first.usage.prefill_node
            known = len(first.prompt_token_ids) + len(first.token_ids) - 1  # the last token's KV was never computed
            await client.drain(at_home)  # so that the other prefill worker, which has none of it, gets the second turn
            await until(client, lambda v: any(n.draining for n in v.nodes if n.node_id == at_home))
            second = await turn(client, session, "Why?")
            assert second.prompt_token_ids[:known] == (*first.prompt_token_ids, *first.token_ids)[:known]
            assert second.usage.prefill_node != at_home
            assert second.usage.prefix_hit_tokens_remote >= known // BLOCK * BLOCK
            await until(client, at_rest)

    run(story(), timeout_s=400)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "seed": 11}])
def test_a_decode_worker_killed_in_mid_stream_changes_no_token(options: dict[str, Any]) -> None:
    async def story() -> None:
        prompt = "The keeper of the lighthouse climbed the stairs and"
        async with running(model=MODEL, decode=2, **POOLS) as (_, client):
            truth = await client.complete(prompt, max_tokens=80, ignore_eos=True, **options)
            stream = client.generate(prompt, max_tokens=80, ignore_eos=True, **options)
            async for event in stream:
                if event.index == 20:
                    await kill_the_busy_decode_worker(client)
            assert stream.result.token_ids == truth.token_ids
            assert stream.result.text == truth.text
            assert stream.result.usage.attempts == 2
            await until(client, lambda v: at_rest(v) and len(v.nodes) == 3 and v.ready, timeout_s=60)

    run(story(), timeout_s=300)


async def kill_the_busy_decode_worker(client: AsyncClient) -> None:
    view = await until(client, lambda v: any(n.running_sequences for n in v.nodes if n.role == "decode"))
    os.kill(next(n.pid for n in view.nodes if n.role == "decode" and n.running_sequences), signal.SIGKILL)
