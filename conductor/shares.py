"""Pure: how often requests of each size were let in lately, and which size has fallen behind its share.

Under overload short requests win every race: they fit into whatever is freed, while a long one needs much at once. So
chances are dealt out, by `size_fairness`. 1: every request has the same chance. 0.5: every token of KV has the same
chance, and a request comes in as often as all of its tokens would. 0: what is larger is held back further. With p the
share let in of the requests of s tokens, -ln p / s^(2 - 2 * size_fairness) is to be the same for every size. This *lag*
is measured, and the size whose lag is largest comes next; how many come in at all follows from the room that there is.
"""

from __future__ import annotations

import math
from collections import defaultdict

MEMORY = 2000.0
"""When so many requests have been decided on, all counts are halved: what was true a while ago fades."""


def size_class(tokens: int) -> int:
    """Requests of one class differ in size by less than twice."""
    return tokens.bit_length()


class SizeShares:
    """Counts of requests, by class of size: decided on, and let in."""

    def __init__(self, size_fairness: float) -> None:
        self._power = 2.0 - 2.0 * size_fairness
        self._decided: defaultdict[int, float] = defaultdict(float)
        self._let_in: defaultdict[int, float] = defaultdict(float)
        self._total = 0.0

    def see(self, size: int, *, let_in: bool) -> None:
        """A request of this class was let in, or finally rejected."""
        self._decided[size] += 1.0
        self._let_in[size] += let_in
        self._total += 1.0
        if self._total >= MEMORY:
            self._total /= 2.0
            for counts in (self._decided, self._let_in):
                for known in counts:
                    counts[known] /= 2.0

    def share(self, size: int, losing: float = 0.0) -> float:
        """Of the requests of this class, the share let in, in (0, 1]; as if one more had been: of a class of which
        none was decided on nothing is known, and no lag is infinite.

        losing: how many of those who wait are as good as rejected (`WaitingRoom.losing`): a line that grows old is
            behind at once, and not only when its first ones are rejected.
        """
        return (self._let_in.get(size, 0.0) + 1.0) / (self._decided.get(size, 0.0) + losing + 1.0)

    def lag(self, size: int, losing: float = 0.0) -> float:
        """Which class comes next: the one with the largest. 0: all of it were let in. Only its order means anything."""
        return -math.log(self.share(size, losing)) / math.pow(2.0, size * self._power)
