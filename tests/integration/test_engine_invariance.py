"""Batch invariance, bit for bit: alone, in company, however chunked, after a prefix hit, in other slots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.default_model import NAME
from tests.tiny_models import Bench, bench, prompt, saved, tiny_model

LENGTH = 90
TABLE = [11, 4, 30, 2, 19, 8]
VARIANTS = ["smollm2", "qwen2, tied", "qwen3, biases", "mistral, window"]


@pytest.fixture(params=["torch", ""], ids=["twins", "best"])
def operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFMOON_OPERATORS", request.param)


def step_by_step(ours: Bench, tokens: list[int], first: int) -> Tensor:
    """The undisturbed run: prompt of `first` tokens at once, then one token at a time. Row i: after first + i."""
    return ours.chunked(tokens, [first, *range(first + 1, len(tokens) + 1)], TABLE)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_neighbours_and_chunks_change_no_bit(variant: str, dtype: str, tmp_path: Path) -> None:
    check(saved(tiny_model(variant), tmp_path), dtype, prompt(LENGTH), prompt(70, seed=1))


@pytest.mark.model
@pytest.mark.parametrize(("choice", "dtype"), [("torch", "float32"), ("", "float32"), ("", "bfloat16")])
def test_neither_in_the_real_model(choice: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFMOON_OPERATORS", choice)
    check(NAME, dtype, [i * 37 % 40_000 for i in range(60)], [i * 91 % 40_000 for i in range(45)], first=50)


def check(model: Path | str, dtype: str, tokens: list[int], other: list[int], first: int = 60) -> None:
    undisturbed = step_by_step(bench(model, dtype), tokens, first)
    length = len(tokens)
    ours = bench(model, dtype)

    chunked = ours.chunked(tokens, [1, 3, 17, 33, 34, first, length], TABLE)
    assert torch.equal(chunked[-2:], undisturbed[[0, -1]]), "chunked otherwise"

    hit = ours.run((tokens, 48, length, [*TABLE[:3], 40, 41, 42]))
    assert torch.equal(hit[0], undisturbed[-1]), "after a prefix hit of three blocks, the rest in other slots"

    company = bench(model, dtype)
    table, others = list(reversed(TABLE)), [50, 51, 52, 53, 54]
    prefill = company.run((other, 0, 20, others), (tokens, 0, first, table))
    assert torch.equal(prefill[1], undisturbed[0]), "prefilled beside another prompt"
    for index, end in enumerate(range(first + 1, length + 1)):
        neighbour = 20 + index
        step = company.run(
            (tokens, end - 1, end, table),
            (other, neighbour, neighbour + 1, others),
            (other, 0, 1 + index % 7, [60]),
        )
        assert torch.equal(step[0], undisturbed[index + 1]), f"decoded in company, token {end}"
