"""Batch invariance (DESIGN 5.7), bit for bit: a row's result whatever its company, chunking or number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import build
from engine.operators import CpuOperators

DTYPES = [torch.float32, torch.bfloat16]
HEADS, KV_HEADS, DIM, BLOCK, LAYERS = 6, 2, 64, 16, 2
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def cpp() -> CpuOperators:
    try:
        return CpuOperators()
    except build.BuildError as error:
        pytest.skip(f"no C++ operators here: {error}")


@pytest.fixture(autouse=True)
def one_thread_again() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_features", "out_features"), [(576, 200), (1100, 72), (65, 33)])
def test_linear_rows_alone_and_in_company(
    cpp: CpuOperators, dtype: torch.dtype, in_features: int, out_features: int
) -> None:
    packed = cpp.pack_linear(
        random(out_features, in_features, dtype=dtype, seed=0), random(out_features, dtype=dtype, seed=1)
    )
    x = random(200, in_features, dtype=dtype, seed=2)
    torch.set_num_threads(1)
    alone = torch.cat([cpp.linear(row, packed) for row in x.split(1)])
    torch.set_num_threads(2)
    for num_rows in [*range(1, 71), 97, 200]:
        for first in {0, 3, 200 - num_rows} & set(range(201 - num_rows)):
            rows = slice(first, first + num_rows)
            assert torch.equal(cpp.linear(x[rows], packed), alone[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_rows_alone_and_in_company(cpp: CpuOperators, dtype: torch.dtype) -> None:
    x, residual = random(70, 100, dtype=dtype, seed=0), random(70, 100, dtype=dtype, seed=1)
    weight = random(100, dtype=dtype, seed=2)
    for num_rows in (1, 2, 7, 70):
        for operate in (
            lambda i: cpp.rms_norm(x[i], weight, 1e-5),
            lambda i: cpp.add_rms_norm(x[i], residual[i], weight, 1e-5)[0],
            lambda i: cpp.silu_mul(x[i]),
        ):
            parts = [operate(slice(i, min(i + num_rows, 70))) for i in range(0, 70, num_rows)]
            assert torch.equal(torch.cat(parts), operate(slice(0, 70)))


class Scene:
    """Sequences of random lengths in one pool; attention over any cut of them into passes."""

    def __init__(self, lengths: list[int], dtype: torch.dtype, seed: int) -> None:
        blocks = [-(-length // BLOCK) for length in lengths]
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(seed)).to(torch.int32)
        self.tables = list(order.split(blocks))
        self.pool = random(sum(blocks), KV_HEADS, LAYERS, 2, BLOCK, DIM, dtype=dtype, seed=seed)
        self.q = [random(length, HEADS, DIM, dtype=dtype, seed=seed + 1 + i) for i, length in enumerate(lengths)]

    def attend(self, cpp: CpuOperators, slices: list[tuple[int, int, int]], window: int) -> list[Tensor]:
        """Slices (sequence, start, end) in one pass -> their rows."""
        tables = torch.nn.utils.rnn.pad_sequence([self.tables[s] for s, _, _ in slices], batch_first=True)
        sizes = [end - start for _, start, end in slices]
        query_start = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
        starts = torch.tensor([start for _, start, _ in slices], dtype=torch.int32)
        q = torch.cat([self.q[s][start:end] for s, start, end in slices])
        out = cpp.paged_attention(q, self.pool, 1, tables.contiguous(), query_start, starts, DIM**-0.5, window)
        return list(out.split(sizes))


def cut(length: int, chunks: list[int]) -> list[tuple[int, int]]:
    """[0, length) in pieces of the given sizes, taken in turn."""
    bounds = [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] + chunks[len(bounds) % len(chunks)]))
    return list(itertools.pairwise(bounds))


@few
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    chunks=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    window=st.sampled_from([0, 0, 1, 5, 64, 100]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 16),
)
def test_attention_by_steps_by_chunks_and_whole(
    cpp: CpuOperators, lengths: list[int], chunks: list[int], window: int, dtype: torch.dtype, seed: int
) -> None:
    scene = Scene(lengths, dtype, seed)
    whole = scene.attend(cpp, [(s, 0, length) for s, length in enumerate(lengths)], window)
    for s, length in enumerate(lengths):
        pieces = cut(length, chunks)
        one_by_one = [scene.attend(cpp, [(s, *piece)], window)[0] for piece in pieces]
        assert torch.equal(torch.cat(one_by_one), whole[s])
    together = [(s, length - 1, length) for s, length in enumerate(lengths)]
    for s, row in enumerate(scene.attend(cpp, together, window)):
        assert torch.equal(row, whole[s][-1:])


def test_what_lies_beyond_a_sequence_changes_no_bit(cpp: CpuOperators) -> None:
    """The rest of the last block may hold anything, also what is not a number."""
    scene = Scene([75], torch.bfloat16, seed=9)
    before = scene.attend(cpp, [(0, 70, 75)], 0)[0]
    scene.pool[scene.tables[0][4].item(), :, :, :, 75 - 64 :] = float("nan")
    assert torch.equal(scene.attend(cpp, [(0, 70, 75)], 0)[0], before)


def test_the_number_of_threads_changes_no_bit(cpp: CpuOperators) -> None:
    scene = Scene([140, 77], torch.bfloat16, seed=4)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(torch.cat(scene.attend(cpp, [(0, 0, 140), (1, 0, 77)], 0)))
    assert torch.equal(*results)
