"""Pure: one node's transfer machine, both sides: what it pulls from peers (sink) and what peers pull from it (source).

Events in, effects out, time passed in. The shell performs the effects of one call in order and before anything else
may change a slot; Receive, Transmit and Hash are each answered exactly once, whatever happened to their session.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from halfmoon.errors import TransferError
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, Tier, TransferId
from kv_store.transfer_attempts import Tail
from kv_store.transfer_sink import Sink
from kv_store.transfer_source import Source
from kv_store.transfer_values import CopyPins, Effect, LinkTraits, Message, SessionId, TransferLimits
from kv_store.values import PullSpec


class TransferMachine:
    """The pull protocol (DESIGN 5.3). One owner: the node's loop.

    Args:
        block_bytes: of every slot of this node.
        pins: the cache whose copies are granted.
        verify: ask sources for checksums, and compare them after the copy.

    Every method returns the effects to be performed, in order.
    """

    def __init__(
        self, *, block_bytes: int, pins: CopyPins, verify: bool = True, limits: TransferLimits | None = None
    ) -> None:
        limits = limits or TransferLimits()
        self._effects: list[Effect] = []
        self._last_session = 0
        emit = self._effects.append
        self.sink = Sink(
            block_bytes=block_bytes, verify=verify, limits=limits, emit=emit, next_session=self.next_session
        )
        self.source = Source(block_bytes=block_bytes, pins=pins, limits=limits, emit=emit)

    def next_session(self) -> SessionId:
        """A name for a stream that a peer has opened."""
        self._last_session += 1
        return SessionId(self._last_session)

    # ---- the node ----

    def start_pull(self, spec: PullSpec, now_s: float) -> list[Effect]:
        self.sink.start(spec, now_s)
        return self._take()

    def abort_pull(self, transfer_id: TransferId, reason: str, now_s: float) -> list[Effect]:
        self.sink.abort(transfer_id, reason, now_s)
        return self._take()

    def on_ready(self, hashes: Iterable[BlockHash], now_s: float) -> list[Effect]:
        self.source.on_ready(hashes, now_s)
        return self._take()

    def hand_over(self, attempt_id: AttemptId, tail: Tail, now_s: float) -> list[Effect]:
        self.source.hand_over(attempt_id, tail, now_s)
        return self._take()

    def withdraw(self, attempt_id: AttemptId, now_s: float) -> list[Effect]:
        self.source.withdraw(attempt_id, now_s)
        return self._take()

    def tick_due_s(self) -> float:
        """Before this moment `on_tick` would change nothing."""
        return min(self.sink.tick_due_s, self.source.tick_due_s)

    def on_tick(self, now_s: float) -> list[Effect]:
        self.sink.on_tick(now_s)
        self.source.on_tick(now_s)
        return self._take()

    # ---- streams ----

    def on_open(self, session: SessionId, links: Mapping[Tier, LinkTraits], now_s: float) -> list[Effect]:
        """A dialled stream has passed hello."""
        if self.sink.owns(session):
            self.sink.on_open(session, links, now_s)
        return self._take()

    def on_accepted(self, session: SessionId, node_id: NodeId, epoch: Epoch, now_s: float) -> list[Effect]:
        """A peer's stream has passed hello."""
        self.source.on_accepted(session, node_id, epoch, now_s)
        return self._take()

    def on_lost(self, session: SessionId, error: TransferError, now_s: float) -> list[Effect]:
        """A stream is gone, or was never opened. Its link accepts no new work."""
        if self.sink.owns(session):
            self.sink.on_lost(session, error, now_s)
        elif self.source.owns(session):
            self.source.on_lost(session, now_s)
        return self._take()

    def on_message(self, session: SessionId, message: Message, now_s: float) -> list[Effect]:
        if self.sink.owns(session):
            self.sink.on_message(session, message, now_s)
        elif self.source.owns(session):
            self.source.on_message(session, message, now_s)
        return self._take()

    # ---- jobs ----

    def on_received(self, batch: int, error: TransferError | None, now_s: float) -> list[Effect]:
        self.sink.on_received(batch, error, now_s)
        return self._take()

    def on_transmitted(self, session: SessionId, batch: int, error: TransferError | None, now_s: float) -> list[Effect]:
        self.source.on_transmitted(session, batch, error, now_s)
        return self._take()

    def on_hashed(
        self, session: SessionId, transfer_id: TransferId, checksums: Mapping[int, int], now_s: float
    ) -> list[Effect]:
        self.source.on_hashed(session, transfer_id, checksums, now_s)
        return self._take()

    # ---- state ----

    @property
    def quiescent(self) -> bool:
        """Nothing is being pulled here or from here, and nothing is granted."""
        return self.sink.num_pulls == 0 and self.source.num_serves == 0

    def counts(self) -> Counter[str]:
        return self.sink.counts + self.source.counts

    def check_invariants(self) -> None:
        self.sink.check_invariants()
        self.source.check_invariants()

    def _take(self) -> list[Effect]:
        effects = self._effects[:]
        self._effects.clear()
        return effects
