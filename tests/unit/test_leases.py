"""What leases are learned from and how slots are shared out, and the learner's counts against a list of all waits."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from kv_store.leases import COHORT_S, GRID_S, INDEX_BOUNDS, USES_MAX, Class, LeaseLearner, class_of, fit_leases

ONCE, TWICE = class_of(1, 0), class_of(2, 0)


def test_classes_are_uses_and_places() -> None:
    assert [class_of(1, index)[1] for index in (0, 1, 2, 3, 4, 5, 8, 9, 33, 10_000)] == [0, 1, 2, 3, 3, 4, 4, 5, 7, 7]
    assert class_of(USES_MAX, 0) is class_of(99, 0)
    assert class_of(0, 99) == (0, len(INDEX_BOUNDS))


def test_leases_are_worth_their_slots() -> None:
    """Half of the first blocks come back after 20 s, no second block ever does: the slots go to the first blocks."""
    uses = [(float(i), (1000 + i, 5000 + i)) for i in range(400)]
    uses += [(float(i + 20), (1000 + i,)) for i in range(0, 400, 2)]
    uses.sort()
    fitted = fit_leases(uses, num_slots=40)
    assert fitted.of(ONCE) == 24.0  # the grid's first lease of at least 20 s
    assert fitted.of(class_of(1, 1)) == 0.0
    assert fitted.of(TWICE) == 0.0  # nothing is used a third time
    assert fitted.of(class_of(1, 99)) == 0.0  # a class that the fit never saw
    assert fit_leases(uses, num_slots=5).of(ONCE) == 0.0  # one use a second, kept for 20 s, takes more


def test_slots_go_where_they_earn_most_and_what_is_left_goes_to_the_next() -> None:
    """Of two equally busy classes one comes back after 10 s, one after 50; a third, busier one is too large."""
    learner, far = LeaseLearner(), class_of(1, 1)
    busy = class_of(1, 2)
    for second in range(600):
        for kind, wait_s, number in ((ONCE, 10, 1), (far, 50, 1), (busy, 20, 30)):
            for _ in range(number):
                learner.began(kind, float(second))
                learner.ended(kind, float(second), float(second + wait_s), is_used=True)
    leases = learner.leases(600.0, 100)
    assert (leases.of(ONCE), leases.of(far), leases.of(busy)) == (12.0, 54.0, 0.0)
    assert learner.leases(600.0, 20).of(far) == 0.0
    assert learner.leases(600.0, 1000).of(busy) == 24.0


def test_nothing_is_believed_before_it_was_seen() -> None:
    learner = LeaseLearner()
    assert learner.leases(5.0, 10).of(ONCE) == 0.0
    learner.began(ONCE, 0.0)
    learner.ended(ONCE, 0.0, 20.0, is_used=True)
    assert learner.leases(float(COHORT_S + 24), 10).of(ONCE) == 0.0  # of the first minute not all have waited 24 s
    assert learner.leases(float(COHORT_S + 25), 10).of(ONCE) == 24.0


def test_what_is_lost_sight_of_is_not_taken_for_unused() -> None:
    """Nine in ten are lost after 10 s; of those that were not, all came back after 40 s."""
    learner = LeaseLearner()
    for number in range(1000):
        learner.began(ONCE, number / 10)
        lost = number % 10 > 0
        learner.ended(ONCE, number / 10, number / 10 + (10.0 if lost else 40.0), is_used=not lost)
    assert learner.leases(200.0, 1000).of(ONCE) == 42.0


def test_what_began_before_the_window_is_forgotten() -> None:
    learner = LeaseLearner(window_s=600.0)
    for second in range(60):
        learner.began(ONCE, float(second))
        learner.ended(ONCE, float(second), second + 10.0, is_used=True)
    assert learner.leases(300.0, 100).of(ONCE) == 12.0
    learner.began(TWICE, 660.0)
    assert learner.leases(700.0, 100).of(ONCE) == 0.0
    learner.ended(ONCE, 0.0, 700.0, is_used=True)  # too late to count, and no harm


@pytest.mark.parametrize("seed", range(5))
def test_curves_are_those_of_a_list_of_all_waits(seed: int) -> None:
    """The twin keeps every wait, and asks of each whether it was at risk in a bin, and whether it ended there."""
    luck, learner, waits = Random(seed), LeaseLearner(), list[tuple[Class, float, float, bool]]()
    now_s = 900.0
    for _ in range(2000):
        kind, at_s = class_of(luck.randrange(3), luck.randrange(3)), luck.uniform(0.0, now_s)
        end_s, is_used = at_s + luck.choice([3.0, 17.0, 60.0, 150.0, 2000.0]) * luck.random(), luck.random() < 0.7
        learner.began(kind, at_s)
        if end_s < now_s:
            learner.ended(kind, at_s, end_s, is_used=is_used)
        waits.append((kind, at_s, end_s if end_s < now_s else float("inf"), is_used))
    for kind in {wait[0] for wait in waits}:
        found = learner._curve(kind, now_s, now_s)
        assert found.hits == pytest.approx(hits_of([w for w in waits if w[0] == kind], now_s))
        slopes = [slope for slope, _, _ in found.steps()]
        assert slopes == sorted(slopes, reverse=True)
        assert found.rate_per_s == sum(1 for w in waits if w[0] == kind) / now_s


def hits_of(waits: list[tuple[Class, float, float, bool]], now_s: float) -> list[float]:
    """F at each of the grid, by definition."""
    hits, surviving = [0.0], 1.0
    for low, high in pairwise(GRID_S):
        seen = [w for w in waits if (w[1] // COHORT_S + 1) * COHORT_S + high < now_s]
        at_risk = [w for w in seen if w[2] - w[1] > low or low == 0]
        ended = [w for w in at_risk if w[2] - w[1] <= high]
        used = sum(1 for w in ended if w[3])
        surviving *= 1 - min(1.0, used / max(1.0, len(at_risk) - (len(ended) - used) / 2))
        hits.append(1 - surviving)
    return hits
