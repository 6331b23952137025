"""What the conductor says of its own start: reasons that last, and canaries that fail in the same way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from conductor import readiness
from conductor.readiness import Readiness
from halfmoon.errors import Failed


def started(why: Iterator[str], canaries: Iterator[str]) -> list[str]:
    """What is said until the first success. `why`: of each round; `canaries`: why each fails, "" that it does not."""
    said: list[str] = []

    async def canary(number: int) -> None:
        if problem := next(canaries):
            raise Failed(problem)

    async def story() -> None:
        done = asyncio.Event()
        follows = Readiness(
            why_not=lambda: next(why),
            canary=canary,
            services=(),
            interval_s=0.001,
            on_first=done.set,
            on_waiting=lambda reason: said.append(f"waiting {reason}"),
            on_failed=lambda times, reason: said.append(f"failing {times} {reason}"),
        )
        task = asyncio.create_task(follows.run())
        await asyncio.wait_for(done.wait(), 10.0)
        task.cancel()

    asyncio.run(story())
    return said


def test_a_reason_that_lasts_is_said_once_and_one_that_passes_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "SAID_AFTER_S", 0.0)
    rounds = iter(["no prefill", "no decode", "no decode", "no decode", "no decode", ""])
    assert started(rounds, iter([""])) == ["waiting no decode"]


def test_canaries_that_fail_for_one_reason_are_counted_whatever_their_ids() -> None:
    canaries = ["canary-1-00aa00bb#1: gone", "canary-2-00aa00cc#4: gone", "late", "canary-4-00000000: gone", ""]
    assert started(iter([""] * 5), iter(canaries)) == [
        "failing 1 the canary: gone",
        "failing 2 the canary: gone",
        "failing 1 late",
        "failing 1 the canary: gone",
    ]
