"""A decision record sets every predicted term beside what it came to; what nobody has said stays unknown."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from conductor.actuals import Seen, checked, seen_of
from conductor.config import ConductorConfig, Fit
from conductor.decisions import DecisionRecord
from core.cost import CostPrior, Estimate, WorkerCost
from core.messages import AttemptStats, DecodeJoined, PassSample, PrefillDone, TransferSample
from halfmoon.types import NodeId, Outcome, RequestId
from tests.conductor_kit import Play, attempt_of, prompt, spec

SEEN = Seen(tokenize_s=0.010, ttft_s=0.100, second_gap_s=0.030, tbt_mean_s=0.021, tbt_worst_s=0.040, tbt_max_s=0.05)


def served(play: Play, *, prefill: AttemptStats, seen: Seen | None) -> DecisionRecord:
    """A request of 40 tokens that waited 20 ms for nothing that the conductor knew of."""
    play.request(spec("r", tokens=prompt(40)))
    play.now_s += 0.09
    play.say("p0", PrefillDone(attempt_id=attempt_of("r#1"), first_token_id=7, stats=prefill))
    play.reserved("d0", "r#1")
    play.now_s += 0.006
    play.say("d0", DecodeJoined(attempt_id=attempt_of("r#1"), stats=AttemptStats(node_id=NodeId("d0"), pull_s=0.004)))
    play.machine.on_stream_finished(RequestId("r"), play.now_s, seen=seen)
    play.wait(1.0)
    record = play.machine.explain(RequestId("r"))
    assert record is not None
    assert record.outcome is Outcome.FINISHED
    return record


def test_every_term_stands_beside_what_it_came_to() -> None:
    stats = AttemptStats(node_id=NodeId("p0"), queue_s=0.001, fetch_s=0.005, compute_s=0.060)
    terms = served(Play("p0 d0"), prefill=stats, seen=SEEN).terms()
    predicted = {name: term.predicted_s for name, term in terms.items()}
    actual = {name: term.actual_s for name, term in terms.items()}
    assert predicted == pytest.approx(
        {"ttft_s": 0.060, "before_s": 0.010, "queue_s": 0.0, "fetch_s": 0.0, "prefill_s": 0.050, "held_s": None,
         "tbt_s": 0.021, "tbt_worst_s": None, "second_gap_s": 0.025, "handover_s": 0.004, "pull_s": 0.004}, abs=1e-4,
    )  # fmt: skip
    assert actual == pytest.approx(
        {"ttft_s": 0.100, "before_s": 0.010, "queue_s": 0.025, "fetch_s": 0.005, "prefill_s": 0.060, "held_s": None,
         "tbt_s": 0.021, "tbt_worst_s": 0.040, "second_gap_s": 0.030, "handover_s": 0.006, "pull_s": 0.004},
    )  # fmt: skip


def test_what_was_held_back_is_a_term_of_its_own_and_the_gap_counts_from_when_it_came() -> None:
    stats = AttemptStats(node_id=NodeId("p0"), queue_s=0.001, fetch_s=0.005, compute_s=0.060)
    seen = replace(SEEN, ttft_s=0.125, held_s=0.025, second_gap_s=0.005)
    actual = {name: term.actual_s for name, term in served(Play("p0 d0"), prefill=stats, seen=seen).terms().items()}
    parts = ("before_s", "queue_s", "fetch_s", "prefill_s", "held_s")
    assert [actual[name] for name in parts] == pytest.approx([0.010, 0.025, 0.005, 0.060, 0.025])
    assert actual["ttft_s"] == pytest.approx(0.125)
    assert actual["second_gap_s"] == pytest.approx(0.030)


def test_what_nobody_has_said_is_unknown_and_the_record_is_complete_all_the_same() -> None:
    stats = AttemptStats(node_id=NodeId("p0"), compute_s=math.nan)
    play = Play("p0 d0")
    record = served(play, prefill=stats, seen=Seen(tokenize_s=0.01, ttft_s=math.inf, tbt_worst_s=-1.0))
    actual = {name: term.actual_s for name, term in record.terms().items() if term.actual_s is not None}
    assert actual == pytest.approx(
        {"ttft_s": 0.1, "before_s": 0.01, "handover_s": 0.006, "pull_s": 0.004}
    )  # the worker: 90 ms
    assert (record.actuals_refused, play.counter("actuals_refused")) == (3, 3)


def test_a_request_that_ends_without_a_token_has_predictions_only() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    play.cancel("r")
    record = play.machine.explain(RequestId("r"))
    assert record is not None
    assert {name for name, term in record.terms().items() if term.actual_s is not None} == {"before_s"}
    assert record.prediction_errors() == {}


def test_the_placement_that_gave_the_first_token_is_the_one_that_is_judged() -> None:
    play = Play("p0 p1 d0")
    play.request(spec("r"))
    play.now_s += 1.0
    play.failed("p0", "r#1")
    play.resume("r", [])
    play.now_s += 0.06
    node = play.machine.summary(RequestId("r")).prefill_node
    stats = AttemptStats(node_id=NodeId(node), compute_s=0.05)
    play.say(node, PrefillDone(attempt_id=attempt_of("r#2"), first_token_id=7, stats=stats))
    record = play.machine.explain(RequestId("r"))
    assert record is not None
    assert record.first_token_choice is record.choices[1]
    assert record.terms()["before_s"].actual_s == pytest.approx(1.0)
    assert record.terms()["queue_s"].actual_s == pytest.approx(0.01)


def test_each_record_is_told_once_when_it_is_complete() -> None:
    play, told = Play("p0 d0"), []
    play.machine.tell_records(lambda record: told.append((record.request_id, record.outcome)))
    play.request(spec("a"))
    play.request(spec("b"))
    assert told == []
    play.cancel("b")
    play.cancel("b")
    assert told == [("b", Outcome.CANCELLED)]


# ---- what a front end sees ----


def test_a_front_end_tells_what_its_client_saw() -> None:
    seen = seen_of([11.0, 11.5, 11.5, 11.6], arrived_s=10.0, tokenized_s=10.25)
    assert (seen.tokenize_s, seen.ttft_s, seen.second_gap_s) == (0.25, 1.0, 0.5)
    assert seen.tbt_mean_s == pytest.approx(0.05)
    assert (seen.tbt_worst_s, seen.tbt_max_s) == (0.5, 0.5)
    assert seen_of([11.0], arrived_s=10.0, tokenized_s=10.0) == Seen(tokenize_s=0.0, ttft_s=1.0)
    assert seen_of([11.5, 11.5], arrived_s=10.0, tokenized_s=10.0, first_came_s=11.0).held_s == 0.5
    assert seen_of([], arrived_s=10.0, tokenized_s=10.5) == Seen(tokenize_s=0.5)


def test_what_is_no_duration_is_made_unknown() -> None:
    assert checked(Seen(ttft_s=math.nan, tbt_max_s=1.0, tokenize_s=-0.1)) == (Seen(tbt_max_s=1.0), 2)


# ---- a frozen fit ----


def test_a_frozen_profile_is_believed_and_shows_how_wrong_it_is() -> None:
    prior = CostPrior(prefill=(0.01, 1e-3, 1e-12), decode=(0.02, 1e-3, 1e-9), transfer=(1e-3, 1e-9))
    cost = WorkerCost(prior, tokens_per_pass_max=512, frozen=True)
    before = (cost.prefill_s(100, 0), cost.decode_step_s(4, 1000), cost.transfer_s(10_000_000, "p1"))
    assert before == (Estimate(0.01 + 0.1 + 5e-9, True), Estimate(0.024001, True), Estimate(0.011, True))
    for _ in range(50):
        cost.observe_pass(PassSample(new_tokens=100, context_tokens=0, batch=0, kv_tokens=0, seconds=0.011))
        cost.observe_pass(PassSample(new_tokens=0, context_tokens=0, batch=4, kv_tokens=1000, seconds=0.24))
        cost.observe_transfer(TransferSample(source=NodeId("p1"), link="shm", num_bytes=10_000_000, seconds=0.11))
    assert (cost.prefill_s(100, 0), cost.decode_step_s(4, 1000), cost.transfer_s(10_000_000, "p1")) == before
    assert {name: round(r.bias, 2) for name, r in cost.residuals().items()} == {
        "prefill": -9.0, "decode": 0.9, "transfer": 0.9,
    }  # fmt: skip


def test_a_conductor_may_be_told_to_believe_its_profile() -> None:
    play = Play("p0 d0", fit=Fit.FROZEN)
    play.request(spec("r"))
    record = play.machine.explain(RequestId("r"))
    assert record is not None
    assert record.choices[0].prefill.in_range
    assert ConductorConfig().fit is Fit.ONLINE
