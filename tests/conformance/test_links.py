"""One suite for all links: every link moves blocks, ends pulls, and gives everything back, in the same way."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from halfmoon.errors import IntegrityError, PeerLost, TransferAborted, TransferError, TransferTimeout
from halfmoon.types import AttemptId, Epoch, RequestId, Tier
from kv_store.link_memory import Faults, MemoryNet
from kv_store.pairing import load_links
from tests.kv_child import NUM_BLOCKS, endless
from tests.kv_children import Child
from tests.kv_nodes import FINGERPRINT, PROCESS_LIMITS, QUICK, Node, content_of, name_of, running_node, until

LINKS = ("memory", "shm", "torch")
A1 = AttemptId(RequestId("r"), 1)


@pytest.fixture(params=LINKS)
def link(request: pytest.FixtureRequest) -> str:
    load_links([request.param])
    return str(request.param)


@pytest.fixture(autouse=True)
def _nothing_leaks() -> Iterator[None]:
    """Threads of links, movers and hashers end with their store; so do mappings of peers' memory."""
    yield
    end_s = time.monotonic() + 5.0
    while leaked := [t.name for t in threading.enumerate() if t.name.startswith("kv-")]:
        assert time.monotonic() < end_s, leaked
        time.sleep(0.01)
    assert "memfd:halfmoon" not in Path("/proc/self/maps").read_text()


class Pair:
    """A source p and a sink d in this process."""

    def __init__(self, link: str, folder: Path) -> None:
        self.link, self.folder, self.net = link, folder, MemoryNet()

    async def __aenter__(self) -> tuple[Node, Node]:
        self._p = running_node("p", self.folder, link=self.link, net=self.net, num_slots=64)
        self._d = running_node("d", self.folder, link=self.link, net=self.net, num_slots=64)
        return await self._p.__aenter__(), await self._d.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        await self._d.__aexit__(None, None, None)
        await self._p.__aexit__(None, None, None)


def at_rest(*nodes: Node) -> bool:
    for node in nodes:
        node.store.check_invariants()
    return all(node.store.quiescent() and not node.shelf.pins for node in nodes)


# ---- bytes ----


@pytest.mark.parametrize("num_blocks", [1, 5, 40])
def test_blocks_arrive_as_they_were(link: str, num_blocks: int, tmp_path: Path) -> None:
    async def story() -> None:
        async with Pair(link, tmp_path) as (p, d):
            for number in range(num_blocks):
                p.put(number, 63 - number)
            d.store.start_pull(d.spec(p, range(num_blocks)))
            ended = await d.ending()
            assert (ended.error, ended.missing, ended.link) == (None, (), link)
            assert ended.num_bytes == num_blocks * 368_640
            assert all(d.holds(number, name_of(number)) for number in range(num_blocks))
            assert sorted(i for _, indices in d.arrived for i in indices) == list(range(num_blocks))
            (sample,) = d.store.samples()
            assert (sample.source, sample.link, sample.num_bytes) == ("p", link, ended.num_bytes)
            await until(lambda: at_rest(p, d))

    asyncio.run(story())


def test_blocks_larger_than_a_message_arrive_whole(link: str, tmp_path: Path) -> None:
    async def story() -> None:
        net, size = MemoryNet(), 2_500_000
        async with (
            running_node("p", tmp_path, link=link, net=net, num_slots=4, block_bytes=size) as p,
            running_node("d", tmp_path, link=link, net=net, num_slots=4, block_bytes=size) as d,
        ):
            p.put(0, 0)
            p.put(1, 1, Tier.DRAM)
            d.store.start_pull(d.spec(p, [0, 1]))
            assert (await d.ending()).error is None
            assert d.holds(0, name_of(0))
            assert d.holds(1, name_of(1))

    asyncio.run(story())


