"""`make soak`: 64 concurrent streams on 2P2D with pools too small for them; every token equal to the undisturbed run.

Two prefill and two decode workers share this host's cores: this shows correctness, not speed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from halfmoon.client import AsyncClient, Result
from tests.clusters import at_rest, run, running, until

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(3600)]

BLOCK = 16
MODEL = "smollm2-135m-instruct"
TINY_POOLS = {
    "bfloat16": {"device_mib": 64, "dram_mib": 400},  # 182 slots a worker; the longest request alone needs 110
    "float32": {"device_mib": 128, "dram_mib": 800},
}
GAP_MIN = 1e-4  # Hugging Face's top two logits in fp32 nearer than this are a tie


@dataclass(frozen=True)
class Case:
    tokens: tuple[int, ...]
    options: dict[str, Any]


def cases(seed: int) -> list[Case]:
    """64 requests: prompts of 1 to 1,500 tokens, the block's borders among them; outputs 32 to 256; half are seeded."""
    rng = random.Random(seed)
    lengths = [1, BLOCK - 1, BLOCK, BLOCK + 1, 1500] + [int(1500 * rng.random() ** 2) + 1 for _ in range(59)]
    made = []
    for number, length in enumerate(lengths):
        sampling = {"temperature": 0.0} if number % 2 else {"temperature": 0.8, "top_p": 0.95, "seed": number}
        options = {**sampling, "max_tokens": rng.randint(32, 256), "ignore_eos": True}
        made.append(Case(tuple(rng.randrange(1000, 40000) for _ in range(length)), options))
    return made


async def ask(client: AsyncClient, case: Case) -> Result:
    return await client.complete(list(case.tokens), timeout_s=3000, **case.options)


async def alone(dtype: str, todo: Sequence[Case]) -> list[tuple[int, ...]]:
    """What one coupled worker gives, one request at a time."""
    async with running(model=MODEL, dtype=dtype, prefill=0, decode=0, coupled=1, pin=False) as (_, client):
        return [(await ask(client, case)).token_ids for case in todo]


async def truth_of(dtype: str, todo: Sequence[Case]) -> list[tuple[int, ...]]:
    """Two clusters of one coupled worker, each alone with its half of the requests."""
    halves = await asyncio.gather(alone(dtype, todo[::2]), alone(dtype, todo[1::2]))
    return [halves[number % 2][number // 2] for number in range(len(todo))]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_64_streams_equal_the_undisturbed_ones(dtype: str) -> None:
    async def story() -> None:
        todo = cases(3)
        truth = await truth_of(dtype, todo)
        async with running(model=MODEL, dtype=dtype, prefill=2, decode=2, **TINY_POOLS[dtype]) as (_, client):
            tasks = [asyncio.create_task(ask(client, case)) for case in todo]
            await until(client, lambda v: v.requests_open == len(todo) and all(n.held_blocks for n in v.nodes))
            results = await asyncio.gather(*tasks)
            view = await until(client, at_rest, timeout_s=30)
        wrong = [i for i, (r, t) in enumerate(zip(results, truth, strict=True)) if r.token_ids != t]
        assert not wrong, f"streams {wrong} differ from the same request served alone"
        assert sum(r.usage.preemptions for r in results) >= 10
        pairs = {(r.usage.prefill_node, r.usage.decode_node) for r in results}
        assert len(pairs) == 4, f"only {pairs} served; the cluster counted {view.counters}"
        assert all(r.usage.decode_prefilled_tokens == 0 for r in results)
        assert all(node.invariant_checks > 0 for node in view.nodes)
        if dtype == "float32":
            check_against_transformers(todo, truth)

    run(story(), timeout_s=3500)


def check_against_transformers(todo: Sequence[Case], truth: Sequence[tuple[int, ...]]) -> None:
    """Teacher-forced: at every greedy position whose top two logits differ by more than GAP_MIN, the same token."""
    import torch
    from transformers import AutoModelForCausalLM

    from engine.default_model import default_model_directory

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(default_model_directory(), dtype=torch.float32)
    compared = 0
    for case, answer in zip(todo, truth, strict=True):
        if case.options["temperature"] > 0:
            continue
        ids = torch.tensor([[*case.tokens, *answer]])
        with torch.inference_mode():
            logits = model(ids).logits[0, len(case.tokens) - 1 : -1]
        top = logits.topk(2).values
        clear = (top[:, 0] - top[:, 1]) > GAP_MIN
        same = logits.argmax(-1) == torch.tensor(answer)
        assert bool(same[clear].all()), f"a prompt of {len(case.tokens)} tokens differs from transformers"
        compared += int(clear.sum())
    assert compared > 1000
