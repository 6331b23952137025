"""One node's KV cache, as stories with exact slots: hits, evictions, parking, peers, quarantine, events."""

from __future__ import annotations

import pytest

from core.messages import BlockCopy, KvEvents
from halfmoon.types import AttemptId, BlockHash, RequestId, Tier
from kv_store.tiers import KvCache
from kv_store.values import Move, Opened, Place

DEVICE, DRAM = Tier.DEVICE, Tier.DRAM
NONE_LOADING: frozenset[int] = frozenset()


def attempt(name: str) -> AttemptId:
    return AttemptId(RequestId(name), 1)


ANN, BOB, CAT = attempt("ann"), attempt("bob"), attempt("cat")


def chain(letter: str, length: int) -> list[BlockHash]:
    return [BlockHash(f"{letter}{i}".encode().ljust(16)) for i in range(length)]


def cache_of(device: int, dram: int) -> KvCache:
    return KvCache(num_device_slots=device, num_dram_slots=dram, block_size=16)


def write(cache: KvCache, owner: AttemptId, names: list[BlockHash], now_s: float = 0.0) -> tuple[int, ...]:
    """Open, compute and commit a sequence of full blocks; it stays open."""
    opened = cache.open(owner, names, len(names), now_s)
    assert opened is not None
    for index in range(len(opened.hits), len(names)):
        cache.commit(owner, index, names[index], now_s)
    return opened.slots


def leave_behind(cache: KvCache, owner: AttemptId, names: list[BlockHash], now_s: float = 0.0) -> tuple[int, ...]:
    slots = write(cache, owner, names, now_s)
    cache.close(owner, now_s)
    return slots


def place(tier: Tier, slot: int, generation: int) -> Place:
    return Place(tier=tier, slot=slot, generation=generation)


def do_all(cache: KvCache, now_s: float = 0.0) -> list[Move]:
    moves = cache.take_moves()
    cache.on_moved(moves, now_s)
    cache.audit()
    return moves


def states(cache: KvCache, tier: Tier) -> dict[str, int]:
    """The states that occur."""
    return {state: count for state, count in cache.counts(tier).items() if count}


# ---- opening and hits ----


def test_the_second_turn_of_a_chat_reuses_the_first() -> None:
    cache = cache_of(8, 0)
    names = chain("a", 4)
    assert cache.open(ANN, names[:2], 3, 0.0) == Opened(slots=(0, 1, 2), hits=(), loading=NONE_LOADING)
    cache.commit(ANN, 0, names[0], 0.1)
    cache.commit(ANN, 1, names[1], 0.2)
    assert states(cache, DEVICE) == {"pinned": 2, "filling": 1, "free": 5}
    cache.close(ANN, 1.0)
    assert states(cache, DEVICE) == {"ready": 2, "free": 6}
    again = cache.open(BOB, names, 5, 2.0)
    assert again == Opened(slots=(0, 1, 2, 3, 4), hits=(DEVICE, DEVICE), loading=NONE_LOADING)
    assert states(cache, DEVICE) == {"pinned": 2, "filling": 3, "free": 3}
    cache.audit()


def test_a_running_sequence_shares_what_it_has_committed() -> None:
    cache = cache_of(8, 0)
    write(cache, ANN, chain("a", 3))
    shared = cache.open(BOB, chain("a", 3), 4, 1.0)
    assert shared == Opened(slots=(0, 1, 2, 3), hits=(DEVICE,) * 3, loading=NONE_LOADING)
    cache.close(ANN, 2.0)
    assert states(cache, DEVICE) == {"pinned": 3, "filling": 1, "free": 4}
    cache.close(BOB, 3.0)
    assert states(cache, DEVICE) == {"ready": 3, "free": 5}


