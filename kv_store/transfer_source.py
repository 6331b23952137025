"""Pure: the sending half of a node's transfers: what is pinned and granted for whom, and when it is released.

A granted slot is held until the sink has acknowledged it, or has acknowledged the abort, or its stream is gone; and
never while this node itself still hashes or sends it. The slot's header carries the grant's stamp and is zeroed before
the pin is released, so a reader that checks the header after its copy cannot accept bytes of a later content.

A pull with `wait` belongs to an attempt that prefills (or will prefill) here: `hand_over` ends its list, `withdraw`
aborts it; either may be called before the pull is known.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from halfmoon.errors import TransferError
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, Tier, TransferId
from kv_store.transfer_values import (
    Abort,
    Aborted,
    Ack,
    Batch,
    CopyPins,
    Effect,
    Go,
    Grant,
    Granted,
    HandedOver,
    Hangup,
    Hash,
    Message,
    Missing,
    Piece,
    Ping,
    Pong,
    Pull,
    SessionId,
    SourceDone,
    Stamp,
    Tell,
    TransferLimits,
    Transmit,
    Wanted,
    Withdrawn,
)
from kv_store.values import Place


class _Outcome(enum.Enum):
    HANDED = "handed"
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The attempt's partial last block; num_tokens 0: it has none."""

    index: int
    slot: int
    num_tokens: int


@dataclass(kw_only=True)
class _Held:
    """One block of one pull that this node has pinned. `place` None: the attempt's tail, held by the attempt."""

    tier: Tier
    slot: int
    stamp: int
    place: Place | None
    checksum: int | None = None
    granted: bool = False
    hashing: bool = False
    sending: int = 0
    acked: bool = False


@dataclass(kw_only=True)
class _Serve:
    """One pull out of this node."""

    session: SessionId
    pull: Pull
    deadline_s: float
    open_wants: dict[int, Wanted]  # neither held nor missing yet
    held: dict[int, _Held] = field(default_factory=dict)
    done_told: bool = False
    ending: bool = False
    released: bool = False  # the sink reads nothing any more: acknowledged, or its stream is gone
    abort_asked: bool = False  # the sink waits for our Aborted
    abort_by_s: float = 0.0

    @property
    def key(self) -> tuple[SessionId, TransferId]:
        return self.session, self.pull.transfer_id

    @property
    def holder(self) -> str:
        return f"{self.pull.transfer_id}@{self.session}"

    @property
    def complete(self) -> bool:
        """The sink has everything that it asked for, but for what is missing."""
        return not self.ending and not self.open_wants and not self.held

    @property
    def busy(self) -> bool:
        return any(h.hashing or h.sending for h in self.held.values())


@dataclass(kw_only=True)
class _Attempt:
    """What is known here about an attempt that peers pull from, in whichever order pulls and the machine speak.

    acked: a puller has everything that it asked for. expires_s: when a record without an outcome is forgotten.
    """

    tail: Tail | None = None
    outcome: _Outcome | None = None
    acked: bool = False
    expires_s: float = 0.0
    serves: set[tuple[SessionId, TransferId]] = field(default_factory=set)


@dataclass(kw_only=True)
class _Session:
    session: SessionId
    node_id: NodeId
    epoch: Epoch
    heard_s: float
    pinged_s: float
    serves: dict[TransferId, _Serve] = field(default_factory=dict)
    num_sending: int = 0


