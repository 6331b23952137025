"""Shell: the workers as this conductor reaches them: one channel, control stream and token stream each.

Membership says who should be dialled; the streams say who is there. A node whose control stream breaks, that lets
commands pile up, or that sends no load report for `node_silence_s` is lost at once for the machine, and is dialled
again, with backoff, for as long as it is registered. A node that leaves the registry while its streams live is kept.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc.aio

from conductor.driver import Driver
from conductor.settings import NodesConfig
from core.messages import Attach, Command, LoadReport, NodeInfo, Snapshot, StepTokens, WorkerEvent
from halfmoon.blocks import Fingerprint
from halfmoon.errors import Conflict, HalfmoonError, PeerLost, StatusCode
from halfmoon.types import Epoch, NodeId
from halfmoon.v1 import worker_pb2, worker_pb2_grpc
from service.channel import make_channel
from service.codec import from_wire, to_wire
from service.logs import fields
from service.registry import Joined, Left

log = logging.getLogger("conductor.nodes")

TokenSink = Callable[[StepTokens], None]


class NodeLink:
    """One node's epoch: dials it, serves its streams, reports its fate to the machine; again, until closed.

    Owns its channel while it is connected. `joined` is true between node_joined and node_lost.
    """

    def __init__(self, info: NodeInfo, owner: Nodes) -> None:
        self.info = info
        self.registered = True
        self.joined = False
        self.load = LoadReport()
        self.heard_s = owner.clock()
        self._owner = owner
        self._driver = owner.driver
        self._config = owner.config
        self._commands: asyncio.Queue[Command] = asyncio.Queue(owner.config.commands_max)
        self._broken = asyncio.Event()  # the outbox overflowed
        self._unreached = ""  # why it was not reached the last time; each reason is logged once

    def __str__(self) -> str:
        return f"{self.info.node_id}@{self.info.epoch}"

    async def run(self) -> None:
        """Dial and serve until cancelled, or until the node is neither registered nor reachable."""
        backoff_s = self._config.backoff_s
        while self.registered:
            started_s = self._owner.clock()
            try:
                await self._connect_and_serve()
            except HalfmoonError as error:
                self._lost(str(error), logging.WARNING)
            except asyncio.CancelledError:
                self._lost("this conductor ends its link", logging.INFO)
                raise
            if self._owner.clock() - started_s > self._config.node_silence_s:
                backoff_s = self._config.backoff_s
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, self._config.backoff_s_max)

    def send(self, command: Command) -> bool:
        """Queue a command, in order; False if this node is not joined. Overflow loses the node."""
        if not self.joined:
            return False
        try:
            self._commands.put_nowait(command)
        except asyncio.QueueFull:
            self._broken.set()
            return False
        return True

    async def _connect_and_serve(self) -> None:
        """Raises: HalfmoonError, always: why it ended."""
        channel = make_channel(self.info.address)
        try:
            stub = worker_pb2_grpc.WorkerStub(channel)
            tokens = self._open_tokens(stub)
            control = stub.Control()
            snapshot = await self._attach(control, tokens)
            self._join(snapshot)
            await _first_to_fail(
                self._read_events(control),
                self._write_commands(control),
                self._read_tokens(stub, tokens),
                self._watch_silence(),
                self._watch_overflow(),
            )
        finally:
            await channel.close()

    async def _attach(self, control: Any, tokens: Any) -> Snapshot:
        attach = Attach(conductor_id=self._owner.conductor_id, term=self._owner.term())
        try:
            async with asyncio.timeout(self._config.attach_s):
                await tokens.initial_metadata()  # the worker keeps this front end's tokens from now on
                await _write(control, attach)
                snapshot = await _read(control)
        except TimeoutError:
            raise PeerLost(f"{self}: no snapshot within {self._config.attach_s:g} s of dialling") from None
        except Conflict as error:
            self._owner.on_higher_term(_term_in(str(error)))
            raise
        self._check(snapshot)
        return snapshot

    def _check(self, snapshot: WorkerEvent) -> None:
        if not isinstance(snapshot, Snapshot):
            raise PeerLost(f"{self}: its first event was {type(snapshot).__name__}, not a Snapshot")
        if snapshot.info.epoch != self.info.epoch:
            raise PeerLost(f"{self}: at its address answers epoch {snapshot.info.epoch}")
        differences = self._owner.fingerprint.differences(snapshot.info.fingerprint)
        if differences:  # the machine lists it and does not use it
            log.error("serves another model", extra=fields(peer=self.info.node_id, differences="; ".join(differences)))

    def _join(self, snapshot: Snapshot) -> None:
        self.info = snapshot.info
        self.heard_s = self._owner.clock()
        self.load = LoadReport()
        self._commands = asyncio.Queue(self._config.commands_max)
        self._broken.clear()
        self.joined = True
        self._unreached = ""
        log.info("joined", extra=fields(peer=self.info.node_id, epoch=self.info.epoch, role=self.info.role.value))
        self._driver.node_joined(self.info)
        self._driver.worker_event(self.info.node_id, self.info.epoch, snapshot)

    def _lost(self, reason: str, level: int) -> None:
        if not self.joined:
            if reason != self._unreached and self.registered:
                log.info("not reached", extra=fields(peer=self.info.node_id, epoch=self.info.epoch, reason=reason))
            self._unreached = reason
            return
        self.joined = False
        self._owner.counters["links_lost"] += 1
        log.log(level, "lost", extra=fields(peer=self.info.node_id, epoch=self.info.epoch, reason=reason))
        self._driver.node_lost(self.info.node_id, self.info.epoch, reason)

    # ---- the streams; each of these ends only by raising ----

    async def _read_events(self, control: Any) -> None:
        while True:
            event = await _read(control)
            if isinstance(event, LoadReport):
                self.load = event
                self.heard_s = self._owner.clock()
            self._driver.worker_event(self.info.node_id, self.info.epoch, event)

    async def _write_commands(self, control: Any) -> None:
        while True:
            await _write(control, await self._commands.get())

    async def _read_tokens(self, stub: Any, call: Any) -> None:
        """Pass tokens on. A stream that breaks alone is opened again; what it may have lost is restarted."""
        while True:
            opened_s = self._owner.clock()
            reason = await self._pass_tokens(call)
            if self._owner.clock() - opened_s < self._config.backoff_s:
                raise PeerLost(f"{self}: its token stream breaks at once: {reason}")
            await asyncio.sleep(self._config.backoff_s)  # a dead node's control stream breaks meanwhile
            log.warning("token stream broke", extra=fields(peer=self.info.node_id, reason=reason))
            self._owner.counters["token_streams_broken"] += 1
            call = self._open_tokens(stub)
            self._driver.tokens_lost(self.info.node_id, self.info.epoch)

    async def _pass_tokens(self, call: Any) -> str:
        """Until the stream ends; why it did."""
        try:
            while True:
                self._owner.on_tokens(await _read(call))
        except HalfmoonError as error:
            return str(error)

    async def _watch_silence(self) -> None:
        interval_s = self._config.node_silence_s / 4
        while True:
            slept_from_s = self._owner.clock()
            await asyncio.sleep(interval_s)
            now_s = self._owner.clock()
            if now_s - slept_from_s > 2 * interval_s:
                self.heard_s = now_s  # it was this process that stood still: no reproach to the node
            if now_s - self.heard_s > self._config.node_silence_s:
                raise PeerLost(f"{self}: no load report for {now_s - self.heard_s:.1f} s")

    async def _watch_overflow(self) -> None:
        await self._broken.wait()
        raise PeerLost(f"{self}: {self._config.commands_max} commands wait unread")

    def _open_tokens(self, stub: Any) -> Any:
        request = worker_pb2.TokensRequest(front_end=self._owner.front_end, term=self._owner.term())
        return stub.Tokens(request)


class Nodes:
    """All links of this conductor, following the registry's membership (conductor.driver.Commands).

    Args:
        fingerprint: of the model served here; a worker with another one is not used.
        term: the lease's present term.
        on_tokens: where tokens go.
        on_higher_term: called with a term, higher than ours, that a worker has seen (0: it did not say which).
    """

    def __init__(
        self,
        *,
        driver: Driver,
        config: NodesConfig,
        conductor_id: str,
        front_end: str,
        fingerprint: Fingerprint,
        term: Callable[[], int],
        on_tokens: TokenSink,
        on_higher_term: Callable[[int], None],
        clock: Callable[[], float],
    ) -> None:
        self.driver = driver
        self.config = config
        self.conductor_id = conductor_id
        self.front_end = front_end
        self.fingerprint = fingerprint
        self.term = term
        self.on_tokens = on_tokens
        self.on_higher_term = on_higher_term
        self.clock = clock
        self.counters: Counter[str] = Counter()
        self.links: dict[NodeId, NodeLink] = {}
        self._tasks: dict[NodeId, asyncio.Task[None]] = {}

    async def run(self, members: AsyncIterator[Joined | Left]) -> None:
        """Follow the membership until cancelled; then every link is closed."""
        async with asyncio.TaskGroup() as group:
            async for event in members:
                if isinstance(event, Joined):
                    self._on_joined(event.info, group)
                else:
                    self._on_left(event)

    def send(self, node_id: NodeId, epoch: Epoch, command: Command) -> None:
        """Queue a command; dropped and counted if that epoch is gone."""
        link = self.links.get(node_id)
        if link is None or link.info.epoch != epoch or not link.send(command):
            self.counters["commands_dropped"] += 1

    def _on_joined(self, info: NodeInfo, group: asyncio.TaskGroup) -> None:
        link = self.links.get(info.node_id)
        if link is not None and link.info.epoch == info.epoch and not self._tasks[info.node_id].done():
            link.registered = True
            return
        if link is not None:
            self._tasks[info.node_id].cancel()  # reports the old epoch lost, if it was not yet
        self.links[info.node_id] = link = NodeLink(info, self)
        self._tasks[info.node_id] = group.create_task(link.run(), name=f"node {link}")

    def _on_left(self, event: Left) -> None:
        link = self.links.get(event.node_id)
        if link is None or link.info.epoch != event.epoch:
            return
        link.registered = False
        if not link.joined:
            self._tasks.pop(event.node_id).cancel()
            del self.links[event.node_id]


async def _read(call: Any) -> Any:
    """The next message of a stream, as a value.

    Raises:
        Conflict: a higher term has been seen. PeerLost: the stream has ended. InvalidRequest: it carries nonsense.
    """
    try:
        message = await call.read()
    except grpc.aio.AioRpcError as error:
        raise _failure(error) from error
    if message is grpc.aio.EOF:
        raise PeerLost("the stream ended")
    return from_wire(message)


async def _write(call: Any, command: Command) -> None:
    try:
        await call.write(to_wire(command))
    except grpc.aio.AioRpcError as error:
        raise _failure(error) from error
    except asyncio.InvalidStateError as error:  # the call has ended meanwhile
        raise PeerLost("the stream ended") from error


def _failure(error: grpc.aio.AioRpcError) -> HalfmoonError:
    code, text = error.code(), error.details() or ""
    if code.value[0] == StatusCode.FAILED_PRECONDITION:
        return Conflict(text)
    return PeerLost(f"{code.name}: {text}")


def _term_in(message: str) -> int:
    """The term that a worker's refusal names (node.streams.Streams.check_term)."""
    found = re.search(r"seen term (\d+)", message)
    return int(found[1]) if found else 0


async def _first_to_fail(*works: Coroutine[Any, Any, None]) -> None:
    """Run all until one fails; cancel the others; raise its error."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    done.pop().result()
