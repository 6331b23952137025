"""Pure: the attempts of one worker machine: who is accepted, how each one ends, and when its blocks may go.

The rule that both roles share: an attempt's table is closed only when nothing can touch its slots any more: no pass
of the engine, no pull into them, no peer reading from them. Until then it is *ending*, and its slots are quarantined.
Every accepted attempt ends in exactly one report, or (a prefill that was handed over) in silence after PrefillDone.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from core.messages import AttemptFailed, Closed, FailureKind, RefusalReason, Refused, WorkerEvent
from halfmoon.errors import ConfigError, IntegrityError, PeerLost, TransferError
from halfmoon.types import AttemptId, Epoch, NodeId, RequestId, Tier, TransferId
from kv_store.tiers import KvCache
from kv_store.values import Move, PullEnded, PullSpec, Want
from node.effects import AbortPull, Effect, Pass, Report, StartPull, Withdraw
from node.sequence import SequenceState

PRIORITY_STEP_S = 10.0
"""How much earlier one step of priority makes an attempt due."""
PATIENCE_S_MAX = 60.0
"""A lax deadline counts as this much: nobody is overtaken by those who arrive this much (and priority) later."""
REQUESTS_REMEMBERED_MAX = 65_536
"""Requests whose highest attempt number is kept, to tell stale commands: hours of traffic, a few MB."""


def require(ok: bool, key: str, value: object, expected: str) -> None:
    """Check one setting.

    Raises:
        ConfigError: naming the key, the value and what was expected.
    """
    if not ok:
        raise ConfigError(key=key, value=value, expected=expected)


def due_s(now_s: float, deadline_s: float, priority: int) -> float:
    """When an attempt that arrives now is due: the one order of queues, batches and preemption.

    An absolute time, so that whoever waits is overtaken by a bounded set of later arrivals: nobody starves.
    """
    return now_s + min(deadline_s, PATIENCE_S_MAX) - priority * PRIORITY_STEP_S


@dataclass(kw_only=True, eq=False)
class Attempt:
    """What both roles keep of one attempt.

    Attributes:
        deadline_at_s: the machine fails it then, whatever its phase.
        withdraws: peers may read from its slots, so that ending it takes a Withdraw.
        opened: the cache holds a table under its id.
        pulls: transfers that may still write into its slots.
        loading: its slots whose bytes are still moving in from DRAM.
        farewell: reported when the last of its blocks is released.
    """

    sequence: SequenceState
    front_end: str
    received_s: float
    deadline_at_s: float
    due_s: float
    withdraws: bool = False
    opened: bool = False
    in_pass: bool = False
    withdrawing: bool = False
    ending: bool = False
    pulls: set[TransferId] = field(default_factory=set)
    loading: set[int] = field(default_factory=set)
    farewell: WorkerEvent | None = None
    order: int = 0
    compute_s: float = 0.0
    computed_tokens: int = 0

    @property
    def attempt_id(self) -> AttemptId:
        return self.sequence.attempt_id

    @property
    def urgency(self) -> tuple[float, int]:
        """Least first: earliest due, and first come among equals."""
        return (self.due_s, self.order)


class Peer(Protocol):
    """Where to pull from, as commands name it."""

    @property
    def source(self) -> NodeId: ...
    @property
    def source_epoch(self) -> Epoch: ...
    @property
    def source_address(self) -> str: ...


A = TypeVar("A", bound=Attempt)


class AttemptNumbers:
    """The highest attempt number accepted per request; the least recently used requests are forgotten."""

    def __init__(self) -> None:
        self._highest: OrderedDict[RequestId, int] = OrderedDict()

    def refusal(self, attempt_id: AttemptId) -> RefusalReason | None:
        highest = self._highest.get(attempt_id.request_id)
        if highest is None or attempt_id.number > highest:
            return None
        return RefusalReason.DUPLICATE if attempt_id.number == highest else RefusalReason.STALE

    def note(self, attempt_id: AttemptId) -> None:
        self._highest[attempt_id.request_id] = attempt_id.number
        self._highest.move_to_end(attempt_id.request_id)
        while len(self._highest) > REQUESTS_REMEMBERED_MAX:
            self._highest.popitem(last=False)

    def give_back(self, attempt_id: AttemptId) -> None:
        """The attempt was refused after all; its number may come again."""
        self._highest[attempt_id.request_id] = attempt_id.number - 1


class Attempts(Generic[A]):
    """A machine's table of live attempts, and its outbox of effects.

    Args:
        cache: where their block tables are; closed here when an attempt has ended.
        attempts_max: beyond it new ones are refused with NO_ROOM.
        numbers: shared by the two machines of a coupled worker.
    """

    def __init__(self, cache: KvCache, *, node_id: NodeId, attempts_max: int, numbers: AttemptNumbers) -> None:
        self.draining = False
        self.num_ignored = 0
        self.expire_due_s = math.inf  # no live attempt's deadline is earlier
        self._node_id = node_id
        self._cache = cache
        self._attempts_max = attempts_max
        self._numbers = numbers
        self._live: dict[AttemptId, A] = {}
        self._by_urgency: list[A] = []  # the same ones; at most attempts_max, so that insertion is cheap
        self._outbox: list[Effect] = []
        self._pulls: dict[TransferId, PullSpec] = {}
        self._arrivals = 0
        self._num_pulls = 0

    # ---- questions ----

    def get(self, attempt_id: AttemptId) -> A | None:
        """The attempt, unless it is unknown or ending."""
        attempt = self._live.get(attempt_id)
        return None if attempt is None or attempt.ending else attempt

    def all(self) -> Sequence[A]:
        """The ending ones too, most urgent first; borrowed, until the next call that changes anything."""
        return self._by_urgency

    def live(self) -> list[A]:
        """Those not ending, most urgent first."""
        return [a for a in self._by_urgency if not a.ending]

    @property
    def num_ending(self) -> int:
        """Those whose slots are released soon: when a pass, a pull or a peer has ended."""
        return sum(a.ending for a in self._by_urgency)

    def ids(self) -> tuple[AttemptId, ...]:
        return tuple(self._live)

    def refusal(self, attempt_id: AttemptId) -> RefusalReason | None:
        """Why a new command for this attempt is to be refused, as far as both roles agree."""
        if attempt_id in self._live:
            return RefusalReason.DUPLICATE
        reason = self._numbers.refusal(attempt_id)
        if reason is None and self.draining:
            reason = RefusalReason.DRAINING
        if reason is None and len(self._live) >= self._attempts_max:
            reason = RefusalReason.NO_ROOM
        return reason

    # ---- effects ----

    def emit(self, effect: Effect) -> None:
        self._outbox.append(effect)

    def report(self, event: WorkerEvent) -> None:
        self._outbox.append(Report(event=event))

    def refuse(self, attempt_id: AttemptId, reason: RefusalReason) -> None:
        free = self._cache.available(Tier.DEVICE)
        self.report(Refused(attempt_id=attempt_id, reason=reason, free_blocks=free))

    @property
    def has_effects(self) -> bool:
        """Something was decided that nobody has taken yet."""
        return bool(self._outbox)

    def take_effects(self) -> list[Effect]:
        """Everything decided since the last call, in order."""
        effects, self._outbox = self._outbox, []
        return effects

    # ---- life ----

    def add(self, attempt: A) -> None:
        """From now on exactly one report ends this attempt, and its number is taken."""
        self._arrivals += 1
        attempt.order = self._arrivals
        self._live[attempt.attempt_id] = attempt
        insort(self._by_urgency, attempt, key=lambda a: a.urgency)
        self.expire_due_s = min(self.expire_due_s, attempt.deadline_at_s)
        self._numbers.note(attempt.attempt_id)

    def forget(self, attempt: A) -> None:
        """Drop the attempt and leave its table, if any, to another owner."""
        del self._live[attempt.attempt_id]
        self._by_urgency.remove(attempt)

    def send_back(self, attempt: A, reason: RefusalReason) -> None:
        """Refuse an attempt that was added, but holds nothing yet: as if it had never come."""
        assert not attempt.opened
        self.forget(attempt)
        self._numbers.give_back(attempt.attempt_id)
        self.refuse(attempt.attempt_id, reason)

    def release(self, attempt: A, now_s: float) -> None:
        """It ended well, or never began: close its table and forget it."""
        assert not attempt.in_pass, "the engine may still write its slots"
        assert not attempt.pulls, "a peer may still write its slots"
        assert not attempt.withdrawing, "a peer may still read its slots"
        if attempt.opened:
            self._cache.close(attempt.attempt_id, now_s)
        self.forget(attempt)

    def fail(self, attempt: A, kind: FailureKind, message: str, now_s: float) -> None:
        """End it with AttemptFailed, now; its blocks are released when nothing touches them any more."""
        if not attempt.ending:
            self.report(AttemptFailed(attempt_id=attempt.attempt_id, kind=kind, message=message))
            self._end(attempt, message, now_s)

    def cancel(self, attempt_id: AttemptId, reason: str, now_s: float) -> None:
        """End it with Closed, once all is released. Unknown and ending attempts are ignored and counted."""
        attempt = self.get(attempt_id)
        if attempt is None:
            self.num_ignored += 1
            return
        attempt.farewell = Closed(attempt_id=attempt_id)
        self._end(attempt, reason, now_s)

    def expire(self, now_s: float) -> None:
        if now_s < self.expire_due_s:
            return
        for attempt in self.live():
            if now_s >= attempt.deadline_at_s:
                self.fail(attempt, FailureKind.DEADLINE, "the attempt's deadline passed", now_s)
        self.expire_due_s = min([a.deadline_at_s for a in self.live()], default=math.inf)

    def _end(self, attempt: A, reason: str, now_s: float) -> None:
        attempt.ending = True
        for transfer_id in sorted(attempt.pulls):
            self.emit(AbortPull(transfer_id=transfer_id, reason=reason))
        if attempt.withdraws:
            attempt.withdrawing = True
            self.emit(Withdraw(attempt_id=attempt.attempt_id))
        if attempt.opened and (attempt.pulls or attempt.withdrawing):
            self._cache.quarantine(attempt.attempt_id)
        self.settle(attempt, now_s)

    def settle(self, attempt: A, now_s: float) -> None:
        """Release an ending attempt once nothing can touch its slots; otherwise change nothing."""
        if not attempt.ending or attempt.in_pass or attempt.pulls or attempt.withdrawing:
            return
        self.release(attempt, now_s)
        if attempt.farewell is not None:
            self.report(attempt.farewell)

    # ---- passes ----

    def enter_pass(self, attempts: Iterable[A]) -> None:
        """The engine may write into their slots until `leave_pass`."""
        for attempt in attempts:
            attempt.in_pass = True

    def leave_pass(self, over: Pass, seconds: float, now_s: float) -> list[A | None]:
        """The pass is over. Returns its attempts in order; None for one that has ended meanwhile, and is released."""
        return [self._left_pass(self._live[attempt_id], seconds, now_s) for attempt_id in over.attempts]

    def named(self, attempts: Iterable[AttemptId]) -> list[A]:
        """In order; all of them are here."""
        return [self._live[attempt_id] for attempt_id in attempts]

    def _left_pass(self, attempt: A, seconds: float, now_s: float) -> A | None:
        assert attempt.in_pass, "released in mid-pass"
        attempt.in_pass = False
        attempt.compute_s += seconds
        if not attempt.ending:
            return attempt
        self.settle(attempt, now_s)
        return None

    def pass_failed(self, failed: Pass, message: str, now_s: float) -> None:
        """Every attempt of the pass fails; those that were ending are released."""
        for attempt in self.leave_pass(failed, 0.0, now_s):
            if attempt is not None:
                self.fail(attempt, FailureKind.ENGINE, message, now_s)

    # ---- pulls into an attempt's slots ----

    def start_pull(self, attempt: A, source: Peer, wants: Sequence[Want], *, wait: bool, deadline_s: float) -> None:
        self._num_pulls += 1
        transfer_id = TransferId(f"{self._node_id}/{attempt.attempt_id}/{'pull' if wait else 'fetch'}{self._num_pulls}")
        spec = PullSpec(
            transfer_id=transfer_id,
            attempt_id=attempt.attempt_id,
            source=source.source,
            source_epoch=source.source_epoch,
            source_address=source.source_address,
            wants=tuple(wants),
            wait=wait,
            deadline_s=max(0.0, deadline_s),
        )
        attempt.pulls.add(transfer_id)
        self._pulls[transfer_id] = spec
        self.emit(StartPull(spec=spec))

    def pulling(self, transfer_id: TransferId) -> A | None:
        """Whose pull this is, unless it is unknown or its attempt is ending."""
        spec = self._pulls.get(transfer_id)
        return None if spec is None else self.get(spec.attempt_id)

    def pull_ended(self, ended: PullEnded, now_s: float) -> A | None:
        """No byte of this transfer comes any more. Returns the attempt if it goes on."""
        spec = self._pulls.pop(ended.transfer_id, None)
        if spec is None:
            return None
        attempt = self._live[spec.attempt_id]
        attempt.pulls.remove(ended.transfer_id)
        self.settle(attempt, now_s)
        return None if attempt.ending else attempt

    # ---- peers and moves ----

    def withdrawn(self, attempt_id: AttemptId, now_s: float) -> None:
        attempt = self._live.get(attempt_id)
        if attempt is not None and attempt.withdrawing:
            attempt.withdrawing = False
            self.settle(attempt, now_s)

    def loaded(self, moves: Sequence[Move]) -> list[A]:
        """These moves are done. Returns the attempts whose last loading slot was among them."""
        arrived = {m.target.slot for m in moves if m.target.tier is Tier.DEVICE}
        done = []
        for attempt in self.live():
            if attempt.loading and arrived & attempt.loading:
                attempt.loading -= arrived
                done += [] if attempt.loading else [attempt]
        return done


def kind_of(error: TransferError | None) -> FailureKind:
    """What a pull's end means to the conductor; None: the source did not have the blocks any more."""
    if isinstance(error, PeerLost):
        return FailureKind.PEER_LOST
    return FailureKind.INTEGRITY if isinstance(error, IntegrityError) else FailureKind.TRANSFER
