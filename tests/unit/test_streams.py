"""The log of emitted tokens: which of them count."""

from __future__ import annotations

import pytest

from conductor.streams import AHEAD_MAX, StreamLog, Verdict
from core.messages import AttemptStats, Token
from halfmoon.types import AttemptId, FinishReason, NodeId, RequestId


def attempt(number: int) -> AttemptId:
    return AttemptId(RequestId("r"), number)


def token(index: int, number: int = 1, reason: FinishReason | None = None, node: str = "") -> Token:
    stats = AttemptStats(node_id=NodeId(node)) if node else None
    return Token(attempt_id=attempt(number), index=index, token_id=100 + index, finish_reason=reason, stats=stats)


def begun(number: int = 1) -> StreamLog:
    log = StreamLog()
    log.begin(attempt(number))
    return log


def offer(log: StreamLog, *tokens: Token) -> list[Verdict]:
    return [log.offer(t, now_s=0.0)[0] for t in tokens]


def test_tokens_in_order_are_accepted_and_repeats_dropped() -> None:
    log = begun()
    assert offer(log, token(0), token(1), token(1), token(0)) == ["accepted", "accepted", "duplicate", "duplicate"]
    assert log.token_ids == (100, 101)


def test_an_overtaking_token_waits_for_the_one_before() -> None:
    log = begun()
    assert log.offer(token(2), 1.0) == (Verdict.AHEAD, [])
    assert log.offer(token(1), 2.0) == (Verdict.AHEAD, [])
    assert log.offer(token(1), 2.0) == (Verdict.DUPLICATE, [])
    assert log.hole_since_s == 1.0
    verdict, appended = log.offer(token(0), 3.0)
    assert (verdict, [t.index for t in appended]) == (Verdict.ACCEPTED, [0, 1, 2])
    assert log.hole_since_s is None


def test_a_hole_behind_a_filled_hole_counts_from_then() -> None:
    log = begun()
    offer(log, token(1), token(4))
    log.offer(token(0), 5.0)
    assert (log.token_ids, log.hole_since_s) == ((100, 101), 5.0)


def test_too_far_ahead_is_no_race() -> None:
    log = begun()
    verdicts = offer(log, *(token(i) for i in range(1, AHEAD_MAX + 2)))
    assert verdicts == [Verdict.AHEAD] * AHEAD_MAX + [Verdict.OVERFLOW]


def test_only_the_current_attempt_counts() -> None:
    log = StreamLog()
    assert offer(log, token(0)) == ["stale"]
    log.begin(attempt(1))
    offer(log, token(0), token(2))
    assert log.suspend() == (100,)
    assert log.hole_since_s is None
    assert offer(log, token(1)) == ["stale"]
    log.begin(attempt(2))
    assert offer(log, token(1), token(2), token(1, 2), token(2, 2)) == ["stale", "stale", "accepted", "accepted"]
    assert log.token_ids == (100, 101, 102)


def test_attempts_only_rise() -> None:
    log = begun(2)
    log.suspend()
    with pytest.raises(AssertionError, match="r#2 after attempt 2"):
        log.begin(attempt(2))


def test_nothing_follows_the_last_token() -> None:
    log = begun()
    offer(log, token(1, reason=FinishReason.STOP), token(2), token(0))
    assert (log.token_ids, log.finish_reason) == ((100, 101), FinishReason.STOP)
    assert offer(log, token(2)) == ["after_end"]


def test_stats_are_told_apart_by_where_they_ride() -> None:
    log = begun()
    offer(log, token(0, node="p"), token(1), token(2, node="d"))
    log.suspend()
    log.begin(attempt(2))
    offer(log, token(3, 2, node="q"), token(4, 2, node="e"))
    assert [s.node_id for s in log.prefill_stats] == ["p", "q"]
    assert [s.node_id for s in log.decode_stats] == ["d", "e"]


def test_a_run_of_tokens_is_as_good_as_one_by_one() -> None:
    log, twin = begun(), begun()
    offer(twin, *(token(i) for i in range(5)))
    assert log.offer_run(attempt(1), 0, [100, 101])
    assert log.offer_run(attempt(1), 2, [102, 103, 104])
    assert (log.token_ids, log.num_tokens) == (twin.token_ids, 5)


def test_a_run_that_is_not_simply_next_changes_nothing() -> None:
    log = begun()
    assert not log.offer_run(attempt(1), 1, [101])
    assert not log.offer_run(attempt(2), 0, [100])
    log.offer(token(1), 0.0)
    assert not log.offer_run(attempt(1), 0, [100])  # a token waits for this one
    assert log.token_ids == ()
    log.offer(token(0), 0.0)
    log.close()
    assert not log.offer_run(attempt(1), 2, [102])
    assert log.token_ids == (100, 101)


def test_a_first_token_is_held_until_the_second_or_the_moment() -> None:
    log = begun()
    log.hold_first(5.0)
    assert not log.holds(1.0)  # nothing to hold
    offer(log, token(0))
    assert (log.holds(4.9), log.holds(5.0)) == (True, False)
    assert log.token_ids == (100,)
    offer(log, token(1))
    assert not log.holds(1.0)


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_an_only_token_is_not_held(reason: FinishReason) -> None:
    log = begun()
    log.hold_first(5.0)
    offer(log, token(0, reason=reason))
    assert not log.holds(1.0)


def test_what_was_held_is_held_no_more_when_the_next_attempt_begins_or_the_output_has_ended() -> None:
    again, ended = begun(), begun()
    for log in (again, ended):
        log.hold_first(5.0)
        offer(log, token(0))
        assert log.holds(1.0)
    again.suspend()
    assert again.holds(1.0)
    again.begin(attempt(2))
    ended.close()
    assert (again.holds(1.0), ended.holds(1.0)) == (False, False)
