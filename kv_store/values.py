"""Pure: the values that ledgers, transfers and worker machines hand each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from halfmoon.errors import TransferError
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, Tier, TransferId


class Place(NamedTuple):
    """A slot of one tier, and the generation of its content: it rises each time the slot is given away."""

    tier: Tier
    slot: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class Move:
    """Copy one block's bytes between tiers of this node. Both ends are held until `on_moved`.

    `num_tokens` is below the block size for a parked sequence's partial tail (the whole slot is copied all the same).
    """

    source: Place
    target: Place


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A sequence's block table and where its first blocks came from.

    Args:
        slots: DEVICE slots, one per block, in order; the first `len(hits)` hold ready content
            (those in `loading` once their move is done), the rest are empty and owned by the sequence.
        hits: the tier in which each block of the reusable prefix was found.
        loading: indices below len(hits) whose bytes are still moving DRAM -> DEVICE.
    """

    slots: tuple[int, ...]
    hits: tuple[Tier, ...]
    loading: frozenset[int]


class Want(NamedTuple):
    """One block that a pull asks for.

    Args:
        index: the block's index in its sequence.
        block_hash: its name; None for a partial tail, which is known by (attempt, index) alone.
        num_tokens: tokens that must be valid in it.
        slot: this node's DEVICE slot for it: owned by the puller, not visible until it commits it.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    block_hash: BlockHash | None
    num_tokens: int
    slot: int


@dataclass(frozen=True, kw_only=True)
class PullSpec:
    """Bring `wants` here from `source`.

    Args:
        wait: True: blocks that the source does not hold yet are granted when they become ready (decode pulls while
            prefill runs). False: a block missing now is reported missing at once (prefix fetch).
        deadline_s: seconds from the start after which the pull ends with what arrived.
    """

    transfer_id: TransferId
    attempt_id: AttemptId
    source: NodeId
    source_epoch: Epoch
    source_address: str
    wants: tuple[Want, ...]
    wait: bool
    deadline_s: float


@dataclass(frozen=True, kw_only=True)
class PullEnded:
    """The pull is quiescent: no byte of it will be written to any of its slots any more. Exactly one per pull.

    Args:
        missing: indices that did not arrive (evicted at the source, refused, failed); empty on success.
        error: why, unless the source merely did not have them.
        overlap: share of all the pull's bytes that were here when the source said that its last chunk had ended.
    """

    transfer_id: TransferId
    attempt_id: AttemptId
    missing: tuple[int, ...]
    error: TransferError | None
    num_bytes: int
    seconds: float
    link: str
    overlap: float
