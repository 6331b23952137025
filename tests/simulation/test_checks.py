"""Each promise that `--check` watches, broken on purpose: the check that cannot fail would be none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conductor.desk import Desk
from conductor.effects import End
from conductor.prefix_index import PrefixIndex
from conductor.view import Worker
from decode_worker.machine import DecodeMachine
from halfmoon.errors import Failed
from kv_store.ledger import Ledger
from kv_store.transfer_source import Source
from node.effects import Emit
from tests.simulation.scenarios import run

Mutate = Callable[[pytest.MonkeyPatch], None]


def forgets_to_release(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Worker, "release_decode", lambda self, attempt_id: False)


def releases_without_a_count(patch: pytest.MonkeyPatch) -> None:
    def release(self: Worker, attempt_id: Any) -> bool:
        return self._decode.pop(attempt_id, None) is not None

    patch.setattr(Worker, "release_decode", release)


def speaks_for_an_attempt_that_never_was(patch: pytest.MonkeyPatch) -> None:
    honest = DecodeMachine.effects

    def effects(self: DecodeMachine, now_s: float) -> list[Any]:
        found = honest(self, now_s)
        for i, effect in enumerate(found):
            if isinstance(effect, Emit):
                wrong = effect.token.attempt_id._replace(number=99)
                found[i] = effect._replace(token=effect.token._replace(attempt_id=wrong))
        return found

    patch.setattr(DecodeMachine, "effects", effects)


def grants_to_those_who_are_too_late(patch: pytest.MonkeyPatch) -> None:
    honest = Source._on_pull

    def on_pull(self: Source, session: Any, pull: Any, now_s: float) -> None:
        honest(self, session, pull, now_s)
        for serve in self._serves.values():
            serve.deadline_s = now_s - 1.0

    patch.setattr(Source, "_on_pull", on_pull)


def loses_a_slot(patch: pytest.MonkeyPatch) -> None:
    honest = Ledger.allocate

    def allocate(self: Ledger, holder: Any) -> int | None:
        if self.num_free > 1:
            self._free.pop()
        return honest(self, holder)

    patch.setattr(Ledger, "allocate", allocate)


def ends_nobody(patch: pytest.MonkeyPatch) -> None:
    honest = Desk.end

    def end(self: Desk, *told: Any) -> None:
        honest(self, *told)
        self.out = [effect for effect in self.out if not isinstance(effect, End)]

    patch.setattr(Desk, "end", end)


def keeps_holders_of_what_is_gone(patch: pytest.MonkeyPatch) -> None:
    honest = PrefixIndex._move

    def move(self: PrefixIndex, block: Any, shift: int, before: int, after: int) -> None:
        if after:
            honest(self, block, shift, before, after)

    patch.setattr(PrefixIndex, "_move", move)


BROKEN = (
    (forgets_to_release, "is booked and is not open", {}),
    (releases_without_a_count, ": (tokens|waits for a batch)", {}),
    (speaks_for_an_attempt_that_never_was, "a token before its prefill", {}),
    (grants_to_those_who_are_too_late, "granted past its deadline", {}),
    (loses_a_slot, "free list", {}),
    (ends_nobody, "requests open", {"slo_ttft_s": 0.001}),
    (keeps_holders_of_what_is_gone, "holders and copies disagree", {"hardware": {"prefill_blocks": 40}}),
)


@pytest.mark.parametrize(("mutate", "said", "settings"), BROKEN, ids=[mutate.__name__ for mutate, _, _ in BROKEN])
def test_a_broken_promise_is_seen(
    mutate: Mutate, said: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(Failed, match=said):
        run(3, 60, admission="baseline", **settings)
