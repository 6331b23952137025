"""Pure: what the conductor's machine and the workers say to each other, as frozen values.

Each class has a protobuf message of the same name and fields in proto/halfmoon/v1/worker.proto; service/codec.py
converts by name. Times are durations in seconds: clocks never cross processes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from halfmoon.blocks import Fingerprint
from halfmoon.types import AttemptId, BlockHash, Epoch, FinishReason, NodeId, Role, SamplingParams, Tier

# ---- who is there -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NodeInfo:
    """What a node says of itself when it joins. Address: "host:port" or "unix:path" of its gRPC server."""

    node_id: NodeId
    epoch: Epoch
    role: Role
    address: str
    fingerprint: Fingerprint
    num_device_blocks: int
    num_dram_blocks: int
    block_bytes: int
    tokens_per_pass_max: int
    sequences_max: int
    pid: int = 0


# ---- commands: conductor -> worker ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Attach:
    """First message of a control stream. A term lower than one already seen is refused."""

    conductor_id: str
    term: int


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Prefix blocks [first_block, first_block + num_blocks) are to be pulled from `source` before prefill."""

    source: NodeId
    source_epoch: Epoch
    source_address: str
    first_block: int
    num_blocks: int


@dataclass(frozen=True, kw_only=True)
class PrefillCommand:
    """Compute the prompt's KV and sample the token after it.

    Args:
        token_ids: prompt, and on a later attempt the tokens already emitted, in order.
        num_prompt_tokens: how many of them the client sent; the rest count against max_tokens.
        fetches: prefix blocks worth pulling instead of computing; missing ones are computed.
        decode_here: on a coupled worker: go on to decode, without a transfer.
        deadline_s: give up this long after receipt.
    """

    attempt_id: AttemptId
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    front_end: str
    deadline_s: float
    fetches: tuple[Fetch, ...] = ()
    decode_here: bool = False
    cache_salt: bytes = b""
    public_tokens: int = 0
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class ReserveCommand:
    """Hold room for this attempt and pull its blocks from `source` as they become ready there."""

    attempt_id: AttemptId
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    front_end: str
    source: NodeId
    source_epoch: Epoch
    source_address: str
    deadline_s: float
    cache_salt: bytes = b""
    public_tokens: int = 0
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class StartCommand:
    """The prefill worker's first token: decode from it once the blocks are here."""

    attempt_id: AttemptId
    first_token_id: int


@dataclass(frozen=True, kw_only=True)
class CancelCommand:
    """End this attempt here, in whatever phase; release everything. Unknown attempts are ignored and counted.

    Answered by `Closed`, exactly once, when the last of its blocks is released.
    """

    attempt_id: AttemptId
    reason: str


@dataclass(frozen=True, kw_only=True)
class SnapshotCommand:
    """Ask for a `Snapshot` (the conductor saw a gap in event ids)."""


@dataclass(frozen=True, kw_only=True)
class DrainCommand:
    """Take no new attempts; end the running ones normally. `undo`: take new ones again."""

    undo: bool = False


Command = Attach | PrefillCommand | ReserveCommand | StartCommand | CancelCommand | SnapshotCommand | DrainCommand


# ---- events: worker -> conductor -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttemptStats:
    """What one attempt did on one worker. Sums over a request's workers give its usage.

    hit_tokens_*: prompt tokens whose KV was found on this worker (by tier) or pulled for the prefix (remote).
    overlap: share of the pulled bytes that had arrived when the source said that its last chunk had ended.
    """

    node_id: NodeId
    queue_s: float = 0.0
    fetch_s: float = 0.0
    compute_s: float = 0.0
    pull_s: float = 0.0
    computed_tokens: int = 0
    hit_tokens_device: int = 0
    hit_tokens_dram: int = 0
    hit_tokens_remote: int = 0
    pulled_blocks: int = 0
    pulled_bytes: int = 0
    link: str = ""
    overlap: float = 0.0
    preemptions: int = 0
    decode_prefilled_tokens: int = 0


