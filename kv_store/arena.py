"""Pure: what every arena offers: the bytes of one tier, in equal slots."""

from __future__ import annotations

from typing import Protocol

from halfmoon.types import Tier
from kv_store.wire import ArenaAddress


class Arena(Protocol):
    """The bytes of one tier. Bookkeeping is the ledger's; an arena knows slots and stamps only.

    device: "cpu", or torch's name of a device. Arenas on "cpu" are `SharedArena`s and offer `buffer` and `slot`.
    """

    tier: Tier
    num_slots: int
    block_bytes: int
    device: str

    @property
    def address(self) -> ArenaAddress: ...

    def stamp(self, index: int, stamp: int) -> None: ...

    def stamp_of(self, index: int) -> int: ...

    def close(self) -> None: ...
