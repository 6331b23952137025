"""Whole clusters of real processes on the fake engine, which detects every wrong or stale block by value."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import local
from cluster.local import LocalCluster
from cluster.plan import ClusterConfig, ProcessSpec, worker_specs
from engine.fake import fake_tokens
from halfmoon.client import AsyncClient, Result
from halfmoon.errors import CheckpointError, Conflict, Failed, HalfmoonError
from halfmoon.types import SamplingParams
from tests.clusters import at_rest, run, running, until

pytestmark = pytest.mark.cluster


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(7 * i + 13 * salt + i * i) % 251 for i in range(length)]


def expected(tokens: list[int], num_tokens: int) -> tuple[int, ...]:
    return tuple(fake_tokens(tokens, num_tokens, SamplingParams(max_tokens=num_tokens, ignore_eos=True)))


async def ask(client: AsyncClient, tokens: list[int], num_tokens: int = 24) -> Result:
    return await client.complete(tokens, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("link", ["shm", "torch"])
def test_one_prefill_one_decode(link: str) -> None:
    async def story() -> None:
        async with running(link=link) as (_, client):
            sizes = (1, 15, 16, 17, 100, 700)
            results = await asyncio.gather(*(ask(client, prompt(n, n)) for n in sizes))
            for size, result in zip(sizes, results, strict=True):
                assert result.token_ids == expected(prompt(size, size), 24)
                assert result.usage.decode_prefilled_tokens == 0
                assert result.usage.link == link
                assert (result.usage.prefill_node, result.usage.decode_node) == ("prefill-0", "decode-0")
                assert result.usage.attempts == 1
            again = await ask(client, prompt(700, 700))
            assert again.token_ids == results[-1].token_ids
            assert again.usage.prefix_hit_tokens >= 688
            view = await until(client, at_rest)
            assert all(node.invariant_checks > 0 for node in view.nodes)

    run(story())


def test_a_coupled_worker_needs_no_link() -> None:
    async def story() -> None:
        async with running(prefill=0, decode=0, coupled=1) as (_, client):
            results = await asyncio.gather(*(ask(client, prompt(n, n)) for n in (5, 64, 333)))
            for size, result in zip((5, 64, 333), results, strict=True):
                assert result.token_ids == expected(prompt(size, size), 24)
                assert result.usage.kv_bytes_pulled == 0
            await until(client, at_rest)

    run(story())


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_worker_killed_in_mid_stream_is_replaced_and_its_streams_complete(victim: str) -> None:
    async def story() -> None:
        async with running(fake_pass_s=0.005) as (cluster, client):
            prompts = [prompt(40 + n, n) for n in range(6)]
            tasks = [asyncio.create_task(ask(client, p, 400)) for p in prompts]
            await until(client, lambda view: sum(n.running_sequences for n in view.nodes) >= 3)
            process = next(w for w in cluster.workers if w.spec.name == victim)
            killed = process.pid
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            for tokens, task in zip(prompts, tasks, strict=True):
                assert (await task).token_ids == expected(tokens, 400)
            view = await until(client, lambda v: at_rest(v) and len(v.nodes) == 2 and v.ready)
            assert next(n.pid for n in view.nodes if n.node_id == victim) != killed

    run(story())


def test_a_stopped_worker_is_found_out() -> None:
    """SIGSTOP: alive to the kernel, silent to us. Its streams go on elsewhere within bounds."""

    async def story() -> None:
        async with running(decode=2, fake_pass_s=0.01) as (_, client):
            tokens = prompt(64)
            stream = client.generate(tokens, max_tokens=500, temperature=0.0, ignore_eos=True)
            async for event in stream:
                if event.index == 100:  # a second in: what ran before, the canary, is no longer reported
                    break
            view = await until(client, lambda v: any(n.running_sequences for n in v.nodes if n.role == "decode"))
            busy = next(n for n in view.nodes if n.role == "decode" and n.running_sequences)
            os.kill(busy.pid, signal.SIGSTOP)
            try:
                result = await stream.complete()
                assert result.token_ids == expected(tokens, 500)
                assert result.usage.attempts >= 2
            finally:
                os.kill(busy.pid, signal.SIGCONT)
            await until(client, at_rest)

    run(story())


def test_a_client_that_leaves_frees_everything() -> None:
    async def story() -> None:
        async with running() as (_, client):
            async with client.generate(prompt(300), max_tokens=1000, temperature=0.0, ignore_eos=True) as stream:
                async for event in stream:
                    if event.index == 5:
                        break
            await until(client, at_rest, timeout_s=5.0)

    run(story())


def test_a_second_cluster_on_the_same_directory_is_refused() -> None:
    async def story() -> None:
        async with running() as (cluster, _):
            second = LocalCluster(ClusterConfig(model="fake", directory=str(cluster.directory)), lambda progress: None)
            with pytest.raises(Conflict, match="another cluster runs in"):
                await second.__aenter__()

    run(story())


def test_a_port_in_use_is_named() -> None:
    async def story() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(HalfmoonError, match=str(port)):
                async with running(port=port):
                    raise AssertionError("it started on a taken port")

    run(story())


def test_a_link_that_carries_nothing_ends_the_start_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary's first token could be had from prefill alone; only its blocks prove the link."""

    def without_a_link(*arguments: Any) -> list[ProcessSpec]:
        specs = worker_specs(*arguments)
        for spec in specs:
            spec.settings["node"]["link"] = "nccl"
        return specs

    async def story() -> None:
        monkeypatch.setattr(local, "worker_specs", without_a_link)
        with pytest.raises(Failed, match=r"3 canary requests in a row failed: .*expected a link that serves cpu"):
            async with running(device_mib=4, dram_mib=-1):
                raise AssertionError("it started without a link")

    run(story())


