"""Pure: what the sink remembers of each pull and of each source."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from halfmoon.errors import TransferError
from halfmoon.types import Epoch, NodeId, Tier, TransferId
from kv_store import transfer_values as tv
from kv_store.transfer_values import SessionId
from kv_store.values import PullSpec

NO_LINK = tv.LinkTraits(name="", two_sided=False)


@dataclass(kw_only=True)
class PullState:
    spec: PullSpec
    started_s: float
    targets: dict[int, int]  # index -> this node's slot
    asked: bool = False
    granted: dict[int, tv.Grant] = field(default_factory=dict)  # not yet in a batch
    taken: set[int] = field(default_factory=set)  # in a batch, arrived, or missing
    arrived: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)
    in_flight: int = 0
    error: TransferError | None = None  # not None: ending
    abort_acked: bool = False
    abort_asked: bool = False  # the source waits for our Aborted
    abort_by_s: float = 0.0
    arrived_at_done: int | None = None
    busy_s: float = 0.0  # its share of the seconds in which its session moved bytes
    link: str = ""

    @property
    def deadline_s(self) -> float:
        return self.started_s + self.spec.deadline_s

    @property
    def complete(self) -> bool:
        return len(self.arrived) + len(self.missing) == len(self.targets)

    @property
    def due_s(self) -> float:
        """While it ends, its batches come down by their own timers; the abort's begins after the last of them."""
        if self.error is None:
            return self.deadline_s
        return math.inf if self.in_flight else self.abort_by_s

    def take_grants(self, num_max: int) -> list[tv.Grant]:
        """The first grants, in order, that share a tier: at most `num_max` of them."""
        first = next(iter(self.granted.values()))
        grants = [g for g in self.granted.values() if g.tier == first.tier][:num_max]
        for grant in grants:
            del self.granted[grant.index]
            self.taken.add(grant.index)
        return grants


@dataclass(kw_only=True)
class SinkSession:
    session: SessionId
    node_id: NodeId
    epoch: Epoch
    open: bool = False
    links: Mapping[Tier, tv.LinkTraits] = field(default_factory=dict)
    pulls: dict[TransferId, PullState] = field(default_factory=dict)
    ready: deque[TransferId] = field(default_factory=deque)  # pulls with grants that are in no batch yet
    num_batches: int = 0
    last_batch: int = 0
    batch_blocks: int  # what the next batch may hold
    group: int = 1
    heard_s: float = 0.0
    pinged_s: float = 0.0

    active: dict[TransferId, PullState] = field(default_factory=dict)  # pulls with a batch in flight
    shared_s: float = 0.0  # up to then the link's seconds are shared out

    due_s: float = math.inf  # no deadline is earlier, and no ping

    def share(self, now_s: float) -> None:
        """Share the time since the last call out among the pulls that had batches in flight: they had one link."""
        for pull in self.active.values():
            pull.busy_s += (now_s - self.shared_s) / len(self.active)
        self.shared_s = now_s

    def size_batches(self, num_blocks: int, took_s: float, *, s_max: float, blocks_max: int) -> None:
        """A batch came, `took_s` after it was posted: halve those to come if that was long, and double them again if it
        was short and the batch no small one."""
        if took_s > s_max:
            self.batch_blocks = max(1, min(self.batch_blocks, num_blocks) // 2)
        elif took_s < s_max / 2 and 2 * num_blocks > self.batch_blocks:
            self.batch_blocks = min(blocks_max, 2 * self.batch_blocks)

    def look_ahead(self, ping_interval_s: float) -> None:
        """Set `due_s` anew. Whoever makes an earlier deadline lowers it; signs of life only put it off."""
        dues = [p.due_s for p in self.pulls.values()]
        if self.open and dues:
            dues.append(self.pinged_s + ping_interval_s)
        self.due_s = min(dues, default=math.inf)


def overlap(pull: PullState) -> float:
    """The share of the pull's bytes that were here when the source had ended; all of them, if it never said so."""
    if not pull.targets:
        return 1.0
    at_done = len(pull.arrived) if pull.arrived_at_done is None else pull.arrived_at_done
    return at_done / len(pull.targets)
