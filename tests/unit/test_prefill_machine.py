"""The prefill worker's machine, story by story."""

from __future__ import annotations

import pytest

from core.messages import AttemptFailed, Closed, FailureKind, PrefillDone, RefusalReason, Refused
from halfmoon.errors import ConfigError, PeerLost
from halfmoon.types import FinishReason, NodeId, Tier
from kv_store.tiers import KvCache
from node.effects import AbortPull, HandOver, Report, Withdraw
from prefill_worker.machine import PrefillConfig, PrefillMachine
from tests.workers import (
    ROOT,
    SIZE,
    arrive,
    attempt,
    cancel,
    ended,
    fetch,
    lengths,
    names,
    of,
    prefill,
    pull,
    report,
    reports,
    run_pass,
    sampled_by,
    settle_moves,
    tokens,
)


class Worker:
    def __init__(self, *, device: int = 16, dram: int = 0, **settings: float) -> None:
        self.cache = KvCache(num_device_slots=device, num_dram_slots=dram, block_size=SIZE)
        config = PrefillConfig(**{"tokens_per_pass_max": 8, **settings})  # type: ignore[arg-type]
        self.machine = PrefillMachine(node_id=NodeId("p1"), cache=self.cache, root=ROOT, block_size=SIZE, config=config)

    def check_empty(self) -> None:
        """Nothing is held any more."""
        assert self.machine.attempts() == ()
        counts = self.cache.counts(Tier.DEVICE)
        assert [counts[s] for s in ("filling", "pinned", "quarantined")] == [0, 0, 0]
        self.cache.check_invariants()


def test_a_prompt_is_computed_in_chunks_and_its_first_token_leaves_at_once() -> None:
    w = Worker()
    w.machine.on_command(prefill("a", range(10)), 1.0)
    work = w.machine.decide(1.0)
    assert lengths(work) == [("a", 0, 8)]
    assert work.slices[0].sampling is None
    effects = w.machine.account(work, [None], 0.5, 1.5)
    assert effects == []
    assert w.cache.match(names(range(10))) == (Tier.DEVICE, Tier.DEVICE)  # visible while prefill goes on

    work = w.machine.decide(1.5)
    assert lengths(work) == [("a", 8, 2)]
    effects = w.machine.account(work, sampled_by(work, 42), 0.25, 2.0)
    (token,) = tokens(effects)
    assert (token.index, token.token_id, token.finish_reason) == (0, 42, None)
    done = report(PrefillDone, effects)
    assert (done.first_token_id, done.finish_reason) == (42, None)
    assert token.stats == done.stats
    assert (done.stats.computed_tokens, done.stats.compute_s, done.stats.queue_s) == (10, 0.75, 0.0)
    slots = w.cache.slots(attempt("a"))
    assert of(HandOver, effects) == [HandOver(attempt_id=attempt("a"), tail_index=2, tail_slot=slots[2], tail_tokens=2)]
    assert effects.index(of(HandOver, effects)[0]) == len(effects) - 1

    assert w.machine.on_handed_over(attempt("a"), 3.0) == []
    w.check_empty()


def test_a_prompt_of_whole_blocks_hands_over_no_tail() -> None:
    w = Worker()
    w.machine.on_command(prefill("a", range(8)), 0.0)
    (hand_over,) = of(HandOver, run_pass(w.machine, 0.0))
    assert (hand_over.tail_index, hand_over.tail_tokens) == (2, 0)


def test_several_prompts_share_a_pass_most_urgent_first() -> None:
    w = Worker()
    w.machine.on_command(prefill("late", range(6)), 0.0)
    w.machine.on_command(prefill("soon", range(10, 13), deadline_s=5.0), 0.0)
    w.machine.on_command(prefill("loved", range(20, 22), priority=7), 0.0)
    assert lengths(w.machine.decide(0.0)) == [("loved", 0, 2), ("soon", 0, 3), ("late", 0, 3)]


def test_nobody_starves_behind_a_stream_of_urgent_prompts() -> None:
    w = Worker(device=64, tokens_per_pass_max=4)
    w.machine.on_command(prefill("patient", range(4), deadline_s=3600.0), 0.0)
    for second in range(100):
        w.machine.on_command(prefill(f"hasty{second}", range(10, 14), deadline_s=5.0), float(second))
        effects = run_pass(w.machine, float(second))
        (done,) = [e for e in reports(effects) if isinstance(e, PrefillDone)]
        w.machine.on_handed_over(done.attempt_id, float(second))
        if done.attempt_id == attempt("patient"):
            assert second == 55  # due with those that come then: 60 s after it came, and it came first
            return
    raise AssertionError("the patient prompt never ran")


