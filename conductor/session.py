"""Pure: one open request at the front end: its log, its text, what its client has yet to read, and its one end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from conductor.actuals import Seen, seen_of
from conductor.effects import RequestSpec
from conductor.stop_strings import StopMatcher
from conductor.streams import StreamLog, Verdict
from core.messages import Token
from halfmoon.errors import HalfmoonError
from halfmoon.types import FinishReason
from halfmoon.v1 import inference_pb2 as pb


class TextDecoder(Protocol):
    """Token ids to text, one output's worth; never half a character."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The output is complete.

    text: what was held back until now. cut: a stop string ended it, which the workers do not know.
    """

    finish_reason: FinishReason
    text: str
    cut: bool = False


class Session:
    """One accepted request, from its acceptance to its one terminal event.

    Owns the log and the outbox; holds at most max_tokens + 2 events. `finish` and `fail` are called once between them.

    Args:
        deadline_at_s: in the front end's clock.
    """

    def __init__(
        self, spec: RequestSpec, decoder: TextDecoder, *, arrived_s: float, now_s: float, deadline_at_s: float
    ) -> None:
        self.spec = spec
        self.log = StreamLog()
        self.outbox: deque[pb.GenerateEvent] = deque()
        self.arrived_s = arrived_s
        self.tokenized_s = now_s
        self.deadline_at_s = deadline_at_s
        self.tokens_s: list[float] = []  # when each token could be shown
        self.taken_s = now_s  # since when the reader could have taken the first event in the outbox
        self.error: HalfmoonError | None = None
        self.ended_s: float | None = None
        self._held: list[pb.GenerateEvent] = []  # tokens that are not shown yet
        self._decoder = decoder
        self._matcher = StopMatcher(spec.sampling.stop)
        started = pb.Started(request_id=spec.request_id, prompt_token_ids=spec.token_ids)
        self.outbox.append(pb.GenerateEvent(started=started))

    @property
    def is_open(self) -> bool:
        return self.ended_s is None

    @property
    def first_token_s(self) -> float | None:
        return self.tokens_s[0] if self.tokens_s else None

    def offer(self, token: Token, now_s: float) -> tuple[Verdict, Ending | None]:
        """Take one token from a worker; what became certain goes to the outbox. Modifies self.

        An Ending says that the output is complete: by the worker's word or by a stop string.
        """
        verdict, appended = self.log.offer(token, now_s)
        for accepted in appended:
            ending = self._take(accepted)
            if ending is not None:
                self.log.cut(accepted.index + 1)
                self._show(now_s)
                return verdict, ending
        self.release(now_s)
        return verdict, None

    @property
    def holding(self) -> bool:
        """Its first token is there and not shown yet."""
        return bool(self._held)

    def release(self, now_s: float) -> bool:
        """Show what was held back, unless it still is to be. True: there was something. Modifies self."""
        if not self._held or self.log.holds(now_s):
            return False
        self._show(now_s)
        return True

    def finish(self, finished: pb.Finished, now_s: float) -> None:
        """The terminal event of a complete output. Modifies self."""
        self._end(now_s)
        self._may_be_read(now_s)
        self.outbox.append(pb.GenerateEvent(finished=finished))

    def fail(self, error: HalfmoonError, now_s: float, *, drop: bool = False) -> None:
        """The terminal event of every other end; raised to the client after what is in the outbox.

        Args:
            drop: the reader is gone or too slow: forget what it has not read.
        """
        self._show(now_s)
        self._end(now_s)
        self.error = error
        if drop:
            self.outbox.clear()

    def forget(self, error: HalfmoonError) -> None:
        """Drop what an ended session's reader has not taken; if it ever reads on it finds `error`. Modifies self."""
        assert not self.is_open
        self.outbox.clear()
        self.error = error

    def _may_be_read(self, now_s: float) -> None:
        """What is appended now: a reader that found nothing until now has not been slow."""
        if not self.outbox:
            self.taken_s = now_s

    def seen(self) -> Seen:
        """Its times so far, for the decision record."""
        times_s = {"arrived_s": self.arrived_s, "tokenized_s": self.tokenized_s}
        return seen_of(self.tokens_s, **times_s, first_came_s=self.log.first_came_s)

    def _end(self, now_s: float) -> None:
        assert self.ended_s is None, f"{self.spec.request_id}: a second terminal event"
        self.ended_s = now_s
        self.log.close()

    def _show(self, now_s: float) -> None:
        """What was held back may be read from now on."""
        if self._held:
            self._may_be_read(now_s)
        self.tokens_s.extend([now_s] * len(self._held))
        self.outbox.extend(self._held)
        self._held.clear()

    def _take(self, token: Token) -> Ending | None:
        stopped = token.finish_reason is FinishReason.STOP
        piece = "" if stopped else self._decoder.push(token.token_id)  # a stop token is counted, not shown
        text = self._matcher.feed(piece)
        self._held.append(pb.GenerateEvent(token=self._event(token, text)))
        if self._matcher.matched:
            return Ending(finish_reason=FinishReason.STOP, text="", cut=token.finish_reason is None)
        return None if token.finish_reason is None else self._last_words(token.finish_reason)

    def _last_words(self, reason: FinishReason) -> Ending:
        tail = self._matcher.feed(self._decoder.finish())
        if self._matcher.matched:
            return Ending(finish_reason=FinishReason.STOP, text=tail)
        return Ending(finish_reason=reason, text=tail + self._matcher.flush())

    def _event(self, token: Token, text: str) -> pb.TokenEvent:
        event = pb.TokenEvent(index=token.index, token_id=token.token_id, text=text)
        if self.spec.sampling.logprobs is not None:
            event.logprob = token.logprob
            event.top_logprobs.extend(_alternatives(token))
        return event


def _alternatives(token: Token) -> Sequence[pb.AlternativeToken]:
    return [pb.AlternativeToken(token_id=t.token_id, logprob=t.logprob) for t in token.top_logprobs]
