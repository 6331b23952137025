"""A prefix index comes back from its bytes as it was; what is not such bytes, or damaged ones, is refused by name."""

from __future__ import annotations

import struct

import pytest

from conductor.index_dump import HEADER, MAGIC, VERSION, _digest, dump, load
from conductor.prefix_index import IndexMode, PrefixIndex
from core.messages import KvEvents
from halfmoon.errors import InvalidRequest
from halfmoon.types import NodeId, Tier
from tests.unit.test_prefix_index import BLOCKS, P0, P1, P2, copies, index_of


def three_tiers() -> PrefixIndex:
    """p0 in all tiers, p1 after a gap, p2 empty."""
    index = index_of(p0=(0, 1, 2, 3), p1=(0, 1))
    moved = copies(1, tier=Tier.DRAM) + copies(2, tier=Tier.SSD) + copies(3, tier=Tier.DRAM)
    index.on_events(P0, KvEvents(event_id=1, stored=moved, removed=copies(1, 2)))
    index.on_events(P1, KvEvents(event_id=7, stored=copies(5)))
    index.join(P2)
    return index


def test_what_is_loaded_is_what_was_dumped() -> None:
    before = three_tiers()
    after = load(dump(before))
    after.check_invariants()
    assert dump(after) == dump(before)
    assert after.nodes() == [P0, P1, P2]
    assert [after.mode(n) for n in (P0, P1, P2)] == [IndexMode.EXACT, IndexMode.REBUILDING, IndexMode.REBUILDING]
    assert after.match(BLOCKS) == before.match(BLOCKS) == {P0: 4, P1: 2}
    assert after.tiers(P0, BLOCKS) == {Tier.DEVICE: 2, Tier.DRAM: 1, Tier.SSD: 1}


def test_a_restored_index_goes_on_where_it_was_and_notices_what_it_missed() -> None:
    after = load(dump(three_tiers()))
    assert not after.on_events(P0, KvEvents(event_id=2, stored=copies(4)))
    assert after.match(BLOCKS)[P0] == 5
    assert after.on_events(P0, KvEvents(event_id=9))
    assert after.mode(P0) is IndexMode.REBUILDING


def test_an_empty_index_is_a_header() -> None:
    assert len(dump(PrefixIndex())) == HEADER.size
    assert load(dump(PrefixIndex())).nodes() == []


def test_the_order_of_joining_changes_no_byte() -> None:
    assert dump(index_of(p0=(0, 1), p1=(2,))) == dump(index_of(p1=(2,), p0=(0, 1)))


def sealed(body: bytes, version: int = VERSION) -> bytes:
    return HEADER.pack(MAGIC, version, _digest(body)) + body


@pytest.mark.parametrize(
    ("why", "data"),
    [
        ("nothing", b""),
        ("another file", b"GIF89a" * 10),
        ("a later version", sealed(b"", version=VERSION + 1)),
        ("a name that is no text", sealed(b"\x02\x00\xff\xfe" + b"\x05\x00exact" + struct.pack("<qQ", 0, 0))),
        ("an unknown mode", sealed(b"\x02\x00p0" + b"\x04\x00fine" + struct.pack("<qQ", 0, 0))),
        ("fewer blocks than announced", sealed(b"\x02\x00p0" + b"\x05\x00exact" + struct.pack("<qQ", 0, 3) + b"x" * 9)),
        ("too many blocks", sealed(b"\x02\x00p0" + b"\x05\x00exact" + struct.pack("<qQ", 0, 2**60))),
        ("no such tier", sealed(b"\x02\x00p0" + b"\x05\x00exact" + struct.pack("<qQ", 0, 1) + b"h" * 16 + b"\x40")),
        ("a node twice", sealed(2 * (b"\x02\x00p0" + b"\x05\x00exact" + struct.pack("<qQ", 0, 0)))),
    ],
)
def test_what_is_no_dump_is_refused(why: str, data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="index dump, byte"):
        load(data)


def test_every_flipped_byte_and_every_cut_is_noticed() -> None:
    good = dump(three_tiers())
    for offset in range(len(good)):
        bad = bytearray(good)
        bad[offset] ^= 0x10
        with pytest.raises(InvalidRequest):
            load(bytes(bad))
        with pytest.raises(InvalidRequest):
            load(good[:offset])


def test_a_worker_may_be_named_in_any_script() -> None:
    index = index_of(**{"préfill-零": (0,)})
    assert load(dump(index)).match(BLOCKS) == {NodeId("préfill-零"): 1}
