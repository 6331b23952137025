"""Pure: one prompt on a prefill worker."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.messages import AttemptStats, Fetch
from halfmoon.types import NodeId, Tier
from node.attempts import Attempt


@dataclass(kw_only=True, eq=False)
class PrefillAttempt(Attempt):
    """One prompt: its prefix, and how far it has come.

    Attributes:
        stays: it is decoded on this node, without a transfer.
        hits: the tier in which each block of the prefix was found here.
        num_blocks_known: prefix blocks that are here, or on their way from DRAM, and need no computing.
        arrived: indices of pulled blocks that are here.
        ready_s: when the last byte that was waited for had come; None: not yet.
        held: handed over; its blocks wait to be acknowledged.
    """

    stays: bool
    fetches: tuple[Fetch, ...]
    hits: tuple[Tier, ...] = ()
    num_blocks_known: int = 0
    arrived: set[int] = field(default_factory=set)
    opened_s: float = 0.0
    ready_s: float | None = None
    held: bool = False

    @property
    def computable(self) -> bool:
        """All bytes that were waited for are here, and there is more to compute."""
        return self.ready_s is not None and not self.held

    @property
    def blocks_needed_max(self) -> int:
        """A prompt that stays must fit with its longest output, or it could get stuck half way."""
        return self.sequence.blocks_max if self.stays else self.sequence.blocks(self.sequence.num_given_tokens)

    def stats(self, node_id: NodeId) -> AttemptStats:
        """What its prefill took. Only once it has computed."""
        assert self.ready_s is not None
        size = self.sequence.block_size
        return AttemptStats(
            node_id=node_id,
            queue_s=self.opened_s - self.received_s,
            fetch_s=self.ready_s - self.opened_s,
            compute_s=self.compute_s,
            computed_tokens=self.computed_tokens,
            hit_tokens_device=self.hits.count(Tier.DEVICE) * size,
            hit_tokens_dram=self.hits.count(Tier.DRAM) * size,
            hit_tokens_remote=(self.num_blocks_known - len(self.hits)) * size,
        )
