"""Shell: what the links reach beside their limits, measured in the same run: memcpy for shared memory, plain gloo for
the process-group link; optionally NIXL and Mooncake's transfer engine (`--peers`), installed into .venv-bench.

    python -m benchmarks.links [--mib 128] [--repeats 7] [--peers]

One process reads blocks that another one holds. Every repeat measures every row once, so that noise hits all alike;
the ratios within a repeat are compared, by their median. Goals: shm >= 0.8 of memcpy, verified >= 0.6; torch >= 0.9 of
plain gloo. (Blocks over 1 MiB are cut into messages of 1 MiB, for safety and at a price: see kv_store/link_torch.py.)
"""

from __future__ import annotations

import multiprocessing as mp
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import save
from halfmoon.types import Tier, TransferId
from kv_store.arena_device import DeviceArena
from kv_store.arena_shared import PeerArena
from kv_store.checksum import checksum
from kv_store.link_shm import ShmSink
from kv_store.transfer_values import Batch, Piece, TransferLimits
from kv_store.wire import Rendezvous

SIZES = (64 << 10, 256 << 10, 368_640, 1 << 20, 4 << 20)
"""Bytes per block; 368,640 is the default model's block of 16 tokens."""
GOALS = {"shm": ("memcpy", 0.8), "shm verified": ("memcpy", 0.6), "torch": ("plain gloo", 0.9)}
TIMEOUT_S = 60.0


# ---- the process that holds the blocks -----------------------------------------------------------------------------


def hold(conn: Connection, folder: str) -> None:
    """Serve commands until "end": make an arena, send it over a link, send it over plain gloo."""
    import torch

    from kv_store.link_torch import Mailbox, TorchSource

    torch.set_num_threads(1)
    mailbox = Mailbox(lambda entry: conn.send(("entry", entry.key, entry.value)))
    plain = _plain_group(folder, 0)
    arena: DeviceArena | None = None
    batches: list[Batch] = []
    source: TorchSource | None = None
    while (command := conn.recv())[0] != "end":
        if command[0] == "arena":
            arena, batches = _filled_arena(command[1], command[2])
            sums = [checksum(arena.slot(i)) for i in range(arena.num_slots)]
            source = source or TorchSource(mailbox=mailbox, host="127.0.0.1", arenas={Tier.DEVICE: arena})
            source._arenas = {Tier.DEVICE: arena}
            conn.send(("arena", arena.address, sums))
        elif command[0] == "entry":
            mailbox.deliver(Rendezvous(key=command[1], value=command[2]))
        elif command[0] == "torch":
            assert source is not None
            threading.Thread(target=_send_all, args=(source, batches)).start()
        elif command[0] == "plain":
            assert arena is not None
            _move_plainly(plain, arena, 0)


def _filled_arena(num_slots: int, block_bytes: int) -> tuple[DeviceArena, list[Batch]]:
    arena = DeviceArena(num_slots=num_slots, block_bytes=block_bytes)
    rng = np.random.default_rng(1)
    for slot in range(num_slots):
        arena.slot(slot)[:] = rng.integers(0, 256, block_bytes, dtype=np.uint8)
        arena.stamp(slot, slot + 1)
    return arena, batches_of(num_slots, block_bytes, None)


def _send_all(source: Any, batches: Sequence[Batch]) -> None:
    for batch in batches:
        source.send(batch, TIMEOUT_S, TIMEOUT_S)


def _plain_group(folder: str, rank: int) -> Any:
    import torch.distributed as dist

    store = dist.FileStore(f"{folder}/plain", 2)
    return dist.ProcessGroupGloo(dist.PrefixStore("plain", store), rank, 2)


def _move_plainly(group: Any, arena: DeviceArena, rank: int) -> None:
    """What a first program would do: one message per block, all posted, then waited for."""
    import torch

    tensors = [torch.from_numpy(arena.slot(i)) for i in range(arena.num_slots)]
    works = [group.send([t], 1, 0) if rank == 0 else group.recv([t], 0, 0) for t in tensors]
    for work in works:
        work.wait()


