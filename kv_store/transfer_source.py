"""Pure: the sending half of a node's transfers: what is pinned and granted for whom, and when it is released.

A granted slot is held until the sink has acknowledged it, or has acknowledged the abort, or its stream is gone; and
never while this node itself still hashes or sends it. The slot's header carries the grant's stamp and is zeroed before
the pin is released, so a reader that checks the header after its copy cannot accept bytes of a later content.

A pull with `wait` belongs to an attempt that prefills (or will prefill) here: `hand_over` ends its list, `withdraw`
aborts it; either may be called before the pull is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from halfmoon.errors import TransferError
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, TransferId
from kv_store import transfer_values as tv
from kv_store.transfer_attempts import Attempts, Tail
from kv_store.transfer_grants import GrantBook
from kv_store.transfer_serves import Serve, ServeKey, SourceSession
from kv_store.transfer_values import CopyPins, SessionId, TransferLimits

UNNOTICED_SENDS = 2
"""Times the credits of a pair: the peer has a batch, and gives its next credit, before this side is told that its send
is over. A busy process may be told of all of them late."""


class Source:
    """The pulls out of one node. Every public method may emit effects; none blocks."""

    def __init__(
        self, *, block_bytes: int, pins: CopyPins, limits: TransferLimits, emit: Callable[[tv.Effect], None]
    ) -> None:
        self._block_bytes = block_bytes
        self._book = GrantBook(pins=pins, emit=emit)
        self._attempts = Attempts(limits=limits, emit=emit)
        self._limits = limits
        self._emit = emit
        self._sessions: dict[SessionId, SourceSession] = {}
        self._serves: dict[ServeKey, Serve] = {}
        self._transmits: dict[tuple[SessionId, int], tuple[Serve, tuple[int, ...]]] = {}
        self.tick_due_s = -math.inf  # before then, `on_tick` has nothing to do
        self.counts: Counter[str] = Counter()

    # ---- the node says ----

    def on_ready(self, hashes: Iterable[BlockHash], now_s: float) -> None:
        """These blocks have just been committed: grant them to the pulls that wait for them."""
        for key, indices in self._book.waiting_for(hashes).items():
            serve = self._serves[key]
            self._offer(serve, [i for i in indices if self._book.pin(serve, serve.open_wants[i])])

    def hand_over(self, attempt_id: AttemptId, tail: Tail, now_s: float) -> None:
        """The attempt's last chunk has ended. Emits HandedOver when its puller has acknowledged everything."""
        for key in self._attempts.hand_over(attempt_id, tail, now_s):
            self._end_list(self._serves[key], now_s)
        self.tick_due_s = min(self.tick_due_s, now_s + self._limits.hold_s)
        self._settle(attempt_id, now_s)

    def withdraw(self, attempt_id: AttemptId, now_s: float) -> None:
        """The attempt ends without a hand-over. Emits Withdrawn when no peer can read its slots any more."""
        for key in self._attempts.withdraw(attempt_id):
            self._give_up(self._serves[key], "the attempt was withdrawn", now_s)
        self._settle(attempt_id, now_s)

    # ---- the stream ----

    def owns(self, session_id: SessionId) -> bool:
        return session_id in self._sessions

    def on_accepted(self, session_id: SessionId, node_id: NodeId, epoch: Epoch, now_s: float) -> None:
        """A peer's stream has passed hello. Its earlier streams, of whatever epoch, are fenced."""
        for old in [s for s in self._sessions.values() if s.node_id == node_id]:
            self.counts["sessions_fenced"] += 1
            self._hang_up(old, "fenced by a newer stream of the same node", now_s)
        if len(self._sessions) >= self._limits.sessions_max:
            idle = [s for s in self._sessions.values() if not s.serves]
            if not idle:
                self.counts["sessions_refused"] += 1
                self._emit(tv.Hangup(session=session_id, reason=f"{len(self._sessions)} peers read here, the limit"))
                return
            self._hang_up(min(idle, key=lambda s: s.heard_s), "closed: idle", now_s)
        self._sessions[session_id] = SourceSession(session=session_id, node_id=node_id, epoch=epoch, heard_s=now_s)

    def on_lost(self, session_id: SessionId, now_s: float) -> None:
        """The stream is gone, and its link is destroyed."""
        session = self._sessions.pop(session_id)
        for serve in list(session.serves.values()):
            self._stop(serve)
            serve.released = True
            self._release_if_quiescent(serve, now_s)

    def on_message(self, session_id: SessionId, message: tv.Message, now_s: float) -> None:
        session = self._sessions[session_id]
        session.heard_s = now_s
        match message:
            case tv.Ping():
                self._tell(session_id, tv.Pong())
            case tv.Pong():
                pass
            case tv.Pull():
                self._on_pull(session, message, now_s)
            case tv.Go():
                self._on_go(session, message, now_s)
            case tv.Ack():
                self._on_ack(session, message, now_s)
            case tv.Abort():
                self._on_abort(session, message, now_s)
            case tv.Aborted():
                self._on_aborted(session, message, now_s)
            case _:
                self.counts["messages_unexpected"] += 1

    def on_hashed(
        self, session_id: SessionId, transfer_id: TransferId, checksums: Mapping[int, int], now_s: float
    ) -> None:
        """Checksums by index, for every item of one Hash effect."""
        serve = self._serves[session_id, transfer_id]
        self._book.remember_checksums(serve, checksums)
        if serve.ending:
            self._release_if_quiescent(serve, now_s)
        else:
            self._grant(serve, list(checksums))

    def on_transmitted(self, session_id: SessionId, batch: int, error: TransferError | None, now_s: float) -> None:
        """This node's sends of a batch are over, well or not."""
        serve, indices = self._transmits.pop((session_id, batch))
        if session_id in self._sessions:
            self._sessions[session_id].num_sending -= 1
        serve.sent(indices)
        if error is not None:
            self.counts[f"sends_failed_{type(error).__name__}"] += 1
            self._give_up(serve, str(error), now_s)
        self._release_acked(serve, indices, now_s)
        self._release_if_quiescent(serve, now_s)

    def on_tick(self, now_s: float) -> None:
        if now_s < self.tick_due_s:
            return
        for serve in list(self._serves.values()):
            if not serve.ending and now_s >= serve.deadline_s:
                self._expire(serve, now_s)
            elif serve.ending and not serve.released and now_s >= serve.abort_by_s:
                self._hang_up(self._sessions[serve.session], "the peer did not acknowledge an abort", now_s)
        self._attempts.on_tick(now_s)
        for attempt_id in self._attempts.stuck(now_s):
            self.withdraw(attempt_id, now_s)
        for session in list(self._sessions.values()):
            self._check_liveness(session, now_s)
        silence_s = self._limits.silence_s_max
        self.tick_due_s = min([self._attempts.due_s(), *(s.due_s(silence_s) for s in self._sessions.values())])

    # ---- state ----

    @property
    def num_serves(self) -> int:
        return len(self._serves)

    @property
    def num_grants(self) -> int:
        return self._book.num_grants

    def check_deadlines(self, now_s: float) -> None:
        """Assert that no grant was left standing past its deadline, as of a moment that every tick has seen."""
        for serve in self._serves.values():
            assert serve.ending or now_s <= serve.deadline_s, f"{serve.key}: granted past its deadline"

    def check_invariants(self) -> None:
        self._book.check_invariants(self._serves.values())
        self._attempts.check_invariants(set(self._serves))
        assert not any(serve.complete for serve in self._serves.values())

    # ---- pulls ----

    def _on_pull(self, session: SourceSession, pull: tv.Pull, now_s: float) -> None:
        if pull.transfer_id in session.serves:
            self.counts["messages_duplicate"] += 1
            return
        if (refusal := self._refusal(pull)) is not None:
            self.counts["pulls_refused"] += 1
            self._tell(session.session, tv.Abort(transfer_id=pull.transfer_id, reason=refusal))
            return
        serve = Serve(
            session=session.session,
            pull=pull,
            deadline_s=now_s + pull.deadline_s + self._limits.grace_s,
            open_wants={want.index: want for want in pull.wants},
        )
        self._serves[serve.key] = session.serves[pull.transfer_id] = serve
        self.tick_due_s = min(self.tick_due_s, serve.deadline_s, now_s + self._limits.silence_s_max)
        self._book.await_all(serve)
        self._begin(serve, now_s)

    def _refusal(self, pull: tv.Pull) -> str | None:
        if len(self._serves) >= self._limits.serves_max:
            return f"{len(self._serves)} pulls are being served, the limit"
        if len(pull.wants) > self._limits.wants_max:
            return f"{len(pull.wants)} blocks wanted, limit {self._limits.wants_max}"
        if pull.wait and self._attempts.was_withdrawn(pull.attempt_id):
            return "the attempt was withdrawn"
        hashes = [want.block_hash for want in pull.wants if want.block_hash is not None]
        if len({want.index for want in pull.wants}) < len(pull.wants) or len(set(hashes)) < len(hashes):
            return "a block is wanted twice"
        return None

    def _begin(self, serve: Serve, now_s: float) -> None:
        ready = [w.index for w in list(serve.open_wants.values()) if self._book.pin(serve, w)]
        if not serve.pull.wait:
            self._offer(serve, ready)
            self._end_list(serve, now_s)
            return
        handed_over = self._attempts.attach(serve)
        self._offer(serve, ready)
        if handed_over:
            self._end_list(serve, now_s)
        self._finish_if_complete(serve, now_s)

    def _end_list(self, serve: Serve, now_s: float) -> None:
        """Nothing more will become ready: grant the tail and what is here; the rest is missing."""
        if serve.ending or serve.done_told:
            return
        serve.done_told = True
        self._tell(serve.session, tv.SourceDone(transfer_id=serve.pull.transfer_id))
        wants = list(serve.open_wants.values())
        self._offer(serve, [w.index for w in wants if self._book.pin(serve, w) or self._hold_tail(serve, w)])
        missing = tuple(serve.open_wants)
        for index in missing:
            self._book.forget_want(serve, index)
        if missing:
            self._tell(serve.session, tv.Missing(transfer_id=serve.pull.transfer_id, indices=missing))
        self._finish_if_complete(serve, now_s)

    def _hold_tail(self, serve: Serve, want: tv.Wanted) -> bool:
        tail = self._attempts.tail_of(serve.pull.attempt_id) if serve.pull.wait else None
        if want.block_hash is not None or tail is None:
            return False
        if want.index != tail.index or not 0 < want.num_tokens <= tail.num_tokens:
            return False
        self._book.hold_tail(serve, want, tail.slot)
        return True

    def _offer(self, serve: Serve, indices: Sequence[int]) -> None:
        """Grant held blocks, after their checksums are known if the sink wants to verify."""
        if not serve.pull.verify:
            self._grant(serve, indices)
            return
        known = [i for i in indices if self._book.recall_checksum(serve.held[i])]
        self._grant(serve, known)
        to_hash = [i for i in indices if serve.held[i].checksum is None]
        for start in range(0, len(to_hash), self._limits.hash_blocks_max):
            items = to_hash[start : start + self._limits.hash_blocks_max]
            for index in items:
                serve.held[index].hashing = True
            named = tuple((i, serve.held[i].tier, serve.held[i].slot) for i in items)
            self._emit(tv.Hash(session=serve.session, transfer_id=serve.pull.transfer_id, items=named))

    def _grant(self, serve: Serve, indices: Sequence[int]) -> None:
        if not indices:
            return
        grants = []
        for index in indices:
            held = serve.held[index]
            held.granted = True
            grants.append(tv.Grant(index, held.tier, held.slot, held.stamp, held.checksum, self._block_bytes))
        self._tell(serve.session, tv.Granted(transfer_id=serve.pull.transfer_id, grants=tuple(grants)))

    # ---- what the sink answers ----

    def _on_go(self, session: SourceSession, message: tv.Go, now_s: float) -> None:
        serve = session.serves.get(message.transfer_id)
        if serve is None or serve.ending:
            self.counts["messages_stray"] += 1  # the sink's receive ends with its timeout or with our abort
            return
        held = [serve.held.get(index) for index in message.indices]
        over = session.num_sending >= UNNOTICED_SENDS * self._limits.batches_per_session_max
        if over or (session.session, message.batch) in self._transmits or not held:
            self._give_up(serve, "more GO credits than agreed", now_s)
            return
        pieces = []
        for index, one in zip(message.indices, held, strict=True):
            if one is None or not one.granted or one.acked:
                self._give_up(serve, f"GO for block {index}, which is not granted", now_s)
                return
            pieces.append(tv.Piece(index=index, slot=one.slot, stamp=one.stamp, checksum=one.checksum))
        self._transmit(session, serve, message, pieces, now_s)

    def _transmit(
        self, session: SourceSession, serve: Serve, message: tv.Go, pieces: Sequence[tv.Piece], now_s: float
    ) -> None:
        serve.send(message.indices)
        session.num_sending += 1
        self._transmits[session.session, message.batch] = (serve, message.indices)
        batch = tv.Batch(
            batch=message.batch,
            transfer_id=message.transfer_id,
            tier=serve.held[pieces[0].index].tier,
            group=message.group,
            pieces=tuple(pieces),
        )
        left_s, stall_s = max(0.0, serve.deadline_s - now_s), self._limits.link_timeout_s
        self._emit(tv.Transmit(session=session.session, batch=batch, timeout_s=left_s, stall_s=stall_s))

    def _on_ack(self, session: SourceSession, message: tv.Ack, now_s: float) -> None:
        serve = session.serves.get(message.transfer_id)
        if serve is None:
            self.counts["messages_stray"] += 1
            return
        indices = serve.acknowledge(message.indices)
        if serve.pull.wait:
            self._attempts.on_moved(serve.pull.attempt_id, now_s)
        self._release_acked(serve, indices, now_s)

    def _release_acked(self, serve: Serve, indices: Iterable[int], now_s: float) -> None:
        for index in indices:
            held = serve.held.get(index)
            if held is not None and held.acked and not held.sending:
                self._book.release(serve, index)
        self._finish_if_complete(serve, now_s)

    def _on_abort(self, session: SourceSession, message: tv.Abort, now_s: float) -> None:
        serve = session.serves.get(message.transfer_id)
        if serve is None:
            self._tell(session.session, tv.Aborted(transfer_id=message.transfer_id))
            return
        self._stop(serve)
        serve.released = serve.abort_asked = True
        self._release_if_quiescent(serve, now_s)

    def _on_aborted(self, session: SourceSession, message: tv.Aborted, now_s: float) -> None:
        serve = session.serves.get(message.transfer_id)
        if serve is not None and serve.ending:
            serve.released = True
            self._release_if_quiescent(serve, now_s)

    # ---- ends ----

    def _give_up(self, serve: Serve, reason: str, now_s: float) -> None:
        """Begin the two-way abort."""
        if serve.ending:
            return
        self._stop(serve)
        serve.abort_by_s = now_s + self._limits.abort_timeout_s + serve.read * self._limits.link_timeout_s
        self.tick_due_s = min(self.tick_due_s, serve.abort_by_s)
        self._tell(serve.session, tv.Abort(transfer_id=serve.pull.transfer_id, reason=reason))

    def _stop(self, serve: Serve) -> None:
        """No new grants."""
        serve.ending = True
        for index in list(serve.open_wants):
            self._book.forget_want(serve, index)

    def _expire(self, serve: Serve, now_s: float) -> None:
        self.counts["serves_expired"] += 1
        self._give_up(serve, "the deadline passed at the source", now_s)

    def _release_if_quiescent(self, serve: Serve, now_s: float) -> None:
        if not serve.ending or not serve.released or serve.busy or serve.key not in self._serves:
            return
        for index in list(serve.held):
            self._book.release(serve, index)
        if serve.abort_asked and serve.session in self._sessions:
            self._tell(serve.session, tv.Aborted(transfer_id=serve.pull.transfer_id))
        self._forget(serve, now_s)

    def _finish_if_complete(self, serve: Serve, now_s: float) -> None:
        if not serve.complete or serve.key not in self._serves:
            return
        if serve.pull.wait:
            self._attempts.on_acked(serve.pull.attempt_id)
        self._forget(serve, now_s)

    def _forget(self, serve: Serve, now_s: float) -> None:
        assert not serve.held
        assert not serve.open_wants
        del self._serves[serve.key]
        if serve.session in self._sessions:
            del self._sessions[serve.session].serves[serve.pull.transfer_id]
        if serve.pull.wait:
            self._attempts.detach(serve)
            self._settle(serve.pull.attempt_id, now_s)

    def _settle(self, attempt_id: AttemptId, now_s: float) -> None:
        for key in self._attempts.settle(attempt_id):
            self._give_up(self._serves[key], "another pull of this attempt was handed over", now_s)

    # ---- time ----

    def _check_liveness(self, session: SourceSession, now_s: float) -> None:
        if session.serves and now_s - session.heard_s > self._limits.silence_s_max:
            self._hang_up(session, "the peer has been silent for too long", now_s)

    def _hang_up(self, session: SourceSession, reason: str, now_s: float) -> None:
        if session.session in self._sessions:
            self._emit(tv.Hangup(session=session.session, reason=reason))
            self.on_lost(session.session, now_s)

    def _tell(self, session_id: SessionId, message: tv.Message) -> None:
        self._emit(tv.Tell(session=session_id, message=message))
