"""Pure: what a worker's machine asks its shell to do, and the shape that every worker's machine has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from core.messages import Command, LoadReport, Token, WorkerEvent
from engine.protocol import Sampled, Slice
from halfmoon.types import AttemptId, TransferId
from kv_store.values import Move, PullEnded, PullSpec


@dataclass(frozen=True, kw_only=True)
class Report:
    """Send to the conductor's machine, in order."""

    event: WorkerEvent


class Emit(NamedTuple):
    """Send to a front end; the shell gathers one step's tokens into one message."""

    front_end: str
    token: Token


@dataclass(frozen=True, kw_only=True)
class StartPull:
    spec: PullSpec


@dataclass(frozen=True, kw_only=True)
class AbortPull:
    """Answered by on_pull_ended, when no byte can be written any more; until then its slots are quarantined."""

    transfer_id: TransferId
    reason: str


@dataclass(frozen=True, kw_only=True)
class HandOver:
    """This attempt's prefill has ended here: waiting pulls may have the tail. Answered by on_handed_over.

    The attempt's blocks stay held by the machine until then.
    tail_index, tail_slot, tail_tokens: the partial last block; tail_tokens 0: there is none.
    """

    attempt_id: AttemptId
    tail_index: int
    tail_slot: int
    tail_tokens: int


@dataclass(frozen=True, kw_only=True)
class Withdraw:
    """This attempt ends here without a hand-over: abort the pulls that read from it.

    Answered by on_withdrawn, when no peer can read its slots any more; until then they are quarantined.
    """

    attempt_id: AttemptId


Effect = Report | Emit | StartPull | AbortPull | HandOver | Withdraw


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One engine pass: `attempts[i]` owns `slices[i]`."""

    attempts: tuple[AttemptId, ...]
    slices: tuple[Slice, ...]


class WorkerMachine(Protocol):
    """Events in, effects out, time passed in. One owner: the node's loop.

    After every call the loop also collects `cache.take_moves()` and `cache.take_events()` of the machine's cache.
    """

    def on_command(self, command: Command, now_s: float) -> list[Effect]:
        """Attach, Snapshot and Drain are the loop's (it calls `drain`); the others come here."""
        ...

    def on_pull_arrived(self, transfer_id: TransferId, indices: Sequence[int], now_s: float) -> list[Effect]:
        """These blocks are here and verified."""
        ...

    def on_pull_ended(self, ended: PullEnded, now_s: float) -> list[Effect]: ...

    def on_handed_over(self, attempt_id: AttemptId, now_s: float) -> list[Effect]:
        """The decode worker has acknowledged every block of this attempt."""
        ...

    def on_withdrawn(self, attempt_id: AttemptId, now_s: float) -> list[Effect]: ...

    def on_moved(self, moves: Sequence[Move], now_s: float) -> list[Effect]: ...

    def on_tick(self, now_s: float) -> list[Effect]:
        """Deadlines. Called at least every 100 ms."""
        ...

    def decide(self, now_s: float) -> Pass | None:
        """The next pass, or None when there is nothing to compute. At most one pass is out at a time.

        May allocate slots (and so cause moves and preemptions, whose effects `account` or the next call returns).
        """
        ...

    def account(self, done: Pass, results: Sequence[Sampled | None], seconds: float, now_s: float) -> list[Effect]:
        """Book what was computed: commit blocks, first tokens, finished sequences."""
        ...

    def on_pass_failed(self, failed: Pass, message: str, now_s: float) -> list[Effect]:
        """The engine raised: every attempt of the pass fails, and only those."""
        ...

    def drain(self, *, undo: bool = False) -> None:
        """Refuse new attempts; `undo`: take them again."""
        ...

    def load(self) -> LoadReport:
        """State now; the samples collected since the last call (which this call clears)."""
        ...

    def attempts(self) -> tuple[AttemptId, ...]: ...
