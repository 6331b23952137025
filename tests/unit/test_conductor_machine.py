"""The conductor's machine: stories, each with the exact effects."""

from __future__ import annotations

import pytest

from conductor.alarms import SPARE
from conductor.effects import Send, Slo
from conductor.view import WorkerState
from core.messages import DrainCommand, LoadReport, PassSample, PrefillCommand, RefusalReason, TransferSample
from halfmoon.blocks import Fingerprint
from halfmoon.errors import InvalidRequest, Rejected, Unavailable
from halfmoon.types import Epoch, NodeId, Outcome, RequestId
from tests.conductor_kit import FINGERPRINT, TAKES_ALL, Play, attempt_of, chain, info, prompt, spec


def test_a_request_is_placed_prefilled_started_and_finished() -> None:
    play = Play("p0 d0")
    assert play.request(spec("r")) == [
        "begin r#1",
        "d0 <- reserve r#1 40(40) from p0@e1",
        "p0 <- prefill r#1 40(40)",
    ]
    assert play.reserved("d0", "r#1") == []
    assert play.prefilled("p0", "r#1", token=7) == ["d0 <- start r#1 7"]
    assert play.joined("d0", "r#1") == []
    assert play.ended("d0", "r#1") == []
    assert play.books_empty()
    assert play.finished_stream("r") == []
    assert play.machine.status().requests_open == 0
    record = play.machine.explain(RequestId("r"))
    assert record is not None
    assert record.outcome is Outcome.FINISHED


def test_commands_carry_what_is_left_of_the_deadline() -> None:
    play = Play("p0 d0")
    play.request(spec("r", deadline_s=50.0))
    play.now_s += 10.0
    play.lose("d0")
    play.join("d0@2")
    play.resume("r", [5])
    sends = [e for e in play.effects if isinstance(e, Send) and isinstance(e.command, PrefillCommand)]
    assert [send.command.deadline_s for send in sends] == [40.0]


def test_the_first_token_waits_for_the_reservation() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    assert play.prefilled("p0", "r#1", token=9) == []
    assert play.reserved("d0", "r#1") == ["d0 <- start r#1 9"]
    assert play.reserved("d0", "r#1") == []  # said twice, started once


def test_alarms_of_ended_requests_are_not_kept_until_their_deadlines() -> None:
    play = Play("p0 d0")
    most = 0
    for number in range(2000):
        play.request(spec(f"r{number}", deadline_s=600.0))
        play.finished_stream(f"r{number}")
        play.machine.on_cancel(RequestId(f"r{number}"), "gone", play.now_s)
        play.machine.on_tick(play.now_s)
        most = max(most, len(play.machine._desk.alarms))
    assert play.machine.status().requests_open == 0
    assert most <= SPARE + 8


def test_a_coupled_worker_gets_one_command() -> None:
    play = Play("c0")
    assert play.request(spec("r")) == ["begin r#1", "c0 <- prefill r#1 40(40) decode_here"]
    assert play.prefilled("c0", "r#1") == []
    assert play.joined("c0", "r#1") == []
    assert play.ended("c0", "r#1") == []
    assert play.books_empty()
    assert play.finished_stream("r") == []


def test_a_first_token_that_is_the_last_cancels_the_reservation() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    play.reserved("d0", "r#1")
    assert play.prefilled("p0", "r#1", last=True) == ["d0 <- cancel r#1: the output is complete"]
    assert play.books_empty()
    assert play.closed("d0", "r#1") == []
    play.finished_stream("r")
    assert play.wait(60.0) == []
    assert play.counter("closed_missing") == 0


def test_a_stream_that_ends_before_its_worker_says_so_is_not_cancelled_at_once() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    play.reserved("d0", "r#1")
    play.prefilled("p0", "r#1")
    play.joined("d0", "r#1")
    assert play.finished_stream("r") == []
    assert play.wait(0.1) == []
    assert play.ended("d0", "r#1") == []
    assert play.machine.status().requests_open == 0


def test_a_stop_string_ends_the_worker_too() -> None:
    play = Play("p0 d0")
    for name, stopped in (("r", True), ("s", False)):
        play.request(spec(name))
        play.reserved("d0", f"{name}#1")
        play.prefilled("p0", f"{name}#1")
        play.joined("d0", f"{name}#1")
        now = play.finished_stream(name, stopped=stopped)
        later = play.wait(0.3)
        assert (now if stopped else later) == [f"d0 <- cancel {name}#1: finished"]
        assert (later if stopped else now) == []
    assert play.books_empty()


