"""Pure: Belady's bound: evict what is needed again last. For simulation only: somebody must know the future."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from halfmoon.types import BlockHash
from kv_store.eviction import RankedPolicy


class Belady(RankedPolicy):
    """Farthest next use first, never again before that; chain tails first, which costs it nothing.

    Args:
        uses: when each block will be used, in rising order of whatever clock `on_used` is called with.
    """

    def __init__(self, uses: Mapping[BlockHash, Sequence[float]]) -> None:
        super().__init__()
        self._times = uses
        self._next: dict[BlockHash, int] = {}  # how many of a block's uses are over
        self._names: dict[int, BlockHash] = {}

    def rank_stored(self, slot: int, name: BlockHash, index: int, now_s: float) -> tuple[float, ...]:
        self._names[slot] = name
        return self.rank_used(slot, now_s)

    def rank_used(self, slot: int, now_s: float) -> tuple[float, ...]:
        """Rank: minus the next use after now."""
        name = self._names[slot]
        times, over = self._times[name], self._next.get(name, 0)
        while over < len(times) and times[over] <= now_s:
            over += 1
        self._next[name] = over
        return (-times[over] if over < len(times) else -math.inf,)
