"""Eviction policies: stories with exact victims, a dumb twin, the ledger beside the simulation's pool, hit rates."""

from __future__ import annotations

from random import Random

import pytest

from benchmarks.cache_policies import NAMES, Pool, block_name, measure, table
from halfmoon.types import AttemptId, BlockHash, RequestId, Tier
from kv_store.eviction import EvictionPolicy, LengthAware, Lfu, LruTailFirst
from kv_store.eviction_belady import Belady
from kv_store.eviction_leases import REMEMBERED_PER_SLOT, Leased
from kv_store.eviction_policies import POLICIES, make_policy
from kv_store.eviction_s3fifo import S3Fifo
from kv_store.leases import COHORT_S, WINDOW_S, Leases, class_of
from kv_store.ledger import Ledger
from tests.traces import FIXTURE, conversation_trace
from workload.files import read_trace


def name(number: int) -> BlockHash:
    return block_name(number)


def store(policy: EvictionPolicy, slot: int, *, uses: int = 1, index: int = 0, now_s: float = 0.0) -> None:
    """Content `slot` in slot `slot`, used so often, on offer as a tail."""
    policy.on_stored(slot, name(slot), index, now_s)
    for _ in range(uses):
        policy.on_used(slot, now_s)
    policy.offer(slot, is_tail=True)


def drain(policy: EvictionPolicy) -> list[int]:
    order = []
    while (slot := policy.victim()) is not None:
        assert policy.victim() == slot, "asking changes nothing that can be seen"
        policy.withdraw(slot)
        order.append(slot)
    assert len(policy) == 0
    return order


# ---- stories ----


def test_least_recently_used_leaves_first() -> None:
    policy = LruTailFirst()
    for slot, now_s in ((0, 2.0), (1, 1.0), (2, 1.0), (3, 3.0)):
        store(policy, slot, now_s=now_s)
    assert drain(policy) == [1, 2, 0, 3]


def test_least_often_used_leaves_first_then_least_recently() -> None:
    policy = Lfu()
    store(policy, 0, uses=3, now_s=1.0)
    store(policy, 1, uses=1, now_s=9.0)
    store(policy, 2, uses=1, now_s=5.0)
    assert drain(policy) == [2, 1, 0]


def test_new_content_starts_without_the_old_one_s_uses() -> None:
    policy = Lfu()
    store(policy, 0, uses=5)
    store(policy, 1, uses=2)
    policy.withdraw(0)
    store(policy, 0, uses=1)
    assert drain(policy) == [0, 1]


def test_among_equally_used_blocks_the_later_in_the_chain_leave_first() -> None:
    policy = LengthAware()
    store(policy, 0, index=0, now_s=1.0)
    store(policy, 1, index=7, now_s=9.0)
    store(policy, 2, index=3, now_s=5.0)
    store(policy, 3, index=9, uses=2, now_s=0.0)
    assert drain(policy) == [1, 2, 0, 3]


def test_s3_fifo_lets_newcomers_leave_before_what_was_used_again() -> None:
    policy = S3Fifo(num_slots=5)
    store(policy, 0, uses=3)  # used again: passes into the main queue when its turn comes
    store(policy, 1, uses=1)
    store(policy, 2, uses=1)
    assert policy.victim() == 1
    assert drain(policy) == [1, 2, 0]


def test_s3_fifo_remembers_what_left() -> None:
    policy = S3Fifo(num_slots=5)
    for slot in range(4):
        store(policy, slot)
    assert policy.victim() == 0
    policy.withdraw(0)
    policy.on_stored(0, name(99), 0, 1.0)  # its slot has other content now
    policy.on_used(0, 1.0)
    policy.offer(0, is_tail=True)
    assert policy.victim() == 1
    policy.withdraw(1)
    policy.on_stored(1, name(0), 0, 2.0)  # and name 0 is back: into the main queue
    policy.on_used(1, 2.0)
    policy.offer(1, is_tail=True)
    assert drain(policy) == [2, 3, 0, 1]


def test_belady_gives_up_what_is_needed_again_last() -> None:
    policy = Belady({name(0): [0.0, 9.0], name(1): [0.0, 2.0, 3.0], name(2): [0.0], name(3): [0.0, 5.0]})
    for slot in range(4):
        store(policy, slot)
    policy.withdraw(1)
    policy.on_used(1, 2.0)
    policy.offer(1, is_tail=True)
    assert drain(policy) == [2, 0, 3, 1]