def test_a_decode_pulls_while_prefill_runs_and_the_tail_comes_with_the_hand_over(link: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with Pair(link, tmp_path) as (p, d):
            d.store.start_pull(d.spec(p, [0, 1, None], wait=True))
            for number in (0, 1):
                await asyncio.sleep(0.02)
                p.store.on_ready([p.put(number, number)])
                await until(lambda n=number: ("t1", (n,)) in d.arrived)
            p.device.slot(9)[:] = content_of(b"the tail")
            p.store.hand_over(A1, 2, 9, 5)
            ended = await d.ending()
            assert (ended.error, ended.missing) == (None, ())
            assert ended.overlap == pytest.approx(2 / 3)
            assert d.holds(2, b"the tail")
            await until(lambda: p.handed == [A1])
            assert at_rest(p, d)

    asyncio.run(story())


def test_missing_blocks_are_named_and_the_rest_arrives(link: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with Pair(link, tmp_path) as (p, d):
            p.put(1, 1)
            d.store.start_pull(d.spec(p, [0, 1, 2]))
            ended = await d.ending()
            assert (ended.error, ended.missing) == (None, (0, 2))
            assert d.holds(1, name_of(1))
            await until(lambda: at_rest(p, d))

    asyncio.run(story())


# ---- ends ----


def test_a_deadline_ends_a_pull_in_time_and_releases_the_source(link: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with Pair(link, tmp_path) as (p, d):
            p.put(0, 0)
            d.store.start_pull(d.spec(p, [0, 1], wait=True, deadline_s=0.3))
            ended = await d.ending()
            assert type(ended.error) is TransferTimeout
            assert ended.missing == (1,)
            assert 0.3 <= ended.seconds < 1.0
            await until(lambda: at_rest(p, d))

    asyncio.run(story())


def test_after_an_abort_in_mid_transfer_no_byte_is_written(link: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with Pair(link, tmp_path) as (p, d):
            for number in range(60):
                p.put(number, number)
            d.store.start_pull(d.spec(p, range(60)))
            await until(lambda: bool(d.arrived))
            d.store.abort_pull(d.arrived[0][0], "cancelled")
            ended = await d.ending()
            for slot in range(60):
                d.device.slot(slot)[:] = 0
            await asyncio.sleep(0.1)
            assert not any(d.device.slot(slot).any() for slot in range(60))
            assert ended.error is None or type(ended.error) is TransferAborted
            await until(lambda: at_rest(p, d))

    asyncio.run(story())


def test_a_withdrawal_in_mid_transfer_aborts_the_reader(link: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with Pair(link, tmp_path) as (p, d):
            for number in range(40):
                p.put(number, number)
            d.store.start_pull(d.spec(p, [*range(40), None], wait=True))
            await until(lambda: bool(d.arrived))
            p.store.withdraw(A1)
            ended = await d.ending()
            assert type(ended.error) is TransferAborted
            assert "the attempt was withdrawn" in str(ended.error)
            await until(lambda: p.withdrawn == [A1])
            assert at_rest(p, d)

    asyncio.run(story())


def test_bytes_that_are_not_what_the_name_says_are_refused_and_the_pair_goes_on(link: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with Pair(link, tmp_path) as (p, d):
            p.put(0, 0)
            d.store.start_pull(d.spec(p, [0], transfer="before"))
            assert (await d.ending("before")).error is None
            p.device.slot(0)[12345] ^= 1  # the checksum of this content is known already
            d.store.start_pull(d.spec(p, [0], transfer="after"))
            ended = await d.ending("after")
            assert type(ended.error) is IntegrityError
            assert ended.missing == (0,)
            p.put(1, 1)
            d.store.start_pull(d.spec(p, [1], transfer="next"))
            assert (await d.ending("next")).error is None
            await until(lambda: at_rest(p, d))

    asyncio.run(story())


def test_a_node_of_another_model_is_refused_by_the_fields_name(link: str, tmp_path: Path) -> None:
    async def story() -> None:
        other = replace(FINGERPRINT, num_layers=3)
        net = MemoryNet()
        async with (
            running_node("p", tmp_path, link=link, net=net, num_slots=2) as p,
            running_node("d", tmp_path, link=link, net=net, num_slots=2, fingerprint=other) as d,
        ):
            d.store.start_pull(d.spec(p, [0]))
            error = (await d.ending()).error
            assert type(error) is PeerLost
            assert "refused: fingerprint: num_layers: 2 here, 3 there" in str(error)

    asyncio.run(story())


def test_a_stale_epoch_is_refused_and_the_restarted_peer_is_found(link: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with Pair(link, tmp_path) as (p, d):
            p.put(0, 0)
            d.store.start_pull(replace(d.spec(p, [0]), source_epoch="e0"))
            error = (await d.ending()).error
            assert type(error) is PeerLost
            assert "stale epoch: e0 was asked for, this is e1" in str(error)
            d.store.start_pull(d.spec(p, [0], transfer="t2"))
            assert (await d.ending("t2")).error is None

    asyncio.run(story())


def test_a_source_that_is_not_there_is_a_typed_error_at_once(link: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with running_node("d", tmp_path, link=link, net=MemoryNet(), num_slots=2) as d:
            spec = replace(d.spec(d, [0]), source="p", source_address=f"unix:{tmp_path}/nobody.sock")
            d.store.start_pull(spec)
            ended = await d.ending()
            assert type(ended.error) is PeerLost
            assert ended.seconds < 2.0

    asyncio.run(story())


def test_a_closed_store_ends_its_pulls(link: str, tmp_path: Path) -> None:
    async def story() -> None:
        async with Pair(link, tmp_path) as (p, d):
            p.put(0, 0)
            d.store.start_pull(d.spec(p, [0, 1], wait=True))
            await until(lambda: bool(d.arrived))
            await d.store.close()
            assert type(d.ended[0].error) is PeerLost
            await until(lambda: at_rest(p))

    asyncio.run(story())


# ---- faults of the in-process link ----


@pytest.mark.parametrize(
    ("faults", "kind"),
    [
        (Faults(fail_at=3), TransferError),
        (Faults(drop_at=3), TransferError),
        (Faults(corrupt_at=3), IntegrityError),
        (Faults(stall_at=3), TransferTimeout),
    ],
)
def test_every_fault_of_the_link_is_a_typed_error_in_time(faults: Faults, kind: type, tmp_path: Path) -> None:
    async def story() -> None:
        pair = Pair("memory", tmp_path)
        async with pair as (p, d):
            for number in range(8):
                p.put(number, number)
            pair.net.faults[p.node_id] = faults
            d.store.start_pull(d.spec(p, range(8)))
            ended = await d.ending()
            assert isinstance(ended.error, kind)
            assert ended.seconds < QUICK.link_timeout_s + QUICK.abort_timeout_s + 0.5
            await until(lambda: at_rest(p, d))
            del pair.net.faults[p.node_id]
            d.store.start_pull(d.spec(p, range(8), transfer="again"))
            assert (await d.ending("again")).error is None

    asyncio.run(story())


def test_a_slow_link_is_only_slow(tmp_path: Path) -> None:
    async def story() -> None:
        pair = Pair("memory", tmp_path)
        async with pair as (p, d):
            for number in range(4):
                p.put(number, number)
            pair.net.faults[p.node_id] = Faults(delay_s=0.05)
            d.store.start_pull(d.spec(p, range(4)))
            ended = await d.ending()
            assert ended.error is None
            assert ended.seconds >= 0.2

    asyncio.run(story())


# ---- kill -9 and SIGSTOP, in processes ----


KINDS = {kind.__name__ for kind in (PeerLost, TransferTimeout, TransferAborted, IntegrityError)}
"""What a sink that was stopped may find when it goes on: it depends on where in the protocol it was stopped."""


@pytest.fixture(params=["shm", "torch"])
def process_link(request: pytest.FixtureRequest) -> str:
    load_links([request.param])
    return str(request.param)


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.cluster
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_source_that_dies_or_stalls_is_a_typed_error_and_its_successor_is_found(
    process_link: str, signal_number: int, tmp_path: Path
) -> None:
    async def story() -> None:
        async with running_node("d", tmp_path, link=process_link, num_slots=65, limits=PROCESS_LIMITS) as d:
            for epoch in ("e1", "e2"):
                child = Child("source", process_link, str(tmp_path), epoch)
                try:
                    await one_death(d, await child.line("ready"), child, epoch)
                finally:
                    child.end()
                if epoch == "e1":
                    fds = num_fds()
            assert num_fds() <= fds

    async def one_death(d: Node, address: str, child: Child, epoch: str) -> None:
        d.arrived.clear()
        d.store.start_pull(replace(endless(address, epoch), source_epoch=Epoch(epoch)))
        await until(lambda: bool(d.arrived))
        child.signal(signal_number)
        begin_s = time.monotonic()
        ended = await d.ending(epoch)
        assert type(ended.error) in (PeerLost, TransferTimeout)
        assert NUM_BLOCKS in ended.missing
        assert time.monotonic() - begin_s < 3.5  # silence 1.5 s, or the link's second and the abort's half
        for slot in set(range(NUM_BLOCKS)) - set(ended.missing):
            assert d.holds(slot, name_of(slot))
        await until(d.store.quiescent)

    asyncio.run(story())


@pytest.mark.cluster
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sink_that_dies_or_stalls_leaves_no_pin_behind(process_link: str, signal_number: int, tmp_path: Path) -> None:
    async def story(source: Node, child: Child, attempt: AttemptId) -> None:
        await child.line("arrived")
        child.signal(signal_number)
        begin_s = time.monotonic()
        await until(lambda: at_rest(source))
        assert time.monotonic() - begin_s < 3.5
        source.store.withdraw(attempt)
        assert source.withdrawn == [attempt]
        if signal_number == signal.SIGSTOP:
            child.signal(signal.SIGCONT)
            assert await child.line("ended") in KINDS

    async def main() -> None:
        async with running_node("p", tmp_path, link=process_link, num_slots=64, limits=PROCESS_LIMITS) as p:
            for number in range(NUM_BLOCKS):
                p.put(number, number)
            child = Child("sink", process_link, str(tmp_path), "s1", p.address)
            try:
                await story(p, child, AttemptId(RequestId("s1"), 1))
            finally:
                child.end()

    asyncio.run(main())
