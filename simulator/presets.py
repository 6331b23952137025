"""Shell: reads hardware presets: YAML files of physical figures, in one of two forms, made into coefficients."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from halfmoon.errors import ConfigError
from simulator.hardware_values import Hardware

FOLDER = Path(__file__).parent / "hardware"
DERIVED = (
    "prefill_pass_s",
    "prefill_token_s",
    "prefill_pair_s",
    "decode_step_s",
    "decode_sequence_s",
    "decode_token_s",
)


def presets() -> tuple[str, ...]:
    """Names of the presets that come with the simulator."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_hardware(name: str) -> Hardware:
    """A preset by name, or a file by its path (a name that ends in .yaml).

    Raises:
        ConfigError: there is none of that name, or a key is unknown, missing or out of range.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(key="hardware", value=name, expected=f"one of {', '.join(presets())}, or a .yaml file")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(key="hardware", value=str(path), expected=f"YAML ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(key="hardware", value=str(path), expected="a mapping")
    return hardware_of(data, name=path.stem)


def hardware_of(data: dict[str, Any], name: str) -> Hardware:
    """From what a file says: `transformer` (then costs follow from FLOPs and bytes), or `measured` coefficients."""
    rest = dict(data)
    transformer, measured = rest.pop("transformer", None), rest.pop("measured", None)
    if (transformer is None) == (measured is None):
        raise ConfigError(key="hardware", value=sorted(data), expected="either `transformer` or `measured`")
    costs = _by_flops(**_numbers("transformer", transformer)) if measured is None else _numbers("measured", measured)
    known = {spec.name for spec in fields(Hardware)} - {"name"}
    wrong = sorted((rest.keys() | costs.keys()) - known)
    if wrong:
        raise ConfigError(key=f"hardware.{wrong[0]}", value=name, expected=f"one of {', '.join(sorted(known))}")
    values: dict[str, Any] = {**rest, **costs}
    try:
        return Hardware(name=name, **values)
    except TypeError as error:
        raise ConfigError(key="hardware", value=name, expected=f"every value once ({error})") from error


def _numbers(key: str, section: object) -> dict[str, float]:
    if not isinstance(section, dict):
        raise ConfigError(key=f"hardware.{key}", value=section, expected="a mapping of numbers")
    for name, value in section.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(key=f"hardware.{key}.{name}", value=value, expected="a number")
    wanted = FLOPS_KEYS if key == "transformer" else DERIVED
    if sorted(section) != sorted(wanted):
        raise ConfigError(key=f"hardware.{key}", value=sorted(section), expected=f"the keys {', '.join(wanted)}")
    return section


FLOPS_KEYS = (
    "layers", "hidden", "attention_factor", "linear_factor", "flops_per_s", "mfu",
    "step_s", "kv_token_bytes", "memory_bytes_per_s", "memory_efficiency",
)  # fmt: skip


def _by_flops(
    *,
    layers: float,
    hidden: float,
    attention_factor: float,
    linear_factor: float,
    flops_per_s: float,
    mfu: float,
    step_s: float,
    kv_token_bytes: float,
    memory_bytes_per_s: float,
    memory_efficiency: float,
) -> dict[str, float]:
    """FAST'25, Eq. 1: flops(n) = layers * (a * n**2 * d + b * n * d**2); a cached prefix p saves flops(p).

    n**2 - p**2 of a chunk is twice its attended pairs, so the pairs' coefficient is 2 * layers * a * d. A decode step
    reads the weights (`step_s`) and all KV of its batch.
    """
    per_s = flops_per_s * mfu
    return {
        "prefill_pass_s": 0.0,
        "prefill_token_s": layers * linear_factor * hidden**2 / per_s,
        "prefill_pair_s": 2.0 * layers * attention_factor * hidden / per_s,
        "decode_step_s": step_s,
        "decode_sequence_s": 0.0,
        "decode_token_s": kv_token_bytes / (memory_bytes_per_s * memory_efficiency),
        "kv_token_bytes": int(kv_token_bytes),
    }
