"""Real clusters for tests: every process is real; `fake` is the engine that detects wrong blocks by value."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from cluster.local import LocalCluster
from cluster.plan import ClusterConfig
from halfmoon.client import AsyncClient, Cluster


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[tuple[LocalCluster, AsyncClient]]:
    """A cluster on free ports in a directory of its own, stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="hm-") as directory:
        defaults: dict[str, Any] = {"port": 0, "admin_port": 0, "directory": directory, "model": "fake"}
        config = ClusterConfig(**(defaults | settings))
        async with (
            LocalCluster(config, lambda progress: None) as cluster,
            AsyncClient(cluster.addresses["inference"], admin_address=cluster.addresses["admin"]) as client,
        ):
            yield cluster, client


async def until(client: AsyncClient, holds: Callable[[Cluster], bool], timeout_s: float = 20.0) -> Cluster:
    """The first view of the cluster for which `holds`; AssertionError, with the last view, after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        view = await client.cluster()
        if holds(view):
            return view
        assert time.monotonic() < deadline_s, f"still not so after {timeout_s:g} s: {view}"
        await asyncio.sleep(0.1)


def at_rest(view: Cluster) -> bool:
    """Nothing runs and nothing is held: no pin, no quarantined slot, on any node."""
    return view.requests_open == 0 and all(
        node.held_blocks == 0 and node.quarantined_blocks == 0 and node.running_sequences == 0 for node in view.nodes
    )


def run(test: Awaitable[None], timeout_s: float = 120.0) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await test

    asyncio.run(bounded())
