"""Shell: the loop of every worker: decide, execute, account. One owner of the machine and the cache, one inbox.

While the engine computes (in its one thread), the loop goes on serving the inbox: a cancel, a pull or a reservation
never waits for a pass.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from core.messages import (
    Attach,
    Command,
    DrainCommand,
    KvEvents,
    LoadReport,
    NodeInfo,
    Snapshot,
    SnapshotCommand,
    Token,
    TransferSample,
    WorkerEvent,
)
from engine.protocol import Engine, Sampled
from halfmoon.errors import ConfigError, Failed, HalfmoonError
from halfmoon.types import AttemptId, BlockHash, Tier, TransferId
from kv_store.ledger import SlotState
from kv_store.tiers import KvCache
from kv_store.values import Move, PullEnded, PullSpec
from node.effects import AbortPull, Effect, Emit, HandOver, Pass, Report, StartPull, Withdraw, WorkerMachine
from node.streams import Outbox, Streams

log = logging.getLogger("node.loop")

TICK_S = 0.1  # deadlines are kept to a tenth of a second
CHECK_INTERVAL_S = 5.0  # invariants, when idle: some ms for 1e5 blocks
INBOX_MAX = 10_000  # commands beyond it wait in gRPC's flow control
PASS_S_MAX = 300.0  # a pass takes seconds on the slowest host; a wedged device must end the process
CLOSE_S_MAX = 5.0  # for the pass that is out at the end
ENGINE_ERRORS = (HalfmoonError, RuntimeError, ValueError, IndexError, MemoryError)  # torch raises the middle three

Event = Callable[[float], list[Effect]]
"""Something that happened: called with `now_s`, it tells the machine."""


class Store(Protocol):
    """What the loop asks of the block store (kv_store/store.py)."""

    def start_pull(self, spec: PullSpec) -> None: ...
    def abort_pull(self, transfer_id: TransferId, reason: str) -> None: ...
    def on_ready(self, hashes: Sequence[BlockHash]) -> None: ...
    def hand_over(self, attempt_id: AttemptId, tail_index: int, tail_slot: int, tail_tokens: int) -> None: ...
    def withdraw(self, attempt_id: AttemptId) -> None: ...
    async def perform(self, moves: Sequence[Move]) -> None: ...
    def samples(self) -> Sequence[TransferSample]: ...
    def check_invariants(self) -> None: ...
    def tick(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """report_interval_s: at most this long between two LoadReports, which are the liveness sign too."""

    report_interval_s: float = 0.25

    def __post_init__(self) -> None:
        if not 0.01 <= self.report_interval_s <= 10.0:
            raise ConfigError(key="report_interval_s", value=self.report_interval_s, expected="seconds in [0.01, 10]")


class Inbox:
    """What has happened since the machine was last asked. Posted to from the event loop's thread only."""

    def __init__(self, machine: WorkerMachine) -> None:
        self._machine = machine
        self._events: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def __len__(self) -> int:
        return len(self._events)

    def post(self, event: Event) -> None:
        self._events.append(event)
        self._wake.set()
        if len(self._events) >= INBOX_MAX:
            self._room.clear()

    def wake(self) -> None:
        self._wake.set()

    async def room(self) -> None:
        """Wait until the inbox is not full: for senders that can be made to wait."""
        await self._room.wait()

    async def wait(self, timeout_s: float) -> None:
        """Until something is posted, but at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def drain(self) -> list[Event]:
        events = list(self._events)
        self._events.clear()
        self._room.set()
        return events

    # ---- the block store's callbacks ----

    def on_arrived(self, transfer_id: TransferId, indices: Sequence[int]) -> None:
        self.post(partial(self._machine.on_pull_arrived, transfer_id, tuple(indices)))

    def on_ended(self, ended: PullEnded) -> None:
        self.post(partial(self._machine.on_pull_ended, ended))

    def on_handed_over(self, attempt_id: AttemptId) -> None:
        self.post(partial(self._machine.on_handed_over, attempt_id))

    def on_withdrawn(self, attempt_id: AttemptId) -> None:
        self.post(partial(self._machine.on_withdrawn, attempt_id))

    def describe(self) -> str:
        names = [getattr(event.func, "__name__", "?") for event in self._events if isinstance(event, partial)]
        return f"{len(self._events)} events: {', '.join(names[:50])}"


class NodeLoop:
    """Runs one machine on one engine.

    Args:
        info: stamped on snapshots.
        inbox: made with the same machine.
        cache: the machine's.
        store: performs pulls and moves; its callbacks post to `inbox`.
    """

    def __init__(
        self,
        *,
        info: NodeInfo,
        machine: WorkerMachine,
        inbox: Inbox,
        cache: KvCache,
        engine: Engine,
        store: Store,
        streams: Streams,
        config: LoopConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info = info
        self.passes = 0
        self.pass_s = 0.0
        self.last_load = LoadReport()
        self._machine = machine
        self._inbox = inbox
        self._cache = cache
        self._engine = engine
        self._store = store
        self._streams = streams
        self._config = config or LoopConfig()
        self._clock = clock
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._moves: deque[Move] = deque()  # bounded by the cache: a slot takes part in one move at a time
        self._move_wake = asyncio.Event()
        self._tick_at_s = self._report_at_s = self._check_at_s = -float("inf")
        self._computing = False
        self._pass: asyncio.Future[list[Sampled | None]] | None = None
        self._busy = False
        self._invariant_checks = 0
        self._leaving = False  # by a signal: no undo reaches it
        self._performers: Mapping[type, Callable[[Any], object]] = {
            Report: lambda e: self._streams.report(e.event),
            StartPull: lambda e: self._store.start_pull(e.spec),
            AbortPull: lambda e: self._store.abort_pull(e.transfer_id, e.reason),
            HandOver: lambda e: self._store.hand_over(e.attempt_id, e.tail_index, e.tail_slot, e.tail_tokens),
            Withdraw: lambda e: self._store.withdraw(e.attempt_id),
        }

    # ---- the loop ----

    async def run(self) -> None:
        """Run until cancelled.

        Raises:
            Failed: the engine did not end a pass within PASS_S_MAX.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._run_passes(), name="passes")
                group.create_task(self._run_moves(), name="moves")
        finally:
            self._executor.shutdown(wait=False, cancel_futures=True)

    async def close(self, work: asyncio.Task[None]) -> None:
        """End `work` (a task of `run`), and wait for the pass that is out: its pool is about to be closed."""
        work.cancel()
        out: list[asyncio.Future[Any]] = [work, *([] if self._pass is None else [self._pass])]
        await asyncio.wait(out, timeout=CLOSE_S_MAX)

    async def _run_passes(self) -> None:
        while True:
            self._serve()
            work = self._machine.decide(self._clock())  # decide
            self._collect()
            if work is None:
                await self._inbox.wait(TICK_S)
                continue
            result = await self._execute(work)  # execute
            self._account(work, *result)  # account

    async def _execute(self, work: Pass) -> tuple[Sequence[Sampled | None] | BaseException, float]:
        """Run the pass in the engine's thread, serving the inbox meanwhile; (results or the error, seconds)."""
        self._note_busy()
        self._computing = True
        started_s = self._clock()
        future = asyncio.get_running_loop().run_in_executor(self._executor, self._engine.forward, work.slices)
        self._pass = future
        future.add_done_callback(lambda _: self._inbox.wake())
        while True:
            await self._inbox.wait(TICK_S)
            if future.done():
                break
            self._serve()
            if self._clock() - started_s > PASS_S_MAX:
                raise Failed(f"the engine has not ended a pass of {len(work.slices)} slices in {PASS_S_MAX:g} s")
        self._computing = False
        return future.exception() or future.result(), self._clock() - started_s

    def _account(self, work: Pass, result: Sequence[Sampled | None] | BaseException, seconds: float) -> None:
        self.passes += 1
        self.pass_s += seconds
        now_s = self._clock()
        if isinstance(result, ENGINE_ERRORS):
            log.error("a pass of %d slices failed: %s", len(work.slices), result, exc_info=result)
            effects = self._machine.on_pass_failed(work, f"{type(result).__name__}: {result}", now_s)
        elif isinstance(result, BaseException):
            raise result
        else:
            effects = self._machine.account(work, result, seconds, now_s)
        self._perform(effects)

    async def _run_moves(self) -> None:
        while True:
            await self._move_wake.wait()
            self._move_wake.clear()
            while self._moves:
                batch = tuple(self._moves)
                self._moves.clear()
                await self._store.perform(batch)
                self._inbox.post(partial(self._machine.on_moved, batch))

    # ---- serving: everything but the engine ----

    def _serve(self) -> None:
        """Everything that has happened, then what time asks for."""
        self._serve_inbox()
        now_s = self._clock()
        if now_s >= self._tick_at_s:
            self._tick_at_s = now_s + TICK_S
            self._perform(self._machine.on_tick(now_s))
            self._store.tick()
        if now_s >= self._report_at_s:
            self._report_load(now_s)
        if now_s >= self._check_at_s and not self._machine.attempts():
            self._check_at_s = now_s + CHECK_INTERVAL_S
            self._cache.check_invariants()
            self._store.check_invariants()
            self._invariant_checks += 1

    def _serve_inbox(self) -> None:
        for event in self._inbox.drain():
            self._perform(event(self._clock()))

    def _perform(self, effects: Sequence[Effect]) -> None:
        """Tokens first, since a client waits for them; then blocks that the same call stored are announced, so that a
        hand-over comes after them; then the rest, in order."""
        steps: dict[str, list[Token]] = {}
        for effect in effects:
            if isinstance(effect, Emit):
                steps.setdefault(effect.front_end, []).append(effect.token)
        for front_end, tokens in steps.items():
            self._streams.emit(front_end, tokens)
        self._collect()
        for effect in effects:
            if not isinstance(effect, Emit):
                self._performers[type(effect)](effect)

    def _collect(self) -> None:
        """Pass on what the cache decided: moves to the mover, news to the conductor and to waiting pulls."""
        moves = self._cache.take_moves()
        if moves:
            self._moves.extend(moves)
            self._move_wake.set()
        news = self._cache.take_events()
        if news is not None:
            self._announce(news)

    def _announce(self, news: KvEvents) -> None:
        self._streams.report(news)
        ready = [copy.block_hash for copy in news.stored if copy.tier is Tier.DEVICE]
        if ready:
            self._store.on_ready(ready)

    def _report_load(self, now_s: float) -> None:
        self._report_at_s = now_s + self._config.report_interval_s
        load = self.last_load = self.load()
        self._busy = load.running_sequences + load.queued_attempts > 0 or self._computing
        self._streams.report(load)

    def _note_busy(self) -> None:
        """The first pass after idling is reported at once: the conductor's picture is stale exactly then."""
        if not self._busy:
            self._busy = True
            self._report_load(self._clock())

    # ---- what others ask of the loop, from the event loop's thread ----

    def load(self) -> LoadReport:
        """State now; takes the samples collected since the last call.

        Transfers as the store measured them: while their link was busy, not while a pull waited for its prefill.
        """
        tiers = [self._cache.counts(tier) for tier in (Tier.DEVICE, Tier.DRAM)]
        return replace(
            self._machine.load(),
            transfers=tuple(self._store.samples()),
            invariant_checks=self._invariant_checks,
            held_blocks=sum(counts[SlotState.FILLING] + counts[SlotState.PINNED] for counts in tiers),
            quarantined_blocks=sum(counts[SlotState.QUARANTINED] for counts in tiers),
        )

    def attach(self, attach: Attach) -> Outbox[WorkerEvent]:
        """A new control stream, beginning with a snapshot.

        Raises:
            StaleTerm: a lower term than one seen; nothing has changed.
        """
        self._streams.check_term(attach.term, f"conductor {attach.conductor_id}")
        self._serve_inbox()  # the last conductor's commands: this one must find their attempts in its snapshot
        return self._streams.attach(attach, self.snapshot())

    async def command(self, command: Command) -> None:
        """Hand a command to the machine, in order; waits while the inbox is full."""
        await self._inbox.room()
        if isinstance(command, SnapshotCommand):
            self._inbox.post(lambda _now_s: [Report(event=self.snapshot())])
        elif isinstance(command, DrainCommand):
            self._inbox.post(partial(self._drain, undo=command.undo))
        else:
            self._inbox.post(partial(self._machine.on_command, command))

    def drain(self) -> None:
        """Take no new attempts, ever; `attempts` becomes empty when the running ones have ended."""
        self._leaving = True
        self._inbox.post(partial(self._drain, undo=False))

    @property
    def attempts(self) -> tuple[AttemptId, ...]:
        return self._machine.attempts()

    def snapshot(self) -> Snapshot:
        """Everything held now. News not yet sent goes out first, so that the ids that follow are consecutive."""
        self._collect()
        return Snapshot(
            info=self.info,
            last_event_id=self._cache.last_event_id,
            blocks=self._cache.snapshot(),
            attempts=self._machine.attempts(),
        )

    def describe(self) -> str:
        """For dumps: the inbox, the attempts, the slots by state, the streams."""
        slots = {tier.name: self._cache.counts(tier) for tier in (Tier.DEVICE, Tier.DRAM)}
        attempts = ", ".join(map(str, self._machine.attempts()[:50]))
        return "\n".join(
            (
                f"{self.passes} passes, {'computing' if self._computing else 'not computing'}",
                f"inbox: {self._inbox.describe()}",
                f"attempts: {len(self._machine.attempts())}: {attempts}",
                f"slots: {slots}; {len(self._moves)} moves waiting",
                f"streams: {self._streams.describe()}",
            )
        )

    def _drain(self, _now_s: float, *, undo: bool) -> list[Effect]:
        self._machine.drain(undo=undo and not self._leaving)
        return []
