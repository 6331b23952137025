"""Pure: the moves that a node's tiers have decided and the shell has not yet done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from halfmoon.types import BlockHash, Tier
from kv_store.values import Move


class Cargo(NamedTuple):
    """What a move carries: a block's name, its parent's, and its place in the chain.

    No name: a private block, such as a partial tail.
    """

    name: BlockHash | None
    parent: BlockHash | None
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants here


class MoveBook:
    """Outstanding moves, by themselves, by target and by the name of what they carry.

    Bounded by the slots: a slot is the target of one move at most.
    """

    def __init__(self) -> None:
        self._out: dict[Move, Cargo] = {}
        self._by_target: dict[tuple[Tier, int], Move] = {}
        self._arriving: dict[tuple[Tier, BlockHash], int] = {}
        self._untaken: list[Move] = []

    def start(self, move: Move, cargo: Cargo) -> None:
        key = (move.target.tier, move.target.slot)
        assert key not in self._by_target, f"two moves into {key}"
        self._out[move] = cargo
        self._by_target[key] = move
        if cargo.name is not None:
            self._arriving.setdefault((move.target.tier, cargo.name), move.target.slot)
        self._untaken.append(move)

    def finish(self, move: Move) -> Cargo:
        """Raises ValueError for a move that is not out."""
        if move not in self._out:
            raise ValueError(f"{move} is not outstanding")
        cargo = self._out.pop(move)
        target = move.target
        del self._by_target[target.tier, target.slot]
        if cargo.name is not None and self._arriving.get((target.tier, cargo.name)) == target.slot:
            del self._arriving[target.tier, cargo.name]
        return cargo

    def into(self, tier: Tier, slot: int) -> Move | None:
        """The outstanding move that fills this slot."""
        return self._by_target.get((tier, slot))

    def arriving(self, tier: Tier, name: BlockHash | None) -> int | None:
        """A slot of `tier` that a move is filling with this block."""
        return None if name is None else self._arriving.get((tier, name))

    def take(self) -> list[Move]:
        """The moves started since the last call, in order."""
        taken, self._untaken = self._untaken, []
        return taken

    def __iter__(self) -> Iterator[Move]:
        return iter(self._out)

    def __contains__(self, move: object) -> bool:
        return move in self._out
