"""Pure: the books of one tier: which slot holds which block, who holds it, and what may be evicted.

A slot's state is not stored by hand: it follows from four facts about the slot (its name, its holders, how many
moves read from it to take it away, whether a holder is quarantined), and `_settle` books every consequence of a
change of state in one place.

    free      allocate -> filling
    filling   publish -> pinned      last release -> free      quarantine -> quarantined
    pinned    last release -> ready, or evicting while a departing move reads it
    ready     hold -> pinned         drop -> free              depart -> evicting
    evicting  hold -> pinned, or filling if it has no name     last end_departure -> ready, or free if it has no name
    quarantined                      last release -> free, or evicting as above

A ledger moves no bytes and knows no other tier.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from halfmoon.types import AttemptId, BlockHash, Tier
from kv_store.eviction import EvictionPolicy, LruTailFirst
from kv_store.values import Move, Place

Holder = AttemptId | Move | str
"""A sequence, an outstanding move, or a peer's grant. Sets of them, not counts, so that a leak can be named."""


class SlotState(enum.StrEnum):
    FREE = "free"  # nobody's, content void
    FILLING = "filling"  # held, not visible under any name
    READY = "ready"  # visible, nobody holds it: may be evicted
    PINNED = "pinned"  # visible and held
    EVICTING = "evicting"  # nobody holds it but moves that read it; a hold brings it back
    QUARANTINED = "quarantined"  # filling, and a peer may still write it


_RESIDENT = (SlotState.READY, SlotState.PINNED)


@dataclass(slots=True)
class _Slot:
    state: SlotState = SlotState.FREE
    generation: int = 0
    name: BlockHash | None = None
    parent: BlockHash | None = None
    index: int = 0
    holders: set[Holder] = field(default_factory=set)
    departures: int = 0  # outstanding moves that read this slot in order to empty it


