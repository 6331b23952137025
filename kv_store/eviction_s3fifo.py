"""Pure: S3-FIFO: a small queue for newcomers, a main queue for what was used again, a memory of what left."""

from __future__ import annotations

from collections import OrderedDict

from halfmoon.types import BlockHash
from kv_store.eviction import Queue

SMALL_SHARE = 10  # a tenth of the slots, the published default
USES_MAX = 3  # of the published algorithm's two-bit counter
USES_TO_STAY = 2  # more uses than one since it came: into the main queue


class S3Fifo:
    """Newcomers leave through the small queue unless they were used again; then they go round the main queue.

    Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023). A block that comes back while its name
    is remembered goes to the main queue at once. Differences: within a queue chain tails go first, and held slots are
    passed over, so that "first in" is the order of those that may leave.

    Args:
        num_slots: of the tier: sizes the small queue, and as many names are remembered.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._small, self._main = Queue(), Queue()
        self._in_main: set[int] = set()
        self._names: dict[int, BlockHash] = {}
        self._uses: dict[int, int] = {}
        self._arrived: dict[int, int] = {}  # place in its queue; kept while the slot is held
        self._gone: OrderedDict[BlockHash, None] = OrderedDict()  # a dict's first key costs more with each one taken
        self._serial = 0

    def on_stored(self, slot: int, name: BlockHash, index: int, now_s: float) -> None:
        if slot in self._names:
            self._remember(self._names[slot])
        self._names[slot] = name
        self._uses[slot] = 0
        self._enter(slot, main=name in self._gone)
        self._gone.pop(name, None)

    def on_used(self, slot: int, now_s: float) -> None:
        self._uses[slot] = min(USES_MAX, self._uses[slot] + 1)

    def offer(self, slot: int, *, is_tail: bool) -> None:
        self._queue_of(slot).put(slot, (), self._arrived[slot], is_tail=is_tail)

    def withdraw(self, slot: int) -> None:
        self._queue_of(slot).discard(slot)

    def victim(self) -> int | None:
        """May move slots between and within the queues; asked again, it says the same."""
        while True:
            slot = self._candidate()
            if slot is None or not self._is_spared(slot):
                return slot

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def _candidate(self) -> int | None:
        """From the small queue when it has more than its share, else from the main queue; a tail, if there is one."""
        small, main = self._small.first(), self._main.first()
        if small is None or main is None:
            return main if small is None else small
        if self._small.is_tail(small) != self._main.is_tail(main):
            return small if self._small.is_tail(small) else main
        return small if len(self._small) * SMALL_SHARE > self._num_slots else main

    def _is_spared(self, slot: int) -> bool:
        """Used again since it came, or since its last turn: it goes to the main queue's end, and its count falls."""
        if slot in self._in_main:
            if self._uses[slot] == 0:
                return False
            self._uses[slot] -= 1
        else:
            if self._uses[slot] < USES_TO_STAY:
                return False
            self._uses[slot] = 0
        queue = self._queue_of(slot)
        is_tail = queue.is_tail(slot)
        queue.discard(slot)
        self._enter(slot, main=True)
        self.offer(slot, is_tail=is_tail)
        return True

    def _enter(self, slot: int, *, main: bool) -> None:
        """To a queue's end. (It is offered there when it may leave.)"""
        (self._in_main.add if main else self._in_main.discard)(slot)
        self._serial += 1
        self._arrived[slot] = self._serial

    def _queue_of(self, slot: int) -> Queue:
        return self._main if slot in self._in_main else self._small

    def _remember(self, name: BlockHash) -> None:
        self._gone.pop(name, None)
        self._gone[name] = None
        while len(self._gone) > self._num_slots:
            self._gone.popitem(last=False)
