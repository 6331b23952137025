"""Pure: what every arena offers: the bytes of one tier, in equal slots."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from halfmoon.types import Tier
from kv_store.wire import ArenaAddress

Bytes = npt.NDArray[np.uint8]


class Arena(Protocol):
    """The bytes of one tier. Bookkeeping is the ledger's; an arena knows slots and stamps only.

    device: "cpu", or torch's name of a GPU. There are two kinds: a `SharedArena` lies in host memory and lends views of
    its slots, a `TensorArena` is reached by copies.
    """

    tier: Tier
    num_slots: int
    block_bytes: int
    device: str

    @property
    def address(self) -> ArenaAddress: ...

    def bytes_of(self, index: int) -> Bytes:
        """One slot in host memory, [block_bytes]: a view where the arena lies there, else a copy, complete on return.

        Checksums are always taken over this.
        """
        ...

    def copy_in(self, index: int, data: Bytes) -> None:
        """Fill one slot from host memory. On return the bytes are there and `data` may change."""
        ...

    def copy_out(self, index: int, data: Bytes) -> None:
        """Fill `data`, host memory, from one slot. On return the bytes are there."""
        ...

    def stamp(self, index: int, stamp: int) -> None: ...

    def stamp_of(self, index: int) -> int: ...

    def close(self) -> None: ...
