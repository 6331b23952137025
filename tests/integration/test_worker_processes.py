"""Prefill, decode and coupled worker processes under a scripted conductor: tokens, terms, drains, refusals."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.messages import (
    AttemptFinished,
    CancelCommand,
    Closed,
    DecodeJoined,
    LoadReport,
    PrefillDone,
    RefusalReason,
    Refused,
)
from engine.fake import fake_tokens
from halfmoon.types import AttemptId, FinishReason, SamplingParams
from halfmoon.v1 import worker_pb2
from service.channel import make_channel
from service.registry import Joined, Registry
from service.valkey import EmbeddedValkey
from tests.worker_processes import Conducted, WorkerProcess, attempt, begin, prefill, reserve, running

pytestmark = pytest.mark.cluster

PROMPT = [i * 7 % 256 for i in range(70)]  # four full blocks of 16 and a tail


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    return fake_tokens(prompt, num_tokens, SamplingParams())


def pair(tmp_path: Path, **node: Any) -> tuple[WorkerProcess, WorkerProcess]:
    return WorkerProcess("prefill", "p0", tmp_path, **node), WorkerProcess("decode", "d0", tmp_path, **node)


def story(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    def sync(tmp_path: Path) -> None:
        asyncio.run(test(tmp_path))

    sync.__name__ = test.__name__
    return sync


async def streamed(attempt_id: AttemptId, num_tokens: int, *streams: Conducted) -> list[int]:
    """The attempt's tokens; they travel on another stream than its events."""
    await streams[-1].until(lambda: sum(len(s.tokens_of(attempt_id)) for s in streams) >= num_tokens)
    return [token for stream in streams for token in stream.tokens_of(attempt_id)]


def idle(load: LoadReport) -> bool:
    return load.held_blocks == load.running_sequences == load.queued_attempts == 0


@story
async def test_a_request_travels_from_prefill_to_decode_and_leaves_nothing(tmp_path: Path) -> None:
    pw, dw = pair(tmp_path)
    async with running(pw, dw), Conducted(pw.address) as p, Conducted(dw.address) as d:
        one, two = attempt("one"), attempt("two")
        await begin(p, d, one, PROMPT, 20)
        finished = await d.event(AttemptFinished, one)
        assert await streamed(one, 20, p, d) == expected(PROMPT, 20)
        assert [token.index for token in (*p.tokens, *d.tokens)] == list(range(20))
        assert (finished.finish_reason, finished.num_output_tokens) == (FinishReason.LENGTH, 20)
        joined = await d.event(DecodeJoined, one)
        assert (joined.stats.pulled_blocks, joined.stats.link) == (5, "shm")

        longer = [*PROMPT, *expected(PROMPT, 20), 1, 2, 3]
        await begin(p, d, two, longer, 5)
        await d.event(AttemptFinished, two)
        assert await streamed(two, 5, p, d) == expected(longer, 5)
        assert (await p.event(PrefillDone, two)).stats.hit_tokens_device == 64, "four blocks of the first prompt"
        await p.load(idle)
        await d.load(idle)
        assert pw.states == ["loading fake", "warming 256 device blocks, 64 in DRAM", f"ready {pw.address}"]


@story
async def test_many_requests_at_once_share_steps(tmp_path: Path) -> None:
    pw, dw = pair(tmp_path, fake_pass_s=0.005)
    async with running(pw, dw), Conducted(pw.address) as p, Conducted(dw.address) as d:
        prompts = {attempt(f"r{n}"): [n, *PROMPT[: 10 + 5 * n]] for n in range(12)}
        await asyncio.gather(*(begin(p, d, name, prompt, 30) for name, prompt in prompts.items()))
        await asyncio.gather(*(d.event(AttemptFinished, name) for name in prompts))
        for name, prompt in prompts.items():
            assert await streamed(name, 30, p, d) == expected(prompt, 30), name
        assert len(d.steps) < len(d.tokens) / 2, "one message a step, not one a token"
        await d.load(idle)
        await p.load(idle)


@story
async def test_a_coupled_worker_serves_alone(tmp_path: Path) -> None:
    worker = WorkerProcess("coupled", "c0", tmp_path)
    async with running(worker), Conducted(worker.address) as c:
        one = attempt("one")
        await c.send(prefill(one, PROMPT, 12, decode_here=True))
        await c.event(AttemptFinished, one)
        assert await streamed(one, 12, c) == expected(PROMPT, 12)
        await c.load(idle)


