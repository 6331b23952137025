"""Shared arenas: what peers see, the proof of one host, and sizes checked against what is free."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from halfmoon.errors import ConfigError
from halfmoon.types import Tier
from kv_store.arena_device import DeviceArena
from kv_store.arena_dram import DramArena
from kv_store.arena_shared import PeerArena, memory_free_bytes

ROOT = Path(__file__).resolve().parents[2]
READER = """
import sys
from halfmoon.types import Tier
from kv_store.arena_shared import PeerArena
from kv_store.wire import ArenaAddress
pid, fd, nonce = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
where = ArenaAddress(tier=Tier.DEVICE, num_slots=4, block_bytes=4096, device="cpu", pid=pid, fd=fd, nonce=nonce)
peer = PeerArena(where)
assert not peer.slot(2).flags.writeable
print(peer.stamp_of(2), int(peer.slot(2).sum()))
"""


def test_another_process_reads_slots_and_stamps_in_place() -> None:
    arena = DeviceArena(num_slots=4, block_bytes=4096)
    arena.slot(2)[:] = 3
    arena.stamp(2, 77)
    address = arena.address
    args = [str(address.pid), str(address.fd), address.nonce.hex()]
    said = subprocess.run([sys.executable, "-c", READER, *args], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["77", str(3 * 4096)]
    arena.close()


def test_the_buffer_that_the_engine_computes_on_is_the_slots() -> None:
    arena = DeviceArena(num_slots=3, block_bytes=100)
    assert len(arena.buffer) == 300
    arena.buffer[100:200] = bytes(range(100))
    assert arena.slot(1).tolist() == list(range(100))
    assert arena.tier is Tier.DEVICE
    arena.close()
    arena.close()


def test_memory_that_is_not_what_it_was_told_to_be_is_not_mapped() -> None:
    arena = DramArena(num_slots=2, block_bytes=4096)
    assert arena.tier is Tier.DRAM
    with pytest.raises(ValueError, match="nonce or the sizes"):
        PeerArena(replace(arena.address, nonce=b"0" * 16))
    with pytest.raises(ValueError, match="another size"):
        PeerArena(replace(arena.address, num_slots=3))
    with pytest.raises(OSError, match="No such file"):
        PeerArena(replace(arena.address, fd=9999))
    arena.close()


def test_a_readers_mapping_outlives_the_owner_and_everything_is_given_back() -> None:
    fds = len(os.listdir("/proc/self/fd"))
    arena = DeviceArena(num_slots=2, block_bytes=4096)
    arena.slot(1)[:] = 9
    peer = PeerArena(arena.address)
    arena.close()
    assert np.all(peer.slot(1) == 9)
    peer.close()
    peer.close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == fds


def test_more_than_is_free_is_refused_with_the_key_the_value_and_what_is_free() -> None:
    free = memory_free_bytes()
    with pytest.raises(ConfigError) as caught:
        DeviceArena(num_slots=1 << 40, block_bytes=1 << 20)
    assert caught.value.key == "num_device_blocks"
    assert caught.value.value == 1 << 40
    assert "bytes, " in str(caught.value)
    assert "are free" in str(caught.value)
    assert free > 0


def test_what_is_free_is_the_least_of_the_machine_and_the_cgroups(tmp_path: Path) -> None:
    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    put("proc/meminfo", "MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    assert memory_free_bytes(tmp_path) == 50 * 1024
    put("sys/fs/cgroup/memory.max", "max\n")
    put("sys/fs/cgroup/memory.current", "1000\n")
    assert memory_free_bytes(tmp_path) == 50 * 1024
    put("sys/fs/cgroup/memory.max", "4000\n")
    assert memory_free_bytes(tmp_path) == 3000
    put("sys/fs/cgroup/memory.current", "5000\n")
    assert memory_free_bytes(tmp_path) == 0
