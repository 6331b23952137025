"""The prefix index: longest match per worker, changes by events, and what happens when events are missed."""

from __future__ import annotations

from conductor.prefix_index import IndexMode, PrefixIndex
from core.messages import BlockCopy, KvEvents
from halfmoon.types import BlockHash, NodeId, Tier

P0, P1, P2 = NodeId("p0"), NodeId("p1"), NodeId("p2")
BLOCKS = tuple(BlockHash(bytes([i]) * 16) for i in range(10))


def copies(*indices: int, tier: Tier = Tier.DEVICE) -> tuple[BlockCopy, ...]:
    return tuple(BlockCopy(block_hash=BLOCKS[i], tier=tier) for i in indices)


def index_of(**held: tuple[int, ...]) -> PrefixIndex:
    index = PrefixIndex()
    for name, indices in held.items():
        index.join(NodeId(name))
        index.on_snapshot(NodeId(name), 0, copies(*indices))
    return index


def test_the_longest_prefix_of_every_worker_in_one_walk() -> None:
    index = index_of(p0=(0, 1, 2, 3), p1=(0, 1), p2=(1, 2, 3))
    assert index.match(BLOCKS[:6]) == {P0: 4, P1: 2}
    assert index.match(BLOCKS[:2]) == {P0: 2, P1: 2}
    assert index.match(BLOCKS[1:4]) == {P0: 3, P1: 1, P2: 3}
    assert index.match(()) == {}


def test_a_hole_ends_the_usable_prefix() -> None:
    assert index_of(p0=(0, 1, 3, 4)).match(BLOCKS) == {P0: 2}


def test_a_block_stays_while_any_tier_holds_it() -> None:
    index = index_of(p0=(0, 1))
    index.on_events(P0, KvEvents(event_id=1, stored=copies(1, tier=Tier.DRAM), removed=copies(1)))
    assert index.match(BLOCKS) == {P0: 2}
    assert index.tiers(P0, BLOCKS) == {Tier.DEVICE: 1, Tier.DRAM: 1}
    index.on_events(P0, KvEvents(event_id=2, removed=copies(1, tier=Tier.DRAM)))
    assert index.match(BLOCKS) == {P0: 1}


def test_the_walk_says_which_parts_of_a_prefix_are_not_in_device() -> None:
    index = index_of(p0=(0, 1, 2, 3, 4), p1=(0, 1, 2))
    moved = copies(1, 2, tier=Tier.DRAM) + copies(4, tier=Tier.SSD)
    index.on_events(P0, KvEvents(event_id=1, stored=moved, removed=copies(1, 2, 4)))
    lengths, slow = index.walk(BLOCKS)
    assert lengths == {P0: 5, P1: 3}
    assert slow is not None
    assert slow.of(P0, 0, 5) == ((Tier.DRAM, 2), (Tier.SSD, 1))
    assert slow.of(P0, 2, 4) == ((Tier.DRAM, 1),)
    assert slow.of(P0, 3, 4) == slow.of(P1, 0, 3) == ()
    index.on_events(P0, KvEvents(event_id=2, stored=copies(1, 2, 4)))  # promoted
    assert index.walk(BLOCKS).slow is None


def test_removed_applies_before_stored() -> None:
    index = index_of(p0=(0,))
    index.on_events(P0, KvEvents(event_id=1, stored=copies(0), removed=copies(0)))
    assert index.match(BLOCKS) == {P0: 1}


def test_missed_events_ask_for_a_snapshot_once_and_heal() -> None:
    index = index_of(p0=(0,))
    assert not index.on_events(P0, KvEvents(event_id=1, stored=copies(1)))
    assert index.on_events(P0, KvEvents(event_id=3, stored=copies(2)))
    assert index.mode(P0) is IndexMode.REBUILDING
    assert not index.on_events(P0, KvEvents(event_id=5, stored=copies(3)))
    assert index.match(BLOCKS) == {P0: 4}  # fresh entries count meanwhile
    index.on_snapshot(P0, 6, copies(0, 1))
    assert index.mode(P0) is IndexMode.EXACT
    assert index.match(BLOCKS) == {P0: 2}
    assert not index.on_events(P0, KvEvents(event_id=7, stored=copies(2)))


def test_events_from_before_the_snapshot_are_dropped() -> None:
    index = PrefixIndex()
    index.join(P0)
    index.on_snapshot(P0, 5, copies(0))
    assert not index.on_events(P0, KvEvents(event_id=5, removed=copies(0)))
    assert index.match(BLOCKS) == {P0: 1}
    assert index.events_dropped == 1


def test_many_workers_are_told_apart_as_well_as_few() -> None:
    held = {f"w{i:02}": tuple(range(1 + i % 3)) for i in range(50)}
    index = index_of(**held)
    for gone in range(0, 50, 4):
        index.remove(NodeId(f"w{gone:02}"))
    left = {NodeId(name): len(blocks) for name, blocks in held.items() if int(name[1:]) % 4}
    assert index.match(BLOCKS) == left
    assert index.match(BLOCKS[2:]) == {name: 1 for name, length in left.items() if length == 3}


def test_a_worker_that_left_is_forgotten_and_its_place_is_reused() -> None:
    index = index_of(p0=(0, 1), p1=(0, 1, 2))
    index.remove(P1)
    assert index.match(BLOCKS) == {P0: 2}
    assert len(index) == 2
    index.join(P2)
    assert index.match(BLOCKS) == {P0: 2}
    assert index.num_blocks(P2) == 0
    assert index.mode(P2) is IndexMode.REBUILDING
    index.remove(P1)  # twice is as once
    index.check_invariants()


def test_a_rejoining_worker_begins_empty() -> None:
    index = index_of(p0=(0, 1))
    index.join(P0)
    assert index.match(BLOCKS) == {}
