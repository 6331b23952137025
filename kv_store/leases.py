"""Pure: how long a cached block is worth keeping after a use, learned from the waits between uses that have been seen.

A lease is seconds of a slot from a block's last use. How many depends on two facts, the block's class: how often
sequences have used it (a chat's next turns come more surely, and sooner, the more there were), and its place in the
chain (shared system prompts come first, a question's own text last). `LeaseLearner` learns them:

1. For each class: the survival curve of the wait for the next use (Kaplan-Meier; a wait that is not over counts as
   "not yet" for as long as it has been seen).
2. A lease of t seconds in a class earns F(t) hits, the share used again by then, and costs the slot for the mean of
   min(wait, t), A(t) slot-seconds, each time.
3. Longer leases are bought where a slot-second earns most hits, step by step, until the slots are spent. So a
   slot-second earns the same everywhere at the margin.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

USES_MAX = 5  # as many and more are one class
INDEX_BOUNDS = (0, 1, 2, 4, 8, 16, 32)  # classes by place in the chain: 0, 1, 2, 3-4, 5-8, ... and beyond
GRID_S = (0, 6, 12, 18, 24, 30, 36, 42, 48, 54, 60, 75, 90, 105, 120, 150, 180, 210, 240, 300, 360, 420, 480, 600,
          720, 900, 1200, 1500, 1800)  # fmt: skip
"""Leases that there are to choose from; a wait falls into a bin between two of them."""

BINS = len(GRID_S) - 1
COHORT_S = 60  # waits that began in the same minute are counted together
WINDOW_S = 3600  # what began longer ago is forgotten: twice the longest lease

Class = tuple[int, int]
"""Uses so far, 0 (brought here unasked) to USES_MAX, and which of the places in the chain."""


_CLASSES = [[(uses, place) for place in range(len(INDEX_BOUNDS) + 1)] for uses in range(USES_MAX + 1)]


def class_of(uses: int, index: int) -> Class:
    """Always the same tuple, since many are remembered."""
    return _CLASSES[min(uses, USES_MAX)][bisect_left(INDEX_BOUNDS, index)]


@dataclass(frozen=True, kw_only=True)
class Leases:
    """Seconds by class. A class that has not been seen gets none."""

    seconds: dict[Class, float] = field(default_factory=dict)

    def of(self, kind: Class) -> float:
        return self.seconds.get(kind, 0.0)


@dataclass(kw_only=True)
class _Waits:
    """Of one class, begun in one minute: how many, and in which bin of their length they ended, and how."""

    begun: int = 0
    used: list[int] = field(default_factory=lambda: [0] * BINS)
    lost: list[int] = field(default_factory=lambda: [0] * BINS)


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Of one class, at each of GRID_S: waits that begin per second, F and A of the module's docstring."""

    rate_per_s: float
    hits: Sequence[float]
    slot_s: Sequence[float]

    def steps(self) -> Iterable[tuple[float, float, int]]:
        """The longer and longer leases worth choosing: hits per slot-second of the step, slots it takes, which one.

        The upper hull of F over A: each step earns less than the one before it.
        """
        at = 0
        while at < BINS:
            best = max(range(at + 1, BINS + 1), key=lambda to: (self._slope(at, to), -to))
            slope = self._slope(at, best)
            if slope <= 0:
                return
            yield slope, self.rate_per_s * (self.slot_s[best] - self.slot_s[at]), best
            at = best

    def _slope(self, at: int, to: int) -> float:
        width = self.slot_s[to] - self.slot_s[at]
        return (self.hits[to] - self.hits[at]) / width if width > 0 else 0.0


