"""Servers and channels: addresses in use are named, and typed errors arrive with their details."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from halfmoon.errors import ConfigError, Conflict, HalfmoonError, InvalidRequest, NotFound, Rejected
from halfmoon.v1 import inference_pb2, inference_pb2_grpc
from service.channel import bind, make_channel, make_server


class Failing(inference_pb2_grpc.InferenceServicer):
    """Raises `error` from a unary call and from a stream, after one message."""

    def __init__(self, error: HalfmoonError) -> None:
        self.error = error

    async def Cancel(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise self.error

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield inference_pb2.GenerateEvent()
        raise self.error


@contextlib.asynccontextmanager
async def serving(error: HalfmoonError, address: str) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    server = make_server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Failing(error), server)
    bound = bind(server, address)
    await server.start()
    try:
        async with make_channel(bound) as channel:
            yield inference_pb2_grpc.InferenceStub(channel)
    finally:
        await server.stop(0)


def details(error: grpc.aio.AioRpcError) -> list[Any]:
    status = status_pb2.Status()
    status.ParseFromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    kinds = (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.RetryInfo,
        inference_pb2.RejectionDetail,
    )
    found = []
    for packed in status.details:
        kind = next(k for k in kinds if packed.Is(k.DESCRIPTOR))
        found.append(kind())
        packed.Unpack(found[-1])
    return found


async def drained(stub: inference_pb2_grpc.InferenceStub) -> None:
    async for _ in stub.Generate(inference_pb2.GenerateRequest()):
        pass


def failure(error: HalfmoonError, address: str, *, stream: bool = False) -> grpc.aio.AioRpcError:
    async def call() -> grpc.aio.AioRpcError:
        async with asyncio.timeout(10), serving(error, address) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (drained(stub) if stream else stub.Cancel(inference_pb2.CancelRequest()))
            return caught.value

    return asyncio.run(call())


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_field_arrives_with_its_name(tmp_path: Path, stream: bool) -> None:
    error = InvalidRequest(field="top_p", value=7, limit="a number in (0, 1]")
    got = failure(error, f"unix:{tmp_path}/s", stream=stream)
    assert got.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert got.details() == "top_p: got 7; expected a number in (0, 1]"
    info, bad = details(got)
    assert (info.domain, info.reason) == ("halfmoon", "InvalidRequest")
    assert dict(info.metadata) == {"field": "top_p", "value": "7", "limit": "a number in (0, 1]"}
    assert bad.field_violations[0].field == "top_p"


@pytest.mark.parametrize("method", ["Generate", "Cancel"])
def test_text_that_is_no_utf8_is_an_invalid_argument(tmp_path: Path, method: str) -> None:
    async def call() -> grpc.aio.AioRpcError:
        address = f"unix:{tmp_path}/s"
        async with asyncio.timeout(10), serving(NotFound("never reached"), address), make_channel(address) as channel:
            make: Any = channel.unary_stream if method == "Generate" else channel.unary_unary
            sent = make(f"/halfmoon.v1.Inference/{method}")(b"\x0a\x03a\xffb")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (sent.read() if method == "Generate" else sent)
            return caught.value

    got = asyncio.run(call())
    assert got.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert got.details() == "request_id: got b'a\\xffb'; expected text in UTF-8"


def test_a_rejection_says_what_would_be_missed_and_when_to_retry(tmp_path: Path) -> None:
    error = Rejected(reason="ttft", predicted=2.5, limit=1.0, unit="s", retry_after_s=0.75)
    got = failure(error, "127.0.0.1:0")
    assert got.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info, rejection, retry = details(got)
    assert info.reason == "Rejected"
    assert rejection == inference_pb2.RejectionDetail(
        reason="ttft", predicted=2.5, limit=1.0, unit="s", retry_after_s=0.75
    )
    assert retry.retry_delay.ToMilliseconds() == 750
    silent = Rejected(reason="quota", predicted=2, limit=1, unit="requests")
    assert len(details(failure(silent, "127.0.0.1:0"))) == 2, "no RetryInfo where nobody knows"


def test_other_errors_carry_their_class() -> None:
    got = failure(NotFound("no such model"), "127.0.0.1:0")
    assert got.code() is grpc.StatusCode.NOT_FOUND
    assert [d.reason for d in details(got)] == ["NotFound"]


def test_a_port_in_use_is_a_conflict_that_names_it() -> None:
    async def second() -> None:
        first = make_server()
        address = bind(first, "127.0.0.1:0")
        await first.start()
        with pytest.raises(Conflict, match=f"address {address} is in use"):
            bind(make_server(), address)
        await first.stop(0)

    asyncio.run(second())


def test_a_living_socket_is_not_stolen_and_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"

    async def second() -> None:
        first = make_server()
        assert bind(first, address) == address
        await first.start()
        with pytest.raises(Conflict, match="in use by another process"):
            bind(make_server(), address)
        await first.stop(0)

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/s")
    asyncio.run(second())


@pytest.mark.parametrize("address", ["198.51.100.7:0", "nonsense", "127.0.0.1:99999", "unix:/" + "x" * 200, "unix:"])
def test_an_address_that_cannot_be_had_is_a_config_error(address: str) -> None:
    async def attempt() -> None:
        with pytest.raises(ConfigError, match="config address"):
            bind(make_server(), address)

    asyncio.run(attempt())
