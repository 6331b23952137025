"""Shell: reads hardware presets: YAML files of physical figures, in one of two forms, made into coefficients."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
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
    is_file = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_file else FOLDER / f"{name}.yaml"
    if is_file and not path.is_file():
        raise ConfigError(key="hardware", value=name, expected="a file, and there is no such file")
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
    sections = [key for key in ("transformer", "measured") if data.get(key) is not None]
    if len(sections) != 1:
        raise ConfigError(key="hardware", value=sorted(data), expected="either `transformer` or `measured`")
    (section,) = sections
    said = data[section]
    if not isinstance(said, dict):
        raise ConfigError(key=f"hardware.{section}", value=said, expected="a mapping of numbers")
    if section == "transformer":
        _require_keys(said, FLOPS_KEYS, (), "hardware.transformer")
        costs = _by_flops(Transformer(**_numbers(said, "hardware.transformer")))
    else:
        _require_keys(said, DERIVED, (), "hardware.measured")
        costs = _numbers(said, "hardware.measured")
    rest = {key: value for key, value in data.items() if key not in ("transformer", "measured")}
    specs = [spec for spec in fields(Hardware) if spec.name != "name" and spec.name not in costs]
    optional = [spec.name for spec in specs if spec.default is not MISSING]
    _require_keys(rest, [spec.name for spec in specs if spec.name not in optional], optional, "hardware")
    values: dict[str, Any] = {"source": str(rest.pop("source")), **_numbers(rest, "hardware"), **costs}
    return Hardware(name=name, **values)


def _require_keys(said: dict[str, Any], needed: Sequence[str], optional: Sequence[str], where: str) -> None:
    """Raises ConfigError, naming the key that nobody knows, or the one that is missing."""
    known = [*needed, *optional]
    for key in said:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            meant = f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"
            raise ConfigError(key=f"{where}.{key}", value=said[key], expected=f"a known key; {meant}")
    for key in needed:
        if key not in said:
            raise ConfigError(key=f"{where}.{key}", value=None, expected="a value: the key is missing")


def _numbers(said: dict[str, Any], where: str) -> dict[str, float]:
    return {key: _number(value, f"{where}.{key}") for key, value in said.items()}


def _number(value: object, key: str) -> float:
    """Text too: YAML 1.1 reads 12.5e9, which has no sign, as text."""
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value) if isinstance(value, str) else value
    except ValueError:
        pass
    raise ConfigError(key=key, value=value, expected="a number")


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """What a file says of a model and the chips that run it.

    Raises:
        ConfigError: naming the value.
    """

    layers: float
    hidden: float
    attention_factor: float
    linear_factor: float
    flops_per_s: float
    mfu: float
    step_s: float
    kv_token_bytes: float
    memory_bytes_per_s: float
    memory_efficiency: float

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, is_share = getattr(self, spec.name), spec.name in ("mfu", "memory_efficiency")
            if not (0.0 < value <= 1.0 if is_share else 0.0 < value < math.inf):
                expected = "a share in (0, 1]" if is_share else "a finite number above 0"
                raise ConfigError(key=f"hardware.transformer.{spec.name}", value=value, expected=expected)


FLOPS_KEYS = tuple(spec.name for spec in fields(Transformer))


def _by_flops(said: Transformer) -> dict[str, float]:
    """FAST'25, Eq. 1: flops(n) = layers * (a * n**2 * d + b * n * d**2); a cached prefix p saves flops(p).

    n**2 - p**2 of a chunk is twice its attended pairs, so the pairs' coefficient is 2 * layers * a * d. A decode step
    reads the weights (`step_s`) and all KV of its batch.
    """
    per_s = said.flops_per_s * said.mfu
    return {
        "prefill_pass_s": 0.0,
        "prefill_token_s": said.layers * said.linear_factor * said.hidden**2 / per_s,
        "prefill_pair_s": 2.0 * said.layers * said.attention_factor * said.hidden / per_s,
        "decode_step_s": said.step_s,
        "decode_sequence_s": 0.0,
        "decode_token_s": said.kv_token_bytes / (said.memory_bytes_per_s * said.memory_efficiency),
        "kv_token_bytes": int(said.kv_token_bytes),
    }
