"""Shell: the streams between nodes: one gRPC stream per directed pair, dialled by the sink.

A stream knows how to greet, send and read; what messages mean is the store's business (`Hub`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

import grpc

from halfmoon.errors import HalfmoonError, InvalidRequest, PeerLost
from halfmoon.v1 import kv_pb2, kv_pb2_grpc
from kv_store.transfer_values import SessionId
from kv_store.wire import Begin, Envelope, Hello, Refusal, Welcome, from_wire, to_wire
from service.channel import make_channel

log = logging.getLogger("kv_store.server")

OUTBOX_MAX = 10_000
"""Messages waiting for a peer that does not read: several times what all its pulls may have open. Beyond it: lost."""
GREETING_TIMEOUT_S = 5.0

ChannelFactory = Callable[[str], grpc.aio.Channel]
_T = TypeVar("_T", bound=Envelope)


class Stream:
    """The sending side of one stream. Used from the event loop only; never blocks its caller."""

    def __init__(self) -> None:
        self._outbox: asyncio.Queue[Envelope | None] = asyncio.Queue()
        self._closed = False

    def send(self, message: Envelope) -> None:
        """Queue a message; a peer that lets OUTBOX_MAX pile up is hung up on."""
        if self._closed:
            return
        self._outbox.put_nowait(message)
        if self._outbox.qsize() > OUTBOX_MAX:
            self.close()

    def close(self) -> None:
        """End after what is queued. Idempotent."""
        if not self._closed:
            self._closed = True
            self._outbox.put_nowait(None)

    async def messages(self) -> AsyncIterator[kv_pb2.KvMessage]:
        """What is to be written, until `close`."""
        while (message := await self._outbox.get()) is not None:
            yield to_wire(message)


class Hub(Protocol):
    """What both ends of a stream ask of the store."""

    def greet(self, hello: Hello) -> Welcome | Refusal: ...

    async def accept(self, hello: Hello, begin: Begin, stream: Stream) -> SessionId | None:
        """A peer will pull from here; None: not now."""
        ...

    async def choose(self, session: SessionId, welcome: Welcome, stream: Stream) -> Begin:
        """This node will pull from a peer. Raises HalfmoonError: not from this one."""
        ...

    def on_message(self, session: SessionId, message: Envelope) -> None: ...

    def on_gone(self, session: SessionId, error: PeerLost) -> None:
        """The stream has ended, for whatever reason. Unknown sessions are ignored."""
        ...


class ExchangeServicer(kv_pb2_grpc.KvExchangeServicer):
    """The source's end: one call of `Exchange` per peer that pulls from here."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def Exchange(  # noqa: N802  (the name is gRPC's)
        self, request_iterator: AsyncIterator[kv_pb2.KvMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[kv_pb2.KvMessage]:
        stream = Stream()
        reader = asyncio.create_task(self._read(request_iterator, stream), name="kv-exchange-read")
        try:
            async for message in stream.messages():
                yield message
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(self, requests: AsyncIterator[kv_pb2.KvMessage], stream: Stream) -> None:
        session: SessionId | None = None
        why = "the stream was closed"
        try:
            session = await self._greet(requests, stream)
            if session is not None:
                async for message in requests:
                    self._hub.on_message(session, from_wire(message))
        except (HalfmoonError, grpc.RpcError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            log.warning("a peer's stream ended: %s", why)
        finally:
            stream.close()
            if session is not None:
                self._hub.on_gone(session, PeerLost(f"the sink's stream is gone: {why}"))

    async def _greet(self, requests: AsyncIterator[kv_pb2.KvMessage], stream: Stream) -> SessionId | None:
        hello = await _expect(Hello, requests)
        reply = self._hub.greet(hello)
        stream.send(reply)
        if isinstance(reply, Refusal):
            log.warning("refused %s: %s", hello.node_id, reply.reason)
            return None
        begin = await _expect(Begin, requests)
        return await self._hub.accept(hello, begin, stream)


async def dial(
    hub: Hub, session: SessionId, address: str, hello: Hello, stream: Stream, channels: ChannelFactory = make_channel
) -> None:
    """The sink's end: open a stream to `address`, greet, and read until it ends. Tells the hub how it went."""
    channel = channels(address)
    why = "the source closed it"
    try:
        stream.send(hello)
        call = kv_pb2_grpc.KvExchangeStub(channel).Exchange(stream.messages())
        await _converse(hub, session, stream, call)
    except grpc.aio.AioRpcError as error:
        why = f"{error.code().name}: {error.details()}"
    except (HalfmoonError, TimeoutError) as error:
        why = str(error) or "no greeting in time"
    finally:
        stream.close()
        await channel.close()
        hub.on_gone(session, PeerLost(f"the stream to {address} is gone: {why}"))


async def _converse(hub: Hub, session: SessionId, stream: Stream, call: Any) -> None:
    replies = aiter(call)
    welcome = await _expect(Welcome, replies)
    stream.send(await hub.choose(session, welcome, stream))
    async for message in replies:
        hub.on_message(session, from_wire(message))


async def _expect(kind: type[_T], messages: AsyncIterator[kv_pb2.KvMessage]) -> _T:
    """The next message of a greeting.

    Raises:
        TimeoutError, PeerLost: it did not come.
        InvalidRequest: it is another one. A Refusal is a PeerLost with its reason.
    """
    try:
        async with asyncio.timeout(GREETING_TIMEOUT_S):
            message = from_wire(await anext(messages))
    except StopAsyncIteration:
        raise PeerLost("the stream ended before the greeting") from None
    if isinstance(message, Refusal):
        raise PeerLost(f"refused: {message.reason}")
    if not isinstance(message, kind):
        raise InvalidRequest(field="KvMessage.kind", value=type(message).__name__, limit=kind.__name__)
    return message
