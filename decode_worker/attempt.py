"""Pure: one sequence on a decode worker."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from core.messages import AttemptStats
from halfmoon.types import NodeId, Tier
from kv_store.values import PullEnded
from node.attempts import Attempt, Peer


class Phase(enum.Enum):
    """Where a sequence's blocks are."""

    WAITING = enum.auto()  # for room: holds nothing yet, and may still be refused
    PULLING = enum.auto()  # its table is held, a peer fills it
    HERE = enum.auto()  # all its blocks are in DEVICE, or on their way there from DRAM
    PARKED = enum.auto()  # preempted: in DRAM


@dataclass(kw_only=True, eq=False)
class DecodeAttempt(Attempt):
    """One sequence: reserved, pulled, joined, decoded; parked and resumed in between.

    Attributes:
        source: where its blocks are pulled from; None: it was prefilled here.
        wait_until_s: refused if it is still WAITING then.
        first_token_id: from the prefill worker; None: not known yet.
        joined: it has all blocks and the first token, and has been reported as such.
        hits: the tier in which each block of the prefix was found here.
        arrived: indices of pulled blocks that are here.
        pull: how the pull ended.
        prefilled_tokens: given tokens whose positions a step here computed. A bug, if it is not 0.
    """

    phase: Phase
    source: Peer | None = None
    wait_until_s: float = 0.0
    first_token_id: int | None = None
    joined: bool = False
    hits: tuple[Tier, ...] = ()
    arrived: set[int] = field(default_factory=set)
    pull: PullEnded | None = None
    opened_s: float = 0.0
    preemptions: int = 0
    prefilled_tokens: int = 0

    @property
    def quiet(self) -> bool:
        """Wholly in DEVICE, and nothing reads or writes there: it can be run, or parked."""
        return self.phase is Phase.HERE and not (self.loading or self.in_pass or self.ending)

    @property
    def runnable(self) -> bool:
        """Joined and quiet: written out, since every attempt is asked before every step."""
        return self.joined and self.phase is Phase.HERE and not (self.loading or self.in_pass or self.ending)

    @property
    def on_device(self) -> bool:
        return self.phase in (Phase.PULLING, Phase.HERE)

    @property
    def to_pull(self) -> range:
        """Indices of the blocks that were not found here; the last one always among them (see Room.admit)."""
        return range(len(self.hits), self.sequence.blocks(self.sequence.num_given_tokens))

    @property
    def num_blocks_used(self) -> int:
        """Blocks with something in them."""
        return self.sequence.blocks(self.sequence.num_computed_tokens)

    @property
    def num_blocks_resuming(self) -> int:
        """Blocks that a parked sequence needs to go on: its own, and the next position's."""
        return self.sequence.blocks(self.sequence.num_computed_tokens + 1)

    def count_computed(self, start: int, num_tokens: int) -> None:
        """Steps have computed these positions. Those of the given tokens were another worker's to compute."""
        self.computed_tokens += num_tokens
        if start < self.sequence.num_given_tokens:
            self.prefilled_tokens += min(num_tokens, self.sequence.num_given_tokens - start)

    def stats(self, node_id: NodeId) -> AttemptStats:
        """What it took so far."""
        size = self.sequence.block_size
        return AttemptStats(
            node_id=node_id,
            queue_s=self.opened_s - self.received_s,
            compute_s=self.compute_s,
            pull_s=self.pull.seconds if self.pull else 0.0,
            computed_tokens=self.computed_tokens,
            hit_tokens_device=self.hits.count(Tier.DEVICE) * size,
            hit_tokens_dram=self.hits.count(Tier.DRAM) * size,
            pulled_blocks=len(self.arrived),
            pulled_bytes=self.pull.num_bytes if self.pull else 0,
            link=self.pull.link if self.pull else "",
            overlap=self.pull.overlap if self.pull else 0.0,
            preemptions=self.preemptions,
            decode_prefilled_tokens=self.prefilled_tokens,
        )
