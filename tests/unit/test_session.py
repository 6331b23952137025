"""One open request: what its client reads, and its one end."""

from __future__ import annotations

import pytest

from conductor.effects import RequestSpec
from conductor.session import Ending, Session
from core.messages import Token, TokenLogprob
from halfmoon.errors import Cancelled
from halfmoon.types import AttemptId, FinishReason, RequestId, SamplingParams
from halfmoon.v1 import inference_pb2 as pb
from tests.scripted_workers import ByteStream

ATTEMPT = AttemptId(RequestId("r"), 1)


def session(**sampling: object) -> Session:
    spec = RequestSpec(
        request_id=RequestId("r"),
        token_ids=(1, 2),
        block_hashes=(),
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        front_end="f",
        deadline_s=9.0,
    )
    it = Session(spec, ByteStream(), arrived_s=0.0, now_s=0.5, deadline_at_s=9.0)
    it.log.begin(ATTEMPT)
    return it


def token(index: int, token_id: int, reason: FinishReason | None = None) -> Token:
    top = (TokenLogprob(token_id=token_id, logprob=-0.25),)
    return Token(
        attempt_id=ATTEMPT, index=index, token_id=token_id, logprob=-0.25, top_logprobs=top, finish_reason=reason
    )


def say(it: Session, data: bytes, last: FinishReason | None = None) -> Ending | None:
    """Offer the bytes as tokens, the last one with a finish reason; the ending, if there was one."""
    for index, byte in enumerate(data):
        reason = last if index == len(data) - 1 else None
        _, ending = it.offer(token(index, byte, reason), now_s=1.0)
        if ending is not None:
            return ending
    return None


def texts(it: Session) -> list[str]:
    return [event.token.text for event in it.outbox if event.WhichOneof("kind") == "token"]


def test_it_starts_by_echoing_the_prompt() -> None:
    started = session().outbox[0].started
    assert (started.request_id, list(started.prompt_token_ids)) == ("r", [1, 2])


def test_bytes_become_whole_characters() -> None:
    it = session()
    say(it, "é🌕".encode())
    assert texts(it) == ["", "é", "", "", "", "🌕"]


def test_a_stop_string_cuts_text_and_log_and_says_that_workers_do_not_know() -> None:
    it = session(stop=("🌕.",))
    ending = say(it, "a🌕.xyz".encode())
    assert ending == Ending(finish_reason=FinishReason.STOP, text="", cut=True)
    assert texts(it) == ["a", "", "", "", "", ""]
    assert it.log.num_tokens == 6
    assert it.offer(token(6, 120), now_s=1.0)[0] == "after_end"


def test_tokens_that_overtook_the_match_are_forgotten() -> None:
    it = session(stop=("ab",))
    it.offer(token(2, ord("c")), now_s=1.0)
    it.offer(token(1, ord("b")), now_s=1.0)
    _, ending = it.offer(token(0, ord("a")), now_s=1.0)
    assert ending is not None
    assert it.log.token_ids == (97, 98)
    assert texts(it) == ["", ""]


def test_held_text_comes_with_the_end() -> None:
    it = session(stop=("abc",))
    ending = say(it, b"xab", FinishReason.LENGTH)
    assert texts(it) == ["x", "", ""]
    assert ending == Ending(finish_reason=FinishReason.LENGTH, text="ab")


def test_half_a_character_at_the_end_is_marked() -> None:
    it = session()
    assert say(it, "é".encode()[:1], FinishReason.LENGTH) == Ending(finish_reason=FinishReason.LENGTH, text="\ufffd")


def test_a_stop_token_is_counted_and_not_shown() -> None:
    it = session(stop_token_ids=(33,))
    ending = say(it, b"hi!", FinishReason.STOP)
    assert texts(it) == ["h", "i", ""]
    assert ending == Ending(finish_reason=FinishReason.STOP, text="")
    assert it.log.num_tokens == 3


def test_logprobs_only_for_those_who_ask() -> None:
    silent, asking = session(), session(logprobs=1)
    for it in (silent, asking):
        say(it, b"a")
    assert not silent.outbox[1].token.HasField("logprob")
    assert not silent.outbox[1].token.top_logprobs
    assert asking.outbox[1].token.logprob == -0.25
    assert asking.outbox[1].token.top_logprobs[0].token_id == 97


def held() -> Session:
    """Its first token came at 1 s and is held until 5 s."""
    it = session()
    it.log.hold_first(5.0)
    it.offer(token(0, 97), now_s=1.0)
    assert (texts(it), it.first_token_s) == ([], None)
    assert not it.release(4.9)
    return it


def test_a_first_token_that_is_held_comes_with_the_second() -> None:
    it = held()
    it.offer(token(1, 98), now_s=3.0)
    assert (texts(it), it.tokens_s) == (["a", "b"], [3.0, 3.0])


def test_a_first_token_is_held_for_so_long_and_no_longer() -> None:
    it = held()
    assert it.release(5.0)
    assert (texts(it), it.tokens_s) == (["a"], [5.0])
    assert not it.release(6.0)


@pytest.mark.parametrize("drop", [False, True])
def test_a_failure_shows_what_was_held(drop: bool) -> None:
    it = held()
    it.fail(Cancelled("a"), now_s=2.0, drop=drop)
    assert texts(it) == ([] if drop else ["a"])
    assert it.tokens_s == [2.0]


def test_a_stop_string_in_a_first_token_ends_at_once_though_it_were_held() -> None:
    it = session(stop=("a",))
    it.log.hold_first(5.0)
    _, ending = it.offer(token(0, 97), now_s=1.0)
    assert ending == Ending(finish_reason=FinishReason.STOP, text="", cut=True)
    assert it.tokens_s == [1.0]


def test_one_end_and_only_one() -> None:
    it = session()
    it.fail(Cancelled("a"), now_s=2.0)
    with pytest.raises(AssertionError, match="a second terminal event"):
        it.finish(pb.Finished(), now_s=3.0)
    assert it.offer(token(0, 97), now_s=3.0)[0] == "after_end"


def test_a_reader_that_is_gone_leaves_nothing() -> None:
    it = session()
    say(it, b"abc")
    it.fail(Cancelled("gone"), now_s=2.0, drop=True)
    assert not it.outbox


def test_a_reader_is_slow_from_when_there_was_something_to_read_not_from_what_it_read_last() -> None:
    it = session()
    it.outbox.clear()  # the reader has taken `started`, and waits through half a minute of queueing
    it.offer(token(0, 97), now_s=30.5)
    assert it.taken_s == 30.5
    it.offer(token(1, 98), now_s=31.5)
    assert it.taken_s == 30.5
    it.outbox.clear()
    it.finish(pb.Finished(), now_s=70.0)
    assert it.taken_s == 70.0
