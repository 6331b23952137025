"""Shell: linear layers prepacked by oneDNN, for CPUs with AMX, which our own product (tile.h) does not use.

There its products are several times as fast as multiply-adds on many rows. Its kernels depend on the number of rows,
so each shape of weight is probed when first packed: within which row counts does a row keep its bits? Products are run
in tiles of such counts; a shape without any goes back to the panels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.twins import PackedLinear

ROWS_MAX = (512, 32)  # candidates for the largest tile; seen on AMX: a language-model head changes bits from 33 rows on
ROWS_MIN = (1, 2, 4, 8, 16)  # candidates for the smallest; seen on AVX512: fp32 [576, 1536] differs at one row
PROBE_ROWS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    100,
    128,
    200,
    255,
    256,
    400,
    511,
    512,
)

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PrepackedLinear(PackedLinear):
    """A weight in oneDNN's own format. Products have rows_min to rows_max rows; fewer are padded."""

    weight: Tensor
    bias: Tensor | None
    rows_min: int
    rows_max: int


def runs_here(dtype: torch.dtype) -> bool:
    """Whether oneDNN is the better choice: bf16 on a CPU with AMX. With AVX512-BF16 alone our product is ahead."""
    return dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


def prepack(weight: Tensor, bias: Tensor | None) -> PrepackedLinear | None:
    """None where no tile of rows keeps its bits."""
    bounds = _bounds(weight.shape[0], weight.shape[1], weight.dtype, torch.get_num_threads())
    if bounds is None:
        return None
    return PrepackedLinear(
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        weight=_reordered(weight),
        bias=bias,
        rows_min=bounds[0],
        rows_max=bounds[1],
    )


@functools.cache  # kernels are chosen by shape: a model's layers share the probe
def _bounds(out_features: int, in_features: int, dtype: torch.dtype, num_threads: int) -> tuple[int, int] | None:
    del num_threads  # part of the key
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(2)).to(dtype)
    packed = _reordered(weight)
    return invariant_rows(lambda x: _product(x, packed, None), in_features, dtype)


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_MAX[0])


def linear(x: Tensor, packed: PrepackedLinear) -> Tensor:
    """x [n, in] -> [n, out], in tiles."""
    return in_tiles(lambda tile: _product(tile, packed.weight, packed.bias), x, packed.rows_min, packed.rows_max)


def in_tiles(product: Product, x: Tensor, rows_min: int, rows_max: int) -> Tensor:
    """`product` over rows of x, at least rows_min (zeros below) and at most rows_max at a time."""
    if rows_min <= len(x) <= rows_max:
        return product(x)
    tiles = [
        product(torch.nn.functional.pad(tile, (0, 0, 0, max(0, rows_min - len(tile)))))[: len(tile)]
        for tile in x.split(rows_max)
    ]
    return torch.cat(tiles)


def invariant_rows(product: Product, in_features: int, dtype: torch.dtype) -> tuple[int, int] | None:
    """(min, max) rows between which each row of `product` keeps its bits at every count and place tried."""
    x = torch.randn(ROWS_MAX[0], in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    for rows_max in ROWS_MAX:
        whole = product(x[:rows_max])
        counts = [n for n in PROBE_ROWS if n <= rows_max]
        equal = {
            n: all(torch.equal(product(x[at : at + n]), whole[at : at + n]) for at in (0, rows_max - n)) for n in counts
        }
        for rows_min in ROWS_MIN:
            if all(equal[n] for n in counts if n >= rows_min):
                return rows_min, rows_max
    return None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
