"""The SDK's pure parts: requests, folding, and exceptions from statuses."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest

from halfmoon._request import (
    REQUEST_BYTES_MAX,
    ChatSession,
    Message,
    chat_request,
    message_of,
    prompt_request,
    timeout_of,
)
from halfmoon._stream import StreamFold
from halfmoon.errors import (
    Cancelled,
    CheckpointError,
    Conflict,
    DeadlineExceeded,
    Failed,
    HalfmoonError,
    IntegrityError,
    InvalidRequest,
    NotFound,
    Rejected,
    Unavailable,
)
from halfmoon.status import error_from_status
from halfmoon.v1 import inference_pb2 as pb
from service.channel import status_of


def test_only_what_was_said_is_sent() -> None:
    request = prompt_request("Hi", {"temperature": 0.0, "stop": "x", "max_tokens": 3})
    assert request == pb.GenerateRequest(prompt="Hi", sampling=pb.Sampling(temperature=0.0, max_tokens=3, stop=["x"]))
    assert not request.sampling.HasField("top_p")
    assert not request.HasField("slo_ttft_s")


def test_ids_and_slos() -> None:
    request = prompt_request([1, 2], {"slo_ttft_s": 0.5, "priority": -2, "stop_token_ids": [7], "stop": ["a", "b"]})
    assert list(request.prompt_token_ids.ids) == [1, 2]
    assert (request.slo_ttft_s, request.priority) == (0.5, -2)
    assert (list(request.sampling.stop_token_ids), list(request.sampling.stop)) == ([7], ["a", "b"])


def test_an_empty_prompt_is_still_a_prompt() -> None:
    assert prompt_request("", {}).WhichOneof("input") == "prompt"
    assert prompt_request([], {}).WhichOneof("input") == "prompt_token_ids"
    assert chat_request([], {}).WhichOneof("input") == "chat"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": -1}, "top_k: got -1; expected an integer in [0, 4294967295], 0 for off"),
        ({"temperature": "hot"}, "temperature: got 'hot'; expected a finite number in [0, 100]"),
        ({"max_tokens": 2**32}, "max_tokens: got 4294967296; expected an integer in [1, 4294967295]"),
        ({"logprobs": -1}, "logprobs: got -1; expected an integer in [0, 20]"),
        ({"stop": ["a", 3]}, "stop: got 3; expected strings of 1 to 256 characters that UTF-8 can encode"),
        ({"stop_token_ids": [5, -3]}, "stop_token_ids: got -3; expected token ids: integers from 0"),
        ({"stop_token_ids": 5}, "stop_token_ids: got 5; expected token ids: integers from 0"),
        ({"seed": 2**64}, "seed: got 18446744073709551616; expected an integer in [0, 9223372036854775807]"),
        ({"seed": -1}, "seed: got -1; expected an integer in [0, 9223372036854775807]"),
        ({"model": 7}, "model: got 7; expected a text (str)"),
    ],
)
def test_what_does_not_fit_the_wire_is_named_with_its_limit(options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompt_request("Hi", options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("prompt", [b"a\xffb", bytearray(b"a"), memoryview(b"a"), None, 5, "a\ud800"])
def test_a_prompt_is_text_or_token_ids(prompt: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompt_request(prompt, {})  # type: ignore[arg-type]
    assert caught.value.field == "prompt"


def test_a_message_is_text_that_can_be_encoded() -> None:
    for content in ("a\ud800", b"a"):
        with pytest.raises(InvalidRequest) as caught:
            chat_request([Message(role="user"), Message(role="user", content=content)], {})  # type: ignore[arg-type]
        assert caught.value.field == "messages[1].content"


def test_a_request_over_the_servers_limit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompt_request("x" * (REQUEST_BYTES_MAX + 1), {})
    assert str(caught.value) == "prompt: got '8388614 bytes'; expected at most 8388608 bytes in the whole request"


def test_ill_typed_prompts_and_unknown_options_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt_token_ids"):
        prompt_request([-1], {})
    with pytest.raises(InvalidRequest, match="prompt"):
        prompt_request("\ud800", {})
    with pytest.raises(TypeError, match="unknown option 'max_token'"):
        prompt_request("Hi", {"max_token": 3})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(InvalidRequest, match="messages"):
        message_of({"role": "user", "text": "x"})


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan])
def test_every_call_has_a_deadline(timeout_s: float) -> None:
    assert timeout_of({}, 600.0) == 600.0
    assert timeout_of({"timeout_s": 2.0}, 600.0) == 2.0
    with pytest.raises(InvalidRequest, match="timeout_s"):
        timeout_of({"timeout_s": timeout_s}, 600.0)


def test_a_session_keeps_what_the_model_said_as_ids() -> None:
    session: ChatSession[None] = ChatSession([{"role": "system", "content": "s"}])
    session.user("Hi")
    session.record("Yes", (5, 6))
    assert session.messages == [
        Message(role="system", content="s"),
        Message(role="user", content="Hi"),
        Message(role="assistant", content="Yes", token_ids=(5, 6)),
    ]
    sent = chat_request(session.messages, {}).chat.messages
    assert [list(m.token_ids) for m in sent] == [[], [], [5, 6]]


def started() -> pb.GenerateEvent:
    return pb.GenerateEvent(started=pb.Started(request_id="r", prompt_token_ids=[1, 2]))


def token(index: int, text: str = "") -> pb.GenerateEvent:
    return pb.GenerateEvent(token=pb.TokenEvent(index=index, token_id=10 + index, text=text))


def finished() -> pb.GenerateEvent:
    usage = pb.Usage(prompt_tokens=2, prefix_hit_tokens_device=3, prefix_hit_tokens_dram=4, prefix_hit_tokens_remote=5)
    return pb.GenerateEvent(
        finished=pb.Finished(finish_reason="stop", text="!", usage=usage, timings=pb.Timings(ttft_s=0.5))
    )


def test_a_stream_folds_into_one_result() -> None:
    fold = StreamFold(sent_s=10.0)
    events = [fold.feed(e, now) for e, now in ((started(), 10.5), (token(0, "a"), 11.0), (token(1, "b"), 11.25))]
    assert [e.text for e in events if e is not None] == ["a", "b"]
    assert fold.result is None
    assert fold.feed(finished(), 12.0) is None
    result = fold.finished()
    assert (result.request_id, result.text, result.token_ids, result.prompt_token_ids) == ("r", "ab!", (10, 11), (1, 2))
    assert (result.timings.ttft_s, result.timings.tbt_s, result.timings.total_s) == (1.0, (0.25,), 2.0)
    assert (result.timings.server.ttft_s, result.timings.server.predicted_ttft_s) == (0.5, None)
    assert (result.usage.prefix_hit_tokens, result.usage.prompt_tokens) == (12, 2)
    assert asdict(result)["finish_reason"] == "stop"


def test_repeats_gaps_and_afterthoughts_are_never_passed_on() -> None:
    fold = StreamFold(0.0)
    fold.feed(token(0), 0.0)
    with pytest.raises(Failed, match="token 0 arrived where 1 was expected"):
        fold.feed(token(0), 0.0)
    with pytest.raises(Failed, match="token 2 arrived where 1 was expected"):
        fold.feed(token(2), 0.0)
    with pytest.raises(Failed, match="without a terminal event"):
        fold.finished()
    fold.feed(finished(), 0.0)
    with pytest.raises(Failed, match="after the terminal one"):
        fold.feed(token(1), 0.0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Unavailable("u"), Unavailable),
        (DeadlineExceeded("d"), DeadlineExceeded),
        (Cancelled("c"), Cancelled),
        (NotFound("n"), NotFound),
        (Failed("f"), Failed),
        (CheckpointError("c"), CheckpointError),
        (Conflict("c"), Conflict),
        (IntegrityError("i"), Unavailable),
    ],
)
def test_errors_come_back_as_they_went(error: HalfmoonError, expected: type[HalfmoonError]) -> None:
    status = status_of(error)
    back = error_from_status(status.code, status.message, status.SerializeToString())
    assert type(back) is expected
    assert str(back) == str(error)


def test_a_bad_field_comes_back_with_its_name_value_and_limit() -> None:
    status = status_of(InvalidRequest(field="top_p", value=7, limit="a number in (0, 1]"))
    back = error_from_status(status.code, status.message, status.SerializeToString())
    assert type(back) is InvalidRequest
    assert (back.field, back.value, back.limit) == ("top_p", "7", "a number in (0, 1]")
    assert str(back) == "top_p: got 7; expected a number in (0, 1]"


@pytest.mark.parametrize("retry_after_s", [None, 1.5])
def test_a_rejection_comes_back_with_its_numbers(retry_after_s: float | None) -> None:
    error = Rejected(reason="ttft", predicted=3.0, limit=2.0, unit="s", retry_after_s=retry_after_s)
    status = status_of(error)
    back = error_from_status(status.code, status.message, status.SerializeToString())
    assert type(back) is Rejected
    assert (back.reason, back.predicted, back.limit, back.unit) == ("ttft", 3.0, 2.0, "s")
    assert back.retry_after_s == retry_after_s
    assert str(back) == str(error)


def test_a_status_without_or_with_broken_details_is_still_typed() -> None:
    assert str(error_from_status(8, "threads")) == "resource exhausted: threads"
    too_large = error_from_status(8, "Received message larger than max (9 vs. 8)")
    assert type(too_large) is InvalidRequest
    assert str(too_large) == "request: Received message larger than max (9 vs. 8)"
    assert isinstance(error_from_status(3, "bad", b"\xff\xff"), InvalidRequest)
    assert str(error_from_status(2, "boom")) == "status 2: boom"
