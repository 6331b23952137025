"""Real worker processes with the fake engine, and a conductor that does what a test tells it, over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import yaml

from core.messages import (
    Attach,
    Command,
    LoadReport,
    NodeInfo,
    PrefillCommand,
    PrefillDone,
    ReserveCommand,
    Snapshot,
    StartCommand,
    StepTokens,
    Token,
    WorkerEvent,
)
from halfmoon.types import AttemptId, RequestId, SamplingParams
from halfmoon.v1 import worker_pb2, worker_pb2_grpc
from service import codec
from service.channel import make_channel

FRONT_END = "front-end"
PATIENCE_S = 15.0  # for anything that takes milliseconds on an idle machine

Event = TypeVar("Event")


class WorkerProcess:
    """`python -m ROLE_worker.server` with the fake engine, on a unix socket in `directory`."""

    def __init__(self, role: str, name: str, directory: Path, **node: Any) -> None:
        self.name = name
        self.address = node.get("listen", f"unix:{directory}/{name}.sock")
        settings = {"node_id": name, "model": "fake", "device_blocks": 256, "dram_blocks": 64, "listen": self.address}
        self._module = f"{role}_worker.server"
        self._config = directory / f"{name}.yaml"
        self._config.write_text(yaml.safe_dump({"node": {**settings, **node}}))
        self.log = directory / f"{name}.log"
        self.states: list[str] = []

    async def start(self) -> WorkerProcess:
        """Start it and wait until it says that it is ready."""
        await self.spawn()
        async with asyncio.timeout(60):
            assert await self.until_ready(), self.log.read_text()
        return self

    async def spawn(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self._module, "--config", str(self._config),
                stdout=asyncio.subprocess.PIPE, stderr=log,
            )  # fmt: skip

    async def until_ready(self) -> bool:
        """Wait until it is ready; False: it has ended before that."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.states.append(line.decode().strip())
            if self.states[-1].startswith("ready"):
                return True
        return False

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE_S * 2):
            return await self.process.wait()

    async def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


class Conducted:
    """One worker's streams as a conductor and front end hold them. `events` and `tokens` are all that came."""

    def __init__(self, address: str, *, term: int = 1, conductor_id: str = "c") -> None:
        self.address = address
        self.events: list[WorkerEvent] = []
        self.tokens: list[Token] = []
        self.steps: list[StepTokens] = []
        self.error: grpc.aio.AioRpcError | None = None
        self._attach = Attach(conductor_id=conductor_id, term=term)
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._tasks: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Conducted:
        self._channel = make_channel(self.address)
        stub = worker_pb2_grpc.WorkerStub(self._channel)
        tokens = stub.Tokens(worker_pb2.TokensRequest(front_end=FRONT_END, term=self._attach.term))
        self._control = stub.Control()
        await self._control.write(codec.to_wire(self._attach))
        self._tasks = [
            asyncio.create_task(self._read_events()),
            asyncio.create_task(self._read(tokens, self._on_step)),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    async def send(self, command: Command) -> None:
        await self.send_raw(codec.to_wire(command))

    async def send_raw(self, message: worker_pb2.WorkerCommand) -> None:
        async with self._writing:
            await self._control.write(message)

    async def until(self, found: Callable[[], Event | None], what: str = "") -> Event:
        """Wait until `found()` is something."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while (value := found()) is None or value is False:
                    self._changed.clear()
                    await self._changed.wait()
                return value
        except TimeoutError:
            heard = [event for event in self.events if not isinstance(event, LoadReport)]
            raise AssertionError(f"{what or 'nothing'} from {self.address}; heard {heard}; {self.error}") from None

    async def event(self, kind: type[Event], attempt_id: AttemptId | None = None) -> Event:
        """The first event of this kind (of this attempt)."""

        def find() -> Event | None:
            for event in self.events:
                if isinstance(event, kind) and (attempt_id is None or getattr(event, "attempt_id", None) == attempt_id):
                    return event
            return None

        return await self.until(find, f"no {kind.__name__} of {attempt_id}")

    async def snapshot(self) -> Snapshot:
        return await self.event(Snapshot)

    async def failure(self) -> grpc.aio.AioRpcError:
        """Wait for the control stream's end."""
        return await self.until(lambda: self.error, "no error")

    async def load(self, wanted: Callable[[LoadReport], bool]) -> LoadReport:
        """Wait for a later report that is as wanted."""
        seen = len(self.events)

        def find() -> LoadReport | None:
            reports = [event for event in self.events[seen:] if isinstance(event, LoadReport)]
            return next((report for report in reports if wanted(report)), None)

        return await self.until(find, "no such load report")

    def tokens_of(self, attempt_id: AttemptId) -> list[int]:
        return [token.token_id for token in self.tokens if token.attempt_id == attempt_id]

    def _on_step(self, step: StepTokens) -> None:
        self.steps.append(step)
        self.tokens.extend(step.tokens)

    async def _read_events(self) -> None:
        self.error = await self._read(self._control, self.events.append)
        self._changed.set()

    async def _read(self, call: Any, take: Callable[[Any], None]) -> grpc.aio.AioRpcError | None:
        """Take everything until the stream's end, and say how it ended."""
        try:
            async for message in call:
                take(codec.from_wire(message))
                self._changed.set()
        except grpc.aio.AioRpcError as error:
            return error
        return None


@contextlib.asynccontextmanager
async def running(*workers: WorkerProcess) -> AsyncIterator[None]:
    """Start them at once; none is left at the end."""
    try:
        await asyncio.gather(*(worker.start() for worker in workers))
        yield
    finally:
        await asyncio.gather(*(worker.close() for worker in workers))


def attempt(name: str, number: int = 1) -> AttemptId:
    return AttemptId(RequestId(name), number)


def prefill(attempt_id: AttemptId, prompt: Sequence[int], max_tokens: int, **more: Any) -> PrefillCommand:
    return PrefillCommand(
        attempt_id=attempt_id,
        token_ids=tuple(prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=max_tokens),
        front_end=FRONT_END,
        deadline_s=30.0,
        **more,
    )


def reserve(attempt_id: AttemptId, prompt: Sequence[int], max_tokens: int, source: NodeInfo) -> ReserveCommand:
    return ReserveCommand(
        attempt_id=attempt_id,
        token_ids=tuple(prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=max_tokens),
        front_end=FRONT_END,
        source=source.node_id,
        source_epoch=source.epoch,
        source_address=source.address,
        deadline_s=30.0,
    )


async def begin(p: Conducted, d: Conducted, attempt_id: AttemptId, prompt: Sequence[int], max_tokens: int) -> None:
    """What a conductor does until decoding begins: reserve and prefill at once, then start with the first token."""
    source = (await p.snapshot()).info
    await d.send(reserve(attempt_id, prompt, max_tokens, source))
    await p.send(prefill(attempt_id, prompt, max_tokens))
    done = await p.event(PrefillDone, attempt_id)
    if done.finish_reason is None:
        await d.send(StartCommand(attempt_id=attempt_id, first_token_id=done.first_token_id))