def test_a_model_that_does_not_exist_is_named() -> None:
    async def story() -> None:
        with pytest.raises(CheckpointError, match="/no/such/model"):
            async with running(model="/no/such/model"):
                raise AssertionError("it started without a model")

    run(story())


def test_a_killed_registry_is_replaced_and_everything_killed_afterwards_returns() -> None:
    async def story() -> None:
        async with running() as (cluster, client):
            tokens, valkey = prompt(64), cluster.registry
            assert valkey is not None
            assert valkey.pid is not None
            lost = valkey.pid
            os.kill(lost, signal.SIGKILL)
            for victim in (cluster.workers[1], cluster.conductor):
                assert victim is not None
                killed = victim.pid
                assert killed is not None
                os.kill(killed, signal.SIGKILL)
                await until_served(client, tokens)
                assert victim.pid not in (None, killed)
            assert valkey.pid not in (None, lost)

    run(story())


async def until_served(client: AsyncClient, tokens: list[int], timeout_s: float = 30.0) -> None:
    """Ask again while the cluster heals: a client's own retries bridge a restart, not a conductor's absence."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                result = await ask(client, tokens)
            except HalfmoonError:
                await asyncio.sleep(0.2)
            else:
                assert result.token_ids == expected(tokens, 24)
                return


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_second_ctrl_c_ends_everything_now_and_nothing_is_started_again() -> None:
    async def story() -> None:
        async with running() as (cluster, _):
            pids = [p.pid for p in (cluster.registry, cluster.conductor, *cluster.workers) if p is not None]
            cluster.kill()
        assert len(pids) == 4
        assert not any(is_alive(pid) for pid in pids if pid is not None)
        assert cluster.failures == []

    run(story())


def test_ctrl_c_while_loading_says_so(tmp_path: Path) -> None:
    options = ["--model", "fake", "--port", "0", "--admin-port", "0", "--directory", str(tmp_path)]
    command = [sys.executable, "-m", "cli.main", "up", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        lines = [up.stdout.readline(), up.stdout.readline()]
        up.send_signal(signal.SIGINT)
        rest = up.stdout.read()
    assert lines[1] == "  prefill-0    starting\n"
    assert rest.endswith("Stopped before it was ready.\n")
    assert up.returncode == 130
