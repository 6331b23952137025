"""The lease on a real registry, and what a worker's higher term does to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest

from conductor.lease import LEASE_NAME, Lease
from halfmoon.errors import Conflict
from service.registry import Registry
from service.valkey import EmbeddedValkey

pytestmark = pytest.mark.cluster


@contextlib.asynccontextmanager
async def registry(directory: Path) -> AsyncIterator[Registry]:
    valkey = EmbeddedValkey(directory)
    client = Registry(await valkey.start())
    try:
        yield client
    finally:
        await client.close()
        await valkey.stop()


@contextlib.asynccontextmanager
async def kept(lease: Lease) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(lease.keep())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Conflict):
            await task


def run(story: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30.0):
            await story

    asyncio.run(bounded())


async def until_term(lease: Lease, term: int) -> None:
    while lease.term < term:  # noqa: ASYNC110  (bounded by `run`)
        await asyncio.sleep(0.02)


def test_one_leads_and_a_standby_follows_at_once_when_it_lets_go(tmp_path: Path) -> None:
    async def story() -> None:
        async with registry(tmp_path) as there:
            first, second = Lease(there, "a"), Lease(there, "b")
            await first.acquire()
            waiting = asyncio.create_task(second.acquire())
            async with kept(first):
                await asyncio.sleep(0.7)
                assert (first.term, second.term, waiting.done()) == (1, 0, False)
            await asyncio.wait_for(waiting, 1.0)
            assert second.term == 2

    run(story())


def test_a_higher_term_that_a_worker_has_seen_is_outbid(tmp_path: Path) -> None:
    async def story() -> None:
        async with registry(tmp_path) as there:
            lease = Lease(there, "a")
            await lease.acquire()
            async with kept(lease):
                lease.on_higher_term(41)
                await until_term(lease, 42)
                assert lease.term == 42
                lease.on_higher_term(7)  # old news
                lease.on_higher_term(0)  # a refusal that named no term
                await until_term(lease, 43)
                assert lease.term == 43

    run(story())


def test_who_has_lost_the_lease_to_another_says_so(tmp_path: Path) -> None:
    async def story() -> None:
        async with registry(tmp_path) as there:
            lease = Lease(there, "a")
            await lease.acquire()
            assert await there.release_lease(LEASE_NAME, "a", 1)
            assert await there.acquire_lease(LEASE_NAME, "b") == 2
            async with kept(lease) as task:
                with pytest.raises(Conflict, match="held by b"):
                    await asyncio.wait_for(task, 5.0)

    run(story())
