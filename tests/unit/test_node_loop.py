"""The loop with a scripted machine: what it does in which order, and that the inbox never waits for the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from core.messages import (
    Attach,
    BlockCopy,
    CancelCommand,
    Closed,
    Command,
    DrainCommand,
    KvEvents,
    LoadReport,
    NodeInfo,
    Snapshot,
    SnapshotCommand,
    StepTokens,
    Token,
    TransferSample,
    WorkerEvent,
)
from engine.protocol import Sampled, Slice
from halfmoon.blocks import Fingerprint
from halfmoon.errors import IntegrityError
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, RequestId, Role, Tier, TransferId
from kv_store.tiers import KvCache
from kv_store.values import Move, PullEnded
from node.effects import AbortPull, Effect, Emit, HandOver, Pass, Report, StartPull, Withdraw
from node.loop import Inbox, LoopConfig, NodeLoop
from node.streams import Outbox, Streams

ATTEMPT = AttemptId(RequestId("r"), 1)
NAME = BlockHash(b"n" * 16)
PASS = Pass(attempts=(ATTEMPT,), slices=(Slice(token_ids=(1, 2), start=0, slots=(0,)),))
INFO = NodeInfo(
    node_id=NodeId("p0"),
    epoch=Epoch("e"),
    role=Role.PREFILL,
    address="unix:/x",
    fingerprint=Fingerprint(weights="w", num_layers=1, num_kv_heads=1, head_dim=8, rope="none"),
    num_device_blocks=4,
    num_dram_blocks=4,
    block_bytes=64,
    tokens_per_pass_max=8,
    sequences_max=2,
)


def token(index: int) -> Token:
    return Token(attempt_id=ATTEMPT, index=index, token_id=index)


class ScriptedMachine:
    """Says what it is told to say, and writes down what it was told."""

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self.heard: list[Any] = []
        self.passes: list[Pass] = []
        self.on: dict[str, Callable[[], list[Effect]]] = {}
        self.running: tuple[AttemptId, ...] = ()

    def _hear(self, name: str, *what: Any) -> list[Effect]:
        self.heard.append((name, *what))
        return self.on.get(name, list)()

    def on_command(self, command: Command, now_s: float) -> list[Effect]:
        return self._hear("command", command)

    def on_pull_arrived(self, transfer_id: TransferId, indices: Sequence[int], now_s: float) -> list[Effect]:
        return self._hear("arrived", transfer_id, tuple(indices))

    def on_pull_ended(self, ended: PullEnded, now_s: float) -> list[Effect]:
        return self._hear("ended", ended)

    def on_handed_over(self, attempt_id: AttemptId, now_s: float) -> list[Effect]:
        return self._hear("handed over", attempt_id)

    def on_withdrawn(self, attempt_id: AttemptId, now_s: float) -> list[Effect]:
        return self._hear("withdrawn", attempt_id)

    def on_moved(self, moves: Sequence[Move], now_s: float) -> list[Effect]:
        self.cache.on_moved(moves, now_s)
        return self._hear("moved", len(moves))

    def on_tick(self, now_s: float) -> list[Effect]:
        return self.on.get("tick", list)()

    def decide(self, now_s: float) -> Pass | None:
        return self.passes.pop(0) if self.passes else None

    def account(self, done: Pass, results: Sequence[Sampled | None], seconds: float, now_s: float) -> list[Effect]:
        assert seconds >= 0
        return self._hear("account", done, tuple(results))

    def on_pass_failed(self, failed: Pass, message: str, now_s: float) -> list[Effect]:
        return self._hear("failed", failed, message)

    def drain(self, *, undo: bool = False) -> None:
        self.heard.append(("undrain" if undo else "drain",))

    def load(self) -> LoadReport:
        return LoadReport(running_sequences=len(self.running))

    def attempts(self) -> tuple[AttemptId, ...]:
        return self.running


class RecordingStore:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.checks = 0

    def start_pull(self, spec: Any) -> None:
        self.calls.append(("pull", spec))

    def abort_pull(self, transfer_id: TransferId, reason: str) -> None:
        self.calls.append(("abort", transfer_id, reason))

    def on_ready(self, hashes: Sequence[BlockHash]) -> None:
        self.calls.append(("ready", tuple(hashes)))

    def hand_over(self, attempt_id: AttemptId, tail_index: int, tail_slot: int, tail_tokens: int) -> None:
        self.calls.append(("hand over", attempt_id, tail_index, tail_slot, tail_tokens))

    def withdraw(self, attempt_id: AttemptId) -> None:
        self.calls.append(("withdraw", attempt_id))

    async def perform(self, moves: Sequence[Move]) -> None:
        self.calls.append(("moves", len(moves)))
        await asyncio.sleep(0)

    def samples(self) -> list[TransferSample]:
        return [TransferSample(source=NodeId("d0"), link="shm", num_bytes=9, seconds=0.5)]

    def tick(self) -> None:
        pass

    def check_invariants(self) -> None:
        self.checks += 1


class GatedEngine:
    """Computes when `gate` is open; `error` is raised instead of a result."""

    model: Any = None

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: BaseException | None = None
        self.threads: set[str] = set()

    def bind(self, pool: memoryview, num_slots: int) -> None: ...

    def forward(self, slices: Sequence[Slice]) -> list[Sampled | None]:
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return [Sampled(token_id=5) for _ in slices]

    def close(self) -> None: ...


class World:
    def __init__(self, report_interval_s: float = 10.0) -> None:
        self.cache = KvCache(num_device_slots=4, num_dram_slots=4, block_size=2)
        self.machine = ScriptedMachine(self.cache)
        self.inbox = Inbox(self.machine)
        self.store = RecordingStore()
        self.engine = GatedEngine()
        self.streams = Streams()
        self.loop = NodeLoop(
            info=INFO,
            machine=self.machine,
            inbox=self.inbox,
            cache=self.cache,
            engine=self.engine,
            store=self.store,
            streams=self.streams,
            config=LoopConfig(report_interval_s=report_interval_s),
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110  (of anything, not of an event)
                await asyncio.sleep(0.001)

    def heard(self, name: str) -> list[Any]:
        return [entry for entry in self.machine.heard if entry[0] == name]


def run(story: Callable[[World], Awaitable[None]], **settings: float) -> World:
    async def main() -> World:
        world = World(**settings)
        work = asyncio.create_task(world.loop.run())
        try:
            await story(world)
        finally:
            world.engine.gate.set()
            await world.loop.close(work)
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error
        return world

    return asyncio.run(main())


async def events(outbox: Outbox[WorkerEvent]) -> list[WorkerEvent]:
    """What is there, load reports left out."""
    return [event for event in await outbox.take() if not isinstance(event, LoadReport)]


def test_decide_execute_account() -> None:
    async def story(world: World) -> None:
        world.machine.passes = [PASS, PASS]
        world.inbox.wake()
        await world.until(lambda: len(world.heard("account")) == 2)
        assert world.heard("account")[0] == ("account", PASS, (Sampled(token_id=5),))
        assert world.loop.passes == 2
        assert len(world.engine.threads) == 1, "one engine thread, and it is not the loop's"
        assert threading.current_thread().name not in world.engine.threads

    run(story)


def test_the_inbox_is_served_while_the_engine_computes() -> None:
    async def story(world: World) -> None:
        outbox = world.loop.attach(Attach(conductor_id="c", term=1))
        world.machine.on["command"] = lambda: [Report(event=Closed(attempt_id=ATTEMPT))]
        world.engine.gate.clear()
        world.machine.passes = [PASS]
        world.inbox.wake()
        await world.until(lambda: bool(world.engine.threads))
        cancel = CancelCommand(attempt_id=ATTEMPT, reason="client left")
        await world.loop.command(cancel)
        await world.until(lambda: bool(world.heard("command")))
        assert not world.heard("account"), "the pass is still out"
        assert Closed(attempt_id=ATTEMPT) in await events(outbox)
        world.engine.gate.set()
        await world.until(lambda: bool(world.heard("account")))
        assert world.heard("command") == [("command", cancel)]

    run(story)


def test_blocks_are_announced_before_the_hand_over_that_the_same_pass_causes() -> None:
    def account(world: World) -> list[Effect]:
        assert world.cache.open(ATTEMPT, [NAME], 1, 0.0) is not None
        world.cache.commit(ATTEMPT, 0, NAME, 0.0)
        return [
            Report(event=Closed(attempt_id=ATTEMPT)),
            HandOver(attempt_id=ATTEMPT, tail_index=1, tail_slot=3, tail_tokens=1),
        ]

    async def story(world: World) -> None:
        outbox = world.loop.attach(Attach(conductor_id="c", term=1))
        world.machine.on["account"] = lambda: account(world)
        world.machine.passes = [PASS]
        world.inbox.wake()
        await world.until(lambda: len(world.store.calls) == 2)
        assert world.store.calls == [("ready", (NAME,)), ("hand over", ATTEMPT, 1, 3, 1)]
        snapshot, stored, closed = await events(outbox)
        assert isinstance(snapshot, Snapshot)
        assert stored == KvEvents(event_id=1, stored=(BlockCopy(block_hash=NAME, tier=Tier.DEVICE),))
        assert closed == Closed(attempt_id=ATTEMPT)

    run(story)


def test_one_message_per_front_end_and_step() -> None:
    async def story(world: World) -> None:
        one, two = world.streams.connect("f1", 1), world.streams.connect("f2", 2)
        world.machine.on["account"] = lambda: [
            Emit(front_end=name, token=token(index)) for index, name in enumerate(("f1", "f2", "f1"))
        ]
        world.machine.passes = [PASS]
        world.inbox.wake()
        assert await one.take() == [StepTokens(tokens=(token(0), token(2)))]
        assert await two.take() == [StepTokens(tokens=(token(1),))]

    run(story)


def test_every_effect_reaches_the_store_and_every_callback_the_machine() -> None:
    ended = PullEnded(
        transfer_id=TransferId("t"),
        attempt_id=ATTEMPT,
        missing=(),
        error=None,
        num_bytes=0,
        seconds=0.0,
        link="",
        overlap=0.0,
    )

    async def story(world: World) -> None:
        spec: Any = "a spec"
        effects: list[Effect] = [
            StartPull(spec=spec),
            AbortPull(transfer_id=TransferId("t"), reason="why"),
            Withdraw(attempt_id=ATTEMPT),
        ]
        world.machine.on["command"] = lambda: effects
        await world.loop.command(CancelCommand(attempt_id=ATTEMPT, reason=""))
        world.inbox.on_arrived(TransferId("t"), [0, 2])
        world.inbox.on_ended(ended)
        world.inbox.on_handed_over(ATTEMPT)
        world.inbox.on_withdrawn(ATTEMPT)
        await world.until(lambda: bool(world.heard("withdrawn")))
        assert world.store.calls == [("pull", "a spec"), ("abort", "t", "why"), ("withdraw", ATTEMPT)]
        assert world.machine.heard[1:] == [
            ("arrived", "t", (0, 2)),
            ("ended", ended),
            ("handed over", ATTEMPT),
            ("withdrawn", ATTEMPT),
        ]

    run(story)


def test_moves_are_performed_in_order_and_reported() -> None:
    def fill(world: World) -> list[Effect]:
        for number in range(5):  # five blocks in four slots: one must go to DRAM
            owner = AttemptId(RequestId(f"r{number}"), 1)
            if world.cache.open(owner, [], 1, float(number)) is not None:
                world.cache.commit(owner, 0, BlockHash(bytes([number]) * 16), float(number))
                world.cache.close(owner, float(number))
        return []

    async def story(world: World) -> None:
        world.machine.on["command"] = lambda: fill(world)
        await world.loop.command(CancelCommand(attempt_id=ATTEMPT, reason=""))
        await world.until(lambda: bool(world.heard("moved")))
        assert ("moves", 1) in world.store.calls
        assert world.cache.counts(Tier.DRAM)["free"] == 3
        world.cache.check_invariants()

    run(story)


@pytest.mark.parametrize("error", [IntegrityError("a stale block"), RuntimeError("out of memory"), IndexError("id")])
def test_a_pass_that_raises_fails_its_attempts_and_the_loop_goes_on(error: Exception) -> None:
    async def story(world: World) -> None:
        world.engine.error = error
        world.machine.passes = [PASS]
        world.inbox.wake()
        await world.until(lambda: bool(world.heard("failed")))
        assert world.heard("failed") == [("failed", PASS, f"{type(error).__name__}: {error}")]
        world.engine.error = None
        world.machine.passes = [PASS]
        world.inbox.wake()
        await world.until(lambda: bool(world.heard("account")))

    run(story)


def test_a_bug_in_the_engine_ends_the_loop() -> None:
    async def story(world: World) -> None:
        world.engine.error = AssertionError("a bug")
        world.machine.passes = [PASS]
        world.inbox.wake()
        await asyncio.sleep(0.1)

    with pytest.raises(ExceptionGroup) as caught:
        run(story)
    assert caught.group_contains(AssertionError, match="a bug")


def test_a_snapshot_holds_everything_and_the_events_after_it_follow_its_id() -> None:
    def commit(world: World, number: int) -> list[Effect]:
        owner = AttemptId(RequestId(f"r{number}"), 1)
        assert world.cache.open(owner, [], 1, 0.0) is not None
        world.cache.commit(owner, 0, BlockHash(bytes([number]) * 16), 0.0)
        return []

    async def story(world: World) -> None:
        commit(world, 1)  # not collected yet when the conductor attaches
        world.machine.running = (ATTEMPT,)
        outbox = world.loop.attach(Attach(conductor_id="c", term=1))
        world.machine.on["command"] = lambda: commit(world, 2)
        await world.loop.command(CancelCommand(attempt_id=ATTEMPT, reason=""))
        await world.loop.command(SnapshotCommand())
        await world.until(lambda: len(outbox) >= 3)
        first, news, second = await events(outbox)
        assert isinstance(first, Snapshot)
        assert isinstance(second, Snapshot)
        assert (first.info, first.last_event_id, first.attempts) == (INFO, 1, (ATTEMPT,))
        assert first.blocks == (BlockCopy(block_hash=BlockHash(b"\1" * 16), tier=Tier.DEVICE),)
        assert isinstance(news, KvEvents)
        assert news.event_id == 2
        assert second.last_event_id == 2
        assert set(second.blocks) == {*first.blocks, *news.stored}

    run(story)


def test_a_snapshot_comes_after_the_commands_of_the_conductor_before() -> None:
    """An attempt that a dead conductor began last must be in its successor's snapshot, or nobody would end it."""

    async def story(world: World) -> None:
        world.loop.attach(Attach(conductor_id="c", term=1))
        cancel = CancelCommand(attempt_id=ATTEMPT, reason="the last word")
        await world.loop.command(cancel)
        world.loop.attach(Attach(conductor_id="d", term=2))
        assert world.heard("command") == [("command", cancel)]

    run(story)


