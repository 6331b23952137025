"""Shell: the decoder's operators in pure torch: the oracle of the compiled ones, and the fallback without a compiler.

Batch invariance (DESIGN 5.7) holds on CPU for a fixed number of threads: a row's result is the same bits whatever
rows stand beside it. Products run in fp32 in row tiles whose sizes were probed when the weight was packed; attention
works on query tiles and KV tiles of fixed size at absolute positions, and adds the KV tiles up in their order.
On CUDA the same code is right, but torch's products choose kernels by size there: no invariance is promised.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear as product
from torch.nn.functional import pad

KV_TILE = 64  # positions whose scores are reduced together, aligned at multiples of it
QUERY_TILE = 16  # query rows of one product; fewer are padded
ROW_TILES_MIN = (1, 4, 16)  # candidates for the least number of rows that a product is run with
ROW_TILE_MAX = 256  # rows of one product: bounds what the probe has to try
WIDE_ROW_TILE_MAX = 32  # the same for language-model heads, whose products are large
WIDE_FEATURES = 16_384


@dataclass(frozen=True, kw_only=True)
class PackedLinear:
    """A weight [out_features, in_features] in the form its operators want. Immutable."""

    in_features: int
    out_features: int


class Operators(Protocol):
    """What the decoder asks of a device. Tensors are bf16 or fp32, row-major; sums accumulate in fp32."""

    name: str

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Prepare weight [out, in] and bias [out] once; may copy, never modifies."""
        ...

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """x [n, in] -> [n, out], in x's dtype."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [n, d], weight [d] -> [n, d]: computed in fp32, rounded once."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); the sum is rounded to the dtype first."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [n, 2f], gate first -> silu(gate) * up [n, f]."""
        ...

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotate q [n, heads, d] and k [n, kv_heads, d] in place by cos, sin [n, d/2] fp32 (half-rotation)."""
        ...

    def write_kv(self, pool: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor, offsets: Tensor) -> None:
        """Put k, v [n, kv_heads, d] into pool [slots, kv_heads, layers, 2, block_size, d] at (slots, offsets) int64."""
        ...

    def paged_attention(
        self,
        q: Tensor,
        pool: Tensor,
        layer: int,
        block_tables: Tensor,
        query_start: Tensor,
        starts: Tensor,
        scale: float,
        window: int,
    ) -> Tensor:
        """Causal attention of q [n, heads, d] over the pool -> [n, heads, d].

        Args:
            block_tables: [num_seqs, max_blocks] int32, rows padded with anything.
            query_start: [num_seqs + 1] int32: sequence s owns rows [query_start[s], query_start[s + 1]).
            starts: [num_seqs] int32: the position of each sequence's first query row.
            window: a query sees its last `window` positions, itself included; 0: all of them.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TorchLinear(PackedLinear):
    """fp32 weights on CPU (torch's bf16 products are slow without native bf16), the given dtype elsewhere."""

    weight: Tensor
    bias: Tensor | None
    rows_min: int
    rows_max: int