def test_a_wholly_cached_prompt_keeps_its_last_block_private() -> None:
    cache = cache_of(8, 0)
    leave_behind(cache, ANN, chain("a", 3))
    opened = cache.open(BOB, chain("a", 3), 3, 1.0, use_hits=2)
    assert opened == Opened(slots=(0, 1, 3), hits=(DEVICE, DEVICE), loading=NONE_LOADING)
    cache.commit(BOB, 2, chain("a", 3)[2], 2.0)  # the name is in slot 2 already
    assert states(cache, DEVICE) == {"pinned": 2, "ready": 1, "filling": 1, "free": 4}
    cache.close(BOB, 3.0)
    assert states(cache, DEVICE) == {"ready": 3, "free": 5}
    cache.audit()


def test_a_hole_ends_the_prefix() -> None:
    cache = cache_of(8, 0)
    leave_behind(cache, ANN, chain("a", 3))
    one_missing = [chain("a", 3)[0], chain("b", 1)[0], chain("a", 3)[2]]
    assert cache.match(one_missing) == (DEVICE,)
    assert cache.match(chain("b", 2)) == ()


def test_growing_takes_one_slot_at_a_time() -> None:
    cache = cache_of(2, 0)
    write(cache, ANN, chain("a", 1))
    assert cache.grow(ANN, 1.0) == 1
    assert cache.slots(ANN) == (0, 1)
    assert cache.grow(ANN, 1.0) is None
    assert cache.available(DEVICE) == 0
    cache.audit()


def test_bugs_of_the_caller_are_refused() -> None:
    cache = cache_of(2, 0)
    with pytest.raises(ValueError, match="3 of 2 blocks"):
        cache.open(ANN, [], 3, 0.0)
    write(cache, ANN, chain("a", 1))
    with pytest.raises(ValueError, match="open already"):
        cache.open(ANN, [], 1, 0.0)
    with pytest.raises(ValueError, match="another name"):
        cache.commit(ANN, 0, chain("b", 1)[0], 0.0)
    with pytest.raises(ValueError, match="no block 1"):
        cache.commit(ANN, 1, chain("a", 2)[1], 0.0)
    with pytest.raises(ValueError, match="bob#1 is not open"):
        cache.close(BOB, 0.0)
    with pytest.raises(ValueError, match="not parked"):
        cache.unpark(ANN, 0.0)
    with pytest.raises(ValueError, match="not outstanding"):
        cache.on_moved([Move(source=place(DEVICE, 0, 1), target=place(DRAM, 0, 1))], 0.0)


# ---- eviction ----


def test_without_dram_the_least_recent_chain_goes_tail_first() -> None:
    cache = cache_of(6, 0)
    leave_behind(cache, ANN, chain("a", 3), 1.0)  # slots 0 1 2
    leave_behind(cache, BOB, chain("b", 3), 2.0)  # slots 3 4 5
    assert cache.open(CAT, [], 2, 3.0) == Opened(slots=(1, 2), hits=(), loading=NONE_LOADING)
    assert cache.match(chain("a", 3)) == (DEVICE,)
    assert cache.match(chain("b", 3)) == (DEVICE,) * 3
    assert cache.take_moves() == []


def test_a_parent_outlives_its_more_recent_children() -> None:
    """The head was used alone and long ago; its child later. The child still goes first."""
    cache = cache_of(3, 0)
    names = chain("a", 2)
    leave_behind(cache, ANN, names[:1], 1.0)
    leave_behind(cache, BOB, names, 5.0)
    leave_behind(cache, CAT, chain("b", 1), 9.0)
    assert cache.open(ANN, [], 1, 10.0) == Opened(slots=(1,), hits=(), loading=NONE_LOADING)
    assert cache.match(names) == (DEVICE,)


def test_a_parent_goes_before_a_pinned_child_when_nothing_else_can() -> None:
    cache = cache_of(2, 0)
    names = chain("a", 2)
    leave_behind(cache, ANN, names)
    assert cache.pin_copy(names[1], "grant") == place(DEVICE, 1, 1)
    assert cache.open(BOB, [], 1, 1.0) == Opened(slots=(0,), hits=(), loading=NONE_LOADING)
    assert cache.match(names) == ()
    assert cache.match(names[1:]) == (DEVICE,)
    cache.audit()