@story
async def test_attempts_outlive_their_conductor_and_its_successor_rules(tmp_path: Path) -> None:
    worker = WorkerProcess("coupled", "c0", tmp_path, fake_pass_s=0.02)
    one, two = attempt("one"), attempt("two")
    async with running(worker):
        async with Conducted(worker.address, term=3) as first:
            await first.send(prefill(one, PROMPT, 60, decode_here=True))
            await first.send(prefill(two, PROMPT[:9], 60, decode_here=True))
            await first.until(lambda: len(first.tokens) >= 4)
        async with Conducted(worker.address, term=2, conductor_id="late") as stale:
            error = await stale.failure()
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "has term 2; this worker has seen term 3" in str(error.details())
        async with Conducted(worker.address, term=4) as second:
            snapshot = await second.snapshot()
            assert set(snapshot.attempts) == {one, two}, "they ran on"
            await second.send(CancelCommand(attempt_id=two, reason="unknown to me"))
            await second.event(Closed, two)
            await second.event(AttemptFinished, one)
            await second.until(lambda: second.tokens_of(one)[-10:] == expected(PROMPT, 60)[-10:])
            async with Conducted(worker.address, term=4, conductor_id="other") as third:
                assert (await third.snapshot()).attempts == ()
                assert "has attached with term 4" in str((await second.failure()).details())


@story
async def test_sigterm_lets_running_attempts_end_and_refuses_new_ones(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path / "valkey")
    registry = Registry(await valkey.start())
    worker = WorkerProcess("coupled", "c0", tmp_path, fake_pass_s=0.02, registry=valkey.url)
    one, two = attempt("one"), attempt("two")
    try:
        async with running(worker), Conducted(worker.address) as c:
            info = (await c.snapshot()).info
            joined = await asyncio.wait_for(anext(registry.watch(interval_s=0.05)), 10)
            assert joined == Joined(info=info)
            await c.send(prefill(one, PROMPT, 60, decode_here=True))
            await c.until(lambda: len(c.tokens) >= 2)
            worker.signal(signal.SIGTERM)
            await c.load(lambda load: load.draining)
            await c.send(prefill(two, PROMPT, 5, decode_here=True))
            assert (await c.event(Refused, two)).reason is RefusalReason.DRAINING
            await c.event(AttemptFinished, one)
            assert await streamed(one, 60, c) == expected(PROMPT, 60)
            assert await worker.ended() == 0
            assert "has drained and stops" in str((await c.failure()).details())
            assert await registry.nodes() == {}
    finally:
        await registry.close()
        await valkey.stop()


@story
async def test_a_drain_is_bounded_and_needs_no_conductor(tmp_path: Path) -> None:
    worker = WorkerProcess("coupled", "c0", tmp_path, fake_pass_s=0.02, drain_s=0.3)
    async with running(worker):
        async with Conducted(worker.address) as c:
            await c.send(prefill(attempt("one"), PROMPT, 2000, decode_here=True))
            await c.until(lambda: len(c.tokens) >= 2)
            worker.signal(signal.SIGTERM)
            assert await worker.ended() == 0
        assert "1 attempts are cut off after draining" in worker.log.read_text()


@story
async def test_a_dead_source_fails_the_pull_within_a_bound(tmp_path: Path) -> None:
    pw, dw = pair(tmp_path, fake_pass_s=0.3)
    async with running(pw, dw), Conducted(pw.address) as p, Conducted(dw.address) as d:
        one = attempt("one")
        source = (await p.snapshot()).info
        await d.send(reserve(one, PROMPT, 5, source))
        await p.send(prefill(one, PROMPT, 5))
        await asyncio.sleep(0.1)
        pw.signal(signal.SIGKILL)
        failed = await d.until(lambda: next((e for e in d.events if type(e).__name__ == "AttemptFailed"), None))
        assert getattr(failed, "attempt_id", None) == one
        await d.load(idle)


@story
async def test_a_command_that_is_none_ends_its_stream_and_nothing_else(tmp_path: Path) -> None:
    worker = WorkerProcess("prefill", "p0", tmp_path)
    async with running(worker):
        async with Conducted(worker.address) as c:
            await c.snapshot()
            await c.send_raw(worker_pb2.WorkerCommand())
            error = await c.failure()
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "WorkerCommand.kind" in str(error.details())
        async with Conducted(worker.address) as again:
            await again.snapshot()


@story
async def test_health_is_serving_when_ready_and_not_while_draining(tmp_path: Path) -> None:
    worker = WorkerProcess("coupled", "c0", tmp_path, fake_pass_s=0.02)
    async with running(worker), Conducted(worker.address) as c, make_channel(worker.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest(service="halfmoon.v1.Worker")
        assert (await check(request)).status == health_pb2.HealthCheckResponse.SERVING
        await c.send(prefill(attempt("one"), PROMPT, 100, decode_here=True))
        await c.until(lambda: len(c.tokens) >= 2)
        worker.signal(signal.SIGTERM)
        await c.load(lambda load: load.draining)
        assert (await check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING


@story
async def test_starts_that_cannot_succeed_are_refused_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        cases: dict[str, dict[str, Any]] = {
            f"address {address} is in use": {"listen": address},
            "config node.device_blocks": {"device_blocks": 10**7, "block_size": 4096},
        }
        workers = {
            message: WorkerProcess("prefill", f"p{number}", tmp_path, **settings)
            for number, (message, settings) in enumerate(cases.items())
        }
        await asyncio.gather(*(worker.spawn() for worker in workers.values()))
        for message, worker in workers.items():
            assert not await worker.until_ready()
            assert await worker.ended() == 2, worker.log.read_text()
            last = worker.log.read_text().splitlines()[-1]
            assert "level=critical" in last
            assert message in last