def test_a_stop_token_ends_the_request_and_nothing_is_handed_over() -> None:
    w = Worker()
    w.machine.on_command(prefill("a", range(6), stop=(42,)), 0.0)
    effects = run_pass(w.machine, 0.0, token=42)
    assert report(PrefillDone, effects).finish_reason is FinishReason.STOP
    assert tokens(effects)[0].finish_reason is FinishReason.STOP
    assert of(HandOver, effects) == []
    w.check_empty()


def test_tokens_of_earlier_attempts_count_against_the_limit_and_in_the_index() -> None:
    w = Worker()
    w.machine.on_command(prefill("a", range(7), number=2, num_prompt_tokens=4, max_tokens=4), 0.0)
    effects = run_pass(w.machine, 0.0)
    assert tokens(effects)[0].index == 3
    assert report(PrefillDone, effects).finish_reason is FinishReason.LENGTH
    w.check_empty()


def test_a_cached_prompt_computes_its_last_block_only() -> None:
    w = Worker()
    w.machine.on_command(prefill("a", range(8)), 0.0)
    run_pass(w.machine, 0.0)
    w.machine.on_handed_over(attempt("a"), 0.0)
    w.machine.on_command(prefill("b", range(8)), 1.0)
    work = w.machine.decide(1.0)
    assert lengths(work) == [("b", 4, 4)]
    stats = report(PrefillDone, w.machine.account(work, sampled_by(work, 7), 0.1, 1.0)).stats
    assert (stats.hit_tokens_device, stats.computed_tokens) == (4, 4)


def test_blocks_in_dram_are_loaded_before_the_prompt_is_computed() -> None:
    w = Worker(device=3, dram=8)
    w.machine.on_command(prefill("a", range(8)), 0.0)
    run_pass(w.machine, 0.0)
    w.machine.on_handed_over(attempt("a"), 0.0)
    w.machine.on_command(prefill("b", range(50, 60)), 1.0)  # needs all three slots: a's two go to DRAM
    assert w.machine.decide(1.0) is None
    settle_moves(w.machine, w.cache, 1.0)
    while w.machine.load().queued_tokens:
        run_pass(w.machine, 1.0)
    w.machine.on_handed_over(attempt("b"), 1.0)

    w.machine.on_command(prefill("c", range(8)), 2.0)
    settle_moves(w.machine, w.cache, 2.5)
    work = w.machine.decide(2.5)
    assert lengths(work) == [("c", 4, 4)]
    stats = report(PrefillDone, w.machine.account(work, sampled_by(work, 7), 0.1, 2.6)).stats
    assert (stats.hit_tokens_dram, stats.computed_tokens) == (4, 4)
    assert stats.queue_s + stats.fetch_s == 0.5


def test_fetched_blocks_count_up_to_the_first_hole() -> None:
    w = Worker()
    effects = w.machine.on_command(prefill("a", range(17), fetches=(fetch(0, 9),)), 0.0)
    spec = pull(effects)
    assert [x.index for x in spec.wants] == [0, 1, 2, 3]  # the last block is computed, in part or wholly
    assert [x.block_hash for x in spec.wants] == names(range(16))
    assert not spec.wait
    assert w.machine.decide(0.0) is None
    w.machine.on_pull_arrived(spec.transfer_id, [0, 3], 0.1)
    w.machine.on_pull_arrived(spec.transfer_id, [1], 0.2)
    assert len(w.cache.match(names(range(17)))) == 2
    w.machine.on_pull_ended(ended(spec, 2), 0.5)
    work = w.machine.decide(0.5)
    assert lengths(work) == [("a", 8, 8)]
    w.machine.account(work, [None], 0.1, 0.6)
    stats = report(PrefillDone, run_pass(w.machine, 0.7)).stats
    assert (stats.hit_tokens_remote, stats.computed_tokens, stats.fetch_s) == (8, 9, 0.5)


def test_a_failed_fetch_is_computed_and_holds_up_nobody_else() -> None:
    w = Worker()
    effects = w.machine.on_command(prefill("a", range(10), fetches=(fetch(0, 2),), deadline_s=2.0), 0.0)
    spec = pull(effects)
    assert spec.deadline_s == 2.0  # never beyond the attempt's own
    w.machine.on_command(prefill("b", range(20, 24)), 0.0)
    assert lengths(w.machine.decide(0.0)) == [("b", 0, 4)]
    w.machine.on_pull_ended(ended(spec, 0, 1, error=PeerLost("gone")), 0.1)
    assert attempt("a") in w.machine.attempts()