def test_a_decode_workers_refusal_goes_to_another_one_while_prefill_goes_on() -> None:
    play = Play("p0 d0 d1")
    assert "d0 <- reserve r#1 40(40) from p0@e1" in play.request(spec("r"))
    assert play.refused("d0", "r#1") == ["d1 <- reserve r#1 40(40) from p0@e1"]
    assert play.refused("d1", "r#1") == []  # nobody is left for now
    assert play.prefilled("p0", "r#1", token=7) == []
    assert play.load("d0", free_device_blocks=3) == ["d0 <- reserve r#1 40(40) from p0@e1"]
    assert play.reserved("d0", "r#1") == ["d0 <- start r#1 7"]


def test_seeking_a_decode_worker_is_bounded() -> None:
    play = Play("p0 d0", seek_wait_s=10.0)
    play.request(spec("r"))
    assert play.refused("d0", "r#1") == []
    assert play.load("d0", free_device_blocks=2) == []  # 40 tokens and the next one take 3
    assert play.load("d0", free_device_blocks=2, evictable_device_blocks=1) == ["d0 <- reserve r#1 40(40) from p0@e1"]
    assert play.refused("d0", "r#1") == []
    assert play.wait(10.0) == [
        "p0 <- cancel r#1: no decode worker had room within 10 s",
        "resume r: no decode worker had room within 10 s",
    ]
    assert play.books_empty()


def test_room_that_is_freed_is_offered_to_those_in_line_one_after_another() -> None:
    play = Play("p0 d0")
    play.request(spec("a"))
    play.reserved("d0", "a#1")
    play.prefilled("p0", "a#1")
    play.joined("d0", "a#1")
    for name in ("b", "c"):
        play.request(spec(name))
        assert play.refused("d0", f"{name}#1") == []
    assert play.ended("d0", "a#1") == ["d0 <- reserve b#1 40(40) from p0@e1"]
    assert play.load("d0", free_device_blocks=9) == ["d0 <- reserve c#1 40(40) from p0@e1"]  # b has asked already
    assert play.reserved("d0", "b#1") == []
    assert play.refused("d0", "c#1") == []
    play.cancel("b")
    assert play.closed("d0", "b#1") == ["d0 <- reserve c#1 40(40) from p0@e1"]


def test_where_the_books_are_full_a_newcomer_stands_behind_those_in_line() -> None:
    play = Play("p0", admission=TAKES_ALL)
    play.join("d0", num_device_blocks=4)
    play.now_s = 200.0
    play.request(spec("a"))
    play.request(spec("b"))
    assert play.refused("d0", "b#1") == []
    assert play.request(spec("c")) == ["begin c#1"]
    play.cancel("a")
    assert play.closed("d0", "a#1") == ["d0 <- reserve b#1 40(40) from p0@e1"]
    assert play.reserved("d0", "b#1") == ["p0 <- prefill b#1 40(40)", "d0 <- reserve c#1 40(40) from p0@e1"]


def test_a_prefill_workers_refusal_goes_elsewhere_under_the_next_number() -> None:
    play = Play("p0 p1 d0")
    play.request(spec("r"))
    assert play.refused("p0", "r#1", RefusalReason.DRAINING) == [
        "d0 <- cancel r#1: refused by p0: draining",
        "begin r#2",
        "d0 <- reserve r#2 40(40) from p1@e1",
        "p1 <- prefill r#2 40(40)",
    ]
    assert play.refused("p1", "r#2") == ["d0 <- cancel r#2: refused by p1: no_room"]
    assert play.books_empty()
    assert play.wait(0.2)[0] == "begin r#3"  # held a moment, then asked again


def test_endless_refusals_end_in_a_rejection() -> None:
    play = Play("p0 d0", refusals_max=3)
    words = play.request(spec("r"))
    number = 1
    while not words or not words[-1].startswith("end"):
        words = play.refused("p0", f"r#{number}")
        if not words[-1].startswith("end"):
            number += 1
            words = play.wait(0.5)
    assert words[-1].startswith("end r rejected: Rejected: rejected (workers_no_room)")
    assert number == 4
    assert play.books_empty()