def test_nothing_is_evicted_for_a_request_that_cannot_be_seated() -> None:
    cache = cache_of(4, 4)
    write(cache, ANN, chain("a", 2))
    leave_behind(cache, BOB, chain("b", 2))
    assert cache.open(CAT, [], 3, 1.0) is None
    assert cache.take_moves() == []
    assert states(cache, DEVICE) == {"pinned": 2, "ready": 2}


def test_evicted_blocks_move_to_dram_and_come_back() -> None:
    cache = cache_of(4, 4)
    names = chain("a", 3)
    leave_behind(cache, ANN, names)
    assert cache.open(BOB, [], 3, 1.0) is None
    assert states(cache, DEVICE) == {"ready": 1, "evicting": 2, "free": 1}
    assert cache.match(names) == (DEVICE,) * 3  # valid in DEVICE until the moves are done
    moves = do_all(cache)
    assert moves == [
        Move(source=place(DEVICE, 2, 1), target=place(DRAM, 0, 1)),
        Move(source=place(DEVICE, 1, 1), target=place(DRAM, 1, 1)),
    ]
    assert cache.match(names) == (DEVICE, DRAM, DRAM)
    assert cache.open(BOB, [], 3, 2.0) == Opened(slots=(1, 2, 3), hits=(), loading=NONE_LOADING)
    cache.close(BOB, 3.0)
    back = cache.open(CAT, names, 4, 4.0)
    assert back == Opened(slots=(0, 1, 2, 3), hits=(DEVICE, DRAM, DRAM), loading=frozenset({1, 2}))
    assert do_all(cache) == [
        Move(source=place(DRAM, 1, 1), target=place(DEVICE, 1, 3)),
        Move(source=place(DRAM, 0, 1), target=place(DEVICE, 2, 3)),
    ]
    assert states(cache, DEVICE) == {"pinned": 3, "filling": 1}
    assert states(cache, DRAM) == {"ready": 2, "free": 2}


def test_a_block_with_a_copy_in_dram_leaves_at_once() -> None:
    cache = cache_of(2, 2)
    names = chain("a", 2)
    leave_behind(cache, ANN, names)
    cache.open(BOB, [], 2, 1.0)
    do_all(cache)
    write(cache, BOB, names, 2.0)  # both come back from DRAM
    do_all(cache)
    cache.close(BOB, 3.0)
    assert cache.open(CAT, [], 2, 4.0) is not None
    assert cache.take_moves() == []
    assert cache.match(names) == (DRAM, DRAM)


def test_a_full_dram_forgets_its_least_recent() -> None:
    cache = cache_of(2, 2)
    leave_behind(cache, ANN, chain("a", 2), 1.0)
    cache.open(BOB, [], 2, 2.0)
    do_all(cache, 2.0)
    write(cache, BOB, chain("b", 2), 3.0)
    cache.close(BOB, 3.0)
    assert cache.open(CAT, [], 1, 4.0) is None
    assert cache.match(chain("a", 2)) == (DRAM,)  # its tail made room for b's
    do_all(cache, 4.0)
    assert cache.match(chain("b", 2)) == (DEVICE, DRAM)


def test_a_dram_that_is_all_held_drops_from_device() -> None:
    cache = cache_of(2, 1)
    write(cache, ANN, chain("a", 1))
    assert cache.park(ANN, 1, 0.0)
    do_all(cache)
    leave_behind(cache, BOB, chain("b", 2), 1.0)
    assert cache.open(CAT, [], 2, 2.0) is not None
    assert cache.match(chain("b", 2)) == ()
    assert cache.match(chain("a", 1)) == (DRAM,)


def test_a_block_that_is_leaving_is_taken_back() -> None:
    """The move still completes; then the block is ready in both tiers."""
    cache = cache_of(2, 2)
    names = chain("a", 2)
    leave_behind(cache, ANN, names)
    assert cache.open(BOB, [], 2, 1.0) is None
    assert states(cache, DEVICE) == {"evicting": 2}
    assert cache.open(CAT, names, 2, 2.0) == Opened(slots=(0, 1), hits=(DEVICE, DEVICE), loading=NONE_LOADING)
    do_all(cache)
    assert states(cache, DEVICE) == {"pinned": 2}
    assert states(cache, DRAM) == {"ready": 2}
    cache.close(CAT, 3.0)
    assert cache.open(BOB, [], 2, 4.0) == Opened(slots=(0, 1), hits=(), loading=NONE_LOADING)


