"""Admission: verdicts, modes, and that no guess refuses anybody."""

from __future__ import annotations

import json

import pytest

from conductor.admission import Admission, Baseline, Case, Mode, Verdict, queue_full, refusal
from conductor.config import ConductorConfig
from conductor.effects import Slo
from conductor.policy import Placement
from conductor.scoring import DecodeScore, Option, PrefillScore
from conductor.view import ClusterView
from core.messages import LoadReport, PassSample
from halfmoon.errors import ConfigError
from halfmoon.types import NodeId, Outcome, RequestId
from tests.conductor_kit import Play, spec

P0, D0 = NodeId("p0"), NodeId("d0")


def case(*, ttft_s: float, tbt_s: float, slo: Slo, in_range: bool = True) -> Case:
    prefill = PrefillScore(P0, ttft_s, 0.0, 0.0, ttft_s, 0.0, 0, 0, None, in_range, False)
    decode = DecodeScore(D0, 0.5, tbt_s, 0.0, 0.5, 0.1, 0, in_range, False)
    placement = Placement(option=Option(prefill, decode), prefill_scores=(prefill,), decode_scores=(decode,))
    view = ClusterView(ConductorConfig())
    return Case(slo=slo, priority=0, placement=placement, view=view, flights=list, decode_s=None, now_s=0.0)


@pytest.mark.parametrize(
    ("ttft_s", "tbt_s", "slo", "in_range", "reason"),
    [
        (1.0, 0.1, Slo(), True, ""),
        (1.0, 0.1, Slo(ttft_s=1.0, tbt_s=0.1), True, ""),
        (1.1, 0.1, Slo(ttft_s=1.0, tbt_s=0.1), True, "ttft_slo"),
        (1.0, 0.2, Slo(ttft_s=1.0, tbt_s=0.1), True, "tbt_slo"),
        (9.0, 9.0, Slo(ttft_s=1.0, tbt_s=0.1), False, ""),
    ],
)
def test_the_baseline_judges_the_placement_by_the_requests_own_limits(
    ttft_s: float, tbt_s: float, slo: Slo, in_range: bool, reason: str
) -> None:
    verdict = Baseline().judge(case(ttft_s=ttft_s, tbt_s=tbt_s, slo=slo, in_range=in_range), Mode.ENFORCE)
    assert (verdict.reason, verdict.accept) == (reason, reason == "")


def test_an_idle_worker_is_probed_and_the_record_says_so() -> None:
    """The lock-out: a model gone wrong refused everything that has an SLO, and learned nothing from refusals."""
    play = Play("p0 d0")
    slow = [PassSample(new_tokens=n, context_tokens=0, batch=0, kv_tokens=0, seconds=float(n)) for n in range(1, 60)]
    play.say("p0", LoadReport(passes=tuple(slow)))
    assert play.request(spec("a", slo=Slo(ttft_s=1.0)))[0] == "begin a#1"
    record = play.machine.explain(RequestId("a"))
    assert record is not None
    verdict = record.verdicts[0]
    assert (verdict.accept, verdict.reason, verdict.limit, verdict.in_range) == (True, "probe", 1.0, False)
    assert verdict.predicted == pytest.approx(40.0, rel=0.01)
    (refused,) = play.request(spec("b", slo=Slo(ttft_s=1.0)))
    assert refused.startswith("end b rejected: Rejected: rejected (ttft_slo)")  # there is work that will tell
    fast = [PassSample(new_tokens=40, context_tokens=0, batch=0, kv_tokens=0, seconds=0.04)] * 4
    play.say("p0", LoadReport(passes=tuple(fast)))
    assert play.request(spec("c", slo=Slo(ttft_s=1.0)))[0] == "begin c#1"  # contradicted: out of range


def test_only_policies_in_force_refuse() -> None:
    missed = case(ttft_s=2.0, tbt_s=0.1, slo=Slo(ttft_s=1.0))
    judged = {mode: Admission([(Baseline(), mode)]).judge(missed) for mode in Mode}
    assert judged[Mode.OFF] == ()
    assert [v.accept for v in judged[Mode.SHADOW]] == [False]
    assert refusal(judged[Mode.SHADOW]) is None
    verdict = refusal(judged[Mode.ENFORCE])
    assert verdict is not None
    error = verdict.error()
    assert (error.reason, error.predicted, error.limit, error.unit, error.retry_after_s) == (
        "ttft_slo",
        2.0,
        1.0,
        "s",
        1.0,
    )


