"""Pure: how long outputs are, learned from those that ended: the share that outlives any length, given the age."""

from __future__ import annotations

from bisect import bisect_right

LENGTH_MAX = 1 << 20
"""Longer outputs count as this long."""

RATIO = 1.15
"""Between the edges of two bins: a length is known to a seventh, which is less than two requests differ by."""

ENDED_MIN = 20
"""Below this many ended outputs nothing is said of any."""

MEMORY = 2000
"""When so many have been counted, all counts are halved: what was true an hour ago fades."""


def _edges() -> tuple[int, ...]:
    edges = [1]
    while edges[-1] < LENGTH_MAX:
        edges.append(max(edges[-1] + 1, round(edges[-1] * RATIO)))
    return tuple(edges)


EDGES = _edges()


class OutputLengths:
    """A histogram over bins that grow with the length. `EDGES[i]` is the least length of bin i.

    Outputs of running requests are not counted: after a few lifetimes as many long ones as began have ended.
    """

    def __init__(self) -> None:
        self._counts = [0.0] * len(EDGES)
        self._total = 0.0
        self._outlive: list[float] | None = None  # by bin: the share of outputs of at least its least length

    @property
    def known(self) -> bool:
        return self._total >= ENDED_MIN

    def see(self, length: int) -> None:
        """An output has ended, of so many tokens; nothing is learned from none."""
        if length < 1:
            return
        self._counts[bisect_right(EDGES, min(length, LENGTH_MAX)) - 1] += 1.0
        self._total += 1.0
        self._outlive = None
        if self._total >= MEMORY:
            self._counts = [count / 2.0 for count in self._counts]
            self._total /= 2.0

    def longer(self, tokens: float) -> float:
        """The share of outputs that come to `tokens` or more, in [0, 1]; linear within a bin."""
        if tokens <= 1.0 or not self._total:
            return 1.0
        outlive = self._outlive
        if outlive is None:
            outlive = self._outlive = self._cumulate()
        i = bisect_right(EDGES, tokens) - 1
        if i >= len(EDGES) - 1:
            return 0.0
        low, high = EDGES[i], EDGES[i + 1]
        return outlive[i] + (outlive[i + 1] - outlive[i]) * (tokens - low) / (high - low)

    def outlives(self, age: float, more: float, most: int) -> float:
        """How probably an output of `age` tokens so far, and of at most `most`, goes on for `more` tokens.

        1 where nothing is known: room that may not be freed is not counted on.
        """
        if age + more >= most:
            return 0.0
        if not self.known:
            return 1.0
        alive = self.longer(age)
        return self.longer(age + more) / alive if alive > 0.0 else 0.0  # older than all before: it may end any time

    def _cumulate(self) -> list[float]:
        outlive = []
        left = self._total
        for count in self._counts:
            outlive.append(max(0.0, left / self._total))
            left -= count
        return outlive
