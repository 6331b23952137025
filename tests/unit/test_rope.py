"""Each RoPE kind against transformers' own, bit for bit; cos and sin by position, whatever was asked before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.rope import RopeTable, inverse_frequencies
from engine.rope_config import RopeConfig, parse_rope

HEAD_DIM = 64
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, all its keys": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.37,
    },
}


def ours_and_theirs(kind: str) -> tuple[RopeConfig, LlamaRotaryEmbedding]:
    raw = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4, "max_position_embeddings": 131072}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**raw, rope_parameters=dict(KINDS[kind])))
    return parse_rope(raw | {"rope_parameters": KINDS[kind]}, HEAD_DIM), theirs


@pytest.mark.parametrize("kind", KINDS)
def test_inverse_frequencies_are_transformers_own(kind: str) -> None:
    config, theirs = ours_and_theirs(kind)
    inverse, factor = inverse_frequencies(config)
    assert torch.equal(inverse, theirs.inv_freq)
    assert factor == theirs.attention_scaling


@pytest.mark.parametrize("kind", KINDS)
def test_cos_and_sin_are_transformers_own(kind: str) -> None:
    config, theirs = ours_and_theirs(kind)
    positions = torch.tensor([0, 1, 77, 4095, 4096, 9000])
    cos, sin = RopeTable(config, torch.device("cpu")).lookup(positions, 9001)
    their_cos, their_sin = theirs(torch.zeros(1, dtype=torch.float32), positions[None])
    torch.testing.assert_close(cos, their_cos[0, :, : HEAD_DIM // 2], rtol=0, atol=2e-7)
    torch.testing.assert_close(sin, their_sin[0, :, : HEAD_DIM // 2], rtol=0, atol=2e-7)


def test_a_positions_bits_do_not_depend_on_what_was_asked_before() -> None:
    config, _ = ours_and_theirs("llama3")
    early, late = RopeTable(config, torch.device("cpu")), RopeTable(config, torch.device("cpu"))
    position = torch.tensor([5000])
    early.lookup(torch.tensor([3]), 4)
    late.lookup(torch.tensor([20_000]), 20_001)
    for a, b in zip(early.lookup(position, 5001), late.lookup(position, 5001), strict=True):
        assert torch.equal(a, b)
