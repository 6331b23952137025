"""Two transfer machines against a wire that delays, duplicates, reorders across pulls, breaks, and nodes that crash.

At any time: a slot is rewritten only when nobody holds it, and then its header is zero; bytes are accepted only if they
are what the block's name says; nothing is written to a pull's slots after its end. In the end: one PullEnded per pull,
one answer per hand-over or withdrawal, no pins, no grants.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from halfmoon.errors import IntegrityError, PeerLost, TransferError
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, RequestId, Tier, TransferId
from kv_store.transfer import TransferMachine
from kv_store.transfer_attempts import Tail
from kv_store.transfer_values import (
    Arrived,
    Dial,
    Effect,
    Ended,
    HandedOver,
    Hangup,
    Hash,
    LinkTraits,
    Message,
    Ping,
    Pong,
    Receive,
    SessionId,
    Stamp,
    Tell,
    TransferLimits,
    Transmit,
    Withdrawn,
)
from kv_store.values import Place, PullSpec, Want

BLOCK_BYTES = 64
NUM_SLOTS = 6
NUM_NAMES = 5
TAIL_SLOTS = 2  # slots NUM_SLOTS and up hold attempts' tails
LIMITS = TransferLimits(
    pulls_max=6,
    serves_max=8,
    batch_bytes_max=2 * BLOCK_BYTES,
    batches_per_session_max=2,
    batches_max=3,
    hash_blocks_max=2,
)
ONE_SIDED = LinkTraits(name="shm", two_sided=False)
TWO_SIDED = LinkTraits(name="torch", two_sided=True)


def name_of(number: int) -> BlockHash:
    return BlockHash(b"block-%d" % number)


@dataclass
class Slots:
    """One incarnation's memory and bookkeeping of copies."""

    content: list[bytes] = field(default_factory=lambda: [b""] * (NUM_SLOTS + TAIL_SLOTS))
    stamps: Counter[int] = field(default_factory=Counter)
    generations: Counter[int] = field(default_factory=Counter)
    places: dict[BlockHash, Place] = field(default_factory=dict)
    pins: list[tuple[Place, str]] = field(default_factory=list)

    def pin_copy(self, block_hash: BlockHash, holder: str) -> Place | None:
        place = self.places.get(block_hash)
        if place is not None:
            assert (place, holder) not in self.pins, "a holder pins a block once"
            self.pins.append((place, holder))
        return place

    def unpin_copy(self, place: Place, holder: str) -> None:
        self.pins.remove((place, holder))

    def fill(self, slot: int, block_hash: BlockHash) -> bool:
        """Give the slot to another block, unless somebody holds it or the block is here."""
        if block_hash in self.places or any(p.slot == slot for p, _ in self.pins):
            return False
        assert self.stamps[slot] == 0, "a slot that peers may accept bytes from was given away"
        self.places = {h: p for h, p in self.places.items() if p.slot != slot}
        self.generations[slot] += 1
        self.places[block_hash] = Place(tier=Tier.DEVICE, slot=slot, generation=self.generations[slot])
        self.content[slot] = bytes(block_hash)
        return True


@dataclass
class Node:
    node_id: NodeId
    epoch: Epoch
    slots: Slots
    machine: TransferMachine
    pulls: dict[TransferId, PullSpec] = field(default_factory=dict)
    ended: set[TransferId] = field(default_factory=set)
    arrived: dict[TransferId, set[int]] = field(default_factory=dict)
    tails: dict[AttemptId, int] = field(default_factory=dict)  # tail slots that the attempts still hold
    handing: dict[AttemptId, float] = field(default_factory=dict)  # since when
    withdrawing: set[AttemptId] = field(default_factory=set)
    spoken: set[AttemptId] = field(default_factory=set)
    jobs: list[Receive | Transmit | Hash] = field(default_factory=list)
    sent: dict[tuple[SessionId, int], dict[int, bytes]] = field(default_factory=dict)


