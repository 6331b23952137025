"""Shell: the block store of a node: performs Moves between its tiers and transfers with its peers.

All calls come from the node's event loop and all callbacks run on it. Bytes are moved in threads: one mover, one for
checksums, one per pair and direction. What may be read or written when is the transfer machine's decision.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from core.messages import TransferSample
from halfmoon.blocks import Fingerprint
from halfmoon.errors import ConfigError, PeerLost, TransferError
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, Tier, TransferId
from halfmoon.v1 import kv_pb2_grpc
from kv_store import transfer_values as tv
from kv_store.arena import Arena
from kv_store.arena_shared import SharedArena
from kv_store.checksum import checksum
from kv_store.link_memory import MemoryNet
from kv_store.pairing import Pairing, SinkEnd, SourceEnd, close_links, links_of, load_links
from kv_store.server import ChannelFactory, ExchangeServicer, Stream, dial
from kv_store.transfer import TransferMachine
from kv_store.transfer_attempts import Tail
from kv_store.transfer_values import CopyPins, SessionId, TransferLimits
from kv_store.values import Move, Place, PullEnded, PullSpec
from kv_store.wire import Begin, Envelope, Hello, Refusal, Rendezvous, Welcome
from service.channel import make_channel

log = logging.getLogger("kv_store.store")

SAMPLES_MAX = 1024
"""Pulls between two load reports; older samples are dropped, the newest tell the bandwidth."""
CLOSE_TIMEOUT_S = 10.0
"""A running batch is interrupted, or ends when nothing of it moves: `close` waits no longer than that, with slack."""


@dataclass(kw_only=True)
class _Pair:
    """One session's stream, link end and thread. The thread starts with its first job."""

    stream: Stream
    end: SinkEnd | SourceEnd | None = None
    task: asyncio.Task[None] | None = None
    thread: ThreadPoolExecutor | None = None
    num_jobs: int = 0
    closing: bool = False


