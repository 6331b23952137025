"""The coupled worker's machine: both roles on one cache, in one pass."""

from __future__ import annotations

import pytest

from core.messages import (
    AttemptFailed,
    AttemptFinished,
    Closed,
    DecodeJoined,
    FailureKind,
    PrefillDone,
    RefusalReason,
    Refused,
    Reserved,
)
from coupled_worker.machine import CoupledConfig, CoupledMachine
from decode_worker.machine import DecodeConfig
from halfmoon.errors import ConfigError
from halfmoon.types import FinishReason, NodeId, Tier
from kv_store.tiers import KvCache
from node.effects import Effect, HandOver, StartPull, Withdraw
from prefill_worker.machine import PrefillConfig
from tests.workers import (
    ROOT,
    SIZE,
    arrive,
    attempt,
    cancel,
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
    def __init__(self, *, device: int = 32, dram: int = 0, attempts_max: int = 64) -> None:
        self.cache = KvCache(num_device_slots=device, num_dram_slots=dram, block_size=SIZE)
        config = CoupledConfig(
            tokens_per_pass_max=8,
            prefill=PrefillConfig(tokens_per_pass_max=6),
            decode=DecodeConfig(sequences_max=4, attempts_max=attempts_max),
        )
        self.machine = CoupledMachine(node_id=NodeId("c1"), cache=self.cache, root=ROOT, block_size=SIZE, config=config)

    def here(self, name: str, prompt: range, now_s: float = 0.0, **command: object) -> list[Effect]:
        return self.machine.on_command(prefill(name, prompt, here=True, **command), now_s)  # type: ignore[arg-type]

    def check_empty(self) -> None:
        assert self.machine.attempts() == ()
        counts = self.cache.counts(Tier.DEVICE)
        assert [counts[s] for s in ("filling", "pinned", "quarantined")] == [0, 0, 0]
        self.cache.check_invariants()


def test_a_prompt_that_stays_is_decoded_in_the_same_table_without_a_transfer() -> None:
    w = Worker()
    effects = w.here("a", range(5), 0.0, max_tokens=3)
    effects += run_pass(w.machine, 1.0, token=90)
    done, joined = reports(effects)
    assert isinstance(done, PrefillDone)
    assert isinstance(joined, DecodeJoined)
    assert (done.stats.computed_tokens, joined.stats.computed_tokens, joined.stats.pulled_blocks) == (5, 0, 0)
    work = w.machine.decide(1.1)
    assert lengths(work) == [("a", 5, 1)]
    assert work.slices[0].token_ids == (90,)
    effects += w.machine.account(work, sampled_by(work, 91), 0.1, 1.2)
    effects += run_pass(w.machine, 1.3, token=92)
    assert [(t.index, t.token_id) for t in tokens(effects)] == [(0, 90), (1, 91), (2, 92)]
    finished = report(AttemptFinished, effects)
    assert (finished.finish_reason, finished.num_output_tokens) == (FinishReason.LENGTH, 3)
    assert finished.stats.decode_prefilled_tokens == 0
    assert not of(HandOver, effects) + of(StartPull, effects) + of(Withdraw, effects)
    w.check_empty()


def test_a_pass_mixes_steps_and_a_chunk_within_its_budget() -> None:
    w = Worker()
    for i, name in enumerate("abc"):
        w.here(name, range(10 * i, 10 * i + 2))
    run_pass(w.machine, 0.0)  # three prompts of two tokens
    w.here("long", range(50, 70))
    work = w.machine.decide(1.0)
    assert lengths(work) == [("a", 2, 1), ("b", 2, 1), ("c", 2, 1), ("long", 0, 5)]
    w.machine.load()
    w.machine.account(work, sampled_by(work, 7), 0.1, 1.1)
    (sample,) = w.machine.load().passes
    assert (sample.batch, sample.kv_tokens, sample.new_tokens, sample.context_tokens) == (3, 9, 5, 0)
    load = w.machine.load()
    assert (load.running_sequences, load.queued_tokens, load.passes) == (3, 15, ())


def test_it_serves_either_role_alone() -> None:
    w = Worker()
    w.machine.on_command(prefill("p", range(6)), 0.0)
    effects = run_pass(w.machine, 0.0)
    assert of(HandOver, effects)[0].attempt_id == attempt("p")
    effects = w.machine.on_command(reserve(prefill("d", range(20, 26), max_tokens=2)), 0.1)
    report(Reserved, effects)
    arrive(w.machine, pull(effects), 0.2)
    report(DecodeJoined, w.machine.on_command(start("d", 5), 0.3))
    report(AttemptFinished, run_pass(w.machine, 0.4))
    w.machine.on_handed_over(attempt("p"), 0.5)
    w.check_empty()


def test_one_attempt_is_taken_in_one_role_only() -> None:
    w = Worker()
    w.here("a", range(6))
    refused = report(Refused, w.machine.on_command(reserve(prefill("a", range(6))), 0.1))
    assert refused.reason is RefusalReason.DUPLICATE


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_cancelled_before_during_and_after_its_prefill(passes: int) -> None:
    w = Worker()
    w.here("a", range(8))
    for _ in range(passes):
        run_pass(w.machine, 0.0)
    work = w.machine.decide(1.0)
    assert w.machine.on_command(cancel("a"), 1.1) == []
    effects = w.machine.account(work, sampled_by(work, 7), 0.1, 1.2)
    assert reports(effects) == [Closed(attempt_id=attempt("a"))]
    assert tokens(effects) == []
    w.check_empty()


def test_an_engine_failure_fails_both_kinds() -> None:
    w = Worker()
    w.here("a", range(2))
    run_pass(w.machine, 0.0)
    w.here("b", range(20, 23))
    effects = w.machine.on_pass_failed(w.machine.decide(1.0), "boom", 1.1)
    assert [(e.attempt_id.request_id, e.kind) for e in reports(effects) if isinstance(e, AttemptFailed)] == [
        ("a", FailureKind.ENGINE),
        ("b", FailureKind.ENGINE),
    ]
    w.check_empty()


def test_prompts_leave_room_for_the_next_token_of_those_that_run() -> None:
    w = Worker(device=4)
    w.here("a", range(6), max_tokens=8)
    run_pass(w.machine, 0.0)
    w.here("b", range(20, 27), max_tokens=2)  # two blocks: all that is free
    assert w.machine.load().queued_attempts == 1
    effects: list[Effect] = []
    while attempt("a") in w.machine.attempts():
        effects += run_pass(w.machine, 1.0)
    assert report(AttemptFinished, effects).attempt_id == attempt("a")
    assert lengths(w.machine.decide(2.0)) == [("b", 0, 6)]


def test_the_older_sequence_parks_the_younger_one_that_was_prefilled_here() -> None:
    w = Worker(device=6, dram=8)
    for name, first in (("a", 0), ("b", 40)):
        w.here(name, range(first, first + 6), max_tokens=16)
    effects: list[Effect] = []
    parked = False
    while w.machine.attempts():
        work = w.machine.decide(1.0)
        parked |= "b" in {r.request_id for r in w.machine.attempts()} and not w.cache.slots(attempt("b"))
        if work is not None:
            effects += w.machine.account(work, sampled_by(work, 7), 0.1, 1.0)
        effects += settle_moves(w.machine, w.cache, 1.0)
    assert parked
    for name in "ab":
        assert [t.index for t in tokens(effects) if t.attempt_id == attempt(name)] == list(range(16))
    w.check_empty()


def test_refusals() -> None:
    w = Worker(device=4, attempts_max=1)
    too_long = report(Refused, w.here("x", range(6), max_tokens=16))
    assert too_long.reason is RefusalReason.TOO_LONG  # with its longest output it can never fit
    w.here("a", range(4), max_tokens=4)
    assert report(Refused, w.here("b", range(4), max_tokens=4)).reason is RefusalReason.NO_ROOM
    w.machine.drain()
    assert report(Refused, w.machine.on_command(prefill("c", range(4)), 0.0)).reason is RefusalReason.DRAINING
    assert report(Refused, w.machine.on_command(reserve(prefill("d", range(4))), 0.0)).reason is RefusalReason.DRAINING
    assert w.machine.load().draining


def test_generated_blocks_are_found_by_the_next_turn_of_a_chat() -> None:
    w = Worker()
    w.here("a", range(6), max_tokens=4)
    while w.machine.attempts():
        run_pass(w.machine, 0.0, token=77)
    turn = [*range(6), 77, 77, 77]
    assert len(w.cache.match(names(turn))) == 2


def test_a_budget_that_a_full_batch_would_use_up_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"coupled\.tokens_per_pass_max"):
        CoupledConfig(tokens_per_pass_max=64, decode=DecodeConfig(sequences_max=64))
