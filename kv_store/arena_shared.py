"""Shell: a tier's bytes in anonymous shared memory: written by its owner alone, mapped read-only by peers on this host.

One memfd holds three regions: a header page (magic, sizes, a random nonce), one 8-byte stamp per slot, the slots. A
peer opens it as /proc/<pid>/fd/<n> and proves by the nonce that this is the memory it was told about: names of hosts
and process ids are never trusted. The memory lives until the last mapping is gone, so a reader never faults because
its peer died; what it read is accepted only if the slot's stamp still says so afterwards.

A stamp names one granting of its slot, 0 means not granted. A new incarnation of a node has a new memfd, so the nonce
stands for the epoch.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from halfmoon.errors import ConfigError
from halfmoon.types import Tier
from kv_store.arena import Bytes
from kv_store.wire import ArenaAddress

MAGIC = b"HMARENA1"
HEADER = struct.Struct("<8s16sQQ")  # magic, nonce, number of slots, bytes per slot
PAGE = mmap.PAGESIZE


class SharedArena:
    """The owner's side. `buffer` is lent to the engine; `close` comes after every borrower has let go.

    Args:
        key: the setting that the number of slots came from, for the error's text.

    Raises:
        ConfigError: naming the key, the value and what is free.
    """

    device = "cpu"

    def __init__(self, *, tier: Tier, num_slots: int, block_bytes: int, key: str) -> None:
        assert num_slots > 0
        assert block_bytes > 0
        check_room(num_slots * block_bytes, num_slots, key)
        self.tier = tier
        self.num_slots = num_slots
        self.block_bytes = block_bytes
        self._nonce = secrets.token_bytes(16)
        self._fd = os.memfd_create(f"halfmoon-{tier.name.lower()}", os.MFD_CLOEXEC)
        data_at = _data_offset(num_slots)
        os.ftruncate(self._fd, data_at + num_slots * block_bytes)
        self._map = mmap.mmap(self._fd, 0)
        with contextlib.suppress(OSError):  # huge pages for shared memory are a host's setting, off by default
            self._map.madvise(mmap.MADV_HUGEPAGE)
        HEADER.pack_into(self._map, 0, MAGIC, self._nonce, num_slots, block_bytes)
        self.buffer = memoryview(self._map)[data_at:]
        self._stamps, self._slots = _views(self._map, num_slots, block_bytes)

    @property
    def address(self) -> ArenaAddress:
        return ArenaAddress(
            tier=self.tier,
            num_slots=self.num_slots,
            block_bytes=self.block_bytes,
            device=self.device,
            pid=os.getpid(),
            fd=self._fd,
            nonce=self._nonce,
        )

    def slot(self, index: int) -> Bytes:
        """A writable view of one slot, [block_bytes]."""
        return self._slots[index]

    def bytes_of(self, index: int) -> Bytes:
        """See Arena: here the slot itself."""
        return self._slots[index]

    def copy_in(self, index: int, data: Bytes) -> None:
        np.copyto(self._slots[index], data)

    def copy_out(self, index: int, data: Bytes) -> None:
        np.copyto(data, self._slots[index])

    def stamp(self, index: int, stamp: int) -> None:
        """Say which granting of the slot is valid; 0: none."""
        self._stamps[index] = stamp

    def stamp_of(self, index: int) -> int:
        return int(self._stamps[index])

    def close(self) -> None:
        """Unmap and close. Idempotent. Views still borrowed keep the memory until they go."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        del self._slots, self._stamps
        self.buffer = memoryview(b"")
        with contextlib.suppress(BufferError):
            self._map.close()


class PeerArena:
    """A peer's arena, mapped read-only."""

    def __init__(self, address: ArenaAddress) -> None:
        """Raises OSError if the peer's memory cannot be opened, ValueError if it is not the memory it was told of."""
        self.num_slots = address.num_slots
        self.block_bytes = address.block_bytes
        fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = _data_offset(address.num_slots) + address.num_slots * address.block_bytes
            if os.fstat(fd).st_size != size:
                raise ValueError("a file of another size lies there")
            self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        expected = (MAGIC, address.nonce, address.num_slots, address.block_bytes)
        if HEADER.unpack_from(self._map, 0) != expected:
            self._map.close()
            raise ValueError("the nonce or the sizes differ")
        self._stamps, self._slots = _views(self._map, address.num_slots, address.block_bytes)

    def slot(self, index: int) -> Bytes:
        """A read-only view of one slot, [block_bytes]."""
        return self._slots[index]

    def stamp_of(self, index: int) -> int:
        return int(self._stamps[index])

    def close(self) -> None:
        """Unmap. No copy may be running. Idempotent."""
        if hasattr(self, "_slots"):
            del self._slots, self._stamps
            self._map.close()


def check_room(num_bytes: int, num_slots: int, key: str) -> None:
    """Raises ConfigError when the machine, or this process's memory cgroup, has less than `num_bytes` free.

    An anonymous memfd is charged to memory, not to the size of /dev/shm.
    """
    free = memory_free_bytes()
    if num_bytes > free:
        room = f"at most {free * num_slots // num_bytes} blocks: they need {num_bytes:,} bytes, {free:,} are free"
        raise ConfigError(key=key, value=num_slots, expected=room)


def memory_free_bytes(root: Path = Path("/")) -> int:
    """What may still be allocated: the machine's MemAvailable, or less under a memory cgroup (v2 or v1)."""
    free = _mem_available(root / "proc/meminfo")
    for limit, usage in (
        (root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory.current"),
        (root / "sys/fs/cgroup/memory/memory.limit_in_bytes", root / "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if limit.exists() and usage.exists() and (text := limit.read_text().strip()) != "max":
            free = min(free, max(0, int(text) - int(usage.read_text())))
    return free


def _mem_available(path: Path) -> int:
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{path} has no MemAvailable")


def _data_offset(num_slots: int) -> int:
    """Header page, then the stamps in whole pages."""
    return PAGE + -(-num_slots * 8 // PAGE) * PAGE


def _views(memory: mmap.mmap, num_slots: int, block_bytes: int) -> tuple[npt.NDArray[np.uint64], Bytes]:
    stamps = np.frombuffer(memory, dtype=np.uint64, count=num_slots, offset=PAGE)
    data = np.frombuffer(memory, dtype=np.uint8, count=num_slots * block_bytes, offset=_data_offset(num_slots))
    return stamps, data.reshape(num_slots, block_bytes)
