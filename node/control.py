"""Shell: the worker's gRPC face: one Control stream with the conductor, one Tokens stream with each front end.

When a control stream ends or is replaced, attempts go on until their deadlines, or until the new conductor, which
finds them in its snapshot, cancels what it does not know.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from core.messages import Attach, WorkerEvent
from halfmoon.errors import HalfmoonError, InvalidRequest, Unavailable
from halfmoon.v1 import worker_pb2, worker_pb2_grpc
from node.loop import NodeLoop
from node.streams import Outbox, Streams
from service import codec
from service.logs import fields

log = logging.getLogger("node.control")

ATTACH_S_MAX = 10.0  # a stream whose first message does not come is somebody else's


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """proto Worker over one NodeLoop. Raises HalfmoonErrors; the server's interceptor makes statuses of them."""

    def __init__(self, loop: NodeLoop, streams: Streams) -> None:
        self._loop = loop
        self._streams = streams

    async def Control(  # noqa: N802  (gRPC's name)
        self, request_iterator: AsyncIterator[Any], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Any]:
        """Raises StaleTerm, InvalidRequest (a command that is none), Unavailable (replaced, or too slow)."""
        attach = await self._first(request_iterator)
        outbox = self._loop.attach(attach)
        log.info("attached", extra=fields(conductor=attach.conductor_id, term=attach.term, peer=context.peer()))
        reader = asyncio.create_task(self._read(request_iterator, outbox), name=f"control {attach.conductor_id}")
        try:
            while True:
                for event in await outbox.take():
                    yield codec.to_wire(event)
        finally:
            reader.cancel()
            self._streams.detach(outbox)
            log.info("detached", extra=fields(conductor=attach.conductor_id, term=attach.term))

    async def Tokens(  # noqa: N802
        self, request: worker_pb2.TokensRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Any]:
        """Raises StaleTerm, InvalidRequest, Unavailable (replaced, or too slow)."""
        if not request.front_end:
            raise InvalidRequest(field="front_end", value="", limit="a front end's id")
        self._streams.check_term(request.term, f"front end {request.front_end}")
        outbox = self._streams.connect(request.front_end, context)
        await context.send_initial_metadata(())  # tells the front end that no later token can be missed
        try:
            while True:
                for step in await outbox.take():
                    yield codec.encode(step)
        finally:
            self._streams.disconnect(request.front_end, context)

    @staticmethod
    async def _first(request_iterator: AsyncIterator[Any]) -> Attach:
        try:
            async with asyncio.timeout(ATTACH_S_MAX):
                command = codec.from_wire(await anext(request_iterator))
        except (TimeoutError, StopAsyncIteration):
            raise InvalidRequest(field="kind", value=None, limit="Attach as the first command") from None
        if not isinstance(command, Attach):
            raise InvalidRequest(field="kind", value=type(command).__name__, limit="Attach as the first command")
        return command

    async def _read(self, request_iterator: AsyncIterator[Any], outbox: Outbox[WorkerEvent]) -> None:
        """Commands to the loop until the stream ends or `outbox` is closed, then close it: that ends the call."""
        try:
            async for message in request_iterator:
                if outbox.closed:
                    return  # replaced: this conductor's commands count no more
                command = codec.from_wire(message)
                if isinstance(command, Attach):
                    raise InvalidRequest(field="kind", value="Attach", limit="one Attach a stream, its first command")
                await self._loop.command(command)
            outbox.close(Unavailable("the conductor has ended the stream"))
        except HalfmoonError as error:
            log.warning("a command is refused and its stream closed: %s", error)
            outbox.close(error)
        except grpc.RpcError as error:
            outbox.close(Unavailable(f"the control stream broke: {error}"))
        finally:
            outbox.close(Unavailable("the control stream has ended"))
