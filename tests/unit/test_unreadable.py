"""Requests that protobuf cannot read are refused by the name of the field to blame."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError

from halfmoon.errors import InvalidRequest
from halfmoon.v1 import inference_pb2 as pb
from service.unreadable import blame

BAD = b"a\xffb"


def blamed(data: bytes) -> InvalidRequest:
    with pytest.raises(DecodeError) as caught:
        pb.GenerateRequest.FromString(data)
    return blame(pb.GenerateRequest.DESCRIPTOR, data, caught.value)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(prompt="a#b"), "prompt"),
        (pb.GenerateRequest(model="a#b", prompt="a#b"), "model"),
        (pb.GenerateRequest(sampling=pb.Sampling(stop=["x", "a#b"])), "stop[1]"),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(content="x"), pb.ChatMessage(content="a#b")])),
            "messages[1].content",
        ),
    ],
)
def test_the_field_that_is_no_text_is_named(request_: pb.GenerateRequest, field: str) -> None:
    error = blamed(request_.SerializeToString().replace(b"a#b", BAD))
    assert (error.field, error.value, error.limit) == (field, BAD, "text in UTF-8")


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x1a\x7f", b"\x32\x02\x08"])
def test_what_is_no_message_at_all_is_said(data: bytes) -> None:
    error = blamed(data)
    assert (error.field, error.value) == ("request", data)
