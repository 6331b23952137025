"""Pure: from a request to commands: judge, hold, place, book, send; and look for another decode worker.

Both workers are commanded at once, unless decode room is short: then the prefill worker's command is withheld until
the room is reserved. Otherwise prompts that hold prefill room until they may decode, and reservations that hold decode
room until their prompt may be computed, wait for each other.

Those who found no room wait in a line. A decode worker that lets go of blocks, or reports room, is offered to the first
of them: one question for each piece of news, so that a full pool is not asked by everybody again and again.
"""

from __future__ import annotations

from dataclasses import replace

from conductor.admission import queue_full
from conductor.admission_config import Reserve
from conductor.attempts import Attempt, Leg, Phase, Request, Timer, fetches_of, prefill_command, reserve_command
from conductor.desk import FETCH, PULL, Desk
from conductor.judging import Judge
from conductor.policy import Placement, place, place_decode
from conductor.scoring import DecodeScore, Query, fits_decode
from conductor.view import DecodeBook, SendingBook, Worker
from conductor.waiting import Line
from core.messages import StartCommand
from halfmoon.errors import Rejected, Unavailable
from halfmoon.types import AttemptId, NodeId, Outcome

HELD_PER_RETRY = 64
"""The more requests there are, the more seldom a held one asks again: a tick must stay short. (A worker that becomes
ready is offered to all of them at once.)"""


