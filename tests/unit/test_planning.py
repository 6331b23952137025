"""The search finds the best shape and policy of a made-up landscape, and has looked at its neighbours."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cli.planning import (
    Candidate,
    Shape,
    Verdict,
    best_per_shape,
    finalists,
    finals,
    first_round,
    neighbours,
    next_round,
    num_nodes,
    on_seeds,
    ranked,
    runner_up,
    tied,
    verdict,
)
from halfmoon.errors import ConfigError
from report.curves import sketch
from tests.report_runs import row, run

POLICIES = ("baseline", "early", "predictive")


def said(effective: int, strain: float = 0.5) -> Verdict:
    return Verdict(
        effective=effective, goodput_per_s=effective / 100, capacity=effective / 1000, served_kv_tokens=1, strain=strain
    )


def search(nodes: int, landscape: dict[Candidate, int]) -> dict[Candidate, Verdict]:
    """Play `halfmoon plan` on effective requests that are known beforehand."""
    verdicts: dict[Candidate, Verdict] = {}
    wanted = first_round(nodes, POLICIES[-1])
    while wanted:
        assert not set(wanted) & set(verdicts), "nothing is simulated twice"
        verdicts |= {c: said(landscape[c]) for c in wanted}
        wanted = next_round(verdicts, POLICIES)
    return verdicts


def hill(nodes: int, top: int, bonus: dict[str, int], coupled: int = 0) -> dict[Candidate, int]:
    shapes = {Shape(p, nodes - p): 500 - abs(p - top) for p in range(1, nodes)} | {Shape(0, 0, nodes): coupled}
    return {Candidate(shape, name): height + bonus[name] for shape, height in shapes.items() for name in POLICIES}


@pytest.mark.parametrize("nodes", [2, 3, 16, 40, 300])
def test_the_top_of_a_hill_is_found(nodes: int) -> None:
    rng = random.Random(nodes)
    for _ in range(10):
        landscape = hill(nodes, rng.randrange(1, nodes), {name: rng.randrange(3) for name in POLICIES})
        verdicts = search(nodes, landscape)
        best = ranked(verdicts)[0]
        assert landscape[best] == max(landscape.values())
        assert all(Candidate(near, best.policy) in verdicts for near in neighbours(best.shape))
        assert all(Candidate(best.shape, name) in verdicts for name in POLICIES)


def test_a_coupled_cluster_can_win() -> None:
    verdicts = search(4, hill(4, 2, dict.fromkeys(POLICIES, 0), coupled=600))
    assert str(ranked(verdicts)[0].shape) == "4C"
    second = runner_up(verdicts)
    assert second is not None
    assert str(second.shape) == "2P+2D"


def test_one_node_can_only_be_coupled() -> None:
    assert first_round(1, "early") == [Candidate(Shape(0, 0, 1), "early")]
    assert runner_up(search(1, hill(1, 1, dict.fromkeys(POLICIES, 0)))) is None


def test_equals_are_ranked_by_how_far_they_stay_under_their_limits() -> None:
    tight, easy = Candidate(Shape(1, 3), "early"), Candidate(Shape(2, 2), "early")
    verdicts = {tight: said(900, 0.9), easy: said(900, 0.2), Candidate(Shape(3, 1), "early"): said(899, 0.1)}
    assert ranked(verdicts)[:2] == [easy, tight]
    assert [str(c.shape) for c in best_per_shape(verdicts)] == ["1P+3D", "2P+2D", "3P+1D"]


def test_runs_under_another_belief_do_not_compete() -> None:
    plain, misled = Candidate(Shape(1, 1), "early"), Candidate(Shape(1, 1), "early", 1.2)
    lucky, idle = replace(plain, seed=1), replace(plain, load=0.8)
    assert ranked({plain: said(1), misled: said(2), lucky: said(3), idle: said(4)}) == [plain]


def test_finalists_are_the_first_few_and_the_best_of_another_shape() -> None:
    one, other = Shape(1, 3), Shape(2, 2)
    names = ("a", "b", "c", "d", "e")
    verdicts = {Candidate(one, name): said(900 - n) for n, name in enumerate(names)}
    assert finalists(verdicts) == [Candidate(one, name) for name in "abcd"]
    verdicts[Candidate(other, "e")] = said(10)
    assert finalists(verdicts) == [*(Candidate(one, name) for name in "abcd"), Candidate(other, "e")]
    verdicts[Candidate(other, "a")] = said(899, 0.1)
    assert finalists(verdicts) == [Candidate(s, n) for s, n in ((one, "a"), (other, "a"), (one, "b"), (one, "c"))]


def test_a_lucky_seed_does_not_win_and_overlapping_ranges_are_a_tie() -> None:
    lucky, steady, near, far = (Candidate(Shape(n, 5 - n), "early") for n in range(1, 5))
    seen = {lucky: (900, 800, 850), steady: (890, 880, 894), near: (880, 881, 870), far: (879, 879, 879)}
    verdicts = {
        one: said(count)
        for candidate, counts in seen.items()
        for one, count in zip(on_seeds(candidate, 3), counts, strict=True)
    }
    ranking = finals(verdicts, seen, 3)
    assert [final.candidate for final in ranking] == [steady, far, near, lucky]
    best = ranking[0].effective
    assert (best.mean, best.low, best.high) == (888, 880, 894)
    assert [final.candidate for final in tied(ranking)] == [near, lucky]
    assert finals(verdicts, seen, 1)[0].candidate == lucky


def test_gpus_are_whole_nodes() -> None:
    assert num_nodes(128, 8) == 16
    for gpus, per_node, key in ((12, 8, "plan.gpus"), (0, 8, "plan.gpus"), (8, 0, "plan.gpus-per-node")):
        with pytest.raises(ConfigError) as caught:
            num_nodes(gpus, per_node)
        assert caught.value.key == key


def test_a_verdict_is_what_the_run_came_to() -> None:
    limits = {"slo_ttft_s": 2.0, "slo_tbt_s": 0.1}
    rows = [row(f"r{n}", ttft_s=1.0, tbt_worst_s=0.08, **limits) for n in range(4)]
    found = sketch(run(*rows, row("late", ttft_s=1.5, tbt_worst_s=0.2, **limits)))
    assert verdict(found, 8.0, 2.0, 0.1) == Verdict(
        effective=4, goodput_per_s=0.5, capacity=0.8, served_kv_tokens=440, strain=2.0
    )
