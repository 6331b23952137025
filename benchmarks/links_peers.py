"""Shell: NIXL and Mooncake's transfer engine on the same task as benchmarks/links.py, each in processes of .venv-bench.

One process registers blocks, another one reads them, block by block, all posted and then waited for. This file runs in
two places: `run_peers` in the project's environment, the rest under .venv-bench, where only numpy is wanted. Mooncake
needs the system's libibverbs (Debian: libibverbs1); a peer that does not work here is reported and left out.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

VENV = Path(__file__).resolve().parents[1] / ".venv-bench"
PACKAGES = {"nixl": "nixl-cu12==1.5.1", "mooncake": "mooncake-transfer-engine-non-cuda==0.3.13.post1"}
MOONCAKE_REQUESTS_MAX = 64  # per batch; a batch of 4,096 is refused
TIMEOUT_S = 300.0


def run_peers(sizes: Sequence[int], total_bytes: int, repeats: int) -> dict[int, dict[str, list[float]]]:
    """Seconds by block size and peer. Installs the peers on first use."""
    python = str(VENV / "bin" / "python")
    if not VENV.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    results: dict[int, dict[str, list[float]]] = {size: {} for size in sizes}
    for peer, package in PACKAGES.items():
        subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", package], check=True)
        order = [python, __file__, peer, str(total_bytes), str(repeats), *map(str, sizes)]
        done = subprocess.run(order, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"{peer} does not work here: {reason}")
            continue
        for size, seconds in json.loads(done.stdout.strip().splitlines()[-1]).items():
            results[int(size)][peer] = seconds
    return results


# ---- under .venv-bench ---------------------------------------------------------------------------------------------


def measure(peer: str, total_bytes: int, repeats: int, sizes: Sequence[int]) -> dict[int, list[float]]:
    """One reader here, one holder in a child process; both hold `total_bytes`."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(peer, total_bytes, theirs), daemon=True)
    holder.start()
    memory = np.zeros(total_bytes, dtype=np.uint8)
    read = READERS[peer](memory, ours)
    results: dict[int, list[float]] = {}
    for size in sizes:
        offsets = [i * size for i in range(max(1, total_bytes // size))]
        results[size] = []
        for repeat in range(repeats + 1):
            begin_s = time.perf_counter()
            read(offsets, size)
            if repeat:
                results[size].append(time.perf_counter() - begin_s)
        assert (memory[: len(offsets) * size] == 7).all(), f"{peer} moved something else"
        memory[:] = 0
    ours.send("end")
    holder.join(10.0)
    return results


def hold(peer: str, total_bytes: int, conn: Connection) -> None:
    memory = np.full(total_bytes, 7, dtype=np.uint8)
    keep = HOLDERS[peer](memory, conn)
    assert conn.recv() == "end"
    del keep


Read = Callable[[Sequence[int], int], None]


def nixl_agent_of(name: str, memory: np.ndarray) -> Any:
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    return agent


def hold_nixl(memory: np.ndarray, conn: Connection) -> Any:
    agent = nixl_agent_of("holder", memory)
    conn.send((agent.get_agent_metadata(), memory.ctypes.data))
    return agent


def read_nixl(memory: np.ndarray, conn: Connection) -> Read:
    agent = nixl_agent_of("reader", memory)
    metadata, remote_at = conn.recv()
    holder = agent.add_remote_agent(metadata)

    def read(offsets: Sequence[int], size: int) -> None:
        local = agent.get_xfer_descs([(memory.ctypes.data + o, size, 0) for o in offsets], "DRAM")
        remote = agent.get_xfer_descs([(remote_at + o, size, 0) for o in offsets], "DRAM")
        handle = agent.initialize_xfer("READ", local, remote, holder)
        state = agent.transfer(handle)
        while state != "DONE":
            assert state != "ERR"
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)

    return read


def mooncake_engine_of(memory: np.ndarray) -> Any:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.register_memory(memory.ctypes.data, memory.nbytes) == 0
    return engine


def hold_mooncake(memory: np.ndarray, conn: Connection) -> Any:
    engine = mooncake_engine_of(memory)
    conn.send((f"127.0.0.1:{engine.get_rpc_port()}", memory.ctypes.data))
    return engine


def read_mooncake(memory: np.ndarray, conn: Connection) -> Read:
    engine = mooncake_engine_of(memory)
    holder, remote_at = conn.recv()

    def read(offsets: Sequence[int], size: int) -> None:
        for start in range(0, len(offsets), MOONCAKE_REQUESTS_MAX):
            part = offsets[start : start + MOONCAKE_REQUESTS_MAX]
            local = [memory.ctypes.data + o for o in part]
            remote = [remote_at + o for o in part]
            assert engine.batch_transfer_sync_read(holder, local, remote, [size] * len(part)) == 0

    return read


HOLDERS: dict[str, Callable[[np.ndarray, Connection], Any]] = {"nixl": hold_nixl, "mooncake": hold_mooncake}
READERS: dict[str, Callable[[np.ndarray, Connection], Read]] = {"nixl": read_nixl, "mooncake": read_mooncake}


if __name__ == "__main__":
    found = measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [int(size) for size in sys.argv[4:]])
    print(json.dumps(found))
