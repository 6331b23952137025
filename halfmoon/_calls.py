"""Shell: what the two clients share of gRPC: channel options and the translation of its errors."""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple, Protocol, cast

from halfmoon.errors import DeadlineExceeded, HalfmoonError, InvalidRequest, NotFound, StatusCode, Unavailable
from halfmoon.status import DETAILS_KEY, error_from_status

ADDRESS_DEFAULT = "127.0.0.1:50051"

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


class Sent(NamedTuple):
    """A Generate call under way, and what its errors should say of it."""

    rpc: Any
    request_id: str
    address: str
    timeout_s: float


WHICH = "requests go to the client API's address (--address), an operator's calls to the admin API's (--admin)"

UNREACHABLE = ("failed to connect", "DNS resolution", "Connection refused", "No such file")
"""Words by which gRPC tells an address where nobody answers from a connection that broke."""


def error_of(
    failure: object, *, address: str = "", timeout_s: float | None = None, num_tokens: int | None = None
) -> HalfmoonError:
    """The typed exception for a grpc.RpcError.

    What gRPC itself found (no details from a server) is told by what this side knows of the call.

    Args:
        timeout_s: the call's own deadline.
        num_tokens: of a stream: how many had come.
    """
    call = cast(RpcFailure, failure)
    code: int = call.code().value[0]
    said = call.details() or call.code().name
    details = next((value for key, value in call.trailing_metadata() or () if key == DETAILS_KEY), b"")
    if not details and code == StatusCode.DEADLINE_EXCEEDED and timeout_s is not None:
        so_far = "" if num_tokens is None else f"; {num_tokens} tokens had come"
        return DeadlineExceeded(f"no end within timeout_s = {timeout_s:g} s{so_far}")
    if not details and code == StatusCode.UNAVAILABLE:
        return Unavailable(_lost(said, address, num_tokens))
    if not details and code == StatusCode.UNIMPLEMENTED:
        return NotFound(f"{address} serves another API than the one asked for ({said}): {WHICH}")
    return error_from_status(code, said, bytes(details))


def _lost(said: str, address: str, num_tokens: int | None) -> str:
    if not num_tokens and any(words in said for words in UNREACHABLE):
        return f"nobody answers at {address}: is a cluster running there? start one with: halfmoon up ({said})"
    if not num_tokens and "hostname" in said.lower():
        return f"cannot reach {address!r}: expected host:port or unix:/path ({said})"
    when = "before it answered" if num_tokens is None else f"after {num_tokens} tokens"
    return f"the conductor at {address} went away {when} ({said})"


def admin_error(failure: object, *, address: str, timeout_s: float) -> HalfmoonError:
    """As `error_of`; whoever cannot be reached at the admin API may have been looked for at the wrong place."""
    error = error_of(failure, address=address, timeout_s=timeout_s)
    return Unavailable(f"admin API: {error}; another address: --admin") if isinstance(error, Unavailable) else error


def untold(address: str) -> InvalidRequest:
    """The cluster does not say where its admin API is."""
    limit = f"the admin API's address (--admin): {address} tells it to clients on its own host only"
    return InvalidRequest(field="admin_address", value="", limit=limit)


def new_request_id() -> str:
    return f"r-{uuid.uuid4().hex}"
