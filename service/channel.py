"""Shell: gRPC servers and channels with one set of options, and HalfmoonError as gRPC status with typed details.

Addresses are "host:port" (port 0: any free one) or "unix:/path".
"""

from __future__ import annotations

import errno
import inspect
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from halfmoon.errors import ConfigError, Conflict, HalfmoonError, InvalidRequest, Rejected
from halfmoon.v1 import inference_pb2
from service.unreadable import blame

log = logging.getLogger("service.channel")

CLIENT_MESSAGE_BYTES_MAX = 8 << 20  # a prompt of 1e6 token ids is 5 MB; more is refused by length anyway
INTERNAL_MESSAGE_BYTES_MAX = 64 << 20  # the Snapshot of a worker with 1e6 blocks is 26 MB
STREAMS_PER_CONNECTION_MAX = 10_000  # one connection of a load test or of a gateway carries all its requests
KEEPALIVE_TIME_S = 10.0  # a silent peer is noticed in 15 s at the latest; load reports notice sooner
KEEPALIVE_TIMEOUT_S = 5.0
RECONNECT_BACKOFF_S_MAX = 1.0  # a restarted worker must be found again in about a second
DETAIL_CHARS_MAX = 1000  # details ride in trailing metadata, which peers cut off at 8 KiB
UNIX_PATH_BYTES_MAX = 107  # sockaddr_un
STATUS_DETAILS_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "halfmoon"

_STATUS = {code.value[0]: code for code in grpc.StatusCode}


# ---- servers and channels ------------------------------------------------------------------------------------------


def make_server(*, message_bytes_max: int = INTERNAL_MESSAGE_BYTES_MAX) -> grpc.aio.Server:
    """A server whose handlers may raise any HalfmoonError. Not bound, not started; `close` it with `server.stop`."""
    options = [
        *_common_options(message_bytes_max),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # half of what our own channels send
        ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a silent sharer
    ]
    return grpc.aio.server(interceptors=[ErrorInterceptor()], options=options)


def make_channel(address: str, *, message_bytes_max: int = INTERNAL_MESSAGE_BYTES_MAX) -> grpc.aio.Channel:
    """A channel to a node or conductor. It connects by itself and reconnects within a second; close it."""
    options = [
        *_common_options(message_bytes_max),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", int(RECONNECT_BACKOFF_S_MAX * 1000)),
        ("grpc.use_local_subchannel_pool", 1),  # its backoff and its fate are its own
        ("grpc.enable_http_proxy", 0),  # cluster traffic never goes through a proxy named in the environment
    ]
    return grpc.aio.insecure_channel(address, options=options)


def bind(server: grpc.aio.Server, address: str) -> str:
    """Let `server` listen at `address`; return the address with the real port.

    Raises:
        Conflict: another process listens there.
        ConfigError: no address to listen at.
    """
    if address.startswith("unix:"):
        _require_free_socket(address)
    else:
        _require_port(address)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise _bind_error(address) from error
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def is_local(address: str) -> bool:
    """Whether only processes of this host can reach it."""
    return address.startswith(("unix:", "127.", "localhost:", "[::1]:"))


def require_bindable(address: str) -> None:
    """Find out, before anything is started, that `host:port` could be listened at now. Holds nothing.

    Raises:
        Conflict: another process listens there.
        ConfigError: no address to listen at.
    """
    _require_port(address)
    problem = _bind_problem(address)
    if problem is not None:
        raise problem


