"""Pure: what the source remembers of each pull out of it and of each sink."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from halfmoon.types import Epoch, NodeId, Tier, TransferId
from kv_store import transfer_values as tv
from kv_store.transfer_values import SessionId
from kv_store.values import Place

ServeKey = tuple[SessionId, TransferId]


@dataclass(kw_only=True)
class Held:
    """One block of one pull that this node has pinned. `place` None: the attempt's tail, held by the attempt."""

    tier: Tier
    slot: int
    stamp: int
    place: Place | None
    checksum: int | None = None
    granted: bool = False
    hashing: bool = False
    sending: int = 0
    acked: bool = False


@dataclass(kw_only=True)
class Serve:
    """One pull out of this node."""

    session: SessionId
    pull: tv.Pull
    deadline_s: float
    open_wants: dict[int, tv.Wanted]  # neither held nor missing yet
    held: dict[int, Held] = field(default_factory=dict)
    done_told: bool = False
    ending: bool = False
    released: bool = False  # the sink reads nothing any more: acknowledged, or its stream is gone
    abort_asked: bool = False  # the sink waits for our Aborted
    abort_by_s: float = 0.0

    @cached_property
    def key(self) -> ServeKey:
        return self.session, self.pull.transfer_id

    @cached_property
    def holder(self) -> str:
        """Its name in the cache's books, where it stands beside every block that it holds."""
        return f"{self.pull.transfer_id}@{self.session}"

    @property
    def complete(self) -> bool:
        """The sink has everything that it asked for, but for what is missing."""
        return not self.ending and not self.open_wants and not self.held

    @property
    def read(self) -> bool:
        """The sink may have a batch of it in flight, and answers an abort when that has come down."""
        return any(h.granted and not h.acked for h in self.held.values())

    def send(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.held[index].sending += 1

    def sent(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.held[index].sending -= 1

    def acknowledge(self, indices: Iterable[int]) -> list[int]:
        """The sink has these. Returns those that were granted."""
        known = [i for i in indices if i in self.held and self.held[i].granted]
        for index in known:
            self.held[index].acked = True
        return known

    @property
    def busy(self) -> bool:
        return any(h.hashing or h.sending for h in self.held.values())


@dataclass(kw_only=True)
class SourceSession:
    """The stream of one node that pulls from here."""

    session: SessionId
    node_id: NodeId
    epoch: Epoch
    heard_s: float
    serves: dict[TransferId, Serve] = field(default_factory=dict)
    num_sending: int = 0

    def due_s(self, silence_s_max: float) -> float:
        """The earliest deadline. Whoever makes an earlier one says so; signs of life only put it off."""
        dues = [s.abort_by_s if s.ending else s.deadline_s for s in self.serves.values()]
        return min([*dues, self.heard_s + silence_s_max]) if dues else math.inf
