"""Shell: the client SDK: Client and AsyncClient, two thin drivers of the same request building and event folding.

    from halfmoon.client import Client

    client = Client("127.0.0.1:50051")
    for event in client.generate("The moon is", max_tokens=20):
        print(event.text, end="")

Every call has a deadline (600 s unless `timeout_s` says otherwise) and every failure is one of halfmoon.errors.
Leaving a stream early (`close`, `cancel`, the end of its `with` block) cancels the request on the server. A broken
connection ends the stream with Unavailable: the server's workers may fail behind it unseen, the connection itself is
not resumed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Unpack, cast

import grpc
import grpc.aio

from halfmoon import _calls
from halfmoon._answers import Cluster, ClusterNode, Model, cluster_of, model_of
from halfmoon._request import (
    TIMEOUT_S_DEFAULT,
    ChatInput,
    ChatSession,
    Message,
    MessageLike,
    Options,
    Prompt,
    chat_of,
    chat_request,
    message_of,
    prompt_request,
    timeout_of,
)
from halfmoon._stream import Result, ServerTimings, StreamFold, Timings, TokenEvent, Usage
from halfmoon.errors import Cancelled, HalfmoonError
from halfmoon.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "ChatSession",
    "Client",
    "Cluster",
    "ClusterNode",
    "Generation",
    "Message",
    "Model",
    "Result",
    "ServerTimings",
    "Timings",
    "TokenEvent",
    "Usage",
]


class _Stream:
    """One Generate call: what does not depend on how it is awaited."""

    def __init__(self, call: _calls.Sent, session: ChatSession[Any] | None) -> None:
        self.request_id = call.request_id
        self._call = call.rpc
        self._sent = call
        self._fold = StreamFold(time.perf_counter())
        self._session = session
        self._ended = False

    @property
    def result(self) -> Result:
        """What the whole stream amounts to.

        Raises:
            Cancelled: while the stream has not been read to its end.
        """
        if self._fold.result is None:
            raise Cancelled(f"{self.request_id}: not read to its end")
        return self._fold.result

    def cancel(self) -> None:
        """End the request, here and on the server. Idempotent; nothing happens after the end."""
        self._ended = True
        self._call.cancel()

    def __del__(self) -> None:
        if not self._ended:  # dropped in mid-stream: nobody will ever read the rest
            self._call.cancel()

    def _feed(self, event: inference_pb2.GenerateEvent) -> TokenEvent | None:
        return self._fold.feed(event, time.perf_counter())

    def _failed(self, failure: object) -> HalfmoonError:
        self._ended = True
        sent = self._sent
        return _calls.error_of(
            failure, address=sent.address, timeout_s=sent.timeout_s, num_tokens=self._fold.num_tokens
        )

    def _finish(self) -> None:
        self._ended = True
        result = self._fold.finished()
        if self._session is not None:
            self._session.record(result.text, result.token_ids)


class Generation(_Stream):
    """Iterator of TokenEvents. After its end `.result` holds everything. A context manager that cancels on the way out.

    Raises, while iterating: the typed exceptions of halfmoon.errors.
    """

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> TokenEvent:
        while not self._ended:
            try:
                event = next(self._call)
            except StopIteration:
                self._finish()
            except grpc.RpcError as failure:
                raise self._failed(failure) from failure
            else:
                token = self._feed(event)
                if token is not None:
                    return token
        raise StopIteration

    def complete(self) -> Result:
        """Read to the end."""
        for _ in self:
            pass
        return self.result

    close = _Stream.cancel

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncGeneration(_Stream):
    """Generation for asyncio: `async for`, `await complete()`, `async with`."""

    def __aiter__(self) -> AsyncGeneration:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._ended:
            try:
                event = await self._call.read()
            except grpc.aio.AioRpcError as failure:
                raise self._failed(failure) from failure
            if event is grpc.aio.EOF:
                self._finish()
                break
            token = self._feed(event)
            if token is not None:
                return token
        raise StopAsyncIteration

    async def complete(self) -> Result:
        async for _ in self:
            pass
        return self.result

    async def aclose(self) -> None:
        self.cancel()

    async def __aenter__(self) -> AsyncGeneration:
        return self

    async def __aexit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()


class _Base:
    """Addresses, channels and stubs. Owns its channels; `close` releases them.

    Args:
        address: "host:port" or "unix:path" of the conductor's client port.
        admin_address: of its admin port, for `cluster`, `drain` and `explain`; empty: as the conductor tells it, which
            it does to clients on its own host.
        timeout_s: the deadline of every call that names none.
        credentials: TLS; None: plain text.
    """

    def __init__(
        self,
        address: str = _calls.ADDRESS_DEFAULT,
        *,
        admin_address: str = "",
        timeout_s: float = TIMEOUT_S_DEFAULT,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._credentials = credentials
        self._admin_address = admin_address
        self._channel = self._dial(address)
        self._admin_channel: Any = None
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)

    def _library(self) -> Any:
        raise AssertionError("subclasses say which of grpc's Pythons they speak")

    def _dial(self, address: str) -> Any:
        library = self._library()
        if self._credentials is None:
            return library.insecure_channel(address, options=_calls.CHANNEL_OPTIONS)
        return library.secure_channel(address, self._credentials, options=_calls.CHANNEL_OPTIONS)

    def _learn(self, model: Model) -> None:
        if not model.admin_address:
            raise _calls.untold(self.address)
        self._admin_address = model.admin_address

    def _admin(self, method: str) -> Any:
        if self._admin_channel is None:
            self._admin_channel = self._dial(self._admin_address)
        return getattr(admin_pb2_grpc.AdminStub(self._admin_channel), method)

    def _generate(self, prompt: Prompt, options: Options) -> _calls.Sent:
        return self._start(prompt_request(prompt, options), options)

    def _chat(self, messages: ChatInput[Any], options: Options) -> _calls.Sent:
        turns = messages.messages if isinstance(messages, ChatSession) else [message_of(m) for m in messages]
        return self._start(chat_request(turns, options), options)

    def _start(self, request: inference_pb2.GenerateRequest, options: Options) -> _calls.Sent:
        request.request_id = request.request_id or _calls.new_request_id()
        timeout_s = timeout_of(options, self._timeout_s)
        rpc = self._stub.Generate(request, timeout=timeout_s)
        return _calls.Sent(rpc, request.request_id, self.address, timeout_s)

    def _error(self, failure: object) -> HalfmoonError:
        return _calls.error_of(failure, address=self.address, timeout_s=self._timeout_s)

    def _admin_error(self, failure: object) -> HalfmoonError:
        return _calls.admin_error(failure, address=self._admin_address, timeout_s=self._timeout_s)


class Client(_Base):
    """Blocking client; safe to share between threads (one Generation belongs to one thread)."""

    def _library(self) -> Any:
        return grpc

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Start generating from text or token ids. Nothing is raised before the first `next`, but InvalidRequest."""
        return Generation(self._generate(prompt, options), None)

    def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Result:
        return self.generate(prompt, **options).complete()

    def chat(self, messages: ChatInput[Generation], **options: Unpack[Options]) -> Generation:
        """Start the next answer. A ChatSession gains it as a turn when the stream has been read to its end."""
        return Generation(self._chat(messages, options), messages if isinstance(messages, ChatSession) else None)

    def chat_session(self, messages: Sequence[MessageLike] = ()) -> ChatSession[Generation]:
        return ChatSession(messages, start=self.chat)

    def cancel(self, request_id: str) -> bool:
        """End a request by its id; False if no such request is open."""
        return cast(bool, self._call(self._stub.Cancel, inference_pb2.CancelRequest(request_id=request_id)).found)

    def model(self) -> Model:
        return model_of(self._call(self._stub.GetModel, inference_pb2.GetModelRequest()))

    def tokenize(self, text: str) -> list[int]:
        return list(self._call(self._stub.Tokenize, inference_pb2.TokenizeRequest(text=text)).token_ids)

    def tokenize_chat(self, messages: Sequence[MessageLike]) -> list[int]:
        """The ids that `chat` would send to the model, generation prompt included."""
        request = inference_pb2.TokenizeRequest(chat=chat_of([message_of(m) for m in messages]))
        return list(self._call(self._stub.Tokenize, request).token_ids)

    def cluster(self) -> Cluster:
        """What the conductor knows of its nodes, from the admin port."""
        return cluster_of(self._call_admin("GetCluster", admin_pb2.GetClusterRequest()))

    def drain(self, node_id: str = "", *, undo: bool = False) -> None:
        """Let a node (or, unnamed, the whole cluster) take no new requests; running ones end normally."""
        self._call_admin("Drain", admin_pb2.DrainRequest(node_id=node_id, undo=undo))

    def explain(self, request_id: str) -> dict[str, Any]:
        """A request's decision record: what was known, predicted, decided and why, and what happened.

        An unambiguous beginning of the id is enough.
        """
        request = admin_pb2.ExplainRequest(request_id=request_id)
        reply = self._call_admin("Explain", request)
        return cast(dict[str, Any], json.loads(reply.record_json))

    def close(self) -> None:
        """Close the channels; open streams end with Cancelled."""
        self._channel.close()
        if self._admin_channel is not None:
            self._admin_channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _call(self, method: Any, request: object) -> Any:
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as failure:
            raise self._error(failure) from failure

    def _call_admin(self, method: str, request: object) -> Any:
        if not self._admin_address:
            self._learn(self.model())
        try:
            return self._admin(method)(request, timeout=self._timeout_s)
        except grpc.RpcError as failure:
            raise self._admin_error(failure) from failure


