"""Shell: the DRAM tier: host memory, shared so that peers on this host may read it in place."""

from __future__ import annotations

from halfmoon.types import Tier
from kv_store.arena_shared import SharedArena


class DramArena(SharedArena):
    """Where evicted blocks and parked sequences lie."""

    def __init__(self, *, num_slots: int, block_bytes: int, key: str = "num_dram_blocks") -> None:
        super().__init__(tier=Tier.DRAM, num_slots=num_slots, block_bytes=block_bytes, key=key)