@pytest.mark.parametrize("dead", ["p0", "d0"])
def test_a_workers_death_in_prefill_restarts_the_attempt(dead: str) -> None:
    play = Play("p0 p1 d0 d1")
    play.request(spec("r"))
    other = {"p0": "d0", "d0": "p0"}[dead]
    assert play.lose(dead) == [f"{other} <- cancel r#1: {dead} lost: killed", f"resume r: {dead} lost: killed"]
    assert play.books_empty()
    left = {"p0": ("d0", "p1"), "d0": ("d1", "p0")}[dead]
    assert play.resume("r", []) == [
        "begin r#2",
        f"{left[0]} <- reserve r#2 40(40) from {left[1]}@e1",
        f"{left[1]} <- prefill r#2 40(40)",
    ]


def test_a_death_in_decode_resumes_with_what_was_emitted() -> None:
    play = Play("p0 d0 d1")
    play.request(spec("r"))
    play.reserved("d0", "r#1")
    play.prefilled("p0", "r#1")
    play.joined("d0", "r#1")
    assert play.lose("d0") == ["resume r: d0 lost: killed"]  # the prefill worker has long let go
    assert play.resume("r", [7, 8, 9]) == [
        "begin r#2",
        "d1 <- reserve r#2 43(40) from p0@e1",
        "p0 <- prefill r#2 43(40)",
    ]
    summary = play.machine.summary(RequestId("r"))
    assert (summary.attempts, summary.prefill_node, summary.decode_node) == (2, "p0", "d1")


def test_a_prefill_workers_death_does_not_touch_what_decodes_elsewhere() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    play.reserved("d0", "r#1")
    play.prefilled("p0", "r#1")
    play.joined("d0", "r#1")
    assert play.lose("p0") == []
    assert play.tokens_lost("p0") == []
    assert play.ended("d0", "r#1") == []


def test_no_new_attempt_when_everything_was_emitted() -> None:
    play = Play("p0 d0")
    for name, emitted in (("full", [1, 2]), ("stop", [1, 50])):
        play.request(spec(name, max_tokens=2 if name == "full" else 8, stop_token_ids=(50,)))
        play.lose("p0")
        play.join("p0")
        assert play.resume(name, emitted) == []
        assert play.finished_stream(name) == []
    assert play.counter("requests_finished") == 2


def test_tries_are_bounded_and_the_end_tells_all_reasons() -> None:
    play = Play("p0 d0", attempts_max=2)
    play.request(spec("r"))
    assert play.failed("p0", "r#1") == ["d0 <- cancel r#1: engine at p0: oh", "resume r: engine at p0: oh"]
    play.resume("r", [])
    assert play.failed("d0", "r#2") == [
        "p0 <- cancel r#2: engine at d0: oh",
        "end r failed: Failed: gave up after 2 tries: attempt 1: engine at p0: oh; attempt 2: engine at d0: oh",
    ]
    assert play.books_empty()


def test_lost_token_streams_restart_what_may_have_lost_a_token() -> None:
    play = Play("p0 d0 d1")
    play.request(spec("r"))
    play.reserved("d0", "r#1")
    play.prefilled("p0", "r#1")
    play.joined("d0", "r#1")
    play.ended("d0", "r#1")  # its last token may be among the lost ones
    assert play.tokens_lost("d0") == ["resume r: token stream of d0 lost"]
    assert play.resume("r", [7])[0] == "begin r#2"
    assert play.tokens_lost("p0@7") == []  # another incarnation's


def test_a_gap_in_one_stream_restarts_that_one_only() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    play.request(spec("s"))
    effects = play.machine.on_gap(RequestId("r"), "token 3 is missing", play.now_s)
    assert [type(e).__name__ for e in effects] == ["Send", "Send", "Resume"]


def test_cancel_reaches_every_worker_and_closed_is_awaited_with_a_bound() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    assert play.cancel("r") == ["d0 <- cancel r#1: client gone", "p0 <- cancel r#1: client gone"]
    assert play.books_empty()
    assert play.cancel("r") == []
    assert play.closed("p0", "r#1") == []
    assert play.machine.status().closing == 1
    play.wait(60.0)
    assert (play.machine.status().closing, play.counter("closed_missing")) == (0, 1)


