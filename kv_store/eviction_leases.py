"""Pure: a workload-aware policy: a block is leased so many seconds from its last use; the first to expire leaves first.

How many seconds depends on two facts: how often sequences have used the block (a chat's next turns come more surely,
and sooner, the more there were), remembered beyond its eviction, and its place in the chain (shared system prompts
come first, a question's own text last). `fit_leases` learns them from a trace that has ended:

1. For each class of blocks: the survival curve of the time to the next use (Kaplan-Meier: what was not used again by
   the trace's end counts as "not yet").
2. A lease of t seconds in a class earns F(t) hits, the share used again by then, and costs the slot for the mean of
   min(time to next use, t), A(t) slot-seconds, each time.
3. Every class takes the lease that maximises F(t) - price * A(t), and the price is the lowest at which all leases
   together fit into the slots. So a slot-second earns the same everywhere at the margin.

Under more pressure than the fit foresaw the policy is LRU with a head start per class.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from halfmoon.types import BlockHash
from kv_store.eviction import RankedPolicy

USES_MAX = 5  # as many and more are one class
INDEX_BOUNDS = (0, 1, 2, 4, 8, 16, 32)  # classes by place in the chain: 0, 1, 2, 3-4, 5-8, ... and beyond
GRID_S = (0, 6, 12, 18, 24, 30, 36, 42, 48, 54, 60, 75, 90, 105, 120, 150, 180, 210, 240, 300, 360, 420, 480, 600,
          720, 900, 1200, 1500, 1800)  # fmt: skip
"""Leases that there are to choose from."""

REMEMBERED_PER_SLOT = 8  # names with their use counts, 100 bytes each: what left longer ago begins anew
BISECTIONS = 60

Class = tuple[int, int]
"""Uses so far, 1 to USES_MAX, and which of the places in the chain."""


def class_of(uses: int, index: int) -> Class:
    return min(uses, USES_MAX), bisect_left(INDEX_BOUNDS, index)


@dataclass(frozen=True, kw_only=True)
class Leases:
    """Seconds by class. A class that the fit never saw gets none.

    Args:
        price: hits that the last slot-second earns.
    """

    seconds: dict[Class, float]
    price: float

    def of(self, uses: int, index: int) -> float:
        return self.seconds.get(class_of(uses, index), 0.0)


class Leased(RankedPolicy):
    """Earliest end of its lease first.

    Args:
        num_slots: of the tier; bounds how many names' uses are remembered, the longest unseen forgotten first.
    """

    def __init__(self, leases: Leases, num_slots: int) -> None:
        super().__init__()
        self._leases = leases
        self._remembered_max = REMEMBERED_PER_SLOT * num_slots
        self._uses: dict[BlockHash, int] = {}
        self._blocks: dict[int, tuple[BlockHash, int]] = {}

    def rank_stored(self, slot: int, name: BlockHash, index: int, now_s: float) -> tuple[float, ...]:
        self._blocks[slot] = (name, index)
        return (now_s,)

    def rank_used(self, slot: int, now_s: float) -> tuple[float, ...]:
        name, index = self._blocks[slot]
        uses = self._uses.pop(name, 0) + 1
        self._uses[name] = uses
        if len(self._uses) > self._remembered_max:
            del self._uses[next(iter(self._uses))]
        return (now_s + self._leases.of(uses, index),)


# ---- fitting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Of one class, at each of GRID_S: uses per second that begin a lease, F and A of the module's docstring."""

    rate_per_s: float
    hits: Sequence[float]
    slot_s: Sequence[float]

    def best(self, price: float) -> int:
        return max(range(len(GRID_S)), key=lambda g: self.hits[g] - price * self.slot_s[g])


def fit_leases(uses: Iterable[tuple[float, Sequence[int]]], num_slots: int) -> Leases:
    """Leases for a tier of `num_slots`, from a trace: when, and the names of one prompt's successive blocks."""
    gaps, duration_s = _gaps(uses)
    curves = {kind: _curve(found, duration_s) for kind, found in gaps.items()}
    low, high = 1e-7, 1.0
    for _ in range(BISECTIONS):
        price = (low * high) ** 0.5
        occupied = sum(c.rate_per_s * c.slot_s[c.best(price)] for c in curves.values())
        low, high = (price, high) if occupied > num_slots else (low, price)
    return Leases(seconds={kind: float(GRID_S[c.best(high)]) for kind, c in curves.items()}, price=high)


def _gaps(uses: Iterable[tuple[float, Sequence[int]]]) -> tuple[dict[Class, list[tuple[float, bool]]], float]:
    """By class: seconds to the next use, True, or to the end without one, False. And the trace's duration."""
    last: dict[int, tuple[float, Class]] = {}
    counts: defaultdict[int, int] = defaultdict(int)
    gaps: defaultdict[Class, list[tuple[float, bool]]] = defaultdict(list)
    start_s = end_s = 0.0
    for number, (at_s, names) in enumerate(uses):
        start_s, end_s = (at_s if number == 0 else start_s), at_s
        for index, name in enumerate(names):
            if name in last:
                used_s, kind = last[name]
                gaps[kind].append((at_s - used_s, True))
            counts[name] += 1
            last[name] = (at_s, class_of(counts[name], index))
    for used_s, kind in last.values():
        gaps[kind].append((end_s - used_s, False))
    return gaps, max(end_s - start_s, 1e-9)


def _curve(gaps: list[tuple[float, bool]], duration_s: float) -> _Curve:
    """Kaplan-Meier on the grid; those whose end is not known leave in the middle of their interval."""
    gaps.sort()
    hits, slot_s, surviving, passed = [0.0], [0.0], 1.0, 0
    for low, high in pairwise(GRID_S):
        at_risk, ended, unknown = len(gaps) - passed, 0, 0
        while passed < len(gaps) and gaps[passed][0] <= high:
            ended, unknown = ended + gaps[passed][1], unknown + (not gaps[passed][1])
            passed += 1
        hazard = min(1.0, ended / max(1.0, at_risk - unknown / 2))
        slot_s.append(slot_s[-1] + (high - low) * surviving * (1 - hazard / 2))
        surviving *= 1 - hazard
        hits.append(1 - surviving)
    return _Curve(rate_per_s=len(gaps) / duration_s, hits=hits, slot_s=slot_s)
