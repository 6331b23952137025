"""Shell: the KV pools of a worker process: the arenas of its tiers and the cache that keeps their books."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.protocol import KvLayout, Pool
from halfmoon.errors import ConfigError
from halfmoon.types import Tier
from kv_store.tiers import KvCache
from node.config import MIB, NodeConfig

if TYPE_CHECKING:
    from kv_store.arena import Arena

DEVICE_KEY = "node.device_blocks"
DRAM_KEY = "node.dram_blocks"


@dataclass(frozen=True, kw_only=True)
class Pools:
    """Owns the arenas: `close` after the engine and the block store have let go of them."""

    cache: KvCache
    arenas: dict[Tier, Arena]

    @property
    def pool(self) -> Pool:
        """What the engine binds: the DEVICE tier's bytes, a memoryview on the host, a tensor on a GPU."""
        arena: Any = self.arenas[Tier.DEVICE]
        pool: Pool = arena.buffer if arena.device == "cpu" else arena.tensor
        return pool

    def num_slots(self, tier: Tier) -> int:
        arena = self.arenas.get(tier)
        return 0 if arena is None else arena.num_slots

    def close(self) -> None:
        for arena in self.arenas.values():
            arena.close()


def make_pools(config: NodeConfig, layout: KvLayout) -> Pools:
    """Allocate the tiers that `config` asks for, or a share of what is free.

    On a GPU worker DEVICE is a tensor on that GPU and DRAM is pinned.

    Raises:
        ConfigError: naming the setting, when there is less room than it asks for.
    """
    return _host_pools(config, layout.block_bytes) if config.device == "cpu" else _gpu_pools(config, layout.block_bytes)


# The arenas load torch, which reads its threads from the environment once: they are imported when they are made.


def _host_pools(config: NodeConfig, size: int) -> Pools:
    from kv_store.arena_device import DeviceArena
    from kv_store.arena_dram import DramArena
    from kv_store.arena_shared import memory_free_bytes

    device_blocks, dram_blocks = config.num_blocks(size, memory_free_bytes())
    with _named_as_set(config, "device", memory_free_bytes):
        device = DeviceArena(num_slots=device_blocks, block_bytes=size, key=DEVICE_KEY)
    with _named_as_set(config, "dram", memory_free_bytes):
        dram = DramArena(num_slots=dram_blocks, block_bytes=size, key=DRAM_KEY) if dram_blocks else None
    return _pools(config, device, dram)


def _gpu_pools(config: NodeConfig, size: int) -> Pools:
    from kv_store.arena_pinned import PinnedDramArena
    from kv_store.arena_shared import memory_free_bytes
    from kv_store.arena_tensor import TensorArena, device_free_bytes

    device_blocks, dram_blocks = config.num_blocks(size, memory_free_bytes(), device_free_bytes(config.device))
    with _named_as_set(config, "device", lambda: device_free_bytes(config.device)):
        device = TensorArena(device=config.device, num_slots=device_blocks, block_bytes=size, key=DEVICE_KEY)
    with _named_as_set(config, "dram", memory_free_bytes):
        dram = (
            PinnedDramArena(device=config.device, num_slots=dram_blocks, block_bytes=size, key=DRAM_KEY)
            if dram_blocks
            else None
        )
    return _pools(config, device, dram)


@contextmanager
def _named_as_set(config: NodeConfig, tier: str, free_bytes: Callable[[], int]) -> Iterator[None]:
    """An arena knows its size in blocks; an operator who set MiB is told of MiB."""
    blocks, mib = getattr(config, f"{tier}_blocks"), getattr(config, f"{tier}_mib")
    try:
        yield
    except ConfigError as error:
        if blocks or mib <= 0:
            raise
        room = f"at most the {free_bytes() // MIB} MiB that are free"
        raise ConfigError(key=f"node.{tier}_mib", value=mib, expected=room) from error


def _pools(config: NodeConfig, device: Arena, dram: Arena | None) -> Pools:
    arenas = {Tier.DEVICE: device} | ({} if dram is None else {Tier.DRAM: dram})
    cache = KvCache(
        num_device_slots=device.num_slots,
        num_dram_slots=0 if dram is None else dram.num_slots,
        block_size=config.block_size,
        eviction=config.eviction,
    )
    return Pools(cache=cache, arenas=arenas)
