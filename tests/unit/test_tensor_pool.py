"""A pool that is a tensor: the path of GPU workers, walked on the CPU; and the settings that choose it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.plan import ClusterConfig, worker_specs
from engine.load import load_engine
from engine.protocol import KvLayout
from engine.torch_engine import TorchEngine
from halfmoon.errors import ConfigError
from halfmoon.types import Epoch, NodeId, Tier
from kv_store.arena_pinned import PinnedDramArena
from kv_store.arena_tensor import TensorArena
from kv_store.link import choose_link
from kv_store.pairing import Pairing, load_links
from kv_store.wire import Begin
from node import warm
from node.config import NodeConfig
from node.main import NCCL, prepare_host
from node.pools import make_pools
from tests import tensor_pools
from tests.kv_nodes import FINGERPRINT
from tests.tiny_models import bench, saved, tiny_model

GPU, OTHER = "cuda/one", "cuda/two"
ID = NodeId("p0")


@pytest.fixture(autouse=True)
def _loaded() -> None:
    load_links(["torch"])


# ---- the engine ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_gives_the_same_bits_on_a_tensor_as_on_host_memory(dtype: str, tmp_path: Path) -> None:
    directory = saved(tiny_model("qwen3, wide heads"), tmp_path)
    on_memory = bench(directory, dtype)
    expected = tensor_pools.chat(on_memory)
    engine = load_engine(str(directory), dtype=dtype)
    assert isinstance(engine, TorchEngine)
    on_tensor, arena = tensor_pools.tensor_bench(engine, "cpu")
    assert torch.equal(tensor_pools.chat(on_tensor), expected)
    pool = np.frombuffer(on_memory.pool, np.uint8).reshape(arena.num_slots, arena.block_bytes)
    assert (arena.tensor.numpy() == pool).all()  # in place: what the store would move is what the engine wrote


def test_a_pool_on_another_device_or_of_another_size_is_a_bug(tmp_path: Path) -> None:
    engine = bench(saved(tiny_model("smollm2"), tmp_path), "float32").engine
    size = engine.model.layout.block_bytes
    with pytest.raises(AssertionError, match="the pool is on meta, the engine on cpu"):
        engine.bind(torch.empty(4, size, dtype=torch.uint8, device="meta"), 4)
    with pytest.raises(AssertionError, match="size"):
        engine.bind(torch.empty(3, size, dtype=torch.uint8), 4)
    with pytest.raises(AssertionError, match="writable"):
        engine.bind(memoryview(bytes(4 * size)), 4)


# ---- the store ----


def test_blocks_survive_the_way_to_dram_and_back(tmp_path: Path) -> None:
    asyncio.run(tensor_pools.blocks_survive_the_way_to_dram_and_back("cpu", tmp_path))


@pytest.mark.parametrize(
    ("source", "sink", "setting", "links"),
    [
        ("cpu", "cpu", "torch", ("torch", "torch")),  # staged at both ends
        ("cpu", "shared", "torch", ("torch", "torch")),
        ("shared", "cpu", "torch", ("torch", "torch")),
        ("shared", "cpu", "auto", ("shm", "shm")),
        ("cpu", "cpu", "auto", ("torch", "shm")),  # as two workers on one GPU: two links in one pair
    ],
)
def test_blocks_are_pulled(source: str, sink: str, setting: str, links: tuple[str, str], tmp_path: Path) -> None:
    asyncio.run(tensor_pools.blocks_are_pulled(tmp_path, source=source, sink=sink, setting=setting, links=links))


@pytest.mark.parametrize(("source", "link"), [("cpu", "torch"), ("shared", "shm")])
def test_other_bytes_than_the_name_says_are_refused(source: str, link: str, tmp_path: Path) -> None:
    story = tensor_pools.other_bytes_than_the_name_says_are_refused(tmp_path, source=source, sink="cpu", link=link)
    asyncio.run(story)


def test_a_pool_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match=r"config node\.device_blocks: got \d+; expected at most \d+ blocks"):
        TensorArena(device="cpu", num_slots=1 << 40, block_bytes=1 << 20, key="node.device_blocks")


def test_dram_that_cannot_be_pinned_serves_all_the_same() -> None:
    arena = PinnedDramArena(device="cuda:0", num_slots=3, block_bytes=4096)
    arena.copy_in(1, np.arange(4096, dtype=np.uint8))
    assert arena.bytes_of(1)[255] == 255
    arena.close()
    arena.close()


# ---- which link ----


@pytest.mark.parametrize(
    ("source", "sink", "same_host", "name"),
    [
        ("cpu", "cpu", True, "shm"),
        ("cpu", "cpu", False, "torch"),
        ("cpu", GPU, True, "shm"),
        ("cpu", GPU, False, "torch"),
        (GPU, "cpu", False, "torch"),
        (GPU, OTHER, False, "nccl"),
        (GPU, GPU, False, "torch"),  # NCCL refuses two ranks on one GPU
    ],
)
def test_every_pair_of_memories_has_a_link(source: str, sink: str, same_host: bool, name: str) -> None:
    chosen = choose_link(setting="auto", same_host=same_host, source_device=source, sink_device=sink)
    assert chosen.name == name


@pytest.mark.parametrize(
    ("setting", "source", "sink"), [("nccl", GPU, GPU), ("nccl", "cpu", GPU), ("shm", GPU, GPU), ("memory", GPU, "cpu")]
)
def test_a_link_that_was_asked_for_and_cannot_serve_is_refused(setting: str, source: str, sink: str) -> None:
    with pytest.raises(ConfigError, match=f"config link: got '{setting}'; expected a link that serves {source}"):
        choose_link(setting=setting, same_host=False, source_device=source, sink_device=sink)


def test_a_peer_that_asks_for_nccl_out_of_host_memory_is_refused() -> None:
    dram = TensorArena(device="cpu", num_slots=1, block_bytes=64)
    pairing = Pairing(
        node_id=ID, epoch=Epoch("e"), arenas={Tier.DEVICE: dram}, link="auto",
        fingerprint=FINGERPRINT, host="127.0.0.1", net=None,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="got 'nccl'"):
        pairing.source_end(None, Begin(links=((Tier.DEVICE, "nccl"),)), lambda entry: None)  # type: ignore[arg-type]


# ---- the worker process ----


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:x", "cpu:0", ""])
def test_a_device_that_is_none_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=r'config node\.device: .* expected "cpu", or "cuda:N"'):
        NodeConfig(node_id=ID, device=device)


@pytest.mark.parametrize("model", ["fake", "smollm2-135m-instruct"])
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_loaded(model: str) -> None:
    with pytest.raises(ConfigError, match=r"config node\.device: got 'cuda:99'; expected \"cpu\""):
        warm.load_engine(NodeConfig(node_id=ID, model=model, device="cuda:99"))


def test_a_gpu_worker_is_assembled_from_a_tensor_and_pinned_dram(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def on_cpu(**settings: Any) -> TensorArena:
        made.append(settings)
        return TensorArena(**(settings | {"device": "cpu"}))

    monkeypatch.setattr("kv_store.arena_tensor.TensorArena", on_cpu)
    monkeypatch.setattr("kv_store.arena_tensor.device_free_bytes", lambda device: 64 << 20)
    layout = KvLayout(num_layers=1, num_kv_heads=1, head_dim=32, block_size=16, element_bytes=2)
    pools = make_pools(NodeConfig(node_id=ID, device="cuda:3", dram_blocks=5), layout)
    blocks = (64 << 20) // 8 // layout.block_bytes  # an eighth of what is free on the GPU
    assert made == [{"device": "cuda:3", "num_slots": blocks, "block_bytes": 2048, "key": "node.device_blocks"}]
    assert type(pools.arenas[Tier.DRAM]) is PinnedDramArena
    assert (pools.num_slots(Tier.DEVICE), pools.num_slots(Tier.DRAM)) == (blocks, 5)
    pools.close()


def test_a_gpu_workers_process_outlives_a_transfer_that_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: dict[str, str] = {}
    monkeypatch.setattr("node.main.settings.export", exported.update)
    prepare_host(NodeConfig(node_id=ID))
    assert not exported.keys() & NCCL.keys()
    prepare_host(NodeConfig(node_id=ID, device="cuda:0"))
    assert exported.keys() >= NCCL.keys()


def test_devices_are_dealt_out_in_turn() -> None:
    config = ClusterConfig(prefill=1, decode=2, devices=("cuda:0", "cuda:1"))
    specs = worker_specs(config, "/tmp/run", "unix:///r", [0])
    assert [spec.settings["node"]["device"] for spec in specs] == ["cuda:0", "cuda:1", "cuda:0"]
