"""Pure: one worker process under the virtual clock: the real machine and cache, and the loop around them.

Played here is what node/loop.py does in a real process, in the same order; modelled are the engine and the passing of
time. The transfer protocol is in simulator/exchange.py.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from core.messages import (
    Command,
    DrainCommand,
    KvEvents,
    LoadReport,
    NodeInfo,
    Snapshot,
    SnapshotCommand,
    Token,
    WorkerEvent,
)
from halfmoon.types import Epoch, NodeId, Role, Tier
from kv_store.tiers import KvCache
from kv_store.transfer import TransferMachine
from kv_store.transfer_attempts import Tail
from kv_store.values import Move
from node.effects import AbortPull, Effect, Emit, HandOver, Pass, Report, StartPull, Withdraw, WorkerMachine
from simulator.audit import Audit
from simulator.compute import Compute, Cruise, EngineModel, SteadyEngine
from simulator.exchange import Exchange, Matter, Peers, Physics
from simulator.wire import CONDUCTOR, Stream
from simulator.world import World

TICK_S = 0.1
"""As node/loop.py's."""

Event = Callable[[float], list[Effect]]


class Machine(WorkerMachine, Protocol):
    """A worker's machine that says when it has to be told the time, and how full it is."""

    def tick_due_s(self) -> float: ...

    def decoding(self) -> tuple[int, int]:
        """Sequences that decode here, and tokens of their KV."""
        ...


class Conductor(Protocol):
    """Who listens to the nodes."""

    def on_event(self, node: Node, event: WorkerEvent) -> None: ...

    def on_tokens(self, node: Node, tokens: Sequence[Token]) -> None:
        """One step's tokens have arrived."""
        ...

    def on_steps(self, node: Node, work: Pass, ids: Sequence[Sequence[int]], due_s: Sequence[float]) -> None:
        """What the sequences of a pass gave in it and in the steps after it. Some may not be due yet."""
        ...

    def on_odd(self, tokens: Sequence[Token]) -> None:
        """One step's tokens have been sent, and will come late, twice or never."""
        ...

    def calm(self, work: Pass) -> bool:
        """Nothing may befall this batch's tokens on their way, and none has to wait for an earlier one."""
        ...


@dataclass(kw_only=True)
class Parts:
    """What one incarnation of a node is made of."""

    info: NodeInfo
    machine: Machine
    cache: KvCache
    engine: EngineModel
    transfers: TransferMachine
    matter: Matter | None = None
    steady: bool = False  # machine and engine allow macro-steps
    learn: bool = True  # the conductor is told of what was measured
    audit: Audit | None = None  # and invariants are checked after every event
    report_interval_s: float = 0.25
    report_offset_s: float = 0.0


