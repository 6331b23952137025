"""Shell: a span of time that has begun, for code that blocks in a thread."""

from __future__ import annotations

import time


class Deadline:
    """Counts down from `timeout_s` by the monotonic clock."""

    def __init__(self, timeout_s: float) -> None:
        self._end_s = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.left_s <= 0.0
