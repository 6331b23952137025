"""Pure: which requests have a wait that ends by now, without a look at all the others."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

from halfmoon.types import RequestId

SPARE = 1024
"""So many outdated entries, and as many as there are open requests, are kept before they are thrown out."""


class Alarm(NamedTuple):
    """`serial`: of the request, in the order of arrival. One per request counts: that of its `alarm_s`."""

    at_s: float
    serial: int
    request_id: RequestId


class Alarms:
    """One owner: the desk. An entry is outdated when its request has ended, or has set itself an earlier alarm."""

    def __init__(self) -> None:
        self._heap: list[Alarm] = []

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, alarm: Alarm) -> None:
        heapq.heappush(self._heap, alarm)

    def ring(self, now_s: float) -> list[Alarm]:
        """Take out those that are due, in the order of their requests' arrival, outdated ones included."""
        due = []
        while self._heap and self._heap[0].at_s <= now_s:
            due.append(heapq.heappop(self._heap))
        return sorted(due, key=lambda alarm: alarm.serial)

    def crowded(self, num_open: int) -> bool:
        """Whether most entries are outdated: `reset` is due."""
        return len(self._heap) > SPARE + 2 * num_open

    def reset(self, alarms: Iterable[Alarm]) -> None:
        self._heap = list(alarms)
        heapq.heapify(self._heap)
