"""The decode worker's machine, story by story."""

from __future__ import annotations

import pytest

from core.messages import (
    AttemptFailed,
    AttemptFinished,
    Closed,
    DecodeJoined,
    FailureKind,
    RefusalReason,
    Refused,
    Reserved,
)
from decode_worker.machine import DecodeConfig, DecodeMachine
from halfmoon.errors import ConfigError, IntegrityError, PeerLost, TransferError, TransferTimeout
from halfmoon.types import FinishReason, NodeId, Tier
from kv_store.tiers import KvCache
from node.effects import AbortPull, Effect, StartPull
from tests.workers import (
    ROOT,
    SIZE,
    arrive,
    attempt,
    cancel,
    ended,
    lengths,
    names,
    of,
    prefill,
    pull,
    report,
    reports,
    reserve,
    run_pass,
    sampled_by,
    settle_moves,
    start,
    tokens,
)


class Worker:
    def __init__(self, *, device: int = 16, dram: int = 0, **settings: float) -> None:
        self.cache = KvCache(num_device_slots=device, num_dram_slots=dram, block_size=SIZE)
        config = DecodeConfig(**settings)  # type: ignore[arg-type]
        self.machine = DecodeMachine(node_id=NodeId("d1"), cache=self.cache, root=ROOT, block_size=SIZE, config=config)

    def reserve(self, name: str, prompt: range, now_s: float = 0.0, **command: object) -> list[Effect]:
        return self.machine.on_command(reserve(prefill(name, prompt, **command)), now_s)  # type: ignore[arg-type]

    def join(self, name: str, prompt: range, now_s: float = 0.0, token: int = 7, **command: object) -> list[Effect]:
        """Reserve, pull and start."""
        spec = pull(self.reserve(name, prompt, now_s, **command))
        return arrive(self.machine, spec, now_s) + self.machine.on_command(start(name, token), now_s)

    def settle(self, now_s: float = 0.0) -> list[Effect]:
        return settle_moves(self.machine, self.cache, now_s)

    def check_empty(self) -> None:
        """Nothing is held any more."""
        assert self.machine.attempts() == ()
        counts = self.cache.counts(Tier.DEVICE)
        assert [counts[s] for s in ("filling", "pinned", "quarantined")] == [0, 0, 0]
        self.cache.check_invariants()


def test_reserve_pull_start_decode_finish() -> None:
    w = Worker()
    effects = w.reserve("a", range(10), 1.0, max_tokens=4)
    assert report(Reserved, effects).hit_tokens == 0
    spec = pull(effects)
    assert [(x.index, x.block_hash, x.num_tokens) for x in spec.wants] == [
        (0, names(range(8))[0], 4),
        (1, names(range(8))[1], 4),
        (2, None, 2),
    ]
    assert (spec.wait, spec.deadline_s, spec.source) == (True, 60.0, "p0")
    assert tuple(x.slot for x in spec.wants) == w.cache.slots(attempt("a"))

    assert w.machine.on_pull_arrived(spec.transfer_id, [1, 0], 1.2) == []
    assert len(w.cache.match(names(range(8)))) == 2
    assert w.machine.on_pull_arrived(spec.transfer_id, [2], 1.3) == []
    assert w.machine.on_pull_ended(ended(spec), 1.4) == []
    assert w.machine.decide(1.4) is None

    joined = report(DecodeJoined, w.machine.on_command(start("a", 90), 1.5))
    assert (joined.stats.pulled_blocks, joined.stats.pulled_bytes, joined.stats.overlap) == (3, 300, 0.25)

    work = w.machine.decide(2.0)
    assert lengths(work) == [("a", 10, 1)]
    assert work.slices[0].token_ids == (90,)
    (token,) = tokens(w.machine.account(work, sampled_by(work, 91), 0.1, 2.1))
    assert (token.index, token.token_id, token.stats) == (1, 91, None)
    work = w.machine.decide(2.1)
    assert (work.slices[0].token_ids, work.slices[0].start) == ((91,), 11)
    w.machine.account(work, sampled_by(work, 92), 0.1, 2.2)
    assert w.cache.match(names([*range(10), 90, 91])) == (Tier.DEVICE,) * 3  # filled by generated tokens

    effects = run_pass(w.machine, 2.3, token=93, seconds=0.1)
    (token,) = tokens(effects)
    finished = report(AttemptFinished, effects)
    assert (token.index, token.finish_reason, token.stats) == (3, FinishReason.LENGTH, finished.stats)
    assert (finished.finish_reason, finished.num_output_tokens) == (FinishReason.LENGTH, 4)
    assert (finished.stats.computed_tokens, finished.stats.decode_prefilled_tokens) == (3, 0)
    assert finished.stats.compute_s == pytest.approx(0.3)
    w.check_empty()


