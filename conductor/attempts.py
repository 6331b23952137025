"""Pure: one request's state between its arrival and its terminal event, and the commands of one attempt."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from math import inf

from conductor.alarms import Alarm, Alarms
from conductor.decisions import DecisionRecord
from conductor.effects import RequestSpec
from conductor.scoring import Option
from conductor.view import Worker
from core.messages import Fetch, PrefillCommand, ReserveCommand
from halfmoon.types import AttemptId, Epoch, NodeId


class Phase(enum.StrEnum):
    """Where a request is. The first three have no attempt; in FINISHING its attempt has ended well."""

    DEFERRED = "deferred"  # refused for now: judged again when there is room
    HELD = "held"  # waiting for a worker to place it on
    RESUMING = "resuming"  # waiting for the front end's log
    PREFILLING = "prefilling"
    JOINING = "joining"  # the first token is out; the decode worker does not decode yet
    DECODING = "decoding"
    FINISHING = "finishing"  # waiting for the front end to have the last token


class Timer(enum.StrEnum):
    """What a request waits for, each with a time at which the wait ends."""

    DEADLINE = "deadline"
    DEFER = "defer"
    HOLD = "hold"
    RETRY = "retry"
    RESUME = "resume"
    PREFILL = "prefill"
    RESERVE = "reserve"
    SEEK = "seek"
    ASK = "ask"
    JOIN = "join"
    LAST = "last"
    WIND = "wind"


@dataclass(kw_only=True)
class Leg:
    """One worker's part in an attempt. Not `open`: it has ended, or was told to end."""

    node_id: NodeId
    epoch: Epoch
    since_s: float
    open: bool = True


@dataclass(kw_only=True)
class Attempt:
    """One try. `decode` is None while another decode worker is looked for; on a coupled worker it is `prefill`.

    withheld: the prefill worker's command, not sent before decode room is reserved (see Placer); None: it was sent.
    unasked: the decode worker is booked, but was not asked for room yet.
    asked_s: when decode room was asked for first, or the attempt stood in line for it.
    judged_late: no decode worker before the prefill has ended: the decode side is judged then.
    """

    attempt_id: AttemptId
    prefill: Leg
    decode: Leg | None
    begun_s: float
    predicted_s: float
    first_token_id: int | None = None
    prefilled_s: float | None = None
    reserved: bool = False
    started: bool = False
    decode_tries: int = 1
    decode_refused: frozenset[NodeId] = frozenset()
    joined_s: float | None = None
    fetch_source: NodeId | None = None
    withheld: PrefillCommand | None = None
    unasked: bool = False
    asked_s: float | None = None
    judged_late: bool = False

    @property
    def coupled(self) -> bool:
        return self.decode is self.prefill

    def legs(self) -> list[Leg]:
        """Its parts, the decode worker's first: it stops pulling before the prefill worker lets go."""
        return [self.prefill] if self.decode is None or self.coupled else [self.decode, self.prefill]

    def leg_at(self, node_id: NodeId, epoch: Epoch) -> Leg | None:
        return next((g for g in self.legs() if g.node_id == node_id and g.epoch == epoch), None)


