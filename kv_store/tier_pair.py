"""Pure: DEVICE and DRAM of one node together: what is where, making room, and the moves between the two.

What holds while moves are out:
- The target of a move is held by the move, and its source is held by it too (a load) or marked as departing (an
  eviction, a parking): neither is free, or given to anyone, before the move is done.
- A block on its way from DEVICE to DRAM is valid in DEVICE until then: it is found there, and whoever holds it keeps
  it there. The move still completes, and the block is then ready in both tiers.
- A block on its way from DRAM to DEVICE is found in DRAM; a second sequence that wants it shares the arriving slot.
- Copies are announced when they become ready and when they are dropped, so events say what `match` would find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halfmoon.types import AttemptId, BlockHash, Tier
from kv_store.announcements import Announcements
from kv_store.eviction_policies import make_policy
from kv_store.ledger import Ledger, SlotState
from kv_store.moves import Cargo, MoveBook
from kv_store.values import Move


@dataclass(frozen=True, kw_only=True)
class Content:
    """A block whose bytes are in this node, and the DRAM slot that the owner holds of it, if any."""

    cargo: Cargo
    dram_slot: int | None


class TierPair:
    """Two ledgers, the moves between them, and what of their content has been announced."""

    def __init__(self, num_device_slots: int, num_dram_slots: int, eviction: str) -> None:
        self.device = Ledger(Tier.DEVICE, num_device_slots, make_policy(eviction, num_device_slots))
        self.dram = Ledger(Tier.DRAM, num_dram_slots, make_policy(eviction, num_dram_slots))
        self.ledgers = {Tier.DEVICE: self.device, Tier.DRAM: self.dram}
        self.moves = MoveBook()
        self.news = Announcements()

    # ---- what is where ----

    def match(self, hashes: Sequence[BlockHash]) -> tuple[Tier, ...]:
        """The tier of each block of the longest hole-free prefix of `hashes` that this node holds ready."""
        tiers: list[Tier] = []
        for name in hashes:
            if self.device.find(name) is not None:
                tiers.append(Tier.DEVICE)
            elif self.dram.find(name) is not None:
                tiers.append(Tier.DRAM)
            else:
                break
        return tuple(tiers)

    def device_copy(self, content: Content) -> int | None:
        """A DEVICE slot that has the content, or is getting it; a parking whose move is still out is taken back."""
        name = content.cargo.name
        slot = self.device.find(name)
        if slot is None:
            slot = self.moves.arriving(Tier.DEVICE, name)
        if slot is None and content.dram_slot is not None:
            move = self.moves.into(Tier.DRAM, content.dram_slot)
            slot = None if move is None else move.source.slot
        return slot

    def dram_copy(self, slot: int, name: BlockHash | None) -> int | None:
        """A DRAM slot that has the content of this DEVICE slot, or is getting it; a load still out has its source."""
        loading = self.moves.into(Tier.DEVICE, slot)
        if loading is not None:
            return loading.source.slot
        copy = self.dram.find(name)
        return self.moves.arriving(Tier.DRAM, name) if copy is None else copy

    # ---- room ----

    def make_room(self, num_slots: int) -> bool:
        """True: that many DEVICE slots are free now. False: never, or when the moves that are out are done."""
        device = self.device
        if device.num_available < num_slots:
            return False
        while device.num_free + device.num_evicting < num_slots:
            self._evict_one()
        return device.num_free >= num_slots

    def _evict_one(self) -> None:
        """Give up the policy's victim: at once if DRAM has it or cannot take it, else by a move."""
        victim = self.device.victim()
        assert victim is not None, "ready slots were counted"
        device = self.device
        cargo = Cargo(name=device.name(victim), parent=device.parent(victim), index=device.index(victim))
        if self.dram.find(cargo.name) is not None or self.dram.num_available == 0:
            self._drop(self.device, victim)
        else:
            self.save(victim, cargo)

    def _make_dram_room(self) -> None:
        """One free DRAM slot, by forgetting the least useful ready block; the caller knows that there is one."""
        if self.dram.num_free == 0:
            victim = self.dram.victim()
            assert victim is not None, "ready slots were counted"
            self._drop(self.dram, victim)

    # ---- moves ----

    def load(self, owner: AttemptId, content: Content) -> int:
        """A DEVICE slot held by `owner` for content that only DRAM has, and the move that fills it. Room was made."""
        assert content.dram_slot is not None
        slot = self.device.allocate(owner)
        assert slot is not None, "room was made"
        move = Move(source=self.dram.place(content.dram_slot), target=self.device.place(slot))
        self.moves.start(move, content.cargo)
        self.dram.hold(content.dram_slot, move)
        self.device.hold(slot, move)
        return slot

    def save(self, slot: int, cargo: Cargo) -> int:
        """A DRAM slot, held by the move that fills it from this DEVICE slot. DRAM has a slot available.

        When the caller and everyone else has let go of `slot`, it is evicting, until the move is done.
        """
        self._make_dram_room()
        move = Move(source=self.device.place(slot), target=self.dram.upcoming())
        target = self.dram.allocate(move)
        assert target == move.target.slot, "allocate gives the upcoming place"
        self.moves.start(move, cargo)
        self.device.depart(slot)
        return target

    def finish(self, move: Move, now_s: float) -> None:
        """The move is done. ValueError: it was not out."""
        cargo = self.moves.finish(move)
        self._arrive(move, cargo, now_s)
        self._depart_from(move)

    def _arrive(self, move: Move, cargo: Cargo, now_s: float) -> None:
        """The target's bytes are right: visible under their name, unless another slot has it by now."""
        ledger, slot = self.ledgers[move.target.tier], move.target.slot
        assert ledger.place(slot) == move.target, f"{move}: the target was given away"
        if cargo.name is not None and ledger.find(cargo.name) is None:
            self.publish(ledger, slot, cargo, now_s)
        ledger.release(slot, move)

    def _depart_from(self, move: Move) -> None:
        """Let go of the source; a DEVICE block that nobody took back meanwhile is dropped, now that DRAM has it."""
        ledger, slot = self.ledgers[move.source.tier], move.source.slot
        assert ledger.place(slot) == move.source, f"{move}: the source was given away"
        if move.source.tier is Tier.DRAM:
            ledger.release(slot, move)
            return
        ledger.end_departure(slot)
        if ledger.state(slot) is SlotState.READY and self.dram.find(ledger.name(slot)) is not None:
            self._drop(ledger, slot)

    # ---- visible copies ----

    def publish(self, ledger: Ledger, slot: int, cargo: Cargo, now_s: float) -> None:
        """Make a slot visible under the cargo's name, which is new in this tier, and announce it."""
        assert cargo.name is not None
        ledger.publish(slot, cargo.name, cargo.parent, cargo.index, now_s)
        self.news.stored(ledger.tier, cargo.name)

    def _drop(self, ledger: Ledger, slot: int) -> None:
        self.news.removed(ledger.tier, ledger.drop(slot))

    # ---- checks ----

    def check_moves(self) -> None:
        """Assert that no end of an outstanding move has been given away, and that the moves hold their targets."""
        for move in self.moves:
            for place in (move.source, move.target):
                assert self.ledgers[place.tier].place(place.slot) == place, f"{move}: {place} was given away"
            assert move in self.ledgers[move.target.tier].holders(move.target.slot), f"{move}: target not held"