def test_the_start_may_come_before_the_pull_has_ended() -> None:
    w = Worker()
    spec = pull(w.reserve("a", range(6)))
    assert w.machine.on_command(start("a", 9), 0.1) == []
    assert w.machine.decide(0.1) is None
    report(DecodeJoined, arrive(w.machine, spec, 0.2))
    assert lengths(w.machine.decide(0.2)) == [("a", 6, 1)]


def test_a_second_start_is_ignored() -> None:
    w = Worker()
    w.join("a", range(6), token=9)
    assert w.machine.on_command(start("a", 10), 0.1) == []
    assert w.machine.decide(0.2).slices[0].token_ids == (9,)


def test_a_stop_token_ends_the_output_early() -> None:
    w = Worker()
    w.join("a", range(6), stop=(42,))
    effects = run_pass(w.machine, 0.1, token=42)
    assert report(AttemptFinished, effects).finish_reason is FinishReason.STOP
    assert tokens(effects)[0].finish_reason is FinishReason.STOP
    w.check_empty()


def test_tokens_of_earlier_attempts_count() -> None:
    w = Worker()
    w.join("a", range(10), number=1, num_prompt_tokens=6, max_tokens=6)
    effects = run_pass(w.machine, 0.1)
    assert tokens(effects)[0].index == 5
    assert report(AttemptFinished, effects).num_output_tokens == 6


def test_a_first_token_that_is_the_last_one_finishes_without_a_step() -> None:
    w = Worker()
    effects = w.join("a", range(6), token=42, stop=(42,))
    assert tokens(effects) == []
    assert report(AttemptFinished, effects).num_output_tokens == 1
    w.check_empty()


def test_blocks_found_here_are_not_pulled_but_for_the_last() -> None:
    w = Worker()
    w.join("a", range(8), max_tokens=2)
    run_pass(w.machine, 0.0)
    effects = w.reserve("b", range(8), 1.0)
    assert report(Reserved, effects).hit_tokens == 4
    spec = pull(effects)
    assert [x.index for x in spec.wants] == [1]  # its acknowledgement lets the prefill worker go
    arrive(w.machine, spec, 1.1)
    joined = report(DecodeJoined, w.machine.on_command(start("b", 5), 1.2))
    assert (joined.stats.hit_tokens_device, joined.stats.pulled_blocks) == (4, 1)


def test_all_sequences_step_together_up_to_the_limit() -> None:
    w = Worker(device=32, sequences_max=2)
    for i, name in enumerate("abc"):
        w.join(name, range(10 * i, 10 * i + 5), float(i))
    work = w.machine.decide(3.0)
    assert lengths(work) == [("a", 5, 1), ("b", 5, 1)]
    w.machine.account(work, sampled_by(work, 7), 0.1, 3.1)
    load = w.machine.load()
    assert (load.running_sequences, load.kv_tokens) == (3, 17)
    assert [(p.batch, p.kv_tokens, p.new_tokens) for p in load.passes] == [(2, 12, 0)]


# ---- room ----


def test_a_reservation_that_finds_no_room_is_refused_with_what_is_free() -> None:
    w = Worker(device=4)
    w.join("a", range(7))
    refused = report(Refused, w.reserve("b", range(20, 27)))
    assert (refused.reason, refused.free_blocks) == (RefusalReason.NO_ROOM, 2)  # one of them a's next
    assert w.machine.attempts() == (attempt("a"),)
    spec = pull(w.reserve("b", range(20, 23)))  # the same attempt may come again
    assert len(spec.wants) == 1