class BlockCopy(NamedTuple):
    block_hash: BlockHash
    tier: Tier


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything this worker holds, stamped with the id of the last event it includes. Sent on (re)connect."""

    info: NodeInfo
    last_event_id: int
    blocks: tuple[BlockCopy, ...]
    attempts: tuple[AttemptId, ...]


@dataclass(frozen=True, kw_only=True)
class KvEvents:
    """Blocks that appeared in or left a tier; ids are consecutive, one per message, per epoch.

    Removed applies before stored.
    """

    event_id: int
    stored: tuple[BlockCopy, ...] = ()
    removed: tuple[BlockCopy, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PassSample:
    """One engine pass, measured: for fitting costs.

    prefill: `new_tokens` prompt tokens over `context_tokens` earlier ones; decode: `batch` sequences over
    `kv_tokens` tokens of KV in all. `pairs`: (query, key) pairs that the prefill attends over, summed by prompt, for
    a pass may hold parts of several; 0: as if it were all of one prompt.
    """

    new_tokens: int
    context_tokens: int
    batch: int
    kv_tokens: int
    seconds: float
    pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class TransferSample:
    """One finished pull into this node.

    seconds: in which its bytes were under way, less what other pulls from the same source had of them; whatever the
    pull waited for its blocks to be computed is left out.
    """

    source: NodeId
    link: str
    num_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """State and samples since the last report; sent at least every `report_interval_s`, and it is the liveness sign.

    held_blocks: blocks of all tiers with at least one holder; 0 when nothing runs, or something leaks.
    invariant_checks: how often this incarnation's ledgers were found to conserve (a failed check ends the process).
    """

    queued_attempts: int = 0
    queued_tokens: int = 0
    running_sequences: int = 0
    kv_tokens: int = 0
    free_device_blocks: int = 0
    evictable_device_blocks: int = 0
    free_dram_blocks: int = 0
    draining: bool = False
    passes: tuple[PassSample, ...] = ()
    transfers: tuple[TransferSample, ...] = ()
    held_blocks: int = 0
    quarantined_blocks: int = 0
    invariant_checks: int = 0

    @property
    def room(self) -> int:
        """DEVICE blocks that could be given away now."""
        return self.free_device_blocks + self.evictable_device_blocks


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """Room is held at the decode worker and the pull has begun."""

    attempt_id: AttemptId
    hit_tokens: int = 0


class RefusalReason(enum.StrEnum):
    NO_ROOM = "no_room"
    DRAINING = "draining"
    TOO_LONG = "too_long"
    DUPLICATE = "duplicate"
    STALE = "stale"


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A prefill or reserve command that changed nothing here."""

    attempt_id: AttemptId
    reason: RefusalReason
    free_blocks: int = 0


@dataclass(frozen=True, kw_only=True)
class PrefillDone:
    """The first token has left for the client. `finish_reason`: it is also the last one."""

    attempt_id: AttemptId
    first_token_id: int
    stats: AttemptStats
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, kw_only=True)
class DecodeJoined:
    """All blocks are here and verified, and the first token is known: the sequence joins the next step."""

    attempt_id: AttemptId
    stats: AttemptStats


@dataclass(frozen=True, kw_only=True)
class AttemptFinished:
    """The last token of this attempt has left for the client."""

    attempt_id: AttemptId
    finish_reason: FinishReason
    num_output_tokens: int
    stats: AttemptStats


class FailureKind(enum.StrEnum):
    PEER_LOST = "peer_lost"
    TRANSFER = "transfer"
    INTEGRITY = "integrity"
    NO_ROOM = "no_room"
    DEADLINE = "deadline"
    ENGINE = "engine"


@dataclass(frozen=True, kw_only=True)
class AttemptFailed:
    """This attempt cannot go on here; everything it held is released or quarantined."""

    attempt_id: AttemptId
    kind: FailureKind
    message: str


@dataclass(frozen=True, kw_only=True)
class Closed:
    """The answer to CancelCommand."""

    attempt_id: AttemptId


WorkerEvent = (
    Snapshot
    | KvEvents
    | LoadReport
    | Reserved
    | Refused
    | PrefillDone
    | DecodeJoined
    | AttemptFinished
    | AttemptFailed
    | Closed
)


# ---- tokens: worker -> front end -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    token_id: int
    logprob: float


class Token(NamedTuple):
    """One emitted token. `index` counts the request's output tokens over all attempts, from 0.

    `stats` rides on the first token of a prefill worker and on the last token of a decode worker.
    """

    attempt_id: AttemptId
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    token_id: int
    logprob: float = 0.0
    top_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stats: AttemptStats | None = None


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """All tokens of one step for one front end, in one message."""

    tokens: tuple[Token, ...] = field(default_factory=tuple)
