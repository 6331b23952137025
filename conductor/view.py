"""Pure: what the conductor knows of each worker: who it is, how it is, and what is booked on it.

Books are updated at assignment, before any report can show it, and corrected when the work is done; a worker's own
report is older by a network trip. Everything booked carries its attempt, and is released by taking it out, so nothing
can be released twice.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from conductor.config import ConductorConfig, Fit
from conductor.probing import Probes
from core.cost import CostPrior, RoleCost, WorkerCost
from core.fit import Residual
from core.messages import LoadReport, NodeInfo
from halfmoon.types import AttemptId, Epoch, NodeId, RequestId, Role

YOUNG_DOUBLINGS = 5
"""While young, a worker's cap on assignments doubles this often, until it is lifted."""

MODELS_MAX = 2048
"""Learned cost models kept for nodes that left, since a restarted process is the same machine."""


class WorkerState(enum.StrEnum):
    """READY takes new attempts; the others do not, for the reason they name."""

    JOINING = "joining"  # its snapshot has not come
    READY = "ready"
    SUSPECT = "suspect"  # a few reports are missing, or a peer has lost it
    SILENT = "silent"  # its attempts were restarted elsewhere; a snapshot brings it back
    DRAINING = "draining"
    INCOMPATIBLE = "incompatible"  # another model


class DecodeBook(NamedTuple):
    """Room promised to one attempt: tokens of KV now, blocks it may come to need."""

    tokens: int
    blocks: int


class Claim(NamedTuple):
    """Room that is kept for one who waits for it (conductor.waiting). It is not booked: nothing was begun.

    Args:
        tokens: of KV when it joins the batch; `blocks` it may come to need, `output_max` tokens it asks for at most.
        prefill_s: until it would join, if it were let in now.
    """

    request_id: RequestId
    tokens: int
    blocks: int
    output_max: int
    prefill_s: float


class SendingBook(NamedTuple):
    """Bytes promised to one receiver, believed to leave evenly between two points in time."""

    num_bytes: int
    begin_s: float
    end_s: float

    def left(self, now_s: float) -> float:
        """Bytes of it that are in the way of others now: none before it begins, none once it should be over."""
        if not self.begin_s <= now_s < self.end_s:
            return 0.0
        whole_s = self.end_s - self.begin_s
        return self.num_bytes * (self.end_s - now_s) / whole_s if math.isfinite(whole_s) else float(self.num_bytes)


@dataclass(frozen=True, kw_only=True)
class Books:
    """Totals of what is booked on one worker."""

    prefills: int
    queue_s: float
    decodes: int
    decode_tokens: int
    decode_blocks: int
    sending_bytes: int

    @property
    def empty(self) -> bool:
        return self == Books(prefills=0, queue_s=0.0, decodes=0, decode_tokens=0, decode_blocks=0, sending_bytes=0)