TEN_THEN_HUNDRED = Leases(seconds={class_of(1, 0): 10.0, class_of(2, 0): 100.0})


def test_a_lease_counts_from_the_last_use_and_remembers_uses_beyond_eviction() -> None:
    policy = Leased(4, TEN_THEN_HUNDRED)
    store(policy, 0, now_s=5.0)  # to 15
    store(policy, 1, now_s=0.0)  # to 10
    assert policy.victim() == 1
    policy.withdraw(1)
    policy.on_stored(2, name(1), 0, 1.0)  # the same block comes back, elsewhere
    policy.on_used(2, 1.0)  # its second use: to 101
    policy.offer(2, is_tail=True)
    assert drain(policy) == [0, 2]


def test_uses_are_remembered_for_a_bounded_number_of_names() -> None:
    for others, left in ((REMEMBERED_PER_SLOT - 1, [1, 0]), (REMEMBERED_PER_SLOT, [0, 1])):
        policy = Leased(1, TEN_THEN_HUNDRED)
        for number in (7000, *range(100, 100 + others), 7000):
            policy.on_stored(0, name(number), 0, 0.0)
            policy.on_used(0, 0.0)  # to 100 if 7000 is remembered, else to 10
        policy.offer(0, is_tail=True)
        store(policy, 1, now_s=5.0)  # to 15
        assert drain(policy) == left


def test_what_came_unasked_has_a_lease_from_its_coming() -> None:
    """As in DRAM, where a block comes when DEVICE gives it up, and is used when it is wanted back."""
    policy = Leased(4, Leases(seconds={class_of(0, 0): 50.0, class_of(1, 0): 10.0}))
    policy.on_stored(0, name(0), 0, 1.0)
    policy.offer(0, is_tail=True)  # to 51
    store(policy, 1, now_s=30.0)  # used: to 40
    assert policy.victim() == 1
    policy.offer(0, is_tail=False)
    policy.offer(0, is_tail=True)  # no other lease
    store(policy, 2, now_s=45.0)  # to 55
    assert drain(policy) == [1, 0, 2]


def test_leases_are_learned_from_the_tier_s_own_uses() -> None:
    """Every chat has a second turn after 20 s, none a third: a policy that has seen it gives up the latter.

    Until a minute is over nothing is known, and it is LRU.
    """
    policy = Leased(100)
    for second in range(181):
        for number, at_s in ((1000 + second, second), (1000 + second - 20, second - 20)):
            if at_s >= 0:
                policy.on_stored(number % 100, name(number), 0, float(second))
                policy.on_used(number % 100, float(second))
        if second == 40:
            policy.offer(1020 % 100, is_tail=True)  # used twice, at last now
            policy.offer(1021 % 100, is_tail=True)  # used once, 19 s ago
            assert drain(policy) == [21, 20]
    policy.offer(1160 % 100, is_tail=True)  # to 180
    policy.offer(1161 % 100, is_tail=True)  # to 161 + 24
    assert drain(policy) == [60, 61]


def test_what_a_policy_remembers_is_bounded_however_long_it_runs() -> None:
    policy = Leased(2)
    for step in range(1500):  # four hours
        policy.on_stored(step % 2, name(step), step % 40, 10.0 * step)
        policy.on_used(step % 2, 10.0 * step)
    assert len(policy._waits) == 2 * REMEMBERED_PER_SLOT
    assert len(policy._learner._cohorts) <= 1 + WINDOW_S / COHORT_S


@pytest.mark.parametrize("kind", POLICIES)
def test_inner_blocks_leave_only_when_no_tail_is_on_offer(kind: str) -> None:
    policy = make_policy(kind, 10)
    for slot in range(3):
        store(policy, slot, uses=1 + slot, now_s=float(slot))
    policy.offer(0, is_tail=False)
    policy.offer(1, is_tail=False)
    assert policy.victim() == 2
    policy.withdraw(2)
    policy.offer(1, is_tail=True)
    assert drain(policy) == [1, 0]


# ---- dumb twins ----


