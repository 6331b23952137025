"""Shell: bytes between host memory and a GPU's pool. Not yet run on a GPU."""

from __future__ import annotations

import torch

from kv_store.arena import Arena
from kv_store.arena_cuda import CudaArena
from kv_store.arena_shared import Bytes


def host_to_device(target: Arena, slot: int, source: Bytes) -> None:
    """Synchronous: on return the host bytes may change."""
    assert isinstance(target, CudaArena)
    target.tensor[slot].copy_(torch.from_numpy(source))
    torch.cuda.synchronize(target.device)


def device_to_host(source: Arena, slot: int, target: Bytes) -> None:
    """Synchronous: on return the bytes are in host memory."""
    assert isinstance(source, CudaArena)
    torch.from_numpy(target).copy_(source.tensor[slot])