def test_a_reservation_waits_for_evictions_and_is_not_refused() -> None:
    w = Worker(device=4, dram=8, reserve_wait_s=1.0)
    w.join("a", range(12), max_tokens=2)
    run_pass(w.machine, 0.0)  # leaves three named blocks
    assert w.reserve("b", range(20, 31), 1.0, max_tokens=5) == []
    assert w.machine.on_tick(1.9) == []
    effects = w.settle(1.95)
    report(Reserved, effects)
    assert len(pull(effects).wants) == 3


def test_the_wait_for_evictions_has_an_end() -> None:
    w = Worker(device=4, dram=8, reserve_wait_s=1.0)
    w.join("a", range(12), max_tokens=2)
    run_pass(w.machine, 0.0)
    assert w.reserve("b", range(20, 31), 1.0, max_tokens=5) == []
    assert report(Refused, w.machine.on_tick(2.0)).reason is RefusalReason.NO_ROOM
    w.settle(3.0)
    w.check_empty()


def test_more_than_the_pool_can_ever_hold_is_too_long() -> None:
    w = Worker(device=4)
    refused = report(Refused, w.reserve("a", range(8), max_tokens=10))
    assert refused.reason is RefusalReason.TOO_LONG
    report(Reserved, w.reserve("a", range(8), max_tokens=9))  # the last token's KV is never needed


def two_that_collide(dram: int) -> tuple[Worker, list[Effect]]:
    """a and b fill the pool of five; a's fifth token needs a slot that only b has."""
    w = Worker(device=5, dram=dram)
    w.join("a", range(8), max_tokens=12)
    w.join("b", range(20, 23), 0.1, max_tokens=12)
    effects: list[Effect] = []
    for _ in range(4):
        effects += run_pass(w.machine, 1.0)
    assert w.cache.available(Tier.DEVICE) == 0
    return w, effects


def test_the_less_urgent_sequence_is_parked_and_resumes_where_it_was() -> None:
    w, _ = two_that_collide(dram=8)
    assert w.machine.decide(1.0) is None  # a waits for b's slots, b is parked
    effects = w.settle(1.1)
    assert reports(effects) == []
    while attempt("a") in w.machine.attempts():
        work = w.machine.decide(1.2)
        assert [name for name, *_ in lengths(work)] == ["a"]
        effects += w.machine.account(work, sampled_by(work, 7), 0.1, 1.2)
        effects += w.settle(1.2)
    assert report(AttemptFinished, effects).attempt_id == attempt("a")
    assert lengths(w.machine.decide(1.3)) == [("b", 7, 1)]
    assert w.machine.attempts() == (attempt("b"),)


def test_preemption_is_counted_and_every_token_still_comes_once() -> None:
    w, effects = two_that_collide(dram=8)
    while w.machine.attempts():
        work = w.machine.decide(1.2)
        if work is not None:
            effects += w.machine.account(work, sampled_by(work, 7), 0.1, 1.2)
        effects += w.settle(1.2)
    for name in "ab":
        assert [t.index for t in tokens(effects) if t.attempt_id == attempt(name)] == list(range(1, 12))
    finished = {e.attempt_id: e for e in reports(effects) if isinstance(e, AttemptFinished)}
    assert finished[attempt("a")].stats.preemptions == 0
    assert finished[attempt("b")].stats.preemptions == 1
    w.check_empty()


def test_without_dram_the_less_urgent_one_fails_as_a_last_resort() -> None:
    w, _ = two_that_collide(dram=0)
    assert lengths(w.machine.decide(1.0)) == [("a", 12, 1)]
    failed = report(AttemptFailed, w.machine.on_tick(1.1))
    assert (failed.attempt_id, failed.kind) == (attempt("b"), FailureKind.NO_ROOM)


