"""What a plan says where no candidate keeps the limits, by what more nodes would do."""

from __future__ import annotations

import pytest

from cli.plan import more_nodes
from cli.planned import Planned, counted_runs, no_answer
from cli.planning import Candidate, Shape, Verdict, finals


def said(share: float) -> Verdict:
    return Verdict(
        effective=round(100 * share), goodput_per_s=share, capacity=share, strain=2.0, ttft_p90_s=3.0, tbt_p90_s=0.2
    )


def told(best: Candidate, twice: float, alone: float) -> str:
    more, rare = more_nodes(best, 2.0)
    verdicts = {best: said(0.5), rare: said(alone)} | ({} if more is None else {more: said(twice)})
    found = Planned(verdicts=verdicts, ranking=finals(verdicts, [best], 1), seeds=1, goal=90.0)
    return "\n".join(map(str, no_answer(found, more, rare)))


@pytest.mark.parametrize(
    ("twice", "alone", "sentence"),
    [
        (0.95, 0.99, "So more nodes would do; how many are needed was not searched: try more --gpus."),
        (0.70, 0.99, "So more nodes would help; how many are needed was not searched"),
        (0.55, 0.60, "So more nodes of this kind, so used, would hardly reach 90 %"),
    ],
)
def test_more_nodes_help_as_far_as_was_seen(twice: float, alone: float, sentence: str) -> None:
    text = told(Candidate(Shape(1, 1), "early", 512), twice, alone)
    assert "No candidate keeps these limits: both for 90 % of all requests (--goal)." in text
    assert "1P+1D, early, chunks of 512, does for 50.0 %" in text
    assert f"With twice its nodes: {100 * twice:.1f} % keep both, p90 of TTFT 3.00 s, of TBT 200.0 ms." in text
    assert sentence in text


def test_twice_as_many_nodes_as_can_be_simulated_are_not_tried() -> None:
    text = told(Candidate(Shape(300, 300), "early", 512), 0.0, 0.99)
    assert "With twice its nodes" not in text
    assert "So more nodes would help" in text


def test_runs_are_counted_by_what_they_were_for() -> None:
    assert counted_runs({"search": 4, "other seeds": 0, "sensitivity": 2}) == "6 simulations (4 search, 2 sensitivity)"