class TorchOperators:
    """Implements `Operators` with torch alone."""

    name = "torch"

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> TorchLinear:
        on_cpu = weight.device.type == "cpu"
        kept = weight.float().contiguous() if on_cpu else weight
        rows_max = WIDE_ROW_TILE_MAX if weight.shape[0] >= WIDE_FEATURES else ROW_TILE_MAX
        return TorchLinear(
            in_features=weight.shape[1],
            out_features=weight.shape[0],
            weight=kept,
            bias=None if bias is None else bias.to(kept.dtype),
            rows_min=rows_min_of(*kept.shape, rows_max, torch.get_num_threads()) if on_cpu else 1,
            rows_max=rows_max if on_cpu else 1 << 30,
        )

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        assert isinstance(packed, TorchLinear)
        wide = x.to(packed.weight.dtype)
        if packed.rows_min <= x.shape[0] <= packed.rows_max:
            return product(wide, packed.weight, packed.bias).to(x.dtype)
        tiles = [_padded_linear(tile, packed) for tile in wide.split(packed.rows_max)]
        return torch.cat(tiles).to(x.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (gate / (1.0 + torch.exp(-gate)) * up).to(gate_up.dtype)

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        for x in (q, k):
            first, second = x.float().chunk(2, dim=-1)
            c, s = cos[:, None], sin[:, None]
            x.copy_(torch.cat((first * c - second * s, second * c + first * s), dim=-1))

    def write_kv(self, pool: Tensor, layer: int, k: Tensor, v: Tensor, slots: Tensor, offsets: Tensor) -> None:
        pool[slots, :, layer, 0, offsets] = k
        pool[slots, :, layer, 1, offsets] = v

    def paged_attention(
        self,
        q: Tensor,
        pool: Tensor,
        layer: int,
        block_tables: Tensor,
        query_start: Tensor,
        starts: Tensor,
        scale: float,
        window: int,
    ) -> Tensor:
        out = torch.empty_like(q)
        bounds = query_start.tolist()
        for seq, start in enumerate(starts.tolist()):
            first, last = bounds[seq], bounds[seq + 1]
            keys, values = _gather_kv(pool, layer, block_tables[seq], start + last - first)
            for row in range(first, last, QUERY_TILE):
                rows = slice(row, min(row + QUERY_TILE, last))
                out[rows] = _attend(q[rows], keys, values, start + row - first, scale, window)
        return out


def _padded_linear(tile: Tensor, packed: TorchLinear) -> Tensor:
    num_rows = tile.shape[0]
    padded = pad(tile, (0, 0, 0, max(0, packed.rows_min - num_rows)))
    return product(padded, packed.weight, packed.bias)[:num_rows]


@functools.cache
def rows_min_of(out_features: int, in_features: int, rows_max: int, num_threads: int) -> int:
    """The least number of rows from which torch's fp32 product gives a row the same bits at every size.

    Found by trying; `rows_max` (every product is padded to one size) when no smaller number will do.
    """
    del num_threads  # part of the key: the product is cut differently by another number of threads
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, in_features, generator=generator).repeat(-(-out_features // 64), 1)[:out_features]
    x = torch.randn(rows_max, in_features, generator=generator)
    whole = product(x, weight)
    sizes = [n for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 64, 100, 255) if n <= rows_max]
    equal = {n: torch.equal(product(x[-n:], weight), whole[-n:]) for n in sizes}
    return next((m for m in ROW_TILES_MIN if all(equal[n] for n in sizes if n >= m)), rows_max)


def _gather_kv(pool: Tensor, layer: int, block_table: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Positions [0, num_tokens) as fp32 tiles [kv_heads, tiles, KV_TILE, d]; what lies beyond is zero."""
    block_size = pool.shape[4]
    table = block_table[: -(-num_tokens // block_size)].long()
    both = pool[table, :, layer].float()  # [blocks, kv_heads, 2, block_size, d]
    flat = both.permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :num_tokens]
    tiles = pad(flat, (0, 0, 0, -num_tokens % KV_TILE)).unflatten(2, (-1, KV_TILE))
    return tiles[0], tiles[1]


def _attend(q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, window: int) -> Tensor:
    """q [<= QUERY_TILE, heads, d] at positions from `start`, over KV tiles [kv_heads, tiles, KV_TILE, d]."""
    num_rows, dim = q.shape[0], q.shape[2]
    kv_heads, end = keys.shape[0], start + num_rows
    low = max(0, start - window + 1) // KV_TILE if window else 0
    high = -(-end // KV_TILE)
    wide = pad(q.float() * scale, (0, 0, 0, 0, 0, QUERY_TILE - num_rows))
    grouped = wide.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)  # [kv_heads, group * QUERY_TILE, d]
    num_tiles, group_rows = high - low, grouped.shape[1]
    stacked = grouped[:, None].expand(-1, num_tiles, -1, -1).reshape(-1, group_rows, dim)
    scores = torch.bmm(stacked, keys[:, low:high].flatten(0, 1).transpose(1, 2).contiguous())
    scores = scores.view(kv_heads, num_tiles, group_rows, KV_TILE)
    seen = _seen(start, num_rows, low, high, window, q.device).repeat(1, group_rows // QUERY_TILE, 1)
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = torch.exp(scores - scores.amax(dim=(1, 3), keepdim=True))
    products = torch.bmm(weights.view(-1, group_rows, KV_TILE), values[:, low:high].flatten(0, 1).contiguous())
    total = _sum_in_order(products.view(kv_heads, num_tiles, group_rows, dim))
    norm = _sum_in_order(weights.sum(-1, keepdim=True))
    rows = (total / norm).unflatten(1, (-1, QUERY_TILE)).permute(2, 0, 1, 3).flatten(1, 2)[:num_rows]
    return rows.to(q.dtype)


def _seen(start: int, num_rows: int, low: int, high: int, window: int, device: torch.device) -> Tensor:
    """[tiles, QUERY_TILE, KV_TILE] bool. Padding rows see what the last real row sees (never nothing)."""
    query = start + torch.arange(QUERY_TILE, device=device).clamp_(max=num_rows - 1)[None, :, None]
    key = torch.arange(low * KV_TILE, high * KV_TILE, device=device).view(-1, 1, KV_TILE)
    seen = key <= query
    return seen & (key > query - window) if window else seen


def _sum_in_order(tiles: Tensor) -> Tensor:
    """Sum over dim 1, first to last: leading and trailing tiles of zeros change no bit, however many there are."""
    total = tiles[:, 0]
    for index in range(1, tiles.shape[1]):
        total = total + tiles[:, index]
    return total