class Ledger:
    """One tier's slots. Every call is O(1) or O(log slots); nothing scans, but the two checks.

    Args:
        tier: for the places it hands out.
        num_slots: 0 is a tier that this node does not have.
        policy: the order of eviction; least recently used, chain tail first, by default.
    """

    def __init__(self, tier: Tier, num_slots: int, policy: EvictionPolicy | None = None) -> None:
        assert num_slots >= 0
        self.tier = tier
        self.num_slots = num_slots
        self._slots = [_Slot() for _ in range(num_slots)]
        self._free = list(range(num_slots - 1, -1, -1))  # a stack; slot 0 is given first
        self._index: dict[BlockHash, int] = {}
        self._children: Counter[BlockHash] = Counter()  # resident children by parent's name, resident or not
        self._counts = dict.fromkeys(SlotState, 0) | {SlotState.FREE: num_slots}
        self._quarantined: set[Holder] = set()
        self._held: set[int] = set()
        self._policy: EvictionPolicy = LruTailFirst() if policy is None else policy

    # ---- questions ----

    def find(self, name: BlockHash | None) -> int | None:
        """The slot that is visible under `name` (ready, pinned or evicting)."""
        return None if name is None else self._index.get(name)

    def place(self, slot: int) -> Place:
        return Place(self.tier, slot, self._slots[slot].generation)

    def state(self, slot: int) -> SlotState:
        return self._slots[slot].state

    def name(self, slot: int) -> BlockHash | None:
        return self._slots[slot].name

    def parent(self, slot: int) -> BlockHash | None:
        return self._slots[slot].parent

    def index(self, slot: int) -> int:
        """How many blocks come before the visible block in its chain."""
        return self._slots[slot].index

    def holders(self, slot: int) -> frozenset[Holder]:
        return frozenset(self._slots[slot].holders)

    def held_slots(self) -> Iterator[int]:
        return iter(self._held)

    def names(self) -> Iterable[BlockHash]:
        """Everything visible, in the order in which it appeared."""
        return self._index.keys()

    def counts(self) -> dict[str, int]:
        return {state.value: count for state, count in self._counts.items()}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_evicting(self) -> int:
        return self._counts[SlotState.EVICTING]

    @property
    def num_available(self) -> int:
        """Slots that can be had now, by dropping ready blocks, or when the moves that are out are done."""
        return self.num_free + self._counts[SlotState.READY] + self.num_evicting

    def upcoming(self) -> Place:
        """The place that the next `allocate` will give. The caller knows that a slot is free."""
        slot = self._free[-1]
        return Place(tier=self.tier, slot=slot, generation=self._slots[slot].generation + 1)

    def victim(self) -> int | None:
        """The ready slot that the policy gives up next. Changes nothing."""
        return self._policy.victim()

    # ---- the two-phase put ----

    def allocate(self, holder: Holder) -> int | None:
        """A free slot, filling, held by `holder`, under a new generation; None when no slot is free."""
        if not self._free:
            return None
        number = self._free.pop()
        slot = self._slots[number]
        assert not slot.holders, f"free slot {number} is held: {slot}"
        assert slot.state is SlotState.FREE, f"free slot {number} is {slot.state}"
        slot.generation += 1
        slot.holders.add(holder)
        self._settle(number)
        return number

    def publish(self, slot: int, name: BlockHash, parent: BlockHash | None, index: int, now_s: float) -> None:
        """Make a filling slot visible as block `index` of a chain, `name`, new here. Its holders keep it."""
        entry = self._slots[slot]
        assert entry.holders, f"slot {slot} is {entry.state}, not filling"
        assert entry.name is None, f"slot {slot} is {entry.state}, not filling"
        assert name not in self._index, f"{name.hex()} is visible in slot {self._index[name]}"
        entry.name, entry.parent, entry.index = name, parent, index
        self._index[name] = slot
        self._policy.on_stored(slot, name, index, now_s)
        self._settle(slot)

    def drop(self, slot: int) -> BlockHash:
        """Forget a visible block that nobody holds and no move reads: its slot is free. Returns its name."""
        entry = self._slots[slot]
        name = entry.name
        assert name is not None, f"slot {slot} is {entry.state}"
        assert entry.state is SlotState.READY, f"slot {slot} is {entry.state}"
        entry.name = None
        del self._index[name]
        self._settle(slot)
        return name

    # ---- holders ----

    def hold(self, slot: int, holder: Holder) -> None:
        entry = self._slots[slot]
        assert entry.state is not SlotState.FREE, f"slot {slot} is free"
        assert holder not in entry.holders, f"{holder} holds slot {slot} already"
        entry.holders.add(holder)
        if entry.state is not SlotState.PINNED:  # which it stays
            self._settle(slot)

    def release(self, slot: int, holder: Holder) -> None:
        """Unnamed slots are freed with their last holder; visible ones become evictable, no more recent than before."""
        entry = self._slots[slot]
        assert holder in entry.holders, f"{holder} does not hold slot {slot}"
        entry.holders.remove(holder)
        if not entry.holders or entry.state is not SlotState.PINNED:  # which it stays
            self._settle(slot)

    def touch(self, slot: int, now_s: float) -> None:
        """A sequence used this visible block; the policy takes it into account when the slot is next released."""
        assert self._slots[slot].holders, f"slot {slot} is touched by nobody"
        if self._slots[slot].name is not None:
            self._policy.on_used(slot, now_s)

    def quarantine(self, holder: Holder, slots: Iterable[int]) -> None:
        """All that `holder` holds and that is not visible counts as quarantined, until `end_quarantine`."""
        self._quarantined.add(holder)
        for slot in slots:
            self._settle(slot)

    def end_quarantine(self, holder: Holder) -> None:
        """To be called when `holder` has released everything."""
        self._quarantined.discard(holder)

    # ---- departures: moves that read a slot in order to empty it ----

    def depart(self, slot: int) -> None:
        """A move begins to read the slot. While one is out, the slot is never free, ready or given away."""
        entry = self._slots[slot]
        assert entry.state is not SlotState.FREE, f"slot {slot} is free"
        entry.departures += 1
        self._settle(slot)

    def end_departure(self, slot: int) -> None:
        """The move is done. With no holder and no other move the slot is ready if it is visible, else free."""
        entry = self._slots[slot]
        assert entry.departures > 0, f"no move reads slot {slot}"
        entry.departures -= 1
        self._settle(slot)

    # ---- one place for consequences ----

    def _derive(self, slot: _Slot) -> SlotState:
        if slot.holders:
            if slot.name is not None:
                return SlotState.PINNED
            return SlotState.FILLING if slot.holders.isdisjoint(self._quarantined) else SlotState.QUARANTINED
        if slot.departures:
            return SlotState.EVICTING
        return SlotState.FREE if slot.name is None else SlotState.READY

    def _settle(self, number: int) -> None:
        """Bring state, counts, free list, policy and children in line with the slot's facts."""
        slot = self._slots[number]
        old = slot.state
        held = bool(slot.holders)
        new = SlotState.PINNED if held and slot.name is not None else self._derive(slot)  # mostly pinned: a call less
        if old is new:
            return
        (self._held.add if held else self._held.discard)(number)
        slot.state = new
        self._counts[old] -= 1
        self._counts[new] += 1
        if old is SlotState.READY:
            self._policy.withdraw(number)
        if new is SlotState.READY:
            self._offer(number)
        if (old in _RESIDENT) != (new in _RESIDENT):
            self._count_child(slot.parent, 1 if new in _RESIDENT else -1)
        if new is SlotState.FREE:
            slot.parent = None
            self._free.append(number)

    def _offer(self, number: int) -> None:
        name = self._slots[number].name
        assert name is not None
        self._policy.offer(number, is_tail=name not in self._children)

    def _count_child(self, parent: BlockHash | None, change: int) -> None:
        """A leaving block does not count as a child, so that its parent may follow it out."""
        if parent is None:
            return
        self._children[parent] += change
        if self._children[parent] == 0:
            del self._children[parent]
        slot = self._index.get(parent)
        if slot is not None and self._slots[slot].state is SlotState.READY:
            self._offer(slot)

    # ---- checks ----

    def check_invariants(self) -> None:
        """Assert conservation, from the counts and the held slots only: O(held)."""
        assert sum(self._counts.values()) == self.num_slots, f"{self.tier.name}: {self._counts}"
        assert all(count >= 0 for count in self._counts.values()), f"{self.tier.name}: {self._counts}"
        assert len(self._free) == self._counts[SlotState.FREE], f"{self.tier.name}: free list"
        assert len(self._policy) == self._counts[SlotState.READY], f"{self.tier.name}: policy and ready slots differ"
        for number in self._held:
            slot = self._slots[number]
            assert slot.holders, f"{self.tier.name} slot {number} is held by nobody: {slot}"
            assert slot.state is self._derive(slot), f"{self.tier.name} slot {number}: {slot}"

    def audit(self) -> None:
        """`check_invariants`, and every slot against its facts: O(slots), for tests and idle times."""
        self.check_invariants()
        assert Counter(slot.state for slot in self._slots) == Counter({s: c for s, c in self._counts.items() if c})
        assert len(set(self._free)) == len(self._free)
        assert self._held == {number for number, slot in enumerate(self._slots) if slot.holders}
        assert self._index == {slot.name: n for n, slot in enumerate(self._slots) if slot.name is not None}
        resident = [slot.parent for slot in self._slots if slot.state in _RESIDENT and slot.parent is not None]
        assert self._children == Counter(resident), f"{self.tier.name}: children"
        assert all(slot.state is self._derive(slot) for slot in self._slots), f"{self.tier.name}: states"
