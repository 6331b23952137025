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

    def look_ahead(self, ping_interval_s: float) -> None:
        """Set `due_s` anew. Whoever makes an earlier deadline lowers it; signs of life only put it off."""
        dues = [p.deadline_s if p.error is None else p.abort_by_s for p in self.pulls.values()]
        if self.open and dues:
            dues.append(self.pinged_s + ping_interval_s)
        self.due_s = min(dues, default=math.inf)


def overlap(pull: PullState) -> float:
    """The share of the pull's bytes that were here when the source had ended; all of them, if it never said so."""
    if not pull.targets:
        return 1.0
    at_done = len(pull.arrived) if pull.arrived_at_done is None else pull.arrived_at_done
    return at_done / len(pull.targets)
