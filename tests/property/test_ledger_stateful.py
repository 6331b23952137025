"""The tiers' books against a dumb twin that has real bytes: one label per slot, copied when a move is done.

The twin knows what each sequence has written and committed, and which names exist; it knows nothing about eviction.
Moves are done late, in any order, in any portions. After every step: every block that somebody may read holds the
right label, no slot belongs to two sequences unless both read the same full block, and the states add up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.messages import BlockCopy
from halfmoon.types import AttemptId, BlockHash, RequestId, Tier
from kv_store.tiers import KvCache
from kv_store.values import Move, Opened, Place

Path = tuple[int, ...]
ROOMY_DRAM = 64  # more than all names and parked tails together: then nothing may ever be lost

paths = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)


def names_of(path: Path) -> list[BlockHash]:
    """A tree of blocks: prefixes that agree share their names."""
    return [BlockHash(bytes(path[: i + 1]).rjust(16, b"n")) for i in range(len(path))]


@dataclass
class TwinSequence:
    """What the owner believes: `labels[i]` is what its block i must hold (None: nothing written yet)."""

    names: list[BlockHash]
    labels: list[bytes | None]
    num_committed: int
    slots: list[int] = field(default_factory=list)
    state: str = "running"


class TiersAgainstBytes(RuleBasedStateMachine):
    @initialize(num_device=st.integers(2, 7), num_dram=st.sampled_from([0, 1, 3, 6, ROOMY_DRAM]))
    def start(self, num_device: int, num_dram: int) -> None:
        self.cache = KvCache(num_device_slots=num_device, num_dram_slots=num_dram, block_size=16)
        self.num = {Tier.DEVICE: num_device, Tier.DRAM: num_dram}
        self.bytes: dict[tuple[Tier, int], bytes | None] = {}
        self.sequences: dict[AttemptId, TwinSequence] = {}
        self.pins: dict[tuple[str, Place], BlockHash] = {}
        self.contents: dict[tuple[Tier, int, int], BlockHash] = {}
        self.out: list[Move] = []
        self.known: set[BlockHash] = set()
        self.observer: set[BlockCopy] = set()
        self.last_event_id = 0
        self.serial = 0
        self.now_s = 0.0

    # ---- what sequences do ----

    @rule(path=paths, extra=st.integers(0, 2), use_hits=st.none() | st.integers(0, 4))
    def open(self, path: Path, extra: int, use_hits: int | None) -> None:
        num_blocks = min(len(path) + extra, self.num[Tier.DEVICE])
        owner = AttemptId(RequestId(f"r{self._next()}"), 1)
        names = names_of(path)
        could = self.cache.available(Tier.DEVICE) >= num_blocks
        opened = self.cache.open(owner, names, num_blocks, self.now_s, use_hits=use_hits)
        if opened is None and could:
            self._do_all_moves()
            opened = self.cache.open(owner, names, num_blocks, self.now_s, use_hits=use_hits)
            assert opened is not None, "the moves are done and there was room"
        if opened is None:
            return
        assert len(opened.slots) == num_blocks
        assert len(opened.hits) <= min(len(names), num_blocks if use_hits is None else use_hits)
        self._seat(owner, TwinSequence(names, list(names[: len(opened.hits)]), len(opened.hits)), opened)

    @precondition(lambda self: self._owners("running"))
    @rule(data=st.data())
    def compute_and_commit(self, data: st.DataObject) -> None:
        owner, sequence = self._pick(data, "running")
        index = sequence.num_committed
        if index >= min(len(sequence.names), len(sequence.slots)):
            return
        self._write(sequence, index, sequence.names[index])
        self.cache.commit(owner, index, sequence.names[index], self.now_s)
        sequence.num_committed += 1
        self.known.add(sequence.names[index])

    @precondition(lambda self: self._owners("running"))
    @rule(data=st.data())
    def compute_a_tail(self, data: st.DataObject) -> None:
        _, sequence = self._pick(data, "running")
        index = sequence.num_committed
        if index < len(sequence.slots) and sequence.slots[index] not in self._filling(Tier.DEVICE):
            self._write(sequence, index, b"private-%d" % self._next())

    @precondition(lambda self: self._owners("running"))
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        owner, sequence = self._pick(data, "running")
        could = self.cache.available(Tier.DEVICE) >= 1
        slot = self.cache.grow(owner, self.now_s)
        if slot is None and could:
            self._do_all_moves()
            slot = self.cache.grow(owner, self.now_s)
            assert slot is not None
        if slot is not None:
            sequence.slots.append(slot)
            sequence.labels.append(None)
            self.bytes[Tier.DEVICE, slot] = None

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.sequences)))
        del self.sequences[owner]
        self.cache.close(owner, self.now_s)

    @precondition(lambda self: self._owners("running", "parked"))
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        owner, sequence = self._pick(data, "running", "parked")
        self.cache.quarantine(owner)
        sequence.state = "quarantined"

    @precondition(lambda self: self._owners("running"))
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        owner, sequence = self._pick(data, "running")
        keep = data.draw(st.integers(0, len(sequence.slots)))
        room = self.cache.available(Tier.DRAM)
        before = (self.cache.counts(Tier.DEVICE), self.cache.counts(Tier.DRAM))
        if not self.cache.park(owner, keep, self.now_s):
            assert room < keep or self.num[Tier.DRAM] == 0
            assert before == (self.cache.counts(Tier.DEVICE), self.cache.counts(Tier.DRAM))
            return
        sequence.state = "parked"
        del sequence.labels[keep:]
        sequence.slots = []
        sequence.num_committed = min(sequence.num_committed, keep)

    @precondition(lambda self: self._owners("parked"))
    @rule(data=st.data())
    def unpark(self, data: st.DataObject) -> None:
        owner, sequence = self._pick(data, "parked")
        could = self.cache.available(Tier.DEVICE) >= len(sequence.labels)
        opened = self.cache.unpark(owner, self.now_s)
        if opened is None and could:
            self._do_all_moves()
            opened = self.cache.unpark(owner, self.now_s)
            assert opened is not None
        if opened is not None:
            assert len(opened.slots) == len(opened.hits) == len(sequence.labels)
            sequence.state = "running"
            self._seat(owner, sequence, opened)

    # ---- what peers, the shell and time do ----

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        holder = f"grant-{self._next()}"
        tiers = self.cache.match([name])
        place = self.cache.pin_copy(name, holder)
        assert (place.tier if place else None) == (tiers[0] if tiers else None)
        if place is not None:
            self.pins[holder, place] = name

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        holder, place = data.draw(st.sampled_from(sorted(self.pins, key=repr)))
        del self.pins[holder, place]
        self.cache.unpin_copy(place, holder)

    @rule(data=st.data())
    def some_moves_are_done(self, data: st.DataObject) -> None:
        self._take_moves()
        self._do_moves([move for move in data.draw(st.permutations(self.out)) if data.draw(st.booleans())])

    @rule(seconds=st.sampled_from([0.0, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def observe(self) -> None:
        event = self.cache.take_events()
        if event is not None:
            assert event.event_id == self.last_event_id + 1 == self.cache.last_event_id
            assert set(event.removed) <= self.observer
            assert not set(event.stored) & self.observer
            self.last_event_id = event.event_id
            self.observer = (self.observer - set(event.removed)) | set(event.stored)
        assert self.observer == set(self.cache.snapshot())
        assert len(self.cache.snapshot()) == len(self.observer)

    # ---- what must hold ----

    @invariant()
    def books_are_right(self) -> None:
        self.cache.audit()
        self._take_moves()
        for tier in (Tier.DEVICE, Tier.DRAM):
            assert sum(self.cache.counts(tier).values()) == self.num[tier]

    @invariant()
    def device_states_follow_from_who_is_there(self) -> None:
        tables = [slot for s in self.sequences.values() for slot in s.slots]
        pinned = [place.slot for _, place in self.pins if place.tier is Tier.DEVICE]
        held = {*tables, *pinned, *self._filling(Tier.DEVICE)}
        leaving = {move.source.slot for move in self.out if move.source.tier is Tier.DEVICE} - held
        counts = self.cache.counts(Tier.DEVICE)
        assert counts["filling"] + counts["pinned"] + counts["quarantined"] == len(held)
        assert counts["evicting"] == len(leaving)
        assert self.cache.available(Tier.DEVICE) == self.num[Tier.DEVICE] - len(held)

    @invariant()
    def everyone_reads_what_it_wrote(self) -> None:
        readers: dict[int, list[bytes | None]] = {}
        for owner, sequence in self.sequences.items():
            assert self.cache.slots(owner) == tuple(sequence.slots)
            for slot, label in zip(sequence.slots, sequence.labels, strict=False):
                readers.setdefault(slot, []).append(label)
                if label is not None and slot not in self._filling(Tier.DEVICE):
                    assert self.bytes[Tier.DEVICE, slot] == label
        for slot, labels in readers.items():
            shared_full_block = labels[0] in self.known and len(set(labels)) == 1
            assert len(labels) == 1 or shared_full_block, f"slot {slot} has two owners: {labels}"

    @invariant()
    def visible_copies_hold_what_their_names_say(self) -> None:
        for (_, place), name in self.pins.items():
            assert self.bytes[place.tier, place.slot] == name
        for copy in self.cache.snapshot():
            assert copy.block_hash in self.known
        for name in self.known:
            place = self.cache.pin_copy(name, "probe")
            if place is None:
                assert self.num[Tier.DRAM] != ROOMY_DRAM, f"{name!r} was lost"
                continue
            assert self.bytes[place.tier, place.slot] == name
            assert self.contents.setdefault((place.tier, place.slot, place.generation), name) == name
            self.cache.unpin_copy(place, "probe")

    def teardown(self) -> None:
        """Whatever happened, everything can be released, and then all but ready blocks is free."""
        for owner in list(self.sequences):
            self.cache.close(owner, self.now_s)
        for holder, place in self.pins:
            self.cache.unpin_copy(place, holder)
        self._do_all_moves()
        self.cache.audit()
        for tier in (Tier.DEVICE, Tier.DRAM):
            counts = self.cache.counts(tier)
            assert counts["free"] + counts["ready"] == self.num[tier]
        self.observe()

    # ---- the twin's hands ----

    def _next(self) -> int:
        self.serial += 1
        return self.serial

    def _owners(self, *states: str) -> list[AttemptId]:
        return sorted(owner for owner, s in self.sequences.items() if s.state in states)

    def _pick(self, data: st.DataObject, *states: str) -> tuple[AttemptId, TwinSequence]:
        owner = data.draw(st.sampled_from(self._owners(*states)))
        return owner, self.sequences[owner]

    def _seat(self, owner: AttemptId, sequence: TwinSequence, opened: Opened) -> None:
        """Take over the table, scribbling over the slots that are said to be empty."""
        sequence.slots = list(opened.slots)
        self.sequences[owner] = sequence
        self._take_moves()
        assert opened.loading == {i for i, slot in enumerate(opened.slots) if slot in self._filling(Tier.DEVICE)}
        for i in range(len(sequence.labels), len(opened.slots)):
            sequence.labels.append(None)
            self.bytes[Tier.DEVICE, opened.slots[i]] = None

    def _write(self, sequence: TwinSequence, index: int, label: bytes) -> None:
        """Compute a block; a tail whose load is still out has to wait for it."""
        if sequence.slots[index] in self._filling(Tier.DEVICE):
            self._do_all_moves()
        sequence.labels[index] = label
        self.bytes[Tier.DEVICE, sequence.slots[index]] = label

    def _filling(self, tier: Tier) -> set[int]:
        return {move.target.slot for move in self.out if move.target.tier is tier}

    def _take_moves(self) -> None:
        self.out += self.cache.take_moves()

    def _do_moves(self, moves: list[Move]) -> None:
        for move in moves:
            self.out.remove(move)
            source = self.bytes.get((move.source.tier, move.source.slot))
            self.bytes[move.target.tier, move.target.slot] = source
        self.cache.on_moved(moves, self.now_s)

    def _do_all_moves(self) -> None:
        self._take_moves()
        self._do_moves(list(self.out))


TestTiersAgainstBytes = TiersAgainstBytes.TestCase
TestTiersAgainstBytes.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
