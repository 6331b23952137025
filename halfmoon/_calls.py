"""Shell: what the two clients share of gRPC: channel options and the translation of its errors."""

from __future__ import annotations

import uuid
from typing import Any, Protocol, cast

from halfmoon.errors import HalfmoonError
from halfmoon.status import DETAILS_KEY, error_from_status

ADDRESS_DEFAULT = "127.0.0.1:50051"
ADMIN_ADDRESS_DEFAULT = "127.0.0.1:50052"

MESSAGE_BYTES_MAX = 16 * 2**20
"""A prompt of a million token ids is under 4 MiB; the Started event echoes it."""

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
]


class RpcFailure(Protocol):
    """What grpc.RpcError offers when a call has ended, in both of grpc's Pythons."""

    def code(self) -> Any: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def error_of(failure: object) -> HalfmoonError:
    """The typed exception for a grpc.RpcError."""
    call = cast(RpcFailure, failure)
    code: int = call.code().value[0]
    details = next((value for key, value in call.trailing_metadata() or () if key == DETAILS_KEY), b"")
    return error_from_status(code, call.details() or call.code().name, bytes(details))


def new_request_id() -> str:
    return f"r-{uuid.uuid4().hex}"
