"""Pure: what the source knows of attempts that peers pull from, in whichever order pulls and the machine speak.

`hand_over` and `withdraw` may come before the first pull, between pulls, or after the last acknowledgement; each is
answered once, when no pull of the attempt is left.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from halfmoon.types import AttemptId
from kv_store import transfer_values as tv
from kv_store.transfer_serves import Serve, ServeKey


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The attempt's partial last block; num_tokens 0: it has none."""

    index: int
    slot: int
    num_tokens: int


class _Outcome(enum.Enum):
    HANDED = "handed"
    WITHDRAWN = "withdrawn"


@dataclass(kw_only=True)
class _Attempt:
    tail: Tail | None = None
    outcome: _Outcome | None = None
    acked: bool = False  # a puller has everything that it asked for
    moved_s: float = 0.0  # handed over, or a block acknowledged
    expires_s: float = 0.0  # when a record without an outcome is forgotten
    serves: dict[ServeKey, None] = field(default_factory=dict)  # a set that keeps its order


class Attempts:
    """Of `limits`, its `ended_max` and `hold_s` count here."""

    def __init__(self, *, limits: tv.TransferLimits, emit: Callable[[tv.Effect], None]) -> None:
        self._ended_max = limits.ended_max
        self._hold_s = limits.hold_s
        self._emit = emit
        self._attempts: dict[AttemptId, _Attempt] = {}
        self._withdrawn: OrderedDict[AttemptId, None] = OrderedDict()

    # ---- the machine speaks; both return the attempt's pulls ----

    def hand_over(self, attempt_id: AttemptId, tail: Tail, now_s: float) -> list[ServeKey]:
        attempt = self._attempts.setdefault(attempt_id, _Attempt())
        assert attempt.outcome is None, f"{attempt_id} has ended here already"
        attempt.tail, attempt.outcome, attempt.moved_s = tail, _Outcome.HANDED, now_s
        return list(attempt.serves)

    def withdraw(self, attempt_id: AttemptId) -> list[ServeKey]:
        attempt = self._attempts.setdefault(attempt_id, _Attempt())
        attempt.outcome = _Outcome.WITHDRAWN
        self._withdrawn[attempt_id] = None
        while len(self._withdrawn) > self._ended_max:
            self._withdrawn.popitem(last=False)
        return list(attempt.serves)

    # ---- pulls ----

    def attach(self, serve: Serve) -> bool:
        """A pull that waits has begun; True if the attempt was handed over already."""
        attempt = self._attempts.setdefault(serve.pull.attempt_id, _Attempt())
        attempt.serves[serve.key] = None
        attempt.expires_s = max(attempt.expires_s, serve.deadline_s)
        return attempt.outcome is _Outcome.HANDED

    def detach(self, serve: Serve) -> None:
        self._attempts[serve.pull.attempt_id].serves.pop(serve.key, None)

    def on_moved(self, attempt_id: AttemptId, now_s: float) -> None:
        """A puller has acknowledged some block of it."""
        self._attempts[attempt_id].moved_s = now_s

    def on_acked(self, attempt_id: AttemptId) -> None:
        """The last acknowledgement of a pull; it may come before the hand-over, and is remembered for it."""
        self._attempts[attempt_id].acked = True

    def settle(self, attempt_id: AttemptId) -> list[ServeKey]:
        """Say how the attempt ended here, once nobody reads from it.

        Returns the pulls that must be given up first: the attempt was handed over to another one.
        """
        attempt = self._attempts.get(attempt_id)
        if attempt is None:
            return []
        handed_over = attempt.outcome is _Outcome.HANDED and attempt.acked
        if attempt.serves:
            return list(attempt.serves) if handed_over else []
        if handed_over:
            del self._attempts[attempt_id]
            self._emit(tv.HandedOver(attempt_id=attempt_id))
        elif attempt.outcome is _Outcome.WITHDRAWN:
            del self._attempts[attempt_id]
            self._emit(tv.Withdrawn(attempt_id=attempt_id))
        elif attempt.outcome is None and not attempt.acked:
            del self._attempts[attempt_id]
        return []

    # ---- questions, time ----

    def tail_of(self, attempt_id: AttemptId) -> Tail | None:
        attempt = self._attempts.get(attempt_id)
        return None if attempt is None else attempt.tail

    def was_withdrawn(self, attempt_id: AttemptId) -> bool:
        return attempt_id in self._withdrawn

    def on_tick(self, now_s: float) -> None:
        """Forget attempts that were pulled from and that the machine never spoke of."""
        for attempt_id, attempt in list(self._attempts.items()):
            if attempt.outcome is None and not attempt.serves and now_s >= attempt.expires_s:
                del self._attempts[attempt_id]

    def stuck(self, now_s: float) -> list[AttemptId]:
        """Those handed over of which nobody has read for too long."""
        since_s = now_s - self._hold_s
        return [i for i, a in self._attempts.items() if a.outcome is _Outcome.HANDED and a.moved_s <= since_s]

    def due_s(self) -> float:
        """When `on_tick` next forgets one, or one is stuck at the earliest."""
        dues = [a.expires_s for a in self._attempts.values() if a.outcome is None and not a.serves]
        dues += [a.moved_s + self._hold_s for a in self._attempts.values() if a.outcome is _Outcome.HANDED]
        return min(dues, default=math.inf)

    def check_invariants(self, serves: set[ServeKey]) -> None:
        for attempt in self._attempts.values():
            assert attempt.serves.keys() <= serves
            assert attempt.serves or attempt.acked or attempt.outcome is not None
