"""A mini cluster in one process under a virtual clock: the real machines, caches, transfer protocol and fake engine.

Only the wire, the copying of bytes and the passing of time are modelled: every delay is drawn from a seeded generator,
messages of one stream stay in order, bytes move at the end of their delay, and a pass reads and writes the pool at its
beginning or at its end. Invariants are checked after every event.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import xxhash

from core.messages import Command, Token, WorkerEvent
from coupled_worker.machine import CoupledConfig, CoupledMachine
from decode_worker.machine import DecodeConfig, DecodeMachine
from engine.fake import FakeEngine
from engine.protocol import Sampled
from halfmoon.blocks import root_hash
from halfmoon.errors import IntegrityError, PeerLost
from halfmoon.types import Epoch, NodeId, Role, Tier
from kv_store import transfer_values as tv
from kv_store.tiers import KvCache
from kv_store.transfer import TransferMachine
from kv_store.transfer_source import Tail
from kv_store.values import Move
from node.effects import AbortPull, Effect, Emit, HandOver, Pass, Report, StartPull, Withdraw, WorkerMachine
from prefill_worker.machine import PrefillConfig, PrefillMachine

SIZE = 4
TICK_S = 0.1
MEMORY = tv.LinkTraits(name="memory", two_sided=False)


class World:
    """The clock, the nodes, the streams between them.

    Attributes:
        on_event, on_token: what the driver of the cluster listens with: (node, event), (node, token).
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.nodes: dict[NodeId, Node] = {}
        self.on_event: Callable[[Node, WorkerEvent], None] = lambda node, event: None
        self.on_token: Callable[[Node, Token], None] = lambda node, token: None
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._serial = itertools.count()
        self._delivered_s: dict[object, float] = {}

    def add(self, name: str, role: Role, **settings: Any) -> Node:
        """Start a node; under a name that was used before: its next incarnation."""
        node = Node(self, NodeId(name), role, **settings)
        self.nodes[node.node_id] = node
        node.tick()
        return node

    def after(self, delay_s: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._serial), action))

    def deliver(self, stream: object, action: Callable[[], None]) -> None:
        """After a random latency, in the order of the stream."""
        due_s = max(self.now_s + self.rng.uniform(0.0001, 0.01), self._delivered_s.get(stream, 0.0))
        self._delivered_s[stream] = due_s
        self.after(due_s - self.now_s, action)

    def run(self, done: Callable[[], bool], limit_s: float = 120.0) -> None:
        """Until `done()`; fails the test if that takes more than `limit_s` of virtual time."""
        end_s = self.now_s + limit_s
        while not done():
            self.now_s, _, action = heapq.heappop(self._queue)
            assert self.now_s <= end_s, f"not done after {limit_s} s: " + "; ".join(map(str, self.nodes.values()))
            action()

    @property
    def at_rest(self) -> bool:
        return all(node.at_rest for node in self.nodes.values() if node.alive)


