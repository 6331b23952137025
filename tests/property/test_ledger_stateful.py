"""The tiers' books against a dumb twin that has real bytes: one label per slot, copied when a move is done.

The twin knows what each sequence has written and committed, and which names exist; it knows nothing about eviction.
Moves are done late, in any order, in any portions. After every step: every block that somebody may read holds the
right label, no slot belongs to two sequences unless both read the same full block, and the states add up.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.messages import BlockCopy
from halfmoon.types import AttemptId, BlockHash, RequestId, Tier
from kv_store.eviction_policies import POLICIES
from kv_store.tiers import KvCache
from kv_store.values import Move, Opened, Place

Answer = TypeVar("Answer")
Path = tuple[int, ...]
WALKS, STEPS_IN_A_WALK = 60, 150
ROOMY_DRAM = 64  # more than all names and parked tails together: then nothing may ever be lost

picks = st.integers(0, 63)  # which of the sequences, pins or names that there are
paths = st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple)


def names_of(path: Path) -> list[BlockHash]:
    """A tree of blocks: prefixes that agree share their names."""
    return [BlockHash(bytes(path[: i + 1]).rjust(16, b"n")) for i in range(len(path))]


@dataclass
class TwinSequence:
    """What the owner believes: `labels[i]` is what its block i must hold."""

    names: list[BlockHash]
    labels: list[bytes]
    num_committed: int
    slots: list[int] = field(default_factory=list)
    state: str = "running"


class TiersAgainstBytes(RuleBasedStateMachine):
    @initialize(
        num_device=st.integers(4, 9),
        num_dram=st.sampled_from([ROOMY_DRAM, 0, 3, 6, ROOMY_DRAM]),
        eviction=st.sampled_from(list(POLICIES)),
    )
    def start(self, num_device: int, num_dram: int, eviction: str) -> None:
        self.cache = KvCache(num_device_slots=num_device, num_dram_slots=num_dram, block_size=16, eviction=eviction)
        self.num = {Tier.DEVICE: num_device, Tier.DRAM: num_dram}
        self.bytes: dict[tuple[Tier, int], bytes] = {}
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

    @precondition(lambda self: len(self._owners("running")) < 3)  # more would only leave no room to play in
    @rule(path=paths, extra=st.integers(0, 2), use_hits=st.none() | st.integers(0, 4), insist=st.booleans())
    def open(self, path: Path, extra: int, use_hits: int | None, insist: bool) -> None:
        num_blocks = min(len(path) + extra, self.num[Tier.DEVICE])
        owner = AttemptId(RequestId(f"r{self._next()}"), 1)
        names = names_of(path)
        could = self.cache.available(Tier.DEVICE) >= num_blocks
        opened = self.cache.open(owner, names, num_blocks, self.now_s, use_hits=use_hits)
        if opened is None and could and insist:
            opened = self._insist(lambda: self.cache.open(owner, names, num_blocks, self.now_s, use_hits=use_hits))
            assert opened is not None, "the moves are done and there was room"
        if opened is None:
            return
        assert len(opened.slots) == num_blocks
        assert len(opened.hits) <= min(len(names), num_blocks if use_hits is None else use_hits)
        self._seat(owner, TwinSequence(names, list(names[: len(opened.hits)]), len(opened.hits)), opened)

    @precondition(lambda self: self._owners("running"))
    @rule(pick=picks, most=st.sampled_from([3, 1, 0]), seconds=st.sampled_from([0.0, 1.0]))
    def compute(self, pick: int, most: int, seconds: float) -> None:
        """At most so many full blocks are computed and committed, and the beginning of the next one."""
        self.now_s += seconds
        owner, sequence = self._pick(pick, "running")
        for _ in range(most):
            index = sequence.num_committed
            if index >= min(len(sequence.names), len(sequence.slots)) or self._is_loading(sequence, index):
                return
            self._write(sequence, index, sequence.names[index])
            self.cache.commit(owner, index, sequence.names[index], self.now_s)
            self.known.add(sequence.names[index])
            sequence.num_committed += 1
        index = sequence.num_committed
        if index < len(sequence.slots) and not self._is_loading(sequence, index):
            self._write_tail(sequence, index)

    @precondition(lambda self: self._owners("running") and self.cache.available(Tier.DEVICE))
    @rule(pick=picks, insist=st.booleans())
    def grow(self, pick: int, insist: bool) -> None:
        owner, sequence = self._pick(pick, "running")
        could = self.cache.available(Tier.DEVICE) >= 1
        slot = self.cache.grow(owner, self.now_s)
        if slot is None and could and insist:
            slot = self._insist(lambda: self.cache.grow(owner, self.now_s))
            assert slot is not None
        if slot is not None:
            sequence.slots.append(slot)
            sequence.labels.append(b"")
            self._write_tail(sequence, len(sequence.slots) - 1)

    @precondition(lambda self: self.sequences)
    @rule(pick=picks, how=st.sampled_from(["close", "close", "quarantine"]))
    def leave(self, pick: int, how: str) -> None:
        owner, sequence = self._pick(pick, "running", "parked", "quarantined")
        if how == "quarantine" and sequence.state != "quarantined":
            self.cache.quarantine(owner)
            sequence.state = "quarantined"
        else:
            del self.sequences[owner]
            self.cache.close(owner, self.now_s)

    @precondition(lambda self: self._owners("running", "parked"))
    @rule(pick=picks, fewer=st.integers(0, 2), insist=st.booleans())
    def preempt_or_resume(self, pick: int, fewer: int, insist: bool) -> None:
        owner, sequence = self._pick(pick, "running", "parked")
        if sequence.state == "running":
            self._park(owner, sequence, max(0, len(sequence.slots) - fewer))
        else:
            self._unpark(owner, sequence, insist)

    def _park(self, owner: AttemptId, sequence: TwinSequence, keep: int) -> None:
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

    def _unpark(self, owner: AttemptId, sequence: TwinSequence, insist: bool) -> None:
        could = self.cache.available(Tier.DEVICE) >= len(sequence.labels)
        opened = self.cache.unpark(owner, self.now_s)
        if opened is None and could and insist:
            opened = self._insist(lambda: self.cache.unpark(owner, self.now_s))
            assert opened is not None
        if opened is not None:
            assert len(opened.slots) == len(opened.hits) == len(sequence.labels)
            sequence.state = "running"
            self._seat(owner, sequence, opened)

    # ---- what peers, the shell and time do ----

    @precondition(lambda self: self.known)
    @rule(pick=picks, wants=st.booleans())
    def a_peer_pins_or_unpins(self, pick: int, wants: bool) -> None:
        if self.pins and not wants:
            holder, place = sorted(self.pins, key=repr)[pick % len(self.pins)]
            del self.pins[holder, place]
            self.cache.unpin_copy(place, holder)
            return
        name, holder = sorted(self.known)[pick % len(self.known)], f"grant-{self._next()}"
        tiers = self.cache.match([name])
        pinned = self.cache.pin_copy(name, holder)
        assert (pinned.tier if pinned else None) == (tiers[0] if tiers else None)
        if pinned is not None:
            self.pins[holder, pinned] = name

    @precondition(lambda self: self.out)
    @rule(order=st.integers(0, 2**32 - 1), share=st.sampled_from([1.0, 0.5]))
    def some_moves_are_done(self, order: int, share: float) -> None:
        """Any of them, in any order: each direction has its own threads and its own pace."""
        luck = random.Random(order)
        self._do_moves([move for move in luck.sample(self.out, len(self.out)) if luck.random() < share])

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
        readers: dict[int, list[bytes]] = {}
        for owner, sequence in self.sequences.items():
            assert self.cache.slots(owner) == tuple(sequence.slots)
            for slot, label in zip(sequence.slots, sequence.labels, strict=False):
                readers.setdefault(slot, []).append(label)
                if slot not in self._filling(Tier.DEVICE):
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
            found = self.cache.pin_copy(name, "probe")
            if found is None:
                assert self.num[Tier.DRAM] != ROOMY_DRAM, f"{name!r} was lost"
                continue
            assert self.bytes[found.tier, found.slot] == name
            assert self.contents.setdefault((found.tier, found.slot, found.generation), name) == name
            self.cache.unpin_copy(found, "probe")

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

    def _pick(self, pick: int, *states: str) -> tuple[AttemptId, TwinSequence]:
        owners = self._owners(*states)
        owner = owners[pick % len(owners)]
        return owner, self.sequences[owner]

    def _seat(self, owner: AttemptId, sequence: TwinSequence, opened: Opened) -> None:
        """Take over the table, writing into the slots that are said to be empty."""
        sequence.slots = list(opened.slots)
        self.sequences[owner] = sequence
        self._take_moves()
        assert opened.loading == {i for i, slot in enumerate(opened.slots) if slot in self._filling(Tier.DEVICE)}
        for i in range(len(sequence.labels), len(opened.slots)):
            sequence.labels.append(b"")
            self._write_tail(sequence, i)

    def _is_loading(self, sequence: TwinSequence, index: int) -> bool:
        return sequence.slots[index] in self._filling(Tier.DEVICE)

    def _write(self, sequence: TwinSequence, index: int, label: bytes) -> None:
        sequence.labels[index] = label
        self.bytes[Tier.DEVICE, sequence.slots[index]] = label

    def _write_tail(self, sequence: TwinSequence, index: int) -> None:
        """Something that no other block of any sequence holds."""
        self._write(sequence, index, b"private-%d" % self._next())

    def _filling(self, tier: Tier) -> set[int]:
        return {move.target.slot for move in self.out if move.target.tier is tier}

    def _take_moves(self) -> None:
        self.out += self.cache.take_moves()

    def _do_moves(self, moves: list[Move]) -> None:
        for move in moves:
            self.out.remove(move)
            source = self.bytes.get((move.source.tier, move.source.slot), b"nothing")
            self.bytes[move.target.tier, move.target.slot] = source
        self.cache.on_moved(moves, self.now_s)

    def _insist(self, ask: Callable[[], Answer | None]) -> Answer | None:
        """Ask again when all moves are done. Once more if need be: a block that got its name while it was parked is on
        its way as what it was before, stays when that move is done, and has to be evicted then."""
        self._do_all_moves()
        answer = ask()
        if answer is None:
            self._do_all_moves()
            answer = ask()
        return answer

    def _do_all_moves(self) -> None:
        self._take_moves()
        self._do_moves(list(self.out))


TestTiersAgainstBytes = TiersAgainstBytes.TestCase
TestTiersAgainstBytes.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("num_dram", [0, 3, 6, ROOMY_DRAM])
def test_long_walks(num_dram: int) -> None:
    """The same rules in long seeded walks: deeper than a search that also shrinks can afford to go."""
    for seed in range(WALKS):
        luck = random.Random(seed)
        machine = TiersAgainstBytes()
        machine.start(luck.randint(4, 9), num_dram, luck.choice(list(POLICIES)))
        for _ in range(STEPS_IN_A_WALK):
            one_step(machine, luck)
            machine.books_are_right()
            machine.device_states_follow_from_who_is_there()
            machine.everyone_reads_what_it_wrote()
            machine.visible_copies_hold_what_their_names_say()
        machine.teardown()


def one_step(machine: TiersAgainstBytes, luck: random.Random) -> None:
    pick, flag = luck.randrange(64), luck.random() < 0.3
    running, parked = machine._owners("running"), machine._owners("parked")
    steps: list[Callable[[], None]] = [machine.observe]
    if len(running) < 3:
        path = tuple(luck.choices((0, 1), k=luck.randint(1, 3)))
        use_hits = luck.choice([None, None, 0, 1, 2])
        steps += [lambda: machine.open(path, luck.randint(0, 2), use_hits, flag)] * 3
    if running:
        steps += [lambda: machine.compute(pick, luck.choice([3, 1, 0]), luck.choice([0.0, 1.0]))] * 3
    if running and machine.cache.available(Tier.DEVICE):
        steps.append(lambda: machine.grow(pick, flag))
    if running or parked:
        steps += [lambda: machine.preempt_or_resume(pick, luck.randint(0, 2), flag)] * 2
    if machine.sequences:
        steps.append(lambda: machine.leave(pick, luck.choice(["close", "close", "quarantine"])))
    if machine.known:
        steps.append(lambda: machine.a_peer_pins_or_unpins(pick, flag))
    if machine.out:
        steps += [lambda: machine.some_moves_are_done(luck.randrange(2**32), luck.choice([1.0, 0.5, 0.2]))] * 2
    luck.choice(steps)()