@dataclass
class Wire:
    """One stream, as both ends name it. A queue is what was told in one direction and is not delivered yet."""

    sink: Node
    source: Node
    sink_session: SessionId
    source_session: SessionId | None = None
    down: list[Message] = field(default_factory=list)  # to the source
    up: list[Message] = field(default_factory=list)  # to the sink
    broken: bool = False
    sink_knows: bool = False
    source_knows: bool = False


class Transfers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.nodes: list[Node] = []
        self.wires: list[Wire] = []
        self.num_pulls = 0
        self.num_epochs = 0
        self.num_attempts = 0

    @initialize()
    def begin(self) -> None:
        self.nodes = [self.boot(0), self.boot(1)]
        for node in self.nodes:
            for number in range(3):
                node.slots.fill(number, name_of(number))

    def boot(self, number: int) -> Node:
        self.num_epochs += 1
        slots = Slots()
        machine = TransferMachine(block_bytes=BLOCK_BYTES, pins=slots, limits=LIMITS)
        return Node(NodeId(f"n{number}"), Epoch(f"e{self.num_epochs}"), slots, machine)

    # ---- what nodes do ----

    @rule(sink=st.integers(0, 1), names=st.sets(st.integers(0, NUM_NAMES - 1), max_size=4), wait=st.booleans())
    def start_pull(self, sink: int, names: set[int], wait: bool) -> None:
        node, source = self.nodes[sink], self.nodes[1 - sink]
        self.num_pulls += 1
        attempt = AttemptId(RequestId("r"), self.num_attempts % 3)
        self.num_attempts += wait
        wants = [Want(index=i, block_hash=name_of(n), num_tokens=4, slot=i) for i, n in enumerate(sorted(names))]
        if wait:
            wants.append(Want(index=len(wants), block_hash=None, num_tokens=2, slot=len(wants)))
        spec = PullSpec(
            transfer_id=TransferId(f"t{self.num_pulls}"),
            attempt_id=attempt,
            source=source.node_id,
            source_epoch=source.epoch,
            source_address="",
            wants=tuple(wants),
            wait=wait,
            deadline_s=5.0,
        )
        node.pulls[spec.transfer_id] = spec
        node.arrived[spec.transfer_id] = set()
        self.perform(node, node.machine.start_pull(spec, self.now_s))

    @rule(sink=st.integers(0, 1), data=st.data())
    def abort_pull(self, sink: int, data: st.DataObject) -> None:
        node = self.nodes[sink]
        if node.pulls:
            transfer_id = data.draw(st.sampled_from(sorted(node.pulls)))
            self.perform(node, node.machine.abort_pull(transfer_id, "no longer wanted", self.now_s))

    @rule(node=st.integers(0, 1), slot=st.integers(0, NUM_SLOTS - 1), name=st.integers(0, NUM_NAMES - 1))
    def block_ready(self, node: int, slot: int, name: int) -> None:
        owner = self.nodes[node]
        if owner.slots.fill(slot, name_of(name)):
            self.perform(owner, owner.machine.on_ready([name_of(name)], self.now_s))

    @rule(node=st.integers(0, 1), number=st.integers(0, 2), index=st.integers(0, 4))
    def hand_over(self, node: int, number: int, index: int) -> None:
        owner, attempt = self.nodes[node], AttemptId(RequestId("r"), number)
        free = set(range(NUM_SLOTS, NUM_SLOTS + TAIL_SLOTS)) - set(owner.tails.values())
        if attempt in owner.spoken or not free:
            return
        slot = min(free)
        assert owner.slots.stamps[slot] == 0
        owner.slots.content[slot] = b"tail of %d" % number
        owner.tails[attempt] = slot
        owner.spoken.add(attempt)
        owner.handing[attempt] = self.now_s
        tail = Tail(index=index, slot=slot, num_tokens=3)
        self.perform(owner, owner.machine.hand_over(attempt, tail, self.now_s))

    @rule(node=st.integers(0, 1), number=st.integers(0, 2))
    def withdraw(self, node: int, number: int) -> None:
        owner, attempt = self.nodes[node], AttemptId(RequestId("r"), number)
        if attempt not in owner.withdrawing:
            owner.spoken.add(attempt)
            owner.handing.pop(attempt, None)
            owner.withdrawing.add(attempt)
            self.perform(owner, owner.machine.withdraw(attempt, self.now_s))

    # ---- what the wire does ----

    @rule(data=st.data(), duplicate=st.booleans())
    @precondition(lambda self: any(w.down or w.up for w in self.wires if not w.broken))
    def deliver(self, data: st.DataObject, duplicate: bool) -> None:
        wire = data.draw(st.sampled_from([w for w in self.wires if not w.broken and (w.down or w.up)]))
        queue = data.draw(st.sampled_from([q for q in (wire.down, wire.up) if q]))
        firsts = first_of_each_transfer(queue)
        self.pass_on(wire, queue, data.draw(st.sampled_from(firsts)), keep=duplicate)

    def pass_on(self, wire: Wire, queue: list[Message], position: int, keep: bool = False) -> None:
        message = queue[position] if keep else queue.pop(position)
        if queue is wire.down:
            if wire.source_session is not None and not wire.source_knows:
                events = wire.source.machine.on_message(wire.source_session, message, self.now_s)
                self.perform(wire.source, events)
        elif not wire.sink_knows:
            self.perform(wire.sink, wire.sink.machine.on_message(wire.sink_session, message, self.now_s))

    @rule()
    @precondition(lambda self: self.wires)
    def rush(self) -> None:
        """Everything but the copies themselves happens at once: the interesting states lie behind it."""
        for _ in range(4):
            for wire in list(self.wires):
                self.rush_one(wire)
            for node in self.nodes:
                for job in [j for j in node.jobs if isinstance(j, Hash)]:
                    node.jobs.remove(job)
                    self.finish(node, job, well=True)

    def rush_one(self, wire: Wire) -> None:
        if wire.source_session is None and not wire.broken:
            self.connect(wire)
        for queue in (wire.down, wire.up):
            while queue and not wire.broken:
                self.pass_on(wire, queue, 0)

    @rule(data=st.data())
    @precondition(lambda self: any(w.source_session is None and not w.broken for w in self.wires))
    def greet(self, data: st.DataObject) -> None:
        self.connect(data.draw(st.sampled_from([w for w in self.wires if w.source_session is None and not w.broken])))

    def connect(self, wire: Wire) -> None:
        if wire.source not in self.nodes:
            wire.broken = True
            return
        wire.source_session = wire.source.machine.next_session()
        accepted = wire.source.machine.on_accepted(wire.source_session, wire.sink.node_id, wire.sink.epoch, self.now_s)
        self.perform(wire.source, accepted)
        traits = TWO_SIDED if wire.sink.node_id == "n1" else ONE_SIDED
        self.perform(wire.sink, wire.sink.machine.on_open(wire.sink_session, {Tier.DEVICE: traits}, self.now_s))

    @rule(data=st.data())
    @precondition(lambda self: any(not w.broken for w in self.wires))
    def break_wire(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([w for w in self.wires if not w.broken])).broken = True

    @rule(data=st.data(), source_first=st.booleans())
    @precondition(lambda self: any(w.broken for w in self.wires))
    def notice(self, data: st.DataObject, source_first: bool) -> None:
        self.tell_of_loss(data.draw(st.sampled_from([w for w in self.wires if w.broken])), source_first)

    def tell_of_loss(self, wire: Wire, source: bool) -> None:
        if source and not wire.source_knows:
            wire.source_knows = True
            if wire.source_session is not None:
                lost = wire.source.machine.on_lost(wire.source_session, PeerLost("broken"), self.now_s)
                self.perform(wire.source, lost)
        elif not source and not wire.sink_knows:
            wire.sink_knows = True
            self.perform(wire.sink, wire.sink.machine.on_lost(wire.sink_session, PeerLost("broken"), self.now_s))

    @rule(number=st.integers(0, 1))
    def crash(self, number: int) -> None:
        """The node is gone with its memory, and comes back as another incarnation."""
        dead = self.nodes[number]
        for wire in self.wires:
            if wire.sink is dead or wire.source is dead:
                wire.broken = True
                wire.sink_knows |= wire.sink is dead
                wire.source_knows |= wire.source is dead
        dead.jobs.clear()
        self.nodes[number] = self.boot(number)

    # ---- what threads do ----

    @rule(number=st.integers(0, 1), data=st.data(), well=st.booleans())
    @precondition(lambda self: any(n.jobs for n in self.nodes))
    def finish_job(self, number: int, data: st.DataObject, well: bool) -> None:
        node = self.nodes[number]
        if node.jobs:
            self.finish(node, node.jobs.pop(data.draw(st.integers(0, len(node.jobs) - 1))), well)

    def finish(self, node: Node, job: Receive | Transmit | Hash, well: bool) -> None:
        machine = node.machine
        if isinstance(job, Hash):
            sums = {i: hash_of(node.slots.content[slot]) for i, _, slot in job.items}
            self.perform(node, machine.on_hashed(job.session, job.transfer_id, sums, self.now_s))
        elif isinstance(job, Transmit):
            for piece in job.batch.pieces:
                assert node.slots.stamps[piece.slot] == piece.stamp, "a slot was released while it was being sent"
            error = None if well else PeerLost("ordered")
            self.perform(node, machine.on_transmitted(job.session, job.batch.batch, error, self.now_s))
        else:
            error = self.receive(node, job) if well else PeerLost("ordered")
            self.perform(node, machine.on_received(job.batch.batch, error, self.now_s))

    def receive(self, node: Node, job: Receive) -> TransferError | None:
        """Write what the source's slots hold now; accept it if header and checksum agree."""
        batch = job.batch
        assert batch.transfer_id not in node.ended, "a byte was written after the pull had ended"
        (wire,) = [w for w in self.wires if w.sink is node and w.sink_session == job.session]
        sent = None if wire.source_session is None else wire.source.sent.get((wire.source_session, batch.batch))
        two_sided = node.node_id == "n1"
        if two_sided and sent is None:
            return PeerLost("nothing was sent")
        for piece in batch.pieces:
            content = sent[piece.index] if two_sided and sent else wire.source.slots.content[piece.slot]
            if not two_sided and wire.source.slots.stamps[piece.slot] != piece.stamp:
                return IntegrityError("revoked")
            assert two_sided or hash_of(content) == piece.checksum, "the header is right and the bytes are not"
            if hash_of(content) != piece.checksum:
                return IntegrityError("checksum")
            want = next(w for w in node.pulls[batch.transfer_id].wants if w.index == piece.index)
            expected = want.block_hash or b"tail of %d" % node.pulls[batch.transfer_id].attempt_id.number
            assert content == expected, "a block arrived under another's name"
        return None

    @rule(seconds=st.sampled_from([0.01, 0.4, 1.1, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        for node in self.nodes:
            self.perform(node, node.machine.on_tick(self.now_s))

    # ---- effects ----

    def perform(self, node: Node, effects: list[Effect]) -> None:
        for effect in effects:
            self.perform_one(node, effect)

    def perform_one(self, node: Node, effect: Effect) -> None:
        match effect:
            case Dial():
                peer = next(n for n in self.nodes if n.node_id == effect.node_id)
                wire = Wire(node, peer, effect.session, broken=peer.epoch != effect.epoch)
                self.wires.append(wire)
            case Tell():
                for wire in self.wires:
                    if wire.sink is node and wire.sink_session == effect.session:
                        wire.down.append(effect.message)
                    elif wire.source is node and wire.source_session == effect.session:
                        wire.up.append(effect.message)
            case Hangup():
                for wire in self.wires:
                    if wire.sink is node and wire.sink_session == effect.session:
                        wire.broken = wire.sink_knows = True
                    elif wire.source is node and wire.source_session == effect.session:
                        wire.broken = wire.source_knows = True
            case Transmit():  # its bytes may arrive before this end knows that they left
                content = {p.index: node.slots.content[p.slot] for p in effect.batch.pieces}
                node.sent[effect.session, effect.batch.batch] = content
                node.jobs.append(effect)
            case Receive() | Hash():
                node.jobs.append(effect)
            case Stamp():
                node.slots.stamps[effect.slot] = effect.stamp
            case Arrived():
                assert not node.arrived[effect.transfer_id] & set(effect.indices), "a block arrived twice"
                node.arrived[effect.transfer_id] |= set(effect.indices)
            case Ended():
                self.on_ended(node, effect)
            case HandedOver():
                assert effect.attempt_id in node.handing
                del node.handing[effect.attempt_id]
                self.free_tail(node, effect.attempt_id)
            case Withdrawn():
                if effect.attempt_id in node.withdrawing:
                    node.withdrawing.remove(effect.attempt_id)
                else:
                    handed_s = node.handing.pop(effect.attempt_id)
                    assert self.now_s - handed_s >= LIMITS.hold_s, "withdrawn unasked, before nobody read for so long"
                self.free_tail(node, effect.attempt_id)

    def free_tail(self, node: Node, attempt: AttemptId) -> None:
        """The attempt's slots are free from here on: nobody may accept bytes from them any more."""
        slot = node.tails.pop(attempt, None)
        if slot is not None:
            assert node.slots.stamps[slot] == 0
            node.slots.content[slot] = b"somebody else's"
        node.spoken.discard(attempt)

    def on_ended(self, node: Node, effect: Ended) -> None:
        ended = effect.ended
        assert ended.transfer_id not in node.ended, "a pull ended twice"
        node.ended.add(ended.transfer_id)
        wanted = {w.index for w in node.pulls[ended.transfer_id].wants}
        assert set(ended.missing) == wanted - node.arrived[ended.transfer_id]
        assert 0.0 <= ended.overlap <= 1.0
        running = [j for j in node.jobs if isinstance(j, Receive) and j.batch.transfer_id == ended.transfer_id]
        assert not running, "a pull ended while a batch of it was in flight"

    @invariant()
    def books_balance(self) -> None:
        for node in self.nodes:
            node.machine.check_invariants()
            granted = {s for s, stamp in node.slots.stamps.items() if stamp}
            assert {p.slot for p, _ in node.slots.pins} <= granted

    # ---- the end ----

    def teardown(self) -> None:
        for _ in range(200):
            if not self.settle():
                break
        else:
            raise AssertionError("it never came to rest")
        for node in self.nodes:
            assert node.ended == set(node.pulls), "a pull did not end"
            assert not node.slots.pins
            assert not any(node.slots.stamps.values())
            assert node.machine.source.num_grants == 0
            assert node.machine.quiescent
            assert not node.withdrawing, "a withdrawal was not answered"

    def settle(self) -> bool:
        """One round of everything that can still happen, and some time; False when nothing could."""
        active = False
        for wire in list(self.wires):
            if wire.source_session is None and not wire.broken:
                self.connect(wire)
                active = True
            for queue in (wire.down, wire.up):
                while queue and not wire.broken:
                    active |= not isinstance(queue[0], Ping | Pong)
                    self.pass_on(wire, queue, 0)
            if wire.broken and not (wire.sink_knows and wire.source_knows):
                self.tell_of_loss(wire, source=True)
                self.tell_of_loss(wire, source=False)
                active = True
        for node in self.nodes:
            while node.jobs:
                self.finish(node, node.jobs.pop(0), well=True)
                active = True
        self.wait(0.5)
        return active or any(not node.machine.quiescent for node in self.nodes)


def first_of_each_transfer(queue: list[Message]) -> list[int]:
    """Positions that may be delivered next: messages of one transfer keep their order."""
    seen: set[TransferId | None] = set()
    positions = []
    for position, message in enumerate(queue):
        transfer_id = getattr(message, "transfer_id", None)
        if transfer_id not in seen:
            positions.append(position)
        seen.add(transfer_id)
    return positions


def hash_of(content: bytes) -> int:
    return int.from_bytes(content[:16], "little")


TestTransfers = Transfers.TestCase
TestTransfers.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
