"""Pure: the source's book of slots: which are granted under which stamp, known checksums, and who waits for which name.

A slot that several pulls hold has one stamp. It is zeroed when the last of them lets go, before the pin is released:
whoever gets the slot next finds no reader that could still accept its bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from halfmoon.types import BlockHash, Tier
from kv_store import transfer_values as tv
from kv_store.transfer_serves import Held, Serve, ServeKey
from kv_store.transfer_values import CopyPins
from kv_store.values import Place


class GrantBook:
    """Modifies the serves that it is given: their `open_wants` and `held`."""

    def __init__(self, *, pins: CopyPins, emit: Callable[[tv.Effect], None]) -> None:
        self._pins = pins
        self._emit = emit
        self._waiting: dict[BlockHash, dict[ServeKey, int]] = {}
        self._stamps: dict[tuple[Tier, int], tuple[int, int]] = {}  # granted slot -> (stamp, number of grants)
        self._last_stamp = 0
        self._checksums: dict[tuple[Tier, int], tuple[int, int]] = {}  # slot -> (generation, checksum)

    # ---- waiting ----

    def await_all(self, serve: Serve) -> None:
        """Every open want is waited for by its name."""
        for want in serve.open_wants.values():
            if want.block_hash is not None:
                self._waiting.setdefault(want.block_hash, {})[serve.key] = want.index

    def waiting_for(self, hashes: Iterable[BlockHash]) -> dict[ServeKey, list[int]]:
        found: dict[ServeKey, list[int]] = {}
        for block_hash in hashes:
            for key, index in self._waiting.get(block_hash, {}).items():
                found.setdefault(key, []).append(index)
        return found

    def forget_want(self, serve: Serve, index: int) -> None:
        want = serve.open_wants.pop(index)
        if want.block_hash is not None:
            keys = self._waiting[want.block_hash]
            del keys[serve.key]
            if not keys:
                del self._waiting[want.block_hash]

    # ---- holding ----

    def pin(self, serve: Serve, want: tv.Wanted) -> bool:
        """Hold a ready copy of the block for this pull; False when there is none."""
        place = None if want.block_hash is None else self._pins.pin_copy(want.block_hash, serve.holder)
        if place is None:
            return False
        self._hold(serve, want.index, place.tier, place.slot, place)
        return True

    def hold_tail(self, serve: Serve, want: tv.Wanted, slot: int) -> None:
        """Hold a slot that belongs to the attempt itself."""
        self._hold(serve, want.index, Tier.DEVICE, slot, None)

    def _hold(self, serve: Serve, index: int, tier: Tier, slot: int, place: Place | None) -> None:
        stamp, count = self._stamps.get((tier, slot), (0, 0))
        if count == 0:
            self._last_stamp += 1
            stamp = self._last_stamp
            self._emit(tv.Stamp(tier, slot, stamp))
        self._stamps[tier, slot] = (stamp, count + 1)
        serve.held[index] = Held(tier=tier, slot=slot, stamp=stamp, place=place)
        self.forget_want(serve, index)

    def release(self, serve: Serve, index: int) -> None:
        """Let one held block go: the header first, the pin after it."""
        held = serve.held.pop(index)
        assert not held.hashing
        assert not held.sending
        stamp, count = self._stamps.pop((held.tier, held.slot))
        if count > 1:
            self._stamps[held.tier, held.slot] = (stamp, count - 1)
        else:
            self._emit(tv.Stamp(held.tier, held.slot, 0))
        if held.place is not None:
            self._pins.unpin_copy(held.place, serve.holder)

    # ---- checksums ----

    def recall_checksum(self, held: Held) -> bool:
        """Fill in the checksum if this content of the slot was hashed before. Tails have no generation: never."""
        generation, checksum = self._checksums.get((held.tier, held.slot), (None, None))
        if held.place is None or generation != held.place.generation:
            return False
        held.checksum = checksum
        return True

    def remember_checksums(self, serve: Serve, checksums: Mapping[int, int]) -> None:
        """One entry per slot of the arenas at most."""
        for index, checksum in checksums.items():
            held = serve.held[index]
            held.hashing, held.checksum = False, checksum
            if held.place is not None:
                self._checksums[held.tier, held.slot] = (held.place.generation, checksum)

    # ---- state ----

    @property
    def num_grants(self) -> int:
        return sum(count for _, count in self._stamps.values())

    def check_invariants(self, serves: Iterable[Serve]) -> None:
        """Stamps equal holders, and exactly the open wants are waited for."""
        serves = list(serves)
        grants = Counter((h.tier, h.slot) for s in serves for h in s.held.values())
        assert grants == {slot: count for slot, (_, count) in self._stamps.items()}
        waiting = {(h, key) for h, keys in self._waiting.items() for key in keys}
        assert waiting == {(w.block_hash, s.key) for s in serves for w in s.open_wants.values() if w.block_hash}