class Worker:
    """One incarnation of one worker, as the conductor sees it."""

    def __init__(self, info: NodeInfo, cost: WorkerCost, now_s: float) -> None:
        self.info = info
        self.node_id = info.node_id
        self.cost = cost
        self.prefills = info.role.prefills
        self.decodes = info.role.decodes
        self.coupled = info.role is Role.COUPLED
        self.num_blocks = info.num_device_blocks
        self.sequences_max = max(1, info.sequences_max)
        self.heard_s = now_s
        self.ready_s: float | None = None
        self.snapshot_due_s: float | None = None
        self.recheck_s: float | None = None
        self._load = LoadReport()
        self.draining = False
        self.silent = False
        self.doubted = False  # a peer has lost it, and it has not spoken since
        self.incompatible = ""
        self._prefill: dict[AttemptId, float] = {}
        self._queue_s = 0.0
        self._head_s, self._head_since_s = 0.0, now_s
        self._decode: dict[AttemptId, DecodeBook] = {}
        self._waiting: dict[AttemptId, int] = {}  # booked for decode, not in its batch yet: tokens
        self._sending: dict[tuple[AttemptId, str], SendingBook] = {}
        self._waiting_tokens = 0
        self._copied_blocks, self._copied_s = 0.0, now_s
        self.claim: Claim | None = None
        self.probes: dict[str, Probes] = {}  # by admission policy
        self.decode_tokens = 0
        self.decode_blocks = 0
        self.batch = 0
        """Sequences that decode here or will."""
        self.kv_tokens = 0
        """Tokens of KV that a step reads once everything booked has joined."""

    # ---- how it is ----

    def state(self, now_s: float, suspect_s: float) -> WorkerState:
        if self.incompatible:
            return WorkerState.INCOMPATIBLE
        if self.silent:
            return WorkerState.SILENT
        if self.draining or self._load.draining:
            return WorkerState.DRAINING
        if self.ready_s is None:
            return WorkerState.JOINING
        return WorkerState.SUSPECT if self.doubted or now_s - self.heard_s > suspect_s else WorkerState.READY

    def takes_attempts(self, now_s: float, suspect_s: float) -> bool:
        """Whether it is READY: the same as `state`, asked of every worker for every request."""
        return not (
            self.ready_s is None
            or now_s - self.heard_s > suspect_s
            or self.silent
            or self.draining
            or self.doubted
            or self._load.draining
            or self.incompatible
        )

    def young(self, now_s: float, config: ConductorConfig) -> bool:
        """Whether slow start forbids one more assignment now: a new empty worker must not attract everything."""
        age_s = 0.0 if self.ready_s is None else now_s - self.ready_s
        if age_s >= config.slow_start_s:
            return False
        cap: float = config.young_attempts * 2.0 ** (YOUNG_DOUBLINGS * age_s / config.slow_start_s)
        return self.attempts >= cap

    @property
    def attempts(self) -> int:
        """Attempts that have something booked here."""
        return len(self._decode) + sum(1 for a in self._prefill if a not in self._decode)

    def books(self) -> Books:
        return Books(
            prefills=len(self._prefill),
            queue_s=self._queue_s,
            decodes=len(self._decode),
            decode_tokens=self.decode_tokens,
            decode_blocks=self.decode_blocks,
            sending_bytes=sum(book.num_bytes for book in self._sending.values()),
        )

    def booked(self) -> set[AttemptId]:
        """Every attempt that has anything booked here."""
        return {*self._prefill, *self._decode, *(attempt_id for attempt_id, _ in self._sending)}

    def check_invariants(self) -> None:
        """Assert that the totals, which are kept, are those of the books."""
        assert math.isclose(self._queue_s, sum(self._prefill.values()), abs_tol=1e-9), f"{self.node_id}: queue"
        assert self.decode_tokens == sum(book.tokens for book in self._decode.values()), f"{self.node_id}: tokens"
        assert self.decode_blocks == sum(book.blocks for book in self._decode.values()), f"{self.node_id}: blocks"
        assert self._waiting.keys() <= self._decode.keys(), f"{self.node_id}: waits for a batch without room there"
        assert self._waiting_tokens == sum(self._waiting.values()), f"{self.node_id}: tokens that wait"

    # ---- prefill queue, in seconds ----

    def queue_s(self, now_s: float) -> float:
        """How long a prompt that comes now waits: what is booked, less what the oldest one has had already.

        The oldest is believed to run; when it takes longer than predicted, it is believed to end now.
        """
        if self._queue_s == 0.0:
            return 0.0
        return max(0.0, self._queue_s - min(self._head_s, max(0.0, now_s - self._head_since_s)))

    def book_prefill(self, attempt_id: AttemptId, seconds: float, now_s: float) -> None:
        assert attempt_id not in self._prefill, f"{attempt_id} is booked for prefill twice"
        if not self._prefill:
            self._head_since_s, self._head_s = now_s, seconds
        self._prefill[attempt_id] = seconds
        self._queue_s += seconds

    def release_prefill(self, attempt_id: AttemptId, now_s: float) -> bool:
        """True: it was booked, and no longer is."""
        if self._prefill.pop(attempt_id, None) is None:
            return False
        self._queue_s = sum(self._prefill.values(), 0.0)  # summed anew: differences would leave rounding dust
        self._head_since_s, self._head_s = now_s, next(iter(self._prefill.values()), 0.0)
        return True

    # ---- decode room ----

    @property
    def load(self) -> LoadReport:
        """Its last report."""
        return self._load

    @load.setter
    def load(self, load: LoadReport) -> None:
        self._load = load
        self._count_decode()

    def _count_decode(self) -> None:
        """What is booked and what is reported, nothing twice: kept, for placement asks for it far more often."""
        self.batch = max(len(self._decode), self._load.running_sequences + len(self._waiting))
        self.kv_tokens = max(self.decode_tokens, self._load.kv_tokens + self._waiting_tokens)

    def book_decode(self, attempt_id: AttemptId, book: DecodeBook) -> None:
        assert attempt_id not in self._decode, f"{attempt_id} is booked for decode twice"
        self._decode[attempt_id] = book
        self._waiting[attempt_id] = book.tokens
        self._waiting_tokens += book.tokens
        self.decode_tokens += book.tokens
        self.decode_blocks += book.blocks
        self._count_decode()

    def decoding(self) -> Collection[AttemptId]:
        """The attempts that have decode room booked here; borrowed."""
        return self._decode.keys()

    def join_decode(self, attempt_id: AttemptId) -> None:
        """From now on its own reports count this sequence."""
        self._waiting_tokens -= self._waiting.pop(attempt_id, 0)
        self._count_decode()

    def release_decode(self, attempt_id: AttemptId) -> bool:
        book = self._decode.pop(attempt_id, None)
        self._waiting_tokens -= self._waiting.pop(attempt_id, 0)
        if book is not None:
            self.decode_tokens -= book.tokens
            self.decode_blocks -= book.blocks
        self._count_decode()
        return book is not None

    # ---- bytes it has to send ----

    def sending_bytes(self, now_s: float) -> float:
        """What a transfer that is asked for now has in front of it."""
        under_way = [book for book in self._sending.values() if book.begin_s <= now_s < book.end_s]
        return sum([book.left(now_s) for book in under_way]) if under_way else 0.0

    def book_sending(self, attempt_id: AttemptId, purpose: str, book: SendingBook) -> None:
        assert (attempt_id, purpose) not in self._sending, f"{attempt_id} {purpose} is booked for sending twice"
        self._sending[attempt_id, purpose] = book

    def release_sending(self, attempt_id: AttemptId, purpose: str) -> bool:
        """True: it was booked, and no longer is."""
        return self._sending.pop((attempt_id, purpose), None) is not None

    # ---- copies of prefixes it takes in ----

    def may_copy(self, blocks: int, now_s: float, config: ConductorConfig) -> bool:
        """Whether it may fetch so many blocks now. What it has fetched lately is forgotten evenly over the window.

        A worker that has fetched nothing lately may take one prefix of any length.
        """
        if self._copied_blocks == 0.0:
            return True
        lately = self._lately_copied(now_s, config)
        return lately == 0.0 or lately + blocks <= config.copies_share_max * self.num_blocks

    def book_copy(self, blocks: int, now_s: float, config: ConductorConfig) -> None:
        self._copied_blocks, self._copied_s = self._lately_copied(now_s, config) + blocks, now_s

    def _lately_copied(self, now_s: float, config: ConductorConfig) -> float:
        if self._copied_blocks == 0.0:
            return 0.0
        forgotten = config.copies_share_max * self.num_blocks * (now_s - self._copied_s) / config.copies_window_s
        return max(0.0, self._copied_blocks - forgotten)