def test_a_full_queue_says_when_to_come_back() -> None:
    assert str(queue_full(10, 10, 0.5)) == (
        "rejected (queue_full): predicted 11 requests, limit 10 requests; retry in 0.5 s"
    )


class AlwaysNo:
    name = "no"

    def judge(self, case: Case, mode: Mode) -> Verdict:
        assert [flight.decode_node for flight in case.flights()] == [D0] * 1
        return Verdict(policy=self.name, mode=mode, accept=False, reason="no", predicted=1.0, limit=0.0)


def test_every_policy_s_verdict_is_recorded_and_shadows_are_not_obeyed() -> None:
    play = Play("p0 d0")
    play.request(spec("first"))
    play.machine._desk.admission = Admission([(Baseline(), Mode.ENFORCE), (AlwaysNo(), Mode.SHADOW)])
    assert play.request(spec("r"))[0] == "begin r#1"
    record = play.machine.explain(RequestId("r"))
    assert record is not None
    assert [(v.policy, v.accept) for v in record.verdicts] == [("baseline", True), ("no", False)]


def test_default_slos_are_in_force_only_when_configured() -> None:
    for enforced, begins in ((False, True), (True, False)):
        play = Play("p0 d0", slo=Slo(ttft_s=1e-6, tbt_s=1.0), enforce_default_slo=enforced)
        play.machine._desk.admission = Admission([(Eager(), Mode.ENFORCE)])
        assert (play.request(spec("r"))[0] == "begin r#1") is begins


class Eager(Baseline):
    """Believes guesses."""

    def judge(self, case: Case, mode: Mode) -> Verdict:
        missed = case.slo.ttft_s is not None and case.placement.ttft.seconds > case.slo.ttft_s
        return Verdict(policy="eager", mode=mode, accept=not missed, reason="ttft_slo")


# ---- records and settings ----


def test_a_record_tells_the_whole_story_as_json() -> None:
    play = Play("p0 p1 d0")
    play.request(spec("r"))
    play.failed("p0", "r#1")
    play.resume("r", [])
    play.reserved("d0", "r#2")
    node = "p0" if play.machine.summary(RequestId("r")).prefill_node == "p0" else "p1"
    play.prefilled(node, "r#2")
    play.joined("d0", "r#2")
    play.ended("d0", "r#2", num_output_tokens=8)
    play.finished_stream("r")
    record = play.machine.explain(RequestId("r"))
    assert record is not None
    told = json.loads(json.dumps(record.as_json()))
    assert [(c["number"], c["cause"]) for c in told["choices"]] == [(1, "arrived"), (2, "engine at p0: oh")]
    assert {s["node_id"] for s in told["choices"][0]["prefill_scores"]} == {"p0", "p1"}
    assert [s["what"] for s in told["steps"]] == [
        "reserve", "AttemptFailed", "lost: engine at p0: oh", "reserve", "Reserved", "PrefillDone", "DecodeJoined",
        "AttemptFinished",
    ]  # fmt: skip
    assert (told["outcome"], told["output_tokens"]) == (Outcome.FINISHED, 8)
    assert set(told["stats"]) == {"2.prefill", "2.decode"}
    assert set(told["prediction_errors"]) == {"ttft_s"}


def test_ended_records_are_bounded_oldest_first() -> None:
    play = Play("p0 d0", records_max=2)
    for name in "abc":
        play.request(spec(name))
        play.cancel(name)
    assert [play.machine.explain(RequestId(name)) is not None for name in "abc"] == [False, True, True]
    assert play.machine.summary(RequestId("a")).attempts == 0


@pytest.mark.parametrize(
    ("key", "value"), [("attempts_max", 0), ("retry_s", 0.0), ("silent_s", 1.0), ("closed_wait_s", float("nan"))]
)
def test_settings_are_checked_and_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"conductor.{key}"):
        ConductorConfig(**{key: value})  # type: ignore[arg-type]
