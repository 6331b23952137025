"""Pure: workers that join, speak, fall silent, are told to drain, and leave."""

from __future__ import annotations

from collections.abc import Callable

from conductor.attempts import Attempt, Leg, Phase, Request, awaits_tokens_of
from conductor.desk import Desk
from conductor.view import Worker
from core.messages import DrainCommand, KvEvents, LoadReport, NodeInfo, Snapshot, SnapshotCommand, WorkerEvent
from halfmoon.blocks import Fingerprint
from halfmoon.types import AttemptId, Epoch, NodeId

RECHECK_S = 1.0
"""A leg commanded this recently may be missing from a snapshot that was already under way; it is looked for again."""

COUNT_MAX = 2**40
"""Of anything that a load report counts: a million times what any worker holds."""


class Membership:
    """Keeps the view and the index in step with what workers say.

    Args:
        fingerprint: of the model served; a worker with another one is listed but never used. None: not checked.
        on_ready: called when a worker becomes ready, for held requests.
    """

    def __init__(self, desk: Desk, fingerprint: Fingerprint | None, on_ready: Callable[[float], None]) -> None:
        self._desk = desk
        self._fingerprint = fingerprint
        self._on_ready = on_ready
        self._drained: set[NodeId] = set()  # by an operator; as many as he named
        self._drained_all = False

    def join(self, info: NodeInfo, now_s: float) -> Worker | None:
        """A node is there: not ready before its snapshot. A new epoch replaces the old one, whose attempts restart.

        None: there are too many nodes.
        """
        desk = self._desk
        known = desk.view.get(info.node_id)
        if known is not None and known.info.epoch == info.epoch:
            return known
        if known is not None:
            self.lose(info.node_id, known.info.epoch, f"{info.node_id} restarted", now_s)
        if len(desk.view) >= desk.config.nodes_max:
            desk.counters["nodes_refused"] += 1
            return None
        worker = desk.view.join(info, now_s)
        worker.incompatible = self._incompatible(info)
        self._tell_drained(worker)
        desk.index.join(info.node_id)
        desk.counters["nodes_joined"] += 1
        return worker

    def lose(self, node_id: NodeId, epoch: Epoch, reason: str, now_s: float) -> None:
        """This incarnation is gone: forget it, restart what ran there. Other incarnations are not touched."""
        desk = self._desk
        if desk.view.at(node_id, epoch) is None:
            desk.counters["stale_epochs"] += 1
            return
        desk.view.remove(node_id, now_s)
        desk.index.remove(node_id)
        desk.counters["nodes_lost"] += 1
        desk.closing = {key: due for key, due in desk.closing.items() if key[1:] != (node_id, epoch)}
        self._restart(node_id, epoch, f"{node_id} lost: {reason}", now_s)

    def drain(self, node_id: NodeId | None, *, undo: bool = False) -> None:
        """Give a node (None: every node, those that join later too) no new attempts; `undo`: give it some again.

        An operator's word stands for the node, not for its process: one that restarts is still drained.
        """
        if node_id is None:
            self._drained_all, self._drained = not undo, set()
        elif undo:
            self._drained.discard(node_id)
        else:
            self._drained.add(node_id)
        for worker in self._desk.view:
            self._tell_drained(worker)

    def _tell_drained(self, worker: Worker) -> None:
        drained = self._drained_all or worker.node_id in self._drained
        left_over = not drained and worker.load.draining  # by the word of a conductor before this one
        if drained != worker.draining or left_over:
            worker.draining = drained
            self._desk.send(worker.node_id, worker.info.epoch, DrainCommand(undo=not drained))

    # ---- what workers say ----

    def heard(self, worker: Worker, event: WorkerEvent, now_s: float) -> None:
        """Any event is a sign of life. One that was taken for dead must first say what it holds and runs."""
        worker.heard_s = now_s
        worker.doubted = False
        if worker.silent and worker.snapshot_due_s is None and not isinstance(event, Snapshot):
            self._ask_snapshot(worker, now_s)

    def on_snapshot(self, worker: Worker, snapshot: Snapshot, now_s: float) -> None:
        """The truth about a worker: its blocks replace the index's, its attempts are compared with ours."""
        desk = self._desk
        desk.index.on_snapshot(worker.node_id, snapshot.last_event_id, snapshot.blocks)
        worker.snapshot_due_s = None
        worker.silent = False
        if worker.ready_s is None:
            worker.ready_s = now_s
        self._end_unknown(worker, snapshot.attempts, now_s)
        self._restart_missing(worker, frozenset(snapshot.attempts), now_s)
        self._on_ready(now_s)

    def on_kv_events(self, worker: Worker, events: KvEvents, now_s: float) -> None:
        if self._desk.index.on_events(worker.node_id, events):
            self._desk.counters["kv_event_gaps"] += 1
            self._ask_snapshot(worker, now_s)

    def on_load(self, worker: Worker, load: LoadReport) -> None:
        """State, and measurements for the cost models, which refuse nonsense themselves.

        A report with a count that cannot be is refused and counted: the last good one stands. Pulls of prompts teach
        the link as pulls of prefixes do: what they wait for their blocks is not in their seconds.
        """
        if not _possible(load):
            self._desk.counters["loads_refused"] += 1
            return
        worker.load = load
        for sample in load.passes:
            worker.cost.observe_pass(sample)
        for transfer in load.transfers:
            worker.cost.observe_transfer(transfer)

    # ---- time ----

    def tick(self, now_s: float) -> None:
        config = self._desk.config
        for worker in list(self._desk.view):
            if not worker.silent and now_s - worker.heard_s > config.silent_s:
                self._silence(worker, now_s)
            if worker.snapshot_due_s is not None and worker.snapshot_due_s <= now_s:
                self._desk.index.mark_degraded(worker.node_id)
                self._ask_snapshot(worker, now_s)
            if worker.recheck_s is not None and worker.recheck_s <= now_s:
                self._ask_snapshot(worker, now_s)

    # ---- inside ----

    def _incompatible(self, info: NodeInfo) -> str:
        size = self._desk.layout.block_size
        if info.fingerprint.block_size != size:
            return f"block_size: {size} here, {info.fingerprint.block_size} there"
        return "; ".join(self._fingerprint.differences(info.fingerprint)) if self._fingerprint else ""

    def _silence(self, worker: Worker, now_s: float) -> None:
        worker.silent = True
        self._desk.counters["nodes_silent"] += 1
        reason = f"{worker.node_id} silent for {now_s - worker.heard_s:.1f} s"
        self._restart(worker.node_id, worker.info.epoch, reason, now_s)

    def _ask_snapshot(self, worker: Worker, now_s: float) -> None:
        worker.recheck_s = None
        worker.snapshot_due_s = now_s + self._desk.config.snapshot_wait_s
        self._desk.send(worker.node_id, worker.info.epoch, SnapshotCommand())

    def _restart(self, node_id: NodeId, epoch: Epoch, reason: str, now_s: float) -> None:
        """Lose every attempt that still needs this node, be it only for a last token that is on its way."""
        for request, attempt in self._desk.running(lambda r, a: _needs(r, a, node_id, epoch)):
            leg = _open_leg(attempt, node_id, epoch)
            if leg is not None and self._desk.view.at(node_id, epoch) is None:
                self._desk.close_leg(attempt, leg, now_s)
            self._desk.lose(request, reason, now_s, node_lost=True)

    def _end_unknown(self, worker: Worker, attempts: tuple[AttemptId, ...], now_s: float) -> None:
        """A worker must not go on with what nobody waits for: a conductor before this one may have begun it."""
        desk = self._desk
        for attempt_id in attempts:
            request = desk.requests.get(attempt_id.request_id)
            attempt = request.attempt if request is not None else None
            ours = attempt is not None and attempt.attempt_id == attempt_id
            if not (ours and attempt is not None and attempt.leg_at(worker.node_id, worker.info.epoch)):
                desk.counters["orphans_cancelled"] += 1
                desk.cancel_at(worker.node_id, worker.info.epoch, attempt_id, "unknown to the conductor", now_s)

    def _restart_missing(self, worker: Worker, attempts: frozenset[AttemptId], now_s: float) -> None:
        desk, node_id, epoch = self._desk, worker.node_id, worker.info.epoch
        for request, attempt in desk.running(lambda _, a: _open_leg(a, node_id, epoch) is not None):
            leg = _open_leg(attempt, node_id, epoch)
            assert leg is not None
            if attempt.attempt_id in attempts or not _must_be_there(request, attempt, leg):
                continue
            if now_s - leg.since_s < RECHECK_S:
                worker.recheck_s = now_s + RECHECK_S
            else:
                desk.close_leg(attempt, leg, now_s)
                desk.lose(request, f"{node_id} no longer runs it", now_s)


def _open_leg(attempt: Attempt, node_id: NodeId, epoch: Epoch) -> Leg | None:
    leg = attempt.leg_at(node_id, epoch)
    return leg if leg is not None and leg.open else None


def _needs(request: Request, attempt: Attempt, node_id: NodeId, epoch: Epoch) -> bool:
    return _open_leg(attempt, node_id, epoch) is not None or awaits_tokens_of(request, attempt, node_id, epoch)


def _must_be_there(request: Request, attempt: Attempt, leg: Leg) -> bool:
    """A prefill worker lets go by itself after the hand-over, which only the decode worker reports."""
    if leg is attempt.decode:
        return not attempt.unasked
    return request.phase is Phase.PREFILLING and attempt.withheld is None


def _possible(load: LoadReport) -> bool:
    counts = (
        load.queued_attempts,
        load.queued_tokens,
        load.running_sequences,
        load.kv_tokens,
        load.free_device_blocks,
        load.evictable_device_blocks,
        load.free_dram_blocks,
        load.held_blocks,
        load.quarantined_blocks,
        load.invariant_checks,
    )
    return all(0 <= count <= COUNT_MAX for count in counts)