@pytest.mark.parametrize("kind", ["lru", "lfu", "length_aware", "leased"])
def test_victims_are_those_of_a_sorted_list(kind: str) -> None:
    seconds = (0.0, 7.0, 14.0, 21.0, 21.0)  # of a block used once, by its place; more uses: none
    fitted = Leases(seconds={class_of(1, index): lease for index, lease in enumerate(seconds)})
    luck, policy = Random(7), Leased(30, fitted) if kind == "leased" else make_policy(kind, 30)
    facts: dict[int, tuple[int, int, float, int]] = {}  # uses, index, last use, order of it
    offered: dict[int, bool] = {}
    keys = {
        "lru": lambda slot: (facts[slot][2],),
        "lfu": lambda slot: (facts[slot][0], facts[slot][2]),
        "length_aware": lambda slot: (facts[slot][0], -facts[slot][1], facts[slot][2]),
        "leased": lambda slot: (facts[slot][2] + (seconds[facts[slot][1]] if facts[slot][0] == 1 else 0.0),),
    }
    for step in range(3000):
        slot, now_s = luck.randrange(30), step // 5
        if slot in offered and luck.random() < 0.5:
            policy.withdraw(slot)
            del offered[slot]
        elif slot not in offered:
            if slot not in facts or luck.random() < 0.3:
                index = luck.randrange(5)
                policy.on_stored(slot, name(step), index, now_s)
                facts[slot] = (0, index, now_s, step)
            uses, index, _, _ = facts[slot]
            policy.on_used(slot, now_s)
            facts[slot] = (uses + 1, index, now_s, step)
            offered[slot] = luck.random() < 0.6
            policy.offer(slot, is_tail=offered[slot])
        expected = min(offered, key=lambda s: (not offered[s], *keys[kind](s), facts[s][3]), default=None)
        assert policy.victim() == expected
        assert len(policy) == len(offered)


@pytest.mark.parametrize("kind", POLICIES)
def test_the_pool_of_the_simulation_evicts_what_a_ledger_would(kind: str) -> None:
    """Same policy, same trace: the same blocks are there after every request, in the real books and in the pool."""
    pool, ledger = Pool(400, make_policy(kind, 400)), Ledger(Tier.DEVICE, 400, make_policy(kind, 400))
    for number, request in enumerate(read_trace(FIXTURE, limit=150).requests):
        names = [name(i) for i in request.block_ids]
        present = pool.serve(names, request.at_s)
        assert present == serve(ledger, names, request.at_s, AttemptId(RequestId(str(number)), 1))
        assert set(ledger.names()) == set(pool.slots)
        ledger.check_invariants()


def serve(ledger: Ledger, names: list[BlockHash], now_s: float, owner: AttemptId) -> list[bool]:
    present = [ledger.find(block) is not None for block in names]
    held = []
    for block in names:
        if (slot := ledger.find(block)) is not None:
            ledger.hold(slot, owner)
            held.append(slot)
    while ledger.num_free < len(names) - len(held) and (victim := ledger.victim()) is not None:
        ledger.drop(victim)
    for index, block in enumerate(names):
        if ledger.find(block) is None and (slot := ledger.allocate(owner)) is not None:
            ledger.publish(slot, block, names[index - 1] if index else None, index, now_s)
    for block in reversed(names):
        if (slot := ledger.find(block)) is not None:
            ledger.touch(slot, now_s)
            ledger.release(slot, owner)
    return present


# ---- hit rates ----


def test_belady_bounds_every_policy_on_the_fixture() -> None:
    trace = read_trace(FIXTURE)
    rows = {kind: measure(trace, kind, 1000) for kind in NAMES}
    bound = rows["belady"].hit_rate
    assert all(row.hit_rate <= bound for kind, row in rows.items() if not kind.startswith("belady"))
    assert all(row.prefix_hit_rate == row.hit_rate for kind, row in rows.items() if not kind.endswith("_plain"))
    assert measure(trace, "lru", 0).hit_rate == measure(trace, "belady", 0).hit_rate == pytest.approx(0.2986, abs=1e-4)
    assert table([rows["lru"]], "hit_rate").splitlines()[0] == "| policy | 1,000 |"


def test_textbook_lru_on_the_published_trace() -> None:
    assert round(measure(conversation_trace(), "lru_plain", 10_000).hit_rate, 3) == 0.212


@pytest.mark.parametrize("kind", ["leased", "leased_fitted"])
def test_leases_beat_lru_on_the_second_half(kind: str) -> None:
    """Learned on the way, or fitted to the first half: a good deal more than LRU's 0.134 at the size of one node."""
    assert measure(conversation_trace(), kind, 5_859).second_half_prefix_hit_rate >= 0.160