class LeaseLearner:
    """Waits of the last `window_s`, as counts by class, minute and length: bounded, however many there are.

    Times are seconds of the caller's clock. All calls but `leases` are O(log bins).
    """

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._cohorts: dict[int, defaultdict[Class, _Waits]] = {}

    def began(self, kind: Class, at_s: float) -> None:
        """A block of this class was used: it waits for its next use. Each new minute, those that are too old go."""
        minute = int(at_s // COHORT_S)
        if minute not in self._cohorts:
            for old in [m for m in self._cohorts if m < (at_s - self._window_s) // COHORT_S]:
                del self._cohorts[old]
            self._cohorts[minute] = defaultdict(_Waits)
        self._cohorts[minute][kind].begun += 1

    def ended(self, kind: Class, at_s: float, now_s: float, *, is_used: bool) -> None:
        """A wait that began at `at_s` is over; not `is_used`: lost sight of, it may go on."""
        cohort = self._cohorts.get(int(at_s // COHORT_S))
        length = max(0, bisect_left(GRID_S, now_s - at_s) - 1)
        if cohort is not None and length < BINS:
            waits = cohort[kind]
            (waits.used if is_used else waits.lost)[length] += 1

    def leases(self, now_s: float, num_slots: int) -> Leases:
        """The leases that fit into so many slots: O(cohorts * classes * bins), to be asked once a minute."""
        if not self._cohorts:
            return Leases()
        seen_s = max(now_s - min(self._cohorts) * COHORT_S, 1e-9)
        curves = {kind: self._curve(kind, now_s, seen_s) for kind in self._classes()}
        steps = sorted(
            ((slope, slots, kind, to) for kind, curve in curves.items() for slope, slots, to in curve.steps()),
            key=lambda step: (-step[0], step[2]),
        )
        bought, left = dict.fromkeys(curves, 0.0), float(num_slots)
        full: set[Class] = set()  # their next step was too large: none of those after it
        for _, slots, kind, to in steps:
            if kind not in full and slots <= left:
                bought[kind], left = float(GRID_S[to]), left - slots
            else:
                full.add(kind)
        return Leases(seconds=bought)

    def _classes(self) -> list[Class]:
        return sorted({kind for cohort in self._cohorts.values() for kind in cohort})

    def _curve(self, kind: Class, now_s: float, seen_s: float) -> _Curve:
        """Kaplan-Meier on the grid, each bin from the minutes whose waits have all been seen to that length.

        Those that were lost sight of leave in the middle of their bin.
        """
        risk, used, lost, begun = [0] * BINS, [0] * BINS, [0] * BINS, 0
        for minute, cohort in self._cohorts.items():
            if kind not in cohort:
                continue
            waits = cohort[kind]
            begun += waits.begun
            waiting = waits.begun
            for i in range(bisect_left(GRID_S, now_s - (minute + 1) * COHORT_S) - 1):
                risk[i] += waiting
                used[i] += waits.used[i]
                lost[i] += waits.lost[i]
                waiting -= waits.used[i] + waits.lost[i]
        hits, slot_s, surviving = [0.0], [0.0], 1.0
        for i in range(BINS):
            hazard = min(1.0, used[i] / max(1.0, risk[i] - lost[i] / 2))
            slot_s.append(slot_s[-1] + (GRID_S[i + 1] - GRID_S[i]) * surviving * (1 - hazard / 2))
            surviving *= 1 - hazard
            hits.append(1 - surviving)
        return _Curve(rate_per_s=begun / seen_s, hits=hits, slot_s=slot_s)


def fit_leases(uses: Iterable[tuple[float, Sequence[int]]], num_slots: int) -> Leases:
    """Leases for a tier of `num_slots`, from a trace that has ended: when, and the names of one prompt's blocks."""
    learner, waits, now_s = LeaseLearner(window_s=float("inf")), dict[int, tuple[Class, float]](), 0.0
    for now_s, names in uses:
        for index, name in enumerate(names):
            old = waits.get(name)
            if old is not None:
                learner.ended(*old, now_s, is_used=True)
            kind = class_of(1 if old is None else old[0][0] + 1, index)
            learner.began(kind, now_s)
            waits[name] = (kind, now_s)
    return learner.leases(now_s, num_slots)