def test_an_end_that_crosses_the_cancel_counts_as_closed() -> None:
    play = Play("c0")
    play.request(spec("r"))
    play.prefilled("c0", "r#1")
    play.cancel("r")
    play.ended("c0", "r#1")
    assert play.machine.status().closing == 0
    assert play.counter("stale_attempts") == 0


def test_stale_epochs_and_attempts_are_dropped_and_counted() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    assert play.prefilled("p0@9", "r#1") == []
    assert play.prefilled("p0", "r#7") == []
    assert play.prefilled("p0", "x#1") == []
    assert play.joined("p0", "r#1") == []
    assert (play.counter("stale_epochs"), play.counter("stale_attempts")) == (1, 3)


def test_an_empty_cluster_is_unavailable_at_once_and_says_why() -> None:
    play = Play("")
    assert play.request(spec("r")) == [
        "end r rejected: Unavailable: no prefill worker is ready (none is there); "
        "no decode worker is ready (none is there)"
    ]
    play = Play("p0 d0", unavailable_grace_s=5.0)
    play.machine.on_drain(None, play.now_s)
    assert play.request(spec("r")) == [
        "end r rejected: Unavailable: no prefill worker is ready (1 draining); no decode worker is ready (1 draining)"
    ]


def test_an_operators_drain_outlives_the_workers_process_and_ends_by_his_word() -> None:
    play = Play("p0 d0 d1")
    play.machine.on_drain(NodeId("d0"), play.now_s)
    play.machine.on_node_joined(info("d0", epoch="e2"), play.now_s)
    play.machine.on_worker_event(NodeId("d0"), Epoch("e2"), play.snapshot("d0", epoch="e2"), play.now_s)
    assert [n.state for n in play.machine.status().nodes if n.info.node_id == "d0"] == [WorkerState.DRAINING]
    effects = play.machine.on_drain(NodeId("d0"), play.now_s, undo=True)
    assert [e.command for e in effects if isinstance(e, Send)] == [DrainCommand(undo=True)]
    assert [n.state for n in play.machine.status().nodes if n.info.node_id == "d0"] == [WorkerState.READY]
    assert play.machine.on_drain(NodeId("d0"), play.now_s, undo=True) == []  # twice is once


def test_a_drain_told_by_an_earlier_conductor_can_be_undone() -> None:
    play = Play("p0 d0")
    play.load("d0", draining=True)
    effects = play.machine.on_drain(NodeId("d0"), play.now_s, undo=True)
    assert [(e.node_id, e.command) for e in effects if isinstance(e, Send)] == [("d0", DrainCommand(undo=True))]


def test_a_drained_cluster_stays_so_for_those_that_join_until_all_is_undone() -> None:
    play = Play("p0 d0")
    play.machine.on_drain(None, play.now_s)
    play.join("d1")
    assert {n.state for n in play.machine.status().nodes} == {WorkerState.DRAINING}
    play.machine.on_drain(None, play.now_s, undo=True)
    assert {n.state for n in play.machine.status().nodes} == {WorkerState.READY}


def test_a_request_is_held_while_a_worker_restarts() -> None:
    play = Play("p0 d0")
    play.lose("d0")
    assert play.request(spec("r")) == []
    assert play.wait(1.0) == []
    assert play.join("d0@2") == ["begin r#1", "d0 <- reserve r#1 40(40) from p0@e1", "p0 <- prefill r#1 40(40)"]


def test_holding_is_bounded() -> None:
    play = Play("p0 d0", unavailable_grace_s=15.0)
    play.request(spec("a"))
    play.lose("d0")
    play.resume("a", [])
    play.request(spec("b"))
    assert play.wait(14.0) == []
    why = "no decode worker is ready (none is there)"
    assert play.wait(2.0) == [f"end a failed: Unavailable: {why}", f"end b rejected: Unavailable: {why}"]


def test_impossible_requests_name_the_field_and_the_limit() -> None:
    play = Play("")
    play.join("p0", num_device_blocks=10)
    play.join("d0", num_device_blocks=20)
    assert play.request(spec("r", tokens=prompt(161)))[0] == (
        "end r rejected: InvalidRequest: prompt: got '161 tokens'; expected at most 159 tokens in any worker's KV pool"
    )
    assert play.request(spec("s", tokens=prompt(100), max_tokens=221))[0] == (
        "end s rejected: InvalidRequest: max_tokens: got 221; "
        "expected at most 220 after 100 prompt tokens in any worker's KV pool"
    )
    assert play.request(spec("t", tokens=prompt(100), max_tokens=220))[0] == "begin t#1"


