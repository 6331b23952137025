"""Pure: which ready block of a tier leaves first, behind one protocol, and the policies that need one number a block.

A ledger tells its policy which slots may be evicted and which of them are chain tails; the policy keeps an order and
answers `victim`. A policy owns no slot and moves nothing.

All of them evict chain tails first: a block with resident children is a victim only when no tail is on offer, because
a hole ends the usable prefix: evicting a parent would waste its children's slots. Where a policy's own order leaves a
choice, the order of `on_used` decides, so a sequence that lets go of its blocks last to first is evicted last to first.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple, Protocol

from halfmoon.types import BlockHash


class EvictionPolicy(Protocol):
    """An order over the slots on offer. All calls are O(log n) amortised or better: tiers have 1e5 slots and more."""

    def on_stored(self, slot: int, name: BlockHash, index: int, now_s: float) -> None:
        """The slot holds new content, block `index` of a chain. Comes before the content's first use and offer."""
        ...

    def on_used(self, slot: int, now_s: float) -> None:
        """A sequence that used the slot's content lets go of it. Takes effect at the next `offer`."""
        ...

    def offer(self, slot: int, *, is_tail: bool) -> None:
        """The slot may be evicted from now on; `is_tail`: none of its children is resident. Again: replaces."""
        ...

    def withdraw(self, slot: int) -> None:
        """The slot is held, leaving, or empty: it may not be evicted."""
        ...

    def victim(self) -> int | None:
        """The slot to evict next; None when nothing is on offer. It stays on offer until withdrawn."""
        ...

    def __len__(self) -> int:
        """How many slots are on offer."""
        ...


class _Entry(NamedTuple):
    """Order in the queue: tails before inner blocks, then by rank, then first used."""

    is_inner: bool
    rank: tuple[float, ...]
    serial: int
    slot: int


class Queue:
    """Slots on offer, least worth keeping first.

    A lazy heap: `discard` and a second `put` leave their old entry behind; `first` skips it, and the heap is rebuilt
    when most of it is stale.
    """

    _STALE_MIN = 64  # below this, a rebuild costs more than the stale entries do

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._heap: list[_Entry] = []

    def put(self, slot: int, rank: tuple[float, ...], serial: int, *, is_tail: bool) -> None:
        entry = _Entry(not is_tail, rank, serial, slot)
        self._entries[slot] = entry
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + self._STALE_MIN:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def discard(self, slot: int) -> None:
        del self._entries[slot]

    def first(self) -> int | None:
        while self._heap and self._entries.get(self._heap[0].slot) != self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0].slot if self._heap else None

    def is_tail(self, slot: int) -> bool:
        return not self._entries[slot].is_inner

    def __contains__(self, slot: int) -> bool:
        return slot in self._entries

    def __len__(self) -> int:
        return len(self._entries)


class RankedPolicy:
    """Evict the slot of the least rank. A policy says what a slot's rank is, and when it changes.

    `rank` has one entry per slot of the tier at most.
    """

    def __init__(self) -> None:
        self._rank: dict[int, tuple[float, ...]] = {}
        self._serials: dict[int, int] = {}
        self._serial = 0
        self._queue = Queue()

    def rank_stored(self, slot: int, name: BlockHash, index: int, now_s: float) -> tuple[float, ...]:
        """The rank of new content that nobody has used yet."""
        raise AssertionError("a policy has its own")

    def rank_used(self, slot: int, now_s: float) -> tuple[float, ...]:
        """The rank after one more use."""
        raise AssertionError("a policy has its own")

    def on_stored(self, slot: int, name: BlockHash, index: int, now_s: float) -> None:
        self._set(slot, self.rank_stored(slot, name, index, now_s))

    def on_used(self, slot: int, now_s: float) -> None:
        self._set(slot, self.rank_used(slot, now_s))

    def offer(self, slot: int, *, is_tail: bool) -> None:
        self._queue.put(slot, self._rank[slot], self._serials[slot], is_tail=is_tail)

    def withdraw(self, slot: int) -> None:
        self._queue.discard(slot)

    def victim(self) -> int | None:
        return self._queue.first()

    def __len__(self) -> int:
        return len(self._queue)

    def _set(self, slot: int, rank: tuple[float, ...]) -> None:
        self._serial += 1
        self._serials[slot] = self._serial
        self._rank[slot] = rank


class LruTailFirst(RankedPolicy):
    """Least recently used, chain tails first."""

    def rank_stored(self, slot: int, name: BlockHash, index: int, now_s: float) -> tuple[float, ...]:
        return (now_s,)

    def rank_used(self, slot: int, now_s: float) -> tuple[float, ...]:
        return (now_s,)


class Lfu(RankedPolicy):
    """Least often used since it came, then least recently."""

    def rank_stored(self, slot: int, name: BlockHash, index: int, now_s: float) -> tuple[float, ...]:
        return (0.0, now_s)

    def rank_used(self, slot: int, now_s: float) -> tuple[float, ...]:
        return (self._rank[slot][0] + 1, now_s)


class LengthAware(RankedPolicy):
    """Least often used since it came, then farthest from the beginning of its chain, then least recently.

    The paper says no more than "similar to LFU but prioritizing blocks occurring later in requests" (arXiv 2407.00079,
    Table 1); this reads it as: among equally often used blocks those leave first.
    """

    def rank_stored(self, slot: int, name: BlockHash, index: int, now_s: float) -> tuple[float, ...]:
        return (0.0, -index, now_s)

    def rank_used(self, slot: int, now_s: float) -> tuple[float, ...]:
        uses, position, _ = self._rank[slot]
        return (uses + 1, position, now_s)
