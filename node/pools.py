"""Shell: the KV pools of a worker process: the arenas of its tiers and the cache that keeps their books."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.protocol import KvLayout
from halfmoon.types import Tier
from kv_store.tiers import KvCache
from node.config import NodeConfig

if TYPE_CHECKING:
    from kv_store.arena import Arena


@dataclass(frozen=True, kw_only=True)
class Pools:
    """Owns the arenas: `close` after the engine and the block store have let go of them."""

    cache: KvCache
    arenas: dict[Tier, Arena]

    @property
    def pool(self) -> Any:
        """What the engine binds: a memoryview on the host, a tensor on a GPU."""
        arena: Any = self.arenas[Tier.DEVICE]
        return arena.buffer if arena.device == "cpu" else arena.tensor

    def num_slots(self, tier: Tier) -> int:
        arena = self.arenas.get(tier)
        return 0 if arena is None else arena.num_slots

    def close(self) -> None:
        for arena in self.arenas.values():
            arena.close()


def make_pools(config: NodeConfig, layout: KvLayout) -> Pools:
    """Allocate the tiers that `config` asks for, or a share of what is free.

    Raises:
        ConfigError: naming the setting, when there is less room than it asks for.
    """
    from kv_store.arena_dram import DramArena  # these load torch, which reads its threads from the environment once
    from kv_store.arena_shared import memory_free_bytes

    size = layout.block_bytes
    device_blocks, dram_blocks = config.num_blocks(size, memory_free_bytes())
    arenas: dict[Tier, Arena] = {Tier.DEVICE: _device_arena(config, device_blocks, size)}
    if dram_blocks:
        arenas[Tier.DRAM] = DramArena(num_slots=dram_blocks, block_bytes=size, key="node.dram_blocks")
    cache = KvCache(num_device_slots=device_blocks, num_dram_slots=dram_blocks, block_size=config.block_size)
    return Pools(cache=cache, arenas=arenas)


def _device_arena(config: NodeConfig, num_slots: int, block_bytes: int) -> Arena:
    key = "node.device_blocks"
    if config.device == "cpu":
        from kv_store.arena_device import DeviceArena

        return DeviceArena(num_slots=num_slots, block_bytes=block_bytes, key=key)
    from kv_store.arena_cuda import CudaArena

    return CudaArena(device=config.device, num_slots=num_slots, block_bytes=block_bytes, key=key)