def test_two_sources_are_never_asked_for_the_same_block() -> None:
    w = Worker()
    effects = w.machine.on_command(prefill("a", range(17), fetches=(fetch(0, 3), fetch(1, 3, "p8"))), 0.0)
    specs = [e.spec for e in effects]  # type: ignore[union-attr]
    assert [[x.index for x in s.wants] for s in specs] == [[0, 1, 2], [3]]
    assert len({s.transfer_id for s in specs}) == 2


def test_the_queue_waits_for_room_in_order() -> None:
    w = Worker(device=4)
    w.machine.on_command(prefill("a", range(8)), 0.0)
    w.machine.on_command(prefill("big", range(20, 32)), 0.1)
    w.machine.on_command(prefill("small", range(40, 44)), 0.2)  # would fit, but does not overtake
    assert w.machine.load().queued_attempts == 2
    run_pass(w.machine, 1.0)
    assert w.machine.decide(1.0) is None
    w.machine.on_handed_over(attempt("a"), 2.0)
    assert lengths(w.machine.decide(2.0)) == [("big", 0, 8)]


@pytest.mark.parametrize("why", ["duplicate", "stale", "draining", "too_long", "full"])
def test_refusals_change_nothing(why: str) -> None:
    w = Worker(device=4, attempts_max=1 if why == "full" else 9)
    w.machine.on_command(prefill("a", range(4), number=2), 0.0)
    if why == "draining":
        w.machine.drain()
    command = {
        "duplicate": prefill("a", range(4), number=2),
        "stale": prefill("a", range(4), number=1),
        "too_long": prefill("b", range(17)),
    }.get(why, prefill("b", range(4)))
    refused = report(Refused, w.machine.on_command(command, 0.0))
    assert refused.reason == (RefusalReason.NO_ROOM if why == "full" else RefusalReason(why))
    assert w.machine.attempts() == (attempt("a", 2),)
    assert lengths(w.machine.decide(0.0)) == [("a", 0, 4)]


def test_an_attempt_that_has_ended_is_still_a_duplicate() -> None:
    w = Worker()
    w.machine.on_command(prefill("a", range(4), max_tokens=1), 0.0)
    run_pass(w.machine, 0.0)
    w.check_empty()
    assert report(Refused, w.machine.on_command(prefill("a", range(4)), 1.0)).reason is RefusalReason.DUPLICATE


# ---- cancelled in every phase ----


def close_by_withdrawal(w: Worker, effects: list) -> None:
    """The cancel withdraws; Closed comes when no peer reads any more."""
    assert of(Withdraw, effects) == [Withdraw(attempt_id=attempt("a"))]
    assert reports(effects) == []
    assert w.machine.on_command(cancel("a"), 5.0) == []  # once is enough
    assert reports(w.machine.on_withdrawn(attempt("a"), 6.0)) == [Closed(attempt_id=attempt("a"))]
    assert w.machine.on_withdrawn(attempt("a"), 7.0) == []
    w.check_empty()


def test_cancelled_in_the_queue() -> None:
    w = Worker(device=2)
    w.machine.on_command(prefill("first", range(20, 28)), 0.0)
    w.machine.on_command(prefill("a", range(8)), 0.0)
    effects = w.machine.on_command(cancel("a"), 1.0)
    assert reports(effects) == []
    assert reports(w.machine.on_withdrawn(attempt("a"), 1.0)) == [Closed(attempt_id=attempt("a"))]


def test_cancelled_while_fetching() -> None:
    w = Worker()
    spec = pull(w.machine.on_command(prefill("a", range(10), fetches=(fetch(0, 2),)), 0.0))
    effects = w.machine.on_command(cancel("a"), 1.0)
    assert [e.transfer_id for e in of(AbortPull, effects)] == [spec.transfer_id]
    assert w.cache.counts(Tier.DEVICE)["quarantined"] == 3
    assert w.machine.on_pull_arrived(spec.transfer_id, [0], 1.1) == []  # late, and not committed
    assert w.machine.on_withdrawn(attempt("a"), 1.2) == []
    assert reports(w.machine.on_pull_ended(ended(spec, 1), 1.3)) == [Closed(attempt_id=attempt("a"))]
    w.check_empty()
    assert w.cache.match(names(range(8))) == ()