def test_load_is_reported_often_and_at_once_when_work_begins() -> None:
    async def story(world: World) -> None:
        outbox = world.loop.attach(Attach(conductor_id="c", term=1))
        await world.until(lambda: len(outbox) == 2)
        await outbox.take()
        world.machine.passes = [PASS]
        world.engine.gate.clear()
        world.inbox.wake()
        async with asyncio.timeout(1):
            (load,) = await outbox.take()
        assert isinstance(load, LoadReport)
        assert [sample.num_bytes for sample in load.transfers] == [9]

    run(story)

    async def frequent(world: World) -> None:
        outbox = world.loop.attach(Attach(conductor_id="c", term=1))
        await world.until(lambda: len(outbox) >= 4)

    run(frequent, report_interval_s=0.02)


def test_an_idle_loop_checks_its_books() -> None:
    async def story(world: World) -> None:
        await world.until(lambda: world.store.checks == 1)
        assert world.loop.load().invariant_checks == 1

    run(story)


def test_drain_reaches_the_machine_by_command_and_by_signal() -> None:
    async def story(world: World) -> None:
        await world.loop.command(DrainCommand())
        await world.loop.command(DrainCommand(undo=True))
        await world.until(lambda: len(world.heard("undrain")) == 1)
        world.loop.drain()
        await world.loop.command(DrainCommand(undo=True))  # too late: the process is leaving
        await world.until(lambda: len(world.heard("drain")) == 3)
        assert len(world.heard("undrain")) == 1

    run(story)


def test_senders_wait_while_the_inbox_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.loop.INBOX_MAX", 2)

    async def story() -> None:
        world = World()
        command = CancelCommand(attempt_id=ATTEMPT, reason="")
        for _ in range(2):
            await world.loop.command(command)
        waiting = asyncio.create_task(world.loop.command(command))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        assert len(world.inbox.drain()) == 2
        await asyncio.wait_for(waiting, 1)
        assert len(world.inbox) == 1

    asyncio.run(story())


def test_the_dump_says_what_waits() -> None:
    async def story(world: World) -> None:
        world.machine.running = (ATTEMPT,)
        world.inbox.on_withdrawn(ATTEMPT)
        text = world.loop.describe()
        for expected in ("on_withdrawn", "r#1", "no conductor", "'free': 4"):
            assert expected in text

    run(story)