# ---- the process that reads them -----------------------------------------------------------------------------------


def batches_of(num_slots: int, block_bytes: int, sums: Sequence[int] | None) -> list[Batch]:
    """All slots, in batches of the size that the transfer machine posts."""
    per_batch = max(1, TransferLimits().batch_bytes_max // block_bytes)
    pieces = [
        Piece(index=i, slot=i, stamp=i + 1, checksum=None if sums is None else sums[i], target=i)
        for i in range(num_slots)
    ]
    return [
        Batch(
            batch=start,
            transfer_id=TransferId("bench"),
            tier=Tier.DEVICE,
            group=1,
            pieces=tuple(pieces[start : start + per_batch]),
        )
        for start in range(0, num_slots, per_batch)
    ]


class Reader:
    """Measures every row for one block size at a time."""

    def __init__(self, conn: Connection, folder: str) -> None:
        from kv_store.link_torch import Mailbox, TorchSink

        self._conn = conn
        self._mailbox = Mailbox(lambda entry: conn.send(("entry", entry.key, entry.value)))
        self._plain = _plain_group(folder, 1)
        self._sink_class = TorchSink
        self._torch: Any = None
        self._answers: list[tuple[Any, ...]] = []
        self._answered = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def measure(self, block_bytes: int, total_bytes: int, repeats: int) -> dict[str, list[float]]:
        """Seconds by row."""
        num_slots = max(1, total_bytes // block_bytes)
        self._conn.send(("arena", num_slots, block_bytes))
        _, address, sums = self._answer()
        peer = PeerArena(address)
        target = DeviceArena(num_slots=num_slots, block_bytes=block_bytes)
        local = DeviceArena(num_slots=num_slots, block_bytes=block_bytes)
        for slot in range(num_slots):
            np.copyto(local.slot(slot), peer.slot(slot))
            target.slot(slot)[:] = 0
        rows = self._rows(target, local, peer, sums)
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for repeat in range(repeats + 1):
            order = list(rows.items())
            for name, row in order if repeat % 2 else order[::-1]:
                begin_s = time.perf_counter()
                row()
                if repeat:  # the first round makes groups and faults pages in
                    seconds[name].append(time.perf_counter() - begin_s)
        assert all((target.slot(i) == peer.slot(i)).all() for i in range(num_slots))
        peer.close()
        target.close()
        local.close()
        return seconds

    def _rows(
        self, target: DeviceArena, local: DeviceArena, peer: PeerArena, sums: Sequence[int]
    ) -> dict[str, Callable[[], None]]:
        plain = batches_of(target.num_slots, target.block_bytes, None)
        summed = batches_of(target.num_slots, target.block_bytes, sums)
        shm = ShmSink(target, {Tier.DEVICE: peer})
        self._torch = self._torch or self._sink_class(mailbox=self._mailbox, host="127.0.0.1", target=target)
        self._torch._target = target
        return {
            "memcpy": lambda: _memcpy(target, local),
            "shm": lambda: _receive_all(shm, plain),
            "shm verified": lambda: _receive_all(shm, summed),
            "checksum alone": lambda: _checksum_all(local),
            "plain gloo": lambda: self._receive_plainly(target),
            "torch": lambda: self._receive_torch(plain),
            "torch verified": lambda: self._receive_torch(summed),
        }

    def _receive_torch(self, batches: Sequence[Batch]) -> None:
        self._conn.send(("torch",))
        _receive_all(self._torch, batches)

    def _receive_plainly(self, target: DeviceArena) -> None:
        self._conn.send(("plain",))
        _move_plainly(self._plain, target, 1)

    def _listen(self) -> None:
        while True:
            try:
                message = self._conn.recv()
            except (EOFError, OSError):
                return
            if message[0] == "entry":
                self._mailbox.deliver(Rendezvous(key=message[1], value=message[2]))
                continue
            with self._answered:
                self._answers.append(message)
                self._answered.notify()

    def _answer(self) -> tuple[Any, ...]:
        with self._answered:
            assert self._answered.wait_for(lambda: bool(self._answers), TIMEOUT_S)
            return self._answers.pop()


def _memcpy(target: DeviceArena, source: DeviceArena) -> None:
    for slot in range(target.num_slots):
        np.copyto(target.slot(slot), source.slot(slot))


def _checksum_all(arena: DeviceArena) -> None:
    for slot in range(arena.num_slots):
        checksum(arena.slot(slot))


def _receive_all(link: Any, batches: Sequence[Batch]) -> None:
    for batch in batches:
        link.recv(batch, TIMEOUT_S, TIMEOUT_S)


# ---- report --------------------------------------------------------------------------------------------------------


def show(results: dict[int, dict[str, list[float]]], total_bytes: int) -> bool:
    """Print GB/s and ratios; True if every goal is met at the default model's block."""
    table = Table(title=f"GB/s (ratio to its limit in the same run), {total_bytes >> 20} MiB, medians")
    table.add_column("row")
    for size in results:
        table.add_column(f"{size >> 10}K" if size < 1 << 20 else f"{size >> 20}M", justify="right")
    for name in dict.fromkeys(name for rows in results.values() for name in rows):
        cells = [_cell(rows, name, size, total_bytes) for size, rows in results.items()]
        table.add_row(name, *cells)
    Console().print(table)
    return all(ratio(results[368_640], name, limit) >= goal for name, (limit, goal) in GOALS.items())


def _cell(rows: dict[str, list[float]], name: str, size: int, total_bytes: int) -> str:
    if not rows.get(name):
        return "-"
    moved = max(1, total_bytes // size) * size
    speed = f"{moved / statistics.median(rows[name]) / 1e9:.2f}"
    return f"{speed} ({ratio(rows, name, GOALS[name][0]):.2f})" if name in GOALS else speed


def ratio(rows: dict[str, list[float]], name: str, limit: str) -> float:
    """Of speeds, 1 is as fast as the limit: the median of the ratios within each repeat, as noise hits neighbours."""
    return statistics.median(a / b for a, b in zip(rows[limit], rows[name], strict=True))


@click.command()
@click.option("--mib", default=128, show_default=True, help="bytes moved per row and repeat, in MiB")
@click.option("--repeats", default=11, show_default=True, help="at least 5; medians are shown")
@click.option("--peers", is_flag=True, help="also NIXL and Mooncake's transfer engine, installed into .venv-bench")
def main(mib: int, repeats: int, peers: bool) -> None:
    import torch

    torch.set_num_threads(1)
    context = mp.get_context("spawn")
    total_bytes = mib << 20
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe()
        holder = context.Process(target=hold, args=(theirs, folder), daemon=True)
        holder.start()
        reader = Reader(ours, folder)
        results = {size: reader.measure(size, total_bytes, max(5, repeats)) for size in SIZES}
        ours.send(("end",))
        holder.join(10.0)
    if peers:
        from benchmarks.links_peers import run_peers

        for size, rows in run_peers(SIZES, total_bytes, max(5, repeats)).items():
            results[size].update(rows)
    met = show(results, total_bytes)
    ratios = {
        size: {name: round(ratio(rows, name, limit), 3) for name, (limit, _) in GOALS.items()}
        for size, rows in results.items()
    }
    path: Path = save(
        "links", {"total_bytes": total_bytes, "seconds": results, "ratios": ratios, "goals": GOALS, "goals_met": met}
    )
    Console().print(f"{'every goal is' if met else 'a goal is not'} met at 368,640 B; raw results: {path}")


if __name__ == "__main__":
    main()
