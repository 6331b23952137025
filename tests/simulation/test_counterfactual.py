"""Recorded runs in which one cost is over-estimated ten times: the right one is named, and its victims are found."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli.main import main
from conductor.counterfactual import Counterfactual, counterfactual
from conductor.past import Recorded, gather
from conductor.recording import read
from conductor.replay import machine_of, rejudged, replay
from halfmoon.errors import RecordingError
from report.records import RequestRow, Run
from tests.simulation.recorded import OVER, OVERBOOKED, recorded

COUNT, RATE = 120, 12.0
TTFT_S, TBT_S = 2.0, 0.1


@cache
def run_of(wrong: str, ttft_s: float = TTFT_S) -> tuple[list[str], Run, Recorded, Counterfactual]:
    lines, run = recorded(wrong, count=COUNT, rate=RATE, slo_ttft_s=ttft_s, slo_tbt_s=TBT_S)
    past = gather(read(lines))
    return lines, run, past, counterfactual(past)


@pytest.mark.parametrize("wrong", ["prefill", "transfer", "decode", "queue"])
def test_the_cost_that_was_over_estimated_is_named(wrong: str) -> None:
    _, _, _, result = run_of(wrong)
    factors = {error.term: error.factor for error in result.blame.terms}
    assert result.blame.worst == wrong
    assert 0.5 * OVER < (factors[wrong] or 0.0) < 1.2 * OVER
    assert all(factor is None or factor < OVER / 3 for term, factor in factors.items() if term != wrong)


def test_a_wrong_prefill_cost_makes_queues_look_long_and_the_queue_is_not_blamed_for_it() -> None:
    _, _, _, result = run_of("prefill")
    queue = next(error for error in result.blame.terms if error.term == "queue")
    assert queue.predicted_s > 5.0 * queue.actual_s
    assert queue.factor is not None
    assert queue.factor < OVER / 3


def test_right_beliefs_reject_nobody_and_nothing_is_to_blame() -> None:
    _, run, _, result = run_of("")
    assert all(row.effective for row in run.requests)
    assert [(p.policy, p.rejected, p.false_acceptances) for p in result.policies] == [("baseline", 0, 0)]
    assert all(error.factor is not None and error.factor < 2.0 for error in result.blame.terms)


# ---- who was rejected wrongly ----


def kept(row: RequestRow, ttft_s: float) -> bool:
    assert row.ttft_s is not None
    return row.ttft_s <= ttft_s and (row.tbt_worst_s or 0.0) <= TBT_S


@pytest.mark.parametrize(("ttft_s", "every"), [(TTFT_S, 16), (0.6, 13)])
def test_false_rejections_are_found_and_true_ones_are_not_called_false(ttft_s: float, every: int) -> None:
    """The truth: the whole run again, with that one request taken on."""
    _, _, past, result = run_of("prefill", ttft_s)
    rejected = [p.request_id for p in past.pasts if not p.taken]
    assert len(rejected) >= 20
    real = set()
    for request_id in (asked := rejected[::every]):
        _, again = recorded(
            "prefill", count=COUNT, rate=RATE, slo_ttft_s=ttft_s, slo_tbt_s=TBT_S, take=frozenset({request_id})
        )
        if kept(next(row for row in again.requests if row.request_id == request_id), ttft_s):
            real.add(request_id)
    found = set(result.false_rejected) & set(asked)
    assert len(found & real) >= 0.9 * len(real)
    assert found <= real
    assert result.sureness.right >= 0.95 * result.sureness.checked


def test_acceptances_that_missed_are_what_was_seen() -> None:
    _, run, _, result = run_of("", 0.3)
    missed = sum(not row.effective for row in run.requests if row.outcome == "finished")
    assert missed >= 5
    assert result.policies[0].false_acceptances == missed


# ---- the recording ----


def test_a_simulated_run_is_decided_again_bit_by_bit() -> None:
    lines, run, past, _ = run_of("prefill")
    result = replay(lines)
    assert result.difference is None
    assert result.outcomes["rejected"] == sum(row.outcome == "rejected" for row in run.requests)
    assert len(past.pasts) == len(result.records)


def test_a_fault_in_the_machine_itself_is_no_setting_and_shows_as_a_difference() -> None:
    lines = run_of("queue")[0]
    difference = replay(lines).difference
    assert difference is not None
    assert difference.call.name in ("on_request", "on_stream_finished", "on_worker_event", "on_tick")
    with pytest.raises(RecordingError, match="decided otherwise than was recorded"):
        gather(rejudged(lines))
    assert replay(lines, partial(machine_of, make_worker=OVERBOOKED)).difference is None


def test_a_policy_that_was_not_there_judges_the_recorded_state() -> None:
    lines, _, past, _ = run_of("prefill")
    assert {v.policy for p in past.pasts for v in p.verdicts} == {"baseline"}
    again = gather(rejudged(lines, partial(machine_of, shadows=["early", "forecast"])))
    assert {v.policy for p in again.pasts for v in p.verdicts} == {"baseline", "early", "forecast"}
    assert [next(v for v in p.verdicts if v.policy == "baseline") for p in again.pasts] == [
        p.verdicts[0] for p in past.pasts
    ]
    judged = {one.policy: one for one in counterfactual(again).policies}
    assert judged["baseline"] == counterfactual(past).policies[0]
    assert judged["early"].false_rejections > 0  # it believes the same wrong cost


def judged(arguments: list[str]) -> str:
    result = CliRunner().invoke(main, ["replay", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_says_it_all(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text("".join(run_of("prefill")[0]))
    text = judged([str(file), "--counterfactual", "--policy", "baseline"])
    assert "To blame: prefill, off by " in text
    assert "How sure: " in text
    refused = CliRunner().invoke(main, ["replay", str(file), "--counterfactual", "--policy", "psychic"])
    assert refused.exit_code == 1
    assert "--policy: got 'psychic'; expected one of baseline, early, predictive, forecast" in refused.output
    alone = CliRunner().invoke(main, ["replay", str(file), "--policy", "baseline"])
    assert alone.exit_code == 2


Change = Callable[[list[str]], None]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda lines: lines.__setitem__(-1, lines[-1][:40]), "it is cut off"),
        (lambda lines: lines.pop(7), "lines are missing or doubled"),
        (lambda lines: lines.__setitem__(9, lines[9].replace('"n":9', '"n":"9"')), "n: got '9'; expected int"),
    ],
)
def test_a_damaged_recording_is_not_judged(change: Change, why: str, tmp_path: Path) -> None:
    lines = list(run_of("prefill")[0])
    change(lines)
    file = tmp_path / "run.jsonl"
    file.write_text("".join(lines))
    result = CliRunner().invoke(main, ["replay", str(file), "--counterfactual"])
    assert result.exit_code == 1
    assert why in result.output
