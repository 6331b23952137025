"""The conductor as a process: registry, lease, readiness lines, drain; its workers are scripted ones."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml

from engine.load import describe_model
from halfmoon.client import AsyncClient
from halfmoon.errors import Unavailable
from halfmoon.types import Role
from service.registry import Registry
from service.valkey import EmbeddedValkey
from tests.scripted_workers import ScriptedWorker, started

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]


class ConductorChild:
    """A conductor process and what it says on standard output."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self.child = child

    async def said(self, word: str) -> dict[str, str]:
        """Wait for the line that begins with `word`; its key=value parts."""
        assert self.child.stdout is not None
        async for line in self.child.stdout:
            first, *parts = line.decode().split()
            if first == word:
                return dict(part.split("=", 1) for part in parts)
        raise AssertionError(f"it ended without saying {word}: exit {await self.child.wait()}")

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.child.send_signal(number)
        return await self.child.wait()


@asynccontextmanager
async def registry(directory: Path, *workers: ScriptedWorker) -> AsyncIterator[str]:
    """A private Valkey in which `workers` are announced; its URL."""
    valkey = EmbeddedValkey(directory)
    url = await valkey.start()
    client = Registry(url)
    fingerprint = describe_model("fake", block_size=4).fingerprint
    for worker in workers:
        worker.fingerprint = fingerprint
    async with started(*workers):
        tasks = [asyncio.create_task(client.announce(worker.info)) for worker in workers]
        try:
            yield url
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await client.close()
            await valkey.stop()


@asynccontextmanager
async def conductor(directory: Path, url: str, name: str = "c1", **server: object) -> AsyncIterator[ConductorChild]:
    settings = {
        "model": "fake",
        "block_size": 4,
        "address": "127.0.0.1:0",
        "admin_address": "127.0.0.1:0",
        "registry": url,
        "conductor_id": name,
        "canary_interval_s": 0.05,
        **server,
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"server": settings, "conductor": {"slow_start_s": 0.001}}))
    with (directory / f"{name}.log").open("wb") as log:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "conductor.server", "--config", str(path),
            cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=log,
        )  # fmt: skip
    try:
        yield ConductorChild(child)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def run(story: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60.0):
            await story

    asyncio.run(bounded())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pair(step_s: float = 0.01) -> tuple[ScriptedWorker, ScriptedWorker]:
    return ScriptedWorker("p", Role.PREFILL, step_s=step_s), ScriptedWorker("d", Role.DECODE, step_s=step_s)


def test_it_becomes_ready_serves_and_drains(tmp_path: Path) -> None:
    async def story() -> None:
        workers = pair()
        metrics_address = f"127.0.0.1:{free_port()}"
        async with (
            registry(tmp_path, *workers) as url,
            conductor(tmp_path, url, metrics_address=metrics_address) as process,
        ):
            addresses = await process.said("ready")
            async with AsyncClient(addresses["inference"], admin_address=addresses["admin"]) as client:
                page = await asyncio.to_thread(lambda: urlopen(f"http://{metrics_address}/metrics").read().decode())
                assert 'halfmoon_requests_total{outcome="finished"} 1.0' in page  # the canary
                assert 'halfmoon_conductor_events_total{event="nodes_joined"} 2.0' in page
                assert 'halfmoon_conductor_events_total{event="streams_finished"} 1.0' in page
                view = await client.cluster()
                assert (view.ready, view.registry_reachable, view.term) == (True, True, 1)
                assert view.conductor_id == "c1"
                assert (await client.model()).name == "fake"
                assert len((await client.complete("moon", max_tokens=6)).token_ids) == 6
                long = client.generate("moon", max_tokens=100)
                await anext(long)
                ended = asyncio.create_task(process.end())
                await asyncio.sleep(0.2)
                with pytest.raises(Unavailable, match="shutting down"):
                    await client.complete("moon")
                assert len((await long.complete()).token_ids) == 100
                assert await ended == 0
            assert {term for worker in workers for term in worker.terms} == {1}

    run(story())


def test_what_does_not_end_in_time_is_ended(tmp_path: Path) -> None:
    async def story() -> None:
        async with registry(tmp_path, *pair()) as url, conductor(tmp_path, url, drain_s=0.3) as process:
            addresses = await process.said("ready")
            async with AsyncClient(addresses["inference"]) as client:
                stream = client.generate("moon", max_tokens=1000)
                await anext(stream)
                ended = asyncio.create_task(process.end())
                with pytest.raises(Unavailable, match=r"was not complete in 0\.3 s"):
                    await stream.complete()
                assert await ended == 0

    run(story())


def test_a_standby_takes_over_with_a_higher_term(tmp_path: Path) -> None:
    async def story() -> None:
        workers = pair()
        async with registry(tmp_path, *workers) as url, conductor(tmp_path, url, "c1") as first:
            await first.said("ready")
            async with conductor(tmp_path, url, "c2") as second:
                await second.said("standby")
                assert await first.end(signal.SIGKILL) == -signal.SIGKILL
                addresses = await second.said("ready")
                async with AsyncClient(addresses["inference"], admin_address=addresses["admin"]) as client:
                    assert (await client.cluster()).term == 2
                    assert len((await client.complete("moon", max_tokens=6)).token_ids) == 6
                assert workers[0].terms == [1, 2]

    run(story())


def test_a_wrong_setting_is_named_and_nothing_starts(tmp_path: Path) -> None:
    async def story() -> None:
        async with conductor(tmp_path, "redis://127.0.0.1:1/0", adress="x") as process:
            assert await process.child.wait() == 2
        assert "did you mean 'address'?" in (tmp_path / "c1.log").read_text()

    run(story())
