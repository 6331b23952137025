"""Shell: a two-sided link inside one process, with faults to order: for tests and for trying the protocol out.

Both stores are given the same `MemoryNet`. A fault is named by the source's node id, and counts the pieces that this
source has sent since the fault was set.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from halfmoon.errors import IntegrityError, PeerLost, TransferTimeout
from halfmoon.types import NodeId, Tier
from kv_store.arena_shared import SharedArena
from kv_store.checksum import copy_and_checksum
from kv_store.deadline import Deadline
from kv_store.transfer_values import Batch, Piece

POLL_S = 0.01
PIECES_MAX = 64
"""In a channel at once: the sender waits beyond it, as a socket's would."""


@dataclass(kw_only=True)
class Faults:
    """What goes wrong with one source's pieces; each field names the n-th piece, counted from 0.

    Args:
        drop_at: this piece is not delivered.
        corrupt_at: one byte of it is changed.
        fail_at: the sender raises PeerLost in its place.
        stall_at: from here on nothing moves, at either end.
        delay_s: every piece takes this long.
    """

    drop_at: int = -1
    corrupt_at: int = -1
    fail_at: int = -1
    stall_at: int = -1
    delay_s: float = 0.0
    sent: int = 0


@dataclass(frozen=True, kw_only=True)
class _Parcel:
    group: int
    index: int
    data: bytes


class Channel:
    """The wire of one directed pair."""

    def __init__(self) -> None:
        self.parcels: queue.Queue[_Parcel] = queue.Queue(PIECES_MAX)
        self.closed = threading.Event()


class MemoryNet:
    """All in-process wires: one channel per directed pair, made by its sink, found by its source."""

    def __init__(self) -> None:
        self._channels: dict[str, Channel] = {}
        self.faults: dict[NodeId, Faults] = {}

    def open(self, name: str) -> Channel:
        self._channels[name] = Channel()
        return self._channels[name]

    def find(self, name: str) -> Channel | None:
        return self._channels.get(name)

    def close(self, name: str) -> None:
        self._channels.pop(name, None)


class MemorySink:
    def __init__(self, net: MemoryNet, name: str, target: SharedArena) -> None:
        self._net = net
        self._name = name
        self._target = target
        self._channel = net.open(name)

    def recv(self, batch: Batch, timeout_s: float, stall_s: float) -> None:
        deadline = Deadline(timeout_s, stall_s)
        for piece in batch.pieces:
            data = self._next(batch, piece, deadline)
            deadline.moved()
            found = copy_and_checksum(self._target.slot(piece.target), np.frombuffer(data, dtype=np.uint8))
            if piece.checksum is not None and found != piece.checksum:
                raise IntegrityError(f"{batch.transfer_id}: block {piece.index} differs from its checksum")

    def interrupt(self) -> None:
        self._channel.closed.set()

    def close(self) -> None:
        self.interrupt()
        if self._net.find(self._name) is self._channel:
            self._net.close(self._name)

    def _next(self, batch: Batch, piece: Piece, deadline: Deadline) -> bytes:
        while not self._channel.closed.is_set():
            try:
                parcel = self._channel.parcels.get(timeout=min(POLL_S, deadline.left_s))
            except queue.Empty:
                if deadline.passed:
                    raise TransferTimeout(f"{batch.transfer_id}: block {piece.index} did not come") from None
                continue
            if parcel.group < batch.group:
                continue  # left over from before an error
            if parcel.group > batch.group or parcel.index != piece.index:
                raise PeerLost(f"{batch.transfer_id}: block {parcel.index} came in place of block {piece.index}")
            return parcel.data
        raise PeerLost(f"{batch.transfer_id}: the link was closed")


class MemorySource:
    def __init__(self, net: MemoryNet, name: str, node_id: NodeId, arenas: Mapping[Tier, SharedArena]) -> None:
        self._net = net
        self._name = name
        self._node_id = node_id
        self._arenas = dict(arenas)
        self._interrupted = False

    def send(self, batch: Batch, timeout_s: float, stall_s: float) -> None:
        deadline = Deadline(timeout_s, stall_s)
        for piece in batch.pieces:
            channel = self._net.find(self._name)
            if channel is None or self._interrupted:
                raise PeerLost(f"{batch.transfer_id}: the link was closed")
            data = self._arenas[batch.tier].slot(piece.slot).tobytes()
            self._put(channel, batch, piece, data, deadline)
            deadline.moved()

    def interrupt(self) -> None:
        self._interrupted = True

    def close(self) -> None:
        self.interrupt()

    def _put(self, channel: Channel, batch: Batch, piece: Piece, data: bytes, deadline: Deadline) -> None:
        faults = self._net.faults.get(self._node_id, Faults())
        number, faults.sent = faults.sent, faults.sent + 1
        time.sleep(min(faults.delay_s, deadline.left_s))
        if number == faults.fail_at:
            raise PeerLost(f"{batch.transfer_id}: the link failed, as ordered")
        if number == faults.drop_at:
            return
        if number == faults.corrupt_at:
            data = bytes([data[0] ^ 1]) + data[1:]
        parcel = _Parcel(group=batch.group, index=piece.index, data=data)
        while not channel.closed.is_set() and not self._interrupted:
            if deadline.passed:
                raise TransferTimeout(f"{batch.transfer_id}: block {piece.index} was not taken")
            if 0 <= faults.stall_at <= number:
                time.sleep(POLL_S)
                continue
            try:
                channel.parcels.put(parcel, timeout=min(POLL_S, deadline.left_s))
            except queue.Full:
                continue
            return
        raise PeerLost(f"{batch.transfer_id}: the link was closed")