class BlockStore:
    """See the module's docstring.

    Args:
        cache: its ready copies are pinned while granted.
        arenas: by tier; DEVICE is where pulls write. Borrowed: close them after the store.
        link: "auto", "shm", "torch" or "memory".
        on_arrived, on_ended, on_handed_over, on_withdrawn: see node.effects.WorkerMachine.
        verify: compare checksums of everything that is pulled.
        host: where the data connections of process groups listen.
        net: the wires of in-process links.

    Raises:
        ConfigError: an unknown link, or tiers whose blocks differ in size.
    """

    def __init__(
        self,
        *,
        node_id: NodeId,
        epoch: Epoch,
        cache: CopyPins,
        arenas: Mapping[Tier, Arena],
        link: str,
        fingerprint: Fingerprint,
        on_arrived: Callable[[TransferId, Sequence[int]], None],
        on_ended: Callable[[PullEnded], None],
        on_handed_over: Callable[[AttemptId], None],
        on_withdrawn: Callable[[AttemptId], None],
        clock: Callable[[], float],
        verify: bool = True,
        limits: TransferLimits | None = None,
        host: str = "127.0.0.1",
        net: MemoryNet | None = None,
        channels: ChannelFactory = make_channel,
    ) -> None:
        sizes = {arena.block_bytes for arena in arenas.values()}
        if Tier.DEVICE not in arenas or len(sizes) != 1:
            raise ConfigError(key="arenas", value=sorted(sizes), expected="a DEVICE arena and one block size")
        self._pairing = Pairing(
            node_id=node_id, epoch=epoch, arenas=arenas, link=link, fingerprint=fingerprint, host=host, net=net
        )
        self._machine = TransferMachine(block_bytes=sizes.pop(), pins=cache, verify=verify, limits=limits)
        self._arenas = dict(arenas)
        self._link = link
        self._clock = clock
        self._channels = channels
        self._on_arrived, self._on_ended = on_arrived, on_ended
        self._on_handed_over, self._on_withdrawn = on_handed_over, on_withdrawn
        self._pairs: dict[SessionId, _Pair] = {}
        self._samples: deque[TransferSample] = deque(maxlen=SAMPLES_MAX)
        self._effects: deque[tv.Effect] = deque()
        self._performing = False
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="kv-move")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="kv-hash")
        self._num_hashing = 0
        self._num_moving = 0
        self._idle = asyncio.Event()
        self.servicer = ExchangeServicer(self)
        self._performers: dict[type, Callable[[Any], None]] = {
            tv.Dial: self._dial,
            tv.Hangup: lambda e: self._hang_up(e.session),
            tv.Tell: self._tell,
            tv.Receive: self._receive,
            tv.Transmit: self._transmit,
            tv.Hash: self._hash,
            tv.Stamp: lambda e: self._arenas[e.tier].stamp(e.slot, e.stamp),
            tv.Arrived: lambda e: self._on_arrived(e.transfer_id, e.indices),
            tv.Ended: self._ended,
            tv.HandedOver: lambda e: self._on_handed_over(e.attempt_id),
            tv.Withdrawn: lambda e: self._on_withdrawn(e.attempt_id),
        }

    # ---- life ----

    async def start(self) -> None:
        """Remember the loop that everything runs on; load a link that is slow to load before any peer waits for it."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(load_links, (self._link,))

    def add_to_server(self, server: grpc.aio.Server) -> None:
        kv_pb2_grpc.add_KvExchangeServicer_to_server(self.servicer, server)

    async def close(self) -> None:
        """Hang up on everybody and wait, bounded, until no thread touches an arena. Running pulls end with PeerLost."""
        for session in list(self._pairs):
            self._lose(session, PeerLost("this node's block store was closed"))
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while not self._quiet():
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            log.error("closed with %d pairs and %d copies still running", len(self._pairs), self._num_moving)
        self._mover.shutdown(wait=False)
        self._hasher.shutdown(wait=False)

    # ---- the node's loop ----

    def start_pull(self, spec: PullSpec) -> None:
        self._perform(self._machine.start_pull(spec, self._clock()))

    def abort_pull(self, transfer_id: TransferId, reason: str) -> None:
        self._perform(self._machine.abort_pull(transfer_id, reason, self._clock()))

    def on_ready(self, hashes: Sequence[BlockHash]) -> None:
        """These blocks were just committed: pulls that wait for them are granted them."""
        self._perform(self._machine.on_ready(hashes, self._clock()))

    def hand_over(self, attempt_id: AttemptId, tail_index: int, tail_slot: int, tail_tokens: int) -> None:
        tail = Tail(index=tail_index, slot=tail_slot, num_tokens=tail_tokens)
        self._perform(self._machine.hand_over(attempt_id, tail, self._clock()))

    def withdraw(self, attempt_id: AttemptId) -> None:
        self._perform(self._machine.withdraw(attempt_id, self._clock()))

    def tick(self) -> None:
        """Deadlines and signs of life. To be called at least every 100 ms."""
        self._perform(self._machine.on_tick(self._clock()))

    async def perform(self, moves: Sequence[Move]) -> None:
        """Copy blocks between tiers, in order; returns when the bytes are there. Never two calls at a time."""
        if not moves:
            return
        self._num_moving += 1
        try:
            await self._loop.run_in_executor(self._mover, self._move, tuple(moves))
        finally:
            self._num_moving -= 1
            self._idle.set()

    def samples(self) -> list[TransferSample]:
        """One per pull that brought bytes since the last call; `seconds`: see transfer_values.Ended."""
        samples = list(self._samples)
        self._samples.clear()
        return samples

    def quiescent(self) -> bool:
        """Nothing is pulled here or from here, and no thread touches an arena."""
        return self._machine.quiescent and not self._busy()

    def counts(self) -> Counter[str]:
        """Events by name since the start: pulls by how they ended, refusals, strays."""
        return self._machine.counts()

    def check_invariants(self) -> None:
        self._machine.check_invariants()

    # ---- streams (server.Hub) ----

    def greet(self, hello: Hello) -> Welcome | Refusal:
        return self._pairing.greet(hello)

    async def accept(self, hello: Hello, begin: Begin, stream: Stream) -> SessionId | None:
        await self._loop.run_in_executor(None, load_links, [name for _, name in begin.links])
        session = self._machine.next_session()
        end = self._pairing.source_end(hello, begin, partial(self._publish, stream))
        self._pairs[session] = _Pair(stream=stream, end=end)
        self._perform(self._machine.on_accepted(session, hello.node_id, hello.epoch, self._clock()))
        return session if session in self._pairs else None

    async def choose(self, session: SessionId, welcome: Welcome, stream: Stream) -> Begin:
        if (reason := self._pairing.mismatch(welcome)) is not None:
            raise PeerLost(reason)
        mapped = await self._loop.run_in_executor(None, self._pairing.map_peer, welcome)
        traits = self._pairing.choose(welcome, mapped)
        names = {tier: chosen.name for tier, chosen in traits.items()}
        await self._loop.run_in_executor(None, load_links, list(names.values()))
        end = self._pairing.sink_end(welcome, traits, mapped, partial(self._publish, stream))
        pair = self._pairs.get(session)
        if pair is None or pair.closing:
            close_links(end)
            raise PeerLost("given up during the greeting")
        pair.end = end
        log.info("pulling from %s over %s", welcome.node_id, ", ".join(f"{t.name}: {n}" for t, n in names.items()))
        self._loop.call_soon(self._opened, session, end)  # after Begin has been queued
        return Begin(links=tuple(names.items()))

    def on_message(self, session: SessionId, message: Envelope) -> None:
        pair = self._pairs.get(session)
        if pair is None or pair.closing:
            return
        if isinstance(message, Rendezvous):
            if pair.end is not None and pair.end.deliver is not None:
                pair.end.deliver(message)
        elif isinstance(message, tv.Message):
            self._perform(self._machine.on_message(session, message, self._clock()))

    def on_gone(self, session: SessionId, error: PeerLost) -> None:
        if session in self._pairs:
            self._lose(session, error)

    # ---- effects ----

    def _perform(self, effects: Sequence[tv.Effect]) -> None:
        """In order; what a callback causes comes after what is being performed."""
        self._effects.extend(effects)
        if self._performing:
            return
        self._performing = True
        try:
            while self._effects:
                effect = self._effects.popleft()
                self._performers[type(effect)](effect)
        finally:
            self._performing = False

    def _dial(self, effect: tv.Dial) -> None:
        pair = self._pairs[effect.session] = _Pair(stream=Stream())
        hello = self._pairing.hello(effect.epoch)
        conversation = dial(self, effect.session, effect.address, hello, pair.stream, self._channels)
        pair.task = self._loop.create_task(conversation, name=f"kv-dial-{effect.node_id}")

    def _opened(self, session: SessionId, end: SinkEnd) -> None:
        self._perform(self._machine.on_open(session, end.traits, self._clock()))

    def _tell(self, effect: tv.Tell) -> None:
        if effect.session in self._pairs:
            self._pairs[effect.session].stream.send(effect.message)

    def _ended(self, effect: tv.Ended) -> None:
        ended = effect.ended
        if ended.num_bytes and effect.busy_s > 0.0:
            self._samples.append(
                TransferSample(source=effect.source, link=ended.link, num_bytes=ended.num_bytes, seconds=effect.busy_s)
            )
        self._on_ended(ended)

    # ---- jobs ----

    def _receive(self, effect: tv.Receive) -> None:
        answer = partial(self._machine.on_received, effect.batch.batch)
        pair = self._pairs.get(effect.session)
        if pair is None or pair.closing or not isinstance(pair.end, SinkEnd):
            self._answer(answer, PeerLost(f"{effect.batch.transfer_id}: the stream is gone"))
            return
        link = pair.end.links[effect.batch.tier]
        self._run_job(effect.session, pair, partial(link.recv, effect.batch, effect.timeout_s, effect.stall_s), answer)

    def _transmit(self, effect: tv.Transmit) -> None:
        answer = partial(self._machine.on_transmitted, effect.session, effect.batch.batch)
        pair = self._pairs.get(effect.session)
        link = pair.end.links.get(effect.batch.tier) if pair is not None and isinstance(pair.end, SourceEnd) else None
        if pair is None or pair.closing or link is None:
            self._answer(answer, PeerLost(f"{effect.batch.transfer_id}: there is no link to send on"))
            return
        self._run_job(effect.session, pair, partial(link.send, effect.batch, effect.timeout_s, effect.stall_s), answer)

    def _run_job(
        self, session: SessionId, pair: _Pair, job: Callable[[], None], answer: Callable[..., list[tv.Effect]]
    ) -> None:
        if pair.thread is None:
            pair.thread = ThreadPoolExecutor(1, thread_name_prefix=f"kv-link-{session}")
        pair.num_jobs += 1
        future = self._loop.run_in_executor(pair.thread, job)
        future.add_done_callback(partial(self._job_done, session, pair, answer))

    def _job_done(
        self, session: SessionId, pair: _Pair, answer: Callable[..., list[tv.Effect]], future: asyncio.Future[None]
    ) -> None:
        pair.num_jobs -= 1
        self._answer(answer, self._error_of(future))
        if pair.closing:
            self._close_pair(session, pair)

    def _error_of(self, future: asyncio.Future[Any]) -> TransferError | None:
        """A job's error. One that is a bug is reported as such too, and still ends the transfer."""
        error = future.exception()
        if error is None:
            return None
        if isinstance(error, TransferError):
            return error.with_traceback(None)  # its frames would keep the link's memory alive
        self._loop.call_exception_handler({"message": "a link's job failed", "exception": error, "future": future})
        return TransferError(f"{type(error).__name__}: {error}")

    def _answer(self, answer: Callable[..., list[tv.Effect]], error: TransferError | None) -> None:
        self._perform(answer(error, self._clock()))

    def _hash(self, effect: tv.Hash) -> None:
        self._num_hashing += 1
        future = self._loop.run_in_executor(self._hasher, self._checksums, effect.items)
        future.add_done_callback(partial(self._hashed, effect))

    def _hashed(self, effect: tv.Hash, future: asyncio.Future[dict[int, int]]) -> None:
        self._num_hashing -= 1
        now_s = self._clock()
        self._perform(self._machine.on_hashed(effect.session, effect.transfer_id, future.result(), now_s))
        self._idle.set()

    def _checksums(self, items: Sequence[tuple[int, Tier, int]]) -> dict[int, int]:
        return {index: checksum(self._arenas[tier].bytes_of(slot)) for index, tier, slot in items}

    def _move(self, moves: Sequence[Move]) -> None:
        for move in moves:
            self._move_one(move.source, move.target)

    def _move_one(self, source: Place, target: Place) -> None:
        assert self._arenas[target.tier].stamp_of(target.slot) == 0, f"{target} is granted to a peer"
        out_of, into = self._arenas[source.tier], self._arenas[target.tier]
        if isinstance(into, SharedArena):
            out_of.copy_out(source.slot, into.slot(target.slot))
        else:
            into.copy_in(target.slot, out_of.bytes_of(source.slot))

    # ---- ends of pairs ----

    def _publish(self, stream: Stream, entry: Rendezvous) -> None:
        """From a link's thread."""
        self._loop.call_soon_threadsafe(stream.send, entry)

    def _lose(self, session: SessionId, error: TransferError) -> None:
        """Close first, tell the machine then: it may count on the link taking no new work."""
        self._hang_up(session)
        self._perform(self._machine.on_lost(session, error, self._clock()))

    def _hang_up(self, session: SessionId) -> None:
        pair = self._pairs.get(session)
        if pair is None or pair.closing:
            return
        pair.closing = True
        pair.stream.close()
        if pair.task is not None and pair.task is not asyncio.current_task():
            pair.task.cancel()
        for link in links_of(pair.end):
            link.interrupt()
        self._close_pair(session, pair)

    def _close_pair(self, session: SessionId, pair: _Pair) -> None:
        """Once no job runs: destroy the link."""
        if pair.num_jobs == 0 and self._pairs.get(session) is pair:
            close_links(pair.end)
            if pair.thread is not None:
                pair.thread.shutdown(wait=False)
            del self._pairs[session]
            self._idle.set()

    def _busy(self) -> bool:
        return bool(self._num_hashing or self._num_moving or any(pair.num_jobs for pair in self._pairs.values()))

    def _quiet(self) -> bool:
        return not self._pairs and not self._busy()