class Node:
    """One worker process: the loop's part is played here, event by event."""

    def __init__(
        self,
        world: World,
        node_id: NodeId,
        role: Role,
        *,
        device: int = 32,
        dram: int = 16,
        prefill: PrefillConfig | None = None,
        decode: DecodeConfig | None = None,
    ) -> None:
        self.world = world
        self.node_id = node_id
        self.epoch = Epoch(f"{node_id}@{world.now_s}")
        self.role = role
        self.alive = True
        self.engine = FakeEngine(block_size=SIZE)
        self.block_bytes = self.engine.model.layout.block_bytes
        self.cache = KvCache(num_device_slots=device, num_dram_slots=dram, block_size=SIZE)
        self.arenas = {
            Tier.DEVICE: bytearray(b"\xee" * (device * self.block_bytes)),
            Tier.DRAM: bytearray(b"\xdd" * (dram * self.block_bytes)),
        }
        self.engine.bind(memoryview(self.arenas[Tier.DEVICE]), device)
        self.transfers = TransferMachine(block_bytes=self.block_bytes, pins=self.cache)
        self.stamps: dict[tuple[Tier, int], int] = {}
        self.peers: dict[tv.SessionId, tuple[Node, tv.SessionId]] = {}
        self.machine = self._machine(prefill or PrefillConfig(tokens_per_pass_max=16), decode or DecodeConfig())
        self.computing = False
        self.num_passes = 0
        self.num_moves_out = 0

    def _machine(self, prefill: PrefillConfig, decode: DecodeConfig) -> WorkerMachine:
        common: dict[str, Any] = {
            "node_id": self.node_id,
            "cache": self.cache,
            "root": root_hash(self.engine.model.fingerprint),
            "block_size": SIZE,
        }
        if self.role is Role.PREFILL:
            return PrefillMachine(**common, config=prefill)
        if self.role is Role.DECODE:
            return DecodeMachine(**common, config=decode)
        return CoupledMachine(**common, config=CoupledConfig(prefill=prefill, decode=decode))

    def __str__(self) -> str:
        return f"{self.node_id}: attempts {[str(a) for a in self.machine.attempts()]}, {self.cache.counts(Tier.DEVICE)}"

    @property
    def at_rest(self) -> bool:
        return not self.machine.attempts() and self.transfers.quiescent and not self.num_moves_out

    # ---- from outside ----

    def command(self, command: Command) -> None:
        self.world.deliver((self, "commands"), partial(self.call, "on_command", command))

    def kill(self) -> None:
        """The process is gone: peers see their streams end, and everything it held is lost."""
        self.alive = False
        for session in list(self.peers):
            self._cut(session, f"{self.node_id} died")

    def tick(self) -> None:
        if self.alive:
            self.call("on_tick")
            self.transfer("on_tick")
            self.world.after(TICK_S, self.tick)

    # ---- the loop ----

    def call(self, event: str, *args: Any) -> None:
        """Tell the machine, perform what it wants, and compute if it can."""
        if self.alive:
            self._perform(getattr(self.machine, event)(*args, self.world.now_s))
            self._compute()
            self.check()

    def check(self) -> None:
        self.cache.check_invariants()
        self.transfers.check_invariants()

    def _collect(self) -> None:
        for move in self.cache.take_moves():
            self.num_moves_out += 1
            self.world.after(self.world.rng.uniform(0.001, 0.02), partial(self._move, move))
        news = self.cache.take_events()
        if news is not None:
            self.transfer("on_ready", [c.block_hash for c in news.stored if c.tier is Tier.DEVICE])

    def _perform(self, effects: Sequence[Effect]) -> None:
        self._collect()
        for effect in effects:
            match effect:
                case Report():
                    self.world.deliver((self, "events"), partial(self.world.on_event, self, effect.event))
                case Emit():
                    self.world.deliver((self, "tokens"), partial(self.world.on_token, self, effect.token))
                case StartPull():
                    self.transfer("start_pull", effect.spec)
                case AbortPull():
                    self.transfer("abort_pull", effect.transfer_id, effect.reason)
                case HandOver():
                    tail = Tail(index=effect.tail_index, slot=effect.tail_slot, num_tokens=effect.tail_tokens)
                    self.transfer("hand_over", effect.attempt_id, tail)
                case Withdraw():
                    self.transfer("withdraw", effect.attempt_id)

    def _compute(self) -> None:
        if self.computing:
            return
        work = self.machine.decide(self.world.now_s)
        self._collect()
        if work is not None:
            self.computing = True
            self.num_passes += 1
            seconds = self.world.rng.uniform(0.002, 0.02)
            early = self.engine.forward(work.slices) if self.world.rng.random() < 0.5 else None
            self.world.after(seconds, partial(self._computed, work, early, seconds))

    def _computed(self, work: Pass, results: list[Sampled | None] | None, seconds: float) -> None:
        if self.alive:
            self.computing = False
            self.call("account", work, self.engine.forward(work.slices) if results is None else results, seconds)

    # ---- bytes ----

    def block(self, tier: Tier, slot: int) -> memoryview:
        return memoryview(self.arenas[tier])[slot * self.block_bytes : (slot + 1) * self.block_bytes]

    def _move(self, move: Move) -> None:
        target, source = move.target, move.source
        self.block(target.tier, target.slot)[:] = self.block(source.tier, source.slot)
        self.num_moves_out -= 1
        self.call("on_moved", [move])

    # ---- transfers ----

    def transfer(self, event: str, *args: Any) -> None:
        """Tell the transfer machine, and perform what it wants before anything else happens."""
        if self.alive:
            for effect in getattr(self.transfers, event)(*args, self.world.now_s):
                self._perform_transfer(effect)

    def _perform_transfer(self, effect: tv.Effect) -> None:
        match effect:
            case tv.Dial():
                self.world.deliver((self, "dial", effect.session), partial(self._dial, effect))
            case tv.Hangup():
                self._cut(effect.session, effect.reason)
            case tv.Tell():
                self._tell(effect)
            case tv.Receive():
                self.world.after(self.world.rng.uniform(0.001, 0.02), partial(self._receive, effect))
            case tv.Hash():
                self.world.after(self.world.rng.uniform(0.0, 0.002), partial(self._hash, effect))
            case tv.Stamp():
                self.stamps[effect.tier, effect.slot] = effect.stamp
            case tv.Arrived():
                self._later("on_pull_arrived", effect.transfer_id, effect.indices)
            case tv.Ended():
                self._later("on_pull_ended", effect.ended)
            case tv.HandedOver():
                self._later("on_handed_over", effect.attempt_id)
            case tv.Withdrawn():
                self._later("on_withdrawn", effect.attempt_id)
            case tv.Transmit():
                raise AssertionError("the link is one-sided")

    def _later(self, event: str, *args: Any) -> None:
        """Through the node's inbox: in order, after what is being done now."""
        self.world.after(0.0, partial(self.call, event, *args))

    def _dial(self, dial: tv.Dial) -> None:
        peer = self.world.nodes.get(dial.node_id)
        if peer is None or not peer.alive or peer.epoch != dial.epoch:
            self.transfer("on_lost", dial.session, PeerLost(f"{dial.node_id} is not there"))
            return
        theirs = peer.transfers.next_session()
        self.peers[dial.session] = (peer, theirs)
        peer.peers[theirs] = (self, dial.session)
        peer.transfer("on_accepted", theirs, self.node_id, self.epoch)
        if dial.session in self.peers:
            self.transfer("on_open", dial.session, {Tier.DEVICE: MEMORY, Tier.DRAM: MEMORY})

    def _tell(self, tell: tv.Tell) -> None:
        link = self.peers.get(tell.session)
        if link is not None:
            stream = (self, tell.session)
            self.world.deliver(stream, partial(link[0]._hear, link[1], tell.message))

    def _hear(self, session: tv.SessionId, message: tv.Message) -> None:
        if session in self.peers:
            self.transfer("on_message", session, message)

    def _cut(self, session: tv.SessionId, reason: str) -> None:
        """End a stream; the other side notices."""
        link = self.peers.pop(session, None)
        if link is not None:
            peer, theirs = link
            peer.peers.pop(theirs, None)
            self.world.after(0.01, partial(peer.transfer, "on_lost", theirs, PeerLost(reason)))

    def _receive(self, receive: tv.Receive) -> None:
        link = self.peers.get(receive.session)
        error = PeerLost("the stream is gone") if link is None else self._copy(link[0], receive.batch)
        self.transfer("on_received", receive.batch.batch, error)

    def _copy(self, source: Node, batch: tv.Batch) -> IntegrityError | None:
        """As a one-sided link does: copy, then look at the headers, then at the checksums."""
        for piece in batch.pieces:
            self.block(Tier.DEVICE, piece.target)[:] = source.block(batch.tier, piece.slot)
            if source.stamps.get((batch.tier, piece.slot)) != piece.stamp:
                return IntegrityError(f"block {piece.index}: the header changed")
            if piece.checksum != _checksum(self.block(Tier.DEVICE, piece.target)):
                return IntegrityError(f"block {piece.index}: the checksum is wrong")
        return None

    def _hash(self, effect: tv.Hash) -> None:
        checksums = {index: _checksum(self.block(tier, slot)) for index, tier, slot in effect.items}
        self.transfer("on_hashed", effect.session, effect.transfer_id, checksums)


def _checksum(block: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(block)