def test_the_number_of_requests_is_bounded() -> None:
    play = Play("p0 d0", requests_max=2)
    play.request(spec("a"))
    play.request(spec("b"))
    words = play.request(spec("c"))
    assert words == [
        "end c rejected: Rejected: rejected (queue_full): predicted 3 requests, limit 2 requests; retry in 1.0 s"
    ]
    play.cancel("a")
    assert play.request(spec("d"))[0] == "begin d#1"


def test_an_slo_that_would_be_missed_rejects_before_any_work_is_spent() -> None:
    play = Play("p0 d0")
    passes = [PassSample(new_tokens=n, context_tokens=0, batch=0, kv_tokens=0, seconds=n * 1e-3) for n in range(1, 500)]
    play.say("p0", LoadReport(passes=tuple(passes)))
    assert play.request(spec("a", tokens=prompt(400)))[0] == "begin a#1"
    words = play.request(spec("b", tokens=prompt(200), slo=Slo(ttft_s=0.5)))
    assert words == [
        "end b rejected: Rejected: rejected (ttft_slo): predicted 0.6 s, limit 0.5 s; retry in 0.1 s",
    ]
    assert play.request(spec("c", tokens=prompt(90), slo=Slo(ttft_s=0.5)))[0] == "begin c#1"
    record = play.machine.explain(RequestId("b"))
    assert record is not None
    assert record.verdicts[0].reason == "ttft_slo"
    assert record.outcome is Outcome.REJECTED


def test_pulls_of_decode_workers_teach_their_links() -> None:
    play = Play("p0 d0")
    pulls = [TransferSample(source=NodeId("p0"), link="shm", num_bytes=n << 20, seconds=n * 0.1) for n in range(1, 20)]
    play.say("d0", LoadReport(transfers=tuple(pulls)))
    residual = play.machine.residuals()[NodeId("d0")]["transfer"]
    assert (residual.samples, residual.error < 0.2) == (19, True)


def test_a_guess_rejects_nobody() -> None:
    play = Play("p0 d0")
    assert play.request(spec("a", tokens=prompt(400), slo=Slo(ttft_s=0.001)))[0] == "begin a#1"


def test_every_phase_is_bounded() -> None:
    play = Play("p0 d0 d1", phase_wait_s=60.0, reserve_wait_s=10.0, resume_wait_s=5.0)
    play.request(spec("r"))
    assert play.wait(10.0) == ["d0 <- cancel r#1: no answer to reserve", "d1 <- reserve r#1 40(40) from p0@e1"]
    play.reserved("d1", "r#1")
    assert play.wait(60.0) == [
        "d1 <- cancel r#1: prefill took too long",
        "p0 <- cancel r#1: prefill took too long",
        "resume r: prefill took too long",
    ]
    assert play.wait(5.0) == ["end r failed: Failed: the front end did not answer Resume"]
    assert play.books_empty()


def test_the_deadline_ends_a_request_in_any_phase() -> None:
    play = Play("p0 d0")
    play.request(spec("r", deadline_s=30.0))
    play.reserved("d0", "r#1")
    play.prefilled("p0", "r#1")
    play.joined("d0", "r#1")
    assert play.wait(30.0) == [
        "end r failed: DeadlineExceeded: not done within 30.0 s",
        "d0 <- cancel r#1: not done within 30.0 s",
    ]


def test_a_restarted_conductor_ends_what_nobody_waits_for() -> None:
    play = Play("p0 d0")
    snapshot = play.snapshot("d0", attempts=[attempt_of("old#3")])
    assert play.say("d0", snapshot) == ["d0 <- cancel old#3: unknown to the conductor"]
    assert play.closed("d0", "old#3") == []
    assert play.counter("orphans_cancelled") == 1


