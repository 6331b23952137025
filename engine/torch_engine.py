"""Shell: the engine that computes: our decoder over the bound pool, on CPU; on CUDA through torch's own operators.

The CUDA path (the pool is the arena's tensor, the twins are the operators) has not been run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from engine.decoder import Decoder, Pass
from engine.protocol import KvLayout, ModelInfo, Pool, Sampled, Slice
from engine.sampler import sample


class TorchEngine:
    """Implements engine.protocol.Engine.

    Args:
        decoder: takes its weights' device.
        dtype: of weights, activations and KV.
    """

    def __init__(self, model: ModelInfo, decoder: Decoder, dtype: torch.dtype, device: torch.device) -> None:
        self.model = model
        self._decoder: Decoder | None = decoder
        self._dtype = dtype
        self._device = device
        self._pool: Tensor | None = None

    def bind(self, pool: Pool, num_slots: int) -> None:
        layout = self.model.layout
        flat = as_tensor(pool)
        assert flat.dtype == torch.uint8, "the pool is bytes"
        assert flat.nbytes == num_slots * layout.block_bytes, "the pool's size is not num_slots * block_bytes"
        assert flat.is_contiguous(), "the pool must be contiguous"
        assert flat.device == self._device, f"the pool is on {flat.device}, the engine on {self._device}"
        self._pool = flat.view(-1).view(self._dtype).view(pool_shape(layout, num_slots))

    def forward(self, slices: Sequence[Slice]) -> list[Sampled | None]:
        logits = iter(self.logits(slices).cpu().numpy())
        if self._device.type == "cuda":  # where nothing is sampled, the copy above waits for nothing
            torch.cuda.current_stream(self._device).synchronize()
        return [None if s.sampling is None else sample(next(logits), s.sampling, s.end) for s in slices]

    def close(self) -> None:
        self._pool = self._decoder = None

    @torch.inference_mode()
    def logits(self, slices: Sequence[Slice]) -> Tensor:
        """One pass; fp32 [m, vocab] of the last rows of those slices that ask for sampling, on the device."""
        assert self._pool is not None, "bind the pool before forward"
        assert self._decoder is not None, "the engine is closed"
        rows = flatten(slices, self.model.layout.block_size, self._device)
        return self._decoder.forward(rows, self._pool)


def as_tensor(pool: Pool) -> Tensor:
    """The pool's bytes as a tensor that shares its memory."""
    if isinstance(pool, Tensor):
        return pool
    assert isinstance(pool, memoryview), f"a pool is a memoryview or a torch tensor, not {type(pool).__name__}"
    assert not pool.readonly, "the pool must be writable"
    return torch.frombuffer(pool, dtype=torch.uint8)


def pool_shape(layout: KvLayout, num_slots: int) -> tuple[int, int, int, int, int, int]:
    """Slots, kv-heads, layers, K/V, tokens, dims."""
    return num_slots, layout.num_kv_heads, layout.num_layers, 2, layout.block_size, layout.head_dim


def flatten(slices: Sequence[Slice], block_size: int, device: torch.device) -> Pass:
    """Row-wise tensors of one pass."""
    lengths = [len(s.token_ids) for s in slices]
    assert all(lengths), "an empty slice"
    assert all(len(s.slots) * block_size >= s.end for s in slices), "a block table that is too short"
    bounds = [0, *accumulate(lengths)]
    positions = np.concatenate([np.arange(s.start, s.end) for s in slices])
    tables = np.zeros((len(slices), max(len(s.slots) for s in slices)), np.int32)
    for row, s in zip(tables, slices, strict=True):
        row[: len(s.slots)] = s.slots
    sequence = np.repeat(np.arange(len(slices)), lengths)
    slots = tables[sequence, positions // block_size].astype(np.int64)
    token_ids = np.concatenate([np.asarray(s.token_ids, np.int64) for s in slices])
    sampled = [bounds[i + 1] - 1 for i, s in enumerate(slices) if s.sampling is not None]

    def put(array: Sequence[int] | np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.asarray(array), dtype=dtype, device=device)

    return Pass(
        token_ids=put(token_ids, torch.int64),
        positions=put(positions, torch.int64),
        slots=put(slots, torch.int64),
        offsets=put(positions % block_size, torch.int64),
        query_start=put(bounds, torch.int32),
        starts=put([s.start for s in slices], torch.int32),
        block_tables=put(tables, torch.int32),
        end=max(s.end for s in slices),
        sampled=put(np.asarray(sampled, np.int64), torch.int64),
    )
