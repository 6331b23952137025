"""The table of families: configs of old and new transformers in, one geometry out; everything else refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from engine.families import DecoderConfig, expected_tensors, parse_config
from halfmoon.errors import CheckpointError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def parse(**changes: Any) -> DecoderConfig:
    return parse_config({k: v for k, v in (LLAMA | changes).items() if v != "absent"})


def qwen(**changes: Any) -> DecoderConfig:
    return parse(model_type="qwen2", architectures=["Qwen2ForCausalLM"], **changes)


def test_llama_as_llama_2_wrote_it() -> None:
    config = parse(num_key_value_heads="absent", rope_scaling=None, rms_norm_eps=1e-5)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 16)
    assert (config.rope.kind, config.rope.theta, config.rms_eps) == ("default", 10_000.0, 1e-5)
    assert not any((config.tied, config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm))


def test_old_and_new_rope_keys_say_the_same() -> None:
    old = parse(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = parse(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
    assert old == new
    assert old.rope.canonical() == new.rope.canonical() != parse(rope_theta=5e5).rope.canonical()


def test_biases_and_norms_by_family() -> None:
    assert parse(attention_bias=True, mlp_bias=True).output_bias
    assert (qwen().qkv_bias, qwen().output_bias) == (True, False)
    qwen3 = parse(model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 128)


def test_windows_by_layer() -> None:
    def mistral(**changes: Any) -> tuple[int, ...]:
        return parse(model_type="mistral", architectures=["MistralForCausalLM"], **changes).windows

    assert mistral() == (4096, 4096)
    assert mistral(sliding_window=None) == (0, 0)
    assert qwen(sliding_window=32, use_sliding_window=False, max_window_layers=0).windows == (0, 0)
    assert qwen(sliding_window=32, use_sliding_window=True, max_window_layers=1).windows == (0, 32)
    types = ["sliding_attention", "full_attention"]
    assert qwen(sliding_window=32, use_sliding_window=True, layer_types=types).windows == (32, 0)
    assert parse(sliding_window=32).windows == (0, 0), "llama has none"


def test_yarn_stretches_the_context() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert parse(rope_scaling=yarn).context_tokens_max == 2048
    assert parse(rope_scaling=yarn, max_position_embeddings=4096).context_tokens_max == 4096
    assert parse().context_tokens_max == 512


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma3"}, "family 'gemma3'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification'"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers: got None"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"head_dim": 15}, "head_dim: got 15"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "'proportional'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor: got None"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_outside_the_table_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        parse(**changes)


def test_expected_tensors_follow_the_flags() -> None:
    tied = expected_tensors(parse(tie_word_embeddings=True))
    assert "lm_head.weight" not in tied
    assert tied["model.layers.1.self_attn.k_proj.weight"] == (32, 64)
    assert len(tied) == 2 + 2 * 9
    assert expected_tensors(parse())["lm_head.weight"] == (100, 64)
    assert expected_tensors(qwen())["model.layers.0.self_attn.v_proj.bias"] == (32,)
    assert "model.layers.0.self_attn.o_proj.bias" not in expected_tensors(qwen())
