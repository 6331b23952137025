"""Shell: the DRAM tier of a GPU worker: shared host memory that is also pinned, so that the GPU copies it by itself."""

from __future__ import annotations

import logging

import numpy as np
import torch

from kv_store.arena_dram import DramArena

log = logging.getLogger("kv_store.arena_pinned")


class PinnedDramArena(DramArena):
    """Memory that CUDA refuses to pin (a limit on locked memory, say) works too, slower: it is logged once.

    Args:
        device: the worker's GPU, "cuda:N".
    """

    def __init__(self, *, device: str, num_slots: int, block_bytes: int, key: str = "num_dram_blocks") -> None:
        super().__init__(num_slots=num_slots, block_bytes=block_bytes, key=key)
        self._pinned_at = pin(self.buffer, device)

    def close(self) -> None:
        """Unpin first: CUDA must not hold pages that are no longer mapped. Idempotent."""
        if self._pinned_at:
            torch.cuda.cudart().cudaHostUnregister(self._pinned_at)
            self._pinned_at = 0
        super().close()


def pin(memory: memoryview, device: str) -> int:
    """Page-lock host memory; its address, to be unregistered, or 0: it was refused. Not yet run on a GPU."""
    if not torch.cuda.is_available():
        log.info("no GPU here: %d MiB of DRAM stay unpinned", len(memory) >> 20)
        return 0
    address = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
    with torch.cuda.device(device):  # or CUDA takes memory on the first GPU too
        status = int(torch.cuda.cudart().cudaHostRegister(address, len(memory), 0))
    if status != 0:
        log.warning("CUDA does not pin %d MiB of DRAM (error %d): copies will be slower", len(memory) >> 20, status)
        return 0
    return address