class AsyncClient(_Base):
    """Client for asyncio; made inside a running loop. `generate` and `chat` are plain calls that return a stream."""

    def _library(self) -> Any:
        return grpc.aio

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGeneration:
        return AsyncGeneration(self._generate(prompt, options), None)

    async def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Result:
        return await self.generate(prompt, **options).complete()

    def chat(self, messages: ChatInput[AsyncGeneration], **options: Unpack[Options]) -> AsyncGeneration:
        return AsyncGeneration(self._chat(messages, options), messages if isinstance(messages, ChatSession) else None)

    def chat_session(self, messages: Sequence[MessageLike] = ()) -> ChatSession[AsyncGeneration]:
        return ChatSession(messages, start=self.chat)

    async def cancel(self, request_id: str) -> bool:
        request = inference_pb2.CancelRequest(request_id=request_id)
        return cast(bool, (await self._call(self._stub.Cancel, request)).found)

    async def model(self) -> Model:
        return model_of(await self._call(self._stub.GetModel, inference_pb2.GetModelRequest()))

    async def tokenize(self, text: str) -> list[int]:
        return list((await self._call(self._stub.Tokenize, inference_pb2.TokenizeRequest(text=text))).token_ids)

    async def tokenize_chat(self, messages: Sequence[MessageLike]) -> list[int]:
        request = inference_pb2.TokenizeRequest(chat=chat_of([message_of(m) for m in messages]))
        return list((await self._call(self._stub.Tokenize, request)).token_ids)

    async def cluster(self) -> Cluster:
        return cluster_of(await self._call_admin("GetCluster", admin_pb2.GetClusterRequest()))

    async def drain(self, node_id: str = "", *, undo: bool = False) -> None:
        await self._call_admin("Drain", admin_pb2.DrainRequest(node_id=node_id, undo=undo))

    async def explain(self, request_id: str) -> dict[str, Any]:
        request = admin_pb2.ExplainRequest(request_id=request_id)
        reply = await self._call_admin("Explain", request)
        return cast(dict[str, Any], json.loads(reply.record_json))

    async def close(self) -> None:
        await self._channel.close()
        if self._admin_channel is not None:
            await self._admin_channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _call(self, method: Any, request: object) -> Any:
        try:
            return await method(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as failure:
            raise self._error(failure) from failure

    async def _call_admin(self, method: str, request: object) -> Any:
        if not self._admin_address:
            self._learn(await self.model())
        try:
            return await self._admin(method)(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as failure:
            raise self._admin_error(failure) from failure
