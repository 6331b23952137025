"""A prefill and a decode worker on GPUs, as processes: the tokens of the CPU, over the link that the GPUs allow."""

from __future__ import annotations

import asyncio

import pytest
import torch

from engine.default_model import default_model_directory
from halfmoon.client import AsyncClient
from tests.clusters import at_rest, run, running, until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.cluster,
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
MODEL = {"model": "smollm2-135m-instruct", "dtype": "float32", "device_mib": 600, "dram_mib": 300}
PROMPTS = [[(7 * i + 13 * n + i * i) % 40_000 + 100 for i in range(n)] for n in (5, 64, 700)]


async def answers(client: AsyncClient, link: str | None) -> list[tuple[int, ...]]:
    asked = (client.complete(p, max_tokens=32, temperature=0.0, ignore_eos=True) for p in PROMPTS)
    results = await asyncio.gather(*asked)
    assert link is None or {result.usage.link for result in results} == {link}
    assert {result.usage.attempts for result in results} == {1}
    await until(client, at_rest)
    return [result.token_ids for result in results]


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_one_prefill_one_decode(num_gpus: int) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip("NCCL refuses two ranks on one GPU: needs two GPUs")
    default_model_directory()
    devices = tuple(f"cuda:{n}" for n in range(num_gpus))

    async def story() -> None:
        async with running(prefill=0, decode=0, coupled=1, **MODEL) as (_, client):
            expected = await answers(client, None)
        async with running(devices=devices, **MODEL) as (_, client):
            assert await answers(client, "nccl" if num_gpus == 2 else "torch") == expected

    run(story(), timeout_s=500.0)