@dataclass(kw_only=True)
class Request:
    """Times are the machine's `now_s`. `number` is the last attempt's; `record.number_before` before the first.

    crowded: no decode worker had room for it, whatever their books here say.
    serial: in the order of arrival. `alarm_s`: no wait ends before it, and an alarm is set for it.
    """

    spec: RequestSpec
    arrived_s: float
    record: DecisionRecord
    alarms: Alarms
    serial: int
    alarm_s: float = inf
    phase: Phase = Phase.HELD
    number: int = 0
    emitted: tuple[int, ...] = ()
    attempt: Attempt | None = None
    failures: list[str] = field(default_factory=list)
    refusals: int = 0
    excluded: frozenset[NodeId] = frozenset()
    held_why: str = ""
    cause: str = "arrived"
    stream_finished: bool = False
    crowded: bool = False
    timers: dict[Timer, float] = field(default_factory=dict)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and what was emitted before the current attempt: what it prefills."""
        return self.spec.token_ids + self.emitted if self.emitted else self.spec.token_ids

    @property
    def tokens_left(self) -> int:
        return self.spec.sampling.max_tokens - len(self.emitted)

    @property
    def placed(self) -> bool:
        """Whether it was placed before, and so accepted."""
        return self.number > self.record.number_before

    def left_s(self, now_s: float) -> float:
        """Seconds until its own deadline: what commands carry, since clocks never cross processes."""
        return max(0.0, self.arrived_s + self.spec.deadline_s - now_s)

    def set_phase(self, phase: Phase, **timers: float) -> None:
        """Enter a phase; its waits, by timer name, replace the last phase's. The deadline always runs."""
        self.phase = phase
        deadline_s = self.timers[Timer.DEADLINE]
        self.timers = {Timer.DEADLINE: deadline_s, **{Timer(name): at_s for name, at_s in timers.items()}}
        self._arm(min(self.timers.values()))

    def wait(self, timer: Timer, until_s: float) -> None:
        """One more wait, or another end of it."""
        self.timers[timer] = until_s
        self._arm(until_s)

    @property
    def alarm(self) -> Alarm:
        return Alarm(self.alarm_s, self.serial, self.spec.request_id)

    def rearm(self) -> None:
        """Its alarm has rung: the next one."""
        self.alarm_s = inf
        self._arm(min(self.timers.values()))

    def _arm(self, at_s: float) -> None:
        if at_s < self.alarm_s:
            self.alarm_s = at_s
            self.alarms.set(self.alarm)

    def due(self, now_s: float) -> list[Timer]:
        return [timer for timer, at_s in self.timers.items() if at_s <= now_s]


def awaits_tokens_of(request: Request, attempt: Attempt, node_id: NodeId, epoch: Epoch) -> bool:
    """Whether tokens of this attempt that the front end lacks may be lost with this worker's token stream.

    Once an attempt decodes, its first token (of the prefill worker) has long been on its way by another stream.
    """
    leg = attempt.leg_at(node_id, epoch)
    if leg is None or request.stream_finished:
        return False
    if leg is attempt.prefill and request.phase in (Phase.PREFILLING, Phase.JOINING):
        return True
    first_was_last = request.phase is Phase.FINISHING and attempt.joined_s is None
    return first_was_last if leg is not attempt.decode else request.phase is not Phase.PREFILLING


def prefill_command(request: Request, attempt: Attempt, fetches: tuple[Fetch, ...], now_s: float) -> PrefillCommand:
    spec = request.spec
    return PrefillCommand(
        attempt_id=attempt.attempt_id,
        token_ids=request.token_ids,
        num_prompt_tokens=len(spec.token_ids),
        sampling=spec.sampling,
        front_end=spec.front_end,
        deadline_s=request.left_s(now_s),
        fetches=fetches,
        decode_here=attempt.coupled,
        cache_salt=spec.cache_salt,
        public_tokens=spec.public_tokens,
        priority=spec.priority,
    )


def reserve_command(request: Request, attempt: Attempt, source: Worker, now_s: float) -> ReserveCommand:
    spec = request.spec
    return ReserveCommand(
        attempt_id=attempt.attempt_id,
        token_ids=request.token_ids,
        num_prompt_tokens=len(spec.token_ids),
        sampling=spec.sampling,
        front_end=spec.front_end,
        source=source.node_id,
        source_epoch=source.info.epoch,
        source_address=source.info.address,
        deadline_s=request.left_s(now_s),
        cache_salt=spec.cache_salt,
        public_tokens=spec.public_tokens,
        priority=spec.priority,
    )


def fetches_of(option: Option, source: Worker | None) -> tuple[Fetch, ...]:
    """What the prefill worker is told to pull; nothing if the placement recomputes."""
    score = option.prefill
    if source is None or score.fetch_blocks == 0:
        return ()
    return (
        Fetch(
            source=source.node_id,
            source_epoch=source.info.epoch,
            source_address=source.info.address,
            first_block=score.hit_blocks,
            num_blocks=score.fetch_blocks,
        ),
    )
