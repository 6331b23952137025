"""The search finds the best shape and policy of a made-up landscape, and has looked at its neighbours."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from cli.planning import (
    Candidate,
    Shape,
    Verdict,
    best_per_shape,
    changed,
    changes_of,
    finalists,
    finals,
    first_round,
    ladder,
    near,
    nearest,
    neighbours,
    next_round,
    num_nodes,
    on_seeds,
    ranked,
    runner_up,
    start,
    tied,
    verdict,
)
from cli.scenario import Scenario
from halfmoon.errors import ConfigError
from halfmoon.types import Outcome
from report.curves import sketch
from tests.report_runs import row, run

POLICIES = ("baseline", "early", "predictive")
CHUNKS = (256, 512, 1024, 2048)


def said(effective: int, strain: float = 0.5) -> Verdict:
    return Verdict(effective=effective, goodput_per_s=effective / 100, capacity=effective / 1000, strain=strain)


def search(nodes: int, landscape: dict[Candidate, int]) -> dict[Candidate, Verdict]:
    """Play `halfmoon plan` on effective requests that are known beforehand."""
    verdicts: dict[Candidate, Verdict] = {}
    wanted = first_round(nodes, POLICIES[-1], CHUNKS)
    while wanted:
        assert not set(wanted) & set(verdicts), "nothing is simulated twice"
        verdicts |= {c: said(landscape[c]) for c in wanted}
        wanted = next_round(verdicts, POLICIES, CHUNKS)
    return verdicts


def hill(nodes: int, top: int, bonus: dict[str, int], coupled: int = 0, best: int = 512) -> dict[Candidate, int]:
    shapes = {Shape(p, nodes - p): 500 - abs(p - top) for p in range(1, nodes)} | {Shape(0, 0, nodes): coupled}
    return {
        Candidate(shape, name, chunk): height + bonus[name] - 3 * abs(CHUNKS.index(chunk) - CHUNKS.index(best))
        for shape, height in shapes.items()
        for name in POLICIES
        for chunk in CHUNKS
    }


@pytest.mark.parametrize("nodes", [2, 3, 16, 40, 300])
def test_the_top_of_a_hill_is_found(nodes: int) -> None:
    rng = random.Random(nodes)
    for _ in range(10):
        bonus = {name: rng.randrange(3) for name in POLICIES}
        landscape = hill(nodes, rng.randrange(1, nodes), bonus, best=rng.choice(CHUNKS))
        verdicts = search(nodes, landscape)
        best = ranked(verdicts)[0]
        assert landscape[best] == max(landscape.values())
        assert all(replace(best, shape=other) in verdicts for other in neighbours(best.shape))
        assert all(replace(best, policy=name) in verdicts for name in POLICIES)
        assert all(replace(best, chunk=chunk) in verdicts for chunk in near(best.chunk, CHUNKS))


def test_a_coupled_cluster_can_win() -> None:
    verdicts = search(4, hill(4, 2, dict.fromkeys(POLICIES, 0), coupled=600))
    assert str(ranked(verdicts)[0].shape) == "4C"
    second = runner_up(verdicts)
    assert second is not None
    assert str(second.shape) == "2P+2D"


def test_one_node_can_only_be_coupled() -> None:
    assert first_round(1, "early", CHUNKS) == [Candidate(Shape(0, 0, 1), "early", 512)]
    assert runner_up(search(1, hill(1, 1, dict.fromkeys(POLICIES, 0)))) is None


def test_equals_are_ranked_by_how_far_they_stay_under_their_limits() -> None:
    tight, easy = Candidate(Shape(1, 3), "early", 512), Candidate(Shape(2, 2), "early", 512)
    verdicts = {tight: said(900, 0.9), easy: said(900, 0.2), Candidate(Shape(3, 1), "early", 512): said(899, 0.1)}
    assert ranked(verdicts)[:2] == [easy, tight]
    assert [str(c.shape) for c in best_per_shape(verdicts)] == ["1P+3D", "2P+2D", "3P+1D"]


def test_runs_under_another_belief_do_not_compete() -> None:
    plain = Candidate(Shape(1, 1), "early", 512)
    misled = changed(plain, belief="1.2")
    lucky, idle = replace(plain, seed=1), changed(plain, speedup=0.8)
    assert ranked({plain: said(1), misled: said(2), lucky: said(3), idle: said(4)}) == [plain]


def test_finalists_are_the_first_few_and_the_best_of_another_shape() -> None:
    one, other = Shape(1, 3), Shape(2, 2)
    names = ("a", "b", "c", "d", "e")
    verdicts = {Candidate(one, name, 512): said(900 - n) for n, name in enumerate(names)}
    assert finalists(verdicts) == [Candidate(one, name, 512) for name in "abcd"]
    verdicts |= {Candidate(one, "a", chunk): said(899) for chunk in (256, 1024)}
    assert finalists(verdicts) == [Candidate(one, name, 512) for name in "abcd"], "chunks do not take all places"
    verdicts[Candidate(other, "e", 512)] = said(10)
    assert finalists(verdicts) == [*(Candidate(one, name, 512) for name in "abcd"), Candidate(other, "e", 512)]
    verdicts[Candidate(other, "a", 512)] = said(899, 0.1)
    assert finalists(verdicts) == [Candidate(s, n, 512) for s, n in ((one, "a"), (other, "a"), (one, "b"), (one, "c"))]


def test_a_lucky_seed_does_not_win_and_overlapping_ranges_are_a_tie() -> None:
    lucky, steady, near, far = (Candidate(Shape(n, 5 - n), "early", 512) for n in range(1, 5))
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
        effective=4, goodput_per_s=0.5, capacity=0.8, strain=2.0, served=1.0, ttft_p90_s=1.5, tbt_p90_s=0.2
    )


def test_who_serves_nobody_strains_without_end() -> None:
    rejected = row("r", outcome=Outcome.REJECTED, ttft_s=None, tbt_worst_s=None, stage="arrival", reason="full")
    found = verdict(sketch(run(rejected)), 8.0, 2.0, 0.1)
    assert (found.strain, found.served, found.ttft_p90_s) == (math.inf, 0.0, None)
    slow = Candidate(Shape(1, 3), "early", 512)
    assert ranked({replace(slow, policy="baseline"): found, slow: said(0, 40.0)})[0] == slow


def test_the_ladder_is_the_presets_pass_and_its_halves() -> None:
    assert ladder(8192) == [256, 512, 1024, 2048, 4096, 8192]
    assert ladder(512) == [64, 128, 256, 512]
    assert ladder(48) == [48]
    assert ladder(8192, "2048, 256") == [256, 2048]
    for text in ("8", "256,", "256,much"):
        with pytest.raises(ConfigError) as caught:
            ladder(8192, text)
        assert caught.value.key == "plan.chunks"
    assert [start(ladder(8192), coupled=both) for both in (True, False)] == [512, 2048]
    assert [start([256], coupled=both) for both in (True, False)] == [256, 256]
    assert near(256, CHUNKS) == [512]
    assert near(512, CHUNKS) == [256, 1024]


def test_the_search_of_a_chunk_does_not_multiply_the_simulations() -> None:
    landscape = hill(8, 5, {"baseline": 0, "early": 1, "predictive": 2}, coupled=100)
    alone = {c: height for c, height in landscape.items() if c.chunk == 512}
    verdicts = search(8, landscape)
    assert ranked(verdicts)[0].chunk == 512
    assert len(verdicts) < len(alone) + 12


def test_what_was_taken_for_given_is_varied_a_fifth_either_way() -> None:
    base = Scenario(trace="t", speedup=2.0, slo_ttft_s=10.0)
    best, coupled = Candidate(Shape(2, 2), "early", 512), Candidate(Shape(0, 0, 4), "early", 256)
    changes = changes_of(best, [best, coupled], POLICIES, CHUNKS, base, hides=False)
    seen = {(why, what): candidate for what, why, candidate in changes}
    assert len(seen) == len(changes) == 2 + 2 + 2 + 2 + 6 * 2 + 1
    assert seen["load", "+20%"].changes == (("speedup", 2.4),)
    assert seen["TTFT limit", "-20%"].changes == (("slo_ttft_s", 8.0),)
    assert seen["MFU of prefill", "-20%"].changes == (("mfu_scale", 0.8),)
    assert seen["another chunk", "1,024"] == replace(best, chunk=1024)
    assert seen["weights of mixed passes", "behind prompts, 4C"] == changed(coupled, hide_weights=True)


def test_the_nearest_are_the_best_of_a_few_shapes() -> None:
    shapes = [Shape(n, 5 - n) for n in range(1, 5)]
    verdicts = {Candidate(s, p, 512): said(10 * n + len(p)) for n, s in enumerate(shapes) for p in ("a", "bb")}
    assert nearest(verdicts) == [Candidate(shape, "bb", 512) for shape in shapes[:0:-1]]
