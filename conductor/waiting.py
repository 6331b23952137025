"""Pure: the requests that are put off until there is room for them, and whose turn it is.

Those of one priority and one class of size (conductor.shares) stand in one line, by seniority: arrival, less
`priority_step_s` for each step of priority. Whose line is next is said by priority, then by which size has fallen
behind its share. Of a line the newest goes first: where more come than can be let in, the order does not change how
many are, and in the order of arrival all of them would wait until their limits are near. Who has waited for
`patience_s`, by its seniority, is *overdue* and goes before all who are not, the most senior first. So nobody starves:
from then on it can be overtaken by those only who are more senior, which are a bounded set, for all who come later than
`priority_step_s` for each step of priority between them are not.

One whose turn it is and who finds no room lays a *claim* on the decode worker that it would have been placed on:
others are let in there only if they fit beside it. Claims hold until the waiting are judged again, and are laid anew.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

from conductor.admission_config import AdmissionConfig
from conductor.shares import SizeShares
from conductor.view import Claim, ClusterView, Worker
from halfmoon.types import RequestId


class Line(NamedTuple):
    """Which line a request stands in."""

    priority: int
    size: int


Place = tuple[float, int, RequestId]
"""Seniority, number of its coming, name."""


TERM_S_MIN = 0.1
"""No wait is taken for shorter."""


class Ageing:
    """The sum over some requests of (now - since) / term, kept so that it is read at once."""

    def __init__(self) -> None:
        self.count = 0
        self._per_s = 0.0
        self._offset = 0.0

    def add(self, since_s: float, term_s: float) -> None:
        self.count += 1
        self._per_s += 1.0 / term_s
        self._offset += since_s / term_s

    def remove(self, since_s: float, term_s: float) -> None:
        self.count -= 1
        self._per_s -= 1.0 / term_s
        self._offset -= since_s / term_s

    def at(self, now_s: float) -> float:
        return max(0.0, now_s * self._per_s - self._offset)


def seniority(arrived_s: float, priority: int, config: AdmissionConfig) -> float:
    """Of two requests the one with the lower number is the more senior; it never changes."""
    return arrived_s - priority * config.priority_step_s


class WaitingRoom:
    """One owner: the desk. `freed`: room has been freed since the waiting were judged last.

    `in_turn`: whose turn it is just now, and who may lay a claim.
    """

    def __init__(self, view: ClusterView, config: AdmissionConfig) -> None:
        self.shares = SizeShares(config.size_fairness)
        self.freed = False
        self.judged_s = float("-inf")
        self.in_turn: RequestId | None = None
        self._view = view
        self._config = config
        self._lines: dict[Line, list[Place]] = {}
        self._places: dict[RequestId, tuple[Line, Place]] = {}
        self._terms: dict[RequestId, tuple[float, float]] = {}  # since when, and for how long at most
        self._ageing: dict[int, Ageing] = {}  # by class of size
        self._count = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._places

    def add(self, request_id: RequestId, line: Line, arrived_s: float, ends_s: float) -> None:
        """It waits from its arrival until `ends_s` at most."""
        assert request_id not in self._places, f"{request_id} waits already"
        self._count += 1
        place = (seniority(arrived_s, line.priority, self._config), self._count, request_id)
        self._places[request_id] = line, place
        self._terms[request_id] = arrived_s, max(TERM_S_MIN, ends_s - arrived_s)
        self._ageing.setdefault(line.size, Ageing()).add(*self._terms[request_id])
        insort(self._lines.setdefault(line, []), place)

    def discard(self, request_id: RequestId) -> bool:
        """True: it waited, and no longer does. Its claim falls."""
        found = self._places.pop(request_id, None)
        if found is None:
            return False
        line, place = found
        places = self._lines[line]
        del places[bisect_left(places, place)]
        if not places:
            del self._lines[line]
        self._ageing[line.size].remove(*self._terms.pop(request_id))
        if not self._ageing[line.size].count:
            del self._ageing[line.size]  # and with it what rounding has left
        self.unclaim(request_id)
        return True

    def stands(self, line: Line) -> bool:
        """Whether somebody stands in this line."""
        return line in self._lines

    def losing(self, size: int, now_s: float) -> float:
        """How many who wait, of this class, are as good as rejected: each by the share of its wait that is over."""
        ageing = self._ageing.get(size)
        return 0.0 if ageing is None else ageing.at(now_s)

    # ---- turns ----

    def next_line(self, now_s: float, passed: set[Line]) -> Line | None:
        """The line whose first is next, of those not `passed`; None: there is none left."""
        lines = [line for line in self._lines if line not in passed]
        return min(lines, key=lambda line: self._turn(line, now_s), default=None)

    def passed_with(self, line: Line) -> set[Line]:
        """The lines whose turn is over when the first of this one found no room: its own, and those of larger requests.

        A larger one would find none either, but for room that is expected later, since its prefill takes longer: then
        those with long prefills would book ahead of all others what is going to be freed.
        """
        return {other for other in self._lines if other.priority <= line.priority and other.size >= line.size}

    def first(self, line: Line, now_s: float) -> RequestId:
        return self._front(line, now_s)[2]

    def _front(self, line: Line, now_s: float) -> Place:
        oldest, newest = self._lines[line][0], self._lines[line][-1]
        return oldest if self._overdue(oldest, now_s) else newest

    def _overdue(self, place: Place, now_s: float) -> bool:
        return place[0] <= now_s - self._config.patience_s

    def _turn(self, line: Line, now_s: float) -> tuple[bool, float, float, Place]:
        place = self._front(line, now_s)
        if self._overdue(place, now_s):
            return (False, 0.0, 0.0, place)
        return (True, -line.priority, -self.shares.lag(line.size, self.losing(line.size, now_s)), place)

    # ---- claims ----

    def claim(self, worker: Worker, claim: Claim) -> bool:
        """Lay it, if this worker is free of claims and not too many are claimed."""
        if worker.claim is not None or self._claims_left <= 0:
            return False
        worker.claim = claim
        return True

    @property
    def _claims_left(self) -> int:
        """Half of the decode workers stay free of claims, where there are two or more."""
        claimed = sum(w.claim is not None for w in self._view)
        return max(1, sum(w.decodes for w in self._view) // 2) - claimed

    def unclaim(self, request_id: RequestId | None = None) -> None:
        """Let go of this request's claim, or of all."""
        for worker in self._view:
            if worker.claim is not None and request_id in (None, worker.claim.request_id):
                worker.claim = None
