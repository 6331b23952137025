"""Pure: which ready block of a tier leaves first, behind one protocol.

A ledger tells its policy which slots may be evicted and which of them are chain tails; the policy keeps an order and
answers `victim`. A policy owns no slot and moves nothing.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple, Protocol


class EvictionPolicy(Protocol):
    """An order over the slots on offer. All calls are O(log n) amortised or better: tiers have 1e5 slots and more."""

    def on_used(self, slot: int, now_s: float) -> None:
        """The slot's content was made, or a sequence that used it let go of it. Takes effect at the next `offer`."""
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
    """Heap order: tails before inner blocks, then least recently used, then first used."""

    is_inner: bool
    used_s: float
    serial: int
    slot: int


class LruTailFirst:
    """Least recently used, chain tails first.

    A block with resident children is a victim only when no tail is on offer, because a hole ends the usable prefix:
    evicting a parent would waste its children's slots. Within equal times the order of `on_used` decides, so a
    sequence that lets go of its blocks last to first is evicted last to first.

    A lazy heap: `withdraw` and a second `offer` leave their old entry behind; `victim` skips it, and the heap is
    rebuilt when most of it is stale.
    """

    _STALE_MIN = 64  # below this, a rebuild costs more than the stale entries do

    def __init__(self) -> None:
        self._used: dict[int, tuple[float, int]] = {}  # one entry per slot of the tier at most
        self._offered: dict[int, _Entry] = {}
        self._heap: list[_Entry] = []
        self._serial = 0

    def on_used(self, slot: int, now_s: float) -> None:
        self._serial += 1
        self._used[slot] = (now_s, self._serial)

    def offer(self, slot: int, *, is_tail: bool) -> None:
        used_s, serial = self._used[slot]
        entry = _Entry(not is_tail, used_s, serial, slot)
        self._offered[slot] = entry
        heapq.heappush(self._heap, entry)
        self._rebuild_if_stale()

    def withdraw(self, slot: int) -> None:
        del self._offered[slot]

    def victim(self) -> int | None:
        while self._heap and self._offered.get(self._heap[0].slot) != self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0].slot if self._heap else None

    def __len__(self) -> int:
        return len(self._offered)

    def _rebuild_if_stale(self) -> None:
        if len(self._heap) > 2 * len(self._offered) + self._STALE_MIN:
            self._heap = list(self._offered.values())
            heapq.heapify(self._heap)
