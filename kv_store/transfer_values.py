"""Pure: what the two ends of a transfer say to each other, what they ask of their shells, and their limits.

The sink (who wants blocks) dials the source; one stream serves all pulls of that directed pair. Messages of one stream
arrive in order or, with the stream, not at all. Only durations cross it, never clock readings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, NewType, Protocol

from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, Tier, TransferId
from kv_store.values import Place, PullEnded

SessionId = NewType("SessionId", int)
"""One stream between this node and a peer, in one direction of pulling; never reused."""


@dataclass(frozen=True, kw_only=True)
class TransferLimits:
    """Bounds on everything that a peer, or load, can make grow. Durations in seconds.

    Args:
        pulls_max: pulls into this node; a decode worker holds one per sequence that it waits for.
        serves_max: pulls out of this node; each may pin many blocks.
        wants_max: blocks of one pull: 256 k tokens in blocks of 16.
        sessions_max: streams in each direction; a stream costs a socket and one or two threads.
        batch_bytes_max: bytes posted under one GO credit: some 10 ms of any link, so that pulls share it; a process
            group stalls at a batch's border, and smaller ones cost up to half of its speed (benchmarks/links.py).
        batches_per_session_max: GO credits of one pair: one batch moves while the next one's credit travels.
        batches_max: GO credits of this node: what its memory bandwidth can serve.
        batch_s_max: a batch that took longer, its wait in line included, halves the pair's later ones, down to a block
            each. So on a slow or full link pulls share it, no line grows long, and an abort is answered soon.
        hash_blocks_max: blocks whose checksums are computed before they are granted together.
        abort_timeout_s: an abort that is not acknowledged so long after the last batch in flight came down ends the
            stream (and with it the link).
        link_timeout_s: a link on which no piece of a batch moves for so long is taken for stuck. It counts from the
            last piece, never from the asking: waiting behind others is no fault.
        hold_s: a prompt that was handed over, and of which no puller acknowledges a block for so long, is withdrawn.
        ping_interval_s, silence_s_max: liveness beside the link, while anything is in flight.
        grace_s: the source lets the sink's deadline strike first.
        ended_max: attempts remembered after their withdrawal, so that a late pull ends at once.
    """

    pulls_max: int = 256
    serves_max: int = 1024
    wants_max: int = 16_384
    sessions_max: int = 64
    batch_bytes_max: int = 32 << 20
    batches_per_session_max: int = 2
    batches_max: int = 8
    batch_s_max: float = 1.0
    hash_blocks_max: int = 16
    abort_timeout_s: float = 1.0
    link_timeout_s: float = 5.0
    hold_s: float = 30.0
    ping_interval_s: float = 0.5
    silence_s_max: float = 5.0
    grace_s: float = 1.0
    ended_max: int = 4096


# ---- messages: sink -> source --------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """One block asked for; `block_hash` None: the partial tail of the attempt."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    block_hash: BlockHash | None
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Pull:
    transfer_id: TransferId
    attempt_id: AttemptId
    wants: tuple[Wanted, ...]
    wait: bool
    verify: bool
    deadline_s: float


@dataclass(frozen=True, kw_only=True)
class Go:
    """Two-sided links: the receives of these blocks are posted, in this order, on this group of the pair."""

    transfer_id: TransferId
    batch: int
    group: int
    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Ack:
    """These blocks are here and verified: the source may unpin them."""

    transfer_id: TransferId
    indices: tuple[int, ...]


# ---- messages: source -> sink --------------------------------------------------------------------------------------


class Grant(NamedTuple):
    """Permission to read one slot.

    Args:
        stamp: what the slot's header says while the slot is granted; it names this granting and is never used again.
        checksum: xxh3-64 of the slot's bytes; None: the sink did not ask for verification.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    tier: Tier
    slot: int
    stamp: int
    checksum: int | None
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Granted:
    transfer_id: TransferId
    grants: tuple[Grant, ...]


@dataclass(frozen=True, kw_only=True)
class Missing:
    """These blocks are not here and will not come."""

    transfer_id: TransferId
    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SourceDone:
    """The source's last chunk has ended: what is not granted yet is being granted now, or is missing."""

    transfer_id: TransferId


