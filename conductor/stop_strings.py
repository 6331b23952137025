"""Pure: stop strings matched over growing text: what may be shown now, and where the output ends."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Fed with the pieces of one output's text, in order.

    Holds back the longest end of the text that may still become a stop string: at most the longest stop string less
    one character. The match that counts is the one that starts first; of two that start together, the shorter.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        assert all(stop), "empty stop strings are refused when a request is validated"
        self._stop = tuple(stop)
        self._held = ""
        self.matched = False

    def feed(self, piece: str) -> str:
        """Text that is certain now; after a match, the text before it. Modifies self.

        `matched` becomes true with the piece that completes a stop string; nothing may be fed afterwards.
        """
        assert not self.matched, "text after the output's end"
        if not self._stop:
            return piece
        text = self._held + piece
        start = self._first_match(text)
        if start is not None:
            self.matched, self._held = True, ""
            return text[:start]
        kept = self._possible_start(text)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """The text still held back, when the output has ended without a match. Modifies self."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        starts = [text.find(stop) for stop in self._stop]
        found = [start for start in starts if start >= 0]
        return min(found) if found else None

    def _possible_start(self, text: str) -> int:
        """The first index from which the rest of `text` is the beginning of a stop string; len(text) if none."""
        reach = max(len(stop) for stop in self._stop) - 1
        for start in range(max(0, len(text) - reach), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return start
        return len(text)
