"""Streams from end to end: the SDK, the front end, the machine and the node links, on scripted workers over gRPC."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conductor.admin import AdminService, Facts
from conductor.config import ConductorConfig
from conductor.desk import Layout
from conductor.driver import Driver
from conductor.frontend import FrontEnd
from conductor.frontend_metrics import FrontEndMetrics
from conductor.inference import InferenceService
from conductor.machine import ConductorMachine
from conductor.nodes import Nodes
from conductor.readiness import Readiness
from conductor.settings import FrontEndConfig, NodesConfig
from conductor.validation import ServedModel
from core.messages import CancelCommand, PrefillCommand
from halfmoon.client import AsyncClient, Client
from halfmoon.errors import Cancelled, DeadlineExceeded, Failed, InvalidRequest, Rejected, Unavailable
from halfmoon.types import AttemptId, Epoch, NodeId, RequestId, Role
from halfmoon.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from service.channel import bind, make_server
from service.metrics import Metrics
from service.registry import Joined
from tests.scripted_workers import EOS, FINGERPRINT, VOCAB, ByteTokenizer, ScriptedWorker, counting, started

MODEL = ServedModel(
    name="bytes", vocab_size=VOCAB, context_tokens_max=4096, block_size=4, eos_token_ids=ByteTokenizer.eos_token_ids
)


@dataclass
class House:
    client: AsyncClient
    address: str
    front_end: FrontEnd
    driver: Driver
    nodes: Nodes
    inference: InferenceService

    async def until(self, holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline_s, self.driver.machine.status()
            await asyncio.sleep(0.01)

    def counters(self) -> dict[str, int]:
        return dict(self.front_end.metrics.counters)


async def members(workers: tuple[ScriptedWorker, ...]) -> AsyncIterator[Joined]:
    for worker in workers:
        yield Joined(info=worker.info)
    await asyncio.Event().wait()


@asynccontextmanager
async def house(*workers: ScriptedWorker, front_end: FrontEndConfig | None = None) -> AsyncIterator[House]:
    """A conductor without registry and lease before `workers`, which are started and killed here."""
    clock, config = time.monotonic, front_end or FrontEndConfig()
    machine = ConductorMachine(
        config=ConductorConfig(slow_start_s=0.001, unavailable_grace_s=0.2, attempts_max=4),
        layout=Layout(block_size=4, block_bytes=1024),
        conductor_id="c",
        fingerprint=FINGERPRINT,
    )
    driver = Driver(machine, clock)
    streams = FrontEnd(
        driver=driver,
        config=config,
        metrics=FrontEndMetrics(Metrics()),
        new_decoder=ByteTokenizer().stream,
        clock=clock,
    )
    inference = InferenceService(
        front_end=streams,
        front_end_id="c/1",
        tokenizer=ByteTokenizer(),
        model=MODEL,
        fingerprint=FINGERPRINT,
        config=config,
        rng=random.Random(7),
    )
    terms = [3]
    nodes = Nodes(
        driver=driver,
        config=NodesConfig(node_silence_s=0.6, backoff_s=0.05, backoff_s_max=0.1),
        conductor_id="c",
        front_end="c/1",
        fingerprint=FINGERPRINT,
        term=lambda: terms[-1],
        on_tokens=streams.on_tokens,
        on_higher_term=terms.append,
        clock=clock,
    )
    driver.connect(streams, nodes)
    admin = AdminService(
        driver=driver,
        front_end=streams,
        model="bytes",
        facts=lambda: Facts(term=3, ready=True, registry_reachable=False, counters=streams.metrics.counters),
    )
    server = make_server()
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    admin_pb2_grpc.add_AdminServicer_to_server(admin, server)
    address = bind(server, "127.0.0.1:0")
    await server.start()

    async def tick() -> None:
        while True:
            driver.tick()
            streams.tick()
            await asyncio.sleep(0.02)

    async with started(*workers), AsyncClient(address, admin_address=address, timeout_s=20.0) as client:
        tasks = [asyncio.create_task(nodes.run(members(workers))), asyncio.create_task(tick())]
        it = House(client, address, streams, driver, nodes, inference)
        try:
            await it.until(lambda: len([n for n in machine.status().nodes if n.ready]) == len(workers))
            yield it
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.stop(None)
            inference.close()
    assert all(task.cancelled() for task in tasks), [task.exception() for task in tasks if not task.cancelled()]


def pair(**settings: Any) -> tuple[ScriptedWorker, ScriptedWorker]:
    return ScriptedWorker("p", Role.PREFILL, **settings), ScriptedWorker("d", Role.DECODE, **settings)


def run(story: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30.0):
            await story

    asyncio.run(bounded())


def digits(prompt: bytes, count: int) -> str:
    return "".join(chr(counting(prompt, i)) for i in range(count))


def test_a_stream_carries_every_token_once_and_its_usage() -> None:
    async def story() -> None:
        async with house(*pair()) as it:
            stream = it.client.generate("moon", max_tokens=12, logprobs=1)
            events = [event async for event in stream]
            assert [e.index for e in events] == list(range(12))
            assert "".join(e.text for e in events) == digits(b"moon", 12)
            assert events[0].logprob == -0.5
            assert events[0].top_logprobs == ((events[0].token_id, -0.5),)
            result = stream.result
            assert result.text == digits(b"moon", 12)
            assert result.finish_reason == "length"
            assert result.prompt_token_ids == tuple(b"moon")
            assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (4, 12)
            assert (result.usage.computed_prompt_tokens, result.usage.kv_blocks_pulled) == (4, 2)
            assert (result.usage.link, result.usage.overlap, result.usage.attempts) == ("scripted", 0.5, 1)
            assert (result.usage.prefill_node, result.usage.decode_node) == ("p", "d")
            assert (result.timings.server.queue_s, result.timings.server.prefill_s) == (0.25, 0.5)
            assert len(result.timings.tbt_s) == 11
            assert 0 < result.timings.server.ttft_s <= result.timings.ttft_s <= result.timings.total_s
            await it.until(lambda: it.driver.machine.status().requests_open == 0)
            assert it.counters() == {"streams_finished": 1}

    run(story())


def test_many_streams_at_once_on_a_coupled_worker() -> None:
    async def story() -> None:
        async with house(ScriptedWorker("c", Role.COUPLED)) as it:
            prompts = [bytes([65 + i, 66 + i]) for i in range(16)]
            answers = await asyncio.gather(*(it.client.complete(p.decode(), max_tokens=20) for p in prompts))
            assert [a.text for a in answers] == [digits(p, 20) for p in prompts]
            assert {a.usage.decode_node for a in answers} == {"c"}

    run(story())


def test_a_second_token_may_overtake_the_first() -> None:
    """The first token comes over the prefill worker's stream, the second over the decode worker's."""

    async def story() -> None:
        prefill, decode = pair()
        prefill.hold_first_token_s = 0.1
        async with house(prefill, decode) as it:
            result = await it.client.complete("ab", max_tokens=30)
            assert result.text == digits(b"ab", 30)
            assert result.usage.attempts == 1

    run(story())


@pytest.mark.parametrize(("slo_ttft_s", "together"), [(5.0, True), (0.2, False)])
def test_a_first_token_is_held_for_its_second_but_not_beyond_its_limit(slo_ttft_s: float, together: bool) -> None:
    """The decode worker takes 0.4 s for a step, and hand-overs have lately been slow."""

    async def story() -> None:
        prefill, decode = pair()
        decode.step_s = 0.4
        async with house(prefill, decode) as it:
            it.driver.machine._desk.handovers_s.append(1.0)
            result = await it.client.complete("ab", max_tokens=3, slo_ttft_s=slo_ttft_s, slo_tbt_s=0.5)
            assert result.text == digits(b"ab", 3)
            ttft_s, (first_s, second_s) = result.timings.ttft_s, result.timings.tbt_s
            assert second_s > 0.3
            if together:
                assert ttft_s >= 0.4
                assert first_s < 0.1
            else:
                assert 0.19 <= ttft_s < 0.39
                assert first_s > 0.05

    run(story())


def test_the_end_of_sequence_is_counted_and_not_shown() -> None:
    async def story() -> None:
        script = lambda prompt, index: EOS if index == 5 else counting(prompt, index)  # noqa: E731
        async with house(*pair(script=script)) as it:
            result = await it.client.complete("ab", max_tokens=30)
            assert result.text == digits(b"ab", 5)
            assert result.token_ids[-1] == EOS
            assert (result.usage.completion_tokens, result.finish_reason) == (6, "stop")

    run(story())


def test_a_stop_string_over_two_tokens_ends_the_work_too() -> None:
    async def story() -> None:
        prefill, decode = pair(step_s=0.005)
        async with house(prefill, decode) as it:
            whole = digits(b"ab", 40)
            result = await it.client.complete("ab", max_tokens=1000, stop=[whole[8:11], "never"])
            assert result.text == whole[: whole.index(whole[8:11])]
            assert result.finish_reason == "stop"
            assert result.usage.completion_tokens == len(result.text) + 3
            await it.until(lambda: any(isinstance(c, CancelCommand) for c in decode.commands))
            await it.until(lambda: it.driver.machine.status().requests_open == 0)
            assert it.driver.machine.counters["requests_finished"] == 1

    run(story())


def test_text_never_splits_a_character() -> None:
    async def story() -> None:
        answer = "a🌕é月".encode()
        async with house(*pair(script=lambda prompt, index: answer[index])) as it:
            stream = it.client.generate("x", max_tokens=len(answer))
            texts = [event.text async for event in stream]
            assert texts == ["a", "", "", "", "🌕", "", "é", "", "", "月"]
            cut = it.client.generate("x", max_tokens=4)
            assert [event.text async for event in cut] == ["a", "", "", ""]
            assert cut.result.text == "a\ufffd"

    run(story())


def test_a_decode_worker_lost_in_mid_stream_is_a_pause_and_no_more() -> None:
    """No repeat, no gap, the same text; the other decode worker goes on after a prefill of prompt and output."""

    async def story() -> None:
        prefill = ScriptedWorker("p", Role.PREFILL, step_s=0.01)
        decodes = [ScriptedWorker(name, Role.DECODE, step_s=0.01) for name in ("d", "e")]
        async with house(prefill, *decodes) as it:
            stream = it.client.generate("ab", max_tokens=60)
            events = [await anext(stream) for _ in range(20)]
            victim = next(worker for worker in decodes if worker.decoding)
            await victim.kill()
            events += [event async for event in stream]
            assert [e.index for e in events] == list(range(60))
            assert stream.result.text == digits(b"ab", 60)
            assert (stream.result.usage.attempts, stream.result.usage.prompt_tokens) == (2, 2)
            assert stream.result.usage.decode_node == ({"d", "e"} - {victim.name}).pop()
            again = [c for c in prefill.commands if isinstance(c, PrefillCommand)][-1]
            assert again.attempt_id.number == 2
            assert bytes(again.token_ids).decode() == "ab" + digits(b"ab", len(again.token_ids) - 2)
            assert len(again.token_ids) - 2 >= 20
            assert again.num_prompt_tokens == 2

    run(story())


def test_a_prefill_worker_lost_in_mid_prefill_is_a_pause_and_no_more() -> None:
    async def story() -> None:
        prefills = [ScriptedWorker(name, Role.PREFILL, step_s=0.5) for name in ("p", "q")]
        async with house(*prefills, ScriptedWorker("d", Role.DECODE)) as it:
            task = asyncio.create_task(it.client.complete("ab", max_tokens=30))
            await it.until(lambda: any(worker.attempts for worker in prefills))
            await next(worker for worker in prefills if worker.attempts).kill()
            result = await task
            assert (result.text, result.usage.attempts) == (digits(b"ab", 30), 2)

    run(story())


def test_a_worker_that_falls_silent_is_lost() -> None:
    async def story() -> None:
        workers = (
            ScriptedWorker("p", Role.PREFILL),
            *(ScriptedWorker(n, Role.DECODE, step_s=0.01) for n in ("d", "e")),
        )
        async with house(*workers) as it:
            stream = it.client.generate("ab", max_tokens=150)
            await anext(stream)
            await it.until(lambda: any(w.decoding for w in workers[1:]))
            used = next(w for w in workers[1:] if w.decoding)
            used.mute = True
            result = await stream.complete()
            assert result.text == digits(b"ab", 150)
            assert it.nodes.counters["links_lost"] >= 1

    run(story())


def test_a_missing_token_restarts_the_attempt() -> None:
    async def story() -> None:
        prefill, decode = pair(step_s=0.005)
        decode.skip = {7}
        async with house(prefill, decode, front_end=FrontEndConfig(hole_s=0.1)) as it:
            result = await it.client.complete("ab", max_tokens=200)
            assert result.text == digits(b"ab", 200)
            assert result.usage.attempts == 2
            assert it.counters()["holes"] == 1

    run(story())


def test_a_cancelled_request_ends_everywhere() -> None:
    async def story() -> None:
        prefill, decode = pair(step_s=0.01)
        async with house(prefill, decode) as it:
            stream = it.client.generate("ab", max_tokens=3000, request_id="mine")
            await anext(stream)
            assert await it.client.cancel("mine") is True
            with pytest.raises(Cancelled, match="mine: cancelled by a client's call"):
                await stream.complete()
            assert await it.client.cancel("mine") is False
            await it.until(lambda: not decode.attempts and not prefill.attempts)
            assert it.counters() == {"streams_cancelled": 1}

    run(story())


def test_leaving_a_stream_cancels_it() -> None:
    async def story() -> None:
        prefill, decode = pair(step_s=0.01)
        async with house(prefill, decode) as it:
            async with it.client.generate("ab", max_tokens=3000) as stream:
                async for event in stream:
                    if event.index == 3:
                        break
            await it.until(lambda: it.front_end.num_open == 0 and not decode.attempts)
            assert it.counters()["streams_cancelled"] == 1

    run(story())


def test_a_deadline_ends_the_request() -> None:
    async def story() -> None:
        async with house(*pair(step_s=0.05)) as it:
            with pytest.raises(DeadlineExceeded):
                await it.client.complete("ab", max_tokens=3000, timeout_s=0.4)
            await it.until(lambda: it.front_end.num_open == 0)

    run(story())


def test_a_duplicate_id_is_refused_and_the_first_goes_on() -> None:
    async def story() -> None:
        async with house(*pair(step_s=0.01)) as it:
            first = it.client.generate("ab", max_tokens=30, request_id="same")
            await anext(first)
            with pytest.raises(InvalidRequest) as caught:
                await it.client.complete("cd", request_id="same")
            assert caught.value.field == "request_id"
            assert (await first.complete()).text == digits(b"ab", 30)
            assert (await it.client.complete("cd", max_tokens=3, request_id="same")).text == digits(b"cd", 3)

    run(story())


def test_a_reader_that_stops_reading_stalls_only_itself() -> None:
    async def story() -> None:
        config = FrontEndConfig(reader_stall_s=0.4)
        async with house(*pair(step_s=0.0), front_end=config) as it:
            options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
            async with grpc.aio.insecure_channel(it.address, options=options) as channel:
                request = inference_pb2.GenerateRequest(prompt="ab", request_id="slow")
                request.sampling.max_tokens = 4000
                call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
                await call.initial_metadata()
                brisk = await it.client.complete("cd", max_tokens=200)
                assert brisk.text == digits(b"cd", 200)
                await it.until(lambda: it.front_end.num_open == 0, timeout_s=15.0)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    [event async for event in call]
                assert caught.value.code() is grpc.StatusCode.CANCELLED
                assert "the reader" in str(caught.value.details())

    run(story())


def test_no_worker_is_an_answer_and_not_a_wait() -> None:
    async def story() -> None:
        async with house() as it:
            started_s = time.monotonic()
            with pytest.raises(Unavailable):
                await it.client.complete("ab")
            assert time.monotonic() - started_s < 2.0
            assert it.counters() == {"streams_rejected": 1}

    run(story())


def test_every_call_is_counted_once_wherever_it_is_refused() -> None:
    async def story() -> None:
        async with house(*pair()) as it:
            await it.client.complete("ab", max_tokens=3)
            too_long = [1] * it.inference._model.context_tokens_max  # at the door, ...
            too_much = "ab" * (it.inference._model.context_tokens_max // 2)  # ... after tokenising
            for prompt, options in ((too_long, {}), (too_much, {}), ("ab", {"temperature": -1.0})):
                with pytest.raises(InvalidRequest):
                    await it.client.complete(prompt, **options)
            assert it.counters() == {"streams_finished": 1, "streams_rejected": 3}
            assert it.driver.machine.counters["requests"] == 1

    run(story())


def test_attempts_are_bounded() -> None:
    async def story() -> None:
        prefill, decode = pair(step_s=0.002)
        decode.skip = set(range(1, 2000, 2))
        async with house(prefill, decode, front_end=FrontEndConfig(hole_s=0.05)) as it:
            with pytest.raises(Failed, match="gave up after 4 tries"):
                await it.client.complete("ab", max_tokens=100)

    run(story())


def test_too_many_streams_are_rejected_with_a_hint() -> None:
    async def story() -> None:
        async with house(*pair(step_s=0.05), front_end=FrontEndConfig(streams_max=1)) as it:
            first = it.client.generate("ab", max_tokens=100)
            await anext(first)
            with pytest.raises(Rejected) as caught:
                await it.client.complete("cd")
            assert (caught.value.reason, caught.value.limit, caught.value.retry_after_s) == ("streams", 1.0, 1.0)
            first.cancel()

    run(story())


def test_a_chat_sends_back_the_ids_that_the_model_said() -> None:
    async def story() -> None:
        answer = [0xE6, 0x9C, 258]  # half a character, then the end of the turn: its text does not retokenise to it
        prefill, decode = pair(script=lambda prompt, index: answer[index])
        async with house(prefill, decode) as it:
            session = it.client.chat_session([{"role": "system", "content": "Be brief."}])
            one = await session.send("Hi").complete()
            assert one.token_ids == tuple(answer)
            assert session.messages[-1].token_ids == tuple(answer)
            two = await session.send("And?").complete()
            assert two.prompt_token_ids[: len(one.prompt_token_ids) + 3] == (*one.prompt_token_ids, *answer)
            assert two.prompt_token_ids[len(one.prompt_token_ids) + 3 :] == tuple(
                ByteTokenizer().encode("\n<|open|>user\nAnd?<|close|>\n<|open|>assistant\n")
            )
            assert await it.client.tokenize_chat([{"role": "user", "content": "x"}]) == ByteTokenizer().encode(
                "<|open|>user\nx<|close|>\n<|open|>assistant\n"
            )

    run(story())


def test_the_blocking_client_speaks_the_same() -> None:
    async def story() -> None:
        async with house(*pair()) as it:
            found: dict[str, Any] = {}

            def use() -> None:
                with Client(it.address, admin_address=it.address, timeout_s=10.0) as client:
                    with client.generate([97, 98], max_tokens=8) as stream:
                        found["texts"] = [event.text for event in stream]
                    found["result"] = stream.result
                    with client.generate("ab", max_tokens=3000) as left:
                        next(left)
                    found["model"] = client.model()
                    found["ids"] = client.tokenize("ab")
                    found["nodes"] = {n.node_id: n.ready for n in client.cluster().nodes}
                    session = client.chat_session()
                    session.send("hi", max_tokens=3).complete()
                    found["turns"] = [m.role for m in session.messages]
                    try:
                        client.complete("ab", temperature=-1.0)
                    except InvalidRequest as error:
                        found["field"] = error.field

            thread = threading.Thread(target=use)
            thread.start()
            await it.until(lambda: not thread.is_alive(), timeout_s=15.0)
            assert "".join(found["texts"]) == found["result"].text == digits(b"ab", 8)
            assert (found["model"].name, found["model"].eos_token_ids) == ("bytes", (256, 258))
            assert found["ids"] == [97, 98]
            assert found["nodes"] == {"p": True, "d": True}
            assert found["turns"] == ["user", "assistant"]
            assert found["field"] == "temperature"
            await it.until(lambda: it.front_end.num_open == 0)

    run(story())


def test_operators_see_drain_and_explain() -> None:
    async def story() -> None:
        async with house(*pair()) as it:
            result = await it.client.complete("ab", max_tokens=3)
            async with grpc.aio.insecure_channel(it.address) as channel:
                stub = admin_pb2_grpc.AdminStub(channel)
                record = await stub.Explain(admin_pb2.ExplainRequest(request_id=result.request_id))
                assert '"prefill_node": "p"' in record.record_json
                short = await stub.Explain(admin_pb2.ExplainRequest(request_id=result.request_id[:12]))
                assert short == record
                await it.client.complete("ab", max_tokens=3)
                with pytest.raises(grpc.aio.AioRpcError, match="2 ids begin so"):
                    await stub.Explain(admin_pb2.ExplainRequest(request_id="r-"))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Explain(admin_pb2.ExplainRequest(request_id="nobody"))
                assert caught.value.code() is grpc.StatusCode.NOT_FOUND
                with pytest.raises(grpc.aio.AioRpcError, match="known: d, p"):
                    await stub.Drain(admin_pb2.DrainRequest(node_id="x"))
                await stub.Drain(admin_pb2.DrainRequest())
            with pytest.raises(Unavailable, match="draining"):
                await it.client.complete("ab")
            view = await it.client.cluster()
            assert (view.term, view.model, view.registry_reachable) == (3, "bytes", False)

    run(story())


def test_readiness_takes_a_round_trip() -> None:
    async def story() -> None:
        prefill, decode = pair()
        async with house(prefill, decode) as it:
            said: list[str] = []
            readiness = Readiness(
                why_not=lambda: it.driver.machine.status().unavailable,
                canary=lambda number: it.inference.canary(number, 5.0),
                services=("halfmoon.v1.Inference",),
                interval_s=0.02,
                on_first=lambda: said.append("ready"),
                on_waiting=said.append,
                on_failed=lambda times, why: said.append(f"{times} {why}"),
            )
            server = make_server()
            health_pb2_grpc.add_HealthServicer_to_server(readiness.health, server)
            address = bind(server, "127.0.0.1:0")
            await server.start()
            task = asyncio.create_task(readiness.run())
            async with grpc.aio.insecure_channel(address) as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(
                    health_pb2.HealthCheckRequest(service="halfmoon.v1.Inference")
                )
                await it.until(lambda: readiness.ready)
                while (await watch.read()).status != health_pb2.HealthCheckResponse.SERVING:
                    pass
                assert said == ["ready"]
                assert any(isinstance(c, PrefillCommand) and len(c.token_ids) == 5 for c in prefill.commands)
                await decode.kill()
                while (await watch.read()).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                    pass
                await decode.start()
                await it.until(lambda: readiness.ready)
                assert said == ["ready"]
                watch.cancel()
            task.cancel()
            await server.stop(None)

    run(story())


def test_a_command_for_an_epoch_that_is_gone_is_dropped() -> None:
    async def story() -> None:
        prefill, decode = pair()
        async with house(prefill, decode) as it:
            command = CancelCommand(attempt_id=AttemptId(RequestId("r"), 1), reason="")
            it.nodes.send(NodeId("nobody"), Epoch("1"), command)
            it.nodes.send(NodeId("d"), Epoch("an earlier one"), command)
            assert it.nodes.counters["commands_dropped"] == 2
            assert decode.commands == []

    run(story())


def test_a_node_that_reads_no_commands_is_lost() -> None:
    async def story() -> None:
        prefill, decode = pair()
        async with house(prefill, decode) as it:
            command = CancelCommand(attempt_id=AttemptId(RequestId("r"), 1), reason="")
            for _ in range(it.nodes.config.commands_max + 1):  # without a pause in which they could be written
                it.nodes.send(NodeId("d"), Epoch("1"), command)
            await it.until(lambda: it.nodes.counters["links_lost"] == 1)
            await it.until(lambda: it.nodes.links[NodeId("d")].joined)
            assert (await it.client.complete("ab", max_tokens=3)).text == digits(b"ab", 3)

    run(story())


def test_a_worker_that_has_seen_a_higher_term_says_which() -> None:
    async def story() -> None:
        prefill, decode = pair(term_seen=9)
        async with house(prefill, decode):  # which goes on with the term that it is told
            assert (prefill.terms, decode.terms) == ([9], [9])

    run(story())


def test_a_worker_of_another_model_is_listed_and_not_used() -> None:
    async def story() -> None:
        other = ScriptedWorker("x", Role.COUPLED, fingerprint=replace(FINGERPRINT, weights="others"))
        async with house(*pair()) as it:
            await other.start()
            task = asyncio.create_task(it.nodes.run(members((other,))))
            await it.until(lambda: len(it.driver.machine.status().nodes) == 3)
            answers = await asyncio.gather(*(it.client.complete("ab", max_tokens=4) for _ in range(8)))
            assert {(a.usage.prefill_node, a.usage.decode_node) for a in answers} == {("p", "d")}
            why = {n.info.node_id: n.why for n in it.driver.machine.status().nodes}
            assert why[NodeId("x")] == "weights: 'bytes' here, 'others' there"
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await other.kill()

    run(story())
