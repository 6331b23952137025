"""The engine on a GPU against itself on the CPU: the same weights, the same chunks, the pool a tensor of an arena."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.load import load_engine
from engine.protocol import Slice
from engine.torch_engine import TorchEngine
from tests import tensor_pools
from tests.tiny_models import VARIANTS, bench, prompt, saved, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
GPU = "cuda:0"
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Of logits whose spread is about 10: sums in another order; in bfloat16 rounded to 8 bits at every operator."""


def on_gpu(directory: Path, dtype: str) -> TorchEngine:
    engine = load_engine(str(directory), dtype=dtype, device=GPU)
    assert isinstance(engine, TorchEngine)
    return engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_are_those_of_the_cpu(variant: str, dtype: str, tmp_path: Path) -> None:
    directory = saved(tiny_model(variant), tmp_path)
    expected = tensor_pools.chat(bench(directory, dtype))
    found = tensor_pools.chat(tensor_pools.tensor_bench(on_gpu(directory, dtype), GPU)[0])
    assert found.device == torch.device(GPU)
    torch.testing.assert_close(found.cpu(), expected, atol=TOLERANCE[dtype], rtol=0.0)


def test_kv_lies_in_the_arena_when_forward_returns(tmp_path: Path) -> None:
    """A chunk that samples nothing gives the host no reason to wait; the arena's own stream reads it at once."""
    directory = saved(tiny_model("llama3, tied"), tmp_path)
    host = bench(directory, "float32")
    bound, arena = tensor_pools.tensor_bench(on_gpu(directory, "float32"), GPU)
    chunk = Slice(token_ids=prompt(32), start=0, slots=(3, 1))
    for engine in (host.engine, bound.engine):
        assert engine.forward([chunk]) == [None]
    size = arena.block_bytes
    for slot in (3, 1):
        expected = torch.frombuffer(host.pool, dtype=torch.float32, count=size // 4, offset=slot * size)
        found = torch.from_numpy(arena.bytes_of(slot)).view(torch.float32)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
