"""Shell: the DEVICE tier of a GPU worker: a tensor. (In a module of its own: importing torch takes seconds.)

Copies between the tensor and host memory run on a stream of their own, beside the engine's, and are complete on return.
That is safe because the engine's `forward` is too: between passes nothing of the engine's is under way.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from halfmoon.errors import ConfigError
from halfmoon.types import Tier
from kv_store.arena_shared import Bytes, memory_free_bytes
from kv_store.wire import ArenaAddress


class TensorArena:
    """`tensor` is uint8 [num_slots, block_bytes], on `device`; lend it to the engine. Peers cannot map it.

    On "cpu" it serves tests; no worker uses it there. Not yet run on a GPU.

    Args:
        device: "cuda:N", or "cpu".
        key: the setting that the number of slots came from, for the error's text.

    Raises:
        ConfigError: naming the key, the value and what is free on the device.
    """

    tier = Tier.DEVICE

    def __init__(self, *, device: str, num_slots: int, block_bytes: int, key: str = "num_device_blocks") -> None:
        free = device_free_bytes(device)
        if num_slots * block_bytes > free:
            raise ConfigError(
                key=key, value=num_slots, expected=f"at most {free // block_bytes} blocks: {free:,} bytes are free"
            )
        self.device = device
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        self.tensor = torch.zeros((num_slots, block_bytes), dtype=torch.uint8, device=device)
        self._on_gpu = self.tensor.is_cuda
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._stamps = [0] * num_slots
        if self._on_gpu:
            torch.cuda.synchronize(device)  # the zeros were written on another stream than the copies will be

    @property
    def address(self) -> ArenaAddress:
        return ArenaAddress(
            tier=self.tier,
            num_slots=self.num_slots,
            block_bytes=self.block_bytes,
            device=name_of_gpu(self.device) if self._on_gpu else self.device,
        )

    def bytes_of(self, index: int) -> Bytes:
        data: Bytes = self.staging().numpy()
        self.copy_out(index, data)
        return data

    def copy_in(self, index: int, data: Bytes) -> None:
        host = torch.from_numpy(data if data.flags.writeable else data.copy())  # torch warns of read-only memory
        with self._own_stream():
            self.tensor[index].copy_(host)

    def copy_out(self, index: int, data: Bytes) -> None:
        with self._own_stream():
            torch.from_numpy(data).copy_(self.tensor[index])

    def staging(self) -> torch.Tensor:
        """Host memory for one block, uint8 [block_bytes], pinned for a GPU (torch keeps freed pinned memory)."""
        return torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)

    def stamp(self, index: int, stamp: int) -> None:
        self._stamps[index] = stamp

    def stamp_of(self, index: int) -> int:
        return self._stamps[index]

    def close(self) -> None:
        """Give the memory back to the allocator. Idempotent."""
        self.tensor = torch.empty(0, dtype=torch.uint8)

    def _own_stream(self) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def device_free_bytes(device: str) -> int:
    """What may still be allocated on "cpu" or "cuda:N"."""
    if device == "cpu":
        return memory_free_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def name_of_gpu(device: str) -> str:
    """The same for every process that uses this GPU, whatever number it has there; no other GPU's anywhere."""
    return f"cuda/{torch.cuda.get_device_properties(device).uuid}"