MakeWorker = Callable[[NodeInfo, WorkerCost, float], Worker]


class ClusterView:
    """Every worker that is there. One owner: the conductor's machine.

    `make_worker`: with another kind of books, in experiments.
    """

    def __init__(self, config: ConductorConfig, make_worker: MakeWorker = Worker) -> None:
        self._config = config
        self._make_worker = make_worker
        self._workers: dict[NodeId, Worker] = {}
        self._models: dict[NodeId, WorkerCost] = {}
        self._roles: dict[Role, RoleCost] = {}
        self._gone_s: dict[Role, float] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, node_id: NodeId) -> Worker | None:
        return self._workers.get(node_id)

    def at(self, node_id: NodeId, epoch: Epoch) -> Worker | None:
        """The worker, if this very incarnation of it is there."""
        worker = self._workers.get(node_id)
        return worker if worker is not None and worker.info.epoch == epoch else None

    def join(self, info: NodeInfo, now_s: float) -> Worker:
        """A new worker, not ready before its snapshot. What was learned of its machine or its kind is kept."""
        assert info.node_id not in self._workers, f"{info.node_id} joins twice"
        model = self._models.pop(info.node_id, None)
        if model is None:
            pass_max = max(1, info.tokens_per_pass_max)
            configured = self._config.priors.get(info.role.value, self._config.prior)
            model = WorkerCost(
                self.learned().get(info.role.value) or configured,
                tokens_per_pass_max=pass_max,
                frozen=self._config.fit is Fit.FROZEN,
                role=self._roles.setdefault(info.role, RoleCost(configured, tokens_per_pass_max=pass_max)),
            )
        worker = self._workers[info.node_id] = self._make_worker(info, model, now_s)
        return worker

    def remove(self, node_id: NodeId, now_s: float) -> None:
        """Forget a worker and everything booked on it; its learned costs stay for when it comes back."""
        worker = self._workers.pop(node_id)
        self._gone_s[worker.info.role] = now_s
        self._models[node_id] = worker.cost
        while len(self._models) > MODELS_MAX:
            del self._models[next(iter(self._models))]

    def ready(self, now_s: float) -> list[Worker]:
        """The workers that take new attempts, in the order of joining."""
        suspect_s = self._config.suspect_s
        return [w for w in self._workers.values() if w.takes_attempts(now_s, suspect_s)]

    def returning(self, now_s: float) -> bool:
        """Whether a pool may only be away for a moment: somebody joins, is suspect, or left a short time ago."""
        grace_s = self._config.unavailable_grace_s
        if any(now_s - gone_s <= grace_s for gone_s in self._gone_s.values()):
            return True
        waiting = (WorkerState.JOINING, WorkerState.SUSPECT, WorkerState.SILENT)
        heard = [w for w in self._workers.values() if now_s - w.heard_s <= grace_s]
        return any(w.state(now_s, self._config.suspect_s) in waiting for w in heard)

    def why_unavailable(self, now_s: float) -> str:
        """In words, which pool is missing and what its workers are doing; empty if requests can be served."""
        roles: set[Role] = set()
        for worker in self._workers.values():
            if worker.state(now_s, self._config.suspect_s) is WorkerState.READY:
                roles.add(worker.info.role)
                if Role.COUPLED in roles or len(roles) > 1:
                    return ""
        missing = [role for role in (Role.PREFILL, Role.DECODE) if role not in roles]
        return "; ".join(f"no {role} worker is ready ({self._states(role, now_s)})" for role in missing)

    def _states(self, role: Role, now_s: float) -> str:
        counts: dict[str, int] = {}
        for worker in self._workers.values():
            if worker.info.role in (role, Role.COUPLED):
                state = worker.state(now_s, self._config.suspect_s)
                counts[state] = counts.get(state, 0) + 1
        return ", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "none is there"

    def learned(self) -> dict[str, CostPrior]:
        """By role: what the best-measured worker has learned. Roles of which nothing was measured are left out."""
        costs: dict[str, CostPrior] = {}
        for worker in sorted(self._workers.values(), key=lambda w: (w.cost.samples, w.node_id)):
            if worker.cost.samples > 0:
                costs[worker.info.role.value] = worker.cost.learned()
        return costs

    def residuals(self) -> dict[NodeId, dict[str, Residual]]:
        """Of every worker's cost models. May be called from another thread."""
        return {worker.node_id: worker.cost.residuals() for worker in list(self._workers.values())}