def test_two_sequences_share_one_load() -> None:
    cache = cache_of(4, 4)
    names = chain("a", 2)
    leave_behind(cache, ANN, names)
    cache.open(BOB, [], 4, 1.0)
    do_all(cache)
    first = cache.open(ANN, names, 2, 2.0)
    second = cache.open(BOB, names, 2, 2.0)
    assert first is not None
    assert second is not None
    assert first.slots == second.slots
    assert second == Opened(slots=first.slots, hits=(DRAM, DRAM), loading=frozenset({0, 1}))
    assert len(cache.take_moves()) == 2


def test_a_sequence_that_closes_during_its_load_leaves_the_blocks_behind() -> None:
    cache = cache_of(2, 2)
    names = chain("a", 2)
    leave_behind(cache, ANN, names)
    cache.open(BOB, [], 2, 1.0)
    do_all(cache)
    assert cache.open(ANN, names, 2, 2.0) is not None
    cache.close(ANN, 3.0)
    assert states(cache, DEVICE) == {"filling": 2}  # the moves hold them
    assert cache.available(DEVICE) == 0
    do_all(cache)
    assert states(cache, DEVICE) == {"ready": 2}
    assert cache.match(names) == (DEVICE, DEVICE)


# ---- parking ----


def test_a_parked_sequence_holds_dram_and_frees_device() -> None:
    cache = cache_of(4, 4)
    names = chain("a", 2)
    write(cache, ANN, names)
    assert cache.grow(ANN, 0.0) == 2  # a partial tail
    assert cache.grow(ANN, 0.0) == 3  # nothing in it yet
    assert cache.park(ANN, 3, 1.0)
    assert cache.slots(ANN) == ()
    assert states(cache, DEVICE) == {"evicting": 3, "free": 1}
    assert cache.match(names) == (DEVICE, DEVICE)
    assert [move.source.slot for move in do_all(cache)] == [0, 1, 2]
    assert states(cache, DEVICE) == {"free": 4}
    assert states(cache, DRAM) == {"pinned": 2, "filling": 1, "free": 1}
    assert cache.match(names) == (DRAM, DRAM)

    write(cache, BOB, chain("b", 2))
    assert cache.unpark(ANN, 2.0) is None  # two slots are free, three are needed
    cache.close(BOB, 2.0)
    assert cache.unpark(ANN, 3.0) is None  # one of bob's blocks is on its way out
    do_all(cache)
    back = cache.unpark(ANN, 4.0)
    assert back is not None
    assert (back.hits, back.loading) == ((DRAM,) * 3, frozenset({0, 1, 2}))
    do_all(cache)
    assert states(cache, DRAM) == {"ready": 3, "free": 1}
    assert states(cache, DEVICE) == {"pinned": 2, "filling": 1, "ready": 1}


def test_parking_does_not_move_what_dram_has() -> None:
    cache = cache_of(4, 4)
    names = chain("a", 2)
    leave_behind(cache, ANN, names)
    cache.open(BOB, [], 4, 1.0)
    do_all(cache)
    write(cache, ANN, names, 2.0)
    do_all(cache)
    assert cache.grow(ANN, 2.0) is not None
    assert cache.park(ANN, 3, 3.0)
    assert len(do_all(cache)) == 1
    assert states(cache, DRAM) == {"pinned": 2, "filling": 1, "free": 1}


def test_parking_needs_room_in_dram() -> None:
    cache = cache_of(4, 2)
    write(cache, ANN, chain("a", 3))
    assert not cache.park(ANN, 3, 1.0)
    assert cache.slots(ANN) == (0, 1, 2)
    assert cache.take_moves() == []
    assert cache.park(ANN, 2, 1.0)
    assert not cache_with_a_sequence_and_no_dram().park(ANN, 1, 1.0)


