"""Shell: a worker process from its settings to its end: load, warm up, serve, announce, drain.

Says on stdout, a line each, how far it is: "loading ...", "warming ...", "ready ADDRESS".
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from core.messages import NodeInfo
from engine.protocol import Engine, ModelInfo
from halfmoon.blocks import root_hash
from halfmoon.errors import Unavailable
from halfmoon.types import BlockHash, Epoch, NodeId, Role, Tier
from halfmoon.v1 import worker_pb2, worker_pb2_grpc
from kv_store.tiers import KvCache
from node.config import NodeConfig
from node.control import WorkerServicer
from node.effects import WorkerMachine
from node.loop import Inbox, LoopConfig, NodeLoop
from node.metrics import instrument
from node.pools import Pools, make_pools
from node.streams import Streams
from node.warm import load_engine, warm_up
from service.channel import bind, make_server
from service.metrics import Metrics
from service.registry import Registry
from service.run import Stop

if TYPE_CHECKING:
    from kv_store.store import BlockStore

log = logging.getLogger("node.process")

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
STOP_GRACE_S = 1.0  # for streams to deliver what is written already
HANG_UP_S = 0.2  # then for peers' calls to end; those of workers that stop at the same time do not
CONDUCTOR_GONE_S = 2.0  # while draining: without a conductor for this long, nobody waits for the rest

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a role's machine is made of.

    Args:
        section: the settings of the role itself, to be loaded into its own config class.
    """

    node_id: NodeId
    cache: KvCache
    root: BlockHash
    block_size: int
    node: NodeConfig
    section: Mapping[str, Any]


MachineFactory = Callable[[Parts], WorkerMachine]


def progress(state: str, detail: str = "") -> None:
    """Tell the supervisor, and the log."""
    print(f"{state} {detail}".rstrip(), flush=True)
    log.info("%s %s", state, detail)


