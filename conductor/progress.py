"""Pure: an attempt's way from its commands to its end, driven by what its two workers say."""

from __future__ import annotations

from conductor.attempts import Attempt, Leg, Phase, Request, Timer
from conductor.desk import Desk
from conductor.placing import Placer
from conductor.view import Worker
from core.messages import (
    AttemptFailed,
    AttemptFinished,
    Closed,
    DecodeJoined,
    FailureKind,
    PrefillDone,
    RefusalReason,
    Refused,
    Reserved,
)
from halfmoon.types import Outcome

AttemptEvent = Reserved | Refused | PrefillDone | DecodeJoined | AttemptFinished | AttemptFailed


class Progress:
    """Moves attempts on. What is stale, repeated or not this worker's to say is dropped and counted."""

    def __init__(self, desk: Desk, placer: Placer) -> None:
        self._desk = desk
        self._placer = placer

    def on_event(self, worker: Worker, event: AttemptEvent, now_s: float) -> None:
        """Only a present attempt's open leg is listened to."""
        desk, key = self._desk, (event.attempt_id, worker.node_id, worker.info.epoch)
        if isinstance(event, (AttemptFinished, AttemptFailed)) and desk.closing.pop(key, None) is not None:
            return  # it ended by itself while our cancel was on its way
        found = desk.current(event.attempt_id)
        if found is None:
            return
        request, attempt = found
        leg = attempt.leg_at(worker.node_id, worker.info.epoch)
        if leg is None or not leg.open or (leg is attempt.decode and attempt.unasked):
            desk.counters["stale_attempts"] += 1
            return
        desk.note(request, now_s, _word(event), worker.node_id)
        match event:
            case Reserved():
                self._on_reserved(request, attempt, leg, now_s)
                if desk.seekers.pop(request.spec.request_id, leg) is None:  # it stood in line: the next one may ask
                    self._placer.offer(worker, now_s)
            case Refused():
                self._on_refused(request, attempt, leg, event, now_s)
            case PrefillDone():
                self._on_prefill_done(request, attempt, leg, event, now_s)
            case DecodeJoined():
                self._on_decode_joined(request, attempt, leg, event, now_s)
            case AttemptFinished():
                self._on_finished(request, attempt, leg, event, now_s)
            case AttemptFailed():
                if event.kind is FailureKind.PEER_LOST and leg is attempt.decode:
                    self._doubt_source(request, attempt)
                desk.close_leg(attempt, leg, now_s)
                desk.lose(request, f"{event.kind} at {worker.node_id}: {event.message}", now_s)

    def _on_reserved(self, request: Request, attempt: Attempt, leg: Leg, now_s: float) -> None:
        if request.stream_finished and attempt.withheld is not None:
            self._desk.forget(request, Outcome.FINISHED, "", now_s)
        elif leg is attempt.decode and not attempt.coupled:
            attempt.reserved = True
            if attempt.withheld is None and attempt.asked_s is not None:
                self._desk.room_wait_s.see(now_s - attempt.asked_s)
            request.timers.pop(Timer.RESERVE, None)
            self._placer.prefill(request, attempt, now_s)
            self._placer.start(request, attempt)

    def _on_refused(self, request: Request, attempt: Attempt, leg: Leg, event: Refused, now_s: float) -> None:
        begun = attempt.first_token_id is not None if leg is attempt.prefill else attempt.reserved
        if begun:
            self._desk.counters["stale_attempts"] += 1
            return
        self._desk.counters[f"refused_{event.reason}"] += 1
        if leg is attempt.prefill:
            self._placer.refused_by_prefill(request, leg, event.reason, now_s)
        elif event.reason in (RefusalReason.DUPLICATE, RefusalReason.STALE) or request.stream_finished:
            self._desk.close_leg(attempt, leg, now_s)
            self._desk.lose(request, f"refused by {leg.node_id}: {event.reason}", now_s)
        else:
            self._give_up_decode(request, attempt, leg, now_s)

    def _give_up_decode(self, request: Request, attempt: Attempt, leg: Leg, now_s: float) -> None:
        self._desk.close_leg(attempt, leg, now_s)
        request.timers.pop(Timer.RESERVE, None)
        attempt.decode, attempt.reserved, attempt.started = None, False, False
        attempt.decode_refused |= {leg.node_id}
        self._placer.seek_decode(request, now_s)

    def _on_prefill_done(self, request: Request, attempt: Attempt, leg: Leg, event: PrefillDone, now_s: float) -> None:
        desk, record = self._desk, request.record
        if leg is not attempt.prefill or attempt.first_token_id is not None:
            desk.counters["stale_attempts"] += 1
            return
        attempt.first_token_id, attempt.prefilled_s = event.first_token_id, now_s
        desk.release_prefill(attempt, now_s)
        record.keep_stats(request.number, "prefill", event.stats)
        if record.prefill_done_s is None:
            record.prefill_done_s = now_s - request.arrived_s
        if event.finish_reason is not None:
            desk.close_leg(attempt, leg, now_s)
            self._ended_well(request, attempt, now_s)
        elif request.stream_finished:
            desk.forget(request, Outcome.FINISHED, "", now_s)
        elif attempt.coupled:
            self._decodes(request, attempt, leg, now_s)
        else:
            wait_s = desk.config.phase_wait_s + desk.config.phase_factor * attempt.predicted_s
            waits = {t.value: at_s for t, at_s in request.timers.items() if t in (Timer.RESERVE, Timer.SEEK)}
            request.set_phase(Phase.JOINING, join=now_s + wait_s, **waits)
            self._placer.ask_decode(request, attempt, now_s)
            self._placer.start(request, attempt)

    def _on_decode_joined(
        self, request: Request, attempt: Attempt, leg: Leg, event: DecodeJoined, now_s: float
    ) -> None:
        if leg is not attempt.decode or attempt.first_token_id is None:
            self._desk.counters["stale_attempts"] += 1
            return
        request.record.keep_stats(request.number, "decode", event.stats)
        if attempt.joined_s is None:  # a coupled one has joined with its first token
            assert attempt.prefilled_s is not None
            self._desk.handovers_s.append(now_s - attempt.prefilled_s)
            self._desk.close_leg(attempt, attempt.prefill, now_s)
            self._decodes(request, attempt, leg, now_s)

    def _decodes(self, request: Request, attempt: Attempt, leg: Leg, now_s: float) -> None:
        """The sequence is in the batch: from here on only the request's own deadline bounds it."""
        worker = self._desk.view.at(leg.node_id, leg.epoch)
        if worker is not None:
            worker.join_decode(attempt.attempt_id)
        attempt.joined_s = now_s
        if request.record.decode_joined_s is None:
            request.record.decode_joined_s = now_s - request.arrived_s
        if not request.stream_finished:
            request.set_phase(Phase.DECODING)

    def _on_finished(self, request: Request, attempt: Attempt, leg: Leg, event: AttemptFinished, now_s: float) -> None:
        desk = self._desk
        if leg is not attempt.decode:
            desk.counters["stale_attempts"] += 1
            return
        request.record.keep_stats(request.number, "decode", event.stats)
        request.record.output_tokens = event.num_output_tokens
        desk.output_tokens.see(float(event.num_output_tokens))
        desk.lengths.see(event.num_output_tokens)
        if attempt.joined_s is not None:
            desk.decode_s.see(now_s - attempt.joined_s)
        desk.close_leg(attempt, leg, now_s)
        self._ended_well(request, attempt, now_s)

    def _ended_well(self, request: Request, attempt: Attempt, now_s: float) -> None:
        """The last token has left the worker that said so. The other half, if it still runs, is not needed."""
        for leg in attempt.legs():
            self._desk.cancel_leg(attempt, leg, "the output is complete", now_s)
        if request.stream_finished:
            self._desk.forget(request, Outcome.FINISHED, "", now_s)
        else:
            request.set_phase(Phase.FINISHING, last=now_s + self._desk.config.last_token_wait_s)

    def _doubt_source(self, request: Request, attempt: Attempt) -> None:
        """A decode worker often sees a prefill worker die before we do, and would see it die once a try.

        Until the worker speaks again nothing is placed on it; this request goes elsewhere, if there is anywhere.
        """
        leg = attempt.prefill
        source = self._desk.view.at(leg.node_id, leg.epoch)
        if source is not None:
            source.doubted = True
        request.excluded |= {leg.node_id}

    def on_closed(self, worker: Worker, event: Closed) -> None:
        if self._desk.closing.pop((event.attempt_id, worker.node_id, worker.info.epoch), None) is None:
            self._desk.counters["closed_unawaited"] += 1

    def on_reserve_unanswered(self, request: Request, now_s: float) -> None:
        attempt = request.attempt
        assert attempt is not None
        assert attempt.decode is not None
        leg = attempt.decode
        self._desk.cancel_leg(attempt, leg, "no answer to reserve", now_s)
        self._give_up_decode(request, attempt, leg, now_s)


def _word(event: AttemptEvent) -> str:
    name = type(event).__name__
    return f"{name}: {event.reason}" if isinstance(event, Refused) else name
