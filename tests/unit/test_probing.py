"""Limits hold on idle workers too, but for a probe now and then; and a model that has gone wrong is found out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from conductor.admission_config import AdmissionConfig, Mode
from conductor.admission_policies import POLICIES, admission_named
from conductor.config import Fit
from conductor.decisions import DecisionRecord
from conductor.effects import Slo
from conductor.probing import Probes
from core.messages import LoadReport, PassSample
from halfmoon.errors import ConfigError
from halfmoon.types import RequestId
from tests.conductor_kit import Play, prompt, spec

A, B = RequestId("a"), RequestId("b")


def passes(*seconds: float, new: int = 40) -> LoadReport:
    return LoadReport(
        passes=tuple(PassSample(new_tokens=new, context_tokens=0, batch=0, kv_tokens=0, seconds=s) for s in seconds)
    )


def measured(policy: str = "forecast", seconds_a_token: float = 1.0) -> Play:
    """One prefill worker that is known at prompts of 1 to 59 tokens."""
    play = Play("p0 d0", admission=admission_named(policy, AdmissionConfig(defer=False)))
    samples = [
        PassSample(new_tokens=n, context_tokens=0, batch=0, kv_tokens=0, seconds=seconds_a_token * n)
        for n in range(1, 60)
    ]
    play.say("p0", LoadReport(passes=tuple(samples)))
    return play


def asked(play: Play, name: str, ttft_s: float = 1.0, tokens: int = 40, tbt_s: float | None = None) -> bool:
    """Whether it is let in; it leaves at once, so that the workers are idle again."""
    request = spec(name, slo=Slo(ttft_s=ttft_s, tbt_s=tbt_s), tokens=prompt(tokens, seed=hash_of(name)))
    begun = play.request(request)[0] == f"begin {name}#1"
    if begun:
        play.cancel(name)
    return begun


def hash_of(name: str) -> int:
    return int(name.strip("abcdefghijklmnopqrstuvwxyz") or 0)


def record_of(play: Play, name: str) -> DecisionRecord:
    record = play.machine.explain(RequestId(name))
    assert record is not None
    return record


def names() -> Iterator[str]:
    number = 0
    while True:
        number += 1
        yield f"r{number}"


@pytest.mark.parametrize("policy", POLICIES)
def test_an_idle_worker_keeps_a_limit_that_it_is_sure_to_miss(policy: str) -> None:
    play = measured(policy)
    (refused,) = play.request(spec("a", slo=Slo(ttft_s=1.0)))
    assert refused == ("end a rejected: Rejected: rejected (ttft_slo): predicted 39.83 s, limit 1 s; retry in 38.8 s")
    (verdict,) = [v for v in record_of(play, "a").verdicts if v.policy == policy]
    assert (verdict.accept, verdict.in_range, verdict.idle, verdict.probed_ago_s) == (False, True, ("p0",), None)


def test_an_idle_decode_worker_keeps_a_tbt_limit_at_once_since_waiting_would_not_help() -> None:
    play = Play("p0 d0", fit=Fit.FROZEN)
    (refused,) = play.request(spec("a", slo=Slo(tbt_s=0.01)))
    assert refused.startswith("end a rejected: Rejected: rejected (tbt_slo): predicted 0.021 s, limit 0.01 s")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_guess_refuses_nobody_and_the_record_says_that_it_is_one(policy: str) -> None:
    play = measured(policy)
    assert asked(play, "r1", ttft_s=0.1, tokens=400)
    (verdict,) = [v for v in record_of(play, "r1").verdicts if v.policy == policy]
    assert (verdict.accept, verdict.reason, verdict.in_range, verdict.idle) == (True, "guess", False, ())


@pytest.mark.parametrize("policy", POLICIES)
def test_one_of_ten_and_one_in_ten_seconds_is_a_probe(policy: str) -> None:
    """One a second: the tenth, the twentieth, …; eight a second: no more of them."""
    play = measured(policy)
    let_in = []
    for number in range(1, 31):
        play.now_s += 1.0
        let_in += [number] if asked(play, f"r{number}") else []
    assert let_in == [10, 20, 30]
    (first, second) = (next(v for v in record_of(play, f"r{n}").verdicts if v.policy == policy) for n in (10, 20))
    assert (first.reason, first.idle, first.probed_ago_s, first.in_range) == ("probe", ("p0",), None, True)
    assert (second.reason, second.probed_ago_s) == ("probe", 10.0)
    for number in range(31, 121):
        play.now_s += 0.125
        let_in += [number] if asked(play, f"r{number}") else []
    assert let_in == [10, 20, 30, 110]


def test_one_whose_limit_is_below_a_hundredth_of_the_prediction_is_never_a_probe() -> None:
    play = measured()
    for name, _ in zip(names(), range(50), strict=False):
        play.now_s += 1.0
        assert not asked(play, name, ttft_s=0.39)
    assert record_of(play, "r50").verdicts[-1].idle == ()
    assert not any(asked(play, f"q{n}", ttft_s=0.41) for n in range(100, 109))  # what was hopeless does not count
    assert asked(play, "q109", ttft_s=0.41)


def test_while_a_probe_runs_the_worker_is_not_idle_and_nobody_follows() -> None:
    play = measured()
    for number in range(1, 10):
        assert not asked(play, f"r{number}")
    assert play.request(spec("probe", slo=Slo(ttft_s=1.0)))[0] == "begin probe#1"
    play.now_s += 60.0
    (refused,) = play.request(spec("late", slo=Slo(ttft_s=1.0)))
    assert refused.startswith("end late rejected: Rejected: rejected (ttft_slo)")
    assert record_of(play, "late").verdicts[-1].idle == ()


@pytest.mark.parametrize("policy", ["baseline", "early", "predictive"])
def test_a_probe_stays_one_when_it_is_judged_once_more_after_its_prefill(policy: str) -> None:
    play = Play("p0 d0", fit=Fit.FROZEN, admission=admission_named(policy, AdmissionConfig(probe_one_in=1)))
    slo = Slo(tbt_s=0.01)
    assert play.request(spec("a", slo=slo))[0] == "begin a#1"
    assert "d0 <- reserve a#1 40(40) from p0@e1" in play.prefilled("p0", "a#1")
    assert {(v.stage, v.reason) for v in record_of(play, "a").verdicts if v.policy == policy and v.reason} >= {
        ("decode", "probe")
    }
    play.cancel("a")
    play.now_s += 5.0
    begun = play.request(spec("b", slo=slo))[0] == "begin b#1"
    refused = play.prefilled("p0", "b#1") if begun else play._heard(play.effects)
    assert any(words.startswith("end b rejected") for words in refused)


def test_a_policy_in_shadow_keeps_its_own_books_and_changes_nothing() -> None:
    """Nobody is refused, so each that `forecast` in shadow calls a probe is one."""
    alone, shadowed = measured("baseline"), measured("baseline")
    for number in range(1, 31):
        for play in (alone, shadowed):
            play.now_s += 1.0
        assert asked(alone, f"r{number}") == asked(shadowed, f"r{number}")
    play = Play("p0 d0", fit=Fit.FROZEN, admission=AdmissionConfig(forecast=Mode.SHADOW))
    said = []
    for number in range(1, 21):
        play.now_s += 1.0
        assert asked(play, f"r{number}", ttft_s=0.01)
        said.append(next(v.accept for v in record_of(play, f"r{number}").verdicts if v.policy == "forecast"))
    assert said == ([False] * 9 + [True]) * 2


@pytest.mark.parametrize("limit_s", [0.6, 4.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_that_is_a_hundred_times_too_slow_is_found_out(policy: str, limit_s: float) -> None:
    """40 s believed, 0.4 s true: before, it refused everybody that has a limit, and learned nothing from refusals."""
    play = measured(policy)
    let_in = []
    for number in range(1, 201):
        play.now_s += 0.5
        name = f"r{number}"
        request = spec(name, slo=Slo(ttft_s=limit_s), tokens=prompt(40, seed=number))
        if play.request(request)[0] == f"begin {name}#1":
            let_in.append(number)
            play.say("p0", passes(0.4))
            play.cancel(name)
    first_probes, rest = let_in[:3], let_in[3:]
    assert first_probes == [10, 30, 50]
    assert rest == list(range(rest[0], 201))  # from here on everybody
    assert rest[0] <= 91
    assert record_of(play, "r200").verdicts[-1].predicted < limit_s or record_of(play, "r200").verdicts[-1].reason


# ---- the books alone ----


def test_probes_are_counted_in_time_and_in_requests() -> None:
    probes = Probes()
    assert not probes.due(A, 0.0, 10.0, 2)
    probes.see(A, 0.0, let_in=False)
    assert (probes.due(A, 0.0, 10.0, 2), probes.ago_s(0.0)) == (True, None)
    probes.see(A, 0.0, let_in=True)
    probes.see(B, 1.0, let_in=False)
    assert (probes.due(A, 2.0, 10.0, 2), probes.due(B, 2.0, 10.0, 2)) == (True, False)
    assert (probes.due_in_s(2.0, 10.0), probes.due(B, 10.0, 10.0, 2), probes.ago_s(10.0)) == (8.0, True, 10.0)


def test_at_least_one_of_some_is_a_probe() -> None:
    with pytest.raises(ConfigError, match="probe_one_in"):
        AdmissionConfig(probe_one_in=0)
