"""Decode room, told afterwards: who had it, and when one more would have found some."""

from __future__ import annotations

import pytest

from conductor.tenancy import Found, Room, Tenancy, Tenants, tenancies_of
from halfmoon.types import BlockHash


def names(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(bytes([number]) * 16) for number in numbers)


def tenancy(name: str, begun_s: float, ended_s: float, tokens: int = 40, output: int = 0, *shared: int) -> Tenancy:
    return Tenancy(name, begun_s, begun_s, ended_s, tokens, output, names(*shared))


def find(one: Tenancy, *there: Tenancy, blocks: int = 10, sequences: int = 8) -> Found:
    """Blocks of 16 tokens: 40 tokens are 3, and one more is kept for each sequence that is there already."""
    return Tenants(there, Room(blocks, sequences), 16).find(one)


ONE = tenancy("one", 10.0, 20.0)


@pytest.mark.parametrize(
    ("there", "blocks", "wait_s"),
    [
        ([], 2, 0.0),  # an empty worker
        ([("a", 0.0, 15.0)], 7, 0.0),
        ([("a", 0.0, 15.0)], 6, 5.0),
        ([("a", 0.0, 15.0), ("b", 0.0, 12.0)], 10, 2.0),
        ([("a", 0.0, 10.0)], 3, 0.0),  # it has just ended
        ([("later", 11.0, 15.0)], 3, 0.0),  # gives way
        ([("one", 0.0, 15.0)], 3, 0.0),  # itself
    ],
)
def test_it_waits_until_those_before_it_leave_room(
    there: list[tuple[str, float, float]], blocks: int, wait_s: float
) -> None:
    assert find(ONE, *(tenancy(*t) for t in there), blocks=blocks).wait_s == wait_s


def test_sequences_are_bounded_too() -> None:
    assert find(ONE, tenancy("a", 0.0, 15.0), blocks=100, sequences=1) == Found(5.0, True)


def test_blocks_that_are_shared_are_there_once() -> None:
    sharing = tenancy("a", 0.0, 15.0, 40, 0, 1, 2)
    assert find(tenancy("one", 10.0, 20.0, 40, 0, 1, 2), sharing, blocks=5) == Found(0.0, True)
    assert find(tenancy("one", 10.0, 20.0, 40, 0, 1, 3), sharing, blocks=5) == Found(5.0, True)


def test_room_that_growth_takes_away_is_not_lasting() -> None:
    grows = tenancy("a", 9.0, 29.0, 40, 60)
    assert find(ONE, grows, blocks=8) == Found(0.0, True)  # 70 tokens, 5 blocks, when the one ends
    assert find(ONE, grows, blocks=7) == Found(0.0, False)
    assert find(tenancy("one", 10.0, 20.0, 40, 40), tenancy("a", 0.0, 30.0), blocks=8) == Found(0.0, False)


def test_a_record_tells_whose_room_it_was_from_when_until_when() -> None:
    steps = [
        {"at_s": 0.1, "number": 1, "what": "Reserved", "node": "d0"},
        {"at_s": 0.4, "number": 1, "what": "lost: d0 lost", "node": "d0"},
        {"at_s": 0.5, "number": 2, "what": "Reserved", "node": "d1"},
        {"at_s": 0.7, "number": 2, "what": "DecodeJoined", "node": "d1"},
    ]
    record = {"request_id": "r", "steps": steps, "ended_s": 2.0, "num_prompt_tokens": 40, "output_tokens": 9}
    assert tenancies_of(record, 100.0, names(1)) == [
        ("d0", Tenancy("r", 100.1, None, 100.4, 40, 9, names(1))),
        ("d1", Tenancy("r", 100.5, 100.7, 102.0, 40, 9, names(1))),
    ]
    middle = Tenancy("r", 100.5, 100.7, 102.7, 40, 10)
    assert [middle.tokens_at(s) for s in (100.6, 101.7, 103.0)] == [40, 45.0, 50.0]
