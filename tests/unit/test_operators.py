"""Pure torch is the oracle: each C++ operator against its twin, over even and odd shapes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import build, prepacked
from engine import operators as operators_module
from engine.operators import CpuOperators, select_operators
from engine.twins import Operators, TorchOperators
from halfmoon.errors import ConfigError

# Of the greatest element: twice and more what was seen over these shapes (fp32 2e-6; bf16 half a unit in the
# last place).
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3}
DTYPES = list(TOLERANCE)
# Where bf16 products run over pairs, attention's weights are rounded to bf16 too: 5e-3 was seen, over three keys.
ATTENTION_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
TWIN = TorchOperators()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cpp() -> CpuOperators:
    try:
        return CpuOperators()
    except build.BuildError as error:
        pytest.skip(f"no C++ operators here: {error}")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(ours: Tensor, twin: Tensor, tolerance: dict[torch.dtype, float] = TOLERANCE) -> None:
    assert ours.shape == twin.shape
    assert ours.dtype == twin.dtype
    difference = (ours.float() - twin.float()).abs().max()
    assert difference <= tolerance[twin.dtype] * twin.float().abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "in_features", "out_features"),
    [(1, 64, 48), (2, 1, 1), (3, 100, 33), (5, 576, 960), (7, 513, 17), (8, 1536, 576), (50, 1030, 31), (200, 72, 130)],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(
    cpp: CpuOperators, dtype: torch.dtype, rows: int, in_features: int, out_features: int, with_bias: bool
) -> None:
    weight = random(out_features, in_features, dtype=dtype)
    bias = random(out_features, dtype=dtype, seed=1) if with_bias else None
    x = random(rows, in_features, dtype=dtype, seed=2)
    packed = cpp.pack_linear(weight, bias)
    assert (packed.in_features, packed.out_features) == (in_features, out_features)
    assert_close(cpp.linear(x, packed), TWIN.linear(x, TWIN.pack_linear(weight, bias)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_reads_rows_of_a_wider_tensor(cpp: CpuOperators, dtype: torch.dtype) -> None:
    packed = cpp.pack_linear(random(40, 24, dtype=dtype), None)
    wide = random(9, 60, dtype=dtype, seed=1)
    assert torch.equal(cpp.linear(wide[:, 10:34], packed), cpp.linear(wide[:, 10:34].contiguous(), packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 8), (3, 576), (2, 100), (4, 13), (1, 4096)])
def test_norms(cpp: CpuOperators, dtype: torch.dtype, rows: int, dim: int) -> None:
    x, residual = random(rows, dim, dtype=dtype), random(rows, dim, dtype=dtype, seed=1)
    weight = random(dim, dtype=dtype, seed=2)
    assert_close(cpp.rms_norm(x, weight, 1e-5), TWIN.rms_norm(x, weight, 1e-5))
    normed, total = cpp.add_rms_norm(x, residual, weight, 1e-5)
    twin_normed, twin_total = TWIN.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, twin_total)
    assert_close(normed, twin_normed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_also_far_from_zero(cpp: CpuOperators, dtype: torch.dtype) -> None:
    gate_up = random(3, 2 * 77, dtype=dtype) * 60
    assert_close(cpp.silu_mul(gate_up), TWIN.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 24), (2, 1, 10)])
def test_rope_rotates_slices_of_a_fused_projection(
    cpp: CpuOperators, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    angle = random(5, dim // 2, dtype=torch.float32)
    results = []
    for operators in (cpp, TWIN):
        fused = random(5, heads + 2 * kv_heads, dim, dtype=dtype, seed=1)
        operators.rope_(fused[:, :heads], fused[:, heads : heads + kv_heads], angle.cos(), angle.sin())
        results.append(fused)
    assert_close(*results)
    assert torch.equal(results[0][:, heads + kv_heads :], results[1][:, heads + kv_heads :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_touches_nothing_else(cpp: CpuOperators, dtype: torch.dtype) -> None:
    fused = random(4, 9, 24, dtype=dtype)
    slots, offsets = torch.tensor([5, 5, 0, 2]), torch.tensor([0, 15, 7, 3])
    pools = [random(6, 3, 2, 2, 16, 24, dtype=dtype, seed=1) for _ in range(2)]
    both: tuple[Operators, Operators] = (cpp, TWIN)
    for operators, pool in zip(both, pools, strict=True):
        operators.write_kv(pool, 1, fused[:, 3:6], fused[:, 6:], slots, offsets)
    assert torch.equal(*pools)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "window"),
    [
        (9, 3, 64, 16, 0),
        (6, 2, 64, 64, 70),
        (4, 4, 24, 5, 0),
        (8, 1, 8, 1, 3),
        (2, 2, 256, 32, 0),
        (64, 1, 40, 16, 1),
    ],
)
def test_paged_attention(
    cpp: CpuOperators, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, block_size: int, window: int
) -> None:
    """A decode step, a chunk in mid-prompt and a whole prompt side by side, over scattered slots."""
    starts, lengths = [151, 60, 0], [1, 30, 70]
    blocks = [-(-(start + length) // block_size) for start, length in zip(starts, lengths, strict=True)]
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    tables = torch.full((3, max(blocks)), 1 << 30, dtype=torch.int32)  # padding that must not be followed
    for row, own in zip(tables, order.split(blocks), strict=True):
        row[: len(own)] = own
    pool = random(sum(blocks), kv_heads, 2, 2, block_size, dim, dtype=dtype)
    q = random(sum(lengths), heads, dim, dtype=dtype, seed=2)
    query_start = torch.tensor([0, 1, 31, 101], dtype=torch.int32)
    where = (pool, 1, tables, query_start, torch.tensor(starts, dtype=torch.int32), dim**-0.5, window)
    assert_close(cpp.paged_attention(q, *where), TWIN.paged_attention(q, *where), ATTENTION_TOLERANCE)


def test_a_wrong_shape_or_slot_is_refused(cpp: CpuOperators) -> None:
    packed = cpp.pack_linear(random(8, 8, dtype=torch.float32), None)
    with pytest.raises(RuntimeError, match="expected 8 features, got 9"):
        cpp.linear(torch.zeros(1, 9), packed)
    with pytest.raises(RuntimeError, match="expected Float, got BFloat16"):
        cpp.linear(torch.zeros(1, 8), cpp.pack_linear(random(8, 8, dtype=torch.bfloat16), None))
    pool, row = torch.zeros(2, 1, 1, 2, 16, 8), torch.zeros(1, 1, 8)
    with pytest.raises(RuntimeError, match="slots: 2 of 2"):
        cpp.write_kv(pool, 0, row, row, torch.tensor([2]), torch.tensor([0]))
    ints = torch.tensor([[0, 9]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="slot 9 of 2"):
        cpp.paged_attention(row, pool, 0, *ints, torch.tensor([16], dtype=torch.int32), 1.0, 0)
    with pytest.raises(RuntimeError, match="3 blocks needed, 2 given"):
        cpp.paged_attention(row, pool, 0, *ints, torch.tensor([32], dtype=torch.int32), 1.0, 0)


def test_operators_release_the_gil(cpp: CpuOperators) -> None:
    """Another Python thread runs while a long product is under way."""
    packed = cpp.pack_linear(random(2048, 2048, dtype=torch.float32), None)
    x = random(512, 2048, dtype=torch.float32)
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    began = time.perf_counter()
    cpp.linear(x, packed)
    ended = time.perf_counter()
    done.set()
    ticker.join(timeout=10)
    inside = [at for at in ticks if began < at < ended]
    assert len(inside) >= 3


def test_the_choice_is_the_environments(cpp: CpuOperators, monkeypatch: pytest.MonkeyPatch) -> None:
    best = "cpp+onednn" if prepacked.runs_here(torch.bfloat16) else "cpp"
    for choice, name in (("", best), ("cpp", best), ("torch", "torch")):
        monkeypatch.setenv("HALFMOON_OPERATORS", choice)
        assert select_operators("cpu", torch.bfloat16).name == name
    monkeypatch.setenv("HALFMOON_OPERATORS", "fast")
    with pytest.raises(ConfigError, match="HALFMOON_OPERATORS"):
        select_operators("cpu", torch.bfloat16)


def test_without_a_compiler_the_twin_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("HALFMOON_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("HALFMOON_OPERATORS", raising=False)
    operators_module._cpp_or_twin.cache_clear()
    try:
        assert select_operators("cpu", torch.float32).name == "torch"
        assert select_operators("cpu", torch.float32).name == "torch"
        assert [record.message for record in caplog.records] == [
            "the C++ operators cannot run here, torch's own will (several times slower): "
            "no C++ compiler: no-such-compiler is not on the PATH"
        ]
        monkeypatch.setenv("HALFMOON_OPERATORS", "cpp")
        with pytest.raises(ConfigError, match="no-such-compiler"):
            select_operators("cpu", torch.float32)
    finally:
        operators_module._cpp_or_twin.cache_clear()