def cache_with_a_sequence_and_no_dram() -> KvCache:
    cache = cache_of(1, 0)
    write(cache, ANN, chain("a", 1))
    return cache


def test_a_parking_that_is_still_moving_is_taken_back_where_it_is() -> None:
    cache = cache_of(2, 2)
    write(cache, ANN, chain("a", 1))
    cache.grow(ANN, 0.0)
    assert cache.park(ANN, 2, 1.0)
    assert cache.unpark(ANN, 2.0) == Opened(slots=(0, 1), hits=(DEVICE, DEVICE), loading=NONE_LOADING)
    do_all(cache)
    assert states(cache, DEVICE) == {"pinned": 1, "filling": 1}
    assert states(cache, DRAM) == {"ready": 1, "free": 1}  # the tail's copy is of no use to anybody


def test_a_tail_that_is_still_loading_is_parked_where_it_was() -> None:
    cache = cache_of(2, 2)
    assert cache.open(ANN, [], 1, 0.0) is not None
    assert cache.park(ANN, 1, 1.0)
    do_all(cache)
    assert cache.unpark(ANN, 2.0) is not None
    assert cache.park(ANN, 1, 3.0)
    assert len(do_all(cache)) == 1  # the load, for nobody
    assert states(cache, DEVICE) == {"free": 2}
    assert states(cache, DRAM) == {"filling": 1, "free": 1}


def test_closing_a_parked_sequence_before_its_moves_are_done() -> None:
    cache = cache_of(2, 2)
    write(cache, ANN, chain("a", 1))
    cache.grow(ANN, 0.0)
    assert cache.park(ANN, 2, 1.0)
    cache.close(ANN, 2.0)
    assert states(cache, DEVICE) == {"evicting": 2}
    assert states(cache, DRAM) == {"filling": 2}
    do_all(cache)
    assert states(cache, DEVICE) == {"free": 2}
    assert states(cache, DRAM) == {"ready": 1, "free": 1}
    assert cache.match(chain("a", 1)) == (DRAM,)


# ---- peers ----


def test_a_copy_that_a_peer_reads_stays() -> None:
    cache = cache_of(2, 0)
    names = chain("a", 2)
    leave_behind(cache, ANN, names)
    pinned = cache.pin_copy(names[1], "grant-1")
    assert pinned == place(DEVICE, 1, 1)
    assert cache.pin_copy(names[1], "grant-2") == pinned
    assert cache.pin_copy(chain("b", 1)[0], "grant-1") is None
    assert cache.open(BOB, [], 2, 1.0) is None
    cache.unpin_copy(pinned, "grant-1")
    assert cache.open(BOB, [], 2, 1.0) is None
    cache.unpin_copy(pinned, "grant-2")
    assert cache.open(BOB, [], 2, 1.0) == Opened(slots=(0, 1), hits=(), loading=NONE_LOADING)


def test_a_pin_renews_nothing() -> None:
    cache = cache_of(2, 0)
    leave_behind(cache, ANN, chain("a", 1), 1.0)
    leave_behind(cache, BOB, chain("b", 1), 2.0)
    pinned = cache.pin_copy(chain("a", 1)[0], "grant")
    assert pinned is not None
    cache.unpin_copy(pinned, "grant")
    assert cache.open(CAT, [], 1, 3.0) == Opened(slots=(0,), hits=(), loading=NONE_LOADING)


def test_a_generation_rises_each_time_a_slot_is_given_away() -> None:
    cache = cache_of(1, 0)
    places = []
    for letter in "abc":
        leave_behind(cache, ANN, chain(letter, 1))
        pinned = cache.pin_copy(chain(letter, 1)[0], "grant")
        assert pinned is not None
        cache.unpin_copy(pinned, "grant")
        places.append(pinned)
    assert places == [place(DEVICE, 0, 1), place(DEVICE, 0, 2), place(DEVICE, 0, 3)]


