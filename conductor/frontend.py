"""Shell: the open streams of this process: tokens in from workers, events out to readers, one terminal event each.

A slow reader stalls only itself: its request runs on and its events wait in its session (at most max_tokens + 2 of
them). A reader with more than `unread_events_max` waiting, or one that takes nothing for `reader_stall_s`, is given
up: its request is cancelled everywhere, what it has not read is dropped, and if it ever reads on it finds CANCELLED.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence

from conductor.driver import Driver
from conductor.effects import RequestSpec
from conductor.frontend_metrics import FrontEndMetrics
from conductor.session import Ending, Session, TextDecoder
from conductor.settings import FrontEndConfig
from conductor.streams import Verdict
from conductor.usage import Moments, timings_of, usage_of
from core.messages import StepTokens, Token
from halfmoon.errors import Cancelled, DeadlineExceeded, HalfmoonError, InvalidRequest, Rejected, Unavailable
from halfmoon.types import AttemptId, Outcome, RequestId
from halfmoon.v1 import inference_pb2 as pb

log = logging.getLogger("conductor.frontend")

DECODER_CONTEXT_TOKENS = 6
"""Of the prompt, so that the decoder knows whether the output begins a word; more changes nothing."""


class FrontEnd:
    """The sessions of all open requests, by id. Everything here runs on the one loop and never waits.

    Args:
        driver: the machine's; it calls `begin`, `suspend` and `end` back.
        new_decoder: an incremental decoder for what follows the prompt ids that it is given.
        clock: the machine's.
    """

    def __init__(
        self,
        *,
        driver: Driver,
        config: FrontEndConfig,
        metrics: FrontEndMetrics,
        new_decoder: Callable[[Sequence[int]], TextDecoder],
        clock: Callable[[], float],
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.clock = clock
        self._driver = driver
        self._new_decoder = new_decoder
        self._sessions: dict[RequestId, Session] = {}
        self._wakes: dict[RequestId, asyncio.Event] = {}
        self._entering: set[RequestId] = set()
        self._unread: set[Session] = set()  # ended, but with events that the reader has not taken
        self._refusal: str | None = None

    @property
    def num_open(self) -> int:
        return len(self._sessions) + len(self._entering) + len(self._unread)

    # ---- life of a request ----

    def reserve(self, request_id: RequestId) -> None:
        """Take the id and a place among the streams, before anything that waits; `start` or `release` follows.

        Raises:
            Unavailable: the process is draining or leads no cluster.
            InvalidRequest: the id is in use.
            Rejected: too many streams.
        """
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        if request_id in self._sessions or request_id in self._entering:
            raise InvalidRequest(field="request_id", value=request_id, limit="an id that no open request has")
        if self.num_open >= self.config.streams_max:
            raise Rejected(
                reason="streams",
                predicted=self.num_open + 1,
                limit=self.config.streams_max,
                unit="streams",
                retry_after_s=1.0,
            )
        self._entering.add(request_id)

    def release(self, request_id: RequestId) -> None:
        """Give back what `reserve` took, if `start` did not come. Idempotent."""
        self._entering.discard(request_id)

    def refused(self, error: HalfmoonError, arrived_s: float) -> None:
        """Count a request that ends before `start`: like those that the machine turns away, in one terminal event."""
        late = isinstance(error, DeadlineExceeded)
        outcome = Outcome.CANCELLED if late else Outcome.REJECTED
        total_s = self.clock() - arrived_s
        self.metrics.ended(outcome.value, ttft_s=None, total_s=total_s, num_open=self.num_open)

    def start(self, spec: RequestSpec, *, arrived_s: float) -> Session:
        """Open the session and hand the request to the machine. `read` and `leave` follow."""
        now_s = self.clock()
        self._entering.remove(spec.request_id)
        decoder = self._new_decoder(spec.token_ids[-DECODER_CONTEXT_TOKENS:])
        deadline_at_s = arrived_s + spec.deadline_s
        session = Session(spec, decoder, arrived_s=arrived_s, now_s=now_s, deadline_at_s=deadline_at_s)
        self._sessions[spec.request_id] = session
        self._wakes[spec.request_id] = asyncio.Event()
        self.metrics.opened(self.num_open)
        self._driver.request(spec)
        return session

    async def read(self, session: Session) -> AsyncIterator[pb.GenerateEvent]:
        """The session's events up to and including its terminal one.

        Raises:
            HalfmoonError: the terminal error, after every event before it.
        """
        wake = self._wakes.get(session.spec.request_id) or asyncio.Event()
        while session.is_open or session.outbox:
            while session.outbox:
                session.taken_s = self.clock()
                yield session.outbox.popleft()
            if session.is_open:
                wake.clear()
                await wake.wait()  # bounded: `tick` ends the session at its deadline
        if session.error is not None:
            raise session.error

    def leave(self, session: Session, reason: str) -> None:
        """The reader is gone: an open request is cancelled everywhere. Idempotent."""
        self._unread.discard(session)
        if session.is_open:
            self._give_up(session, Cancelled(f"{session.spec.request_id}: {reason}"), reason)

    def cancel(self, request_id: RequestId, reason: str) -> bool:
        """End an open request on somebody's word; False if there is none of that id."""
        session = self._sessions.get(request_id)
        if session is None:
            return False
        self._abandon(session, Cancelled(f"{request_id}: {reason}"), reason, drop=False)
        return True

    def last_cause(self, request_id: RequestId) -> str:
        """Why the request's last attempt was begun; "arrived" of a first one, "" where no record is left."""
        record = self._driver.machine.explain(request_id)
        return record.choices[-1].cause if record is not None and record.choices else ""

    # ---- from workers ----

    def on_tokens(self, step: StepTokens) -> None:
        """One engine step's tokens, for any number of requests."""
        now_s = self.clock()
        for token in step.tokens:
            session = self._sessions.get(token.attempt_id.request_id)
            if session is None:
                self.metrics.dropped("unknown")
            else:
                self._offer(session, token, now_s)

    # ---- from the machine (conductor.driver.Streams) ----

    def begin(self, attempt_id: AttemptId) -> None:
        session = self._sessions.get(attempt_id.request_id)
        if session is not None:
            session.log.begin(attempt_id)

    def hold_first(self, request_id: RequestId, hold_s: float) -> None:
        session = self._sessions.get(request_id)
        if session is not None:
            session.log.hold_first(self.clock() + hold_s)

    def suspend(self, request_id: RequestId) -> tuple[int, ...] | None:
        session = self._sessions.get(request_id)
        return None if session is None else session.log.suspend()

    def end(self, request_id: RequestId, error: HalfmoonError, outcome: Outcome) -> None:
        session = self._sessions.get(request_id)
        if session is not None:
            self._fail(session, error, outcome, drop=False)

    # ---- from the clock ----

    def tick(self) -> None:
        """Deadlines, holes and slow readers."""
        now_s = self.clock()
        for session in list(self._sessions.values()):
            self._check(session, now_s)
        for session in [s for s in self._unread if now_s - s.taken_s > self.config.reader_stall_s]:
            self._unread.remove(session)
            session.forget(Cancelled(f"{session.spec.request_id}: the reader came too late for its end"))

    # ---- the process's end ----

    def refuse(self, reason: str | None) -> None:
        """From now on new requests are Unavailable with this reason; None: welcome again."""
        self._refusal = reason

    def cancel_all(self, reason: str) -> None:
        for session in list(self._sessions.values()):
            self._abandon(session, Unavailable(f"{session.spec.request_id}: {reason}"), reason, drop=False)

    # ---- inside ----

    def _offer(self, session: Session, token: Token, now_s: float) -> None:
        verdict, ending = session.offer(token, now_s)
        if verdict is Verdict.ACCEPTED:
            self.metrics.token(1)
            self._wake(session)
        elif verdict is not Verdict.AHEAD:
            self.metrics.dropped(verdict.value)
        if verdict is Verdict.OVERFLOW:
            self._hole(session)
        if ending is not None:
            self._finish(session, ending, now_s)
        elif session.holding:
            self._release(session)

    def _release(self, session: Session) -> None:
        """Show the first token once it was held for long enough, if no second one came and the request is open."""
        now_s = self.clock()
        if not (session.is_open and session.holding):
            return
        if session.release(now_s):
            self._wake(session)
        else:
            left_s = max(1e-3, session.log.hold_until_s - now_s)
            asyncio.get_running_loop().call_later(left_s, self._release, session)

    def _finish(self, session: Session, ending: Ending, now_s: float) -> None:
        request_id = session.spec.request_id
        session.finish(self._finished(session, ending, now_s), now_s)
        self._close(session, Outcome.FINISHED)
        self._driver.stream_finished(request_id, stopped=ending.cut, seen=session.seen())

    def _finished(self, session: Session, ending: Ending, now_s: float) -> pb.Finished:
        summary = self._driver.machine.summary(session.spec.request_id)
        stream = session.log
        moments = Moments(
            arrived_s=session.arrived_s,
            tokenized_s=session.tokenized_s,
            first_token_s=session.first_token_s,
            ended_s=now_s,
        )
        return pb.Finished(
            finish_reason=ending.finish_reason.value,
            text=ending.text,
            usage=usage_of(
                num_prompt_tokens=len(session.spec.token_ids),
                num_output_tokens=stream.num_tokens,
                prefill_stats=stream.prefill_stats,
                decode_stats=stream.decode_stats,
                summary=summary,
            ),
            timings=timings_of(
                moments,
                prefill_stats=stream.prefill_stats,
                decode_stats=stream.decode_stats,
                predicted_ttft_s=summary.predicted_ttft_s,
            ),
        )

    def _check(self, session: Session, now_s: float) -> None:
        config, request_id = self.config, session.spec.request_id
        hole_s = session.log.hole_since_s
        if now_s >= session.deadline_at_s:
            self._abandon(session, DeadlineExceeded(f"{request_id}: its deadline passed"), "deadline", drop=False)
        elif len(session.outbox) > config.unread_events_max:
            reason = f"the reader left more than {config.unread_events_max} events waiting"
            self._give_up(session, Cancelled(f"{request_id}: {reason}"), reason)
        elif session.outbox and now_s - session.taken_s > config.reader_stall_s:
            reason = f"the reader took nothing for {config.reader_stall_s:g} s"
            self._give_up(session, Cancelled(f"{request_id}: {reason}"), reason)
        elif hole_s is not None and now_s - hole_s > config.hole_s:
            self._hole(session)

    def _hole(self, session: Session) -> None:
        """A token that never came: a bug, or a token stream that lost it unseen. The attempt restarts."""
        log.error("%s: token %d is missing; restarting", session.log.attempt, session.log.num_tokens)
        self.metrics.counters["holes"] += 1
        session.log.suspend()
        self._driver.gap(session.spec.request_id, f"token {session.log.num_tokens} is missing")

    def _give_up(self, session: Session, error: HalfmoonError, reason: str) -> None:
        self._abandon(session, error, reason, drop=True)

    def _abandon(self, session: Session, error: HalfmoonError, reason: str, *, drop: bool) -> None:
        request_id = session.spec.request_id
        self._fail(session, error, _outcome(error), drop=drop)
        self._driver.cancel(request_id, reason, seen=session.seen())

    def _fail(self, session: Session, error: HalfmoonError, outcome: Outcome, *, drop: bool) -> None:
        session.fail(error, self.clock(), drop=drop)
        self._close(session, outcome)

    def _close(self, session: Session, outcome: Outcome) -> None:
        self._wake(session)
        request_id = session.spec.request_id
        del self._sessions[request_id]
        del self._wakes[request_id]
        if session.outbox:
            self._unread.add(session)
        assert session.ended_s is not None
        first_s = session.first_token_s
        self.metrics.ended(
            outcome.value,
            ttft_s=None if first_s is None else first_s - session.arrived_s,
            total_s=session.ended_s - session.arrived_s,
            num_open=self.num_open,
        )

    def _wake(self, session: Session) -> None:
        self._wakes[session.spec.request_id].set()


def _outcome(error: HalfmoonError) -> Outcome:
    """Of a request that this side ends."""
    return Outcome.CANCELLED if isinstance(error, Cancelled | DeadlineExceeded) else Outcome.FAILED
