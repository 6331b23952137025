"""Who is put off, in which order they come in, how long they wait; and decode room that is asked for later."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from conductor.admission_config import AdmissionConfig
from conductor.admission_policies import admission_named
from conductor.attempts import Phase
from conductor.effects import Slo
from conductor.oscillation import Oscillation, PoolLoads, Swing, pool_loads
from conductor.survival import EDGES, OutputLengths
from core.messages import LoadReport, PassSample
from halfmoon.types import RequestId
from tests.conductor_kit import Play, attempt_of, prompt, spec


def full(policy: str = "forecast", blocks: int = 4, prefill_blocks: int = 1000, **config: object) -> Play:
    """One decode worker, whose room `a` has."""
    admission = replace(admission_named(policy, AdmissionConfig()), **config)  # type: ignore[arg-type]
    play = Play("", admission=admission)
    play.join("p0", num_device_blocks=prefill_blocks)
    play.join("d0", num_device_blocks=blocks)
    play.now_s = 200.0
    play.request(spec("a"))
    return play


def waiting(play: Play) -> list[str]:
    """By name."""
    desk = play.machine._desk
    return sorted(str(name) for name in desk.requests if name in desk.waiting)


# ---- waiting ----


def test_who_finds_no_room_begins_when_it_is_freed() -> None:
    play = full()
    assert play.request(spec("b")) == []
    assert play.cancel("a") == [
        "d0 <- cancel a#1: client gone",
        "p0 <- cancel a#1: client gone",
        "begin b#1",
        "d0 <- reserve b#1 40(40) from p0@e1",
        "p0 <- prefill b#1 40(40)",
    ]
    assert waiting(play) == []


def test_who_waits_is_judged_again_with_the_ticks_but_not_by_every_event() -> None:
    play = full()
    play.request(spec("b"))
    play.request(spec("c"))
    assert len(play.cancel("a")) == 5  # c begins: the newest
    assert len(play.cancel("c")) == 2  # at the same moment: b waits for the next
    assert play.wait(0.05) == ["begin b#1", "d0 <- reserve b#1 40(40) from p0@e1", "p0 <- prefill b#1 40(40)"]


def test_a_newcomer_goes_before_others_of_its_size_if_it_fits() -> None:
    play = full(blocks=7)
    play.request(spec("b", tokens=prompt(70)))  # 5 blocks of 16 tokens
    assert play.request(spec("c", tokens=prompt(50)))[0] == "begin c#1"  # 4
    record = play.machine.explain(RequestId("c"))
    assert record is not None
    assert record.steps[0].what == "deferred: 1 others wait"
    assert waiting(play) == ["b"]


def test_a_smaller_one_goes_where_there_is_no_claim() -> None:
    """`a` and `x` have 3 of 6 blocks each; `b` needs 5 and lays a claim on one worker, `c` needs 2."""
    play = full(blocks=6)
    play.join("d1", num_device_blocks=6)
    play.wait(60.0)
    play.request(spec("x"))
    play.request(spec("b", tokens=prompt(70)))
    assert play.request(spec("c", tokens=prompt(10))) == []
    assert play.wait(0.1)[0] == "begin c#1"
    assert waiting(play) == ["b"]


def test_room_is_kept_for_who_is_next_and_does_not_fit() -> None:
    """`b` is the first whose turn comes, and lays a claim: `c` would fit, but not beside it."""
    play = full(blocks=6, size_fairness=1.0)
    play.request(spec("b", tokens=prompt(60)))
    assert play.wait(0.5) == []
    assert play.request(spec("c", tokens=prompt(10))) == []
    (worker,) = [w for w in play.machine.workers() if w.decodes]
    assert worker.claim is not None
    assert worker.claim.request_id == "b"
    play.cancel("a")
    assert "begin b#1" in play.wait(0.05)
    assert worker.claim is not None
    assert worker.claim.request_id == "c"  # of the two blocks that it needs one is left


def test_the_claim_of_one_that_leaves_falls() -> None:
    play = full(blocks=6)
    play.request(spec("b", tokens=prompt(60)))
    play.wait(0.5)
    play.cancel("b")
    assert play.request(spec("c", tokens=prompt(10)))[0] == "begin c#1"


def test_a_wait_ends_when_the_first_token_would_be_late() -> None:
    """0.8 of 1 s, less 50 ms for its own prefill, which is a guess until it was measured, and so counts nothing."""
    play = full()
    play.request(spec("b", slo=Slo(ttft_s=1.0)))
    assert play.wait(0.79) == []
    (refused,) = play.wait(0.02)
    assert refused.startswith("end b rejected: Rejected: rejected (decode_room): predicted")


def test_a_request_without_a_limit_waits_for_its_deadline() -> None:
    play = full()
    play.reserved("d0", "a#1")
    play.prefilled("p0", "a#1")
    play.request(spec("b", deadline_s=50.0))
    assert play.wait(49.0) == []
    (ended,) = play.wait(2.0)
    assert ended == "end b failed: DeadlineExceeded: not done within 50.0 s"
    assert waiting(play) == []


def test_those_who_wait_are_bounded() -> None:
    play = full(deferred_max=1)
    play.request(spec("b"))
    (refused,) = play.request(spec("c"))
    assert refused.startswith("end c rejected: Rejected: rejected (decode_room)")


def test_a_client_that_leaves_waits_no_more_and_nothing_was_begun() -> None:
    play = full()
    play.request(spec("b"))
    assert play.cancel("b") == []
    assert waiting(play) == []


def test_while_a_pool_is_away_who_waited_for_room_waits_for_a_worker() -> None:
    play = full()
    play.request(spec("b"))
    play.lose("d0")
    play.wait(0.1)
    assert play.machine._desk.requests[RequestId("b")].phase is Phase.HELD
    assert waiting(play) == []
    assert "begin b#1" in play.join("d0@2", num_device_blocks=4)


def test_without_deferral_a_refusal_is_final() -> None:
    play = full(defer=False)
    (refused,) = play.request(spec("b"))
    assert refused.startswith("end b rejected: Rejected: rejected (decode_room)")


def test_early_may_defer_too() -> None:
    play = full("early+defer", blocks=6)
    play.prefilled("p0", "a#1")
    play.reserved("d0", "a#1")
    assert play.request(spec("b", tokens=prompt(60))) == []
    play.cancel("a")
    assert play.wait(0.11) == ["begin b#1", "p0 <- prefill b#1 60(60)"]


# ---- decode room that is asked for later ----


def old(prefill_blocks: int = 1000, **config: object) -> Play:
    """`c` has decoded for longer than any output before: its room is counted on."""
    play = full(blocks=8, prefill_blocks=prefill_blocks, **config)
    play.cancel("a")
    for _ in range(20):
        play.machine._desk.lengths.see(8)
    play.request(spec("c", tokens=prompt(100), max_tokens=20))
    play.reserved("d0", "c#1")
    play.prefilled("p0", "c#1")
    play.joined("d0", "c#1")
    play.wait(1.0)
    return play


B = spec("b", tokens=prompt(100, seed=1), max_tokens=20)


def grown_old(**config: object) -> Play:
    """And `b` is let in."""
    play = old(**config)  # type: ignore[arg-type]
    assert play.request(B) == ["begin b#1", "p0 <- prefill b#1 100(100)"]
    return play


def test_room_that_is_counted_on_is_booked_at_once_and_asked_for_later() -> None:
    play = grown_old()
    assert {n.info.node_id: n.books.decode_tokens for n in play.machine.status().nodes}["d0"] == 200
    assert play.wait(0.10) == []
    assert play.wait(0.01) == ["d0 <- reserve b#1 100(100) from p0@e1"]  # of 110 ms, less those of the pull


BOTH = Slo(ttft_s=10.0, tbt_s=0.1)


def test_a_first_token_is_held_where_its_room_is_left_for_later() -> None:
    play = old()
    assert play.request(replace(B, slo=BOTH)) == [
        "begin b#1",
        "hold b: 9.500000 s",
        "p0 <- prefill b#1 100(100)",
    ]
    record = play.machine.explain(RequestId("b"))
    assert record is not None
    assert "first token held for its second: 9.5 s at most" in [step.what for step in record.steps]


@pytest.mark.parametrize("slo", [Slo(), Slo(ttft_s=10.0), Slo(tbt_s=0.1)])
def test_who_has_not_both_limits_sees_the_first_token_as_it_comes(slo: Slo) -> None:
    assert old().request(replace(B, slo=slo)) == ["begin b#1", "p0 <- prefill b#1 100(100)"]


def test_first_tokens_are_not_held_where_that_is_off() -> None:
    assert old(hold_first_share=0.0).request(replace(B, slo=BOTH)) == ["begin b#1", "p0 <- prefill b#1 100(100)"]


def test_a_first_token_is_held_when_the_decode_worker_has_refused_and_not_before() -> None:
    play = full(blocks=100)
    assert "hold" not in str(play.request(replace(B, slo=BOTH)))
    play.wait(1.0)
    assert play.refused("d0", "b#1") == ["hold b: 8.500000 s"]
    play.prefilled("p0", "b#1")
    assert play.load("d0", free_device_blocks=100) == ["d0 <- reserve b#1 100(100) from p0@e1"]
    assert play.refused("d0", "b#1") == []  # the client has it already, or it is held


def test_a_first_token_is_held_where_the_hand_over_takes_half_of_the_limit() -> None:
    play = full(blocks=100)
    assert "hold b: 9.500000 s" in play.request(replace(B, slo=replace(BOTH, tbt_s=1e-4)))


def test_a_prefill_that_ends_early_asks_at_once() -> None:
    play = grown_old()
    assert play.prefilled("p0", "b#1") == ["d0 <- reserve b#1 100(100) from p0@e1"]
    assert play.refused("d0", "b#1") == []  # then it stands in line
    assert play.ended("d0", "c#1") == ["d0 <- reserve b#1 100(100) from p0@e1"]
    assert play.reserved("d0", "b#1") == ["d0 <- start b#1 7"]


def test_room_is_asked_for_as_much_earlier_as_it_has_taken_to_get_it() -> None:
    play = old()
    play.machine._desk.room_wait_s.value = 0.05
    play.request(B)
    assert play.wait(0.05) == []
    assert play.wait(0.01) == ["d0 <- reserve b#1 100(100) from p0@e1"]


def test_what_asking_has_taken_is_learned_from_those_whose_prefill_has_begun() -> None:
    play = grown_old()
    play.prefilled("p0", "b#1")
    play.refused("d0", "b#1")
    play.wait(0.5)
    play.ended("d0", "c#1")
    play.reserved("d0", "b#1")
    assert play.machine._desk.room_wait_s.value == pytest.approx(0.02 * 0.5)  # the others had it at once


def test_a_short_prefill_waits_for_room_while_others_stand_in_line() -> None:
    """It would end before the room is there. Nobody is in line: it begins."""
    play = old()
    play.machine._desk.room_wait_s.value = 1.0
    assert play.request(B) == ["begin b#1", "p0 <- prefill b#1 100(100)"]
    play = old()
    play.machine._desk.room_wait_s.value = 1.0
    play.machine._desk.seekers[RequestId("c")] = None
    assert play.request(B) == ["begin b#1"]


def test_a_decode_worker_that_was_not_asked_is_not_told_to_cancel() -> None:
    play = grown_old()
    assert play.cancel("b") == ["p0 <- cancel b#1: client gone"]


def test_a_decode_worker_that_was_not_asked_need_not_know_the_attempt_and_may_not_speak_of_it() -> None:
    play = grown_old()
    play.wait(0.05)
    assert play.say("d0", play.snapshot("d0", attempts=[attempt_of("c#1")])) == []
    before = play.counter("stale_attempts")
    assert play.reserved("d0", "b#1") == []
    assert play.counter("stale_attempts") == before + 1


def test_a_prompt_that_would_fill_more_than_half_of_its_worker_asks_for_decode_room_first() -> None:
    """Those who have decode room may wait for blocks of the prefill worker, and they for decode room (0012)."""
    assert old(prefill_blocks=14).request(B) == ["begin b#1", "p0 <- prefill b#1 100(100)"]  # 7 blocks
    assert old(prefill_blocks=13).request(B) == ["begin b#1", "d0 <- reserve b#1 100(100) from p0@e1"]


# ---- output lengths ----


def test_before_enough_outputs_have_ended_all_go_on() -> None:
    lengths = OutputLengths()
    for _ in range(19):
        lengths.see(10)
    assert (lengths.outlives(5, 100, 1000), lengths.outlives(5, 100, 50)) == (1.0, 0.0)
    lengths.see(10)
    assert lengths.outlives(5, 100, 1000) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_the_share_that_outlives_a_length_is_that_of_a_plain_count(seed: int) -> None:
    """At the bins' edges the histogram is exact; between them it falls."""
    random, lengths = Random(seed), OutputLengths()
    seen = [max(1, round(random.lognormvariate(4.0, 1.5))) for _ in range(500)]
    for length in seen:
        lengths.see(length)
    for edge in EDGES[1:60]:
        assert lengths.longer(edge) == pytest.approx(sum(s >= edge for s in seen) / len(seen))
    values = [lengths.longer(x) for x in range(1, 2000)]
    assert all(0.0 <= b <= a <= 1.0 for a, b in pairwise(values))
    age = EDGES[12]
    alive = [s for s in seen if s >= age]
    assert lengths.outlives(age, EDGES[20] - age, 1 << 30) == pytest.approx(
        sum(s >= EDGES[20] for s in alive) / len(alive)
    )