def test_a_leak_is_named() -> None:
    cache = cache_of(2, 0)
    write(cache, ANN, chain("a", 1))
    del cache._tables[ANN]
    with pytest.raises(AssertionError, match="DEVICE slot 0 held by ann#1: leaked"):
        cache.check_invariants()


# ---- quarantine ----


def test_quarantined_slots_wait_for_the_close() -> None:
    cache = cache_of(4, 0)
    write(cache, ANN, chain("a", 1))
    cache.grow(ANN, 0.0)
    cache.grow(ANN, 0.0)
    cache.quarantine(ANN)
    assert states(cache, DEVICE) == {"pinned": 1, "quarantined": 2, "free": 1}
    assert cache.available(DEVICE) == 1
    for forbidden in (
        lambda: cache.grow(ANN, 1.0),
        lambda: cache.park(ANN, 1, 1.0),
        lambda: cache.commit(ANN, 1, chain("a", 2)[1], 1.0),
    ):
        with pytest.raises(ValueError, match="ann#1 is quarantined"):
            forbidden()
    cache.close(ANN, 2.0)
    assert states(cache, DEVICE) == {"ready": 1, "free": 3}
    write(cache, ANN, chain("b", 1))  # the same owner, later, is not quarantined
    cache.grow(ANN, 3.0)
    assert states(cache, DEVICE) == {"ready": 1, "pinned": 1, "filling": 1, "free": 1}


def test_a_parked_tail_can_be_quarantined() -> None:
    cache = cache_of(2, 2)
    cache.open(ANN, [], 1, 0.0)
    cache.park(ANN, 1, 1.0)
    do_all(cache)
    cache.quarantine(ANN)
    assert states(cache, DRAM) == {"quarantined": 1, "free": 1}
    with pytest.raises(ValueError, match="quarantined"):
        cache.unpark(ANN, 2.0)
    cache.close(ANN, 2.0)
    assert states(cache, DRAM) == {"free": 2}


# ---- events ----


def copies(tier: Tier, names: list[BlockHash]) -> tuple[BlockCopy, ...]:
    return tuple(BlockCopy(block_hash=name, tier=tier) for name in names)


def test_events_say_what_match_would_find() -> None:
    cache = cache_of(2, 2)
    a, b = chain("a", 2), chain("b", 2)
    assert cache.take_events() is None
    leave_behind(cache, ANN, a)
    assert cache.take_events() == KvEvents(event_id=1, stored=copies(DEVICE, a))
    cache.open(BOB, [], 2, 1.0)
    assert cache.take_events() is None  # nothing has left yet
    do_all(cache)
    assert cache.take_events() == KvEvents(event_id=2, stored=copies(DRAM, a[::-1]), removed=copies(DEVICE, a[::-1]))
    leave_behind(cache, BOB, b, 2.0)
    assert cache.take_events() == KvEvents(event_id=3, stored=copies(DEVICE, b))
    assert cache.last_event_id == 3
    assert cache.snapshot() == copies(DEVICE, b) + copies(DRAM, a[::-1])


def test_what_came_and_went_between_two_events_is_not_mentioned() -> None:
    cache = cache_of(1, 0)
    leave_behind(cache, ANN, chain("a", 1))
    leave_behind(cache, BOB, chain("b", 1))
    assert cache.take_events() == KvEvents(event_id=1, stored=copies(DEVICE, chain("b", 1)))


# ---- size ----


def test_a_large_tier_is_turned_over_without_scans() -> None:
    """Block by block: a scan per eviction would take minutes."""
    num_slots, turned_over = 50_000, 10_000
    cache = cache_of(num_slots, 0)
    leave_behind(cache, ANN, [BlockHash(i.to_bytes(16, "big")) for i in range(num_slots)])
    for i in range(turned_over):
        leave_behind(cache, BOB, [BlockHash((num_slots + i).to_bytes(16, "big"))], 1.0 + i)
    counts = cache.counts(DEVICE)
    assert counts["ready"] == num_slots
    assert len(cache.match([BlockHash(i.to_bytes(16, "big")) for i in range(num_slots)])) == num_slots - turned_over
    cache.audit()