def test_cancelled_between_chunks() -> None:
    w = Worker()
    w.machine.on_command(prefill("a", range(10)), 0.0)
    run_pass(w.machine, 0.0)
    close_by_withdrawal(w, w.machine.on_command(cancel("a"), 1.0))


@pytest.mark.parametrize("fails", [False, True])
def test_cancelled_in_mid_pass_its_results_are_dropped(fails: bool) -> None:
    w = Worker()
    w.machine.on_command(prefill("a", range(8)), 0.0)
    work = w.machine.decide(0.0)
    w.machine.on_command(cancel("a"), 1.0)
    assert w.machine.on_withdrawn(attempt("a"), 1.1) == []  # the engine may still write
    assert w.cache.counts(Tier.DEVICE)["free"] == 14
    if fails:
        effects = w.machine.on_pass_failed(work, "boom", 2.0)
    else:
        effects = w.machine.account(work, sampled_by(work, 7), 0.5, 2.0)
    assert tokens(effects) == []
    assert reports(effects) == [Closed(attempt_id=attempt("a"))]
    assert w.cache.match(names(range(8))) == ()
    w.check_empty()


def test_cancelled_while_its_blocks_wait_for_the_decode_worker() -> None:
    w = Worker()
    w.machine.on_command(prefill("a", range(6)), 0.0)
    run_pass(w.machine, 0.0)
    effects = w.machine.on_command(cancel("a"), 1.0)
    assert w.machine.on_handed_over(attempt("a"), 1.5) == []  # crossed; the withdrawal decides
    close_by_withdrawal(w, effects)


# ---- failures ----


def test_an_engine_failure_ends_the_attempts_of_its_pass_and_only_those() -> None:
    w = Worker()
    w.machine.on_command(prefill("a", range(8)), 0.0)
    w.machine.on_command(prefill("b", range(20, 24)), 0.1)
    work = w.machine.decide(1.0)
    failed = report(AttemptFailed, w.machine.on_pass_failed(work, "boom", 2.0))
    assert (failed.attempt_id, failed.kind, failed.message) == (attempt("a"), FailureKind.ENGINE, "boom")
    assert w.machine.on_withdrawn(attempt("a"), 3.0) == []
    assert lengths(w.machine.decide(3.0)) == [("b", 0, 4)]


def test_deadlines_strike_in_the_queue_and_what_nobody_reads_is_given_up() -> None:
    w = Worker(device=2)
    w.machine.on_command(prefill("a", range(8)), 0.0)
    w.machine.on_command(prefill("b", range(20, 28), deadline_s=3.0), 0.0)
    failed = report(AttemptFailed, w.machine.on_tick(3.0))
    assert (failed.attempt_id, failed.kind) == (attempt("b"), FailureKind.DEADLINE)
    run_pass(w.machine, 4.0)
    assert w.machine.on_tick(8.9) == []
    (failed,) = [e.event for e in w.machine.on_withdrawn(attempt("a"), 9.0) if isinstance(e, Report)]
    assert isinstance(failed, AttemptFailed)
    assert (failed.attempt_id, failed.kind) == (attempt("a"), FailureKind.DEADLINE)
    assert failed.message == "the decode worker did not go on reading the prompt's blocks"
    w.machine.on_withdrawn(attempt("b"), 9.5)
    w.check_empty()


def test_load_says_what_waits_and_what_was_measured() -> None:
    w = Worker(device=8)
    w.machine.on_command(prefill("a", range(20)), 0.0)
    w.machine.on_command(prefill("b", range(50, 66)), 0.1)
    run_pass(w.machine, 1.0)
    run_pass(w.machine, 1.0)
    load = w.machine.load()
    assert (load.queued_attempts, load.queued_tokens, load.free_device_blocks) == (1, 20, 3)
    assert [(p.new_tokens, p.context_tokens, p.seconds) for p in load.passes] == [(8, 0, 0.01), (8, 8, 0.01)]
    assert w.machine.load().passes == ()


@pytest.mark.parametrize("setting", ["tokens_per_pass_max", "attempts_max", "fetch_s_max"])
def test_settings_out_of_range_are_refused_by_name(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"prefill.{setting}"):
        PrefillConfig(**{setting: 0})


def test_a_whole_pull_makes_the_prompt_computable() -> None:
    w = Worker()
    spec = pull(w.machine.on_command(prefill("a", range(9), fetches=(fetch(0, 2),)), 0.0))
    arrive(w.machine, spec, 0.3)
    assert lengths(w.machine.decide(0.3)) == [("a", 8, 1)]
