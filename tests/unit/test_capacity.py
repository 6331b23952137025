"""The search for a capacity finds the edge, wherever it lies and wherever it begins, in few questions."""

from __future__ import annotations

import pytest

from benchmarks.capacity import bisected


@pytest.mark.parametrize("edge", range(-9, 9))
@pytest.mark.parametrize("first", [-8, 0, 7])
def test_the_edge_is_found(edge: int, first: int) -> None:
    asked: list[int] = []

    def meets(number: int) -> bool:
        asked.append(number)
        return number <= edge

    found = bisected(meets, low=-8, high=7, first=first)
    assert found == min(max(edge, -9), 7)
    assert asked[0] == first
    assert len(set(asked)) == len(asked) <= 6
    assert set(asked) <= set(range(-8, 8))