def test_a_snapshot_without_an_attempt_restarts_it_but_not_one_that_was_just_sent() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    assert play.say("d0", play.snapshot("d0")) == []
    assert play.wait(1.0) == ["d0 <- SnapshotCommand"]
    assert play.say("d0", play.snapshot("d0")) == [
        "p0 <- cancel r#1: d0 no longer runs it",
        "resume r: d0 no longer runs it",
    ]


def test_a_silent_worker_loses_its_attempts_and_comes_back_with_a_snapshot() -> None:
    play = Play("p0 d0", suspect_s=1.5, silent_s=10.0)
    for name in ("p0", "d0"):
        play.load(name)
    play.request(spec("r"))
    play.now_s += 9.0
    play.load("p0")
    why = "d0 silent for 11.0 s"  # it may live: it is told, too
    assert play.wait(2.0) == [f"d0 <- cancel r#1: {why}", f"p0 <- cancel r#1: {why}", f"resume r: {why}"]
    assert play.resume("r", []) == []  # held
    play.load("p0")
    assert play.load("d0") == ["d0 <- SnapshotCommand"]
    assert play.say("d0", play.snapshot("d0", attempts=[attempt_of("r#1")])) == [
        "d0 <- cancel r#1: unknown to the conductor",
        "begin r#2",
        "d0 <- reserve r#2 40(40) from p0@e1",
        "p0 <- prefill r#2 40(40)",
    ]


def test_a_restarted_node_replaces_its_old_self() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    node = info("p0@2")
    effects = play._heard(play.machine.on_node_joined(node, play.now_s))
    assert effects == ["d0 <- cancel r#1: p0 lost: p0 restarted", "resume r: p0 lost: p0 restarted"]
    assert play.lose("p0@1") == []  # the news of the old one's death comes late
    assert len(play.machine.status().nodes) == 2


def test_a_worker_with_another_model_is_listed_and_never_used() -> None:
    play = Play("d0")
    other = Fingerprint(**{**FINGERPRINT.__dict__, "weights": "other"})
    play.join("p0", fingerprint=other)
    assert play.request(spec("r"))[0].startswith("end r rejected: Unavailable: no prefill worker is ready (1 incompat")
    states = {n.info.node_id: n.why for n in play.machine.status().nodes}
    assert states["p0"] == "weights: 'w' here, 'other' there"


def test_a_cached_prefix_is_fetched_from_a_busy_worker_by_an_idle_one() -> None:
    shared = prompt(160)
    play = Play("d0 p1")
    play.join("p0", chain(shared))
    play.now_s = 200.0
    assert play.request(spec("a", tokens=(*shared, *prompt(300, seed=1))))[-1] == "p0 <- prefill a#1 460(460)"
    words = play.request(spec("b", tokens=(*shared, *prompt(5, seed=2))))
    assert words[-1] == "p1 <- prefill b#1 165(165) fetch 0+10 from p0@e1"
    record = play.machine.explain(RequestId("b"))
    assert record is not None
    scores = {s.node_id: s for s in record.choices[0].prefill_scores}
    assert scores["p0"].ttft_s == pytest.approx(0.310 + 0.015)  # the queue, then 5 tokens
    assert scores["p1"].fetch_s == pytest.approx(0.001 + 0.010 + 0.029)  # 10 blocks behind the 29 that p0 sends for a
    assert scores["p1"].ttft_s == pytest.approx(0.040 + 0.015)


def test_a_second_request_of_the_same_id_is_dropped() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    assert play.request(spec("r")) == []
    assert play.counter("duplicate_requests") == 1


def test_an_id_may_come_again_once_its_stream_has_ended_and_its_attempts_are_numbered_on() -> None:
    play = Play("p0 d0")
    play.request(spec("r"))
    play.finished_stream("r")  # its worker has not said that it has ended
    assert play.request(spec("r")) == [
        "d0 <- cancel r#1: finished",
        "p0 <- cancel r#1: finished",
        "begin r#2",
        "d0 <- reserve r#2 40(40) from p0@e1",
        "p0 <- prefill r#2 40(40)",
    ]
    assert play.ended("d0", "r#1") == []
    assert play.machine.summary(RequestId("r")).attempts == 1
    play.cancel("r")
    assert play.books_empty()
    assert play.request(spec("r"))[0] == "begin r#3"


def test_errors_are_typed() -> None:
    assert {Unavailable.status, Rejected.status, InvalidRequest.status} == {14, 8, 3}
