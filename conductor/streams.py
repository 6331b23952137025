"""Pure: the log of one request's output: the truth about which tokens were emitted, in which order."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from core.messages import AttemptStats, Token
from halfmoon.types import AttemptId, FinishReason

AHEAD_MAX = 64
"""Tokens kept while an earlier one is on its way. The first token and the later ones come over two workers' streams,
so the second may overtake the first by a few decode steps; more than this is a hole, not a race."""


class Verdict(enum.StrEnum):
    """What became of one token that was offered."""

    ACCEPTED = "accepted"
    AHEAD = "ahead"  # kept: an earlier token is missing
    STALE = "stale"  # of an attempt that is not the current one
    DUPLICATE = "duplicate"
    AFTER_END = "after_end"
    OVERFLOW = "overflow"  # more than AHEAD_MAX ahead


class StreamLog:
    """Tokens 0, 1, 2, … of one request, whatever attempt emitted them; only the current attempt may append.

    Invariants: `token_ids[i]` is the token of index i; after a token with a finish reason nothing is accepted.
    Memory: at most max_tokens ids, and AHEAD_MAX tokens kept ahead.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._finish_reason: FinishReason | None = None
        self.attempt: AttemptId | None = None
        self.prefill_stats: list[AttemptStats] = []  # rode on an attempt's first token
        self.decode_stats: list[AttemptStats] = []  # rode on a later one
        self.hole_since_s: float | None = None
        self.closed = False
        self._last_number = -1
        self._first_index = 0
        self.hold_until_s = 0.0
        self.first_came_s: float | None = None
        self._ahead: dict[int, Token] = {}

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self._ids)

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Of the last token."""
        return self._finish_reason

    def begin(self, attempt: AttemptId) -> None:
        """From now on only this attempt's tokens count. Modifies self: what an earlier one sent ahead is forgotten."""
        assert attempt.number > self._last_number, f"{attempt} after attempt {self._last_number}"
        self.attempt = attempt
        self._last_number = attempt.number
        self._first_index = len(self._ids)
        self.hold_until_s = 0.0
        self._forget_ahead()

    def hold_first(self, until_s: float) -> None:
        """Until then this attempt's first token is not to be shown alone, if it is the output's (`holds`)."""
        self.hold_until_s = until_s

    def holds(self, now_s: float) -> bool:
        """Whether the one token that there is waits for the second before its client sees it.

        The second may be long in coming, where decode room was left for later; the client asked for short gaps.
        """
        return len(self._ids) == 1 and now_s < self.hold_until_s and self._finish_reason is None and not self.closed

    def suspend(self) -> tuple[int, ...]:
        """The current attempt is lost: nothing counts until `begin`. Returns the ids to resume after. Modifies self."""
        self.attempt = None
        self._forget_ahead()
        return self.token_ids

    def close(self) -> None:
        """The output has ended, by whichever side's word: nothing is accepted any more. Idempotent."""
        self.closed = True
        self._forget_ahead()

    def cut(self, num_tokens: int) -> None:
        """The output ended with its first `num_tokens` tokens (a stop string): forget the rest, accept no more."""
        if num_tokens < len(self._ids):
            del self._ids[num_tokens:]
            self._finish_reason = None
        self.close()

    def offer(self, token: Token, now_s: float) -> tuple[Verdict, list[Token]]:
        """Append `token` if it is the next one, with those that had overtaken it.

        Returns its verdict and the tokens that were appended, in order. Modifies self.
        """
        verdict = self._judge(token)
        if verdict is Verdict.AHEAD:
            self._ahead[token.index] = token
            self.hole_since_s = now_s if self.hole_since_s is None else self.hole_since_s
        if verdict is not Verdict.ACCEPTED:
            return verdict, []
        return verdict, self._append(token, now_s)

    def offer_run(self, attempt: AttemptId, first_index: int, token_ids: Sequence[int]) -> bool:
        """As `offer` of each of these consecutive tokens, none of them the last and none with stats.

        False: they are not simply the next ones, and nothing has changed: offer them one by one. Modifies self.
        """
        if attempt != self.attempt or self.closed or self._finish_reason is not None or self._ahead:
            return False
        if first_index != len(self._ids):
            return False
        self._ids.extend(token_ids)
        return True

    def _forget_ahead(self) -> None:
        self._ahead.clear()
        self.hole_since_s = None

    def _judge(self, token: Token) -> Verdict:
        if token.attempt_id != self.attempt:
            return Verdict.STALE
        if self.closed or self.finish_reason is not None:
            return Verdict.AFTER_END
        if token.index < len(self._ids) or token.index in self._ahead:
            return Verdict.DUPLICATE
        if token.index == len(self._ids):
            return Verdict.ACCEPTED
        return Verdict.AHEAD if len(self._ahead) < AHEAD_MAX else Verdict.OVERFLOW

    def _append(self, token: Token, now_s: float) -> list[Token]:
        appended = [token]
        while self._ahead and appended[-1].finish_reason is None and appended[-1].index + 1 in self._ahead:
            appended.append(self._ahead.pop(appended[-1].index + 1))
        if not self._ids:
            self.first_came_s = now_s
        self._ids.extend([done.token_id for done in appended])
        self._finish_reason = appended[-1].finish_reason
        for done in appended:
            if done.stats is not None:
                (self.prefill_stats if done.index == self._first_index else self.decode_stats).append(done.stats)
        self.hole_since_s = now_s if self._ahead else None
        return appended
