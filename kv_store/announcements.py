"""Pure: what became visible in a node's tiers and what left, folded into numbered events."""

from __future__ import annotations

from core.messages import BlockCopy, KvEvents
from halfmoon.types import BlockHash, Tier


class Announcements:
    """Net changes since the last event. A copy that came and went in between is not mentioned.

    Bounded by twice the slots: one entry per copy that is here or was here at the last event.
    """

    def __init__(self) -> None:
        self.last_event_id = 0
        self._changes: dict[BlockCopy, bool] = {}  # True: stored, False: removed

    def stored(self, tier: Tier, name: BlockHash) -> None:
        self._change(BlockCopy(name, tier), True)

    def removed(self, tier: Tier, name: BlockHash) -> None:
        self._change(BlockCopy(name, tier), False)

    def take(self) -> KvEvents | None:
        """The next event, or None when nothing changed."""
        if not self._changes:
            return None
        changes, self._changes = self._changes, {}
        self.last_event_id += 1
        return KvEvents(
            event_id=self.last_event_id,
            stored=tuple(copy for copy, is_here in changes.items() if is_here),
            removed=tuple(copy for copy, is_here in changes.items() if not is_here),
        )

    def _change(self, copy: BlockCopy, is_here: bool) -> None:
        if copy not in self._changes:
            self._changes[copy] = is_here
        else:
            assert self._changes[copy] is not is_here, f"{copy} announced twice"
            del self._changes[copy]
