"""The registry on a real embedded Valkey: membership, leases, and what happens while it is away."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from core.messages import NodeInfo
from halfmoon.blocks import Fingerprint
from halfmoon.errors import ConfigError, Conflict, Unavailable
from halfmoon.types import Epoch, NodeId, Role
from service.registry import Joined, Left, Registry
from service.valkey import EmbeddedValkey


def node(name: str, epoch: str = "e1") -> NodeInfo:
    fingerprint = Fingerprint(weights="w", num_layers=1, num_kv_heads=1, head_dim=8, rope="none")
    return NodeInfo(
        node_id=NodeId(name),
        epoch=Epoch(epoch),
        role=Role.PREFILL,
        address="127.0.0.1:1",
        fingerprint=fingerprint,
        num_device_blocks=8,
        num_dram_blocks=0,
        block_bytes=4096,
        tokens_per_pass_max=512,
        sequences_max=8,
    )


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[tuple[EmbeddedValkey, Registry]]:
    with tempfile.TemporaryDirectory() as directory:
        valkey = EmbeddedValkey(Path(directory))
        registry = Registry(await valkey.start())
        try:
            yield valkey, registry
        finally:
            await registry.close()
            await valkey.stop()


def story(test: Callable[[EmbeddedValkey, Registry], Awaitable[None]]) -> Callable[[], None]:
    """Run an async test in a fresh world, within 20 s."""

    async def run() -> None:
        async with asyncio.timeout(20), world() as (valkey, registry):
            await test(valkey, registry)

    def sync() -> None:
        asyncio.run(run())

    sync.__name__ = test.__name__
    return sync


@story
async def test_a_node_is_listed_until_its_entry_ends_or_it_withdraws(
    server: EmbeddedValkey, registry: Registry
) -> None:
    await registry.put(node("p0"), ttl_s=10)
    await registry.put(node("d0"), ttl_s=0.1)
    assert set(await registry.nodes()) == {"p0", "d0"}
    assert (await registry.nodes())[NodeId("p0")] == node("p0")
    await asyncio.sleep(0.15)
    assert set(await registry.nodes()) == {"p0"}
    await registry.withdraw(NodeId("p0"), Epoch("another"))
    assert set(await registry.nodes()) == {"p0"}, "a later epoch's entry is not ours to remove"
    await registry.withdraw(NodeId("p0"), Epoch("e1"))
    assert await registry.nodes() == {}


@story
async def test_a_restarted_node_takes_its_id_and_the_old_process_learns_it(
    server: EmbeddedValkey, reg: Registry
) -> None:
    old = asyncio.create_task(reg.announce(node("p0", "old"), ttl_s=0.3))
    await asyncio.sleep(0.05)
    await reg.put(node("p0", "new"), ttl_s=10)
    with pytest.raises(Conflict, match="p0 has been taken over"):
        await asyncio.wait_for(old, 2)
    assert (await reg.nodes())[NodeId("p0")].epoch == "new", "its withdrawal did not remove the new entry"


@story
async def test_watch_tells_joins_restarts_and_leaves(server: EmbeddedValkey, registry: Registry) -> None:
    watch = registry.watch(interval_s=0.02, grace_s=0.2)
    await registry.put(node("p0"), ttl_s=10)
    assert await anext(watch) == Joined(info=node("p0"))
    await registry.put(node("p0", "e2"), ttl_s=10)
    assert await anext(watch) == Joined(info=node("p0", "e2"))
    await registry.withdraw(NodeId("p0"), Epoch("e2"))
    assert await anext(watch) == Left(node_id=NodeId("p0"), epoch=Epoch("e2"))


@story
async def test_an_outage_ends_nothing_and_heals(valkey: EmbeddedValkey, registry: Registry) -> None:
    watcher = Registry(valkey.url)
    heartbeat = asyncio.create_task(registry.announce(node("p0"), ttl_s=0.3))
    watch = watcher.watch(interval_s=0.02, grace_s=1.0)
    assert await anext(watch) == Joined(info=node("p0"))

    await valkey.stop()
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0.5)
    assert not registry.reachable
    assert not watcher.reachable
    with pytest.raises(Unavailable, match=r"registry unix://"):
        await registry.nodes()

    await valkey.start()  # empty: it keeps nothing
    await asyncio.sleep(0.5)
    assert set(await watcher.nodes()) == {"p0"}, "the heartbeat entered it again"
    assert not waiting.done(), "nobody left, nobody joined"
    assert registry.reachable
    heartbeat.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await heartbeat
    assert await asyncio.wait_for(waiting, 3) == Left(node_id=NodeId("p0"), epoch=Epoch("e1"))
    await watcher.close()


@story
async def test_a_lease_has_one_holder_and_a_rising_term(server: EmbeddedValkey, registry: Registry) -> None:
    assert await registry.acquire_lease("conductor", "a", 10) == 1
    assert await registry.acquire_lease("conductor", "a", 10) == 1, "its holder keeps the term"
    with pytest.raises(Conflict, match="held by a"):
        await registry.acquire_lease("conductor", "b", 10)
    assert await registry.renew_lease("conductor", "a", 1, 10)
    assert not await registry.release_lease("conductor", "b", 1)
    assert await registry.release_lease("conductor", "a", 1)
    assert not await registry.renew_lease("conductor", "a", 1, 10)
    assert await registry.acquire_lease("conductor", "b", 0.05) == 2
    await asyncio.sleep(0.1)
    assert await registry.acquire_lease("conductor", "a", 10) == 3, "a lease that ran out is free"


@story
async def test_terms_rise_even_when_the_registry_has_lost_its_memory(valkey: EmbeddedValkey, reg: Registry) -> None:
    for turn in range(1, 4):
        assert await reg.acquire_lease("conductor", f"c{turn}", 10) == turn
        await reg.release_lease("conductor", f"c{turn}", turn)
    await valkey.stop()
    await valkey.start()
    assert await reg.acquire_lease("conductor", "c9", 10, term_min=3) == 4
    assert await reg.acquire_lease("conductor", "c9", 10, term_min=7) == 8, "seen in the meantime: ours must be higher"


@story
async def test_one_directory_has_one_server(valkey: EmbeddedValkey, registry: Registry) -> None:
    with pytest.raises(Conflict, match="answers on"):
        await EmbeddedValkey(valkey.directory).start()


def test_a_url_that_is_none_is_refused_with_its_key() -> None:
    with pytest.raises(ConfigError, match="config registry"):
        Registry("valkey.example:6379")


def test_a_socket_path_that_is_too_long_is_refused() -> None:
    async def start() -> None:
        await EmbeddedValkey(Path("/tmp") / ("x" * 120)).start()

    with pytest.raises(ConfigError, match="a shorter path"):
        asyncio.run(start())


@pytest.mark.cluster
def test_the_embedded_server_does_not_outlive_its_parent() -> None:
    code = """
import asyncio, os, signal, sys, tempfile
from service.valkey import EmbeddedValkey
async def main():
    valkey = EmbeddedValkey(tempfile.mkdtemp())
    await valkey.start()
    print(valkey.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20).stdout
    pid, deadline_s = int(out), time.monotonic() + 5
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline_s, "an orphaned server"
        time.sleep(0.02)
