"""Pure: the highest load that still meets a goal, by bisection over whole numbers."""

from __future__ import annotations

from collections.abc import Callable


def bisected(meets: Callable[[int], bool], *, low: int, high: int, first: int) -> int:
    """The largest number in [low, high] that meets the goal, if all below it do too; low - 1: none does.

    Args:
        meets: asked for few numbers, `first` the first of them.
    """
    assert low <= first <= high, f"{first} is not between {low} and {high}"
    passed, failed, asked = low - 1, high + 1, first
    while failed - passed > 1:
        if meets(asked):
            passed = asked
        else:
            failed = asked
        asked = (passed + failed) // 2
    return passed
