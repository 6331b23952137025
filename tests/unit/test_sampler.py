"""Sampling: greedy ties, noise by (seed, position) alone, the right distribution, the cuts of top_k and top_p."""

from __future__ import annotations

import numpy as np
import pytest

from engine.sampler import noise, sample
from halfmoon.errors import IntegrityError
from halfmoon.types import SamplingParams

RNG = np.random.default_rng(7)
LOGITS = RNG.normal(0, 2, 500).astype(np.float32)
DRAWS = 4000
GOLDEN_NOISE = [0.4502664720018066, 0.3059835787065882, 0.554520401072843]


def draws(logits: np.ndarray, params: SamplingParams, count: int = DRAWS) -> np.ndarray:
    return np.array([sample(logits, params, position).token_id for position in range(count)])


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values.astype(np.float64) - values.max())
    return weights / weights.sum()


def test_greedy_takes_the_best_and_the_lowest_id_of_equals() -> None:
    logits = np.array([1.0, 3.0, 2.0, 3.0], np.float32)
    assert sample(logits, SamplingParams(), 0).token_id == 1
    assert sample(np.zeros(50, np.float32), SamplingParams(), 9).token_id == 0


def test_a_draw_is_a_function_of_seed_and_position_only() -> None:
    params = SamplingParams(temperature=1.0, seed=11)
    first = draws(LOGITS, params, 200)
    for position in (150, 3, 199):  # another order, other draws in between
        sample(LOGITS, SamplingParams(temperature=2.0, seed=5), position)
        assert sample(LOGITS, params, position).token_id == first[position]
    assert (draws(LOGITS, SamplingParams(temperature=1.0, seed=12), 200) != first).sum() > 100
    assert len(set(first.tolist())) > 30, "positions draw differently"


def test_the_noise_is_pinned() -> None:
    """A golden vector: workers of different versions must draw the same token for the same seed."""
    assert noise(42, 7, 3).tolist() == pytest.approx(GOLDEN_NOISE, abs=0)
    assert noise(42, 7, 2).tolist() == GOLDEN_NOISE[:2], "a token's noise does not depend on the vocabulary's size"
    assert noise(2**63 - 1, 2**40, 1)[0] > 0


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32))
    for temperature in (1.0, 0.5):
        counts = np.bincount(draws(logits, SamplingParams(temperature=temperature, seed=1)), minlength=5)
        expected = softmax(logits / temperature) * DRAWS
        assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom, p = 0.001


def test_top_k_keeps_the_k_likeliest() -> None:
    params = SamplingParams(temperature=1.5, top_k=3, seed=2)
    assert set(draws(LOGITS, params, 500).tolist()) == set(np.argsort(-LOGITS)[:3].tolist())
    ties = np.zeros(10, np.float32)
    assert set(draws(ties, params, 300).tolist()) == {0, 1, 2}, "equals: the lowest ids"


def test_top_p_keeps_the_shortest_head_that_reaches_the_mass() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    assert set(draws(logits, SamplingParams(temperature=1.0, top_p=0.65), 500).tolist()) == {1, 3}
    assert set(draws(logits, SamplingParams(temperature=1.0, top_p=0.75), 500).tolist()) == {1, 2, 3}
    assert set(draws(logits, SamplingParams(temperature=1.0, top_p=0.01), 100).tolist()) == {1}
    assert set(draws(logits, SamplingParams(temperature=1.0, top_p=0.5, top_k=2), 300).tolist()) == {1}, "within top_k"


def test_top_p_over_a_flat_distribution_looks_beyond_the_first_candidates() -> None:
    flat = np.zeros(2000, np.float32)
    drawn = draws(flat, SamplingParams(temperature=1.0, top_p=0.9), 800)
    assert 1500 < drawn.max() <= 1800


def test_log_probabilities_are_of_the_unmodified_distribution() -> None:
    params = SamplingParams(temperature=0.7, top_k=5, seed=3, logprobs=4)
    sampled = sample(LOGITS, params, 17)
    expected = np.log(softmax(LOGITS))
    assert sampled.logprob == pytest.approx(expected[sampled.token_id], abs=1e-5)
    order = np.argsort(-LOGITS)[:4]
    assert [i for i, _ in sampled.top] == order.tolist()
    assert [p for _, p in sampled.top] == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert sample(LOGITS, SamplingParams(logprobs=0), 0).top == ()
    assert sample(LOGITS, SamplingParams(), 0).logprob == 0.0


def test_damaged_logits_never_become_a_token() -> None:
    damaged = LOGITS.copy()
    damaged[3] = np.nan
    with pytest.raises(IntegrityError, match="position 8"):
        sample(damaged, SamplingParams(), 8)
