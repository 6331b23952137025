"""Shell: the link of two processes on one host: the sink copies granted slots out of the source's shared memory.

One pass over memory: each slice is hashed right after it was copied. (A sink on a GPU hashes what it read from the
source; the copy to the GPU is left to the bus's own checks.) The stamp is checked after the copy, so bytes
that the source took back meanwhile are never accepted; the source need not wait for a reader that died or stalled.
"""

from __future__ import annotations

from collections.abc import Mapping

from halfmoon.errors import IntegrityError, PeerLost, TransferTimeout
from halfmoon.types import Tier
from kv_store.arena import Arena
from kv_store.arena_shared import Bytes, PeerArena, SharedArena
from kv_store.checksum import checksum, copy_and_checksum
from kv_store.deadline import Deadline
from kv_store.transfer_values import Batch, Piece


class ShmSink:
    """Owns the mappings of the source's arenas.

    Args:
        target: this node's DEVICE arena, written here.
        peers: the source's arenas, by tier.
    """

    def __init__(self, target: Arena, peers: Mapping[Tier, PeerArena]) -> None:
        self._target = target
        self._peers = dict(peers)
        self._interrupted = False

    def recv(self, batch: Batch, timeout_s: float, stall_s: float) -> None:
        deadline = Deadline(timeout_s, stall_s)
        peer = self._peers[batch.tier]
        for piece in batch.pieces:
            if self._interrupted:
                raise PeerLost(f"{batch.transfer_id}: the stream beside the link is gone")
            if deadline.passed:
                raise TransferTimeout(f"{batch.transfer_id}: block {piece.index} was not copied in time")
            deadline.moved()
            if not 0 <= piece.slot < peer.num_slots:
                raise IntegrityError(f"{batch.transfer_id}: slot {piece.slot} of {peer.num_slots} was granted")
            found = self._copy(piece, peer.slot(piece.slot))
            if peer.stamp_of(piece.slot) != piece.stamp:
                raise IntegrityError(f"{batch.transfer_id}: block {piece.index} was taken back while it was copied")
            if piece.checksum is not None and found != piece.checksum:
                raise IntegrityError(f"{batch.transfer_id}: block {piece.index} differs from its checksum")

    def interrupt(self) -> None:
        self._interrupted = True

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def _copy(self, piece: Piece, source: Bytes) -> int | None:
        """Returns the checksum of what was copied if the piece has one."""
        if isinstance(self._target, SharedArena) and piece.checksum is not None:
            return copy_and_checksum(self._target.slot(piece.target), source)
        self._target.copy_in(piece.target, source)
        return checksum(source) if piece.checksum is not None else None
