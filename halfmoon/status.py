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


def error_from_status(code: int, message: str, details: bytes = b"") -> HalfmoonError:
    """The typed exception for a gRPC status number, its message and its serialised google.rpc.Status (may be empty).

    Codes outside the tree (UNKNOWN, UNIMPLEMENTED, DATA_LOSS…) become Failed with the code in the message.
    """
    status = _parse(status_pb2.RpcStatus, details)
    if code == StatusCode.INVALID_ARGUMENT:
        return _invalid(message, status)
    if code == StatusCode.RESOURCE_EXHAUSTED:
        return _exhausted(message, status)
    plain = _PLAIN.get(code)
    return Failed(f"status {code}: {message}") if plain is None else plain(message)


def _invalid(message: str, status: status_pb2.RpcStatus) -> InvalidRequest:
    info = _detail(status, "google.rpc.ErrorInfo", status_pb2.RpcErrorInfo)
    violations = _detail(status, "google.rpc.BadRequest", status_pb2.RpcBadRequest).field_violations
    field = violations[0].field if violations else info.metadata.get("field", "")
    description = violations[0].description if violations else message
    return InvalidRequest(
        field=field,
        value=info.metadata.get("value"),
        limit=info.metadata.get("limit") or description,
        text=message,
    )


def _exhausted(message: str, status: status_pb2.RpcStatus) -> HalfmoonError:
    """gRPC itself uses this code for messages over a size limit: no admission's word, so no Rejected."""
    detail = _detail(status, "halfmoon.v1.RejectionDetail", inference_pb2.RejectionDetail)
    if detail.reason:
        return _rejected(message, detail, status)
    if "larger than max" in message:
        return InvalidRequest(field="request", value=None, limit="a smaller message", text=f"request: {message}")
    return Failed(f"resource exhausted: {message}")


def _rejected(message: str, detail: inference_pb2.RejectionDetail, status: status_pb2.RpcStatus) -> Rejected:
    retry_after_s = detail.retry_after_s if detail.HasField("retry_after_s") else None
    if retry_after_s is None:
        retry = _detail(status, "google.rpc.RetryInfo", status_pb2.RpcRetryInfo)
        if retry.HasField("retry_delay"):
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return Rejected(
        reason=detail.reason,
        predicted=detail.predicted,
        limit=detail.limit,
        unit=detail.unit,
        retry_after_s=retry_after_s,
        text=message,
    )


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
