"""Admission: verdicts, modes, and that no guess refuses anybody."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from conductor.admission import Admission, Case, Finding, Flight, Stage, judge, queue_full, refusal
from conductor.admission_config import AdmissionConfig, Mode, Reserve
from conductor.admission_policies import (
    Baseline,
    Early,
    Forecast,
    Predictive,
    admission_named,
    admission_of,
    name_of,
    shared,
)
from conductor.config import ConductorConfig
from conductor.effects import Slo
from conductor.scoring import DecodeScore, PrefillScore
from conductor.survival import OutputLengths
from conductor.view import ClusterView, DecodeBook
from core.messages import LoadReport
from halfmoon.errors import ConfigError
from halfmoon.types import AttemptId, NodeId, Outcome, RequestId
from tests.conductor_kit import PRIOR, Play, info, spec

P0, D0, D1 = NodeId("p0"), NodeId("d0"), NodeId("d1")
BLOCK = 10
SHORT = OutputLengths()
"""Every output has 100 tokens: none of more than 107 was seen."""
for _ in range(50):
    SHORT.see(100)


def score(ttft_s: float = 1.0, in_range: bool = True) -> PrefillScore:
    return PrefillScore(P0, ttft_s, 0.0, 0.0, ttft_s, 0.0, 0, 0, None, in_range, False)


def case(
    *,
    slo: Slo,
    ttft_s: float = 1.0,
    tbt_s: float = 0.1,
    in_range: bool = True,
    room_load: float = 0.1,
    tokens: int = 100,
    flights: tuple[Flight, ...] = (),
    **changes: object,
) -> Case:
    """Two decode workers of 1,000 tokens; d0 is busy, so that it is not probed."""
    view = ClusterView(ConductorConfig(prior=PRIOR))
    for name in ("d0", "d1"):
        view.join(info(name, num_device_blocks=100, sequences_max=8), 0.0)
    view.join(info("p0"), 0.0).book_prefill(AttemptId(RequestId("other"), 1), 0.1, 0.0)
    busy = view.get(D0)
    assert busy is not None
    busy.book_decode(AttemptId(RequestId("other"), 1), DecodeBook(1, 1))
    decode = DecodeScore(D0, max(room_load, 0.5), tbt_s, 0.0, 0.5, room_load, 0, in_range, False)
    built = Case(
        stage=Stage.ARRIVAL,
        request_id=RequestId("r"),
        slo=slo,
        default_slo=Slo(),
        priority=0,
        now_s=100.0,
        waited_s=0.0,
        tokens=tokens,
        output_tokens=100,
        output_max=1000,
        block_size=BLOCK,
        prefill=score(ttft_s, in_range),
        decode=decode,
        view=view,
        flights=lambda node_id: [f for f in flights if node_id is None or f.decode_node == node_id],
        in_line=0,
        decode_s=10.0,
        lengths=OutputLengths(),
        config=AdmissionConfig(),
    )
    return replace(built, **changes)  # type: ignore[arg-type]


def flight(tokens: int, *, left_s: float = 0.0, decoding_for_s: float | None = 1.0, node: NodeId = D0) -> Flight:
    return Flight(node, tokens, 0, 1000, left_s, decoding_for_s)


LIMITS = Slo(ttft_s=1.0, tbt_s=0.1)


@pytest.mark.parametrize(
    ("ttft_s", "slo", "in_range", "reason"),
    [
        (1.0, Slo(), True, ""),
        (1.0, LIMITS, True, ""),
        (1.1, LIMITS, True, "ttft_slo"),
        (9.0, LIMITS, False, "guess"),
    ],
)
def test_every_policy_judges_the_prefill_side_by_the_requests_own_limit(
    ttft_s: float, slo: Slo, in_range: bool, reason: str
) -> None:
    for policy in (Baseline(), Early(), Predictive(), Forecast()):
        verdict = judge(policy, case(ttft_s=ttft_s, slo=replace(slo, tbt_s=None), in_range=in_range), Mode.ENFORCE)
        assert (verdict.reason, verdict.accept) == (reason, reason != "ttft_slo"), policy.name


def test_what_it_has_waited_counts_against_its_ttft_limit() -> None:
    late = case(slo=Slo(ttft_s=10.0), ttft_s=2.0, waited_s=8.5)
    verdict = judge(Forecast(), late, Mode.ENFORCE)
    assert (verdict.reason, verdict.predicted, verdict.limit, verdict.load) == ("ttft_slo", 10.5, 10.0, 1.05)


FULL = (flight(400), flight(520))


@pytest.mark.parametrize(
    ("policy", "stage", "reason"),
    [
        (Baseline(), Stage.ARRIVAL, ""),  # the decode side has its turn when the prefill has ended
        (Baseline(), Stage.DECODE, "decode_room"),
        (Early(), Stage.ARRIVAL, "decode_room"),
        (Early(), Stage.DECODE, "decode_room"),
        (Predictive(), Stage.DECODE, "decode_room"),
        (Forecast(), Stage.DECODE, ""),  # what was let in gets its room
    ],
)
def test_the_decode_side_by_its_load_now(policy: Baseline, stage: Stage, reason: str) -> None:
    full = case(slo=Slo(), stage=stage, room_load=1.1, flights=FULL)
    verdict = judge(policy, full if stage is Stage.ARRIVAL else replace(full, prefill=None), Mode.ENFORCE)
    assert verdict.reason == reason
    if reason:
        assert (verdict.predicted, verdict.limit, verdict.unit, verdict.stage) == (1020.0, 1000.0, "KV tokens", stage)
        assert str(verdict.error()).startswith(
            f"rejected (decode_room{' at decode' if stage is Stage.DECODE else ''}): predicted 1020 KV tokens, limit"
        )


def test_prompts_that_are_still_computed_are_no_load_now_but_they_are_in_a_forecast() -> None:
    coming = (flight(800, left_s=0.5, decoding_for_s=None), flight(150))
    now = case(slo=Slo(), room_load=1.1, flights=coming)
    assert [judge(p, now, Mode.ENFORCE).accept for p in (Early(), Forecast())] == [True, False]


def test_the_paper_s_forecast_takes_long_runners_for_finished_and_spreads_the_coming_over_the_pool() -> None:
    pool = (
        flight(1800, decoding_for_s=9.5),  # in 1 s it will have decoded for longer than the mean of 10 s
        flight(900, left_s=0.9, decoding_for_s=None, node=D1),
        flight(500, left_s=1.1, decoding_for_s=None),  # its prefill ends after this one's
    )
    verdict = judge(Predictive(), case(slo=Slo(), room_load=1.1, flights=pool), Mode.ENFORCE)
    assert (verdict.accept, verdict.predicted) == (True, 900 / 2 + 100)


def test_our_forecast_counts_on_what_outputs_of_that_age_have_shown() -> None:
    """1 s at 21.. ms a step is under 48 tokens: one of age 0 will be there, one of age 95 will not."""
    old, young = flight(900, decoding_for_s=2.2), flight(900, decoding_for_s=0.0)
    accepts = [
        judge(Forecast(), case(slo=Slo(), room_load=1.5, lengths=SHORT, flights=(f,)), Mode.ENFORCE).accept
        for f in (old, young)
    ]
    assert accepts == [True, False]


def test_our_forecast_keeps_the_room_of_those_let_in_before() -> None:
    """A long prompt let in for 900 tokens in 5 s: a short one may not take them, though it would join 4 s earlier."""
    later = flight(900, left_s=5.0, decoding_for_s=None)
    kept = case(slo=Slo(), room_load=1.5, tokens=200, flights=(later,))
    assert not judge(Forecast(), kept, Mode.ENFORCE).accept
    gone_by_then = replace(kept, lengths=SHORT, config=AdmissionConfig(horizon_s=60.0))
    assert judge(Forecast(), gone_by_then, Mode.ENFORCE).accept


def test_what_sequences_share_is_told_by_their_workers_report() -> None:
    """Three run, with 600 tokens in 48 of 100 blocks of 10; a fourth has 100 tokens of room and does not run yet."""
    worker = case(slo=Slo()).worker
    assert worker is not None
    pulling = flight(100, decoding_for_s=None)._replace(reserved=True)
    assert shared(worker, [pulling], BLOCK) == 0.0  # nothing was reported
    worker.load = LoadReport(kv_tokens=600, running_sequences=3, free_device_blocks=40, evictable_device_blocks=12)
    assert shared(worker, [pulling], BLOCK) == pytest.approx(1.0 - 480 / 715)
    assert shared(worker, [], BLOCK) == pytest.approx(1.0 - 480 / 615)
    worker.load = LoadReport(kv_tokens=600, running_sequences=3, free_device_blocks=20)
    assert shared(worker, [], BLOCK) == 0.0  # blocks of others that are not running: not less than none


def test_before_outputs_were_seen_no_room_is_counted_on() -> None:
    held = case(slo=Slo(), room_load=1.5, flights=(flight(900, decoding_for_s=9.0),))
    assert not judge(Forecast(), held, Mode.ENFORCE).accept


def test_a_lower_class_leaves_headroom_until_it_has_aged() -> None:
    nearly = case(slo=Slo(), room_load=0.93)
    accepts = {
        (priority, waited_s): judge(
            Forecast(), replace(nearly, priority=priority, waited_s=waited_s), Mode.ENFORCE
        ).accept
        for priority, waited_s in ((0, 0.0), (-1, 0.0), (-2, 0.0), (-2, 10.0), (5, 0.0), (-100, 0.0))
    }
    assert accepts == {
        (0, 0.0): True,
        (-1, 0.0): True,  # 0.95
        (-2, 0.0): False,  # 0.9
        (-2, 10.0): True,
        (5, 0.0): True,
        (-100, 0.0): False,
    }
    half = replace(nearly, priority=-100, decode=nearly.decode._replace(room_load=0.49))
    assert judge(Forecast(), half, Mode.ENFORCE).accept  # half of every limit is for everybody


def test_only_policies_in_force_refuse() -> None:
    missed = case(ttft_s=2.0, slo=Slo(ttft_s=1.0))
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


@pytest.mark.parametrize(
    ("config", "reserve"),
    [
        (AdmissionConfig(), Reserve.DURING),
        (AdmissionConfig(forecast=Mode.SHADOW), Reserve.WITH),
        (AdmissionConfig(baseline=Mode.ENFORCE), Reserve.DURING),
        (AdmissionConfig(forecast=Mode.OFF, early=Mode.ENFORCE), Reserve.AFTER),
        (AdmissionConfig(early=Mode.ENFORCE, reserve=Reserve.BEFORE), Reserve.BEFORE),
    ],
)
def test_decode_room_is_asked_for_when_the_policies_in_force_say(config: AdmissionConfig, reserve: Reserve) -> None:
    assert admission_of(config).reserve is reserve


class AlwaysNo:
    name = "no"
    reserve = Reserve.WITH

    def findings(self, case: Case) -> list[Finding]:
        return [Finding("no", 2.0, 1.0, "s", None, 1.0)]


def test_every_policy_s_verdict_is_recorded_and_shadows_are_not_obeyed() -> None:
    play = Play("p0 d0")
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

    def findings(self, case: Case) -> list[Finding]:
        return [f._replace(doubt=None) for f in super().findings(case)]


@pytest.mark.parametrize("name", ["none", "baseline", "early", "predictive", "forecast", "early+defer"])
def test_policies_are_compared_by_name(name: str) -> None:
    config = admission_named(name, AdmissionConfig())
    in_force = [p for p in ("baseline", "early", "predictive", "forecast") if getattr(config, p) is Mode.ENFORCE]
    assert in_force == ([] if name == "none" else [name.removesuffix("+defer")])
    assert config.defer is (name in ("forecast", "early+defer"))
    assert name_of(config) == name


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="admission: got 'oracle'; expected one of baseline"):
        admission_named("oracle", AdmissionConfig())


@pytest.mark.parametrize(
    ("key", "value"),
    [("slack_share", 1.5), ("slack_share", float("nan")), ("defer_s_max", 0.0), ("sigmas", -1.0), ("backfill", -1)],
)
def test_admission_settings_are_checked_and_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        AdmissionConfig(**{key: value})  # type: ignore[arg-type]


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
    assert set(told["prediction_errors"]) == {"ttft_s", "queue_s", "fetch_s", "prefill_s", "handover_s"}


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