class WorkerProcess:
    """One worker. `main` is its life; it holds everything it opened in one exit stack."""

    def __init__(
        self, role: Role, config: NodeConfig, section: Mapping[str, Any], make_machine: MachineFactory
    ) -> None:
        self.role = role
        self.config = config
        self.epoch = Epoch(f"{int(time.time())}-{secrets.token_hex(4)}")
        self._section = section
        self._make_machine = make_machine
        self._streams = Streams()

    async def main(self, stop: Stop) -> None:
        """Start, serve until `stop`, drain.

        Raises:
            CheckpointError, ConfigError, Conflict: what the operator has to mend; nothing is left behind.
        """
        async with AsyncExitStack() as stack:
            server = make_server()
            address = bind(server, self.config.listen)
            engine = await self._load(stop)
            if engine is None:
                return
            pools = make_pools(self.config, engine.model.layout)
            progress("warming", f"{pools.num_slots(Tier.DEVICE)} device blocks, {pools.num_slots(Tier.DRAM)} in DRAM")
            if await _unless(stop, asyncio.to_thread(warm_up, engine, pools, self.config)) is None:
                return
            stack.callback(pools.close)
            stack.callback(engine.close)
            await self._serve(stop, stack, server, address, engine, pools)

    # ---- starting ----

    async def _load(self, stop: Stop) -> Engine | None:
        progress("loading", self.config.model)
        started_s = time.monotonic()
        engine = await _unless(stop, asyncio.to_thread(load_engine, self.config))
        log.info("loaded in %.2f s", time.monotonic() - started_s)
        return engine

    # ---- serving ----

    async def _serve(
        self, stop: Stop, stack: AsyncExitStack, server: Any, address: str, engine: Engine, pools: Pools
    ) -> None:
        info = self._info(engine.model, pools, self.config.advertise or address)
        machine = self._make_machine(self._parts(info, pools))
        inbox = Inbox(machine)
        store = self._make_store(info, pools, inbox)
        await store.start()
        stack.push_async_callback(store.close)
        loop = NodeLoop(
            info=info,
            machine=machine,
            inbox=inbox,
            cache=pools.cache,
            engine=engine,
            store=store,
            streams=self._streams,
            config=LoopConfig(report_interval_s=self.config.report_interval_s),
        )
        checks = self._add_services(server, loop, store)
        work = stop.spawn_essential(loop.run(), name="loop")
        stack.push_async_callback(loop.close, work)
        stop.add_dump("node", loop.describe)
        self._expose(stack, loop)
        await server.start()
        stack.push_async_callback(server.stop, HANG_UP_S)
        heartbeat = self._announce(stop, stack, info)
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        await checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        progress("ready", info.address)
        await stop.wait()
        await checks.enter_graceful_shutdown()
        await _ended(heartbeat)
        await self._drain(loop)

    def _parts(self, info: NodeInfo, pools: Pools) -> Parts:
        return Parts(
            node_id=self.config.node_id,
            cache=pools.cache,
            root=root_hash(info.fingerprint),
            block_size=self.config.block_size,
            node=self.config,
            section=self._section,
        )

    def _info(self, model: ModelInfo, pools: Pools, address: str) -> NodeInfo:
        return NodeInfo(
            node_id=self.config.node_id,
            epoch=self.epoch,
            role=self.role,
            address=address,
            fingerprint=model.fingerprint,
            num_device_blocks=pools.num_slots(Tier.DEVICE),
            num_dram_blocks=pools.num_slots(Tier.DRAM),
            block_bytes=model.layout.block_bytes,
            tokens_per_pass_max=self.config.tokens_per_pass_max,
            sequences_max=self.config.sequences_max,
            pid=os.getpid(),
        )

    def _make_store(self, info: NodeInfo, pools: Pools, inbox: Inbox) -> BlockStore:
        from kv_store.store import BlockStore

        return BlockStore(
            node_id=info.node_id,
            epoch=info.epoch,
            cache=pools.cache,
            arenas=pools.arenas,
            link=self.config.link,
            fingerprint=info.fingerprint,
            on_arrived=inbox.on_arrived,
            on_ended=inbox.on_ended,
            on_handed_over=inbox.on_handed_over,
            on_withdrawn=inbox.on_withdrawn,
            clock=time.monotonic,
            host=_host(info.address),
        )

    def _add_services(self, server: Any, loop: NodeLoop, store: BlockStore) -> Any:
        """Worker, the block store's, health and reflection; returns the health servicer, not serving yet."""
        worker_pb2_grpc.add_WorkerServicer_to_server(WorkerServicer(loop, self._streams), server)
        store.add_to_server(server)
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return checks

    def _expose(self, stack: AsyncExitStack, loop: NodeLoop) -> None:
        if self.config.metrics:
            metrics = Metrics()
            instrument(loop, metrics)
            bound, close = metrics.serve(self.config.metrics)
            stack.callback(close)
            log.info("metrics at http://%s/metrics", bound)

    def _announce(self, stop: Stop, stack: AsyncExitStack, info: NodeInfo) -> asyncio.Task[None] | None:
        if not self.config.registry:
            return None
        registry = Registry(self.config.registry, cluster=self.config.cluster)
        stack.push_async_callback(registry.close)
        work = registry.announce(info, self.config.registry_ttl_s, on_first=lambda: log.info("announced"))
        return stop.spawn_essential(work, name="announce")

    # ---- ending ----

    async def _drain(self, loop: NodeLoop) -> None:
        """Let running attempts end, for as long as somebody may want them, within the bound."""
        loop.drain()
        clock = asyncio.get_running_loop().time
        until_s = clock() + self.config.drain_s
        wanted_until_s = clock() + CONDUCTOR_GONE_S
        while loop.attempts and clock() < min(until_s, wanted_until_s):
            if self._streams.attached:
                wanted_until_s = clock() + CONDUCTOR_GONE_S
            await asyncio.sleep(0.05)
        if loop.attempts:
            log.warning("%d attempts are cut off after draining", len(loop.attempts))
        await self._streams.flush(STOP_GRACE_S)
        self._streams.close(Unavailable(f"node {self.config.node_id} has drained and stops"))


def _host(address: str) -> str:
    """Where this node's data connections listen: where its gRPC server does."""
    return "127.0.0.1" if address.startswith("unix:") else address.rpartition(":")[0].strip("[]")


async def _unless(stop: Stop, work: Awaitable[Value]) -> Value | None:
    """The result of `work`; None if the stop comes first (the thread behind `work` is left to the process's end)."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        return task.result()
    task.cancel()
    return None


async def _ended(task: asyncio.Task[None] | None) -> None:
    """Cancel and await: its `finally` takes this node out of the registry."""
    if task is not None:
        task.cancel()
        await asyncio.wait({task}, timeout=STOP_GRACE_S * 2)
