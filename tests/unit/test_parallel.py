"""A job in another process ends in a result or in words; the others go on."""

from __future__ import annotations

import pytest

from cli.parallel import Crash, require_all, run_all
from halfmoon.errors import Failed
from tests.parallel_jobs import work


def test_every_job_ends_in_a_result_or_says_why_not(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, float]] = []
    jobs = ["a", "raise", "refuse", "exit", "die", "b"]
    results = run_all(work, jobs, 3, lambda index, share: told.append((index, share)))
    assert results == [
        "A",
        Crash("its process ended with exit code 1"),
        Crash("InvalidRequest: speedup: got -1; expected above 0"),
        Crash("its process ended with exit code 7"),
        Crash("its process ended with exit code -9"),
        "B",
    ]
    assert sorted(index for index, share in told if share == 1.0) == [0, 1, 2, 3, 4, 5]
    assert [share for index, share in told if index == 5] == [0.5, 1.0]
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err


def test_no_job_is_no_result() -> None:
    assert run_all(work, [], 2) == []


def test_a_crash_names_what_it_was_and_how_to_see_it_again() -> None:
    named = [("policy early", "halfmoon simulate --policy early"), ("policy none", "halfmoon simulate --policy none")]
    require_all(["A", "B"], named)
    with pytest.raises(Failed) as caught:
        require_all(["A", Crash("exit code -9")], named)
    assert str(caught.value) == (
        "1 of 2 simulations did not finish\npolicy none: exit code -9\n  reproduce: halfmoon simulate --policy none"
    )