class Placer:
    """Begins attempts. Everything it books, the desk releases."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._judge = Judge(desk)

    # ---- a request ----

    def admit(self, request: Request, now_s: float) -> None:
        """A new request: bounded, possible at all, then placed."""
        desk = self._desk
        others = len(desk.requests) - 1
        if others >= desk.config.requests_max:
            error = queue_full(others, desk.config.requests_max, desk.decode_s.value or 1.0)
            desk.end(request, Outcome.REJECTED, error, now_s)
        elif (impossible := self._judge.impossible(request, self._query(request))) is not None:
            desk.end(request, Outcome.REJECTED, impossible, now_s)
        else:
            self.place(request, now_s)

    def place_deferred(self, now_s: float) -> None:
        """Judge those again who wait for room, each in its turn: until a few of them are refused, so it stays short.

        The first of a line that finds no room ends the turn of its whole line.
        """
        desk, waiting = self._desk, self._desk.waiting
        waiting.freed, waiting.judged_s = False, now_s
        waiting.unclaim()
        passed: set[Line] = set()
        while len(passed) <= desk.admission.config.backfill:
            line = waiting.next_line(now_s, passed)
            if line is None:
                break
            waiting.in_turn = waiting.first(line, now_s)
            self.place(desk.requests[waiting.in_turn], now_s)
            if waiting.in_turn in waiting:
                passed |= waiting.passed_with(line)
        waiting.in_turn = None

    def place(self, request: Request, now_s: float) -> None:
        """Begin the next attempt now, or hold the request until it can, or end it."""
        desk = self._desk
        assert request.attempt is None, "the last attempt is still open"
        desk.waiting.unclaim(request.spec.request_id)
        why = desk.view.why_unavailable(now_s)
        if why:
            self._hold(request, why, now_s)
            return
        query = self._query(request)
        placement = place(query, desk.view, desk.index, desk.policy, desk.config, now_s)
        if placement is None:
            why = f"all workers that could hold {query.num_tokens} tokens have refused or are not ready"
            self._hold(request, why, now_s, known=True)
        elif self._judge.admitted(request, query, placement, now_s):
            desk.waiting.discard(request.spec.request_id)
            if placement.capped:
                desk.counters["copies_capped"] += 1
            self._dispatch(request, query, placement, now_s)

    def refused_by_prefill(self, request: Request, leg: Leg, reason: str, now_s: float) -> None:
        """Nothing was begun: the same tokens go elsewhere under the next number."""
        desk = self._desk
        assert request.attempt is not None
        desk.close_leg(request.attempt, leg, now_s)
        desk.close_attempt(request, f"refused by {leg.node_id}: {reason}", now_s)
        request.refusals += 1
        request.excluded |= {leg.node_id}
        request.cause = f"refused by {leg.node_id}: {reason}"
        if request.stream_finished:
            desk.forget(request, Outcome.FINISHED, "", now_s)
        elif request.refusals > desk.config.refusals_max:
            outcome = Outcome.FAILED if request.failures else Outcome.REJECTED
            limit = float(desk.config.refusals_max)
            error = Rejected(reason=f"workers_{reason}", predicted=request.refusals, limit=limit, unit="refusals")
            desk.end(request, outcome, error, now_s)
        else:
            self.place(request, now_s)

    # ---- another decode worker ----

    def seek_decode(self, request: Request, now_s: float) -> None:
        """The prefill goes on; somebody else must decode. Who finds nobody waits in line, and asks no more."""
        desk, attempt = self._desk, request.attempt
        assert attempt is not None
        assert attempt.decode is None
        if attempt.judged_late and self._refused_late(request, attempt, now_s):
            return
        if request.spec.request_id in desk.seekers or attempt.decode_tries >= desk.config.decode_tries_max:
            self._wait_in_line(request, attempt, now_s)
            return
        query = self._query(request, excluded=attempt.decode_refused)
        score = place_decode(query, desk.view, desk.index, desk.policy, desk.config, now_s)
        attempt.decode_tries += 1
        if score is None:
            self._wait_in_line(request, attempt, now_s)
        else:
            self._reserve(request, attempt, query, self._worker(score.node_id), now_s)

    def ask_decode(self, request: Request, attempt: Attempt, now_s: float) -> None:
        """Its prefill has ended, or will soon: ask for decode room, if that was left for later."""
        request.timers.pop(Timer.ASK, None)
        if attempt.unasked and attempt.decode is not None:
            leg, attempt.decode, attempt.unasked = attempt.decode, None, False
            self._desk.close_leg(attempt, leg, now_s)
            self.seek_decode(request, now_s)
        elif attempt.judged_late and attempt.decode is None:
            self.seek_decode(request, now_s)

    def _refused_late(self, request: Request, attempt: Attempt, now_s: float) -> bool:
        """Judge the decode side by its load now. True: the request has ended, and its prefill is wasted.

        Once only: the decode workers themselves may still refuse, which ends it too. A pool that is away for a moment
        is no refusal.
        """
        desk = self._desk
        query = self._query(request, excluded=attempt.decode_refused)
        score = place_decode(query, desk.view, desk.index, desk.policy, desk.config, now_s)
        error: Rejected | None = None
        if score is not None:
            refused = self._judge.on_prefilled(request, query, score, now_s)
            error = None if refused is None else refused.error()
        elif attempt.decode_refused:
            error = Rejected(
                reason="decode_room at decode",
                predicted=float(len(attempt.decode_refused)),
                limit=0.0,
                unit="refusals",
                retry_after_s=desk.decode_s.value,
            )
        if error is not None:
            desk.counters[f"rejected_{error.reason}".replace(" ", "_")] += 1
            desk.end(request, Outcome.REJECTED, error, now_s)
        return error is not None

    def _wait_in_line(self, request: Request, attempt: Attempt, now_s: float) -> None:
        """Until `offer`. While the prefill is withheld nothing is held, and the phase's time bounds the wait."""
        request.crowded = True
        attempt.asked_s = now_s if attempt.asked_s is None else attempt.asked_s
        if attempt.withheld is None and attempt.first_token_id is None:
            self._judge.hold_first(request, now_s)
        self._desk.seekers.setdefault(request.spec.request_id)
        if attempt.withheld is None and Timer.SEEK not in request.timers:
            request.wait(Timer.SEEK, now_s + self._desk.config.seek_wait_s)

    def offer(self, worker: Worker, now_s: float, *, reported: bool = False) -> None:
        """This decode worker may have room again: the first in line that it could ever hold asks, and no other.

        Those come first whose prefill has ended: their clients wait, and others for the prefill room that they hold.

        Args:
            reported: judge by its last report, which is news; else something was let go of since.
        """
        desk = self._desk
        if not desk.seekers or worker.coupled or not worker.decodes or worker not in desk.view.ready(now_s):
            return
        for request in sorted(map(desk.requests.__getitem__, desk.seekers), key=_not_prefilled):
            attempt, query = request.attempt, self._query(request)
            assert attempt is not None, "a request without an attempt stands in line"
            if attempt.decode is not None or not fits_decode(query, worker):
                continue  # it is asking another one just now, or could never be held here
            if not reported or worker.load.room >= query.blocks(query.num_tokens + 1):
                self._reserve(request, attempt, query, worker, now_s)
            return

    def prefill(self, request: Request, attempt: Attempt, now_s: float) -> None:
        """The decode room is there: send the prefill worker's command, if it was withheld."""
        command, attempt.withheld = attempt.withheld, None
        if command is not None:
            leg = attempt.prefill
            leg.since_s = now_s
            request.wait(Timer.PREFILL, now_s + self._prefill_wait_s(attempt))
            self._desk.send(leg.node_id, leg.epoch, replace(command, deadline_s=request.left_s(now_s)))

    def start(self, request: Request, attempt: Attempt) -> None:
        """Hand the first token to the decode worker, once both it and the room are there."""
        if attempt.started or attempt.first_token_id is None or not attempt.reserved or attempt.decode is None:
            return
        attempt.started = True
        command = StartCommand(attempt_id=attempt.attempt_id, first_token_id=attempt.first_token_id)
        self._desk.send(attempt.decode.node_id, attempt.decode.epoch, command)

    # ---- inside ----

    def _query(self, request: Request, excluded: frozenset[NodeId] | None = None) -> Query:
        desk, spec = self._desk, request.spec
        num_tokens = len(spec.token_ids) + len(request.emitted)
        size = desk.layout.block_size
        usable = (num_tokens - 1) // size  # the last token is always computed: it gives the logits
        mean = desk.output_tokens.value
        left = request.tokens_left
        return Query(
            num_tokens=num_tokens,
            hashes=spec.block_hashes if len(spec.block_hashes) <= usable else spec.block_hashes[:usable],
            tokens_max=len(spec.token_ids) + spec.sampling.max_tokens,
            output_tokens=left if mean is None else min(left, round(mean)),
            slo=self._judge.slo(request),
            block_size=size,
            block_bytes=desk.layout.block_bytes,
            excluded=request.excluded if excluded is None else excluded,
        )

    def _hold(self, request: Request, why: str, now_s: float, *, known: bool = False) -> None:
        """Wait for a worker, if there is reason to believe that one comes (or one refused); else refuse at once."""
        desk = self._desk
        desk.waiting.discard(request.spec.request_id)
        request.held_why = why
        request.excluded = frozenset()
        hold_s = request.timers.get(Timer.HOLD)
        if hold_s is None:
            if not (known or request.placed or desk.view.returning(now_s)):
                desk.end(request, Outcome.REJECTED, Unavailable(why), now_s)
                return
            hold_s = now_s + desk.config.unavailable_grace_s
            desk.note(request, now_s, f"held: {why}")
        request.set_phase(Phase.HELD, hold=hold_s, retry=now_s + desk.config.retry_s * self._crowd)

    @property
    def _crowd(self) -> float:
        return 1.0 + len(self._desk.requests) / HELD_PER_RETRY

    def _prefill_wait_s(self, attempt: Attempt) -> float:
        return self._desk.config.phase_wait_s + self._desk.config.phase_factor * attempt.predicted_s

    def _dispatch(self, request: Request, query: Query, placement: Placement, now_s: float) -> None:
        """Book, then command: the decode worker's room first, so that its pull waits for the prefill."""
        desk, (prefill, decode) = self._desk, placement.option
        request.number += 1
        worker = self._worker(prefill.node_id)
        leg = Leg(node_id=worker.node_id, epoch=worker.info.epoch, since_s=now_s)
        attempt = request.attempt = Attempt(
            attempt_id=AttemptId(request.spec.request_id, request.number),
            prefill=leg,
            decode=leg if placement.option.coupled else None,
            begun_s=now_s,
            predicted_s=prefill.ttft_s,
            fetch_source=prefill.source,
        )
        at_s = now_s - request.arrived_s
        request.record.choices.append(desk.decisions.choice(placement, request.number, request.cause, at_s))
        request.set_phase(Phase.PREFILLING, prefill=now_s + self._prefill_wait_s(attempt))
        worker.book_prefill(attempt.attempt_id, prefill.ttft_s - prefill.queue_s, now_s)
        desk.begin(attempt.attempt_id)
        if attempt.coupled:
            self._book_decode(attempt, query, worker)
        else:
            self._arrange_decode(request, attempt, query, placement, now_s)
            done_s = now_s + prefill.ttft_s
            times = done_s - prefill.prefill_s, done_s + placement.handover_s
            self._book_pull(attempt, query, decode, worker, *times)
            if attempt.unasked or attempt.judged_late or self._judge.slow_handover(query, placement.handover_s):
                self._judge.hold_first(request, now_s)
        self._command_prefill(request, attempt, placement, worker, now_s)

    def _arrange_decode(
        self, request: Request, attempt: Attempt, query: Query, placement: Placement, now_s: float
    ) -> None:
        """Ask for decode room now, or leave it for later, as the policy commands.

        What is asked for during the prefill is booked from the beginning. A later attempt of an accepted request is
        not judged again, so its room is always asked for.
        """
        desk, decode = self._desk, placement.option.decode
        short = decode.room_load > 1.0
        lead_s = placement.pull_s + (desk.room_wait_s.value or 0.0)
        when = Reserve.WITH if request.failures else desk.admission.reserve
        if when is Reserve.AFTER:
            attempt.judged_late = True
        elif when is Reserve.DURING and short and self._may_ask_later(request, attempt, query, lead_s):
            worker = self._worker(decode.node_id)
            attempt.decode = Leg(node_id=worker.node_id, epoch=worker.info.epoch, since_s=now_s)
            attempt.unasked = True
            self._book_decode(attempt, query, worker)
            request.wait(Timer.ASK, now_s + max(0.0, attempt.predicted_s - lead_s))
        elif desk.seekers:
            desk.seekers[request.spec.request_id] = None  # behind those who wait already
            attempt.asked_s = now_s
        else:
            self._reserve(request, attempt, query, self._worker(decode.node_id), now_s)

    def _may_ask_later(self, request: Request, attempt: Attempt, query: Query, lead_s: float) -> bool:
        """Prompts without decode room hold at most half of the prefill worker's blocks.

        They wait for decode room; those who have it may wait for blocks here: so some must be left (0012). And while
        others stand in line, a prefill that takes less than the room is late by waits for the room: it would end first,
        and the client would wait with the first token in hand.
        """
        if request.crowded or (self._desk.seekers and attempt.predicted_s < lead_s):
            return False
        worker = self._worker(attempt.prefill.node_id)
        mine = [r for r, a in self._desk.running(lambda r, a: a.prefill.node_id == worker.node_id and not a.reserved)]
        blocks = sum(query.blocks(len(r.spec.token_ids) + len(r.emitted)) for r in mine)
        return 2 * blocks <= worker.num_blocks

    def _book_pull(
        self, attempt: Attempt, query: Query, decode: DecodeScore, source: Worker, from_s: float, to_s: float
    ) -> None:
        missing = query.blocks(query.num_tokens) - decode.hit_blocks
        source.book_sending(attempt.attempt_id, PULL, SendingBook(missing * query.block_bytes, from_s, to_s))

    def _command_prefill(
        self, request: Request, attempt: Attempt, placement: Placement, worker: Worker, now_s: float
    ) -> None:
        source = self._worker(attempt.fetch_source) if attempt.fetch_source is not None else None
        fetches = fetches_of(placement.option, source)
        if source is not None:
            score, desk = placement.option.prefill, self._desk
            book = SendingBook(score.fetch_blocks * desk.layout.block_bytes, now_s, now_s + score.fetch_s)
            source.book_sending(attempt.attempt_id, FETCH, book)
            worker.book_copy(score.fetch_blocks, now_s, desk.config)
        command = prefill_command(request, attempt, fetches, now_s)
        short = request.crowded or bool(self._desk.seekers) or placement.option.decode.room_load > 1.0
        before = self._desk.admission.reserve is Reserve.BEFORE
        if not (attempt.coupled or attempt.judged_late or attempt.unasked) and (short or before):
            attempt.withheld = command
        else:
            self._desk.send(worker.node_id, worker.info.epoch, command)

    def _reserve(self, request: Request, attempt: Attempt, query: Query, worker: Worker, now_s: float) -> None:
        desk = self._desk
        attempt.decode = Leg(node_id=worker.node_id, epoch=worker.info.epoch, since_s=now_s)
        attempt.reserved = False
        attempt.asked_s = now_s if attempt.asked_s is None else attempt.asked_s
        request.wait(Timer.RESERVE, now_s + desk.config.reserve_wait_s)
        self._book_decode(attempt, query, worker)
        desk.note(request, now_s, "reserve", worker.node_id)
        source = self._worker(attempt.prefill.node_id)
        desk.send(worker.node_id, worker.info.epoch, reserve_command(request, attempt, source, now_s))

    def _book_decode(self, attempt: Attempt, query: Query, worker: Worker) -> None:
        worker.book_decode(attempt.attempt_id, DecodeBook(query.num_tokens, query.blocks_expected))

    def _worker(self, node_id: NodeId) -> Worker:
        worker = self._desk.view.get(node_id)
        assert worker is not None, f"{node_id} was picked but is not there"
        return worker


def _not_prefilled(request: Request) -> bool:
    return request.attempt is None or request.attempt.first_token_id is None
