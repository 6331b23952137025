"""Pure: whether two loads swing together or in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence

FLAT = 1e-9
"""A standard deviation below it is rounding: what stands still correlates with nothing."""


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's, of two samples of the same moments, in [-1, 1]; None where one of the two never changes."""
    count = len(first)
    assert count == len(second), f"{count} samples beside {len(second)}"
    if not count:
        return None
    mean_a, mean_b = sum(first) / count, sum(second) / count
    var_a = sum((a - mean_a) ** 2 for a in first) / count
    var_b = sum((b - mean_b) ** 2 for b in second) / count
    if math.sqrt(var_a) < FLAT or math.sqrt(var_b) < FLAT:
        return None
    both = sum((a - mean_a) * (b - mean_b) for a, b in zip(first, second, strict=True)) / count
    return max(-1.0, min(1.0, both / math.sqrt(var_a * var_b)))
