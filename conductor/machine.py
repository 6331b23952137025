"""Pure: the conductor's machine: what front ends and workers say goes in, commands and terminal events come out.

It is the only place that books load. It never raises on anything that a peer or a client can send: what is stale,
unknown or repeated is dropped and counted. Every wait of a request is a timer; `on_tick` ends those that are over.

    place -> Begin, Reserve, Prefill -> PrefillDone -> Start -> DecodeJoined -> AttemptFinished -> on_stream_finished
    lost at any step -> Cancel at the others, Resume -> on_resume -> the next attempt
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from conductor.actuals import Seen
from conductor.admission import Admission
from conductor.admission_policies import admission_of
from conductor.attempts import Phase, Request, Timer, awaits_tokens_of
from conductor.config import ConductorConfig
from conductor.decisions import DecisionRecord
from conductor.desk import Desk, Layout
from conductor.effects import Effect, RequestSpec, RequestSummary
from conductor.membership import Membership
from conductor.oscillation import Oscillation, pool_loads
from conductor.placing import Placer
from conductor.policy import PlacementPolicy, placement_policy
from conductor.progress import Progress
from conductor.status import ConductorStatus, status_of
from conductor.view import MakeWorker, Worker
from core.cost import CostPrior
from core.fit import Residual
from core.messages import (
    AttemptFailed,
    AttemptFinished,
    Closed,
    KvEvents,
    LoadReport,
    NodeInfo,
    Snapshot,
    WorkerEvent,
)
from halfmoon.blocks import Fingerprint
from halfmoon.errors import DeadlineExceeded, Failed, Unavailable
from halfmoon.types import Epoch, NodeId, Outcome, RequestId

WAKE_S = 0.02
"""Between two judgements of those who wait for room: each costs a few placements."""


class ConductorMachine:
    """One owner, one caller at a time. `now_s` is monotonic and never goes back between calls.

    Args:
        fingerprint: of the model served; None: workers' models are not compared.
        policy: how requests are placed; None: as `config.placement` says.
        admission: whether they are taken on; None: as `config.admission` says.
        make_worker: what is known of a worker and booked on it; experiments give one that books wrongly.
    """

    def __init__(
        self,
        *,
        config: ConductorConfig,
        layout: Layout,
        conductor_id: str,
        fingerprint: Fingerprint | None = None,
        policy: PlacementPolicy | None = None,
        admission: Admission | None = None,
        make_worker: MakeWorker = Worker,
    ) -> None:
        self.conductor_id = conductor_id
        self._now_s = 0.0
        admission = admission or admission_of(config.admission)
        self._desk = Desk(config, layout, policy or placement_policy(config), admission, make_worker)
        self._placer = Placer(self._desk)
        self._progress = Progress(self._desk, self._placer)
        self._membership = Membership(self._desk, fingerprint, self._place_held)

    # ---- from the front end ----

    def on_request(self, spec: RequestSpec, now_s: float) -> list[Effect]:
        """A new request. Its id must not be that of an open one: such a second one is dropped and counted.

        An id may come again once its stream has ended. Its attempts are then numbered on from the last ones, whose
        late events must not be taken for theirs.
        """
        desk, known = self._desk, self._desk.requests.get(spec.request_id)
        if known is not None and not known.stream_finished:
            desk.counters["duplicate_requests"] += 1
            return self._took(now_s)
        if known is not None:
            desk.forget(known, Outcome.FINISHED, "", now_s)
        record = desk.decisions.open(spec, desk.policy.name)
        desk.counters["requests"] += 1
        serial, before = desk.counters["requests"], record.number_before
        request = Request(spec=spec, arrived_s=now_s, record=record, number=before, alarms=desk.alarms, serial=serial)
        desk.requests[spec.request_id] = request
        request.wait(Timer.DEADLINE, now_s + spec.deadline_s)
        self._placer.admit(request, now_s)
        return self._took(now_s)

    def on_resume(self, request_id: RequestId, emitted_token_ids: Sequence[int], now_s: float) -> list[Effect]:
        """The answer to Resume: every token in the front end's log, from the first."""
        request = self._desk.requests.get(request_id)
        if request is None or request.phase is not Phase.RESUMING:
            self._desk.counters["stale_resumes"] += 1
            return self._took(now_s)
        request.emitted = tuple(emitted_token_ids)
        if _complete(request):
            request.set_phase(Phase.FINISHING, last=now_s + self._desk.config.last_token_wait_s)
        else:
            self._placer.place(request, now_s)
        return self._took(now_s)

    def on_cancel(self, request_id: RequestId, reason: str, now_s: float, *, seen: Seen | None = None) -> list[Effect]:
        """The front end has ended the request: client gone, deadline, or somebody's word."""
        request = self._desk.requests.get(request_id)
        if request is not None:
            _keep(request, seen)
            self._desk.forget(request, Outcome.CANCELLED, reason, now_s)
        return self._took(now_s)

    def on_stream_finished(
        self, request_id: RequestId, now_s: float, *, stopped: bool = False, seen: Seen | None = None
    ) -> list[Effect]:
        """The front end has the last token, or matched a stop string.

        Args:
            stopped: the workers do not know that the output ends here: they are told at once. Otherwise they are
                given a moment to say themselves that they have ended.
            seen: its times at the front end, for the decision record.
        """
        desk, request = self._desk, self._desk.requests.get(request_id)
        if request is not None:
            _keep(request, seen)
        if request is not None and (request.attempt is None or request.phase is Phase.FINISHING or stopped):
            desk.forget(request, Outcome.FINISHED, "", now_s)
        elif request is not None:
            request.stream_finished = True
            request.set_phase(request.phase, wind=now_s + desk.config.finish_grace_s)
        return self._took(now_s)

    def on_tokens_lost(self, node_id: NodeId, epoch: Epoch, now_s: float) -> list[Effect]:
        """The front end lost a worker's token stream: attempts that may have lost a token there restart."""
        affected = self._desk.running(lambda r, a: awaits_tokens_of(r, a, node_id, epoch))
        for request, _ in affected:
            self._desk.lose(request, f"token stream of {node_id} lost", now_s)
        return self._took(now_s)

    def on_gap(self, request_id: RequestId, reason: str, now_s: float) -> list[Effect]:
        """The front end misses a token of this request's present attempt, which restarts."""
        request = self._desk.requests.get(request_id)
        if request is not None and request.attempt is not None:
            self._desk.lose(request, reason, now_s)
        return self._took(now_s)

    # ---- from the cluster ----

    def on_node_joined(self, info: NodeInfo, now_s: float) -> list[Effect]:
        self._membership.join(info, now_s)
        return self._took(now_s)

    def on_node_lost(self, node_id: NodeId, epoch: Epoch, reason: str, now_s: float) -> list[Effect]:
        self._membership.lose(node_id, epoch, reason, now_s)
        return self._took(now_s)

    def on_drain(self, node_id: NodeId | None, now_s: float, *, undo: bool = False) -> list[Effect]:
        """An operator's word: no new attempts for this node, None: for any; `undo`: it takes some again."""
        self._membership.drain(node_id, undo=undo)
        return self._took(now_s)

    def on_worker_event(self, node_id: NodeId, epoch: Epoch, event: WorkerEvent, now_s: float) -> list[Effect]:
        """Anything on a worker's control stream. A snapshot introduces a worker that is not known yet."""
        worker = self._desk.view.at(node_id, epoch)
        if (
            worker is None
            and isinstance(event, Snapshot)
            and (event.info.node_id, event.info.epoch) == (node_id, epoch)
        ):
            worker = self._membership.join(event.info, now_s)
        if worker is None:
            self._desk.counters["stale_epochs"] += 1
            return self._took(now_s)
        self._membership.heard(worker, event, now_s)
        self._on_event(worker, event, now_s)
        return self._took(now_s)

    def on_tick(self, now_s: float) -> list[Effect]:
        """End the waits that are over. Called at least every 100 ms."""
        desk = self._desk
        self._membership.tick(now_s)
        self._ring(now_s)
        if desk.swing.due(now_s):
            desk.swing.see(pool_loads(desk.view, desk.config.slo, now_s), now_s)
        if desk.waiting and now_s - desk.waiting.judged_s >= desk.config.retry_s:
            self._placer.place_deferred(now_s)
        for key in [key for key, due_s in desk.closing.items() if due_s <= now_s]:
            del desk.closing[key]
            desk.counters["closed_missing"] += 1
        return self._took(now_s)

    # ---- questions ----

    @property
    def counters(self) -> Counter[str]:
        return self._desk.counters

    @property
    def policy_name(self) -> str:
        """The placement policy's."""
        return self._desk.policy.name

    def summary(self, request_id: RequestId) -> RequestSummary:
        """Of an open or a recently ended request; with zero attempts if there is no such request."""
        record = self._desk.decisions.get(request_id)
        if record is None:
            return RequestSummary(attempts=0, prefill_node="", decode_node="", stats=(), predicted_ttft_s=None)
        return record.summary()

    def explain(self, request_id: RequestId) -> DecisionRecord | None:
        return self._desk.decisions.get(request_id)

    def tell_records(self, on_end: Callable[[DecisionRecord], None]) -> None:
        """Let `on_end` have each record that is complete from now on, in the middle of a call: to put away only."""
        self._desk.decisions.on_end = on_end

    def ids_beginning(self, prefix: str) -> list[RequestId]:
        """Of requests that have a record."""
        return self._desk.decisions.beginning(prefix)

    def workers(self) -> list[Worker]:
        """Every worker, with what is booked on it; borrowed, not to be modified."""
        return list(self._desk.view)

    def oscillation(self) -> Oscillation:
        """How the loads of the two pools have swung lately."""
        return self._desk.swing.read()

    def status(self) -> ConductorStatus:
        """As of the last call that brought a time."""
        return status_of(self._desk, self.conductor_id, self._now_s)

    def check_invariants(self, *, blocks: bool = False) -> None:
        """Assert what always holds between calls; `blocks`: of the whole index too, which takes long."""
        self._desk.check_invariants()
        if blocks:
            self._desk.index.check_invariants()

    def learned_costs(self) -> dict[str, CostPrior]:
        """By role, as far as anything was measured."""
        return self._desk.view.learned()

    def residuals(self) -> dict[NodeId, dict[str, Residual]]:
        """How wrong each worker's cost models were lately. May be called from another thread."""
        return self._desk.view.residuals()

    # ---- worker events ----

    def _on_event(self, worker: Worker, event: WorkerEvent, now_s: float) -> None:
        match event:
            case LoadReport():
                self._membership.on_load(worker, event)
                self._placer.offer(worker, now_s, reported=True)
            case KvEvents():
                self._membership.on_kv_events(worker, event, now_s)
            case Snapshot():
                self._membership.on_snapshot(worker, event, now_s)
            case Closed():
                self._progress.on_closed(worker, event)
                self._placer.offer(worker, now_s)
            case AttemptFinished() | AttemptFailed():
                self._progress.on_event(worker, event, now_s)
                self._placer.offer(worker, now_s)
            case _:
                self._progress.on_event(worker, event, now_s)

    # ---- time ----

    def _ring(self, now_s: float) -> None:
        desk = self._desk
        for alarm in desk.alarms.ring(now_s):
            request = desk.requests.get(alarm.request_id)
            if request is not None and request.alarm == alarm:
                for timer in request.due(now_s):
                    self._on_timer(request, timer, now_s)
                if desk.requests.get(alarm.request_id) is request:
                    request.rearm()
        if desk.alarms.crowded(len(desk.requests)):
            desk.alarms.reset(request.alarm for request in desk.requests.values())

    def _on_timer(self, request: Request, timer: Timer, now_s: float) -> None:
        """One wait is over. An earlier timer of the same tick may have ended the request or changed its phase."""
        desk = self._desk
        if desk.requests.get(request.spec.request_id) is not request or timer not in request.due(now_s):
            return
        del request.timers[timer]
        match timer:
            case Timer.DEADLINE if request.stream_finished:
                desk.forget(request, Outcome.FINISHED, "", now_s)
            case Timer.DEADLINE:
                limit_s = request.spec.deadline_s
                desk.end(request, Outcome.FAILED, DeadlineExceeded(f"not done within {limit_s:.1f} s"), now_s)
            case Timer.HOLD:
                outcome = Outcome.FAILED if request.failures else Outcome.REJECTED
                desk.end(request, outcome, Unavailable(request.held_why), now_s)
            case Timer.RETRY:
                self._placer.place(request, now_s)
            case Timer.RESUME:
                desk.end(request, Outcome.FAILED, Failed("the front end did not answer Resume"), now_s)
            case Timer.PREFILL | Timer.JOIN:
                waited = request.attempt is not None and request.attempt.withheld is not None
                desk.lose(request, "no decode worker had room" if waited else f"{timer} took too long", now_s)
            case Timer.LAST:
                desk.lose(request, "the last token did not come", now_s)
            case Timer.RESERVE:
                self._progress.on_reserve_unanswered(request, now_s)
            case Timer.SEEK:
                desk.lose(request, f"no decode worker had room within {desk.config.seek_wait_s:g} s", now_s)
            case Timer.DEFER:
                desk.waiting.judged_s = now_s
                self._placer.place(request, now_s)
            case Timer.ASK:
                if request.attempt is not None:
                    self._placer.ask_decode(request, request.attempt, now_s)
            case Timer.WIND:
                desk.forget(request, Outcome.FINISHED, "", now_s)

    def _place_held(self, now_s: float) -> None:
        """A worker became ready: those who waited for one come first, in their order of arrival."""
        for request in [r for r in self._desk.requests.values() if r.phase is Phase.HELD]:
            self._placer.place(request, now_s)

    def _took(self, now_s: float) -> list[Effect]:
        self._now_s = now_s
        waiting = self._desk.waiting
        if waiting and waiting.freed and now_s - waiting.judged_s >= WAKE_S:
            self._placer.place_deferred(now_s)
        effects, self._desk.out = self._desk.out, []
        return effects


def _keep(request: Request, seen: Seen | None) -> None:
    if seen is not None and not request.stream_finished:
        request.record.keep_seen(seen)


def _complete(request: Request) -> bool:
    """Whether the front end's log holds the whole output already."""
    emitted, sampling = request.emitted, request.spec.sampling
    return len(emitted) >= sampling.max_tokens or bool(emitted and emitted[-1] in sampling.stop_token_ids)