def _common_options(message_bytes_max: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.max_send_message_length", message_bytes_max),
        ("grpc.keepalive_time_ms", int(KEEPALIVE_TIME_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _require_port(address: str) -> None:
    """gRPC would take port 99999 for 34463."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(key="address", value=address, expected="host:port, the port in [0, 65535], or unix:/path")


def _require_free_socket(address: str) -> None:
    """gRPC would unlink a living server's socket file without a word."""
    path = address.removeprefix("unix:").removeprefix("//")
    if not path or len(path.encode()) > UNIX_PATH_BYTES_MAX:
        raise ConfigError(key="address", value=address, expected=f"unix: and a path of 1-{UNIX_PATH_BYTES_MAX} bytes")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except OSError as error:
            raise ConfigError(key="address", value=address, expected=f"a usable path ({error.strerror})") from error
    raise Conflict(f"address {address} is in use by another process")


def _bind_error(address: str) -> HalfmoonError:
    """Why gRPC could not bind, which it does not say."""
    expected = "host:port or unix:/path that this process may bind"
    return _bind_problem(address) or ConfigError(key="address", value=address, expected=expected)


def _bind_problem(address: str) -> HalfmoonError | None:
    """Why host:port cannot be bound now; None: it can."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return Conflict(f"address {address} is in use by another process")
        return ConfigError(key="address", value=address, expected=f"an address of this host ({error.strerror})")
    return None


# ---- errors --------------------------------------------------------------------------------------------------------


def status_of(error: HalfmoonError) -> status_pb2.Status:
    """`error` as google.rpc.Status.

    Every status carries an ErrorInfo (domain "halfmoon", reason = the class's name, metadata = its fields as text);
    InvalidRequest also a BadRequest, Rejected also a RejectionDetail and, if a retry may help, a RetryInfo.
    """
    details = [
        error_details_pb2.ErrorInfo(domain=ERROR_DOMAIN, reason=type(error).__name__, metadata=_metadata(error)),
        *_specific_details(error),
    ]
    status = status_pb2.Status(code=int(error.status), message=str(error)[:DETAIL_CHARS_MAX])
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def abort(context: grpc.aio.ServicerContext, error: HalfmoonError) -> NoReturn:
    """End the call with `error`'s status and details."""
    status = status_of(error)
    metadata = ((STATUS_DETAILS_KEY, status.SerializeToString()),)
    await context.abort(_STATUS[status.code], status.message, trailing_metadata=metadata)
    raise AssertionError("abort returns by raising")


def _metadata(error: HalfmoonError) -> dict[str, str]:
    return {
        re.sub(r"[^a-zA-Z0-9_-]", "_", name): str(value)[:DETAIL_CHARS_MAX]
        for name, value in vars(error).items()
        if not name.startswith("_") and value is not None
    }


def _specific_details(error: HalfmoonError) -> list[Any]:
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=f"expected {error.limit}"[:DETAIL_CHARS_MAX]
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    if isinstance(error, Rejected):
        detail = inference_pb2.RejectionDetail(
            reason=error.reason, predicted=error.predicted, limit=error.limit, unit=error.unit
        )
        if error.retry_after_s is None:
            return [detail]
        detail.retry_after_s = error.retry_after_s
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        return [detail, error_details_pb2.RetryInfo(retry_delay=delay)]
    return []


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns a HalfmoonError raised by any handler into its status. Other exceptions are bugs: gRPC logs them."""

    async def intercept_service(self, continuation: Callable[..., Any], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        streams_in = "stream" if handler.request_streaming else "unary"
        streams_out = "stream" if handler.response_streaming else "unary"
        behaviour = getattr(handler, f"{streams_in}_{streams_out}")
        if not _is_async(behaviour):
            return handler  # the library's own synchronous services (reflection)
        # A streaming handler may also be a coroutine that writes to its context (the library's health service is).
        wrapped = _guarded_stream(behaviour) if inspect.isasyncgenfunction(behaviour) else _guarded(behaviour)
        make = getattr(grpc, f"{streams_in}_{streams_out}_rpc_method_handler")
        reader = handler.request_deserializer if handler.request_streaming else _blaming(handler.request_deserializer)
        return make(wrapped, reader, handler.response_serializer)


def _is_async(behaviour: Any) -> bool:
    return inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)


def _blaming(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """In place of a message that cannot be read, the InvalidRequest to end the call with: gRPC would say UNKNOWN."""

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return blame(deserialize.__self__.DESCRIPTOR, data, error)  # type: ignore[attr-defined]

    return read


def _guarded(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(request, HalfmoonError):
            await abort(context, request)
        try:
            return await behaviour(request, context)
        except HalfmoonError as error:
            await abort(context, error)

    return call


def _guarded_stream(behaviour: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        if isinstance(request, HalfmoonError):
            await abort(context, request)
        try:
            async for message in behaviour(request, context):
                yield message
        except HalfmoonError as error:
            await abort(context, error)

    return call
