"""Workers without an engine, as real gRPC servers in this process: they follow the protocol and a script."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from core.messages import (
    Attach,
    AttemptFinished,
    AttemptStats,
    CancelCommand,
    Closed,
    DecodeJoined,
    LoadReport,
    NodeInfo,
    PrefillCommand,
    PrefillDone,
    ReserveCommand,
    Reserved,
    Snapshot,
    StartCommand,
    StepTokens,
    Token,
    TokenLogprob,
)
from halfmoon.blocks import Fingerprint
from halfmoon.types import AttemptId, Epoch, FinishReason, NodeId, Role, SamplingParams
from halfmoon.v1 import worker_pb2_grpc
from node.streams import StaleTerm
from service.channel import bind, make_server
from service.codec import from_wire, to_wire

EOS = 256
VOCAB = 300
FINGERPRINT = Fingerprint(weights="bytes", num_layers=1, num_kv_heads=1, head_dim=8, rope="none", block_size=4)


class ByteTokenizer:
    """Ids 0-255 are bytes, 256 ends the sequence, 257 opens a turn, 258 closes it (and is an end too)."""

    eos_token_ids = (EOS, 258)
    generation_defaults: dict[str, float] = {}  # noqa: RUF012

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = []
        for piece in text.replace("<|", "\0<|").replace("|>", "|>\0").split("\0"):
            ids.extend({"<|open|>": [257], "<|close|>": [258]}.get(piece, list(piece.encode())))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = "".join(f"<|open|>{m['role']}\n{m['content']}<|close|>\n" for m in messages)
        return text + ("<|open|>assistant\n" if add_generation_prompt else "")

    def stream(self, context: Sequence[int] = ()) -> ByteStream:
        return ByteStream()


class ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


Script = Callable[[Sequence[int], int], int]
"""(the client's prompt, output index) -> token id: the same on every worker, so that a resumed stream continues."""


def counting(prompt: Sequence[int], index: int) -> int:
    return 48 + (sum(prompt) + index) % 10


@dataclass
class ScriptedWorker(worker_pb2_grpc.WorkerServicer):
    """One worker. `commands` is what it was told, `step_s` the time a decode step takes."""

    name: str
    role: Role
    script: Script = counting
    step_s: float = 0.002
    epoch: str = "1"
    hold_first_token_s: float = 0.0
    mute: bool = False  # no more load reports
    term_seen: int = 0
    skip: set[int] = field(default_factory=set)  # output indices that are never sent (once each)
    fingerprint: Fingerprint = FINGERPRINT
    commands: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.address = ""
        self.attempts: dict[AttemptId, Any] = {}
        self.decoding: dict[AttemptId, asyncio.Task[None]] = {}
        self.terms: list[int] = []
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._tokens: asyncio.Queue[StepTokens] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None

    @property
    def info(self) -> NodeInfo:
        return NodeInfo(
            node_id=NodeId(self.name),
            epoch=Epoch(self.epoch),
            role=self.role,
            address=self.address,
            fingerprint=self.fingerprint,
            num_device_blocks=4096,
            num_dram_blocks=0,
            block_bytes=1024,
            tokens_per_pass_max=512,
            sequences_max=64,
        )

    async def start(self) -> None:
        self._server = make_server()
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        self.address = bind(self._server, self.address or "127.0.0.1:0")
        await self._server.start()

    async def kill(self) -> None:
        """As a crash looks from outside: streams break, nothing is said."""
        for task in self.decoding.values():
            task.cancel()
        self.attempts.clear()
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    # ---- the protocol ----

    async def Control(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        attach = from_wire(await anext(request_iterator))
        assert isinstance(attach, Attach)
        if attach.term < self.term_seen:
            raise StaleTerm(f"conductor {attach.conductor_id} has term {attach.term}; seen term {self.term_seen}")
        self.terms.append(attach.term)
        self._events = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator))
        reporter = asyncio.create_task(self._report())
        try:
            yield to_wire(Snapshot(info=self.info, last_event_id=0, blocks=(), attempts=tuple(self.attempts)))
            while True:
                yield to_wire(await self._events.get())
        finally:
            reader.cancel()
            reporter.cancel()

    async def Tokens(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        await context.send_initial_metadata(())
        while True:
            yield to_wire(await self._tokens.get())

    async def _report(self) -> None:
        while True:
            if not self.mute:
                self._events.put_nowait(LoadReport(free_device_blocks=4096, free_dram_blocks=0))
            await asyncio.sleep(0.05)

    async def _read(self, commands: Any) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.UsageError):
            async for message in commands:
                command = from_wire(message)
                self.commands.append(command)
                self._obey(command)

    def _obey(self, command: Any) -> None:
        match command:
            case PrefillCommand():
                self.attempts[command.attempt_id] = command
                self._run(command.attempt_id, self._prefill(command))
            case ReserveCommand():
                self.attempts[command.attempt_id] = command
                self._events.put_nowait(Reserved(attempt_id=command.attempt_id))
            case StartCommand():
                self._run(command.attempt_id, self._decode(self.attempts[command.attempt_id]))
            case CancelCommand():
                if self.attempts.pop(command.attempt_id, None) is not None:
                    task = self.decoding.pop(command.attempt_id, None)
                    if task is not None:
                        task.cancel()
                    self._events.put_nowait(Closed(attempt_id=command.attempt_id))

    def _run(self, attempt_id: AttemptId, work: Any) -> None:
        self.decoding[attempt_id] = asyncio.create_task(work)

    async def _prefill(self, command: PrefillCommand) -> None:
        await asyncio.sleep(self.step_s)
        stats = AttemptStats(
            node_id=NodeId(self.name), queue_s=0.25, compute_s=0.5, computed_tokens=len(command.token_ids)
        )
        first = self._token(command, 0, stats)
        if self.hold_first_token_s:
            asyncio.get_running_loop().call_later(self.hold_first_token_s, self._emit, first)
        else:
            self._emit(first)
        done = PrefillDone(
            attempt_id=command.attempt_id,
            first_token_id=first.token_id,
            stats=stats,
            finish_reason=first.finish_reason,
        )
        self._events.put_nowait(done)
        if command.decode_here and first.finish_reason is None:
            await self._decode(command)
        elif not command.decode_here:
            self.attempts.pop(command.attempt_id, None)

    async def _decode(self, command: Any) -> None:
        attempt_id = command.attempt_id
        stats = AttemptStats(
            node_id=NodeId(self.name), pulled_blocks=2, pulled_bytes=2048, link="scripted", overlap=0.5
        )
        self._events.put_nowait(DecodeJoined(attempt_id=attempt_id, stats=stats))
        offset, token = 0, None
        while token is None or token.finish_reason is None:
            await asyncio.sleep(self.step_s)
            offset += 1
            token = self._token(command, offset, None)
            token = token if token.finish_reason is None else token._replace(stats=stats)
            self._emit(token)
        finished = AttemptFinished(
            attempt_id=attempt_id, finish_reason=token.finish_reason, num_output_tokens=token.index + 1, stats=stats
        )
        self._events.put_nowait(finished)
        self.attempts.pop(attempt_id, None)

    def _emit(self, token: Token) -> None:
        if token.index in self.skip:
            self.skip.remove(token.index)
        else:
            self._tokens.put_nowait(StepTokens(tokens=(token,)))

    def _token(self, command: Any, offset: int, stats: AttemptStats | None) -> Token:
        prompt, sampling = command.token_ids[: command.num_prompt_tokens], command.sampling
        index = len(command.token_ids) - command.num_prompt_tokens + offset
        token_id = self.script(prompt, index)
        return Token(
            attempt_id=command.attempt_id,
            index=index,
            token_id=token_id,
            logprob=-0.5,
            top_logprobs=(TokenLogprob(token_id=token_id, logprob=-0.5),),
            finish_reason=_finish(token_id, index, sampling),
            stats=stats,
        )


def _finish(token_id: int, index: int, sampling: SamplingParams) -> FinishReason | None:
    if token_id in sampling.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if index + 1 == sampling.max_tokens else None


@asynccontextmanager
async def started(*workers: ScriptedWorker) -> AsyncIterator[None]:
    for worker in workers:
        await worker.start()
    try:
        yield
    finally:
        for worker in workers:
            await worker.kill()
