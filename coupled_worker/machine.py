"""Pure: the coupled worker's machine: a prefill and a decode machine on one cache, one engine, one pass.

They meet in two places only: a prompt that stays here passes its open table on (`DecodeMachine.adopt`), and prompts
leave the slots that running sequences will need (`DecodeMachine.spare_slots`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from core.messages import CancelCommand, Command, LoadReport, PrefillCommand, RefusalReason, Refused
from decode_worker.machine import DecodeConfig, DecodeMachine
from engine.protocol import Sampled
from halfmoon.types import AttemptId, BlockHash, NodeId, Tier, TransferId
from kv_store.tiers import KvCache
from kv_store.values import Move, PullEnded
from node.attempts import AttemptNumbers, require
from node.effects import Effect, Pass, Report
from node.measures import Samples
from node.sequence import Namer
from prefill_worker.machine import PrefillConfig, PrefillMachine

NOTHING = Pass(attempts=(), slices=())


@dataclass(frozen=True, kw_only=True)
class CoupledConfig:
    """Settings of a coupled worker.

    Args:
        tokens_per_pass_max: of one pass: a token of each running sequence, and prompt tokens in what is left.

    Raises:
        ConfigError: when built with a value out of range.
    """

    tokens_per_pass_max: int = 512
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        least = self.decode.sequences_max + 1
        expected = f"at least {least}, so that prompts go on beside a full batch"
        require(self.tokens_per_pass_max >= least, "coupled.tokens_per_pass_max", self.tokens_per_pass_max, expected)


class CoupledMachine:
    """A WorkerMachine (node/effects.py) in both roles. Events for one role are ignored by the other."""

    def __init__(
        self,
        *,
        node_id: NodeId,
        cache: KvCache,
        root: BlockHash,
        block_size: int,
        config: CoupledConfig,
        names: Namer | None = None,
    ) -> None:
        numbers = AttemptNumbers()
        self.config = config
        self._cache = cache
        self._decode = DecodeMachine(
            node_id=node_id,
            cache=cache,
            root=root,
            block_size=block_size,
            config=config.decode,
            numbers=numbers,
            names=names,
        )
        self._prefill = PrefillMachine(
            node_id=node_id,
            cache=cache,
            root=root,
            block_size=block_size,
            config=config.prefill,
            spare_slots=self._decode.spare_slots,
            adopt=self._decode.adopt,
            numbers=numbers,
            names=names,
        )
        self._samples = Samples()
        self._step, self._chunks = NOTHING, NOTHING

    # ---- events ----

    def on_command(self, command: Command, now_s: float) -> list[Effect]:
        if isinstance(command, PrefillCommand) and command.decode_here and self._decode_is_full():
            refused = Refused(
                attempt_id=command.attempt_id,
                reason=RefusalReason.NO_ROOM,
                free_blocks=self._cache.available(Tier.DEVICE),
            )
            return [Report(event=refused)]
        machine = self._prefill if self._concerns_prefill(command) else self._decode
        return self._effects(machine.on_command(command, now_s), now_s)

    def _concerns_prefill(self, command: Command) -> bool:
        if isinstance(command, CancelCommand):
            return command.attempt_id in self._prefill.attempts()
        return isinstance(command, PrefillCommand)

    def _decode_is_full(self) -> bool:
        """Counting those that will be adopted."""
        return len(self.attempts()) >= self.config.decode.attempts_max

    def on_pull_arrived(self, transfer_id: TransferId, indices: Sequence[int], now_s: float) -> list[Effect]:
        effects = self._prefill.on_pull_arrived(transfer_id, indices, now_s)
        effects += self._decode.on_pull_arrived(transfer_id, indices, now_s)
        return self._effects(effects, now_s)

    def on_pull_ended(self, ended: PullEnded, now_s: float) -> list[Effect]:
        effects = self._prefill.on_pull_ended(ended, now_s) + self._decode.on_pull_ended(ended, now_s)
        return self._effects(effects, now_s)

    def on_handed_over(self, attempt_id: AttemptId, now_s: float) -> list[Effect]:
        return self._effects(self._prefill.on_handed_over(attempt_id, now_s), now_s)

    def on_withdrawn(self, attempt_id: AttemptId, now_s: float) -> list[Effect]:
        return self._effects(self._prefill.on_withdrawn(attempt_id, now_s), now_s)

    def on_moved(self, moves: Sequence[Move], now_s: float) -> list[Effect]:
        self._cache.on_moved(moves, now_s)
        effects = self._prefill.after_moves(moves, now_s) + self._decode.after_moves(moves, now_s)
        return self._effects(effects, now_s)

    def on_tick(self, now_s: float) -> list[Effect]:
        return self._effects(self._prefill.on_tick(now_s) + self._decode.on_tick(now_s), now_s)

    def _effects(self, effects: list[Effect], now_s: float) -> list[Effect]:
        """And what one role decides because of the room that the other has made."""
        return effects + self._decode.effects(now_s) + self._prefill.effects(now_s)

    # ---- passes ----

    def decide(self, now_s: float) -> Pass | None:
        """Running sequences first: their step is never late for a prompt; chunks fill what is left of the budget."""
        self._step = self._decode.decide(now_s) or NOTHING
        left = self.config.tokens_per_pass_max - len(self._step.slices)
        self._chunks = self._prefill.decide(now_s, tokens_max=left) or NOTHING
        both = Pass(
            attempts=self._step.attempts + self._chunks.attempts, slices=self._step.slices + self._chunks.slices
        )
        return both if both.slices else None

    def account(self, done: Pass, results: Sequence[Sampled | None], seconds: float, now_s: float) -> list[Effect]:
        step, chunks = self._take_parts(done)
        num_steps = len(step.slices)
        self._samples.add_pass(prefill=chunks.slices, decode=step.slices, seconds=seconds)
        effects: list[Effect] = []
        if step.slices:
            effects += self._decode.account(step, results[:num_steps], seconds, now_s)
        if chunks.slices:
            effects += self._prefill.account(chunks, results[num_steps:], seconds, now_s)
        return self._effects(effects, now_s)

    def on_pass_failed(self, failed: Pass, message: str, now_s: float) -> list[Effect]:
        step, chunks = self._take_parts(failed)
        effects: list[Effect] = []
        if step.slices:
            effects += self._decode.on_pass_failed(step, message, now_s)
        if chunks.slices:
            effects += self._prefill.on_pass_failed(chunks, message, now_s)
        return self._effects(effects, now_s)

    def _take_parts(self, over: Pass) -> tuple[Pass, Pass]:
        parts = self._step, self._chunks
        assert over.attempts == parts[0].attempts + parts[1].attempts, "only the pass that was decided comes back"
        self._step, self._chunks = NOTHING, NOTHING
        return parts

    # ---- the rest ----

    def drain(self, *, undo: bool = False) -> None:
        self._prefill.drain(undo=undo)
        self._decode.drain(undo=undo)

    def tick_due_s(self) -> float:
        return min(self._prefill.tick_due_s(), self._decode.tick_due_s())

    def decoding(self) -> tuple[int, int]:
        """Sequences that decode here, and tokens of their KV."""
        return self._decode.decoding()

    def load(self) -> LoadReport:
        """Both roles' load; a mixed pass is one sample."""
        prefill, decode = self._prefill.load(), self._decode.load()
        return replace(
            prefill,
            queued_attempts=prefill.queued_attempts + decode.queued_attempts,
            running_sequences=decode.running_sequences,
            kv_tokens=decode.kv_tokens,
            passes=self._samples.take(),
        )

    def attempts(self) -> tuple[AttemptId, ...]:
        return self._prefill.attempts() + self._decode.attempts()
