"""Shell: the DEVICE tier of a GPU worker: a tensor. (In a module of its own: importing torch takes seconds.)"""

from __future__ import annotations

import torch

from halfmoon.errors import ConfigError
from halfmoon.types import Tier
from kv_store.wire import ArenaAddress


class CudaArena:
    """The pool of a GPU worker: `tensor` is uint8 [num_slots, block_bytes]. Not yet run on a GPU.

    Raises:
        ConfigError: naming the key, the value and what is free on the device.
    """

    tier = Tier.DEVICE

    def __init__(self, *, device: str, num_slots: int, block_bytes: int, key: str = "num_device_blocks") -> None:
        free, _ = torch.cuda.mem_get_info(device)
        if num_slots * block_bytes > free:
            raise ConfigError(
                key=key, value=num_slots, expected=f"at most {free // block_bytes} blocks: {free:,} bytes are free"
            )
        self.device = device
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        self.tensor = torch.zeros((num_slots, block_bytes), dtype=torch.uint8, device=device)
        self._stamps = [0] * num_slots

    @property
    def address(self) -> ArenaAddress:
        return ArenaAddress(tier=self.tier, num_slots=self.num_slots, block_bytes=self.block_bytes, device=self.device)

    def stamp(self, index: int, stamp: int) -> None:
        self._stamps[index] = stamp

    def stamp_of(self, index: int) -> int:
        return self._stamps[index]

    def close(self) -> None:
        """Give the memory back to the allocator. Idempotent."""
        self.tensor = torch.empty(0, dtype=torch.uint8)