class Source:
    """The pulls out of one node. Every public method may emit effects; none blocks."""

    def __init__(
        self, *, block_bytes: int, pins: CopyPins, limits: TransferLimits, emit: Callable[[Effect], None]
    ) -> None:
        self._block_bytes = block_bytes
        self._pins = pins
        self._limits = limits
        self._emit = emit
        self._sessions: dict[SessionId, _Session] = {}
        self._serves: dict[tuple[SessionId, TransferId], _Serve] = {}
        self._attempts: dict[AttemptId, _Attempt] = {}
        self._withdrawn: OrderedDict[AttemptId, None] = OrderedDict()
        self._waiting: dict[BlockHash, dict[tuple[SessionId, TransferId], int]] = {}
        self._stamps: dict[tuple[Tier, int], tuple[int, int]] = {}  # granted slot -> (stamp, number of grants)
        self._last_stamp = 0
        self._checksums: dict[tuple[Tier, int], tuple[int, int]] = {}  # slot -> (generation, checksum)
        self._transmits: dict[tuple[SessionId, int], tuple[_Serve, tuple[int, ...]]] = {}
        self.counts: Counter[str] = Counter()

    # ---- the node says ----

    def on_ready(self, hashes: Iterable[BlockHash], now_s: float) -> None:
        """These blocks have just been committed: grant them to the pulls that wait for them."""
        found: dict[tuple[SessionId, TransferId], list[int]] = {}
        for block_hash in hashes:
            for key, index in self._waiting.get(block_hash, {}).items():
                found.setdefault(key, []).append(index)
        for key, indices in found.items():
            serve = self._serves[key]
            self._offer(serve, [i for i in indices if self._pin(serve, serve.open_wants[i])])

    def hand_over(self, attempt_id: AttemptId, tail: Tail, now_s: float) -> None:
        """The attempt's last chunk has ended. Emits HandedOver when its puller has acknowledged everything."""
        attempt = self._attempts.setdefault(attempt_id, _Attempt())
        assert attempt.outcome is None, f"{attempt_id} has ended here already"
        attempt.tail, attempt.outcome = tail, _Outcome.HANDED
        for key in list(attempt.serves):
            self._end_list(self._serves[key], now_s)
        self._settle(attempt_id, now_s)

    def withdraw(self, attempt_id: AttemptId, now_s: float) -> None:
        """The attempt ends without a hand-over. Emits Withdrawn when no peer can read its slots any more."""
        attempt = self._attempts.setdefault(attempt_id, _Attempt())
        attempt.outcome = _Outcome.WITHDRAWN
        self._withdrawn[attempt_id] = None
        while len(self._withdrawn) > self._limits.ended_max:
            self._withdrawn.popitem(last=False)
        for key in list(attempt.serves):
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
                self._emit(Hangup(session=session_id, reason=f"{len(self._sessions)} peers read here, the limit"))
                return
            self._hang_up(min(idle, key=lambda s: s.heard_s), "closed: idle", now_s)
        self._sessions[session_id] = _Session(
            session=session_id, node_id=node_id, epoch=epoch, heard_s=now_s, pinged_s=now_s
        )

    def on_lost(self, session_id: SessionId, now_s: float) -> None:
        """The stream is gone, and its link is destroyed."""
        session = self._sessions.pop(session_id)
        for serve in list(session.serves.values()):
            self._stop(serve)
            serve.released = True
            self._release_if_quiescent(serve, now_s)

    def on_message(self, session_id: SessionId, message: Message, now_s: float) -> None:
        session = self._sessions[session_id]
        session.heard_s = now_s
        match message:
            case Ping():
                self._tell(session_id, Pong())
            case Pong():
                pass
            case Pull():
                self._on_pull(session, message, now_s)
            case Go():
                self._on_go(session, message, now_s)
            case Ack():
                self._on_ack(session, message, now_s)
            case Abort():
                self._on_abort(session, message, now_s)
            case Aborted():
                self._on_aborted(session, message, now_s)
            case _:
                self.counts["messages_unexpected"] += 1

    def on_hashed(
        self, session_id: SessionId, transfer_id: TransferId, checksums: Mapping[int, int], now_s: float
    ) -> None:
        """Checksums by index, for every item of one Hash effect."""
        serve = self._serves[session_id, transfer_id]
        for index, checksum in checksums.items():
            held = serve.held[index]
            held.hashing, held.checksum = False, checksum
            if held.place is not None:
                self._checksums[held.tier, held.slot] = (held.place.generation, checksum)
        if serve.ending:
            self._release_if_quiescent(serve, now_s)
        else:
            self._grant(serve, list(checksums))

    def on_transmitted(self, session_id: SessionId, batch: int, error: TransferError | None, now_s: float) -> None:
        """This node's sends of a batch are over, well or not."""
        serve, indices = self._transmits.pop((session_id, batch))
        if session_id in self._sessions:
            self._sessions[session_id].num_sending -= 1
        for index in indices:
            serve.held[index].sending -= 1
        if error is not None:
            self.counts[f"sends_failed_{type(error).__name__}"] += 1
            self._give_up(serve, str(error), now_s)
        self._release_acked(serve, indices, now_s)
        self._release_if_quiescent(serve, now_s)

    def on_tick(self, now_s: float) -> None:
        for serve in list(self._serves.values()):
            if not serve.ending and now_s >= serve.deadline_s:
                self._expire(serve, now_s)
            elif serve.ending and not serve.released and now_s >= serve.abort_by_s:
                self._hang_up(self._sessions[serve.session], "the peer did not acknowledge an abort", now_s)
        for attempt_id, attempt in list(self._attempts.items()):
            if attempt.outcome is None and not attempt.serves and now_s >= attempt.expires_s:
                del self._attempts[attempt_id]
        for session in list(self._sessions.values()):
            self._check_liveness(session, now_s)

    # ---- state ----

    @property
    def num_serves(self) -> int:
        return len(self._serves)

    @property
    def num_grants(self) -> int:
        return sum(count for _, count in self._stamps.values())

    def check_invariants(self) -> None:
        grants = Counter((h.tier, h.slot) for s in self._serves.values() for h in s.held.values())
        assert grants == {slot: count for slot, (_, count) in self._stamps.items()}
        waiting = {(h, key) for h, keys in self._waiting.items() for key in keys}
        wanted = {(w.block_hash, s.key) for s in self._serves.values() for w in s.open_wants.values() if w.block_hash}
        assert waiting == wanted
        assert all(key in self._serves for a in self._attempts.values() for key in a.serves)
        assert all(a.serves or a.acked or a.outcome is not None for a in self._attempts.values())
        assert not any(serve.complete for serve in self._serves.values())

    # ---- pulls ----

    def _on_pull(self, session: _Session, pull: Pull, now_s: float) -> None:
        if pull.transfer_id in session.serves:
            self.counts["messages_duplicate"] += 1
            return
        if (refusal := self._refusal(pull)) is not None:
            self.counts["pulls_refused"] += 1
            self._tell(session.session, Abort(transfer_id=pull.transfer_id, reason=refusal))
            return
        serve = _Serve(
            session=session.session,
            pull=pull,
            deadline_s=now_s + pull.deadline_s + self._limits.grace_s,
            open_wants={want.index: want for want in pull.wants},
        )
        self._serves[serve.key] = session.serves[pull.transfer_id] = serve
        for want in pull.wants:
            if want.block_hash is not None:
                self._waiting.setdefault(want.block_hash, {})[serve.key] = want.index
        self._begin(serve, now_s)

    def _refusal(self, pull: Pull) -> str | None:
        if len(self._serves) >= self._limits.serves_max:
            return f"{len(self._serves)} pulls are being served, the limit"
        if len(pull.wants) > self._limits.wants_max:
            return f"{len(pull.wants)} blocks wanted, limit {self._limits.wants_max}"
        if pull.wait and pull.attempt_id in self._withdrawn:
            return "the attempt was withdrawn"
        hashes = [want.block_hash for want in pull.wants if want.block_hash is not None]
        if len({want.index for want in pull.wants}) < len(pull.wants) or len(set(hashes)) < len(hashes):
            return "a block is wanted twice"
        return None

    def _begin(self, serve: _Serve, now_s: float) -> None:
        ready = [w.index for w in list(serve.open_wants.values()) if self._pin(serve, w)]
        if not serve.pull.wait:
            self._offer(serve, ready)
            self._end_list(serve, now_s)
            return
        attempt = self._attempts.setdefault(serve.pull.attempt_id, _Attempt())
        attempt.serves.add(serve.key)
        attempt.expires_s = max(attempt.expires_s, serve.deadline_s)
        self._offer(serve, ready)
        if attempt.outcome is _Outcome.HANDED:
            self._end_list(serve, now_s)
        self._finish_if_complete(serve, now_s)

    def _end_list(self, serve: _Serve, now_s: float) -> None:
        """Nothing more will become ready: grant the tail and what is here; the rest is missing."""
        if serve.ending or serve.done_told:
            return
        serve.done_told = True
        self._tell(serve.session, SourceDone(transfer_id=serve.pull.transfer_id))
        wants = list(serve.open_wants.values())
        self._offer(serve, [w.index for w in wants if self._pin(serve, w) or self._hold_tail(serve, w)])
        missing = tuple(serve.open_wants)
        for index in missing:
            self._forget_want(serve, index)
        if missing:
            self._tell(serve.session, Missing(transfer_id=serve.pull.transfer_id, indices=missing))
        self._finish_if_complete(serve, now_s)

    def _pin(self, serve: _Serve, want: Wanted) -> bool:
        """Hold a ready copy of the block for this pull; False when there is none."""
        if want.block_hash is None:
            return False
        place = self._pins.pin_copy(want.block_hash, serve.holder)
        if place is None:
            return False
        self._hold(serve, want.index, place.tier, place.slot, place)
        return True

    def _hold_tail(self, serve: _Serve, want: Wanted) -> bool:
        attempt = self._attempts.get(serve.pull.attempt_id) if serve.pull.wait else None
        tail = None if attempt is None else attempt.tail
        if want.block_hash is not None or tail is None:
            return False
        if want.index != tail.index or not 0 < want.num_tokens <= tail.num_tokens:
            return False
        self._hold(serve, want.index, Tier.DEVICE, tail.slot, None)
        return True

    def _hold(self, serve: _Serve, index: int, tier: Tier, slot: int, place: Place | None) -> None:
        stamp, count = self._stamps.get((tier, slot), (0, 0))
        if count == 0:
            self._last_stamp += 1
            stamp = self._last_stamp
            self._emit(Stamp(tier=tier, slot=slot, stamp=stamp))
        self._stamps[tier, slot] = (stamp, count + 1)
        serve.held[index] = _Held(tier=tier, slot=slot, stamp=stamp, place=place)
        self._forget_want(serve, index)

    def _forget_want(self, serve: _Serve, index: int) -> None:
        want = serve.open_wants.pop(index)
        if want.block_hash is not None:
            keys = self._waiting[want.block_hash]
            del keys[serve.key]
            if not keys:
                del self._waiting[want.block_hash]

    def _offer(self, serve: _Serve, indices: Sequence[int]) -> None:
        """Grant held blocks, after their checksums are known if the sink wants to verify."""
        if not serve.pull.verify:
            self._grant(serve, indices)
            return
        known = [i for i in indices if self._recall_checksum(serve.held[i])]
        self._grant(serve, known)
        to_hash = [i for i in indices if serve.held[i].checksum is None]
        for start in range(0, len(to_hash), self._limits.hash_blocks_max):
            items = to_hash[start : start + self._limits.hash_blocks_max]
            for index in items:
                serve.held[index].hashing = True
            self._emit(
                Hash(
                    session=serve.session,
                    transfer_id=serve.pull.transfer_id,
                    items=tuple((i, serve.held[i].tier, serve.held[i].slot) for i in items),
                )
            )

    def _recall_checksum(self, held: _Held) -> bool:
        generation, checksum = self._checksums.get((held.tier, held.slot), (None, None))
        if held.place is None or generation != held.place.generation:
            return False
        held.checksum = checksum
        return True

    def _grant(self, serve: _Serve, indices: Sequence[int]) -> None:
        if not indices:
            return
        grants = []
        for index in indices:
            held = serve.held[index]
            held.granted = True
            grants.append(
                Grant(
                    index=index,
                    tier=held.tier,
                    slot=held.slot,
                    stamp=held.stamp,
                    checksum=held.checksum,
                    num_bytes=self._block_bytes,
                )
            )
        self._tell(serve.session, Granted(transfer_id=serve.pull.transfer_id, grants=tuple(grants)))

    # ---- what the sink answers ----

    def _on_go(self, session: _Session, message: Go, now_s: float) -> None:
        serve = session.serves.get(message.transfer_id)
        if serve is None or serve.ending:
            self.counts["messages_stray"] += 1  # the sink's receive ends with its timeout or with our abort
            return
        held = [serve.held.get(index) for index in message.indices]
        over = session.num_sending >= self._limits.batches_per_session_max
        if over or (session.session, message.batch) in self._transmits or not held:
            self._give_up(serve, "more GO credits than agreed", now_s)
            return
        pieces = []
        for index, one in zip(message.indices, held, strict=True):
            if one is None or not one.granted or one.acked:
                self._give_up(serve, f"GO for block {index}, which is not granted", now_s)
                return
            pieces.append(Piece(index=index, slot=one.slot, stamp=one.stamp, checksum=one.checksum))
        self._transmit(session, serve, message, pieces, now_s)

    def _transmit(self, session: _Session, serve: _Serve, message: Go, pieces: Sequence[Piece], now_s: float) -> None:
        for piece in pieces:
            serve.held[piece.index].sending += 1
        session.num_sending += 1
        self._transmits[session.session, message.batch] = (serve, message.indices)
        batch = Batch(
            batch=message.batch,
            transfer_id=message.transfer_id,
            tier=serve.held[pieces[0].index].tier,
            group=message.group,
            pieces=tuple(pieces),
        )
        timeout_s = min(self._limits.link_timeout_s, max(0.0, serve.deadline_s - now_s))
        self._emit(Transmit(session=session.session, batch=batch, timeout_s=timeout_s))

    def _on_ack(self, session: _Session, message: Ack, now_s: float) -> None:
        serve = session.serves.get(message.transfer_id)
        if serve is None:
            self.counts["messages_stray"] += 1
            return
        indices = [i for i in message.indices if i in serve.held and serve.held[i].granted]
        for index in indices:
            serve.held[index].acked = True
        self._release_acked(serve, indices, now_s)

    def _release_acked(self, serve: _Serve, indices: Iterable[int], now_s: float) -> None:
        for index in indices:
            held = serve.held.get(index)
            if held is not None and held.acked and not held.sending:
                self._release(serve, index)
        self._finish_if_complete(serve, now_s)

    def _on_abort(self, session: _Session, message: Abort, now_s: float) -> None:
        serve = session.serves.get(message.transfer_id)
        if serve is None:
            self._tell(session.session, Aborted(transfer_id=message.transfer_id))
            return
        self._stop(serve)
        serve.released = serve.abort_asked = True
        self._release_if_quiescent(serve, now_s)

    def _on_aborted(self, session: _Session, message: Aborted, now_s: float) -> None:
        serve = session.serves.get(message.transfer_id)
        if serve is not None and serve.ending:
            serve.released = True
            self._release_if_quiescent(serve, now_s)

    # ---- ends ----

    def _give_up(self, serve: _Serve, reason: str, now_s: float) -> None:
        """Begin the two-way abort."""
        if serve.ending:
            return
        self._stop(serve)
        serve.abort_by_s = now_s + self._limits.abort_timeout_s
        self._tell(serve.session, Abort(transfer_id=serve.pull.transfer_id, reason=reason))

    def _stop(self, serve: _Serve) -> None:
        """No new grants."""
        serve.ending = True
        for index in list(serve.open_wants):
            self._forget_want(serve, index)

    def _expire(self, serve: _Serve, now_s: float) -> None:
        self.counts["serves_expired"] += 1
        self._give_up(serve, "the deadline passed at the source", now_s)

    def _release(self, serve: _Serve, index: int) -> None:
        """Let one held block go: the header first, the pin after it."""
        held = serve.held.pop(index)
        assert not held.hashing
        assert not held.sending
        stamp, count = self._stamps.pop((held.tier, held.slot))
        if count > 1:
            self._stamps[held.tier, held.slot] = (stamp, count - 1)
        else:
            self._emit(Stamp(tier=held.tier, slot=held.slot, stamp=0))
        if held.place is not None:
            self._pins.unpin_copy(held.place, serve.holder)

    def _release_if_quiescent(self, serve: _Serve, now_s: float) -> None:
        if not serve.ending or not serve.released or serve.busy or serve.key not in self._serves:
            return
        for index in list(serve.held):
            self._release(serve, index)
        if serve.abort_asked and serve.session in self._sessions:
            self._tell(serve.session, Aborted(transfer_id=serve.pull.transfer_id))
        self._forget(serve, now_s)

    def _finish_if_complete(self, serve: _Serve, now_s: float) -> None:
        """The last acknowledgement; it may come before the attempt's hand-over, and is remembered for it."""
        if not serve.complete or serve.key not in self._serves:
            return
        if serve.pull.wait:
            self._attempts[serve.pull.attempt_id].acked = True
        self._forget(serve, now_s)

    def _forget(self, serve: _Serve, now_s: float) -> None:
        assert not serve.held
        assert not serve.open_wants
        del self._serves[serve.key]
        if serve.session in self._sessions:
            del self._sessions[serve.session].serves[serve.pull.transfer_id]
        attempt_id = serve.pull.attempt_id
        if serve.pull.wait and attempt_id in self._attempts:
            self._attempts[attempt_id].serves.discard(serve.key)
            self._settle(attempt_id, now_s)

    def _settle(self, attempt_id: AttemptId, now_s: float) -> None:
        """Say how the attempt ended here, once nobody reads from it."""
        attempt = self._attempts.get(attempt_id)
        if attempt is None:
            return
        if attempt.outcome is _Outcome.HANDED and attempt.acked:
            for key in list(attempt.serves):
                self._give_up(self._serves[key], "another pull of this attempt was handed over", now_s)
        if attempt.serves or attempt_id not in self._attempts:
            return
        if attempt.outcome is _Outcome.WITHDRAWN:
            del self._attempts[attempt_id]
            self._emit(Withdrawn(attempt_id=attempt_id))
        elif attempt.outcome is None and not attempt.acked:
            del self._attempts[attempt_id]
        elif attempt.outcome is _Outcome.HANDED and attempt.acked:
            del self._attempts[attempt_id]
            self._emit(HandedOver(attempt_id=attempt_id))

    # ---- time ----

    def _check_liveness(self, session: _Session, now_s: float) -> None:
        if session.serves and now_s - session.heard_s > self._limits.silence_s_max:
            self._hang_up(session, "the peer has been silent for too long", now_s)

    def _hang_up(self, session: _Session, reason: str, now_s: float) -> None:
        if session.session in self._sessions:
            self._emit(Hangup(session=session.session, reason=reason))
            self.on_lost(session.session, now_s)

    def _tell(self, session_id: SessionId, message: Message) -> None:
        self._emit(Tell(session=session_id, message=message))
