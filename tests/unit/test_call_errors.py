"""What the SDK says when gRPC itself, and no server, ends a call."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from halfmoon._calls import error_of
from halfmoon.client import Client
from halfmoon.errors import DeadlineExceeded, NotFound, Unavailable


class Ended:
    """What grpc.RpcError offers."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return ()


def test_a_deadline_says_how_long_it_was_and_how_much_had_come() -> None:
    error = error_of(Ended(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"), timeout_s=2.5, num_tokens=7)
    assert type(error) is DeadlineExceeded
    assert str(error) == "no end within timeout_s = 2.5 s; 7 tokens had come"


def test_a_broken_stream_says_how_much_had_come() -> None:
    error = error_of(Ended(grpc.StatusCode.UNAVAILABLE, "Socket closed"), address="h:1", num_tokens=7)
    assert type(error) is Unavailable
    assert str(error) == "the conductor at h:1 went away after 7 tokens (Socket closed)"


def test_an_api_at_the_wrong_address_is_told_apart() -> None:
    error = error_of(Ended(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"), address="h:1")
    assert type(error) is NotFound
    assert str(error).startswith("h:1 serves another API than the one asked for (Method not found!): requests go to")


def test_what_is_no_address_cannot_be_reached() -> None:
    with Client("nonsense", timeout_s=10.0) as client:
        for call in (client.model, lambda: client.complete("Hi")):
            with pytest.raises(Unavailable, match="cannot reach 'nonsense': expected host:port or unix:/path"):
                call()


def test_where_nobody_answers_the_way_to_start_a_cluster_is_told() -> None:
    with Client("127.0.0.1:1", admin_address="127.0.0.1:2", timeout_s=10.0) as client:
        with pytest.raises(
            Unavailable, match=r"at 127.0.0.1:1: is a cluster running there\? start one with: halfmoon up"
        ):
            client.complete("Hi")
        with pytest.raises(Unavailable, match=r"admin API: nobody answers at 127.0.0.1:2: .*another address: --admin"):
            client.cluster()
