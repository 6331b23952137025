"""Pure: values as dicts, lists, numbers and strings: what JSON and YAML can say."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def plain(value: Any) -> Any:
    """Dataclasses by field name, enums by value; bytes become hexadecimal, and what is not finite null."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int | str):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    assert is_dataclass(value), f"{value!r} has no plain form"
    return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
