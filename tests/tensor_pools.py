"""What a tensor pool must do, told once: on "cpu" wherever the tests run, on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from engine.torch_engine import TorchEngine
from halfmoon.errors import IntegrityError
from halfmoon.types import Tier
from kv_store.arena_tensor import TensorArena
from kv_store.values import Move, Place
from tests.kv_nodes import content_of, name_of, running_node, until
from tests.tiny_models import Bench, prompt


def tensor_bench(engine: TorchEngine, device: str, num_slots: int = 64) -> tuple[Bench, TensorArena]:
    """A bench whose engine computes on an arena's tensor, poisoned with NaN as the bench's own pool is."""
    bench = Bench(engine, num_slots)
    arena = TensorArena(device=device, num_slots=num_slots, block_bytes=engine.model.layout.block_bytes)
    arena.tensor.fill_(0xFF)
    engine.bind(arena.tensor, num_slots)
    return bench, arena


def chat(bench: Bench) -> torch.Tensor:
    """Logits of a prompt in three chunks and two decode steps; its blocks lie in slots 7, 2, 5, 9."""
    return bench.chunked(prompt(50), [16, 33, 48, 49, 50], [7, 2, 5, 9])


async def blocks_survive_the_way_to_dram_and_back(device: str, folder: Path) -> None:
    async with running_node("p", folder, pool=device) as p:
        for number in range(4):
            p.put(number, number)
        device_to_dram = [Move(source=place(Tier.DEVICE, n), target=place(Tier.DRAM, 9 - n)) for n in range(4)]
        await p.store.perform(device_to_dram)
        assert all((p.dram.slot(9 - n) == content_of(name_of(n))).all() for n in range(4))
        for number in range(4):
            p.device.copy_in(number, np.zeros(p.device.block_bytes, np.uint8))
        await p.store.perform([Move(source=move.target, target=place(Tier.DEVICE, 20 + n)) for n, move in
                               enumerate(device_to_dram)])  # fmt: skip
        await p.store.perform([Move(source=place(Tier.DEVICE, 20), target=place(Tier.DEVICE, 0))])
        assert all(p.holds(20 + n, name_of(n)) for n in range(4))
        assert p.holds(0, name_of(0))


async def blocks_are_pulled(folder: Path, *, source: str, sink: str, setting: str, links: tuple[str, str]) -> None:
    """Pools `source` and `sink`, "shared" or a tensor's device; the links of the source's DEVICE and DRAM tiers."""
    async with (
        running_node("p", folder, link=setting, pool=source) as p,
        running_node("d", folder, link=setting, pool=sink) as d,
    ):
        for tier, link in zip((Tier.DEVICE, Tier.DRAM), links, strict=True):
            numbers = range(10) if tier is Tier.DEVICE else range(10, 20)
            for number in numbers:
                p.put(number, number, tier)
            d.store.start_pull(d.spec(p, numbers, transfer=tier.name, first_slot=numbers[0]))
            ended = await d.ending(tier.name)
            assert (ended.error, ended.missing, ended.link) == (None, (), link)
        assert all(d.holds(number, name_of(number)) for number in range(20))
        await until(lambda: p.store.quiescent() and d.store.quiescent() and not p.shelf.pins)


async def other_bytes_than_the_name_says_are_refused(folder: Path, *, source: str, sink: str, link: str) -> None:
    async with (
        running_node("p", folder, link=link, pool=source) as p,
        running_node("d", folder, link=link, pool=sink) as d,
    ):
        p.put(0, 0)
        d.store.start_pull(d.spec(p, [0], transfer="before"))
        assert (await d.ending("before")).error is None
        damaged = p.device.bytes_of(0).copy()
        damaged[12345] ^= 1
        p.device.copy_in(0, damaged)
        d.store.start_pull(d.spec(p, [0], transfer="after", first_slot=1))
        ended = await d.ending("after")
        assert type(ended.error) is IntegrityError
        assert ended.missing == (0,)


def place(tier: Tier, slot: int) -> Place:
    return Place(tier=tier, slot=slot, generation=1)