def test_a_pull_in_progress_gives_way_only_when_nothing_else_can() -> None:
    w = Worker(device=5)
    w.join("a", range(8), max_tokens=12)
    spec = pull(w.reserve("b", range(20, 23), 0.1, max_tokens=12))
    for _ in range(8):
        run_pass(w.machine, 1.0)
    assert w.machine.decide(1.0) is None
    effects = w.machine.on_tick(1.1)
    assert report(AttemptFailed, effects).kind is FailureKind.NO_ROOM
    assert [e.transfer_id for e in of(AbortPull, effects)] == [spec.transfer_id]
    assert w.machine.decide(1.2) is None  # quarantined until the pull is quiescent
    w.machine.on_pull_ended(ended(spec, 0), 1.3)
    assert [name for name, *_ in lengths(w.machine.decide(1.4))] == ["a"]


def test_priority_decides_who_is_parked() -> None:
    w = Worker(device=5, dram=8)
    w.join("low", range(8), max_tokens=12, priority=-1)
    w.join("high", range(20, 23), 0.1, max_tokens=12, priority=1)
    for _ in range(4):
        run_pass(w.machine, 1.0)
    work = w.machine.decide(1.0)
    assert lengths(work) == [("high", 7, 1)]
    w.machine.account(work, sampled_by(work, 7), 0.1, 1.1)
    assert w.machine.decide(1.2) is None
    assert w.cache.slots(attempt("low")) == ()
    w.settle(1.3)
    assert lengths(w.machine.decide(1.4)) == [("high", 8, 1)]


# ---- pulls that fail ----


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PeerLost("gone"), FailureKind.PEER_LOST),
        (IntegrityError("wrong bytes"), FailureKind.INTEGRITY),
        (TransferTimeout("slow"), FailureKind.TRANSFER),
        (None, FailureKind.TRANSFER),
    ],
)
def test_a_pull_that_misses_blocks_fails_the_attempt(error: TransferError | None, kind: FailureKind) -> None:
    w = Worker()
    spec = pull(w.reserve("a", range(10)))
    w.machine.on_pull_arrived(spec.transfer_id, [0], 0.1)
    failed = report(AttemptFailed, w.machine.on_pull_ended(ended(spec, 1, 2, error=error), 0.2))
    assert failed.kind is kind
    assert failed.message.startswith("2 of 3 blocks did not arrive")
    w.check_empty()
    assert len(w.cache.match(names(range(8)))) == 1  # what came is right, and stays


# ---- cancelled in every phase ----


def closed(effects: list[Effect]) -> bool:
    return [e for e in reports(effects) if isinstance(e, Closed)] == [Closed(attempt_id=attempt("a"))]


def test_cancelled_while_waiting_for_room() -> None:
    w = Worker(device=4, dram=8)
    w.join("x", range(12), max_tokens=2)
    run_pass(w.machine, 0.0)
    w.reserve("a", range(20, 31), 1.0, max_tokens=5)
    assert closed(w.machine.on_command(cancel("a"), 1.1))
    w.settle(1.2)
    w.check_empty()


def test_cancelled_while_pulling_its_slots_are_quarantined_until_the_pull_ends() -> None:
    w = Worker()
    spec = pull(w.reserve("a", range(10)))
    w.machine.on_pull_arrived(spec.transfer_id, [0], 0.1)
    effects = w.machine.on_command(cancel("a"), 0.2)
    assert of(AbortPull, effects) == [AbortPull(transfer_id=spec.transfer_id, reason="the test says so")]
    assert not closed(effects)
    assert w.cache.counts(Tier.DEVICE)["quarantined"] == 2
    assert w.machine.on_command(start("a", 5), 0.3) == []
    assert closed(w.machine.on_pull_ended(ended(spec, 1, 2), 0.4))
    w.check_empty()


def test_cancelled_in_mid_step_its_token_is_dropped() -> None:
    w = Worker()
    w.join("a", range(6))
    w.join("b", range(20, 26))
    work = w.machine.decide(0.1)
    assert not closed(w.machine.on_command(cancel("a"), 0.2))
    effects = w.machine.account(work, sampled_by(work, 7), 0.1, 0.3)
    assert closed(effects)
    assert [t.attempt_id for t in tokens(effects)] == [attempt("b")]


