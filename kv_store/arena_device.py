"""Shell: the DEVICE tier of a CPU worker: the pool that the engine computes on, in shared memory."""

from __future__ import annotations

from halfmoon.types import Tier
from kv_store.arena_shared import SharedArena


class DeviceArena(SharedArena):
    """Lend `buffer` to the engine; peers on this host read granted slots in place."""

    def __init__(self, *, num_slots: int, block_bytes: int, key: str = "num_device_blocks") -> None:
        super().__init__(tier=Tier.DEVICE, num_slots=num_slots, block_bytes=block_bytes, key=key)
