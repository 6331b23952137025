"""Pure: the requests that are put off until there is room for them, in one order that lets nobody starve.

The order is fixed when a request comes: by arrival, less `priority_step_s` for each step of priority, less `size_bonus`
seconds for each second of its own prefill. So whoever waits is overtaken by those only who arrive within a bounded
time after it; and every wait ends, at the latest when its TTFT limit is out of reach.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from conductor.admission_config import AdmissionConfig
from halfmoon.types import RequestId

Key = tuple[float, int, RequestId]
"""Rank, number of its coming, name."""

SIZE_BONUS_S_MAX = 60.0
"""Most that a long prompt may gain: the bound on being overtaken must not hang on what a prompt is believed to cost."""


def rank(arrived_s: float, priority: int, prefill_s: float, config: AdmissionConfig) -> float:
    """Who waits is judged in this order, lowest first."""
    bonus_s = min(SIZE_BONUS_S_MAX, config.size_bonus * prefill_s)
    return arrived_s - priority * config.priority_step_s - bonus_s


class WaitingRoom:
    """One owner: the desk. `freed`: room has been freed since the waiting were judged last."""

    def __init__(self) -> None:
        self.freed = False
        self.judged_s = float("-inf")
        self._order: list[Key] = []
        self._keys: dict[RequestId, Key] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._keys

    def add(self, request_id: RequestId, rank_s: float) -> None:
        assert request_id not in self._keys, f"{request_id} waits already"
        self._count += 1
        key = self._keys[request_id] = (rank_s, self._count, request_id)
        insort(self._order, key)

    def discard(self, request_id: RequestId) -> bool:
        """True: it waited, and no longer does."""
        key = self._keys.pop(request_id, None)
        if key is None:
            return False
        del self._order[bisect_left(self._order, key)]
        return True

    def ahead_of(self, rank_s: float) -> int:
        """How many are judged before one of this rank that comes now."""
        return bisect_left(self._order, (rank_s, self._count + 1, RequestId("")))

    def in_order(self) -> list[RequestId]:
        return [request_id for _, _, request_id in self._order]
