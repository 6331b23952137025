"""Shell: the clients' gRPC service: a request is validated, tokenised and named here, then it is the front end's."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from conductor import validation
from conductor.chat import ChatTokenizer, Turn, chat_token_ids
from conductor.effects import RequestSpec
from conductor.frontend import FrontEnd
from conductor.session import Session, TextDecoder
from conductor.settings import FrontEndConfig
from conductor.validation import ServedModel
from halfmoon.blocks import BlockChain, Fingerprint, root_hash
from halfmoon.errors import DeadlineExceeded, Failed, HalfmoonError
from halfmoon.types import SEED_MAX, BlockHash, RequestId, SamplingParams
from halfmoon.v1 import inference_pb2 as pb
from halfmoon.v1 import inference_pb2_grpc

OFF_LOOP_TOKENS_MIN = 1024
"""Naming the blocks of a shorter prompt takes under half a millisecond: less than the way to a thread and back."""

T = TypeVar("T")


class Tokenizer(ChatTokenizer, Protocol):
    """What this service needs of engine.tokenizer.Tokenizer; safe to use from several threads."""

    @property
    def generation_defaults(self) -> Mapping[str, float]: ...

    def stream(self, context: Sequence[int] = ()) -> TextDecoder: ...


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Generate, Cancel, GetModel, Tokenize. Handlers raise HalfmoonErrors; service/channel.py makes them statuses.

    Owns its tokenising threads: `close` releases them.

    Args:
        front_end_id: the name under which workers send this process its tokens.
        rng: for seeds of requests that name none.
        admin_address: of the operator's API, now; empty where clients are not to be told.
    """

    def __init__(
        self,
        *,
        front_end: FrontEnd,
        front_end_id: str,
        tokenizer: Tokenizer,
        model: ServedModel,
        fingerprint: Fingerprint,
        config: FrontEndConfig,
        rng: random.Random,
        admin_address: Callable[[], str] = lambda: "",
    ) -> None:
        self._front_end = front_end
        self._front_end_id = front_end_id
        self._tokenizer = tokenizer
        self._model = model
        self._fingerprint = fingerprint
        self._root = root_hash(fingerprint)
        self._config = config
        self._rng = rng
        self._admin_address = admin_address
        self._threads = ThreadPoolExecutor(config.tokenizer_threads, thread_name_prefix="tokenizer")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- Generate ----

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateEvent]:  # noqa: N802
        """Started, TokenEvents, Finished; or a status."""
        arrived_s = self._front_end.clock()
        try:
            session = await self._open(request, self._deadline_s(context), arrived_s)
        except HalfmoonError as error:
            self._front_end.refused(error, arrived_s)
            raise
        # Called however the call ends, also while this generator waits in a `yield` for a reader that has gone.
        context.add_done_callback(lambda _: self._front_end.leave(session, "the client has gone"))
        async for event in self._front_end.read(session):
            yield event

    async def _open(self, request: pb.GenerateRequest, deadline_s: float, arrived_s: float) -> Session:
        """Raises: HalfmoonError: refused, before the machine has heard of it."""
        validation.check_envelope(request, self._model)
        request_id = RequestId(request.request_id or f"s-{secrets.token_hex(16)}")
        self._front_end.reserve(request_id)
        try:
            spec = await self._spec(request, request_id, deadline_s)
            return self._front_end.start(spec, arrived_s=arrived_s)
        finally:
            self._front_end.release(request_id)

    def _deadline_s(self, context: Any) -> float:
        remaining_s = context.time_remaining()
        if remaining_s is None:
            return self._config.timeout_s_default
        if remaining_s <= 0:
            raise DeadlineExceeded("the deadline had passed on arrival")
        return float(min(remaining_s, self._config.timeout_s_max))

    async def _spec(self, request: pb.GenerateRequest, request_id: RequestId, deadline_s: float) -> RequestSpec:
        params = validation.sampling_of(request.sampling, self._model, seed=self._rng.randint(0, SEED_MAX))
        token_ids = await self._prompt_ids(request)
        validation.check_prompt(str(request.WhichOneof("input")), len(token_ids), self._model)
        sampling: SamplingParams = validation.fit_max_tokens(params, request.sampling, len(token_ids), self._model)
        return RequestSpec(
            request_id=request_id,
            token_ids=token_ids,
            block_hashes=await self._named(token_ids),
            sampling=sampling,
            front_end=self._front_end_id,
            deadline_s=deadline_s,
            slo=validation.slo_of(request),
            priority=request.priority,
        )

    async def _prompt_ids(self, request: pb.GenerateRequest) -> tuple[int, ...]:
        kind = request.WhichOneof("input")
        if kind == "prompt_token_ids":
            return tuple(request.prompt_token_ids.ids)
        if kind == "chat":
            return tuple(await self._chat_ids(request.chat))
        return tuple(await self._text_ids(request.prompt))

    async def _text_ids(self, text: str) -> list[int]:
        """With the special tokens that the checkpoint puts around a plain text (a leading BOS, mostly)."""
        return await self._off_loop(lambda: self._tokenizer.encode(text, add_special_tokens=True))

    async def _chat_ids(self, chat: pb.Chat) -> list[int]:
        turns: list[Turn] = validation.turns_of(chat)
        return await self._off_loop(lambda: chat_token_ids(turns, self._tokenizer))

    async def _named(self, token_ids: tuple[int, ...]) -> tuple[BlockHash, ...]:
        if len(token_ids) < OFF_LOOP_TOKENS_MIN:
            return self._names(token_ids)
        return await self._off_loop(lambda: self._names(token_ids))

    def _names(self, token_ids: tuple[int, ...]) -> tuple[BlockHash, ...]:
        return tuple(BlockChain(self._root, self._model.block_size).extend(token_ids))

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # ---- the smaller calls ----

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:  # noqa: N802
        found = self._front_end.cancel(RequestId(request.request_id), "cancelled by a client's call")
        return pb.CancelResponse(found=found)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        return pb.GetModelResponse(
            name=self._model.name,
            context_tokens_max=self._model.context_tokens_max,
            vocab_size=self._model.vocab_size,
            block_size=self._model.block_size,
            eos_token_ids=self._model.eos_token_ids,
            weights=self._fingerprint.weights,
            admin_address=self._admin_address(),
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        """The ids that Generate would send to the model."""
        if request.WhichOneof("input") == "chat":
            validation.check_chat(request.chat, self._model)
            return pb.TokenizeResponse(token_ids=await self._chat_ids(request.chat))
        validation.check_text("text", request.text, self._model)
        return pb.TokenizeResponse(token_ids=await self._text_ids(request.text))

    # ---- the canary ----

    async def canary(self, number: int, timeout_s: float) -> None:
        """One tiny request through prefill, transfer and decode: its prompt fills blocks that nobody has.

        A second attempt does not count: with the first one's token it would end in prefill, and never use the link.

        Raises:
            HalfmoonError: why the round trip failed.
        """
        request_id = RequestId(f"canary-{number}-{secrets.token_hex(4)}")
        token_ids = tuple(
            random.Random(request_id).choices(range(self._model.vocab_size), k=self._model.block_size + 1)
        )
        spec = RequestSpec(
            request_id=request_id,
            token_ids=token_ids,
            block_hashes=self._names(token_ids),
            sampling=SamplingParams(max_tokens=2, ignore_eos=True),
            front_end=self._front_end_id,
            deadline_s=timeout_s,
        )
        self._front_end.reserve(request_id)
        session = self._front_end.start(spec, arrived_s=self._front_end.clock())
        try:
            async for event in self._front_end.read(session):
                if event.finished.usage.attempts > 1:  # tokens came, but not by the way that was to be proved
                    raise Failed(self._front_end.last_cause(request_id))
        finally:
            self._front_end.leave(session, "the canary's patience ended")
