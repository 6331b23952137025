"""Whatever workers report, predictions stay finite, at or above zero, and grow with the work."""

from __future__ import annotations

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from core.cost import CostPrior, WorkerCost
from core.fit import non_negative
from core.messages import PassSample

SIZES = st.one_of(st.integers(0, 40), st.integers(0, 2**31))
SAMPLES = st.builds(
    PassSample,
    new_tokens=SIZES,
    context_tokens=SIZES,
    batch=st.integers(0, 100),
    kv_tokens=SIZES,
    seconds=st.one_of(st.floats(1e-4, 10.0), st.floats(allow_nan=True, allow_infinity=True)),
)


@given(st.lists(SAMPLES, max_size=60))
@settings(max_examples=150, deadline=None)
def test_predictions_are_finite_and_grow_with_the_work(samples: list[PassSample]) -> None:
    cost = WorkerCost(CostPrior(), tokens_per_pass_max=512)
    for sample in samples:
        cost.observe_pass(sample)
    prefills = [cost.prefill_s(new, 100).seconds for new in (1, 2, 50, 511, 512, 513, 5000, 10**6)]
    steps = [cost.decode_step_s(batch, 1000).seconds for batch in (1, 2, 64)]
    for rising in (prefills, steps):
        assert all(math.isfinite(s) and s >= 0.0 for s in rising)
        assert all(a <= b for a, b in itertools.pairwise(rising))
    cost.learned()


NUMBERS = st.floats(-3.0, 3.0)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=3, max_size=6), st.tuples(NUMBERS, NUMBERS, NUMBERS))
@settings(max_examples=200, deadline=None)
def test_the_solution_is_at_least_as_good_as_any_neighbour(
    rows: list[tuple[float, float, float]], vector: tuple[float, float, float]
) -> None:
    matrix = [[sum(r[i] * r[j] for r in rows) + (i == j) for j in range(3)] for i in range(3)]

    def loss(x: list[float]) -> float:
        return sum(x[i] * (0.5 * sum(matrix[i][j] * x[j] for j in range(3)) - vector[i]) for i in range(3))

    best = non_negative(matrix, vector)
    assert min(best) >= 0.0
    for step in itertools.product((-0.01, 0.0, 0.01), repeat=3):
        near = [max(0.0, b + s) for b, s in zip(best, step, strict=True)]
        assert loss(best) <= loss(near) + 1e-9