# ---- messages: both ways -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Abort:
    """The sender has given this transfer up. Answered by Aborted when nothing of it is in flight at the receiver."""

    transfer_id: TransferId
    reason: str


@dataclass(frozen=True, kw_only=True)
class Aborted:
    transfer_id: TransferId


@dataclass(frozen=True, kw_only=True)
class Ping:
    """Answered by Pong; both count as a sign of life."""


@dataclass(frozen=True, kw_only=True)
class Pong:
    pass


Message = Pull | Go | Ack | Granted | Missing | SourceDone | Abort | Aborted | Ping | Pong


# ---- what a batch is -----------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """One block of a batch: the source's slot, and at the sink also the slot that it goes to."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    slot: int
    stamp: int
    checksum: int | None
    target: int = -1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Blocks of one transfer and one tier of the source, moved under one GO credit.

    Args:
        group: the number of the pair's process group; the sink raises it after any error.
    """

    batch: int
    transfer_id: TransferId
    tier: Tier
    group: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class LinkTraits:
    """two_sided: the source must post sends (so batches need a Go)."""

    name: str
    two_sided: bool


# ---- effects -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dial:
    """Open a stream to the source. Answered by on_open or on_lost."""

    session: SessionId
    node_id: NodeId
    epoch: Epoch
    address: str


@dataclass(frozen=True, kw_only=True)
class Hangup:
    """Close the stream and destroy its link. The machine has forgotten the session but for its running jobs."""

    session: SessionId
    reason: str


@dataclass(frozen=True, kw_only=True)
class Tell:
    session: SessionId
    message: Message


@dataclass(frozen=True, kw_only=True)
class Receive:
    """Bring a batch into its target slots, within timeout_s, and never stall_s without a piece of it. Answered by
    on_received, always."""

    session: SessionId
    batch: Batch
    timeout_s: float
    stall_s: float


@dataclass(frozen=True, kw_only=True)
class Transmit:
    """Post the sends of a batch, within timeout_s, and never stall_s without a piece of it. Answered by
    on_transmitted, always."""

    session: SessionId
    batch: Batch
    timeout_s: float
    stall_s: float


@dataclass(frozen=True, kw_only=True)
class Hash:
    """Compute checksums of (index, tier, slot). Answered by on_hashed, always."""

    session: SessionId
    transfer_id: TransferId
    items: tuple[tuple[int, Tier, int], ...]


class Stamp(NamedTuple):
    """Write a slot's header, at once: 0 revokes. Performed before anybody else may write the slot."""

    tier: Tier
    slot: int
    stamp: int


@dataclass(frozen=True, kw_only=True)
class Arrived:
    transfer_id: TransferId
    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """busy_s: while at least one batch of the pull was in flight, less what other pulls from the same source had of
    that time: what its bytes cost the link. A wait for blocks that are not computed yet is no part of it."""

    ended: PullEnded
    source: NodeId
    busy_s: float


@dataclass(frozen=True, kw_only=True)
class HandedOver:
    attempt_id: AttemptId


@dataclass(frozen=True, kw_only=True)
class Withdrawn:
    """No peer can read this attempt's slots any more: as was asked, or because none went on reading for `hold_s`."""

    attempt_id: AttemptId


Effect = Dial | Hangup | Tell | Receive | Transmit | Hash | Stamp | Arrived | Ended | HandedOver | Withdrawn


class CopyPins(Protocol):
    """What a source needs of its cache: see kv_store.tiers.KvCache."""

    def pin_copy(self, block_hash: BlockHash, holder: str) -> Place | None: ...

    def unpin_copy(self, place: Place, holder: str) -> None: ...
