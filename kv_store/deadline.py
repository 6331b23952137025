"""Shell: a span of time that has begun, for code that blocks in a thread."""

from __future__ import annotations

import math
import time


class Deadline:
    """Counts down from `timeout_s`, and from `stall_s` anew whenever something has moved, by the monotonic clock."""

    def __init__(self, timeout_s: float, stall_s: float = math.inf) -> None:
        self._stall_s = stall_s
        self._end_s = time.monotonic() + timeout_s
        self.moved()

    def moved(self) -> None:
        self._stalled_s = time.monotonic() + self._stall_s

    @property
    def left_s(self) -> float:
        return max(0.0, min(self._end_s, self._stalled_s) - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.left_s <= 0.0
