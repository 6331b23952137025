"""Pure: a gRPC status (code, message, details) back to the exception that the server meant."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from halfmoon.errors import (
    Cancelled,
    CheckpointError,
    Conflict,
    DeadlineExceeded,
    Failed,
    HalfmoonError,
    InvalidRequest,
    NotFound,
    Rejected,
    StatusCode,
    Unavailable,
)
from halfmoon.v1 import inference_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata in which gRPC carries a serialised google.rpc.Status."""

M = TypeVar("M", bound=Message)

_PLAIN: dict[int, type[HalfmoonError]] = {
    StatusCode.CANCELLED: Cancelled,
    StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    StatusCode.NOT_FOUND: NotFound,
    StatusCode.FAILED_PRECONDITION: CheckpointError,
    StatusCode.ABORTED: Conflict,
    StatusCode.INTERNAL: Failed,
    StatusCode.UNAVAILABLE: Unavailable,
}


class RemoteInvalidRequest(InvalidRequest):
    """An InvalidRequest with the server's own words; `limit` is its description of what was expected."""

    def __init__(self, message: str, *, field: str, value: object, limit: str) -> None:
        HalfmoonError.__init__(self, message)
        self.field = field
        self.value = value
        self.limit = limit


class RemoteRejected(Rejected):
    """A Rejected with the server's own words."""

    def __init__(self, message: str, detail: inference_pb2.RejectionDetail, retry_after_s: float | None) -> None:
        HalfmoonError.__init__(self, message)
        self.reason = detail.reason or "resource_exhausted"
        self.predicted = detail.predicted
        self.limit = detail.limit
        self.unit = detail.unit
        self.retry_after_s = retry_after_s


def error_from_status(code: int, message: str, details: bytes = b"") -> HalfmoonError:
    """The typed exception for a gRPC status number, its message and its serialised google.rpc.Status (may be empty).

    Codes outside the tree (UNKNOWN, UNIMPLEMENTED, DATA_LOSS…) become Failed with the code in the message.
    """
    status = _parse(status_pb2.RpcStatus, details)
    if code == StatusCode.INVALID_ARGUMENT:
        return _invalid(message, status)
    if code == StatusCode.RESOURCE_EXHAUSTED:
        return _rejected(message, status)
    plain = _PLAIN.get(code)
    return Failed(f"status {code}: {message}") if plain is None else plain(message)


def _invalid(message: str, status: status_pb2.RpcStatus) -> InvalidRequest:
    info = _detail(status, "google.rpc.ErrorInfo", status_pb2.RpcErrorInfo)
    violations = _detail(status, "google.rpc.BadRequest", status_pb2.RpcBadRequest).field_violations
    field = violations[0].field if violations else info.metadata.get("field", "")
    description = violations[0].description if violations else message
    return RemoteInvalidRequest(
        message,
        field=field,
        value=info.metadata.get("value"),
        limit=info.metadata.get("limit") or description,
    )


def _rejected(message: str, status: status_pb2.RpcStatus) -> Rejected:
    detail = _detail(status, "halfmoon.v1.RejectionDetail", inference_pb2.RejectionDetail)
    retry_after_s = detail.retry_after_s if detail.HasField("retry_after_s") else None
    if retry_after_s is None:
        retry = _detail(status, "google.rpc.RetryInfo", status_pb2.RpcRetryInfo)
        if retry.HasField("retry_delay"):
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return RemoteRejected(message, detail, retry_after_s)


def _detail(status: status_pb2.RpcStatus, name: str, message_class: type[M]) -> M:
    """The detail of that full name, or an empty one."""
    for packed in status.details:
        if packed.type_url.rpartition("/")[2] == name:
            return _parse(message_class, packed.value)
    return message_class()


def _parse(message_class: type[M], data: bytes) -> M:
    """Details are advice from a peer: what cannot be read is as good as absent, the code and message still count."""
    message = message_class()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return message_class()
    return message
