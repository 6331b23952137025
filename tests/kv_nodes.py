"""Two nodes' block stores for tests: a shelf in place of a cache, bytes that follow from a block's name."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from halfmoon.blocks import Fingerprint
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, RequestId, Tier, TransferId
from kv_store.arena import Arena
from kv_store.arena_device import DeviceArena
from kv_store.arena_dram import DramArena
from kv_store.link_memory import MemoryNet
from kv_store.store import BlockStore
from kv_store.transfer_values import TransferLimits
from kv_store.values import Place, PullEnded, PullSpec, Want
from service.channel import bind, make_server

FINGERPRINT = Fingerprint(weights="test", num_layers=2, num_kv_heads=1, head_dim=8, rope="none")
BLOCK_BYTES = 368_640
TICK_S = 0.02
QUICK = TransferLimits(abort_timeout_s=0.5, link_timeout_s=1.0, silence_s_max=1.5, ping_interval_s=0.1, grace_s=0.2)

PROCESS_LIMITS = TransferLimits(
    batch_bytes_max=2 * BLOCK_BYTES,
    abort_timeout_s=0.5,
    link_timeout_s=1.0,
    silence_s_max=1.5,
    ping_interval_s=0.1,
    grace_s=0.2,
)
"""Small batches: a pull of 64 blocks is in its middle for a while."""


def name_of(number: int) -> BlockHash:
    return BlockHash(hashlib.blake2b(b"%d" % number, digest_size=16).digest())


def content_of(block_hash: bytes, num_bytes: int = BLOCK_BYTES) -> np.ndarray:
    seed = int.from_bytes(block_hash[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


class Shelf:
    """Ready copies by name, and who pins them: what a source asks of its cache."""

    def __init__(self) -> None:
        self.places: dict[BlockHash, Place] = {}
        self.pins: list[tuple[Place, str]] = []

    def pin_copy(self, block_hash: BlockHash, holder: str) -> Place | None:
        place = self.places.get(block_hash)
        if place is not None:
            assert (place, holder) not in self.pins
            self.pins.append((place, holder))
        return place

    def unpin_copy(self, place: Place, holder: str) -> None:
        self.pins.remove((place, holder))


@dataclass
class Node:
    """One store with its server; what its callbacks said."""

    node_id: NodeId
    store: BlockStore
    shelf: Shelf
    device: Any
    dram: DramArena
    address: str
    epoch: Epoch
    arrived: list[tuple[TransferId, tuple[int, ...]]] = field(default_factory=list)
    ended: list[PullEnded] = field(default_factory=list)
    handed: list[AttemptId] = field(default_factory=list)
    withdrawn: list[AttemptId] = field(default_factory=list)

    def put(self, number: int, slot: int, tier: Tier = Tier.DEVICE) -> BlockHash:
        """A ready block, as if it had been computed here."""
        block_hash = name_of(number)
        arena = self.device if tier is Tier.DEVICE else self.dram
        arena.copy_in(slot, content_of(block_hash, arena.block_bytes))
        self.shelf.places[block_hash] = Place(tier=tier, slot=slot, generation=1)
        return block_hash

    def holds(self, slot: int, block_hash: bytes) -> bool:
        return bool((self.device.bytes_of(slot) == content_of(block_hash, self.device.block_bytes)).all())

    def spec(
        self,
        source: Node,
        numbers: Sequence[int | None],
        *,
        transfer: str = "t1",
        attempt: AttemptId | None = None,
        wait: bool = False,
        deadline_s: float = 5.0,
        first_slot: int = 0,
        tail_tokens: int = 5,
    ) -> PullSpec:
        """A pull of the numbered blocks, None being the tail, into consecutive slots."""
        wants = tuple(
            Want(
                index=index,
                block_hash=None if number is None else name_of(number),
                num_tokens=tail_tokens if number is None else 16,
                slot=first_slot + index,
            )
            for index, number in enumerate(numbers)
        )
        return PullSpec(
            transfer_id=TransferId(transfer),
            attempt_id=attempt or AttemptId(RequestId("r"), 1),
            source=source.node_id,
            source_epoch=source.epoch,
            source_address=source.address,
            wants=wants,
            wait=wait,
            deadline_s=deadline_s,
        )

    async def ending(self, transfer: str = "t1", timeout_s: float = 10.0) -> PullEnded:
        await until(lambda: any(e.transfer_id == transfer for e in self.ended), timeout_s)
        (ended,) = [e for e in self.ended if e.transfer_id == transfer]
        return ended


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come to pass"
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running_node(
    node_id: str,
    folder: Path,
    *,
    link: str = "auto",
    epoch: str = "e1",
    num_slots: int = 32,
    block_bytes: int = BLOCK_BYTES,
    fingerprint: Fingerprint = FINGERPRINT,
    limits: TransferLimits = QUICK,
    verify: bool = True,
    net: MemoryNet | None = None,
    pool: str = "shared",
) -> AsyncIterator[Node]:
    """pool: "shared" host memory, or the device of a tensor."""
    shelf = Shelf()
    device = make_device(pool, num_slots, block_bytes)
    dram = DramArena(num_slots=num_slots, block_bytes=block_bytes)
    arrived: list[tuple[TransferId, tuple[int, ...]]] = []
    ended: list[PullEnded] = []
    handed: list[AttemptId] = []
    withdrawn: list[AttemptId] = []
    store = BlockStore(
        node_id=NodeId(node_id),
        epoch=Epoch(epoch),
        cache=shelf,
        arenas={Tier.DEVICE: device, Tier.DRAM: dram},
        link=link,
        fingerprint=fingerprint,
        on_arrived=lambda transfer, indices: arrived.append((transfer, tuple(indices))),
        on_ended=ended.append,
        on_handed_over=handed.append,
        on_withdrawn=withdrawn.append,
        clock=time.monotonic,
        verify=verify,
        limits=limits,
        net=net,
    )
    await store.start()
    server = make_server()
    store.add_to_server(server)
    address = bind(server, f"unix:{folder}/{node_id}-{epoch}.sock")
    await server.start()
    ticking = asyncio.create_task(_tick(store))
    node = Node(NodeId(node_id), store, shelf, device, dram, address, Epoch(epoch), arrived, ended, handed, withdrawn)
    try:
        yield node
    finally:
        await store.close()
        ticking.cancel()
        await server.stop(0)
        device.close()
        dram.close()


def make_device(pool: str, num_slots: int, block_bytes: int) -> Arena:
    if pool == "shared":
        return DeviceArena(num_slots=num_slots, block_bytes=block_bytes)
    from kv_store.arena_tensor import TensorArena

    return TensorArena(device=pool, num_slots=num_slots, block_bytes=block_bytes)


async def _tick(store: BlockStore) -> None:
    while True:
        store.tick()
        await asyncio.sleep(TICK_S)
