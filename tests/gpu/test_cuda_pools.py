"""Blocks in GPU memory: to DRAM and back, and between nodes over every link that serves them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from halfmoon.errors import PeerLost, TransferTimeout
from kv_store.arena_pinned import PinnedDramArena
from kv_store.arena_tensor import name_of_gpu
from kv_store.pairing import load_links
from node.main import NCCL
from service import settings
from tests import tensor_pools
from tests.kv_child import NUM_BLOCKS, endless
from tests.kv_children import Child
from tests.kv_nodes import PROCESS_LIMITS, name_of, running_node, until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
GPU = "cuda:0"
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL refuses two ranks on one GPU: needs two GPUs")


@pytest.fixture(autouse=True)
def _loaded() -> None:
    settings.export(**NCCL)
    load_links(["torch"])


def test_blocks_survive_the_way_to_dram_and_back(tmp_path: Path) -> None:
    asyncio.run(tensor_pools.blocks_survive_the_way_to_dram_and_back(GPU, tmp_path))


def test_dram_is_pinned_until_it_is_closed() -> None:
    arena = PinnedDramArena(device=GPU, num_slots=64, block_bytes=1 << 20)
    assert torch.from_numpy(arena.slot(63)).is_pinned()
    arena.close()
    arena.close()


@pytest.mark.parametrize(
    ("source", "sink", "setting", "links"),
    [
        (GPU, GPU, "auto", ("torch", "shm")),  # two workers on one GPU
        (GPU, "shared", "auto", ("torch", "shm")),
        ("shared", GPU, "auto", ("shm", "shm")),
        ("shared", GPU, "torch", ("torch", "torch")),
    ],
)
def test_blocks_are_pulled(source: str, sink: str, setting: str, links: tuple[str, str], tmp_path: Path) -> None:
    asyncio.run(tensor_pools.blocks_are_pulled(tmp_path, source=source, sink=sink, setting=setting, links=links))


@pytest.mark.parametrize(("source", "link"), [(GPU, "torch"), ("shared", "shm")])
def test_other_bytes_than_the_name_says_are_refused(source: str, link: str, tmp_path: Path) -> None:
    story = tensor_pools.other_bytes_than_the_name_says_are_refused(tmp_path, source=source, sink=GPU, link=link)
    asyncio.run(story)


@two_gpus
def test_gpus_have_names_of_their_own() -> None:
    assert name_of_gpu("cuda:0") != name_of_gpu("cuda:1")


@two_gpus
def test_nccl_serves_two_gpus(tmp_path: Path) -> None:
    links = ("nccl", "shm")
    asyncio.run(tensor_pools.blocks_are_pulled(tmp_path, source="cuda:1", sink=GPU, setting="auto", links=links))


@two_gpus
@pytest.mark.cluster
def test_nccl_serves_two_processes_and_the_death_of_one_is_a_typed_error(tmp_path: Path) -> None:
    async def story(child: Child) -> None:
        address = await child.line("ready")
        async with running_node(
            "d", tmp_path, link="auto", pool=GPU, num_slots=NUM_BLOCKS + 1, limits=PROCESS_LIMITS
        ) as d:
            d.store.start_pull(endless(address, "e1"))
            arrived: set[int] = set()
            while len(arrived) < NUM_BLOCKS:
                await until(lambda: bool(d.arrived), timeout_s=30.0)
                arrived |= set(d.arrived.pop()[1])
            assert all(d.holds(slot, name_of(slot)) for slot in range(NUM_BLOCKS))
            child.end()
            ended = await d.ending("e1")
            assert type(ended.error) in (PeerLost, TransferTimeout)
            assert ended.missing == (NUM_BLOCKS,)
            await until(d.store.quiescent)

    child = Child("source", "auto@cuda:1", str(tmp_path), "e1")
    try:
        asyncio.run(story(child))
    finally:
        child.end()