def test_cancelled_between_steps_and_while_parked() -> None:
    w = Worker()
    w.join("a", range(6))
    assert closed(w.machine.on_command(cancel("a"), 0.2))
    assert w.machine.on_command(cancel("a"), 0.3) == []
    w.check_empty()

    w, _ = two_that_collide(dram=8)
    w.machine.decide(1.0)
    effects = w.machine.on_command(cancel("b"), 1.1)
    assert reports(effects) == [Closed(attempt_id=attempt("b"))]
    w.settle(1.2)
    assert lengths(w.machine.decide(1.3)) == [("a", 12, 1)]


# ---- failures and refusals ----


def test_an_engine_failure_fails_the_whole_step() -> None:
    w = Worker()
    w.join("a", range(6))
    w.join("b", range(20, 26))
    effects = w.machine.on_pass_failed(w.machine.decide(0.1), "boom", 0.2)
    assert [(e.attempt_id, e.kind) for e in reports(effects) if isinstance(e, AttemptFailed)] == [
        (attempt("a"), FailureKind.ENGINE),
        (attempt("b"), FailureKind.ENGINE),
    ]
    w.check_empty()


def test_the_deadline_ends_a_pull_and_a_sequence() -> None:
    w = Worker()
    spec = pull(w.reserve("a", range(6), deadline_s=2.0))
    w.join("b", range(20, 26), 0.0, deadline_s=2.0)
    effects = w.machine.on_tick(2.0)
    assert {e.attempt_id for e in reports(effects)} == {attempt("a"), attempt("b")}
    assert len(of(AbortPull, effects)) == 1
    w.machine.on_pull_ended(ended(spec, 0), 2.1)
    w.check_empty()


@pytest.mark.parametrize("why", ["duplicate", "stale", "draining", "full"])
def test_refusals_change_nothing(why: str) -> None:
    w = Worker(attempts_max=1 if why == "full" else 9)
    w.reserve("a", range(6), number=2)
    if why == "draining":
        w.machine.drain()
    name, number = {"duplicate": ("a", 2), "stale": ("a", 1)}.get(why, ("b", 1))
    effects = w.reserve(name, range(6), number=number)
    assert report(Refused, effects).reason == (RefusalReason.NO_ROOM if why == "full" else RefusalReason(why))
    assert of(StartPull, effects) == []
    assert w.machine.attempts() == (attempt("a", 2),)


def test_settings_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"decode\.sequences_max"):
        DecodeConfig(sequences_max=0)
    with pytest.raises(ConfigError, match=r"decode\.reserve_wait_s"):
        DecodeConfig(reserve_wait_s=-1.0)


def test_the_most_urgent_is_brought_back_at_the_cost_of_those_that_took_its_room() -> None:
    w = Worker(device=12, dram=16)
    w.join("first", range(3), 0.0, max_tokens=17)
    w.join("second", range(30, 52), 0.1, max_tokens=8)
    spec = pull(w.reserve("third", range(60, 70), 0.2, max_tokens=30))
    for _ in range(5):
        run_pass(w.machine, 1.0)
    assert w.machine.decide(1.0) is None
    assert w.cache.slots(attempt("second")) == ()  # parked for the first; the third, still pulled, could not be
    w.settle(1.0)
    arrive(w.machine, spec, 1.1)
    w.machine.on_command(start("third", 7), 1.1)
    while attempt("first") in w.machine.attempts():
        run_pass(w.machine, 1.2)
    assert w.cache.slots(attempt("second")) == ()  # the third has grown into its room
    assert w.machine.decide(1.3) is None
    assert w.cache.slots(attempt("third")) == ()
    w.settle(1.4)
    assert [name for name, *_ in lengths(w.machine.decide(1.5))] == ["second"]


def test_a_given_token_that_a_step_computes_would_show() -> None:
    """`decode_prefilled_tokens` is counted from what passes computed, not promised."""
    w = Worker()
    w.join("a", range(6), max_tokens=3)
    sequence = w.machine._attempts.live()[0]
    run_pass(w.machine, 0.2)
    assert (sequence.computed_tokens, sequence.prefilled_tokens) == (1, 0)
    sequence.count_computed(4, 3)  # as if a step had computed the last two given tokens too
    stats = report(AttemptFinished, run_pass(w.machine, 0.3)).stats
    assert (stats.computed_tokens, stats.decode_prefilled_tokens) == (5, 2)
