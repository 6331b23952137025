"""Shell: the decoder of the Llama-shaped families: weights fused and packed, one pass over flattened rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.families import EMBEDDING, FINAL_NORM, HEAD, DecoderConfig, layer_prefix
from engine.rope import RopeTable
from engine.twins import Operators, PackedLinear

TensorSource = Callable[[str], Tensor]
"""A checkpoint tensor by name, in the compute dtype, on the compute device."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass over the rows (new tokens) of several sequences, flattened.

    Args:
        token_ids, positions, slots, offsets: int64 [n]: row i's token, its position, and where its KV goes.
        query_start: int32 [num_seqs + 1]: sequence s owns rows [query_start[s], query_start[s + 1]).
        starts: int32 [num_seqs]: the position of each sequence's first row.
        block_tables: int32 [num_seqs, max_blocks], rows padded with zeros.
        end: one more than the greatest position.
        sampled: int64 [m]: the rows whose logits are wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    offsets: Tensor
    query_start: Tensor
    starts: Tensor
    block_tables: Tensor
    end: int
    sampled: Tensor


@dataclass(frozen=True, kw_only=True)
class _Layer:
    input_norm: Tensor
    qkv: PackedLinear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: PackedLinear
    mlp_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear


class Decoder:
    """Owns packed copies of the weights; keeps nothing between passes but the RoPE table."""

    def __init__(self, config: DecoderConfig, tensor: TensorSource, operators: Operators) -> None:
        self._config = config
        self._ops = operators
        self._embedding = tensor(EMBEDDING)
        self._layers = [_load_layer(config, index, tensor, operators) for index in range(config.num_layers)]
        self._final_norm = tensor(FINAL_NORM)
        head = self._embedding if config.tied else tensor(HEAD)
        self._head = operators.pack_linear(head, None)
        self._rope = RopeTable(config.rope, self._embedding.device)

    def forward(self, rows: Pass, pool: Tensor) -> Tensor:
        """Write the rows' KV into pool [slots, kv_heads, layers, 2, block_size, head_dim]; logits [m, vocab] fp32."""
        ops, eps = self._ops, self._config.rms_eps
        cos, sin = self._rope.lookup(rows.positions, rows.end)
        residual = self._embedding[rows.token_ids]
        normed = ops.rms_norm(residual, self._layers[0].input_norm, eps)
        for index, layer in enumerate(self._layers):
            attended = self._attention(index, layer, normed, cos, sin, rows, pool)
            normed, residual = ops.add_rms_norm(attended, residual, layer.mlp_norm, eps)
            inner = ops.silu_mul(ops.linear(normed, layer.gate_up))
            normed, residual = ops.add_rms_norm(ops.linear(inner, layer.down), residual, self._norm_after(index), eps)
        if not len(rows.sampled):
            return normed.new_empty(0, self._config.vocab_size, dtype=torch.float32)
        return ops.linear(normed[rows.sampled], self._head).float()

    def _attention(
        self, index: int, layer: _Layer, normed: Tensor, cos: Tensor, sin: Tensor, rows: Pass, pool: Tensor
    ) -> Tensor:
        config, ops = self._config, self._ops
        q, k, v = self._split(ops.linear(normed, layer.qkv))
        if layer.query_norm is not None and layer.key_norm is not None:
            q = ops.rms_norm(q.flatten(0, 1), layer.query_norm, config.rms_eps).view_as(q)
            k = ops.rms_norm(k.flatten(0, 1), layer.key_norm, config.rms_eps).view_as(k)
        ops.rope_(q, k, cos, sin)
        ops.write_kv(pool, index, k, v, rows.slots, rows.offsets)
        mixed = ops.paged_attention(
            q,
            pool,
            index,
            rows.block_tables,
            rows.query_start,
            rows.starts,
            config.head_dim**-0.5,
            config.windows[index],
        )
        return ops.linear(mixed.flatten(1), layer.output)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contiguous q [n, heads, d], k and v [n, kv_heads, d]."""
        config = self._config
        q, k, v = qkv.unflatten(1, (-1, config.head_dim)).split(
            (config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1
        )
        return q.contiguous(), k.contiguous(), v.contiguous()

    def _norm_after(self, index: int) -> Tensor:
        return self._layers[index + 1].input_norm if index + 1 < len(self._layers) else self._final_norm


def _load_layer(config: DecoderConfig, index: int, tensor: TensorSource, ops: Operators) -> _Layer:
    prefix = layer_prefix(index)

    def linear(names: tuple[str, ...], biased: bool) -> PackedLinear:
        weight = torch.cat([tensor(f"{prefix}{name}.weight") for name in names])
        bias = torch.cat([tensor(f"{prefix}{name}.bias") for name in names]) if biased else None
        return ops.pack_linear(weight, bias)

    return _Layer(
        input_norm=tensor(prefix + "input_layernorm.weight"),
        qkv=linear(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), config.qkv_bias),
        query_norm=tensor(prefix + "self_attn.q_norm.weight") if config.qk_norm else None,
        key_norm=tensor(prefix + "self_attn.k_norm.weight") if config.qk_norm else None,
        output=linear(("self_attn.o_proj",), config.output_bias),
        mlp_norm=tensor(prefix + "post_attention_layernorm.weight"),
        gate_up=linear(("mlp.gate_proj", "mlp.up_proj"), config.mlp_bias),
        down=linear(("mlp.down_proj",), config.mlp_bias),
    )
