"""Which tokens of which prompts run next."""

from __future__ import annotations

import pytest

from prefill_worker.batcher import Chunk, next_chunks
from tests.workers import attempt

A, B, C = attempt("a"), attempt("b"), attempt("c")


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([], []),
        ([(A, 3)], [(A, 3)]),
        ([(A, 25)], [(A, 10)]),
        ([(A, 4), (B, 4), (C, 4)], [(A, 4), (B, 4), (C, 2)]),
        ([(A, 10), (B, 1)], [(A, 10)]),
        ([(A, 1), (B, 1), (C, 1), (A, 1)], [(A, 1), (B, 1), (C, 1)]),
    ],
)
def test_a_pass_is_filled_in_the_order_given(prompts: list[tuple], expected: list[tuple]) -> None:
    chunks = next_chunks(prompts, tokens_max=10, sequences_max=3)
    assert chunks == [Chunk(attempt_id=a, num_tokens=n) for a, n in expected]
