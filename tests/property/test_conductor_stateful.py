"""The conductor's machine under any order of events: honest workers, liars, the dead, and a front end as a dumb twin.

Whatever happens: nothing raises, every request has exactly one terminal event, nothing is sent to a node that is gone,
attempts are numbered upwards, and once all is over nothing is booked and nothing is awaited.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from conductor.actuals import Seen
from conductor.admission_config import AdmissionConfig, Mode, Reserve
from conductor.admission_policies import admission_named
from conductor.attempts import Phase, Timer
from conductor.config import ConductorConfig
from conductor.desk import Layout
from conductor.effects import Begin, Effect, End, HoldFirst, Resume, Send, Slo
from conductor.machine import ConductorMachine
from core.messages import (
    AttemptFailed,
    AttemptFinished,
    BlockCopy,
    CancelCommand,
    Closed,
    Command,
    DecodeJoined,
    FailureKind,
    KvEvents,
    LoadReport,
    NodeInfo,
    PassSample,
    PrefillCommand,
    PrefillDone,
    RefusalReason,
    Refused,
    ReserveCommand,
    Reserved,
    Snapshot,
    StartCommand,
    TransferSample,
    WorkerEvent,
)
from halfmoon.types import AttemptId, Epoch, FinishReason, NodeId, RequestId, Tier
from tests.conductor_kit import BLOCK_BYTES, BLOCK_SIZE, FINGERPRINT, chain, info, prompt, spec, stats

NODES = ("p0", "p1", "d0", "d1", "c0")
NAMES = ("a", "b", "c", "d")
SHARED = prompt(64)
SECONDS = st.sampled_from([0.0, 0.1, 0.3, 1.0, 3.0, 11.0, 40.0, 130.0])
ATTEMPTS = st.builds(AttemptId, st.sampled_from([RequestId(n) for n in (*NAMES, "x")]), st.integers(1, 6))
HASHES = st.lists(st.sampled_from(chain(SHARED)), max_size=4, unique=True)
ODD = st.sampled_from([0.1, 0.0, -1.0, float("nan"), float("inf")])
ODD_SEEN = Seen(tokenize_s=float("nan"), ttft_s=-1.0, tbt_worst_s=float("inf"), tbt_mean_s=0.02)
KINDS = ("ok", "refuse", "fail", "last", "silent")


MODES = st.sampled_from(list(Mode))
ANY_ADMISSION = st.builds(
    AdmissionConfig,
    baseline=MODES,
    early=MODES,
    predictive=MODES,
    forecast=MODES,
    reserve=st.sampled_from(list(Reserve)),
    defer=st.booleans(),
    defer_s_max=st.sampled_from([0.2, 20.0]),
    deferred_max=st.integers(0, 2),
    backfill=st.integers(0, 2),
    size_fairness=st.sampled_from([0.0, 0.5, 1.0]),
    patience_s=st.sampled_from([0.2, 30.0]),
)
NAMED = ("forecast", "early+defer", "baseline", "predictive", "forecast")
ADMISSIONS = st.sampled_from(NAMED).map(lambda n: admission_named(n, AdmissionConfig(deferred_max=2))) | ANY_ADMISSION
BLOCKS = st.sampled_from([14, 14, 24, 1000])
"""Of a worker's pool: room for one request, for two short ones, and for all."""
SLOS = st.sampled_from([Slo(), Slo(ttft_s=30.0, tbt_s=0.1), Slo(ttft_s=0.05), Slo(tbt_s=0.001)])

Ask = tuple[int, float, Slo, int]
"""Tokens after the shared ones, deadline, limits, priority."""
ASKS = st.tuples(st.integers(1, 100), st.sampled_from([5.0, 60.0, 600.0]), SLOS, st.sampled_from([-100, -1, 0, 3]))


