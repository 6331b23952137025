"""The published definition of a request's TBT."""

from __future__ import annotations

import pytest

from report.gaps import tbt_of


def test_the_worst_tenth_is_averaged() -> None:
    gaps = [0.01] * 18 + [0.5, 0.3]
    arrivals = [0.0]
    for gap in gaps:
        arrivals.append(arrivals[-1] + gap)
    tbt = tbt_of(arrivals)
    assert tbt is not None
    assert tbt == pytest.approx((0.01, 0.4, 0.5))


@pytest.mark.parametrize(("count", "worst"), [(1, 1), (10, 1), (11, 2), (30, 3)])
def test_a_tenth_is_rounded_up(count: int, worst: int) -> None:
    arrivals = [float(i * (i + 1) // 2) for i in range(count + 1)]  # gaps 1, 2, 3, …
    tbt = tbt_of(arrivals)
    assert tbt is not None
    assert tbt.worst_s == sum(range(count - worst + 1, count + 1)) / worst


def test_one_token_has_no_gap() -> None:
    assert tbt_of([1.0]) is None
    assert tbt_of([]) is None
