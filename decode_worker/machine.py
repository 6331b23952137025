"""Pure: the decode worker's machine: reserve, pull, join, decode, park and resume, finish.

A sequence joins when three things have come, in any order: all its blocks (pulled or found here), their bytes (loaded
from DRAM), and its first token (StartCommand). Prompt tokens are never computed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from core.messages import (
    AttemptFinished,
    CancelCommand,
    Command,
    DecodeJoined,
    LoadReport,
    RefusalReason,
    ReserveCommand,
    Reserved,
    StartCommand,
)
from decode_worker.attempt import DecodeAttempt, Phase
from decode_worker.batcher import next_batch
from decode_worker.room import Admission, Room
from engine.protocol import Sampled
from halfmoon.types import AttemptId, BlockHash, FinishReason, NodeId, Tier, TransferId
from kv_store.tiers import KvCache
from kv_store.values import Move, PullEnded
from node.attempts import Attempt, AttemptNumbers, Attempts, due_s, kind_of, require
from node.effects import Effect, Emit, Pass
from node.measures import Samples, load_report
from node.sequence import Namer, SequenceState, namer, token_of

WAITS = (Phase.WAITING, Phase.PARKED)
"""For room."""
PLAIN_STEPS_MAX = 4096
"""Of one answer of `plain_steps`; more are asked for again."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Settings of a decode worker.

    Args:
        sequences_max: sequences in one step.
        attempts_max: reserved, pulling, running and parked ones; beyond it reservations are refused with NO_ROOM.
        reserve_wait_s: how long a reservation may wait for evictions before it is refused.

    Raises:
        ConfigError: when built with a value out of range.
    """

    sequences_max: int = 64
    attempts_max: int = 256
    reserve_wait_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("sequences_max", "attempts_max"):
            require(getattr(self, name) >= 1, f"decode.{name}", getattr(self, name), "at least 1")
        require(self.reserve_wait_s >= 0, "decode.reserve_wait_s", self.reserve_wait_s, "0 seconds or more")


class DecodeMachine:
    """A WorkerMachine (node/effects.py) that decodes.

    Args:
        root: parent of every first block's name.
        numbers: shared with the other machine of a coupled worker.
        names: how prompts' blocks are named; None: by computing every name from `root`.
    """

    def __init__(
        self,
        *,
        node_id: NodeId,
        cache: KvCache,
        root: BlockHash,
        block_size: int,
        config: DecodeConfig,
        numbers: AttemptNumbers | None = None,
        names: Namer | None = None,
    ) -> None:
        self.config = config
        self.samples = Samples()
        self._node_id = node_id
        self._cache = cache
        self._names = names or namer(root, block_size)
        self._block_size = block_size
        self._blocks_total = sum(cache.counts(Tier.DEVICE).values())
        self._attempts: Attempts[DecodeAttempt] = Attempts(
            cache, node_id=node_id, attempts_max=config.attempts_max, numbers=numbers or AttemptNumbers()
        )
        self._room = Room(cache, self._attempts)
        self._pass: Pass | None = None
        self._waits = False  # somebody, for room, when effects were last taken

    # ---- commands ----

    def on_command(self, command: Command, now_s: float) -> list[Effect]:
        if isinstance(command, ReserveCommand):
            self._on_reserve(command, now_s)
        elif isinstance(command, StartCommand):
            self._on_start(command, now_s)
        elif isinstance(command, CancelCommand):
            self._attempts.cancel(command.attempt_id, command.reason, now_s)
        else:
            self._attempts.num_ignored += 1
        return self.effects(now_s)

    def _on_reserve(self, command: ReserveCommand, now_s: float) -> None:
        reason = self._attempts.refusal(command.attempt_id)
        if reason is not None:
            self._attempts.refuse(command.attempt_id, reason)
            return
        attempt = DecodeAttempt(
            sequence=SequenceState(command, self._names(command), self._block_size),
            front_end=command.front_end,
            received_s=now_s,
            deadline_at_s=now_s + command.deadline_s,
            due_s=due_s(now_s, command.deadline_s, command.priority),
            phase=Phase.WAITING,
            wait_until_s=now_s + self.config.reserve_wait_s,
            source=command,
        )
        if attempt.sequence.blocks_max > self._blocks_total:
            self._attempts.refuse(command.attempt_id, RefusalReason.TOO_LONG)
        else:
            self._attempts.add(attempt)
            self._waits = True

    def _on_start(self, command: StartCommand, now_s: float) -> None:
        attempt = self._attempts.get(command.attempt_id)
        if attempt is None or attempt.joined or attempt.first_token_id is not None:
            self._attempts.num_ignored += 1
            return
        attempt.first_token_id = command.first_token_id
        self._join_if_complete(attempt, now_s)

    # ---- reserving ----

    def _admit_waiting(self, now_s: float) -> None:
        """Let reservations in, in order of urgency; refuse those that find no room, or waited too long for it."""
        admission = Admission.OPENED
        for attempt in [a for a in self._attempts.live() if a.phase is Phase.WAITING]:
            if admission is not Admission.SOON:  # nobody overtakes one that waits for evictions
                admission = self._room.admit(attempt, now_s)
            if admission is Admission.OPENED:
                self._begin_pull(attempt, now_s)
            elif admission is Admission.NO_ROOM or now_s >= attempt.wait_until_s:
                self._attempts.send_back(attempt, RefusalReason.NO_ROOM)

    def _begin_pull(self, attempt: DecodeAttempt, now_s: float) -> None:
        """Ask for every block that was not found here; the source grants them as they become ready."""
        hit_tokens = len(attempt.hits) * self._block_size
        self._attempts.report(Reserved(attempt_id=attempt.attempt_id, hit_tokens=hit_tokens))
        wants = [attempt.sequence.want(i) for i in attempt.to_pull]
        left_s = attempt.deadline_at_s - now_s
        assert attempt.source is not None
        self._attempts.start_pull(attempt, attempt.source, wants, wait=True, deadline_s=left_s)

    # ---- pulling and joining ----

    def on_pull_arrived(self, transfer_id: TransferId, indices: Sequence[int], now_s: float) -> list[Effect]:
        """Commit the full blocks: others may use them at once."""
        attempt = self._attempts.pulling(transfer_id)
        if attempt is not None:
            sequence = attempt.sequence
            attempt.arrived.update(indices)
            for index in indices:
                if index < sequence.num_full_given:
                    self._cache.commit(attempt.attempt_id, index, sequence.names[index], now_s)
        return self.effects(now_s)

    def on_pull_ended(self, ended: PullEnded, now_s: float) -> list[Effect]:
        attempt = self._attempts.pull_ended(ended, now_s)
        if attempt is not None:
            attempt.pull = ended
            self._on_own_pull_ended(attempt, ended, now_s)
        return self.effects(now_s)

    def _on_own_pull_ended(self, attempt: DecodeAttempt, ended: PullEnded, now_s: float) -> None:
        missing = [i for i in attempt.to_pull if i not in attempt.arrived]
        if missing:
            why = ended.error or "the source does not hold them"
            message = f"{len(missing)} of {len(attempt.to_pull)} blocks did not arrive: {why}"
            self._attempts.fail(attempt, kind_of(ended.error), message, now_s)
        else:
            attempt.phase = Phase.HERE
            attempt.sequence.num_computed_tokens = attempt.sequence.num_given_tokens
            self._join_if_complete(attempt, now_s)

    def _join_if_complete(self, attempt: DecodeAttempt, now_s: float) -> None:
        if attempt.joined or attempt.first_token_id is None or not attempt.quiet:
            return
        attempt.joined = True
        self._attempts.report(DecodeJoined(attempt_id=attempt.attempt_id, stats=attempt.stats(self._node_id)))
        finish_reason = attempt.sequence.append(attempt.first_token_id)
        if finish_reason is not None:  # the prefill worker has emitted the last token already
            self._finish(attempt, finish_reason, now_s)

    def adopt(self, prefilled: Attempt, now_s: float) -> None:
        """Go on with a sequence that was prefilled on this node; its table, open in the cache, is ours from now on."""
        attempt = DecodeAttempt(
            sequence=prefilled.sequence,
            front_end=prefilled.front_end,
            received_s=now_s,
            deadline_at_s=prefilled.deadline_at_s,
            due_s=prefilled.due_s,
            opened=True,
            opened_s=now_s,
            phase=Phase.HERE,
            joined=True,
        )
        self._attempts.add(attempt)
        self._attempts.report(DecodeJoined(attempt_id=attempt.attempt_id, stats=attempt.stats(self._node_id)))

    # ---- moves, withdrawals, time ----

    def on_moved(self, moves: Sequence[Move], now_s: float) -> list[Effect]:
        self._cache.on_moved(moves, now_s)
        return self.after_moves(moves, now_s)

    def after_moves(self, moves: Sequence[Move], now_s: float) -> list[Effect]:
        """As `on_moved`, when the cache knows already (the two machines of a coupled worker share one)."""
        for attempt in self._attempts.loaded(moves):
            self._join_if_complete(attempt, now_s)
        return self.effects(now_s)

    def on_handed_over(self, attempt_id: AttemptId, now_s: float) -> list[Effect]:
        """Nothing is handed over from here."""
        return self.effects(now_s)

    def on_withdrawn(self, attempt_id: AttemptId, now_s: float) -> list[Effect]:
        """Nothing is withdrawn here."""
        return self.effects(now_s)

    def on_tick(self, now_s: float) -> list[Effect]:
        self._attempts.expire(now_s)
        return self.effects(now_s)

    # ---- steps ----

    def decide(self, now_s: float) -> Pass | None:
        """The next step: one token of each sequence. May grow tables, and preempt for it."""
        assert self._pass is None, "one pass at a time"
        if self._waits:  # else nobody is parked
            self._room.rescue(now_s)
        batch = next_batch(
            [a for a in self._attempts.all() if a.joined],  # most of the others are being pulled
            sequences_max=self.config.sequences_max,
            grow=lambda attempt: self._room.grow(attempt, now_s),
        )
        if not batch:
            return None
        self._attempts.enter_pass(batch)
        self._pass = Pass(
            attempts=tuple([a.sequence.attempt_id for a in batch]),
            slices=tuple([a.sequence.next_slice(1) for a in batch]),
        )
        return self._pass

    def account(self, done: Pass, results: Sequence[Sampled | None], seconds: float, now_s: float) -> list[Effect]:
        kv_tokens = sum([part.end for part in done.slices])
        self.samples.add_step(batch=len(done.slices), kv_tokens=kv_tokens, seconds=seconds)
        self._pass_is_over(done)
        attempts = self._attempts.leave_pass(done, seconds, now_s)
        for attempt, part, sampled in zip(attempts, done.slices, results, strict=True):
            assert sampled is not None, "every slice of a step samples"
            if attempt is not None:
                attempt.count_computed(part.start, len(part.token_ids))
                self._account_token(attempt, sampled, now_s)
        return self.effects(now_s)

    def plain_steps(self) -> int:
        """How many steps, from the one that is out on, are plain: each adds a token to every sequence of the batch and
        does nothing else, so that the next step is of the same batch. As far as is known here: only the engine knows
        where an output stops, and any event may change the answer.
        """
        assert self._pass is not None, "no pass is out"
        if self._attempts.has_effects:
            return 0  # `decide` has failed somebody, which the next `account` is to tell
        num_in_pass, plain = 0, PLAIN_STEPS_MAX
        for attempt in self._attempts.all():
            if attempt.in_pass:
                if attempt.ending:
                    return 0
                num_in_pass += 1
                steps = attempt.sequence.num_plain_steps
                plain = min(plain, steps)
            elif not attempt.ending and (attempt.runnable or attempt.phase in WAITS):
                return 0
        assert num_in_pass == len(self._pass.attempts)
        return plain

    def account_plain(self, done: Pass, results: Sequence[Sequence[int]], seconds: Sequence[float]) -> Pass:
        """As `account` and `decide` in turns, for the plain steps that took `seconds` each. Returns the next step.

        Args:
            results: the tokens of each sequence of the pass, one for each step. They have to be emitted.
        """
        self._pass_is_over(done)
        kv_tokens = sum([part.end for part in done.slices]) + len(done.slices) * (len(seconds) - 1)
        self.samples.add_step(batch=len(done.slices), kv_tokens=kv_tokens, seconds=seconds[-1])
        slices = []
        for attempt, part, token_ids in zip(self._attempts.named(done.attempts), done.slices, results, strict=True):
            attempt.compute_s = reduce(add, seconds, attempt.compute_s)  # one by one: a sum may round differently
            attempt.count_computed(part.start, len(token_ids))
            attempt.sequence.run(token_ids)
            slices.append(attempt.sequence.next_slice(1))
        self._pass = Pass(attempts=done.attempts, slices=tuple(slices))
        return self._pass

    def on_pass_failed(self, failed: Pass, message: str, now_s: float) -> list[Effect]:
        self._pass_is_over(failed)
        self._attempts.pass_failed(failed, message, now_s)
        return self.effects(now_s)

    def _pass_is_over(self, over: Pass) -> None:
        assert over is self._pass, "only the pass that was decided comes back"
        self._pass = None

    def _account_token(self, attempt: DecodeAttempt, sampled: Sampled, now_s: float) -> None:
        sequence = attempt.sequence
        for index in sequence.advance(1):
            self._cache.commit(attempt.attempt_id, index, sequence.names[index], now_s)
        finish_reason = sequence.append(sampled.token_id)
        stats = attempt.stats(self._node_id) if finish_reason else None
        token = token_of(sequence, sampled, finish_reason, stats)
        self._attempts.emit(Emit(attempt.front_end, token))
        if finish_reason is not None:
            self._finish(attempt, finish_reason, now_s)

    def _finish(self, attempt: DecodeAttempt, finish_reason: FinishReason, now_s: float) -> None:
        self._attempts.report(
            AttemptFinished(
                attempt_id=attempt.attempt_id,
                finish_reason=finish_reason,
                num_output_tokens=attempt.sequence.num_output_tokens,
                stats=attempt.stats(self._node_id),
            )
        )
        self._attempts.release(attempt, now_s)

    # ---- the rest ----

    def spare_slots(self) -> int:
        """DEVICE slots that whoever shares the cache should leave to the sequences here."""
        return self._room.spare()

    def drain(self, *, undo: bool = False) -> None:
        self._attempts.draining = not undo

    def tick_due_s(self) -> float:
        """Before this moment `on_tick` would change nothing: at once, while somebody waits for room."""
        return -math.inf if self._waits else self._attempts.expire_due_s

    def decoding(self) -> tuple[int, int]:
        """Sequences that have joined, and tokens of their KV."""
        joined = [a.sequence.num_computed_tokens for a in self._attempts.live() if a.joined]
        return len(joined), sum(joined)

    def load(self) -> LoadReport:
        running_sequences, kv_tokens = self.decoding()
        return load_report(
            self._cache,
            self.samples,
            queued_attempts=sum([a.phase is Phase.WAITING for a in self._attempts.live()]),
            running_sequences=running_sequences,
            kv_tokens=kv_tokens,
            draining=self._attempts.draining,
        )

    def attempts(self) -> tuple[AttemptId, ...]:
        return self._attempts.ids()

    def effects(self, now_s: float) -> list[Effect]:
        """What was decided, after using whatever room the last event has made: for the preempted first."""
        if self._waits or self._room.parked:
            self._room.parked = False
            for attempt in self._room.resume(now_s):
                self._join_if_complete(attempt, now_s)
            self._admit_waiting(now_s)
            self._waits = any(a.phase in WAITS and not a.ending for a in self._attempts.all())
        return self._attempts.take_effects()
