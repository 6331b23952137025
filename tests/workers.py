"""What tests of worker machines share: commands by few words, and a way to read effects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from core.messages import CancelCommand, Fetch, PrefillCommand, ReserveCommand, StartCommand, Token, WorkerEvent
from engine.protocol import Sampled
from halfmoon.blocks import BlockChain
from halfmoon.errors import TransferError
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, RequestId, SamplingParams
from kv_store.tiers import KvCache
from kv_store.values import PullEnded, PullSpec
from node.effects import Effect, Emit, Pass, Report, StartPull, WorkerMachine

ROOT = BlockHash(b"root".ljust(16, b"."))
SIZE = 4
PEER = NodeId("p0")

E = TypeVar("E")
V = TypeVar("V")


def attempt(name: str, number: int = 1) -> AttemptId:
    return AttemptId(RequestId(name), number)


def prefill(
    name: str,
    tokens: Iterable[int],
    *,
    number: int = 1,
    max_tokens: int = 8,
    stop: tuple[int, ...] = (),
    deadline_s: float = 60.0,
    fetches: tuple[Fetch, ...] = (),
    here: bool = False,
    priority: int = 0,
    num_prompt_tokens: int | None = None,
) -> PrefillCommand:
    token_ids = tuple(tokens)
    return PrefillCommand(
        attempt_id=attempt(name, number),
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=stop),
        front_end="f",
        deadline_s=deadline_s,
        fetches=fetches,
        decode_here=here,
        priority=priority,
    )


def reserve(command: PrefillCommand, source: NodeId = PEER, epoch: str = "e") -> ReserveCommand:
    """The decode worker's part of the same attempt."""
    return ReserveCommand(
        attempt_id=command.attempt_id,
        token_ids=command.token_ids,
        num_prompt_tokens=command.num_prompt_tokens,
        sampling=command.sampling,
        front_end=command.front_end,
        source=source,
        source_epoch=Epoch(epoch),
        source_address=source,
        deadline_s=command.deadline_s,
        priority=command.priority,
    )


def start(name: str, token: int, number: int = 1) -> StartCommand:
    return StartCommand(attempt_id=attempt(name, number), first_token_id=token)


def cancel(name: str, number: int = 1) -> CancelCommand:
    return CancelCommand(attempt_id=attempt(name, number), reason="the test says so")


def fetch(first_block: int, num_blocks: int, source: str = "p9") -> Fetch:
    return Fetch(
        source=NodeId(source),
        source_epoch=Epoch("e"),
        source_address=source,
        first_block=first_block,
        num_blocks=num_blocks,
    )


def names(tokens: Sequence[int]) -> list[BlockHash]:
    return BlockChain(ROOT, SIZE).extend(tokens)


# ---- reading effects ----


def of(kind: type[E], effects: Iterable[Effect]) -> list[E]:
    return [e for e in effects if isinstance(e, kind)]


def reports(effects: Iterable[Effect]) -> list[WorkerEvent]:
    return [e.event for e in of(Report, effects)]


def report(kind: type[V], effects: Iterable[Effect]) -> V:
    """The only report of this kind."""
    (event,) = [e for e in reports(effects) if isinstance(e, kind)]
    return event


def tokens(effects: Iterable[Effect]) -> list[Token]:
    return [e.token for e in of(Emit, effects)]


def pull(effects: Iterable[Effect]) -> PullSpec:
    (effect,) = of(StartPull, effects)
    return effect.spec


# ---- playing the shell ----


def ended(spec: PullSpec, *missing: int, error: TransferError | None = None) -> PullEnded:
    return PullEnded(
        transfer_id=spec.transfer_id,
        attempt_id=spec.attempt_id,
        missing=missing,
        error=error,
        num_bytes=100 * (len(spec.wants) - len(missing)),
        seconds=0.5,
        link="memory",
        overlap=0.25,
    )


def arrive(machine: WorkerMachine, spec: PullSpec, now_s: float) -> list[Effect]:
    """Everything that was wanted comes, and the pull ends."""
    effects = machine.on_pull_arrived(spec.transfer_id, [w.index for w in spec.wants], now_s)
    return effects + machine.on_pull_ended(ended(spec), now_s)


def settle_moves(machine: WorkerMachine, cache: KvCache, now_s: float) -> list[Effect]:
    """Perform the moves that are out, and those that they lead to."""
    effects: list[Effect] = []
    while moves := cache.take_moves():
        effects += machine.on_moved(moves, now_s)
    return effects


def sampled_by(work: Pass, token: int) -> list[Sampled | None]:
    return [Sampled(token_id=token) if s.sampling else None for s in work.slices]


def run_pass(machine: WorkerMachine, now_s: float, token: int = 7, seconds: float = 0.01) -> list[Effect]:
    """Decide, execute (every sampled token is `token`), account."""
    work = machine.decide(now_s)
    assert work is not None, "there is something to compute"
    return machine.account(work, sampled_by(work, token), seconds, now_s)


def lengths(work: Pass | None) -> list[tuple[str, int, int]]:
    """(request, start, number of new tokens) of each slice."""
    if work is None:
        return []
    pairs = zip(work.attempts, work.slices, strict=True)
    return [(str(a.request_id), s.start, len(s.token_ids)) for a, s in pairs]