def test_what_was_true_long_ago_fades() -> None:
    lengths = OutputLengths()
    for _ in range(1000):
        lengths.see(1000)
    for _ in range(4000):
        lengths.see(10)
    assert lengths.longer(500) < 0.1


# ---- oscillation ----


def test_two_pools_in_anti_phase() -> None:
    swing = Swing()
    for i in range(100):
        swing.see(PoolLoads(prefill=0.5 + 0.5 * (-1) ** i, decode=0.5 - 0.25 * (-1) ** i), float(i))
    found = swing.read()
    assert (found.samples, found.now) == (100, PoolLoads(0.0, 0.75))
    assert (found.decode_deviation, found.correlation) == (pytest.approx(0.25), pytest.approx(-1.0))


def test_the_window_is_bounded_and_pools_that_stand_still_have_no_correlation() -> None:
    swing = Swing()
    assert swing.read() == Oscillation(0, PoolLoads(0.0, 0.0), 0.0, None)
    for i in range(1000):
        swing.see(PoolLoads(prefill=float(i), decode=0.5), float(i))
    assert swing.read()._replace(now=PoolLoads(0.0, 0.0)) == Oscillation(300, PoolLoads(0.0, 0.0), 0.0, None)


def test_the_loads_are_sampled_every_second_whatever_the_ticks() -> None:
    play = Play("p0 d0", slo=Slo(ttft_s=10.0))
    play.load("d0", kv_tokens=4000)
    play.request(spec("a", tokens=prompt(990)))
    for _ in range(10):
        play.wait(0.05)
    slo = Slo(ttft_s=10.0, tbt_s=0.1)
    now = pool_loads(play.machine.workers(), slo, play.now_s)
    worker = next(w for w in play.machine.workers() if w.decodes)
    step_s = worker.cost.decode_step_s(worker.batch, worker.kv_tokens).seconds
    assert now.prefill == pytest.approx(0.051)  # half of its second has gone
    assert now.decode == step_s / 0.1 > worker.decode_blocks / worker.num_blocks > 0.0
    assert pool_loads(play.machine.workers(), Slo(), play.now_s) == (0.0, worker.decode_blocks / worker.num_blocks)
    assert play.machine.status().oscillation.samples == 1
    play.wait(1.0)
    assert play.machine.oscillation().samples == 2


def test_a_report_beyond_all_bounds_is_no_load() -> None:
    play = Play("p0 d0")
    play.say("d0", LoadReport(kv_tokens=-5))
    play.wait(2.0)
    assert play.machine.oscillation().now.decode == 0.0


def test_watching_the_loads_changes_no_prediction() -> None:
    watched, alone = Play("p0 d0"), Play("p0 d0")
    for play in (watched, alone):
        for number in range(200):
            sample = PassSample(new_tokens=0, context_tokens=0, batch=1 + number % 7, kv_tokens=900, seconds=0.02)
            play.load("d0", passes=(sample,))
            if play is watched:
                pool_loads(play.machine.workers(), Slo(ttft_s=1.0, tbt_s=0.1), play.now_s)
    costs = [next(w.cost for w in play.machine.workers() if w.decodes) for play in (watched, alone)]
    assert costs[0].decode_seconds_watched(5, 900) == costs[1].decode_seconds_watched(5, 900)
    assert costs[0].decode_seconds(5, 900) == costs[1].decode_seconds(5, 900)
