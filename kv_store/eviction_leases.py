"""Pure: a workload-aware policy: a block is leased so many seconds from its last use; the first to expire leaves first.

How many seconds depends on the block's uses so far, remembered beyond its eviction, and on its place in the chain
(`leases.py`). A tier learns them from its own uses: it starts as LRU and asks its learner again every minute. Under
more pressure than the learner foresaw the policy is LRU with a head start per class.
"""

from __future__ import annotations

from collections import OrderedDict

from halfmoon.types import BlockHash
from kv_store.eviction import RankedPolicy
from kv_store.leases import COHORT_S, Class, LeaseLearner, Leases, class_of

REMEMBERED_PER_SLOT = 8  # names with class and last use; what was used longer ago begins anew


class Leased(RankedPolicy):
    """Earliest end of its lease first.

    A block waits from one letting go to the next, so a lease covers the time that the next sequence takes, too. In
    DRAM a block begins to wait when it comes from DEVICE, unasked: it has one use less.

    Args:
        num_slots: of the tier; bounds how many names are remembered, the longest waiting forgotten first.
        fitted: leases that stay; None: they are learned.
    """

    def __init__(self, num_slots: int, fitted: Leases | None = None) -> None:
        super().__init__()
        self._num_slots = num_slots
        self._learner = LeaseLearner()
        self._learns = fitted is None
        self._learned_minute: int | None = None
        self._leases = Leases() if fitted is None else fitted
        self._waits: OrderedDict[BlockHash, tuple[Class, float]] = OrderedDict()  # since when; first is longest
        self._blocks: dict[int, tuple[BlockHash, int]] = {}
        self._unasked: dict[int, float] = {}  # stored when, and not used or offered since

    def rank_stored(self, slot: int, name: BlockHash, index: int, now_s: float) -> tuple[float, ...]:
        self._blocks[slot] = (name, index)
        self._unasked[slot] = now_s
        return (now_s,)

    def rank_used(self, slot: int, now_s: float) -> tuple[float, ...]:
        self._unasked.pop(slot, None)
        return self._lease(slot, now_s, is_used=True)

    def offer(self, slot: int, *, is_tail: bool) -> None:
        if slot in self._unasked:
            self._set(slot, self._lease(slot, self._unasked.pop(slot), is_used=False))
        super().offer(slot, is_tail=is_tail)

    def _lease(self, slot: int, now_s: float, *, is_used: bool) -> tuple[float, ...]:
        """The block's wait ends, if it is remembered; the next begins, and with it a lease."""
        minute = int(now_s // COHORT_S)
        if self._learns and minute != self._learned_minute:
            self._learned_minute = minute
            self._leases = self._learner.leases(now_s, self._num_slots)
        name, index = self._blocks[slot]
        old = self._waits.pop(name, None)
        if old is not None:
            self._learner.ended(*old, now_s, is_used=is_used)
        kind = class_of((0 if old is None else old[0][0]) + is_used, index)
        self._learner.began(kind, now_s)
        self._waits[name] = (kind, now_s)
        if len(self._waits) > REMEMBERED_PER_SLOT * self._num_slots:
            _, forgotten = self._waits.popitem(last=False)
            self._learner.ended(*forgotten, now_s, is_used=False)
        return (now_s + self._leases.of(kind),)
