"""Pure: the state of the cluster, as the conductor's machine sees it, for operators and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from conductor.desk import Desk
from conductor.oscillation import Oscillation
from conductor.prefix_index import IndexMode
from conductor.view import Books, Worker, WorkerState
from core.fit import Residual
from core.messages import LoadReport, NodeInfo


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """One worker. `last_heard_s`: seconds since its last sign of life; `why`: what makes it incompatible."""

    info: NodeInfo
    load: LoadReport
    state: WorkerState
    why: str
    outstanding_attempts: int
    indexed_blocks: int
    index_mode: IndexMode
    last_heard_s: float
    books: Books
    residuals: dict[str, Residual]

    @property
    def ready(self) -> bool:
        return self.state is WorkerState.READY


@dataclass(frozen=True, kw_only=True)
class ConductorStatus:
    """`unavailable`: why no request can be served now, in words; empty when one can.

    deferred: how many of the open requests wait for room.
    """

    conductor_id: str
    nodes: tuple[NodeState, ...]
    requests_open: int
    closing: int
    unavailable: str
    counters: dict[str, int]
    deferred: int
    oscillation: Oscillation

    @property
    def ready(self) -> bool:
        return not self.unavailable


def status_of(desk: Desk, conductor_id: str, now_s: float) -> ConductorStatus:
    return ConductorStatus(
        conductor_id=conductor_id,
        nodes=tuple(_node_state(desk, worker, now_s) for worker in desk.view),
        requests_open=len(desk.requests),
        closing=len(desk.closing),
        unavailable=desk.view.why_unavailable(now_s),
        counters=dict(desk.counters),
        deferred=len(desk.waiting),
        oscillation=desk.swing.read(),
    )


def _node_state(desk: Desk, worker: Worker, now_s: float) -> NodeState:
    return NodeState(
        info=worker.info,
        load=worker.load,
        state=worker.state(now_s, desk.config.suspect_s),
        why=worker.incompatible,
        outstanding_attempts=worker.attempts,
        indexed_blocks=desk.index.num_blocks(worker.node_id),
        index_mode=desk.index.mode(worker.node_id),
        last_heard_s=max(0.0, now_s - worker.heard_s),
        books=worker.books(),
        residuals=worker.cost.residuals(),
    )
