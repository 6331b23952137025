"""Pure: what all parts of the conductor's machine share, and the elementary acts on one attempt: tell, release, end.

Every way out of an attempt goes through `close_leg` or `cancel_leg`, each of which releases that leg's books once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from conductor.admission import Admission
from conductor.alarms import Alarms
from conductor.attempts import Attempt, Leg, Phase, Request
from conductor.config import ConductorConfig
from conductor.decisions import Decisions
from conductor.effects import Begin, Effect, End, HoldFirst, Resume, Send
from conductor.oscillation import Swing
from conductor.policy import PlacementPolicy
from conductor.prefix_index import PrefixIndex
from conductor.survival import OutputLengths
from conductor.view import ClusterView, MakeWorker, Worker
from conductor.waiting import WaitingRoom
from core.messages import CancelCommand, Command
from halfmoon.errors import Failed, HalfmoonError
from halfmoon.types import AttemptId, Epoch, NodeId, Outcome, RequestId

PULL, FETCH = "pull", "fetch"
"""Why a worker sends: its own prefill's blocks to the decode worker; a cached prefix to another prefill worker."""

HANDOVERS = 32
"""The last ones, whose longest says what the next one may take."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The geometry of the blocks that are placed, in tokens and bytes."""

    block_size: int
    block_bytes: int

    def __post_init__(self) -> None:
        assert self.block_size > 0
        assert self.block_bytes > 0


class RunningMean:
    """Of a quantity that every request shows once: a mean over about the last fifty."""

    def __init__(self) -> None:
        self.value: float | None = None

    def see(self, value: float) -> None:
        self.value = value if self.value is None else self.value + 0.02 * (value - self.value)


