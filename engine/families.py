"""Pure: the table of model families: from a Hugging Face config to one geometry, its flags and its weights' names.

All families of the table are Llama-shaped: pre-norm blocks of grouped-query attention and a gated SiLU MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.rope_config import RopeConfig, parse_rope
from halfmoon.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one `model_type` differs from plain Llama.

    Args:
        qkv_bias, output_bias, mlp_bias: True, False, or the config key that says it.
        qk_norm: RMS norms over each head of q and k, before RoPE.
        window_default: `sliding_window` when the config has no such key; None: no window.
        window_switch: the config key that must be true for windows to exist at all; None: no switch.
        head_dim_default: when the config has no `head_dim`; None: hidden size over heads.
        kv_heads_default: when the config has no `num_key_value_heads`; None: as many as query heads.
    """

    architecture: str
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windowed: bool = False
    window_default: int | None = None
    window_switch: str | None = None
    head_dim_default: int | None = None
    kv_heads_default: int | None = None


FAMILIES: dict[str, Family] = {
    # Llama 2, Llama 3.x, SmolLM2
    "llama": Family(
        architecture="LlamaForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    # Qwen2, Qwen2.5
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        windowed=True,
        window_default=4096,
        window_switch="use_sliding_window",
        kv_heads_default=32,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        windowed=True,
        window_default=4096,
        window_switch="use_sliding_window",
        head_dim_default=128,
        kv_heads_default=32,
    ),
    "mistral": Family(architecture="MistralForCausalLM", windowed=True, window_default=4096, kv_heads_default=8),
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One model, complete: what the decoder is built from.

    Args:
        windows: per layer, how many positions a query sees, itself included; 0: all.
        tied: the language-model head is the embedding.
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    context_tokens_max: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    rope: RopeConfig


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json's content.

    Raises:
        CheckpointError: naming the family, RoPE kind or key that is refused, missing or out of range.
    """
    name = str(config.get("model_type", "(none)"))
    family = FAMILIES.get(name)
    if family is None:
        raise CheckpointError(f"model family {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    _refuse_variants(config, family)
    heads, hidden, layers = (_count(config, k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_dim = _head_dim(config, family, hidden, heads)
    kv_heads = _kv_heads(config, family, heads)
    rope = parse_rope(config, head_dim)
    return DecoderConfig(
        family=name,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=_count(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=_count(config, "vocab_size"),
        rms_eps=float(config.get("rms_norm_eps", 1e-6)),
        context_tokens_max=_context(config, rope),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=_flag(config, family.qkv_bias),
        output_bias=_flag(config, family.output_bias),
        mlp_bias=_flag(config, family.mlp_bias),
        qk_norm=family.qk_norm,
        windows=_windows(config, family, layers),
        rope=rope,
    )


def _refuse_variants(config: Mapping[str, Any], family: Family) -> None:
    architectures = config.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise CheckpointError(f"architecture {architectures[0]!r} is not supported; expected {family.architecture}")
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise CheckpointError(f"weights quantised by {method!r} are not supported; use a bf16, fp16 or fp32 checkpoint")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"activation {config['hidden_act']!r} is not supported; expected silu")


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config key {key}: got {value!r}; expected a positive integer")
    return value


def _flag(config: Mapping[str, Any], flag: bool | str) -> bool:
    return bool(config.get(flag, False)) if isinstance(flag, str) else flag


def _head_dim(config: Mapping[str, Any], family: Family, hidden: int, heads: int) -> int:
    head_dim = config.get("head_dim") or family.head_dim_default or hidden // heads
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise CheckpointError(f"config key head_dim: got {head_dim!r}; expected an even positive integer")
    return head_dim


def _kv_heads(config: Mapping[str, Any], family: Family, heads: int) -> int:
    if config.get("num_key_value_heads") is None:
        kv_heads = heads if "num_key_value_heads" in config else (family.kv_heads_default or heads)
    else:
        kv_heads = _count(config, "num_key_value_heads")
    if heads % kv_heads:
        raise CheckpointError(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    return kv_heads


def _context(config: Mapping[str, Any], rope: RopeConfig) -> int:
    """Positions the checkpoint serves; some yarn checkpoints state the unstretched length."""
    stated = _count(config, "max_position_embeddings")
    return max(stated, int(rope.factor * rope.original_context)) if rope.kind == "yarn" else stated


def _windows(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int, ...]:
    window = config.get("sliding_window", family.window_default) if family.windowed else None
    if family.window_switch is not None and not config.get(family.window_switch, False):
        window = None
    if window is None:
        return (0,) * layers
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise CheckpointError(f"config key sliding_window: got {window!r}; expected a positive integer or null")
    return tuple(window if slides else 0 for slides in _sliding_layers(config, family, layers))


def _sliding_layers(config: Mapping[str, Any], family: Family, layers: int) -> list[bool]:
    if family.window_switch is None:  # Mistral: every layer
        return [True] * layers
    types = config.get("layer_types")
    if types is None:
        return [layer >= int(config.get("max_window_layers", 28)) for layer in range(layers)]
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != layers:
        raise CheckpointError(f"config key layer_types: got {len(types)} entries, unknown kinds {sorted(unknown)}")
    return [kind == "sliding_attention" for kind in types]


# ---- weights ----

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def expected_tensors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the decoder reads, by its checkpoint name, with its shape."""
    tensors: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        FINAL_NORM: (config.hidden_size,),
    }
    if not config.tied:
        tensors[HEAD] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        tensors |= {layer_prefix(layer) + name: shape for name, shape in _layer_tensors(config).items()}
    return tensors


def _layer_tensors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    linears = {
        "self_attn.q_proj": (queries, hidden, config.qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    for name, (rows, columns, bias) in linears.items():
        tensors[f"{name}.weight"] = (rows, columns)
        if bias:
            tensors[f"{name}.bias"] = (rows,)
    if config.qk_norm:
        tensors |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    return tensors