class Conductor(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.num_blocks = 1000
        self._begin(AdmissionConfig())

    @initialize(admission=ADMISSIONS, num_blocks=BLOCKS, asks=st.lists(ASKS, min_size=2, max_size=len(NAMES)))
    def any_admission(self, admission: AdmissionConfig, num_blocks: int, asks: list[Ask]) -> None:
        self.num_blocks = num_blocks
        self._begin(admission)
        for name, ask in zip(NAMES, asks, strict=False):
            self._ask(name, *ask)

    def _begin(self, admission: AdmissionConfig) -> None:
        config = ConductorConfig(
            attempts_max=3, decode_tries_max=3, refusals_max=3, requests_max=3, records_max=8, admission=admission
        )
        layout = Layout(block_size=BLOCK_SIZE, block_bytes=BLOCK_BYTES)
        self.machine = ConductorMachine(config=config, layout=layout, conductor_id="c", fingerprint=FINGERPRINT)
        self.now_s = 0.0
        self.alive: dict[NodeId, NodeInfo] = {}
        self.inboxes: dict[tuple[NodeId, Epoch], list[Command]] = {}
        self.event_ids: dict[NodeId, int] = {}
        self.open: dict[RequestId, int] = {}  # the number of the present attempt
        self.resuming: set[RequestId] = set()
        self.opened = self.ended = 0
        for name in ("p0", "d0"):
            self._join(self._info(name))

    def _info(self, name: str) -> NodeInfo:
        return info(name, num_device_blocks=self.num_blocks)

    # ---- the twin's side of every effect ----

    def _hear(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Begin():
                    request_id, number = effect.attempt_id
                    assert number > self.open[request_id], "attempts are numbered upwards, of open requests only"
                    self.open[request_id] = number
                case HoldFirst():
                    assert effect.request_id in self.open
                    assert 0.0 < effect.hold_s <= 600.0
                case Resume():
                    assert effect.request_id in self.open
                    self.resuming.add(effect.request_id)
                case End():
                    self._close(effect.request_id)
                case Send():
                    assert self.alive[effect.node_id].epoch == effect.epoch, "sent to a node that is gone"
                    self._check_command(effect.command)
                    self.inboxes[effect.node_id, effect.epoch].append(effect.command)

    def _check_command(self, command: Command) -> None:
        if isinstance(command, PrefillCommand | ReserveCommand | StartCommand):
            assert self.open.get(command.attempt_id.request_id) == command.attempt_id.number

    def _close(self, request_id: RequestId) -> None:
        del self.open[request_id]  # KeyError: a second terminal event
        self.resuming.discard(request_id)
        self.ended += 1

    def _say(self, node: NodeInfo, event: WorkerEvent) -> None:
        self._hear(self.machine.on_worker_event(node.node_id, node.epoch, event, self.now_s))

    # ---- time and membership ----

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self._hear(self.machine.on_tick(self.now_s))

    @rule()
    def all_report(self) -> None:
        for node in list(self.alive.values()):
            self._say(node, LoadReport())

    @rule(name=st.sampled_from(NODES), epoch=st.integers(1, 3), hashes=HASHES)
    def node_joins(self, name: str, epoch: int, hashes: list) -> None:  # type: ignore[type-arg]
        self._join(self._info(f"{name}@{epoch}"), hashes)

    def _join(self, node: NodeInfo, hashes: list | None = None) -> None:  # type: ignore[type-arg]
        known = self.alive.get(node.node_id)
        self.alive[node.node_id] = node
        self.inboxes.setdefault((node.node_id, node.epoch), [])
        if known is None or known.epoch != node.epoch:
            self.event_ids[node.node_id] = 0
        self._hear(self.machine.on_node_joined(node, self.now_s))
        self._snapshot(node, hashes or [], [])

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def node_dies(self, data: st.DataObject) -> None:
        node = self.alive.pop(data.draw(st.sampled_from(sorted(self.alive))))
        self._hear(self.machine.on_node_lost(node.node_id, node.epoch, "killed", self.now_s))

    @rule(name=st.sampled_from(NODES))
    def late_news_of_an_old_death(self, name: str) -> None:
        self._hear(self.machine.on_node_lost(NodeId(name), Epoch("e99"), "killed long ago", self.now_s))

    # ---- honest workers ----

    @precondition(lambda self: any(self.inboxes.values()))
    @rule(data=st.data(), kind=st.sampled_from(KINDS))
    def a_worker_obeys(self, data: st.DataObject, kind: str) -> None:
        key = data.draw(st.sampled_from(sorted(k for k, inbox in self.inboxes.items() if inbox)))
        command = self.inboxes[key].pop(0)
        node = self.alive.get(key[0])
        if node is None or node.epoch != key[1] or not hasattr(command, "attempt_id"):
            return
        for event in self._replies(node, command, kind):
            self._say(node, event)

    def _replies(self, node: NodeInfo, command: Command, kind: str) -> list[WorkerEvent]:
        attempt_id: AttemptId = command.attempt_id  # type: ignore[union-attr]
        who = stats(str(node.node_id))
        if isinstance(command, CancelCommand):
            return [] if kind == "silent" else [Closed(attempt_id=attempt_id)]
        if kind == "silent":
            return []
        if kind == "fail":
            return [AttemptFailed(attempt_id=attempt_id, kind=FailureKind.ENGINE, message="oh")]
        if isinstance(command, StartCommand):
            return [DecodeJoined(attempt_id=attempt_id, stats=who), *self._finish(attempt_id, node, kind)]
        if kind == "refuse":
            return [Refused(attempt_id=attempt_id, reason=RefusalReason.NO_ROOM)]
        if isinstance(command, ReserveCommand):
            return [Reserved(attempt_id=attempt_id)]
        last = FinishReason.STOP if kind == "last" else None
        return [PrefillDone(attempt_id=attempt_id, first_token_id=7, stats=who, finish_reason=last)]

    def _finish(self, attempt_id: AttemptId, node: NodeInfo, kind: str) -> list[WorkerEvent]:
        if kind != "last":
            return []
        who = stats(str(node.node_id))
        length = FinishReason.LENGTH
        return [AttemptFinished(attempt_id=attempt_id, finish_reason=length, num_output_tokens=8, stats=who)]

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), stored=HASHES, removed=HASHES, skip=st.integers(0, 1))
    def blocks_come_and_go(self, data: st.DataObject, stored: list, removed: list, skip: int) -> None:  # type: ignore[type-arg]
        node = self.alive[data.draw(st.sampled_from(sorted(self.alive)))]
        self.event_ids[node.node_id] += 1 + skip
        event = KvEvents(
            event_id=self.event_ids[node.node_id],
            stored=tuple(BlockCopy(block_hash=h, tier=Tier.DEVICE) for h in stored),
            removed=tuple(BlockCopy(block_hash=h, tier=Tier.DRAM) for h in removed),
        )
        self._say(node, event)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), hashes=HASHES, attempts=st.lists(ATTEMPTS, max_size=2, unique=True), honest=st.booleans())
    def a_snapshot_comes(self, data: st.DataObject, hashes: list, attempts: list, honest: bool) -> None:  # type: ignore[type-arg]
        node = self.alive[data.draw(st.sampled_from(sorted(self.alive)))]
        present = [AttemptId(r, n) for r, n in self.open.items() if n > 0]
        self._snapshot(node, hashes, present if honest else attempts)

    def _snapshot(self, node: NodeInfo, hashes: list, attempts: list[AttemptId]) -> None:  # type: ignore[type-arg]
        blocks = tuple(BlockCopy(block_hash=h, tier=Tier.DEVICE) for h in hashes)
        last = self.event_ids[node.node_id]
        self._say(node, Snapshot(info=node, last_event_id=last, blocks=blocks, attempts=tuple(attempts)))

    # ---- liars and echoes ----

    @rule(name=st.sampled_from(NODES), epoch=st.integers(1, 4), attempt_id=ATTEMPTS, kind=st.integers(0, 7), odd=ODD)
    def anything_is_said(self, name: str, epoch: int, attempt_id: AttemptId, kind: int, odd: float) -> None:
        who = stats(name)
        node = info(f"{name}@{epoch}")
        events: list[WorkerEvent] = [
            Reserved(attempt_id=attempt_id),
            Refused(attempt_id=attempt_id, reason=list(RefusalReason)[attempt_id.number % len(RefusalReason)]),
            PrefillDone(attempt_id=attempt_id, first_token_id=1, stats=who),
            DecodeJoined(attempt_id=attempt_id, stats=who),
            *self._finish(attempt_id, node, "last"),
            AttemptFailed(attempt_id=attempt_id, kind=FailureKind.TRANSFER, message="no"),
            Closed(attempt_id=attempt_id),
            LoadReport(
                passes=(PassSample(new_tokens=-3, context_tokens=5, batch=-1, kv_tokens=-5, seconds=odd),),
                transfers=(TransferSample(source=NodeId("p9"), link="", num_bytes=-5, seconds=odd),),
                running_sequences=3,
                kv_tokens=100,
            ),
        ]
        self._hear(self.machine.on_worker_event(node.node_id, node.epoch, events[kind], self.now_s))

    # ---- the front end ----

    @rule(name=st.sampled_from(NAMES), ask=ASKS)
    def a_request_comes(self, name: str, ask: Ask) -> None:
        self._ask(name, *ask)

    @rule(asks=st.lists(ASKS, min_size=len(NAMES), max_size=len(NAMES)))
    def a_crowd_comes(self, asks: list[Ask]) -> None:
        for name, ask in zip(NAMES, asks, strict=True):
            self._ask(name, *ask)

    def _ask(self, name: str, length: int, deadline_s: float, slo: Slo, priority: int) -> None:
        request_id = RequestId(name)
        if request_id in self.open:
            return
        self.open[request_id] = 0
        self.opened += 1
        tokens = (*SHARED, *prompt(length, seed=1))
        request = replace(spec(name, tokens=tokens, deadline_s=deadline_s, slo=slo), priority=priority)
        self._hear(self.machine.on_request(request, self.now_s))

    @precondition(lambda self: self.resuming)
    @rule(data=st.data(), emitted=st.integers(0, 8))
    def the_log_is_given(self, data: st.DataObject, emitted: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.resuming)))
        self.resuming.discard(request_id)
        self._hear(self.machine.on_resume(request_id, list(range(emitted)), self.now_s))

    @rule(name=st.sampled_from(NAMES))
    def an_unasked_log_is_given(self, name: str) -> None:
        if RequestId(name) not in self.resuming:
            self._hear(self.machine.on_resume(RequestId(name), [1], self.now_s))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), how=st.sampled_from(["cancel", "finish", "stop"]))
    def the_front_end_ends_one(self, data: st.DataObject, how: str) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.open)))
        self._close(request_id)
        if how == "cancel":
            effects = self.machine.on_cancel(request_id, "client gone", self.now_s)
        else:
            effects = self.machine.on_stream_finished(request_id, self.now_s, stopped=how == "stop", seen=ODD_SEEN)
        assert not any(isinstance(e, End | Resume) and e.request_id == request_id for e in effects)
        self._hear(effects)

    @rule(name=st.sampled_from(NODES), epoch=st.integers(1, 3))
    def a_token_stream_is_lost(self, name: str, epoch: int) -> None:
        node = info(f"{name}@{epoch}")
        self._hear(self.machine.on_tokens_lost(node.node_id, node.epoch, self.now_s))

    @rule(name=st.sampled_from(NAMES))
    def a_token_is_missing(self, name: str) -> None:
        self._hear(self.machine.on_gap(RequestId(name), "missing", self.now_s))

    # ---- what always holds ----

    @invariant()
    def the_books_and_the_index_agree_with_themselves(self) -> None:
        self.machine.check_invariants(blocks=True)

    @invariant()
    def both_sides_agree_on_what_is_open(self) -> None:
        machine_open = {r for r, request in self.machine._desk.requests.items() if not request.stream_finished}
        assert machine_open == set(self.open)

    @invariant()
    def who_waits_for_room_has_a_time_at_which_it_ends(self) -> None:
        desk = self.machine._desk
        deferred = {r for r, request in desk.requests.items() if request.phase is Phase.DEFERRED}
        assert deferred == {r for r in desk.requests if r in desk.waiting}
        assert len(deferred) == len(desk.waiting)
        assert len(deferred) <= desk.admission.config.deferred_max
        assert all(Timer.DEFER in desk.requests[r].timers for r in deferred)
        assert all(desk.requests[r].attempt is None for r in deferred)
        assert all(w.claim is None or w.claim.request_id in deferred for w in desk.view)

    @invariant()
    def every_open_request_has_its_alarm(self) -> None:
        desk = self.machine._desk
        assert all(request.alarm in desk.alarms._heap for request in desk.requests.values())

    @invariant()
    def nothing_is_asked_of_a_decode_worker_too_early(self) -> None:
        for request in self.machine._desk.requests.values():
            attempt = request.attempt
            if attempt is not None and attempt.judged_late and attempt.first_token_id is None:
                assert attempt.decode is None

    @invariant()
    def only_open_legs_are_booked(self) -> None:
        legs = sum(
            leg.open
            for request in self.machine._desk.requests.values()
            if request.attempt is not None
            for leg in request.attempt.legs()
        )
        assert sum(node.outstanding_attempts for node in self.machine.status().nodes) <= legs

    def teardown(self) -> None:
        for _ in range(3):  # longer than any deadline, and than any wait for Closed after it
            self.now_s += 700.0
            self._hear(self.machine.on_tick(self.now_s))
        assert not self.open
        assert self.opened == self.ended
        status = self.machine.status()
        assert all(node.books.empty for node in status.nodes)
        assert (status.requests_open, status.closing) == (0, 0)
        assert len(self.machine._desk.waiting) == 0
        assert self.machine._desk.decisions._open == {}
        terminals = sum(n for name, n in status.counters.items() if name in TERMINALS)
        assert terminals == status.counters.get("requests", 0)


TERMINALS = {f"requests_{outcome}" for outcome in ("finished", "rejected", "cancelled", "failed")}

Conductor.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestConductor = Conductor.TestCase
