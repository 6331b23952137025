"""The worker machines under commands and events in any order, on a real cache and the fake engine.

The test plays the shell and the peers: it holds pulls, moves, passes, hand-overs and withdrawals for as long as it
likes, and completes them in any order and portion. Bytes are real, so a slot that is given away too early shows as
wrong content. At the end everything is completed, and each attempt must have ended exactly once with the oracle's
tokens, nothing being held any more.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.messages import (
    AttemptFailed,
    AttemptFinished,
    Closed,
    PrefillCommand,
    PrefillDone,
    Refused,
    ReserveCommand,
    Token,
    WorkerEvent,
)
from coupled_worker.machine import CoupledConfig, CoupledMachine
from decode_worker.machine import DecodeConfig, DecodeMachine
from engine.fake import FakeEngine, fake_tokens
from engine.protocol import Slice
from halfmoon.blocks import root_hash
from halfmoon.errors import PeerLost
from halfmoon.types import AttemptId, NodeId, Role, Tier, TransferId
from kv_store.tiers import KvCache
from kv_store.values import Move, PullSpec
from node.effects import AbortPull, Effect, Emit, HandOver, Pass, Report, StartPull, Withdraw, WorkerMachine
from prefill_worker.machine import PrefillConfig, PrefillMachine
from tests.workers import SIZE, cancel, ended, fetch, prefill, reserve, start

STEMS = ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 4, 11, 12, 13, 14, 15, 16, 17, 18))
COMPLETIONS_MAX = 3000

prompts = st.tuples(st.sampled_from(STEMS), st.integers(1, 12), st.lists(st.integers(0, 255), max_size=4)).map(
    lambda t: t[0][: t[1]] + tuple(t[2])
)


def kv_bytes(token_ids: tuple[int, ...], index: int) -> bytes:
    """What block `index` of a sequence of these tokens holds, as any correct worker writes it."""
    engine = FakeEngine(block_size=SIZE)
    num_slots = -(-len(token_ids) // SIZE)
    pool = memoryview(bytearray(num_slots * engine.model.layout.block_bytes))
    engine.bind(pool, num_slots)
    engine.forward([Slice(token_ids=token_ids, start=0, slots=tuple(range(num_slots)))])
    size = engine.model.layout.block_bytes
    return bytes(pool[index * size : (index + 1) * size])


class WorkerUnderEvents(RuleBasedStateMachine):
    role: Role

    @initialize(device=st.integers(5, 12), dram=st.sampled_from([0, 4, 24]), chunk=st.integers(5, 16))
    def start_worker(self, device: int, dram: int, chunk: int) -> None:
        self.engine = FakeEngine(block_size=SIZE)
        self.size = self.engine.model.layout.block_bytes
        self.cache = KvCache(num_device_slots=device, num_dram_slots=dram, block_size=SIZE)
        self.bytes = {
            Tier.DEVICE: bytearray(b"\xee" * device * self.size),
            Tier.DRAM: bytearray(b"\xdd" * dram * self.size),
        }
        self.engine.bind(memoryview(self.bytes[Tier.DEVICE]), device)
        self.machine = self.make_machine(chunk)
        self.now_s = 0.0
        self.commands: dict[AttemptId, PrefillCommand | ReserveCommand] = {}
        self.ends: dict[AttemptId, list[WorkerEvent]] = defaultdict(list)
        self.prefilled: dict[AttemptId, PrefillDone] = {}
        self.tokens: dict[AttemptId, list[Token]] = defaultdict(list)
        self.unstarted: list[AttemptId] = []
        self.pulls: dict[TransferId, tuple[PullSpec, list[int]]] = {}
        self.moves: list[Move] = []
        self.handing: dict[AttemptId, HandOver] = {}
        self.withdrawing: list[AttemptId] = []
        self.work: Pass | None = None

    def make_machine(self, chunk: int) -> WorkerMachine:
        prefill_config = PrefillConfig(tokens_per_pass_max=chunk, attempts_max=6)
        decode_config = DecodeConfig(sequences_max=4, attempts_max=8, reserve_wait_s=0.5)
        common = {
            "node_id": NodeId("w"),
            "cache": self.cache,
            "root": root_hash(self.engine.model.fingerprint),
            "block_size": SIZE,
        }
        if self.role is Role.PREFILL:
            return PrefillMachine(**common, config=prefill_config)  # type: ignore[arg-type]
        if self.role is Role.DECODE:
            return DecodeMachine(**common, config=decode_config)  # type: ignore[arg-type]
        config = CoupledConfig(tokens_per_pass_max=chunk, prefill=prefill_config, decode=decode_config)
        return CoupledMachine(**common, config=config)  # type: ignore[arg-type]

    # ---- commands ----

    @rule(
        prompt=prompts,
        max_tokens=st.sampled_from([1, 2, 8, 16, 24]),
        emitted=st.integers(0, 2),
        stop=st.sampled_from([(), tuple(b"e .")]),
        deadline_s=st.sampled_from([3.0, 300.0]),
        here=st.booleans(),
        pulls=st.booleans(),
        fetches=st.booleans(),
        priority=st.integers(-1, 1),
    )
    def command(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        emitted: int,
        stop: tuple[int, ...],
        deadline_s: float,
        here: bool,
        pulls: bool,
        fetches: bool,
        priority: int,
    ) -> None:
        command = prefill(
            f"r{len(self.commands)}",
            prompt,
            number=1 + emitted,
            num_prompt_tokens=max(1, len(prompt) - emitted),
            max_tokens=max_tokens + emitted,
            stop=stop,
            deadline_s=deadline_s,
            here=here and self.role is Role.COUPLED,
            fetches=(fetch(0, 9, "p8"), fetch(1, 9, "p9")) if fetches else (),
            priority=priority,
        )
        sends_reserve = self.role is Role.DECODE or (self.role is Role.COUPLED and pulls and not here)
        self.send(reserve(command) if sends_reserve else command)

    def send(self, command: PrefillCommand | ReserveCommand) -> None:
        self.commands[command.attempt_id] = command
        if isinstance(command, ReserveCommand):
            self.unstarted.append(command.attempt_id)
        self.perform(self.machine.on_command(command, self.now_s))

    @precondition(lambda self: self.role is not Role.PREFILL)
    @rule(lengths=st.lists(st.integers(1, 7), min_size=2, max_size=4), here=st.booleans())
    def a_crowd_comes_and_runs(self, lengths: list[int], here: bool) -> None:
        """Several long outputs at once, all their blocks here soon: what leads to preemption."""
        here = here and self.role is Role.COUPLED
        for length in lengths:
            command = prefill(f"r{len(self.commands)}", STEMS[1][:length], max_tokens=18, deadline_s=300.0, here=here)
            self.send(command if here else reserve(command))
        while self.unstarted:
            self.start_next(0)
        for transfer_id in list(self.pulls):
            self.arrive(transfer_id, list(self.pulls[transfer_id][1]))
            self.end_pull(transfer_id, fails=False)

    @precondition(lambda self: self.commands)
    @rule(data=st.data())
    def send_again_under_an_older_or_equal_number(self, data: st.DataObject) -> None:
        command = data.draw(st.sampled_from(list(self.commands.values())))
        number = data.draw(st.integers(0, command.attempt_id.number))
        again = replace(command, attempt_id=AttemptId(command.attempt_id.request_id, number))
        if not any(isinstance(e, Refused) for e in self.ends[command.attempt_id]):
            effects = self.machine.on_command(again, self.now_s)
            refusals = [e for e in effects if isinstance(e, Report) and isinstance(e.event, Refused)]
            assert again.attempt_id in {e.event.attempt_id for e in refusals}  # type: ignore[union-attr]
            self.perform([e for e in effects if e not in refusals or e.event.attempt_id != again.attempt_id])  # type: ignore[union-attr]

    @precondition(lambda self: self.unstarted)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        self.start_next(data.draw(st.integers(0, len(self.unstarted) - 1)))

    def start_next(self, position: int) -> None:
        attempt_id = self.unstarted.pop(position)
        token = self.oracle(self.commands[attempt_id])[0]
        self.perform(self.machine.on_command(start(attempt_id.request_id, token, attempt_id.number), self.now_s))

    @precondition(lambda self: self.commands)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        attempt_id = data.draw(st.sampled_from(list(self.commands)))
        self.perform(self.machine.on_command(cancel(attempt_id.request_id, attempt_id.number), self.now_s))

    # ---- what the shell and the peers complete ----

    @precondition(lambda self: self.pulls)
    @rule(data=st.data())
    def pull_arrives(self, data: st.DataObject) -> None:
        transfer_id = data.draw(st.sampled_from(list(self.pulls)))
        _spec, left = self.pulls[transfer_id]
        indices = data.draw(st.permutations(left))[: data.draw(st.integers(0, len(left)))]
        self.arrive(transfer_id, indices)

    def arrive(self, transfer_id: TransferId, indices: list[int]) -> None:
        spec, left = self.pulls[transfer_id]
        token_ids = self.commands[spec.attempt_id].token_ids
        slots = {want.index: want.slot for want in spec.wants}
        for index in indices:
            left.remove(index)
            self.block(Tier.DEVICE, slots[index])[:] = kv_bytes(token_ids, index)
        if indices:
            self.perform(self.machine.on_pull_arrived(transfer_id, tuple(indices), self.now_s))

    @precondition(lambda self: self.pulls)
    @rule(data=st.data(), ending=st.sampled_from(["whole", "whole", "whole", "missing", "fails"]))
    def pull_ends(self, data: st.DataObject, ending: str) -> None:
        transfer_id = data.draw(st.sampled_from(list(self.pulls)))
        if ending == "whole":
            self.arrive(transfer_id, list(self.pulls[transfer_id][1]))
        self.end_pull(transfer_id, ending == "fails")

    def end_pull(self, transfer_id: TransferId, fails: bool) -> None:
        spec, left = self.pulls.pop(transfer_id)
        error = PeerLost("the peer is gone") if fails and left else None
        self.perform(self.machine.on_pull_ended(ended(spec, *left, error=error), self.now_s))

    @precondition(lambda self: self.moves)
    @rule(data=st.data())
    def moves_are_done(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(self.moves)))
        self.move(data.draw(st.permutations(self.moves))[:count])

    def move(self, moves: list[Move]) -> None:
        for move in moves:
            self.moves.remove(move)
            source, target = move.source, move.target
            self.block(target.tier, target.slot)[:] = self.block(source.tier, source.slot)
        self.perform(self.machine.on_moved(moves, self.now_s))

    @precondition(lambda self: self.work is None)
    @rule()
    def pass_begins(self) -> None:
        self.work = self.machine.decide(self.now_s)
        self.collect()

    @precondition(lambda self: self.work is not None)
    @rule(fails=st.integers(0, 19).map(lambda n: n == 7))
    def pass_ends(self, fails: bool) -> None:
        work, self.work = self.work, None
        assert work is not None
        if fails:
            self.perform(self.machine.on_pass_failed(work, "the device is on fire", self.now_s))
        else:
            self.perform(self.machine.account(work, self.engine.forward(work.slices), 0.01, self.now_s))

    @precondition(lambda self: self.work is None)
    @rule(count=st.integers(2, 12))
    def passes(self, count: int) -> None:
        """An undisturbed while: long enough for sequences to outgrow the pool."""
        for _ in range(count):
            self.pass_begins()
            if self.work is None:
                return
            self.pass_ends(fails=False)

    @precondition(lambda self: self.handing)
    @rule(data=st.data())
    def handed_over(self, data: st.DataObject) -> None:
        """The peer has read everything, just now: the bytes must still be there."""
        attempt_id = data.draw(st.sampled_from(list(self.handing)))
        tail = self.handing.pop(attempt_id)
        if tail.tail_tokens and attempt_id in self.machine.attempts():
            expected = kv_bytes(self.commands[attempt_id].token_ids, tail.tail_index)
            used = tail.tail_tokens * self.size // SIZE // 2  # keys first, then values
            assert self.block(Tier.DEVICE, tail.tail_slot)[:used] == expected[:used]
        self.perform(self.machine.on_handed_over(attempt_id, self.now_s))

    @precondition(lambda self: self.withdrawing)
    @rule()
    def withdrawn(self) -> None:
        attempt_id = self.withdrawing.pop(0)
        self.handing.pop(attempt_id, None)
        self.perform(self.machine.on_withdrawn(attempt_id, self.now_s))

    @rule(seconds=st.sampled_from([0.01, 0.1, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.perform(self.machine.on_tick(self.now_s))

    # ---- reading effects ----

    def block(self, tier: Tier, slot: int) -> memoryview:
        return memoryview(self.bytes[tier])[slot * self.size : (slot + 1) * self.size]

    def collect(self) -> None:
        self.moves += self.cache.take_moves()
        self.cache.take_events()

    def perform(self, effects: list[Effect]) -> None:
        self.collect()
        for effect in effects:
            match effect:
                case Report():
                    self.on_report(effect.event)
                case Emit():
                    self.on_token(effect.token)
                case StartPull():
                    spec = effect.spec
                    self.pulls[spec.transfer_id] = (spec, [want.index for want in spec.wants])
                case HandOver():
                    self.handing[effect.attempt_id] = effect
                case Withdraw():
                    self.withdrawing.append(effect.attempt_id)
                case AbortPull():
                    assert effect.transfer_id in self.pulls

    def on_report(self, event: WorkerEvent) -> None:
        attempt_id: AttemptId = event.attempt_id  # type: ignore[union-attr]
        assert not self.ends[attempt_id], f"{event} after {self.ends[attempt_id]}"
        if isinstance(event, Refused | AttemptFailed | AttemptFinished | Closed):
            self.ends[attempt_id].append(event)
        if isinstance(event, PrefillDone):
            self.prefilled[attempt_id] = event

    def oracle(self, command: PrefillCommand | ReserveCommand) -> list[int]:
        return fake_tokens(command.token_ids, command.sampling.max_tokens, command.sampling)

    def on_token(self, token: Token) -> None:
        """In order, without a gap, and the oracle's."""
        command = self.commands[token.attempt_id]
        skipped = 1 if isinstance(command, ReserveCommand) else 0
        known = self.tokens[token.attempt_id]
        assert not known or known[-1].finish_reason is None
        nth = len(known) + skipped
        assert token.index == len(command.token_ids) - command.num_prompt_tokens + nth
        assert token.token_id == self.oracle(command)[nth]
        stops = token.token_id in command.sampling.stop_token_ids
        assert (token.finish_reason is not None) == (stops or token.index + 1 == command.sampling.max_tokens)
        known.append(token)

    # ---- always, and at the end ----

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_invariants()

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for _ in range(COMPLETIONS_MAX):
                if not (self.machine.attempts() or self.moves):
                    break
                self.complete_something()
            assert self.machine.attempts() == ()
            self.check_the_end()

    def complete_something(self) -> None:
        """Everything that is out comes back; then time passes."""
        for transfer_id in list(self.pulls):
            self.arrive(transfer_id, list(self.pulls[transfer_id][1]))
            self.end_pull(transfer_id, fails=False)
        while self.unstarted:
            self.start_next(0)
        self.move(list(self.moves))
        for attempt_id in list(self.handing):
            del self.handing[attempt_id]
            self.perform(self.machine.on_handed_over(attempt_id, self.now_s))
        while self.withdrawing:
            self.withdrawn()
        if self.work is None:
            self.pass_begins()
        if self.work is not None:
            self.pass_ends(fails=False)
        self.time_passes(0.01)

    def check_the_end(self) -> None:
        for attempt_id, command in self.commands.items():
            ends = self.ends[attempt_id]
            plain_prefill = isinstance(command, PrefillCommand) and not command.decode_here
            done = self.prefilled.get(attempt_id)
            silent = done is not None and (plain_prefill or done.finish_reason is not None)
            assert len(ends) == 1 or (silent and not ends), f"{attempt_id}: {ends}"
        counts = self.cache.counts(Tier.DEVICE)
        assert [counts[s] for s in ("filling", "pinned", "evicting", "quarantined")] == [0, 0, 0, 0]
        assert self.cache.counts(Tier.DRAM)["pinned"] == 0
        self.cache.audit()


class PrefillUnderEvents(WorkerUnderEvents):
    role = Role.PREFILL


class DecodeUnderEvents(WorkerUnderEvents):
    role = Role.DECODE


class CoupledUnderEvents(WorkerUnderEvents):
    role = Role.COUPLED


for _case in (PrefillUnderEvents, DecodeUnderEvents, CoupledUnderEvents):
    _case.TestCase.settings = settings(
        max_examples=60,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )

TestPrefillUnderEvents = PrefillUnderEvents.TestCase
TestDecodeUnderEvents = DecodeUnderEvents.TestCase
TestCoupledUnderEvents = CoupledUnderEvents.TestCase