class Node:
    """One incarnation. Whoever kills it makes the next one.

    Attributes:
        counts: of what happened here, beside the transfers' own.
    """

    def __init__(self, world: World, peers: Peers, physics: Physics, conductor: Conductor, parts: Parts) -> None:
        self.world, self.peers, self.physics, self.conductor = world, peers, physics, conductor
        self.info, self.machine, self.cache, self.transfers = parts.info, parts.machine, parts.cache, parts.transfers
        self.alive = True
        self.num_moves_out = 0
        self.counts: Counter[str] = Counter()
        self.commands = Stream(world, (CONDUCTOR, self.node_id), physics.message_s, peers.weather)
        self.events = Stream(world, (self.node_id, CONDUCTOR), physics.message_s, peers.weather)
        self.tokens = Stream(world, (self.node_id, CONDUCTOR), physics.message_s, peers.weather)
        self.stale_s = 0.0  # how late news of blocks are
        self.move_factor = 1.0  # of the time that moves between its tiers take
        self.compute = self._compute_of(parts, len(peers.nodes))
        self._learn = parts.learn
        self._audit = parts.audit
        self._interval_s = parts.report_interval_s
        self._report_at_s = world.now_s + parts.report_offset_s
        self._busy = False
        self._inbox: deque[Event] = deque()
        self._serving = False
        self.exchange = Exchange(world, peers, physics, parts.info, parts.transfers, self)
        self.exchange.matter = parts.matter
        peers.nodes[self.node_id] = self
        world.at(self._report_at_s, self._report_if_due)

    def _compute_of(self, parts: Parts, rank: int) -> Compute:
        if not parts.steady:
            return Compute(self.world, parts.engine, rank, self._computed)
        engine: SteadyEngine = parts.engine  # type: ignore[assignment]
        machine: Any = parts.machine
        return Cruise(self.world, engine, rank, self._computed, machine, self._on_steps, self.conductor.calm)

    def __str__(self) -> str:
        attempts = [str(a) for a in self.machine.attempts()]
        return f"{self.node_id}: attempts {attempts}, {self.cache.counts(Tier.DEVICE)}"

    @property
    def node_id(self) -> NodeId:
        return self.info.node_id

    @property
    def epoch(self) -> Epoch:
        return self.info.epoch

    @property
    def role(self) -> Role:
        return self.info.role

    @property
    def at_rest(self) -> bool:
        return not self.machine.attempts() and self.transfers.quiescent and not self.num_moves_out

    # ---- from outside ----

    def command(self, command: Command) -> None:
        """A command has arrived."""
        if isinstance(command, SnapshotCommand):
            self.serve(lambda now_s: [Report(event=self.snapshot())])
        elif isinstance(command, DrainCommand):
            self.machine.drain(undo=command.undo)
        else:
            self.serve(partial(self.machine.on_command, command))

    def kill(self) -> None:
        """The process is gone: peers see their streams end, and everything it held is lost."""
        self.settle()
        self.alive = False
        self.compute.stop()
        self._inbox.clear()
        self.exchange.close(f"{self.node_id} died")

    def snapshot(self) -> Snapshot:
        """Everything held now; news not yet sent goes first, so that ids are consecutive."""
        self.settle()
        self._collect()
        return Snapshot(
            info=self.info,
            last_event_id=self.cache.last_event_id,
            blocks=self.cache.snapshot(),
            attempts=self.machine.attempts(),
        )

    def settle(self) -> None:
        """Bring this node's books up to now."""
        if self.alive:
            self.compute.settle()

    # ---- what transfers bring about (simulator.exchange.Owner) ----

    def post(self, event: Event) -> None:
        """To be served after what is being done."""
        self._inbox.append(event)

    # ---- the loop ----

    def serve(self, event: Event) -> None:
        """Something happened: tell the machine, do what it wants, compute if it can."""
        if self.alive:
            self._inbox.append(event)
            self._serve()

    def _serve(self) -> None:
        if self._serving or not self._inbox:
            return
        self._serving = True
        self.compute.settle()
        while self._inbox:
            self._perform(self._inbox.popleft()(self.world.now_s))
        self._compute_next()
        self._serving = False
        if self._inbox:
            self._serve()
        if self._audit is not None:
            self.check()

    def check(self) -> None:
        self.cache.check_invariants()
        self.transfers.check_invariants()
        self.transfers.source.check_deadlines(self.world.now_s - 2 * TICK_S)

    def _compute_next(self) -> None:
        """Begin a pass, if none is out; else see whether the one that is out, and those planned, still stand."""
        if self.compute.work is not None:
            self.compute.replan()
            return
        work = self.machine.decide(self.world.now_s)
        self._collect()
        if work is None:
            return
        if not self._busy:
            self._busy = True
            self._report()
        self.compute.begin(work)

    def _computed(self, work: Pass, seconds: float) -> None:
        results = self.compute.engine.results(work)
        self.serve(partial(self.machine.account, work, results, seconds))

    def tick(self) -> None:
        """Deadlines, where there may be any. Called every TICK_S."""
        if not self.alive:
            return
        if self.machine.tick_due_s() <= self.world.now_s:
            self.serve(self.machine.on_tick)
        if self.transfers.tick_due_s() <= self.world.now_s:
            self.transfer("on_tick")

    def _perform(self, effects: Sequence[Effect]) -> None:
        """As NodeLoop: tokens first, then what the cache has to announce, then the rest in order."""
        if self._audit is not None:
            self._audit.done(effects)
        tokens = [effect.token for effect in effects if isinstance(effect, Emit)]
        if tokens and not self.tokens.send(partial(self.conductor.on_tokens, self, tokens)):
            self.conductor.on_odd(tokens)
        self._collect()
        for effect in effects:
            match effect:
                case Emit():
                    pass
                case Report():
                    self.report(effect.event)
                case StartPull():
                    self.transfer("start_pull", effect.spec)
                case AbortPull():
                    self.transfer("abort_pull", effect.transfer_id, effect.reason)
                case HandOver():
                    tail = Tail(index=effect.tail_index, slot=effect.tail_slot, num_tokens=effect.tail_tokens)
                    self.transfer("hand_over", effect.attempt_id, tail)
                case Withdraw():
                    self.transfer("withdraw", effect.attempt_id)

    def _collect(self) -> None:
        moves = self.cache.take_moves()
        for move in moves:
            self.num_moves_out += 1
            self.world.after(self.physics.move_s() * self.move_factor, partial(self._move, move))
        news = self.cache.take_events()
        if news is not None:
            self.report(news)
            ready = [copy.block_hash for copy in news.stored if copy.tier is Tier.DEVICE]
            if ready:
                self.transfer("on_ready", ready)

    def report(self, event: WorkerEvent) -> None:
        if isinstance(event, KvEvents):
            self.counts["blocks_stored"] += len(event.stored)
            self.counts["blocks_removed"] += len(event.removed)
            if self.stale_s:
                self.world.after(self.stale_s, partial(self.conductor.on_event, self, event))
                return
        self.events.send(partial(self.conductor.on_event, self, event))

    def _move(self, move: Move) -> None:
        if self.exchange.matter is not None:
            self.exchange.matter.move(move)
        self.num_moves_out -= 1
        self.serve(partial(self.machine.on_moved, [move]))

    def _on_steps(self, work: Pass, ids: Sequence[Sequence[int]], ends_s: Sequence[float]) -> None:
        if self._audit is not None:
            self._audit.spoke(work.attempts)
        self.conductor.on_steps(self, work, ids, [self.tokens.due_s(end_s) for end_s in ends_s])

    # ---- load reports ----

    def _report_if_due(self) -> None:
        if not self.alive:
            return
        if self.world.now_s >= self._report_at_s:
            self._report()
        self.world.at(self._report_at_s, self._report_if_due)

    def _report(self) -> None:
        self._report_at_s = self.world.now_s + self._interval_s
        load = self.load()
        self._busy = load.running_sequences + load.queued_attempts > 0 or self.compute.work is not None
        self.report(load)

    def load(self) -> LoadReport:
        """State now; takes the samples collected since the last call."""
        self.settle()
        load = self.machine.load()
        samples = self.exchange.take_samples()
        if samples:
            load = replace(load, transfers=samples)
        return load if self._learn else replace(load, passes=(), transfers=())

    # ---- transfers ----

    def transfer(self, event: str, *args: Any) -> None:
        """Tell the transfer machine, perform what it wants before anything else happens, then serve what came of it."""
        if self.alive:
            self.exchange.tell(event, *args)
            self._serve()
            if self._audit is not None and not self._serving:
                self.check()
