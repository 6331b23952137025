"""A conductor's machine with a cast of workers, driven by hand: what the conductor's tests share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from conductor.admission_config import AdmissionConfig, Mode
from conductor.config import ConductorConfig
from conductor.desk import Layout
from conductor.effects import Effect, RequestSpec, Send, Slo
from conductor.machine import ConductorMachine
from conductor.recording import in_words
from core.cost import CostPrior
from core.messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptStats,
    BlockCopy,
    CancelCommand,
    Closed,
    DecodeJoined,
    FailureKind,
    LoadReport,
    NodeInfo,
    PrefillCommand,
    PrefillDone,
    RefusalReason,
    Refused,
    ReserveCommand,
    Reserved,
    Snapshot,
    StartCommand,
    WorkerEvent,
)
from halfmoon.blocks import BlockChain, Fingerprint, root_hash
from halfmoon.types import (
    AttemptId,
    BlockHash,
    Epoch,
    FinishReason,
    NodeId,
    RequestId,
    Role,
    SamplingParams,
    Tier,
)

BLOCK_SIZE = 16
BLOCK_BYTES = 1_000_000
FINGERPRINT = Fingerprint(weights="w", num_layers=2, num_kv_heads=1, head_dim=8, rope="default", block_size=BLOCK_SIZE)
ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "c": Role.COUPLED}

PRIOR = CostPrior(prefill=(0.01, 1e-3, 1e-12), decode=(0.02, 1e-3, 1e-9), transfer=(1e-3, 1e-9))
"""A token costs 1 ms to compute; a block (16 tokens) 1 ms to move: round numbers for exact expectations."""

TAKES_ALL = AdmissionConfig(forecast=Mode.SHADOW)
"""No policy in force: what waits for room then waits with its attempt begun."""


def chain(token_ids: Sequence[int]) -> tuple[BlockHash, ...]:
    return tuple(BlockChain(root_hash(FINGERPRINT), BLOCK_SIZE).extend(token_ids))


def prompt(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(seed * 100_000 + i for i in range(num_tokens))


def info(name: str, **changes: object) -> NodeInfo:
    """The first letter is the role; the name may bring an epoch: "p0@2"."""
    node, _, epoch = name.partition("@")
    fields: dict[str, object] = {
        "node_id": NodeId(node),
        "epoch": Epoch(f"e{epoch or 1}"),
        "role": ROLES[node[0]],
        "address": f"{node}:1",
        "fingerprint": FINGERPRINT,
        "num_device_blocks": 1000,
        "num_dram_blocks": 0,
        "block_bytes": BLOCK_BYTES,
        "tokens_per_pass_max": 512,
        "sequences_max": 32,
    }
    return NodeInfo(**{**fields, **changes})  # type: ignore[arg-type]


def spec(
    name: str = "r",
    *,
    tokens: Sequence[int] = prompt(40),
    max_tokens: int = 8,
    deadline_s: float = 600.0,
    slo: Slo | None = None,
    stop_token_ids: tuple[int, ...] = (),
) -> RequestSpec:
    return RequestSpec(
        request_id=RequestId(name),
        token_ids=tuple(tokens),
        block_hashes=chain(tokens),
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids),
        front_end="fe",
        deadline_s=deadline_s,
        slo=slo or Slo(),
    )


class Play:
    """A machine and a clock. Every act returns its effects in words; `say` is for events of workers.

    Args:
        workers: names as in `info`; all have joined and sent an empty snapshot, long enough ago to be grown up.
    """

    def __init__(self, workers: str = "p0 d0", **config: object) -> None:
        settings = {"prior": PRIOR, "suspect_s": 1e6, "silent_s": 2e6, **config}
        self.machine = ConductorMachine(
            config=ConductorConfig(**settings),  # type: ignore[arg-type]
            layout=Layout(block_size=BLOCK_SIZE, block_bytes=BLOCK_BYTES),
            conductor_id="c",
            fingerprint=FINGERPRINT,
        )
        self.now_s = 0.0
        self.effects: list[Effect] = []
        for name in workers.split():
            self.join(name)
        self.now_s = 100.0

    # ---- the cluster ----

    def join(self, name: str, blocks: Iterable[BlockHash] = (), **changes: object) -> list[str]:
        node = info(name, **changes)
        words = self._heard(self.machine.on_node_joined(node, self.now_s))
        return words + self.say(name, self.snapshot(name, blocks, **changes))

    def snapshot(
        self, name: str, blocks: Iterable[BlockHash] = (), attempts: Sequence[AttemptId] = (), **changes: object
    ) -> Snapshot:
        copies = tuple(BlockCopy(block_hash=b, tier=Tier.DEVICE) for b in blocks)
        return Snapshot(info=info(name, **changes), last_event_id=0, blocks=copies, attempts=tuple(attempts))

    def say(self, name: str, event: WorkerEvent) -> list[str]:
        node = info(name)
        return self._heard(self.machine.on_worker_event(node.node_id, node.epoch, event, self.now_s))

    def lose(self, name: str, reason: str = "killed") -> list[str]:
        node = info(name)
        return self._heard(self.machine.on_node_lost(node.node_id, node.epoch, reason, self.now_s))

    def load(self, name: str, **fields: object) -> list[str]:
        return self.say(name, LoadReport(**fields))  # type: ignore[arg-type]

    # ---- the front end ----

    def request(self, request: RequestSpec) -> list[str]:
        return self._heard(self.machine.on_request(request, self.now_s))

    def resume(self, name: str, emitted: Sequence[int]) -> list[str]:
        return self._heard(self.machine.on_resume(RequestId(name), emitted, self.now_s))

    def cancel(self, name: str, reason: str = "client gone") -> list[str]:
        return self._heard(self.machine.on_cancel(RequestId(name), reason, self.now_s))

    def finished_stream(self, name: str, *, stopped: bool = False) -> list[str]:
        return self._heard(self.machine.on_stream_finished(RequestId(name), self.now_s, stopped=stopped))

    def tokens_lost(self, name: str) -> list[str]:
        node = info(name)
        return self._heard(self.machine.on_tokens_lost(node.node_id, node.epoch, self.now_s))

    def wait(self, seconds: float) -> list[str]:
        """Let time pass in one leap, and tick."""
        self.now_s += seconds
        return self._heard(self.machine.on_tick(self.now_s))

    # ---- what workers say of attempts ----

    def reserved(self, node: str, attempt: str) -> list[str]:
        return self.say(node, Reserved(attempt_id=attempt_of(attempt)))

    def refused(self, node: str, attempt: str, reason: RefusalReason = RefusalReason.NO_ROOM) -> list[str]:
        return self.say(node, Refused(attempt_id=attempt_of(attempt), reason=reason))

    def prefilled(self, node: str, attempt: str, token: int = 7, last: bool = False) -> list[str]:
        done = PrefillDone(
            attempt_id=attempt_of(attempt),
            first_token_id=token,
            stats=stats(node),
            finish_reason=FinishReason.STOP if last else None,
        )
        return self.say(node, done)

    def joined(self, node: str, attempt: str) -> list[str]:
        return self.say(node, DecodeJoined(attempt_id=attempt_of(attempt), stats=stats(node)))

    def ended(self, node: str, attempt: str, num_output_tokens: int = 8) -> list[str]:
        event = AttemptFinished(
            attempt_id=attempt_of(attempt),
            finish_reason=FinishReason.LENGTH,
            num_output_tokens=num_output_tokens,
            stats=stats(node),
        )
        return self.say(node, event)

    def failed(self, node: str, attempt: str, kind: FailureKind = FailureKind.ENGINE) -> list[str]:
        return self.say(node, AttemptFailed(attempt_id=attempt_of(attempt), kind=kind, message="oh"))

    def closed(self, node: str, attempt: str) -> list[str]:
        return self.say(node, Closed(attempt_id=attempt_of(attempt)))

    # ---- looking ----

    def counter(self, name: str) -> int:
        return self.machine.counters[name]

    def books_empty(self) -> bool:
        return all(node.books.empty for node in self.machine.status().nodes)

    def _heard(self, effects: list[Effect]) -> list[str]:
        self.effects = effects
        return [word(effect) for effect in effects]


def attempt_of(text: str) -> AttemptId:
    name, _, number = text.partition("#")
    return AttemptId(RequestId(name), int(number))


def stats(node: str) -> AttemptStats:
    return AttemptStats(node_id=info(node).node_id)


def word(effect: Effect) -> str:
    """An effect as a line of a transcript."""
    return f"{effect.node_id} <- {command_word(effect)}" if isinstance(effect, Send) else in_words(effect)


def command_word(send: Send) -> str:
    command = send.command
    match command:
        case PrefillCommand():
            here = " decode_here" if command.decode_here else ""
            fetches = "".join(
                f" fetch {f.first_block}+{f.num_blocks} from {f.source}@{f.source_epoch}" for f in command.fetches
            )
            tokens = f"{len(command.token_ids)}({command.num_prompt_tokens})"
            return f"prefill {command.attempt_id} {tokens}{here}{fetches}"
        case ReserveCommand():
            tokens = f"{len(command.token_ids)}({command.num_prompt_tokens})"
            return f"reserve {command.attempt_id} {tokens} from {command.source}@{command.source_epoch}"
        case StartCommand():
            return f"start {command.attempt_id} {command.first_token_id}"
        case CancelCommand():
            return f"cancel {command.attempt_id}: {command.reason}"
        case _:
            return type(command).__name__
