"""Pure: the prefill worker's machine: queue, prefix hits and fetches, chunks, the first token, the hand-over.

An attempt goes through: queued -> opened (its whole table is held; prefix blocks load, or are pulled) -> computing ->
held (its blocks wait for the decode worker's acknowledgement) -> gone. Which one it is in follows from its fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.messages import (
    CancelCommand,
    Command,
    FailureKind,
    LoadReport,
    PrefillCommand,
    PrefillDone,
    RefusalReason,
)
from engine.protocol import Sampled
from halfmoon.types import AttemptId, BlockHash, FinishReason, NodeId, Tier, TransferId
from kv_store.tiers import KvCache
from kv_store.values import Move, PullEnded
from node.attempts import AttemptNumbers, Attempts, due_s, require
from node.effects import Effect, Emit, HandOver, Pass
from node.measures import Samples, load_report
from node.sequence import Namer, SequenceState, namer, token_of
from prefill_worker.attempt import PrefillAttempt
from prefill_worker.batcher import next_chunks


@dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """Settings of a prefill worker.

    Args:
        tokens_per_pass_max: the chunk size; a pass is packed with several prompts up to it.
        sequences_per_pass_max: prompts in one pass.
        attempts_max: queued, computing and held ones; beyond it commands are refused with NO_ROOM.
        fetch_s_max: how long a prefix may be waited for, instead of being computed.

    Raises:
        ConfigError: when built with a value out of range.
    """

    tokens_per_pass_max: int = 512
    sequences_per_pass_max: int = 64
    attempts_max: int = 256
    fetch_s_max: float = 5.0

    def __post_init__(self) -> None:
        for name in ("tokens_per_pass_max", "sequences_per_pass_max", "attempts_max"):
            require(getattr(self, name) >= 1, f"prefill.{name}", getattr(self, name), "at least 1")
        require(self.fetch_s_max > 0, "prefill.fetch_s_max", self.fetch_s_max, "more than 0 seconds")


class PrefillMachine:
    """A WorkerMachine (node/effects.py) that prefills.

    Args:
        root: parent of every first block's name.
        spare_slots: DEVICE slots to leave to others when a prompt is opened (a coupled worker's decoding).
        adopt: takes over a prompt that stays on this node, after its first token; the table stays open for it.
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
        config: PrefillConfig,
        spare_slots: Callable[[], int] = lambda: 0,
        adopt: Callable[[PrefillAttempt, float], None] | None = None,
        numbers: AttemptNumbers | None = None,
        names: Namer | None = None,
    ) -> None:
        self.config = config
        self._node_id = node_id
        self._cache = cache
        self._names = names or namer(root, block_size)
        self._block_size = block_size
        self._blocks_total = sum(cache.counts(Tier.DEVICE).values())
        self._spare_slots = spare_slots
        self._adopt = adopt
        self._attempts: Attempts[PrefillAttempt] = Attempts(
            cache, node_id=node_id, attempts_max=config.attempts_max, numbers=numbers or AttemptNumbers()
        )
        self.samples = Samples()
        self._pass: Pass | None = None
        self._waits = False  # somebody, for room

    # ---- commands ----

    def on_command(self, command: Command, now_s: float) -> list[Effect]:
        if isinstance(command, PrefillCommand):
            self._on_prefill(command, now_s)
        elif isinstance(command, CancelCommand):
            self._attempts.cancel(command.attempt_id, command.reason, now_s)
        else:
            self._attempts.num_ignored += 1
        return self.effects(now_s)

    def _on_prefill(self, command: PrefillCommand, now_s: float) -> None:
        reason = self._attempts.refusal(command.attempt_id)
        if reason is not None:
            self._attempts.refuse(command.attempt_id, reason)
            return
        stays = command.decode_here and self._adopt is not None
        attempt = PrefillAttempt(
            sequence=SequenceState(command, self._names(command), self._block_size),
            front_end=command.front_end,
            received_s=now_s,
            deadline_at_s=now_s + command.deadline_s,
            due_s=due_s(now_s, command.deadline_s, command.priority),
            withdraws=not stays,
            stays=stays,
            fetches=command.fetches,
        )
        if attempt.blocks_needed_max > self._blocks_total:
            self._attempts.refuse(command.attempt_id, RefusalReason.TOO_LONG)
        else:
            self._attempts.add(attempt)

    # ---- opening: a whole table, hits, fetches ----

    def _open_queued(self, now_s: float) -> None:
        """Open in order of urgency, and let nobody overtake the first one that finds no room."""
        self._waits = False
        for attempt in self._attempts.live():
            if not attempt.opened and not self._open(attempt, now_s):
                self._waits = True
                return

    def _open(self, attempt: PrefillAttempt, now_s: float) -> bool:
        sequence = attempt.sequence
        num_blocks = sequence.blocks(sequence.num_given_tokens)
        spare = self._spare_slots()
        if spare and self._cache.available(Tier.DEVICE) < num_blocks + spare:
            return False
        limit = sequence.reusable_blocks
        opened = self._cache.open(attempt.attempt_id, sequence.names, num_blocks, now_s, use_hits=limit)
        if opened is None:
            return False
        attempt.opened, attempt.opened_s = True, now_s
        sequence.slots = opened.slots
        attempt.loading = {opened.slots[i] for i in opened.loading}
        attempt.hits = opened.hits
        attempt.num_blocks_known = len(opened.hits)
        self._start_fetches(attempt, now_s)
        self._compute_if_all_here(attempt, now_s)
        return True

    def _start_fetches(self, attempt: PrefillAttempt, now_s: float) -> None:
        """Ask each source for the prefix blocks that are not here; none is asked for twice (one writer a slot)."""
        missing = set(range(attempt.num_blocks_known, attempt.sequence.reusable_blocks))
        for fetch in attempt.fetches:
            asked = sorted(missing & set(range(fetch.first_block, fetch.first_block + fetch.num_blocks)))
            if asked and fetch.source != self._node_id:
                missing.difference_update(asked)
                limit_s = min(self.config.fetch_s_max, attempt.deadline_at_s - now_s)
                wants = [attempt.sequence.want(i) for i in asked]
                self._attempts.start_pull(attempt, fetch, wants, wait=False, deadline_s=limit_s)

    def _compute_if_all_here(self, attempt: PrefillAttempt, now_s: float) -> None:
        """Begin after the blocks that are known. Those that arrived after a hole are computed again: not committed."""
        if attempt.ready_s is None and attempt.opened and not attempt.pulls and not attempt.loading:
            attempt.ready_s = now_s
            attempt.sequence.num_computed_tokens = attempt.num_blocks_known * self._block_size

    # ---- pulls and moves ----

    def on_pull_arrived(self, transfer_id: TransferId, indices: Sequence[int], now_s: float) -> list[Effect]:
        """Commit what extends the known prefix without a hole."""
        attempt = self._attempts.pulling(transfer_id)
        if attempt is not None:
            attempt.arrived.update(indices)
            while attempt.num_blocks_known in attempt.arrived:
                index = attempt.num_blocks_known
                self._cache.commit(attempt.attempt_id, index, attempt.sequence.names[index], now_s)
                attempt.num_blocks_known += 1
        return self.effects(now_s)

    def on_pull_ended(self, ended: PullEnded, now_s: float) -> list[Effect]:
        """Whatever is missing is computed: a fetch never fails an attempt."""
        attempt = self._attempts.pull_ended(ended, now_s)
        if attempt is not None:
            self._compute_if_all_here(attempt, now_s)
        return self.effects(now_s)

    def on_moved(self, moves: Sequence[Move], now_s: float) -> list[Effect]:
        self._cache.on_moved(moves, now_s)
        return self.after_moves(moves, now_s)

    def after_moves(self, moves: Sequence[Move], now_s: float) -> list[Effect]:
        """As `on_moved`, when the cache knows already (the two machines of a coupled worker share one)."""
        for attempt in self._attempts.loaded(moves):
            self._compute_if_all_here(attempt, now_s)
        return self.effects(now_s)

    # ---- the end of a hand-over ----

    def on_handed_over(self, attempt_id: AttemptId, now_s: float) -> list[Effect]:
        attempt = self._attempts.get(attempt_id)
        if attempt is not None and attempt.held:
            self._attempts.release(attempt, now_s)
        return self.effects(now_s)

    def on_withdrawn(self, attempt_id: AttemptId, now_s: float) -> list[Effect]:
        attempt = self._attempts.get(attempt_id)
        if attempt is not None and attempt.held:
            attempt.withdraws = False  # the transfers did so by themselves
            message = "the decode worker did not go on reading the prompt's blocks"
            self._attempts.fail(attempt, FailureKind.DEADLINE, message, now_s)
        self._attempts.withdrawn(attempt_id, now_s)
        return self.effects(now_s)

    def on_tick(self, now_s: float) -> list[Effect]:
        self._attempts.expire(now_s)
        return self.effects(now_s)

    # ---- passes ----

    def decide(self, now_s: float, tokens_max: int | None = None) -> Pass | None:
        """The next chunks. `tokens_max`: less than the setting, where a pass is shared with decoding."""
        assert self._pass is None, "one pass at a time"
        computable = (a for a in self._attempts.all() if a.computable and not a.ending)
        limit = self.config.tokens_per_pass_max
        chunks = next_chunks(
            ((a.attempt_id, a.sequence.num_left) for a in computable),
            tokens_max=limit if tokens_max is None else min(limit, tokens_max),
            sequences_max=self.config.sequences_per_pass_max,
        )
        if not chunks:
            return None
        names = tuple([c.attempt_id for c in chunks])
        batch = self._attempts.named(names)
        self._attempts.enter_pass(batch)
        slices = [a.sequence.next_slice(c.num_tokens) for a, c in zip(batch, chunks, strict=True)]
        self._pass = Pass(attempts=names, slices=tuple(slices))
        return self._pass

    def account(self, done: Pass, results: Sequence[Sampled | None], seconds: float, now_s: float) -> list[Effect]:
        self.samples.add_pass(prefill=done.slices, decode=(), seconds=seconds)
        self._pass_is_over(done)
        attempts = self._attempts.leave_pass(done, seconds, now_s)
        for attempt, part, sampled in zip(attempts, done.slices, results, strict=True):
            if attempt is not None:
                self._account_chunk(attempt, len(part.token_ids), sampled, now_s)
        return self.effects(now_s)

    def on_pass_failed(self, failed: Pass, message: str, now_s: float) -> list[Effect]:
        self._pass_is_over(failed)
        self._attempts.pass_failed(failed, message, now_s)
        return self.effects(now_s)

    def _pass_is_over(self, over: Pass) -> None:
        assert over is self._pass, "only the pass that was decided comes back"
        self._pass = None

    def _account_chunk(self, attempt: PrefillAttempt, num_tokens: int, sampled: Sampled | None, now_s: float) -> None:
        """Commit the blocks that the chunk filled: pulls that wait for them may have them at once."""
        sequence = attempt.sequence
        attempt.computed_tokens += num_tokens
        for index in sequence.advance(num_tokens):
            self._cache.commit(attempt.attempt_id, index, sequence.names[index], now_s)
        assert (sampled is not None) == (sequence.num_left == 0), "the last chunk, and only it, samples"
        if sampled is not None:
            self._on_first_token(attempt, sampled, now_s)

    # ---- the first token ----

    def _on_first_token(self, attempt: PrefillAttempt, sampled: Sampled, now_s: float) -> None:
        sequence = attempt.sequence
        finish_reason = sequence.append(sampled.token_id)
        stats = attempt.stats(self._node_id)
        token = token_of(sequence, sampled, finish_reason, stats)
        self._attempts.emit(Emit(front_end=attempt.front_end, token=token))
        self._attempts.report(
            PrefillDone(
                attempt_id=attempt.attempt_id, first_token_id=sampled.token_id, stats=stats, finish_reason=finish_reason
            )
        )
        self._part(attempt, finish_reason, now_s)

    def _part(self, attempt: PrefillAttempt, finish_reason: FinishReason | None, now_s: float) -> None:
        """Where the blocks go: nowhere, to decoding here, or to the decode worker."""
        if finish_reason is not None:
            self._attempts.release(attempt, now_s)
        elif attempt.stays:
            assert self._adopt is not None
            self._attempts.forget(attempt)
            self._adopt(attempt, now_s)
        else:
            self._hand_over(attempt, now_s)

    def _hand_over(self, attempt: PrefillAttempt, now_s: float) -> None:
        sequence = attempt.sequence
        attempt.held = True
        self._attempts.emit(
            HandOver(
                attempt_id=attempt.attempt_id,
                tail_index=sequence.num_full_given,
                tail_slot=sequence.slots[-1] if sequence.tail_tokens else 0,
                tail_tokens=sequence.tail_tokens,
            )
        )

    # ---- the rest ----

    def drain(self, *, undo: bool = False) -> None:
        self._attempts.draining = not undo

    def tick_due_s(self) -> float:
        """Before this moment `on_tick` would change nothing: at once, while somebody waits for room."""
        return -math.inf if self._waits else self._attempts.expire_due_s

    def decoding(self) -> tuple[int, int]:
        """Sequences that decode here, and tokens of their KV: none."""
        return 0, 0

    def load(self) -> LoadReport:
        live = [a for a in self._attempts.live() if not a.held]
        return load_report(
            self._cache,
            self.samples,
            queued_attempts=sum([not a.opened for a in live]),
            queued_tokens=sum([a.sequence.num_left for a in live]),
            draining=self._attempts.draining,
        )

    def attempts(self) -> tuple[AttemptId, ...]:
        return self._attempts.ids()

    def effects(self, now_s: float) -> list[Effect]:
        """What was decided, after using whatever room the last event has made."""
        self._open_queued(now_s)
        return self._attempts.take_effects()
