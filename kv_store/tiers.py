"""Pure: one node's KV cache over its tiers: block tables, hits, evictions, parking, all as ledger entries and Moves.

It never moves bytes: it returns `Move`s through `take_moves`; the shell performs them in order and reports `on_moved`.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.messages import BlockCopy, KvEvents
from halfmoon.types import AttemptId, BlockHash, Tier
from kv_store.values import Move, Opened, Place


class KvCache:
    """DEVICE and DRAM ledgers of one node, and the sequences that hold their slots. (SSD: another sitting.)

    Args:
        num_device_slots, num_dram_slots: 0 DRAM slots: evicted blocks are dropped, parking is impossible.
        block_size: tokens.

    A slot is in exactly one state: free, filling, ready, pinned (ready and held), evicting, quarantined.
    Conservation: the states' counts add up to the total; a slot's pins equal its holders.
    """

    def __init__(self, *, num_device_slots: int, num_dram_slots: int, block_size: int) -> None:
        raise NotImplementedError

    # ---- questions (change nothing, renew nothing) ----

    def match(self, hashes: Sequence[BlockHash]) -> tuple[Tier, ...]:
        """The tier of each block of the longest hole-free prefix of `hashes` that this node holds ready."""
        raise NotImplementedError

    def counts(self, tier: Tier) -> dict[str, int]:
        """Slots by state name."""
        raise NotImplementedError

    def available(self, tier: Tier) -> int:
        """Slots that an allocation could get now or after pending moves: free + evictable + evicting."""
        raise NotImplementedError

    def snapshot(self) -> tuple[BlockCopy, ...]:
        raise NotImplementedError

    # ---- sequences ----

    def open(
        self,
        owner: AttemptId,
        hashes: Sequence[BlockHash],
        num_blocks: int,
        now_s: float,
        *,
        use_hits: int | None = None,
    ) -> Opened | None:
        """Give `owner` a table of `num_blocks` DEVICE slots; the prefix found in `hashes` is pinned or loaded.

        Args:
            use_hits: reuse at most this many prefix blocks (a wholly cached prompt must recompute its last token,
                so the caller passes (num_tokens - 1) // block_size); the rest of the slots are private.

        Returns:
            None when there is no room *yet*: nothing is held, but evictions may have been started; ask again after
            `on_moved` or a `close`.

        Raises:
            ValueError: if num_blocks exceeds the tier, or owner is open already (a caller's bug).
        """
        raise NotImplementedError

    def grow(self, owner: AttemptId, now_s: float) -> int | None:
        """One more slot at the end of the owner's table; None when there is no room yet (see `open`)."""
        raise NotImplementedError

    def slots(self, owner: AttemptId) -> tuple[int, ...]:
        raise NotImplementedError

    def commit(self, owner: AttemptId, index: int, block_hash: BlockHash, now_s: float) -> None:
        """The owner's block `index` is full and right: make it visible under its name, still held by the owner.

        If the name is ready in another slot already, this slot stays private and is freed with its owner.
        """
        raise NotImplementedError

    def close(self, owner: AttemptId, now_s: float) -> None:
        """Release everything the owner holds: named blocks stay reusable, private slots are freed.

        Slots that still take part in a move are freed when it is done. Unknown owners: ValueError.
        """
        raise NotImplementedError

    def quarantine(self, owner: AttemptId) -> None:
        """A peer may still write or read the owner's slots: until `close`, none of its private slots is reusable
        and all are counted as quarantined."""
        raise NotImplementedError

    def park(self, owner: AttemptId, num_blocks: int, now_s: float) -> bool:
        """Preempt: move the owner's first `num_blocks` blocks (the rest are freed) to DRAM, and hold them there.

        False: DRAM has no room for it; nothing changed. Blocks that DRAM holds already are not moved again.
        """
        raise NotImplementedError

    def unpark(self, owner: AttemptId, now_s: float) -> Opened | None:
        """Bring a parked owner back to DEVICE (`loading` says what is still moving); None: no room yet."""
        raise NotImplementedError

    # ---- peers reading from here ----

    def pin_copy(self, block_hash: BlockHash, holder: str) -> Place | None:
        """Hold the fastest ready copy of a block for a grant; None when it is not here. Renews nothing."""
        raise NotImplementedError

    def unpin_copy(self, place: Place, holder: str) -> None:
        raise NotImplementedError

    # ---- shell ----

    def take_moves(self) -> list[Move]:
        """Moves decided since the last call, to be performed in this order."""
        raise NotImplementedError

    def on_moved(self, moves: Sequence[Move], now_s: float) -> None:
        raise NotImplementedError

    def take_events(self) -> KvEvents | None:
        """What appeared and left since the last call, under the next consecutive id; None when nothing did."""
        raise NotImplementedError

    @property
    def last_event_id(self) -> int:
        raise NotImplementedError

    def check_invariants(self) -> None:
        """Assert conservation and that pins equal holders. Cheap enough for every simulated event."""
        raise NotImplementedError
