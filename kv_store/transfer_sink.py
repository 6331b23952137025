"""Pure: the receiving half of a node's transfers: pulls, credits, acknowledgements, aborts, deadlines.

A pull's life: queued (no stream yet) -> open (asked) -> ending (given up, quiescence not proven) -> ended. It ends
exactly once, and only when none of its batches is in flight and the source has acknowledged the abort or its stream
(and with it the link) is gone: from then on no byte can be written to its slots.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

from halfmoon.errors import IntegrityError, PeerLost, TransferAborted, TransferError, TransferTimeout
from halfmoon.types import Epoch, NodeId, Tier, TransferId
from kv_store import transfer_values as tv
from kv_store.transfer_pulls import NO_LINK, PullState, SinkSession, overlap
from kv_store.transfer_values import SessionId, TransferLimits
from kv_store.values import PullEnded, PullSpec


class Sink:
    """The pulls into one node. Every public method may emit effects; none blocks."""

    def __init__(
        self,
        *,
        block_bytes: int,
        verify: bool,
        limits: TransferLimits,
        emit: Callable[[tv.Effect], None],
        next_session: Callable[[], SessionId],
    ) -> None:
        self._block_bytes = block_bytes
        self._verify = verify
        self._limits = limits
        self._batch_blocks_max = max(1, limits.batch_bytes_max // block_bytes)
        self._emit = emit
        self._next_session = next_session
        self._sessions: dict[SessionId, SinkSession] = {}
        self._by_peer: dict[tuple[NodeId, Epoch], SessionId] = {}
        self._pulls: dict[TransferId, tuple[PullState, SessionId]] = {}
        self._batches: dict[int, tuple[SessionId, PullState, tv.Batch, float]] = {}  # and when it was posted
        self._batch_id = 0
        self.tick_due_s = math.inf  # before then, `on_tick` has nothing to do
        self.counts: Counter[str] = Counter()

    # ---- the node asks ----

    def start(self, spec: PullSpec, now_s: float) -> None:
        """Begin a pull. Raises ValueError if its transfer id is in use (a caller's bug)."""
        if spec.transfer_id in self._pulls:
            raise ValueError(f"{spec.transfer_id} is a running pull")
        targets = {want.index: want.slot for want in spec.wants}
        assert len(targets) == len(spec.wants), "a pull asks for an index twice"
        pull = PullState(spec=spec, started_s=now_s, targets=targets)
        if (refusal := self._refusal(spec)) is not None:
            self.counts["pulls_refused"] += 1
            self._end(pull, None, refusal, now_s)
            return
        session = self._session(spec, now_s)
        self._pulls[spec.transfer_id] = (pull, session.session)
        session.pulls[spec.transfer_id] = pull
        self._expect(session, pull.deadline_s)
        if session.open:
            self._ask(session, pull, now_s)

    def abort(self, transfer_id: TransferId, reason: str, now_s: float) -> None:
        """Give a pull up; unknown (ended) ones are ignored."""
        pull, session_id = self._pulls.get(transfer_id, (None, None))
        if pull is not None and session_id in self._sessions:  # else it waits for its last batch to come down
            self._give_up(self._sessions[session_id], pull, TransferAborted(f"{transfer_id}: {reason}"), now_s)

    # ---- the stream ----

    def owns(self, session_id: SessionId) -> bool:
        return session_id in self._sessions

    def on_open(self, session_id: SessionId, links: Mapping[Tier, tv.LinkTraits], now_s: float) -> None:
        session = self._sessions[session_id]
        session.open, session.links = True, dict(links)
        session.heard_s = session.pinged_s = now_s
        for pull in list(session.pulls.values()):
            self._ask(session, pull, now_s)

    def on_lost(self, session_id: SessionId, error: TransferError, now_s: float) -> None:
        """The stream is gone, and its link is destroyed: what is not in flight here is quiescent."""
        session = self._sessions.pop(session_id)
        if self._by_peer.get((session.node_id, session.epoch)) == session_id:
            del self._by_peer[session.node_id, session.epoch]
        session.open = False
        for pull in list(session.pulls.values()):
            pull.error = pull.error or error
            pull.abort_acked = True
            pull.granted.clear()
            self._end_if_quiescent(session, pull, now_s)

    def on_message(self, session_id: SessionId, message: tv.Message, now_s: float) -> None:
        session = self._sessions[session_id]
        session.heard_s = now_s
        if isinstance(message, (tv.Pong, tv.Ping)):
            return
        pull = session.pulls.get(message.transfer_id)
        if pull is None:
            self._on_stray(session, message)
            return
        match message:
            case tv.Granted():
                self._on_granted(session, pull, message, now_s)
            case tv.Missing():
                self._on_missing(session, pull, message, now_s)
            case tv.SourceDone():
                if pull.arrived_at_done is None:
                    pull.arrived_at_done = len(pull.arrived)
            case tv.Abort():
                self._on_abort(session, pull, message, now_s)
            case tv.Aborted():
                pull.abort_acked = pull.abort_acked or pull.error is not None
                self._end_if_quiescent(session, pull, now_s)
            case _:
                self.counts["messages_unexpected"] += 1

    def on_received(self, batch_id: int, error: TransferError | None, now_s: float) -> None:
        """A batch is no longer in flight: its bytes are here and right, or `error` says why not."""
        session_id, pull, batch, posted_s = self._batches.pop(batch_id)
        session = self._sessions.get(session_id)
        pull.in_flight -= 1
        if pull.in_flight == 0:
            pull.abort_by_s = now_s + self._limits.abort_timeout_s
        if session is not None:
            session.share(now_s)
            session.num_batches -= 1
            if pull.in_flight == 0:
                del session.active[batch.transfer_id]
            self._expect(session, pull.due_s)
            if error is None:
                took_s, s_max = now_s - posted_s, self._limits.batch_s_max
                session.size_batches(len(batch.pieces), took_s, s_max=s_max, blocks_max=self._batch_blocks_max)
            if error is not None and batch.group == session.group:
                session.group += 1  # whatever else moves on the failed group fails too
        self._account(session, pull, batch, error, now_s)
        self._schedule_all(now_s)

    def on_tick(self, now_s: float) -> None:
        if now_s < self.tick_due_s:
            return
        for session in list(self._sessions.values()):
            if now_s < session.due_s:
                continue
            for pull in list(session.pulls.values()):
                self._check_deadlines(session, pull, now_s)
            if session.session in self._sessions:
                self._check_liveness(session, now_s)
                session.look_ahead(self._limits.ping_interval_s)
        self.tick_due_s = min([s.due_s for s in self._sessions.values()], default=math.inf)

    # ---- state ----

    @property
    def num_pulls(self) -> int:
        return len(self._pulls)

    def check_invariants(self) -> None:
        assert len(self._batches) <= self._limits.batches_max
        assert all(session.due_s >= self.tick_due_s for session in self._sessions.values())
        in_flight = Counter(id(pull) for _, pull, _, _ in self._batches.values())
        for pull, _ in self._pulls.values():
            assert pull.in_flight == in_flight[id(pull)]
            assert not pull.arrived & pull.missing
            assert not pull.granted.keys() & pull.taken
            assert pull.error is not None or not pull.complete or not pull.asked

    # ---- inside ----

    def _refusal(self, spec: PullSpec) -> TransferError | None:
        if len(self._pulls) >= self._limits.pulls_max:
            return TransferError(f"{spec.transfer_id}: {len(self._pulls)} pulls are running, the limit")
        if len(spec.wants) > self._limits.wants_max:
            return TransferError(f"{spec.transfer_id}: {len(spec.wants)} blocks wanted, limit {self._limits.wants_max}")
        known = (spec.source, spec.source_epoch) in self._by_peer
        if not known and len(self._sessions) >= self._limits.sessions_max and not self._close_an_idle_session():
            return TransferError(f"{spec.transfer_id}: {len(self._sessions)} peers are being read, the limit")
        return None

    def _close_an_idle_session(self) -> bool:
        idle = [s for s in self._sessions.values() if not s.pulls]
        if not idle:
            return False
        self._hang_up(min(idle, key=lambda s: s.heard_s), PeerLost("closed: idle"), 0.0)
        return True

    def _session(self, spec: PullSpec, now_s: float) -> SinkSession:
        peer = (spec.source, spec.source_epoch)
        if peer not in self._by_peer:
            session = SinkSession(
                session=self._next_session(),
                node_id=spec.source,
                epoch=spec.source_epoch,
                heard_s=now_s,
                batch_blocks=self._batch_blocks_max,
            )
            self._sessions[session.session] = session
            self._by_peer[peer] = session.session
            name, address = session.session, spec.source_address
            self._emit(tv.Dial(session=name, node_id=spec.source, epoch=spec.source_epoch, address=address))
        return self._sessions[self._by_peer[peer]]

    def _ask(self, session: SinkSession, pull: PullState, now_s: float) -> None:
        spec = pull.spec
        pull.asked = True
        if len(session.pulls) == 1:
            session.heard_s = session.pinged_s = now_s  # silence is counted only while something is asked
        self._expect(session, session.pinged_s + self._limits.ping_interval_s)
        wants = tuple([tv.Wanted(w.index, w.block_hash, w.num_tokens) for w in spec.wants])
        self._tell(
            session,
            tv.Pull(
                transfer_id=spec.transfer_id,
                attempt_id=spec.attempt_id,
                wants=wants,
                wait=spec.wait,
                verify=self._verify,
                deadline_s=max(0.0, pull.deadline_s - now_s),
            ),
        )
        self._finish_if_complete(session, pull, now_s)

    def _on_stray(self, session: SinkSession, message: tv.Message) -> None:
        """A message for a pull that has ended here: make the source let go of whatever it granted."""
        self.counts["messages_stray"] += 1
        if isinstance(message, tv.Granted):
            self._tell(session, tv.Abort(transfer_id=message.transfer_id, reason="unknown transfer"))
        elif isinstance(message, tv.Abort):
            self._tell(session, tv.Aborted(transfer_id=message.transfer_id))

    def _on_granted(self, session: SinkSession, pull: PullState, message: tv.Granted, now_s: float) -> None:
        if pull.error is not None:
            return
        for grant in message.grants:
            if grant.index not in pull.targets or grant.num_bytes != self._block_bytes:
                bad = f"{pull.spec.transfer_id}: block {grant.index} of {grant.num_bytes} bytes was granted"
                self._give_up(session, pull, IntegrityError(bad), now_s)
                return
            if grant.index not in pull.taken:
                pull.granted[grant.index] = grant
        if pull.granted and message.transfer_id not in session.ready:
            session.ready.append(message.transfer_id)
        self._schedule_all(now_s)

    def _on_missing(self, session: SinkSession, pull: PullState, message: tv.Missing, now_s: float) -> None:
        new = {i for i in message.indices if i in pull.targets and i not in pull.taken and i not in pull.granted}
        pull.missing |= new
        pull.taken |= new
        self._finish_if_complete(session, pull, now_s)

    def _on_abort(self, session: SinkSession, pull: PullState, message: tv.Abort, now_s: float) -> None:
        pull.error = pull.error or TransferAborted(f"{pull.spec.transfer_id}: by {session.node_id}: {message.reason}")
        pull.abort_acked = pull.abort_asked = True
        pull.granted.clear()
        self._end_if_quiescent(session, pull, now_s)

    # ---- batches ----

    def _schedule_all(self, now_s: float) -> None:
        """Give sessions turns, who had none for longest first, until the node's credits are spent."""
        progressed = True
        while progressed and len(self._batches) < self._limits.batches_max:
            progressed = False
            for session in sorted([s for s in self._sessions.values() if s.ready], key=lambda s: s.last_batch):
                progressed |= self._schedule_one(session, now_s)

    def _schedule_one(self, session: SinkSession, now_s: float) -> bool:
        """Post one batch of the pull whose turn it is; pulls of a session take turns."""
        limits = self._limits
        if session.num_batches >= limits.batches_per_session_max or len(self._batches) >= limits.batches_max:
            return False
        while session.ready:
            pull = session.pulls.get(session.ready.popleft())
            if pull is None or not pull.granted:
                continue  # it ended, or was given up, while it waited for its turn
            self._post(session, pull, now_s)
            if pull.granted:
                session.ready.append(pull.spec.transfer_id)
            return True
        return False

    def _post(self, session: SinkSession, pull: PullState, now_s: float) -> None:
        grants = pull.take_grants(session.batch_blocks)
        tier = grants[0].tier
        link = session.links.get(tier, NO_LINK)
        self._batch_id += 1
        session.last_batch = self._batch_id
        pieces = tuple([tv.Piece(g.index, g.slot, g.stamp, g.checksum, pull.targets[g.index]) for g in grants])
        batch = tv.Batch(
            batch=self._batch_id, transfer_id=pull.spec.transfer_id, tier=tier, group=session.group, pieces=pieces
        )
        self._batches[batch.batch] = (session.session, pull, batch, now_s)
        session.num_batches += 1
        session.share(now_s)
        session.active[batch.transfer_id] = pull
        pull.in_flight += 1
        pull.link = link.name
        if link.two_sided:
            indices = tuple(g.index for g in grants)
            go = tv.Go(transfer_id=batch.transfer_id, batch=batch.batch, group=batch.group, indices=indices)
            self._tell(session, go)
        left_s, stall_s = max(0.0, pull.deadline_s - now_s), self._limits.link_timeout_s
        self._emit(tv.Receive(session=session.session, batch=batch, timeout_s=left_s, stall_s=stall_s))

    def _account(
        self, session: SinkSession | None, pull: PullState, batch: tv.Batch, error: TransferError | None, now_s: float
    ) -> None:
        if pull.error is not None or session is None:
            self._end_if_quiescent(session, pull, now_s)
        elif error is not None:
            self.counts[f"batches_failed_{type(error).__name__}"] += 1
            self._give_up(session, pull, error, now_s)
        else:
            indices = tuple(piece.index for piece in batch.pieces)
            pull.arrived.update(indices)
            self._tell(session, tv.Ack(transfer_id=batch.transfer_id, indices=indices))
            self._emit(tv.Arrived(transfer_id=batch.transfer_id, indices=indices))
            self._finish_if_complete(session, pull, now_s)

    # ---- ends ----

    def _finish_if_complete(self, session: SinkSession, pull: PullState, now_s: float) -> None:
        if pull.error is None and pull.asked and pull.complete:
            assert pull.in_flight == 0
            self._end(pull, session, None, now_s)

    def _give_up(self, session: SinkSession, pull: PullState, error: TransferError, now_s: float) -> None:
        """Begin the two-way abort; the first reason counts."""
        if pull.error is not None:
            return
        pull.error = error
        pull.granted.clear()
        pull.abort_by_s = now_s + self._limits.abort_timeout_s
        self._expect(session, pull.due_s)
        if pull.asked:
            self._tell(session, tv.Abort(transfer_id=pull.spec.transfer_id, reason=str(error)))
        else:
            pull.abort_acked = True
        self._end_if_quiescent(session, pull, now_s)

    def _end_if_quiescent(self, session: SinkSession | None, pull: PullState, now_s: float) -> None:
        if pull.error is not None and pull.abort_acked and pull.in_flight == 0:
            if pull.abort_asked and session is not None and session.open:
                self._tell(session, tv.Aborted(transfer_id=pull.spec.transfer_id))
            self._end(pull, session, pull.error, now_s)

    def _end(self, pull: PullState, session: SinkSession | None, error: TransferError | None, now_s: float) -> None:
        spec = pull.spec
        assert pull.in_flight == 0
        self._pulls.pop(spec.transfer_id, None)
        if session is not None:
            session.pulls.pop(spec.transfer_id, None)
        self.counts["pulls_ended" if error is None else f"pulls_ended_{type(error).__name__}"] += 1
        ended = PullEnded(
            transfer_id=spec.transfer_id,
            attempt_id=spec.attempt_id,
            missing=tuple(sorted(pull.targets.keys() - pull.arrived)),
            error=error,
            num_bytes=len(pull.arrived) * self._block_bytes,
            seconds=now_s - pull.started_s,
            link=pull.link,
            overlap=overlap(pull),
        )
        self._emit(tv.Ended(ended=ended, source=spec.source, busy_s=pull.busy_s))

    # ---- time ----

    def _expect(self, session: SinkSession, due_s: float) -> None:
        """`on_tick` has something to do for this session then."""
        session.due_s = min(session.due_s, due_s)
        self.tick_due_s = min(self.tick_due_s, due_s)

    def _check_deadlines(self, session: SinkSession, pull: PullState, now_s: float) -> None:
        if pull.error is None and now_s >= pull.deadline_s:
            so_far = f"{len(pull.arrived)} of {len(pull.targets)} blocks in {pull.spec.deadline_s:.3f} s"
            self._give_up(session, pull, TransferTimeout(f"{pull.spec.transfer_id}: {so_far}"), now_s)
        elif pull.error is not None and not pull.abort_acked and now_s >= pull.due_s:
            self._hang_up(session, PeerLost(f"{session.node_id} did not acknowledge an abort"), now_s)

    def _check_liveness(self, session: SinkSession, now_s: float) -> None:
        if not session.open or not session.pulls:
            return
        if now_s - session.heard_s > self._limits.silence_s_max:
            self._hang_up(session, PeerLost(f"{session.node_id} has been silent for too long"), now_s)
        elif now_s - session.pinged_s >= self._limits.ping_interval_s:
            session.pinged_s = now_s
            self._tell(session, tv.Ping())

    def _hang_up(self, session: SinkSession, error: TransferError, now_s: float) -> None:
        if session.session in self._sessions:
            self._emit(tv.Hangup(session=session.session, reason=str(error)))
            self.on_lost(session.session, error, now_s)

    def _tell(self, session: SinkSession, message: tv.Message) -> None:
        self._emit(tv.Tell(session=session.session, message=message))
