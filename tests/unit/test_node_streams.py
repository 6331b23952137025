"""Outboxes: bounded, one reader each; terms only rise."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from core.messages import Attach, Closed, Snapshot, StepTokens, Token
from halfmoon.errors import StaleTerm, Unavailable
from halfmoon.types import AttemptId, RequestId
from node import streams as streams_module
from node.streams import FRONT_ENDS_MAX, Outbox, Streams

ATTEMPT = AttemptId(RequestId("r"), 1)
SNAPSHOT: Snapshot = Snapshot(info=None, last_event_id=7, blocks=(), attempts=())  # type: ignore[arg-type]


def token(index: int) -> Token:
    return Token(attempt_id=ATTEMPT, index=index, token_id=index)


def attach(term: int) -> Attach:
    return Attach(conductor_id=f"c{term}", term=term)


def test_the_control_stream_begins_with_the_snapshot_and_keeps_the_order() -> None:
    streams = Streams()
    assert not streams.report(Closed(attempt_id=ATTEMPT)), "nobody listens"
    outbox = streams.attach(attach(1), SNAPSHOT)
    assert streams.report(Closed(attempt_id=ATTEMPT))
    assert asyncio.run(outbox.take()) == [SNAPSHOT, Closed(attempt_id=ATTEMPT)]


def test_a_conductor_of_an_equal_or_higher_term_replaces_and_a_lower_one_is_refused() -> None:
    streams = Streams()
    first = streams.attach(attach(2), SNAPSHOT)
    second = streams.attach(attach(2), SNAPSHOT)
    assert first.closed
    with pytest.raises(StaleTerm, match="has attached with term 2"):
        asyncio.run(first.take())
    with pytest.raises(StaleTerm, match="conductor c1 has term 1; this worker has seen term 2"):
        streams.attach(attach(1), SNAPSHOT)
    assert not second.closed
    streams.detach(first)
    assert streams.attached, "the old stream's end does not detach the new one"
    streams.detach(second)
    assert not streams.attached


def test_an_outbox_that_overflows_is_closed_and_empty() -> None:
    outbox: Outbox[int] = Outbox(2)
    assert [outbox.put(n) for n in range(4)] == [True, True, False, False]
    assert len(outbox) == 0
    with pytest.raises(Unavailable, match="fell 2 messages behind"):
        asyncio.run(outbox.take())


def test_tokens_wait_for_a_front_end_that_reconnects() -> None:
    streams = Streams()
    first = streams.connect("f", "reader 1")
    streams.emit("f", [token(0)])
    streams.disconnect("f", "reader 1")
    streams.emit("f", [token(1), token(2)])
    second = streams.connect("f", "reader 2")
    assert first.closed
    assert asyncio.run(second.take()) == [StepTokens(tokens=(token(0),)), StepTokens(tokens=(token(1), token(2)))]


def test_a_front_end_that_does_not_keep_up_loses_its_stream_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "STEPS_MAX", 3)
    streams = Streams()
    slow, quick = streams.connect("slow", "a"), streams.connect("quick", "b")
    for index in range(4):
        streams.emit("slow", [token(index)])
    streams.emit("quick", [token(0)])
    assert slow.closed
    assert streams.dropped_steps == 1
    assert asyncio.run(quick.take()) == [StepTokens(tokens=(token(0),))]


def test_front_ends_without_a_stream_are_forgotten_oldest_first() -> None:
    streams = Streams()
    streams.connect("kept", "reader")
    for number in range(FRONT_ENDS_MAX + 10):
        streams.emit(f"f{number}", [token(number)])
    assert len(streams._tokens) == FRONT_ENDS_MAX
    assert "kept" in streams._tokens
    assert "f0" not in streams._tokens


def test_flush_waits_for_readers_and_not_for_the_absent() -> None:
    async def story(read: Callable[[Outbox[StepTokens]], object]) -> float:
        streams = Streams()
        streams.emit("absent", [token(0)])
        outbox = streams.connect("f", "reader")
        streams.emit("f", [token(0)])
        asyncio.get_running_loop().call_later(0.05, read, outbox)
        started_s = asyncio.get_running_loop().time()
        await streams.flush(0.3)
        return asyncio.get_running_loop().time() - started_s

    assert asyncio.run(story(lambda outbox: outbox.close(Unavailable("gone")))) < 0.25
    assert asyncio.run(story(lambda _: None)) >= 0.3
