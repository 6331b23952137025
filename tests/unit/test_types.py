"""Sampling parameters name the field and the limit; the exception tree maps once to gRPC status."""

from __future__ import annotations

import math

import grpc
import pytest

from halfmoon import errors
from halfmoon.types import SEED_MAX, AttemptId, RequestId, SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", -0.1, "[0, 100]"),
        ("temperature", math.nan, "[0, 100]"),
        ("temperature", math.inf, "[0, 100]"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 1.01, "(0, 1]"),
        ("top_p", math.nan, "(0, 1]"),
        ("top_k", -1, "positive"),
        ("seed", -1, str(SEED_MAX)),
        ("seed", SEED_MAX + 1, str(SEED_MAX)),
        ("max_tokens", 0, "at least 1"),
        ("stop", ("",), "1 to 256 characters"),
        ("stop", ("x",) * 17, "at most 16"),
        ("stop_token_ids", tuple(range(65)), "at most 64"),
        ("logprobs", 21, "[0, 20]"),
        ("logprobs", -1, "[0, 20]"),
    ],
)
def test_a_bad_value_is_named(field: str, value: object, limit: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
    assert limit in str(caught.value)


def test_the_edges_are_allowed() -> None:
    params = SamplingParams(temperature=100.0, top_p=1.0, seed=SEED_MAX, stop=("x" * 256,), logprobs=20)
    assert not params.greedy
    assert SamplingParams().greedy


def test_statuses_are_grpcs_own_numbers() -> None:
    by_number = {code.value[0]: code.name for code in grpc.StatusCode}
    assert {s.value: s.name for s in errors.StatusCode}.items() <= by_number.items()


def test_an_attempt_reads_well() -> None:
    assert str(AttemptId(RequestId("r7"), 2)) == "r7#2"
