"""Pure: which rotary position embedding a checkpoint asks for, and which are refused.

A block's name covers tokens, not the total length; a RoPE kind whose keys depend on the total length (dynamic NTK,
longrope) would make equal names stand for different keys. Such kinds are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from halfmoon.errors import CheckpointError

KINDS = ("default", "linear", "llama3", "yarn")
LENGTH_DEPENDENT = ("dynamic", "longrope", "su")
THETA_DEFAULT = 10_000.0  # of every family in the table


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One of KINDS with its parameters; those that the kind does not use keep their defaults.

    Args:
        dim: rotated dimensions per head: all of head_dim.
        factor: how far positions (linear) or low frequencies (llama3, yarn) are stretched.
        original_context: tokens the checkpoint was pretrained with, before stretching.
        attention_factor: multiplies cos and sin (yarn); None: derived from `factor`.
    """

    kind: str
    dim: int
    theta: float
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def canonical(self) -> str:
        """`field=value` joined by commas, in field order: part of the fingerprint."""
        return ",".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))


def parse_rope(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Raises:
        CheckpointError: naming the kind or the parameter that is refused, missing or not a positive number.
    """
    params = _parameters(config)
    kind = str(params.get("rope_type", params.get("type", "default")))
    if kind in LENGTH_DEPENDENT:
        raise CheckpointError(
            f"RoPE kind {kind!r} is refused: its keys depend on the total length, so a block's name would lie"
        )
    if kind not in KINDS:
        raise CheckpointError(f"RoPE kind {kind!r} is not supported; supported: {', '.join(KINDS)}")
    if float(params.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError("RoPE over a part of the head (partial_rotary_factor below 1) is not supported")
    theta = _positive(params.get("rope_theta") or config.get("rope_theta") or THETA_DEFAULT, "rope_theta")
    return _BUILDERS[kind](params, config, head_dim, theta)


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    params = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(params, Mapping):
        raise CheckpointError(f"rope parameters: got {params!r}; expected a mapping")
    nested = [key for key, value in params.items() if isinstance(value, Mapping)]
    if nested:
        raise CheckpointError(f"RoPE by layer type ({', '.join(nested)}) is not supported")
    return params


def _default(params: Mapping[str, Any], config: Mapping[str, Any], dim: int, theta: float) -> RopeConfig:
    return RopeConfig(kind="default", dim=dim, theta=theta)


def _linear(params: Mapping[str, Any], config: Mapping[str, Any], dim: int, theta: float) -> RopeConfig:
    return RopeConfig(kind="linear", dim=dim, theta=theta, factor=_positive(params.get("factor"), "factor"))


def _llama3(params: Mapping[str, Any], config: Mapping[str, Any], dim: int, theta: float) -> RopeConfig:
    return RopeConfig(
        kind="llama3",
        dim=dim,
        theta=theta,
        factor=_positive(params.get("factor"), "factor"),
        original_context=_original_context(params, config),
        low_freq_factor=_positive(params.get("low_freq_factor"), "low_freq_factor"),
        high_freq_factor=_positive(params.get("high_freq_factor"), "high_freq_factor"),
    )


def _yarn(params: Mapping[str, Any], config: Mapping[str, Any], dim: int, theta: float) -> RopeConfig:
    original = _original_context(params, config)
    factor = params.get("factor") or int(config.get("max_position_embeddings", 0)) / original
    return RopeConfig(
        kind="yarn",
        dim=dim,
        theta=theta,
        factor=_positive(factor, "factor"),
        original_context=original,
        attention_factor=_optional(params.get("attention_factor"), "attention_factor"),
        mscale=_optional(params.get("mscale"), "mscale"),
        mscale_all_dim=_optional(params.get("mscale_all_dim"), "mscale_all_dim"),
        beta_fast=_positive(params.get("beta_fast") or 32.0, "beta_fast"),
        beta_slow=_positive(params.get("beta_slow") or 1.0, "beta_slow"),
        truncate=bool(params.get("truncate", True)),
    )


_BUILDERS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _original_context(params: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    name = "original_max_position_embeddings"
    return int(_positive(config.get(name) or params.get(name) or config.get("max_position_embeddings"), name))


def _optional(value: Any, name: str) -> float | None:
    return None if value is None or value == 0 else _positive(value, name)


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"rope parameter {name}: got {value!r}; expected a positive number")
    return float(value)
