"""Pure: the virtual clock, and what is to happen when."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Action = Callable[[], object]

RANK_EVENT = 1 << 30
"""Order among things of one moment: ends of passes first, by node, then everything else in the order of its planning.
So it does not matter when the end of a pass was planned: one by one, or many steps ahead."""


class World:
    """A heap of actions. `now_s` never goes back; nothing happens but by an action's turn."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        self._queue: list[tuple[float, int, int, Action]] = []
        self._serial = itertools.count()

    def clock(self) -> float:
        return self.now_s

    def at(self, time_s: float, action: Action, rank: int = RANK_EVENT) -> None:
        assert time_s >= self.now_s, f"{action} is planned for {time_s}, it is {self.now_s}"
        heapq.heappush(self._queue, (time_s, rank, next(self._serial), action))

    def after(self, delay_s: float, action: Action) -> None:
        self.at(self.now_s + delay_s, action)

    def run(self, done: Callable[[], bool], limit_s: float, on_limit: Callable[[], str] = str) -> None:
        """Until `done()`, which is asked after every action.

        Raises:
            AssertionError: that is not so after `limit_s` of virtual time, or nothing is left to happen.
        """
        queue, end_s = self._queue, self.now_s + limit_s
        while not done():
            assert queue, f"nothing is left to happen at {self.now_s:.3f} s: {on_limit()}"
            self.now_s, _, _, action = heapq.heappop(queue)
            assert self.now_s <= end_s, f"not done after {limit_s} s: {on_limit()}"
            self.num_events += 1
            action()
