"""oneDNN's products are kept to row counts at which a row keeps its bits, found by trying."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine import build, prepacked
from engine.operators import CpuOperators, PanelLinear


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fickle(x: Tensor, small: int, large: int) -> Tensor:
    """A product whose bits change below `small` rows and above `large` ones."""
    return x * (1.0 if small <= len(x) <= large else 1.0 + 2**-20)


@pytest.mark.parametrize(
    ("small", "large", "bounds"),
    [(1, 512, (1, 512)), (2, 512, (2, 512)), (1, 32, (1, 32)), (5, 40, (8, 32)), (20, 30, None), (1, 20, None)],
)
def test_the_probe_finds_the_rows_that_keep_their_bits(small: int, large: int, bounds: tuple[int, int] | None) -> None:
    assert prepacked.invariant_rows(lambda x: fickle(x, small, large), 8, torch.float32) == bounds


def test_tiles_stay_within_the_bounds() -> None:
    x, sizes = random(100, 8), []

    def product(tile: Tensor) -> Tensor:
        sizes.append(len(tile))
        return fickle(tile, 8, 32)

    assert torch.equal(prepacked.in_tiles(product, x, 8, 32), x)
    assert sizes == [32, 32, 32, 8]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("shape", [(96, 576), (576, 200), (2000, 64)])
def test_prepacked_rows_alone_and_in_company(shape: tuple[int, int]) -> None:
    """In fp32, which oneDNN runs everywhere: right, and the same bits at every count; or handed to the panels."""
    try:
        operators = CpuOperators(onednn=True)
    except build.BuildError as error:
        pytest.skip(f"no C++ operators here: {error}")
    weight, bias = random(*shape), random(shape[0], seed=1)
    packed, x = operators.pack_linear(weight, bias), random(530, shape[1], seed=2)
    assert isinstance(packed, prepacked.PrepackedLinear | PanelLinear)
    whole = operators.linear(x, packed)
    torch.testing.assert_close(whole, x @ weight.T + bias, rtol=1e-4, atol=1e-4)
    for count in (1, 2, 5, 31, 33, 70, 257, 530):
        assert torch.equal(operators.linear(x[:count], packed), whole[:count])
