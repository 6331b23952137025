"""Pure: one node's KV cache over its tiers: block tables, hits, evictions, parking, all as ledger entries and Moves.

It never moves bytes: it returns `Move`s through `take_moves`; the shell performs them in order and reports `on_moved`,
in any order and in any portions. What holds while moves are out is said in `tier_pair.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.messages import BlockCopy, KvEvents
from halfmoon.types import AttemptId, BlockHash, Tier
from kv_store.ledger import Ledger
from kv_store.moves import Cargo
from kv_store.tier_pair import Content, TierPair
from kv_store.values import Move, Opened, Place


@dataclass(kw_only=True)
class _Table:
    """A sequence in DEVICE. `names[i]`: block i is full and called so; `chain`: names foretold by `open`."""

    slots: list[int]
    names: list[BlockHash | None]
    chain: tuple[BlockHash, ...]
    is_quarantined: bool = False

    def cargo(self, index: int) -> Cargo:
        """Block `index` as a move would carry it."""
        return Cargo(self.names[index], self._name_before(index), index)

    def _name_before(self, index: int) -> BlockHash | None:
        if index == 0:
            return None
        known = self.names[index - 1]
        if known is not None:
            return known
        return self.chain[index - 1] if index <= len(self.chain) else None


@dataclass(kw_only=True)
class _Parked:
    """A preempted sequence: DRAM slots held, in order."""

    contents: list[Content]
    chain: tuple[BlockHash, ...]
    is_quarantined: bool = False


class KvCache:
    """DEVICE and DRAM ledgers of one node, and the sequences that hold their slots.

    Args:
        num_device_slots, num_dram_slots: 0 DRAM slots: evicted blocks are dropped, parking is impossible.
        block_size: tokens.
        eviction: one of `kv_store.eviction_policies.POLICIES`, for both tiers.

    A slot is in exactly one state: free, filling, ready, pinned (ready and held), evicting, quarantined.
    Conservation: the states' counts add up to the total; a slot's pins equal its holders.
    """

    def __init__(self, *, num_device_slots: int, num_dram_slots: int, block_size: int, eviction: str = "lru") -> None:
        assert num_device_slots > 0
        assert block_size > 0
        self.block_size = block_size
        self._tiers = TierPair(num_device_slots, num_dram_slots, eviction)
        self._tables: dict[AttemptId, _Table] = {}
        self._parked: dict[AttemptId, _Parked] = {}

    # ---- questions (change nothing, renew nothing) ----

    def match(self, hashes: Sequence[BlockHash]) -> tuple[Tier, ...]:
        """The tier of each block of the longest hole-free prefix of `hashes` that this node holds ready."""
        return self._tiers.match(hashes)

    def counts(self, tier: Tier) -> dict[str, int]:
        """Slots by state name."""
        return self._tiers.ledgers[tier].counts()

    def free(self, tier: Tier) -> int:
        """Slots that an allocation could get without evicting anything."""
        return self._tiers.ledgers[tier].num_free

    def available(self, tier: Tier) -> int:
        """Slots that an allocation could get now or after pending moves: free + evictable + evicting."""
        return self._tiers.ledgers[tier].num_available

    def snapshot(self) -> tuple[BlockCopy, ...]:
        """Every visible copy now. Changes not yet taken as an event are included: replaying that event is harmless."""
        return tuple(
            BlockCopy(block_hash=name, tier=tier)
            for tier, ledger in self._tiers.ledgers.items()
            for name in ledger.names()
        )

    # ---- sequences ----

    def open(
        self,
        owner: AttemptId,
        hashes: Sequence[BlockHash],
        num_blocks: int,
        now_s: float,
        *,
        use_hits: int | None = None,
    ) -> Opened | None:
        """Give `owner` a table of `num_blocks` DEVICE slots; the prefix found in `hashes` is pinned or loaded.

        Args:
            use_hits: reuse at most this many prefix blocks (a wholly cached prompt must recompute its last token,
                so the caller passes (num_tokens - 1) // block_size); the rest of the slots are private.

        Returns:
            None when there is no room *yet*: nothing is held, but evictions may have been started; ask again after
            `on_moved` or a `close`.

        Raises:
            ValueError: if num_blocks exceeds the tier, or owner is open already (a caller's bug).
        """
        if owner in self._tables or owner in self._parked:
            raise ValueError(f"{owner} is open already")
        if not 0 < num_blocks <= self._tiers.device.num_slots:
            raise ValueError(f"{owner} asks for {num_blocks} of {self._tiers.device.num_slots} blocks")
        limit = num_blocks if use_hits is None else min(use_hits, num_blocks)
        contents = self._hold_hits(owner, hashes[:limit])
        opened = self._seat(owner, contents, num_blocks, tuple(hashes))
        self._release_contents(owner, contents, None if opened is None else now_s)
        return opened

    def grow(self, owner: AttemptId, now_s: float) -> int | None:
        """One more slot at the end of the owner's table; None when there is no room yet (see `open`)."""
        table = self._running(owner)
        if not self._tiers.make_room(1):
            return None
        self._append_empty(owner, table)
        return table.slots[-1]

    def slots(self, owner: AttemptId) -> tuple[int, ...]:
        """The owner's DEVICE slots, in order; none while it is parked. ValueError: unknown owner."""
        if owner in self._parked:
            return ()
        return tuple(self._table(owner).slots)

    def commit(self, owner: AttemptId, index: int, block_hash: BlockHash, now_s: float) -> None:
        """The owner's block `index` is full and right: make it visible under its name, still held by the owner.

        If the name is ready in another slot already, this slot stays private and is freed with its owner.
        Committing a block again under the same name changes nothing.

        Raises:
            ValueError: unknown, parked or quarantined owner, no such index, or a second name for a block.
        """
        table = self._running(owner)
        if not 0 <= index < len(table.slots):
            raise ValueError(f"{owner} has no block {index}")
        known = table.names[index]
        if known is not None:
            if known != block_hash:
                raise ValueError(f"block {index} of {owner} has another name already")
            return
        table.names[index] = block_hash
        if self._tiers.device.find(block_hash) is None:
            self._tiers.publish(self._tiers.device, table.slots[index], table.cargo(index), now_s)

    def close(self, owner: AttemptId, now_s: float) -> None:
        """Release everything the owner holds: named blocks stay reusable, private slots are freed.

        Slots that still take part in a move are freed when it is done. Unknown owners: ValueError.
        """
        if owner in self._parked:
            self._release_contents(owner, self._parked.pop(owner).contents, now_s)
        else:
            table = self._table(owner)
            del self._tables[owner]
            self._leave(owner, table.slots, now_s)
        for ledger in self._tiers.ledgers.values():
            ledger.end_quarantine(owner)

    def quarantine(self, owner: AttemptId) -> None:
        """A peer may still write or read the owner's slots: until `close`, none of its private slots is reusable
        and all are counted as quarantined. The owner can only be closed from now on. Unknown owners: ValueError."""
        sequence = self._parked.get(owner) or self._table(owner)
        sequence.is_quarantined = True
        if isinstance(sequence, _Table):
            self._tiers.device.quarantine(owner, sequence.slots)
        else:
            self._tiers.dram.quarantine(owner, [c.dram_slot for c in sequence.contents if c.dram_slot is not None])

    def park(self, owner: AttemptId, num_blocks: int, now_s: float) -> bool:
        """Preempt: move the owner's first `num_blocks` blocks (the rest are freed) to DRAM, and hold them there.

        False: DRAM has no room for it; nothing changed. Blocks that DRAM holds already are not moved again.
        ValueError: unknown, parked or quarantined owner, or more blocks than it has.
        """
        table = self._running(owner)
        if not 0 <= num_blocks <= len(table.slots):
            raise ValueError(f"{owner} has no {num_blocks} blocks to park")
        copies = [self._tiers.dram_copy(table.slots[i], table.names[i]) for i in range(num_blocks)]
        held = [copy for copy in copies if copy is not None]
        for copy in held:
            self._tiers.dram.hold(copy, owner)
        if self._tiers.dram.num_available < num_blocks - len(held) or self._tiers.dram.num_slots == 0:
            for copy in reversed(held):
                self._tiers.dram.release(copy, owner)
            return False
        contents = [
            Content(cargo=table.cargo(i), dram_slot=self._save(owner, table, i) if copy is None else copy)
            for i, copy in enumerate(copies)
        ]
        del self._tables[owner]
        self._parked[owner] = _Parked(contents=contents, chain=table.chain)
        self._leave(owner, table.slots, now_s)
        return True

    def unpark(self, owner: AttemptId, now_s: float) -> Opened | None:
        """Bring a parked owner back to DEVICE (`loading` says what is still moving); None: no room yet.

        The table has exactly the parked blocks, every one of them a hit; `grow` adds to it.
        ValueError: unknown, running or quarantined owner.
        """
        parked = self._parked.get(owner)
        if parked is None or parked.is_quarantined:
            raise ValueError(f"{owner} is not parked" if parked is None else f"{owner} is quarantined")
        opened = self._seat(owner, parked.contents, len(parked.contents), parked.chain)
        if opened is not None:
            del self._parked[owner]
            self._release_contents(owner, parked.contents, now_s)
        return opened

    # ---- peers reading from here ----

    def pin_copy(self, block_hash: BlockHash, holder: str) -> Place | None:
        """Hold the fastest ready copy of a block for a grant; None when it is not here. Renews nothing.

        A holder pins a block once; it must `unpin_copy` the place that it got.
        """
        for ledger in self._tiers.ledgers.values():
            slot = ledger.find(block_hash)
            if slot is not None:
                ledger.hold(slot, holder)
                return ledger.place(slot)
        return None

    def unpin_copy(self, place: Place, holder: str) -> None:
        ledger = self._tiers.ledgers[place.tier]
        assert ledger.place(place.slot) == place, f"{holder} holds {place}, which was given away"
        ledger.release(place.slot, holder)

    # ---- shell ----

    def take_moves(self) -> list[Move]:
        """Moves decided since the last call, to be performed in this order."""
        return self._tiers.moves.take()

    def on_moved(self, moves: Sequence[Move], now_s: float) -> None:
        """These moves are done. ValueError: one of them was not out."""
        for move in moves:
            self._tiers.finish(move, now_s)

    def take_events(self) -> KvEvents | None:
        """What appeared and left since the last call, under the next consecutive id; None when nothing did."""
        return self._tiers.news.take()

    @property
    def last_event_id(self) -> int:
        return self._tiers.news.last_event_id

    def check_invariants(self) -> None:
        """Assert conservation and that pins equal holders. Cheap enough for every simulated event: O(held slots)."""
        for ledger in self._tiers.ledgers.values():
            ledger.check_invariants()
            for slot in ledger.held_slots():
                self._check_holders(ledger, slot)
        self._check_sequences()
        self._tiers.check_moves()

    def audit(self) -> None:
        """`check_invariants` and a scan of every slot of every tier: O(slots)."""
        self.check_invariants()
        for ledger in self._tiers.ledgers.values():
            ledger.audit()

    # ---- opening ----

    def _hold_hits(self, owner: AttemptId, hashes: Sequence[BlockHash]) -> list[Content]:
        """The usable prefix; its DRAM copies are held, so that making room cannot drop them."""
        contents = []
        parent = None
        for index, (name, tier) in enumerate(zip(hashes, self.match(hashes), strict=False)):
            dram_slot = self._tiers.dram.find(name) if tier is Tier.DRAM else None
            if dram_slot is not None:
                self._tiers.dram.hold(dram_slot, owner)
            contents.append(Content(cargo=Cargo(name=name, parent=parent, index=index), dram_slot=dram_slot))
            parent = name
        return contents

    def _seat(
        self,
        owner: AttemptId,
        contents: Sequence[Content],
        num_blocks: int,
        chain: tuple[BlockHash, ...],
    ) -> Opened | None:
        """A table whose first blocks are `contents`. None, with nothing held in DEVICE: no room yet."""
        present = [self._tiers.device_copy(content) for content in contents]
        kept = [slot for slot in present if slot is not None]
        for slot in kept:
            self._tiers.device.hold(slot, owner)
        if not self._tiers.make_room(num_blocks - len(kept)):
            for slot in reversed(kept):
                self._tiers.device.release(slot, owner)
            return None
        slots = [
            self._tiers.load(owner, c) if slot is None else slot for c, slot in zip(contents, present, strict=True)
        ]
        table = _Table(slots=slots, names=[content.cargo.name for content in contents], chain=chain)
        self._tables[owner] = table
        loading = frozenset(i for i, slot in enumerate(slots) if self._tiers.moves.into(Tier.DEVICE, slot) is not None)
        while len(table.slots) < num_blocks:
            self._append_empty(owner, table)
        hits = tuple(Tier.DRAM if i in loading else Tier.DEVICE for i in range(len(contents)))
        return Opened(slots=tuple(table.slots), hits=hits, loading=loading)

    def _append_empty(self, owner: AttemptId, table: _Table) -> None:
        slot = self._tiers.device.allocate(owner)
        assert slot is not None, "room was made"
        table.slots.append(slot)
        table.names.append(None)

    def _leave(self, owner: AttemptId, slots: Sequence[int], now_s: float) -> None:
        """Release DEVICE slots, last first: of equally recent blocks the chain's tail is evicted first."""
        for slot in reversed(slots):
            self._tiers.device.touch(slot, now_s)
            self._tiers.device.release(slot, owner)

    def _release_contents(self, owner: AttemptId, contents: Sequence[Content], used_s: float | None) -> None:
        """Release DRAM slots, last first; `used_s`: when they were used, None: they were not."""
        for slot in reversed([c.dram_slot for c in contents if c.dram_slot is not None]):
            if used_s is not None:
                self._tiers.dram.touch(slot, used_s)
            self._tiers.dram.release(slot, owner)

    def _save(self, owner: AttemptId, table: _Table, index: int) -> int:
        """A DRAM slot held by `owner` for the bytes of one of its blocks, and the move that fills it."""
        target = self._tiers.save(table.slots[index], table.cargo(index))
        self._tiers.dram.hold(target, owner)
        return target

    # ---- looking up owners ----

    def _table(self, owner: AttemptId) -> _Table:
        table = self._tables.get(owner)
        if table is None:
            raise ValueError(f"{owner} is {'parked' if owner in self._parked else 'not open'}")
        return table

    def _running(self, owner: AttemptId) -> _Table:
        table = self._table(owner)
        if table.is_quarantined:
            raise ValueError(f"{owner} is quarantined")
        return table

    # ---- checks ----

    def _check_holders(self, ledger: Ledger, slot: int) -> None:
        for holder in ledger.holders(slot):
            where = f"{ledger.tier.name} slot {slot} held by {holder}"
            if isinstance(holder, Move):
                assert holder in self._tiers.moves, f"{where}, which is done"
            elif isinstance(holder, AttemptId):
                assert holder in (self._tables if ledger is self._tiers.device else self._parked), f"{where}: leaked"
            else:
                assert ledger.name(slot) is not None, f"{where} is not visible"

    def _check_sequences(self) -> None:
        for owner, table in self._tables.items():
            assert len(set(table.slots)) == len(table.slots) == len(table.names), f"{owner}: {table}"
            assert all(owner in self._tiers.device.holders(slot) for slot in table.slots), f"{owner} lost a slot"
        for owner, parked in self._parked.items():
            held = [c.dram_slot for c in parked.contents if c.dram_slot is not None]
            assert all(owner in self._tiers.dram.holders(slot) for slot in held), f"{owner} lost a parked slot"
