"""Pure: who may hold the decode worker's DEVICE slots: admission, growth, preemption, resumption.

Why nobody waits for ever. Attempts have one total order, urgency, fixed when they come. A sequence that needs a slot
takes it from less urgent ones only: the least urgent that can be is parked in DRAM. The most urgent sequence of all may
do more: if nothing can be parked (DRAM is full, or a peer is still filling the blocks), the least urgent attempt fails
for it. So it always goes on, to its end, since its longest output fits the pool, or it would not have been accepted;
then the next one is the most urgent. The others may sit out some steps, and keep what they have.
Admission leaves spare slots, so that all this is the exception.
"""

from __future__ import annotations

import enum

from core.messages import FailureKind
from decode_worker.attempt import DecodeAttempt, Phase
from halfmoon.types import Tier
from kv_store.tiers import KvCache
from kv_store.values import Opened
from node.attempts import Attempts


class Admission(enum.Enum):
    OPENED = enum.auto()
    SOON = enum.auto()  # when evictions that have begun are done
    NO_ROOM = enum.auto()


class Room:
    """The decode machine's hold on the cache. Modifies the attempts' tables and phases.

    Attributes:
        parked: somebody has been, since its owner last made this False.
    """

    def __init__(self, cache: KvCache, attempts: Attempts[DecodeAttempt]) -> None:
        self._cache = cache
        self._attempts = attempts
        self.parked = False

    # ---- admission ----

    def spare(self) -> int:
        """Slots to leave when somebody new is let in: the next one of each sequence here, and all that is parked."""
        live = self._attempts.live()
        return sum(a.on_device for a in live) + sum(a.num_blocks_resuming for a in live if a.phase is Phase.PARKED)

    def admit(self, attempt: DecodeAttempt, now_s: float) -> Admission:
        """Open a table for the given tokens and the next one, if that leaves the spare slots.

        The last given block is never taken from here: pulling it tells the prefill worker that it may let go.
        """
        sequence = attempt.sequence
        num_blocks, limit = sequence.blocks_joining, sequence.reusable_blocks
        spare = self.spare()
        present = self._cache.match(sequence.names[:limit]).count(Tier.DEVICE)  # held by others, at best
        if self._cache.available(Tier.DEVICE) < num_blocks - present + spare:
            return Admission.NO_ROOM
        opened = self._cache.open(attempt.attempt_id, sequence.names, num_blocks, now_s, use_hits=limit)
        if opened is None:
            return Admission.SOON
        if self._cache.available(Tier.DEVICE) < spare:  # what was present was evictable: it counted twice
            self._cache.close(attempt.attempt_id, now_s)
            return Admission.NO_ROOM
        attempt.opened, attempt.opened_s = True, now_s
        attempt.hits = opened.hits
        self._seat(attempt, opened, Phase.PULLING)
        return Admission.OPENED

    @staticmethod
    def _seat(attempt: DecodeAttempt, opened: Opened, phase: Phase) -> None:
        attempt.phase = phase
        attempt.sequence.slots = opened.slots
        attempt.loading = {opened.slots[i] for i in opened.loading}

    # ---- growth ----

    def grow(self, attempt: DecodeAttempt, now_s: float) -> bool:
        """Make a slot for the next position, at the cost of less urgent ones. False: not in this step.

        Called between passes only.
        """
        slot = self._cache.grow(attempt.attempt_id, now_s)
        if slot is None and self._take_from_another(attempt, 1, now_s):
            slot = self._cache.grow(attempt.attempt_id, now_s)
        if slot is not None:
            attempt.sequence.slots += (slot,)
        return slot is not None

    # ---- preemption ----

    def _take_from_another(self, needy: DecodeAttempt, num_slots: int, now_s: float) -> bool:
        """Preempt one less urgent attempt, unless enough room is coming anyway."""
        if self._cache.available(Tier.DEVICE) >= num_slots or self._attempts.num_ending:
            return False
        victims = [a for a in reversed(self._attempts.live()) if a.on_device and a.urgency > needy.urgency]
        if any(self._park(victim, now_s) for victim in victims if victim.quiet):
            return True
        if not victims or any(v.loading for v in victims) or needy is not self._placed()[0]:
            return False  # what is loading can be parked in a moment
        self._attempts.fail(victims[0], FailureKind.NO_ROOM, f"its blocks were needed for {needy.attempt_id}", now_s)
        return True

    def _park(self, victim: DecodeAttempt, now_s: float) -> bool:
        if not self._cache.park(victim.attempt_id, victim.num_blocks_used, now_s):
            return False
        victim.phase, self.parked = Phase.PARKED, True
        victim.sequence.slots = ()
        victim.preemptions += 1
        return True

    # ---- resumption ----

    def resume(self, now_s: float) -> list[DecodeAttempt]:
        """Bring parked ones back, most urgent first, while that leaves a slot for each sequence here. Returns them."""
        placed = self._placed()
        resumed: list[DecodeAttempt] = []
        for attempt in [a for a in placed if a.phase is Phase.PARKED]:
            if not self._resume(attempt, attempt is placed[0], now_s):
                break
            resumed.append(attempt)
        return resumed

    def _resume(self, attempt: DecodeAttempt, is_first: bool, now_s: float) -> bool:
        growing = 0 if is_first else sum(a.on_device for a in self._attempts.live())
        if self._cache.available(Tier.DEVICE) < attempt.num_blocks_resuming + growing:
            return False
        opened = self._cache.unpark(attempt.attempt_id, now_s)
        if opened is not None:
            self._seat(attempt, opened, Phase.HERE)
        return opened is not None

    def rescue(self, now_s: float) -> None:
        """Make room for the most urgent attempt, if it is parked, at the cost of the others. Between passes only."""
        placed = (a for a in self._attempts.all() if not a.ending and a.phase is not Phase.WAITING)
        first = next(placed, None)
        if first is not None and first.phase is Phase.PARKED:
            while self._take_from_another(first, first.num_blocks_resuming, now_s):
                pass

    def _placed(self) -> list[DecodeAttempt]:
        return [a for a in self._attempts.live() if a.phase is not Phase.WAITING]