class Desk:
    """State and elementary acts. Effects gather in `out`; the machine takes them at the end of each call."""

    def __init__(
        self,
        config: ConductorConfig,
        layout: Layout,
        policy: PlacementPolicy,
        admission: Admission,
        make_worker: MakeWorker = Worker,
    ) -> None:
        self.config = config
        self.layout = layout
        self.policy = policy
        self.admission = admission
        self.view = ClusterView(config, make_worker)
        self.index = PrefixIndex()
        self.decisions = Decisions(config.records_max)
        self.requests: dict[RequestId, Request] = {}
        self.alarms = Alarms()
        self.closing: dict[tuple[AttemptId, NodeId, Epoch], float] = {}
        self.seekers: dict[RequestId, None] = {}  # placed, but no decode worker had room: who has waited longest first
        self.counters: Counter[str] = Counter()
        self.waiting = WaitingRoom(self.view, admission.config)
        self.swing = Swing()
        self.lengths = OutputLengths()
        self.output_tokens = RunningMean()
        self.decode_s = RunningMean()
        self.room_wait_s = RunningMean()  # of those whose prefill had begun: from asking for decode room to having it
        self.handovers_s: deque[float] = deque(maxlen=HANDOVERS)  # the last ones, from PrefillDone to DecodeJoined
        self.out: list[Effect] = []

    # ---- telling ----

    def send(self, node_id: NodeId, epoch: Epoch, command: Command) -> None:
        if self.view.at(node_id, epoch) is None:
            self.counters["commands_to_gone_nodes"] += 1
        else:
            self.out.append(Send(node_id=node_id, epoch=epoch, command=command))

    def begin(self, attempt_id: AttemptId) -> None:
        self.out.append(Begin(attempt_id=attempt_id))

    def hold_first(self, request: Request, hold_s: float, now_s: float) -> None:
        if hold_s > 0.0:
            self.out.append(HoldFirst(request_id=request.spec.request_id, hold_s=hold_s))
            self.note(request, now_s, f"first token held for its second: {hold_s:.1f} s at most")

    def cancel_at(self, node_id: NodeId, epoch: Epoch, attempt_id: AttemptId, reason: str, now_s: float) -> None:
        """Tell a worker to end an attempt, and expect its Closed within a bound."""
        self.closing[attempt_id, node_id, epoch] = now_s + self.config.closed_wait_s
        self.send(node_id, epoch, CancelCommand(attempt_id=attempt_id, reason=reason))

    # ---- legs ----

    def close_leg(self, attempt: Attempt, leg: Leg, now_s: float) -> None:
        """This leg has ended by itself, or its node is gone: release what was booked for it."""
        leg.open = False
        self.waiting.freed = True
        attempt_id, worker = attempt.attempt_id, self.view.at(leg.node_id, leg.epoch)
        if worker is not None:
            worker.release_decode(attempt_id)
        if leg is attempt.prefill:
            self.release_prefill(attempt, now_s)
            if worker is not None:
                worker.release_sending(attempt_id, PULL)

    def release_prefill(self, attempt: Attempt, now_s: float) -> None:
        """The prompt is computed: neither its queue time nor its fetch is ahead of others any more."""
        self.waiting.freed = True
        worker = self.view.at(attempt.prefill.node_id, attempt.prefill.epoch)
        if worker is not None:
            worker.release_prefill(attempt.attempt_id, now_s)
        source = self.view.get(attempt.fetch_source) if attempt.fetch_source is not None else None
        if source is not None:
            source.release_sending(attempt.attempt_id, FETCH)

    def cancel_leg(self, attempt: Attempt, leg: Leg, reason: str, now_s: float) -> None:
        if not leg.open:
            return
        self.close_leg(attempt, leg, now_s)
        if leg is attempt.prefill and attempt.withheld is not None:
            return  # it was never told of this attempt
        if leg is attempt.decode and attempt.unasked:
            return
        if self.view.at(leg.node_id, leg.epoch) is not None:
            self.cancel_at(leg.node_id, leg.epoch, attempt.attempt_id, reason, now_s)
            if leg is attempt.prefill and attempt.first_token_id is not None and not attempt.coupled:
                # it may have handed over already, and then ignores the command: nothing is missing without its Closed
                del self.closing[attempt.attempt_id, leg.node_id, leg.epoch]

    def close_attempt(self, request: Request, reason: str, now_s: float) -> None:
        """End the present attempt wherever it still runs. `request.attempt` is None afterwards."""
        attempt, request.attempt = request.attempt, None
        self.seekers.pop(request.spec.request_id, None)
        if attempt is not None:
            for leg in attempt.legs():
                self.cancel_leg(attempt, leg, reason, now_s)

    # ---- requests ----

    def note(self, request: Request, now_s: float, what: str, node: str = "") -> None:
        request.record.note(now_s - request.arrived_s, request.number, what, node)

    def lose(self, request: Request, reason: str, now_s: float, *, node_lost: bool = False) -> None:
        """The present attempt cannot go on: ask for the front end's log and try again, or give up.

        One that waited for room has begun no work, and losing it to a worker's end costs no try.
        """
        waited = request.attempt is not None and request.attempt.withheld is not None
        self.close_attempt(request, reason, now_s)
        self.note(request, now_s, f"lost: {reason}")
        self.counters["attempts_lost"] += 1
        if request.stream_finished:
            self.forget(request, Outcome.FINISHED, "", now_s)
            return
        if not (waited and node_lost):
            request.failures.append(f"attempt {request.number}: {reason}")
        if len(request.failures) >= self.config.attempts_max:
            tries = "; ".join(request.failures)
            self.end(request, Outcome.FAILED, Failed(f"gave up after {len(request.failures)} tries: {tries}"), now_s)
            return
        request.cause = reason
        request.set_phase(Phase.RESUMING, resume=now_s + self.config.resume_wait_s)
        self.out.append(Resume(request_id=request.spec.request_id, reason=reason))

    def end(self, request: Request, outcome: Outcome, error: HalfmoonError, now_s: float) -> None:
        """The request's one terminal event, from this side."""
        self.out.append(End(request_id=request.spec.request_id, outcome=outcome, error=error))
        self.forget(request, outcome, str(error), now_s)

    def forget(self, request: Request, outcome: Outcome, error: str, now_s: float) -> None:
        """The request is over: end what still runs, complete its record."""
        self.close_attempt(request, error or outcome.value, now_s)
        del self.requests[request.spec.request_id]
        self.waiting.discard(request.spec.request_id)
        self.decisions.end(request.spec.request_id, outcome, error, now_s - request.arrived_s)
        self.counters[f"requests_{outcome.value}"] += 1
        if request.record.actuals_refused:
            self.counters["actuals_refused"] += request.record.actuals_refused

    # ---- what always holds ----

    def check_invariants(self) -> None:
        """Assert that each worker's totals are right, and that nothing is booked but for attempts that are open.

        Looks at everything that is open, not at the blocks of the index.
        """
        open_attempts = {r.attempt.attempt_id: r.attempt for r in self.requests.values() if r.attempt is not None}
        for worker in self.view:
            worker.check_invariants()
            for attempt_id in worker.booked():
                assert attempt_id in open_attempts, f"{worker.node_id}: {attempt_id} is booked and is not open"
        for request in self.requests.values():
            assert request.alarm_s <= min(request.timers.values()), f"{request.spec.request_id}: no alarm for a wait"

    # ---- looking up ----

    def current(self, attempt_id: AttemptId) -> tuple[Request, Attempt] | None:
        """The request whose present attempt this is; None (and counted) for earlier attempts and ended requests."""
        request = self.requests.get(attempt_id.request_id)
        attempt = request.attempt if request is not None else None
        if request is None or attempt is None or attempt.attempt_id != attempt_id:
            self.counters["stale_attempts"] += 1
            return None
        return request, attempt

    def running(self, affected: Callable[[Request, Attempt], bool]) -> list[tuple[Request, Attempt]]:
        """The requests whose present attempt is `affected`."""
        pairs = ((r, r.attempt) for r in self.requests.values())
        return [(r, a) for r, a in pairs if a is not None and affected(r, a)]
