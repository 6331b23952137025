"""Pure: what must hold whatever happens, beyond each ledger's own books; and the digest of all that was decided."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from core.messages import PrefillDone
from halfmoon.types import AttemptId, RequestId
from node.effects import Effect, Emit, Report


class Audit:
    """Exactly one terminal event for each request, no token before its prefill. Remembers every request: for tests."""

    def __init__(self) -> None:
        self._prefilled: dict[AttemptId, None] = {}
        self._open: dict[RequestId, None] = {}
        self._ended: dict[RequestId, str] = {}

    def arrived(self, request_id: RequestId) -> None:
        assert request_id not in self._open, f"{request_id} arrives twice"
        assert request_id not in self._ended, f"{request_id} arrives twice"
        self._open[request_id] = None

    def ended(self, request_id: RequestId, how: str) -> None:
        earlier = self._ended.get(request_id)
        assert earlier is None, f"{request_id} ends twice: {earlier}, then {how}"
        assert request_id in self._open, f"{request_id} ends and never came"
        del self._open[request_id]
        self._ended[request_id] = how

    def done(self, effects: Iterable[Effect]) -> None:
        """A worker's machine wants this."""
        for effect in effects:
            if isinstance(effect, Report) and isinstance(effect.event, PrefillDone):
                self._prefilled[effect.event.attempt_id] = None
        self.spoke(effect.token.attempt_id for effect in effects if isinstance(effect, Emit))

    def spoke(self, attempt_ids: Iterable[AttemptId]) -> None:
        """Tokens of these were emitted."""
        for attempt_id in attempt_ids:
            assert attempt_id in self._prefilled, f"{attempt_id}: a token before its prefill"

    def finish(self) -> None:
        assert not self._open, f"{len(self._open)} requests have no end, {next(iter(self._open))} among them"


class DecisionLog:
    """BLAKE2b over one line per placement and per terminal event, in order. Numbers as repr: exact."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self.num_lines = 0

    def note(self, now_s: float, *words: object) -> None:
        line = " ".join([repr(now_s), *[repr(w) if isinstance(w, float) else str(w) for w in words]])
        self._digest.update(line.encode() + b"\n")
        self.num_lines += 1

    def hex(self) -> str:
        return self._digest.hexdigest()
