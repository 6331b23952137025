"""The pull protocol as stories: what each end says, in order, and what it holds meanwhile."""

from __future__ import annotations

import math
from dataclasses import replace

from halfmoon.errors import IntegrityError, PeerLost, TransferAborted, TransferError, TransferTimeout
from halfmoon.types import AttemptId, BlockHash, Epoch, NodeId, RequestId, Tier, TransferId
from kv_store.transfer import TransferMachine
from kv_store.transfer_attempts import Tail
from kv_store.transfer_values import (
    Abort,
    Aborted,
    Ack,
    Arrived,
    Dial,
    Effect,
    Ended,
    Go,
    Grant,
    Granted,
    HandedOver,
    Hangup,
    Hash,
    LinkTraits,
    Message,
    Missing,
    Ping,
    Pull,
    Receive,
    SessionId,
    SourceDone,
    Stamp,
    Tell,
    TransferLimits,
    Transmit,
    Wanted,
    Withdrawn,
)
from kv_store.values import Place, PullEnded, PullSpec, Want

BYTES = 100
SHM = LinkTraits(name="shm", two_sided=False)
TORCH = LinkTraits(name="torch", two_sided=True)
T1 = TransferId("t1")
A1 = AttemptId(RequestId("r"), 1)
PEER = SessionId(1)


def name_of(number: int) -> BlockHash:
    return BlockHash(b"%016d" % number)


class Shelf:
    def __init__(self, *numbers: int) -> None:
        self.places = {name_of(n): Place(tier=Tier.DEVICE, slot=n, generation=1) for n in numbers}
        self.pins: list[int] = []

    def pin_copy(self, block_hash: BlockHash, holder: str) -> Place | None:
        place = self.places.get(block_hash)
        if place is not None:
            self.pins.append(place.slot)
        return place

    def unpin_copy(self, place: Place, holder: str) -> None:
        self.pins.remove(place.slot)


def spec(*numbers: int | None, wait: bool = False, transfer: str = "t1", epoch: str = "e1") -> PullSpec:
    return PullSpec(
        transfer_id=TransferId(transfer),
        attempt_id=A1,
        source=NodeId("p"),
        source_epoch=Epoch(epoch),
        source_address="unix:p",
        wants=tuple(
            Want(index=i, block_hash=None if n is None else name_of(n), num_tokens=4, slot=50 + i)
            for i, n in enumerate(numbers)
        ),
        wait=wait,
        deadline_s=10.0,
    )


def pull(*numbers: int | None, wait: bool = False, verify: bool = False) -> Pull:
    wants = tuple(
        Wanted(index=i, block_hash=None if n is None else name_of(n), num_tokens=4) for i, n in enumerate(numbers)
    )
    return Pull(transfer_id=T1, attempt_id=A1, wants=wants, wait=wait, verify=verify, deadline_s=10.0)


def grant(index: int, *, slot: int = 0, num_bytes: int = BYTES) -> Grant:
    return Grant(index=index, tier=Tier.DEVICE, slot=slot, stamp=7, checksum=None, num_bytes=num_bytes)


def told(effects: list[Effect]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, Tell)]


def ended(effects: list[Effect]) -> PullEnded:
    (one,) = [effect.ended for effect in effects if isinstance(effect, Ended)]
    return one


def sink(link: LinkTraits = SHM, **limits: float) -> TransferMachine:
    """A machine with one open session to node p."""
    machine = TransferMachine(
        block_bytes=BYTES,
        pins=Shelf(),
        verify=False,
        limits=TransferLimits(**{"batch_bytes_max": 2 * BYTES, **limits}),  # type: ignore[arg-type]
    )
    (dialled,) = machine.start_pull(spec(0, transfer="t0"), 0.0)
    assert dialled == Dial(session=PEER, node_id=NodeId("p"), epoch=Epoch("e1"), address="unix:p")
    machine.on_open(PEER, {Tier.DEVICE: link}, 0.0)
    machine.on_message(PEER, Missing(transfer_id=TransferId("t0"), indices=(0,)), 0.0)
    assert machine.quiescent
    return machine


def source(*numbers: int) -> tuple[TransferMachine, Shelf]:
    """A machine that has these blocks and one peer."""
    shelf = Shelf(*numbers)
    machine = TransferMachine(block_bytes=BYTES, pins=shelf)
    assert machine.next_session() == PEER
    assert machine.on_accepted(PEER, NodeId("d"), Epoch("e"), 0.0) == []
    return machine, shelf


# ---- the sink ----


def test_blocks_arrive_batch_by_batch_and_the_pull_ends_with_the_last() -> None:
    machine = sink()
    (asked,) = told(machine.start_pull(spec(0, 1, 2), 1.0))
    assert asked == Pull(
        transfer_id=T1, attempt_id=A1, wants=pull(0, 1, 2).wants, wait=False, verify=False, deadline_s=10.0
    )
    posted = machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(0), grant(1), grant(2))), 1.5)
    batches = [e.batch for e in posted if isinstance(e, Receive)]
    assert [[(p.index, p.target) for p in b.pieces] for b in batches] == [[(0, 50), (1, 51)], [(2, 52)]]
    assert machine.on_received(batches[0].batch, None, 2.0) == [
        Tell(session=PEER, message=Ack(transfer_id=T1, indices=(0, 1))),
        Arrived(transfer_id=T1, indices=(0, 1)),
    ]
    last = machine.on_received(batches[1].batch, None, 3.0)
    assert ended(last) == PullEnded(
        transfer_id=T1, attempt_id=A1, missing=(), error=None, num_bytes=300, seconds=2.0, link="shm", overlap=1.0
    )
    assert [e.busy_s for e in last if isinstance(e, Ended)] == [1.5]  # from the first batch's start to the last's end


def busy_s(effects: list[Effect]) -> float:
    (one,) = [effect.busy_s for effect in effects if isinstance(effect, Ended)]
    return one


def test_what_a_pull_waits_for_its_blocks_is_no_cost_of_the_link() -> None:
    machine = sink()
    machine.start_pull(spec(0, 1, wait=True), 0.0)
    for index, granted_s in ((0, 3.0), (1, 8.0)):
        grants = (grant(index),)
        (posted,) = machine.on_message(PEER, Granted(transfer_id=T1, grants=grants), granted_s)
        last = machine.on_received(posted.batch.batch, None, granted_s + 0.25)
    assert busy_s(last) == 0.5


def test_pulls_from_one_source_share_the_seconds_of_its_link() -> None:
    machine, t2 = sink(), TransferId("t2")
    machine.start_pull(spec(0), 0.0)
    machine.start_pull(spec(1, transfer="t2"), 0.0)
    (first,) = machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(0),)), 1.0)
    (second,) = machine.on_message(PEER, Granted(transfer_id=t2, grants=(grant(0),)), 2.0)
    assert busy_s(machine.on_received(first.batch.batch, None, 4.0)) == 1.0 + 2.0 / 2
    assert busy_s(machine.on_received(second.batch.batch, None, 5.0)) == 2.0 / 2 + 1.0


def test_overlap_is_the_share_that_was_here_when_the_source_had_ended() -> None:
    machine = sink()
    machine.start_pull(spec(0, 1, None, wait=True), 0.0)
    (first,) = machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(0),)), 0.0)
    machine.on_received(first.batch.batch, None, 0.0)
    machine.on_message(PEER, SourceDone(transfer_id=T1), 0.0)
    (second,) = machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(1), grant(2))), 0.0)
    assert ended(machine.on_received(second.batch.batch, None, 1.0)).overlap == 1 / 3


def test_a_two_sided_link_gets_a_go_before_each_batch_and_never_more_than_the_credits() -> None:
    machine = sink(TORCH, batch_bytes_max=BYTES, batches_per_session_max=2)
    machine.start_pull(spec(0, 1, 2), 0.0)
    posted = machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(0), grant(1), grant(2))), 0.0)
    assert [(m.batch, m.group, m.indices) for m in told(posted) if isinstance(m, Go)] == [(1, 1, (0,)), (2, 1, (1,))]
    after = machine.on_received(1, None, 0.1)
    assert [m for m in told(after) if isinstance(m, Go)] == [Go(transfer_id=T1, batch=3, group=1, indices=(2,))]


def test_after_an_error_of_the_link_the_pull_is_aborted_and_the_next_one_uses_a_new_group() -> None:
    machine = sink(TORCH)
    machine.start_pull(spec(0, 1), 0.0)
    machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(0), grant(1))), 0.0)
    failed = machine.on_received(1, PeerLost("reset"), 0.1)
    assert told(failed) == [Abort(transfer_id=T1, reason="reset")]
    result = ended(machine.on_message(PEER, Aborted(transfer_id=T1), 0.2))
    assert (result.missing, str(result.error), type(result.error)) == ((0, 1), "reset", PeerLost)
    machine.start_pull(spec(0, transfer="t2"), 0.3)
    again = machine.on_message(PEER, Granted(transfer_id=TransferId("t2"), grants=(grant(0),)), 0.3)
    assert [m.group for m in told(again) if isinstance(m, Go)] == [2]


def test_an_abort_ends_only_when_acknowledged_and_nothing_is_in_flight() -> None:
    machine = sink()
    machine.start_pull(spec(0), 0.0)
    (post,) = machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(0),)), 0.0)
    assert told(machine.abort_pull(T1, "cancelled", 0.1)) == [Abort(transfer_id=T1, reason="t1: cancelled")]
    assert machine.on_message(PEER, Aborted(transfer_id=T1), 0.2) == []
    assert not machine.quiescent
    result = ended(machine.on_received(post.batch.batch, None, 0.3))
    assert (result.missing, type(result.error)) == ((0,), TransferAborted)


def test_an_abort_that_is_not_acknowledged_ends_with_the_stream() -> None:
    machine = sink(abort_timeout_s=1.0, silence_s_max=100.0)
    machine.start_pull(spec(0), 0.0)
    late = machine.on_tick(10.0)
    assert Abort(transfer_id=T1, reason="t1: 0 of 1 blocks in 10.000 s") in told(late)
    assert not [e for e in machine.on_tick(10.9) if isinstance(e, Ended | Hangup)]
    over = machine.on_tick(11.0)
    assert [e for e in over if isinstance(e, Hangup)] == [Hangup(session=PEER, reason="p did not acknowledge an abort")]
    assert type(ended(over).error) is TransferTimeout


def test_when_the_source_gives_up_the_sink_answers_after_its_last_copy() -> None:
    machine = sink()
    machine.start_pull(spec(0), 0.0)
    (post,) = machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(0),)), 0.0)
    assert machine.on_message(PEER, Abort(transfer_id=T1, reason="evicted"), 0.1) == []
    done = machine.on_received(post.batch.batch, None, 0.2)
    assert told(done) == [Aborted(transfer_id=T1)]
    assert str(ended(done).error) == "t1: by p: evicted"


def test_a_lost_stream_ends_its_pulls_and_the_next_pull_dials_again() -> None:
    machine = sink()
    machine.start_pull(spec(0, 1), 0.0)
    machine.on_message(PEER, Missing(transfer_id=T1, indices=(1,)), 0.0)
    result = ended(machine.on_lost(PEER, PeerLost("reset"), 0.5))
    assert (result.missing, type(result.error)) == ((0, 1), PeerLost)
    (dialled,) = machine.start_pull(spec(0, transfer="t2", epoch="e2"), 1.0)
    assert isinstance(dialled, Dial)
    assert (dialled.session, dialled.epoch) == (2, "e2")


def test_a_silent_source_is_pinged_and_then_lost() -> None:
    machine = sink(silence_s_max=2.0, ping_interval_s=0.5)
    machine.start_pull(spec(0), 0.0)
    assert told(machine.on_tick(0.5)) == [Ping()]
    assert machine.tick_due_s() == 1.0
    assert told(machine.on_tick(0.9)) == []
    silent = machine.on_tick(2.1)
    assert [type(e) for e in silent] == [Hangup, Ended]
    assert machine.tick_due_s() == math.inf
    assert type(ended(silent).error) is PeerLost


def test_a_grant_of_another_size_is_refused() -> None:
    machine = sink()
    machine.start_pull(spec(0), 0.0)
    machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(0, num_bytes=99),)), 0.0)
    assert type(ended(machine.on_message(PEER, Aborted(transfer_id=T1), 0.0)).error) is IntegrityError


def test_grants_for_a_pull_that_has_ended_are_sent_back() -> None:
    machine = sink()
    assert told(machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(0),)), 0.0)) == [
        Abort(transfer_id=T1, reason="unknown transfer")
    ]


def test_pulls_beyond_the_limit_end_at_once() -> None:
    machine = sink(pulls_max=1)
    machine.start_pull(spec(0), 0.0)
    refused = ended(machine.start_pull(spec(0, transfer="t2"), 0.0))
    assert (refused.missing, type(refused.error)) == ((0,), TransferError)
    assert str(refused.error) == "t2: 1 pulls are running, the limit"


def test_two_pulls_of_one_peer_take_turns() -> None:
    machine = sink(batch_bytes_max=BYTES, batches_per_session_max=1)
    for transfer in ("t1", "t2"):
        machine.start_pull(spec(0, 1, 2, transfer=transfer), 0.0)
        grants = (grant(0), grant(1), grant(2))
        machine.on_message(PEER, Granted(transfer_id=TransferId(transfer), grants=grants), 0.0)
    order = ["t1"]
    for batch in (1, 2, 3, 4, 5):
        order += [e.batch.transfer_id for e in machine.on_received(batch, None, 0.0) if isinstance(e, Receive)]
    assert order == ["t1", "t1", "t2", "t1", "t2", "t2"]  # t1's second turn was queued before t2 came


def test_waiting_is_bounded_by_the_pulls_deadline_and_standing_still_by_the_links() -> None:
    machine = sink(link_timeout_s=5.0)
    machine.start_pull(spec(0), 0.0)
    (post,) = machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(0),)), 2.0)
    assert isinstance(post, Receive)
    assert (post.timeout_s, post.stall_s) == (8.0, 5.0)


def test_an_abort_waits_for_the_batch_in_flight_and_only_then_for_the_answer() -> None:
    machine = sink(abort_timeout_s=1.0, silence_s_max=100.0)
    machine.start_pull(spec(0), 0.0)
    (post,) = machine.on_message(PEER, Granted(transfer_id=T1, grants=(grant(0),)), 0.0)
    machine.abort_pull(T1, "cancelled", 0.1)
    assert not [e for e in machine.on_tick(4.0) if isinstance(e, Hangup)]  # the link is slow, the peer is well
    machine.on_received(post.batch.batch, None, 4.5)
    assert not [e for e in machine.on_tick(5.4) if isinstance(e, Hangup)]
    assert [type(e) for e in machine.on_tick(5.5) if isinstance(e, Hangup | Ended)] == [Hangup, Ended]


def test_batches_halve_while_they_take_long_and_grow_again_when_they_do_not() -> None:
    machine = sink(batch_bytes_max=8 * BYTES, batches_per_session_max=1, batch_s_max=1.0)
    machine.start_pull(spec(*range(40)), 0.0)
    effects = machine.on_message(PEER, Granted(transfer_id=T1, grants=tuple(grant(i) for i in range(40))), 0.0)
    now_s, sizes = 0.0, []
    for took_s in (1.5, 1.5, 1.5, 1.5, 0.7, 0.4, 0.4, 0.4, 0.4, 0.4):
        (post,) = [e for e in effects if isinstance(e, Receive)]
        sizes.append(len(post.batch.pieces))
        now_s += took_s
        effects = machine.on_received(post.batch.batch, None, now_s)
    assert sizes == [8, 4, 2, 1, 1, 1, 2, 4, 8, 8]  # never less than a block; 0.7 s is neither long nor short


def test_a_short_last_batch_says_nothing_of_full_ones() -> None:
    machine = sink(batch_bytes_max=8 * BYTES, batches_per_session_max=1, batch_s_max=1.0)
    for number, (took_s, num_blocks) in enumerate(((1.5, 8), (0.1, 1), (0.1, 4), (0.1, 8))):
        transfer_id = TransferId(f"n{number}")
        machine.start_pull(spec(*range(num_blocks), transfer=transfer_id), 10.0 * number)
        grants = tuple(grant(i) for i in range(num_blocks))
        effects = machine.on_message(PEER, Granted(transfer_id=transfer_id, grants=grants), 10.0 * number)
        (post,) = [e for e in effects if isinstance(e, Receive)]
        assert len(post.batch.pieces) == num_blocks
        machine.on_received(post.batch.batch, None, 10.0 * number + took_s)


def test_sessions_take_turns_at_the_nodes_credits() -> None:
    machine = sink(batch_bytes_max=BYTES, batches_per_session_max=1, batches_max=1)
    other = machine.next_session()
    machine.start_pull(spec(0, 1, 2), 0.0)
    machine.start_pull(replace(spec(0, 1, transfer="t2"), source=NodeId("q")), 0.0)
    machine.on_open(SessionId(other + 1), {Tier.DEVICE: SHM}, 0.0)
    order: list[str] = []
    effects: list[Effect] = []
    for session, transfer, count in ((PEER, "t1", 3), (SessionId(other + 1), "t2", 2)):
        grants = tuple(grant(i) for i in range(count))
        effects += machine.on_message(session, Granted(transfer_id=TransferId(transfer), grants=grants), 0.0)
    while posted := [e for e in effects if isinstance(e, Receive)]:
        order.append(posted[0].batch.transfer_id)
        effects = machine.on_received(posted[0].batch.batch, None, 0.0)
    assert order == ["t1", "t2", "t1", "t2", "t1"]


# ---- the source ----


def test_what_is_here_is_granted_and_what_is_not_is_missing_at_once() -> None:
    machine, shelf = source(4, 5)
    effects = machine.on_message(PEER, pull(4, 9, 5), 0.0)
    assert effects[:2] == [
        Stamp(tier=Tier.DEVICE, slot=4, stamp=1),
        Stamp(tier=Tier.DEVICE, slot=5, stamp=2),
    ]
    grants = tuple(
        Grant(index=i, tier=Tier.DEVICE, slot=s, stamp=g, checksum=None, num_bytes=BYTES)
        for i, s, g in ((0, 4, 1), (2, 5, 2))
    )
    assert told(effects) == [
        Granted(transfer_id=T1, grants=grants),
        SourceDone(transfer_id=T1),
        Missing(transfer_id=T1, indices=(1,)),
    ]
    assert shelf.pins == [4, 5]
    assert machine.on_message(PEER, Ack(transfer_id=T1, indices=(0,)), 0.1) == [
        Stamp(tier=Tier.DEVICE, slot=4, stamp=0)
    ]
    assert shelf.pins == [5]
    machine.on_message(PEER, Ack(transfer_id=T1, indices=(2,)), 0.2)
    assert shelf.pins == []
    assert machine.quiescent


def test_checksums_are_computed_once_for_each_content_of_a_slot() -> None:
    machine, _ = source(4)
    (hashing,) = [e for e in machine.on_message(PEER, pull(4, verify=True), 0.0) if isinstance(e, Hash)]
    assert hashing.items == ((0, Tier.DEVICE, 4),)
    (message,) = told(machine.on_hashed(PEER, T1, {0: 77}, 0.0))
    assert isinstance(message, Granted)
    assert message.grants[0].checksum == 77
    machine.on_message(PEER, Ack(transfer_id=T1, indices=(0,)), 0.0)
    again = machine.on_message(PEER, pull(4, verify=True), 1.0)
    assert not [e for e in again if isinstance(e, Hash)]
    assert [m.grants[0].checksum for m in told(again) if isinstance(m, Granted)] == [77]


def test_a_waiting_pull_is_granted_each_block_as_it_is_computed_and_the_tail_at_the_hand_over() -> None:
    machine, shelf = source()
    assert machine.on_message(PEER, pull(4, 5, None, wait=True), 0.0) == []
    shelf.places[name_of(4)] = Place(tier=Tier.DEVICE, slot=4, generation=1)
    (first,) = told(machine.on_ready([name_of(4), name_of(8)], 0.1))
    assert isinstance(first, Granted)
    assert [g.index for g in first.grants] == [0]
    done, tail, missing = told(machine.hand_over(A1, Tail(index=2, slot=30, num_tokens=4), 0.2))
    assert done == SourceDone(transfer_id=T1)
    assert isinstance(tail, Granted)
    assert [(g.index, g.slot) for g in tail.grants] == [(2, 30)]
    assert missing == Missing(transfer_id=T1, indices=(1,))
    last = machine.on_message(PEER, Ack(transfer_id=T1, indices=(0, 2)), 0.3)
    assert [e for e in last if isinstance(e, HandedOver)] == [HandedOver(attempt_id=A1)]
    assert shelf.pins == []


def test_a_pull_that_comes_after_the_hand_over_is_served_from_it() -> None:
    machine, _ = source(4)
    assert machine.hand_over(A1, Tail(index=1, slot=30, num_tokens=4), 0.0) == []
    messages = told(machine.on_message(PEER, pull(4, None, wait=True), 0.1))
    assert [type(m) for m in messages] == [Granted, SourceDone, Granted]
    assert HandedOver(attempt_id=A1) in machine.on_message(PEER, Ack(transfer_id=T1, indices=(0, 1)), 0.2)


def test_a_pull_that_needs_nothing_is_the_hand_over_itself() -> None:
    machine, _ = source()
    assert machine.on_message(PEER, pull(wait=True), 0.0) == []
    assert machine.hand_over(A1, Tail(index=0, slot=30, num_tokens=4), 0.1) == [HandedOver(attempt_id=A1)]


def test_a_withdrawal_is_answered_when_every_reader_has_answered() -> None:
    machine, shelf = source(4)
    machine.on_message(PEER, pull(4, None, wait=True), 0.0)
    assert told(machine.withdraw(A1, 0.1)) == [Abort(transfer_id=T1, reason="the attempt was withdrawn")]
    assert shelf.pins == [4]
    assert machine.on_message(PEER, Aborted(transfer_id=T1), 0.2) == [
        Stamp(tier=Tier.DEVICE, slot=4, stamp=0),
        Withdrawn(attempt_id=A1),
    ]
    assert shelf.pins == []
    assert told(machine.on_message(PEER, pull(4, wait=True), 0.3)) == [
        Abort(transfer_id=T1, reason="the attempt was withdrawn")
    ]


def test_a_withdrawal_without_readers_is_answered_at_once() -> None:
    machine, _ = source()
    assert machine.withdraw(A1, 0.0) == [Withdrawn(attempt_id=A1)]


def test_a_reader_that_does_not_answer_is_hung_up_on_and_its_grants_revoked() -> None:
    machine, shelf = source(4)
    machine.on_message(PEER, pull(4, None, wait=True), 0.0)
    machine.withdraw(A1, 0.0)
    machine.on_message(PEER, Ping(), 4.0)
    assert machine.on_tick(5.9) == []  # a batch that it has in flight comes down within 5 s, and its answer 1 s later
    assert [type(e) for e in machine.on_tick(6.0)] == [Hangup, Stamp, Withdrawn]
    assert shelf.pins == []


def test_a_reader_that_was_granted_nothing_answers_sooner() -> None:
    machine, _ = source()
    machine.on_message(PEER, pull(4, wait=True), 0.0)
    machine.withdraw(A1, 0.0)
    assert machine.on_tick(0.9) == []
    assert [type(e) for e in machine.on_tick(1.0)] == [Hangup, Withdrawn]


def test_a_prompt_is_held_as_long_as_somebody_goes_on_reading_it() -> None:
    machine, shelf = source(4, 5)
    machine.on_message(PEER, replace(pull(4, 5, None, wait=True), deadline_s=1000.0), 0.0)
    machine.hand_over(A1, Tail(index=2, slot=30, num_tokens=4), 0.0)
    machine.on_message(PEER, Ack(transfer_id=T1, indices=(0,)), 29.0)
    machine.on_message(PEER, Ping(), 58.0)
    assert machine.on_tick(58.9) == []
    assert told(machine.on_tick(59.0)) == [Abort(transfer_id=T1, reason="the attempt was withdrawn")]
    assert Withdrawn(attempt_id=A1) in machine.on_message(PEER, Aborted(transfer_id=T1), 59.1)
    assert shelf.pins == []


def test_a_prompt_that_nobody_comes_for_is_withdrawn() -> None:
    machine, _ = source()
    machine.hand_over(A1, Tail(index=0, slot=30, num_tokens=4), 1.0)
    assert machine.on_tick(30.9) == []
    assert machine.on_tick(31.0) == [Withdrawn(attempt_id=A1)]


def test_an_abort_is_acknowledged_after_the_send_that_runs() -> None:
    machine, shelf = source(4)
    machine.on_message(PEER, pull(4), 0.0)
    go = Go(transfer_id=T1, batch=1, group=1, indices=(0,))
    (sending,) = machine.on_message(PEER, go, 0.1)
    assert isinstance(sending, Transmit)
    assert machine.on_message(PEER, Abort(transfer_id=T1, reason="cancelled"), 0.2) == []
    assert shelf.pins == [4]
    assert machine.on_transmitted(PEER, 1, PeerLost("reset"), 0.3) == [
        Stamp(tier=Tier.DEVICE, slot=4, stamp=0),
        Tell(session=PEER, message=Aborted(transfer_id=T1)),
    ]
    assert shelf.pins == []


def test_a_block_that_is_acknowledged_before_its_send_returns_is_held_until_then() -> None:
    machine, shelf = source(4)
    machine.on_message(PEER, pull(4), 0.0)
    machine.on_message(PEER, Go(transfer_id=T1, batch=1, group=1, indices=(0,)), 0.1)
    assert machine.on_message(PEER, Ack(transfer_id=T1, indices=(0,)), 0.2) == []
    assert shelf.pins == [4]
    assert machine.on_transmitted(PEER, 1, None, 0.3) == [Stamp(tier=Tier.DEVICE, slot=4, stamp=0)]
    assert shelf.pins == []
    assert machine.quiescent


def test_a_go_beyond_the_credits_or_for_what_is_not_granted_ends_the_pull() -> None:
    machine, _ = source(4)
    machine.on_message(PEER, pull(4, 9, wait=True), 0.0)
    wrong = machine.on_message(PEER, Go(transfer_id=T1, batch=1, group=1, indices=(1,)), 0.0)
    assert told(wrong) == [Abort(transfer_id=T1, reason="GO for block 1, which is not granted")]


def test_a_source_that_learns_late_that_its_sends_are_over_takes_the_next_credits() -> None:
    """The sink has two batches at most outstanding; it has these, and says so, before their senders' threads do."""
    machine, _ = source(0, 1, 2, 3, 4)
    machine.on_message(PEER, pull(0, 1, 2, 3, 4), 0.0)
    for batch in range(4):
        (sending,) = machine.on_message(PEER, Go(transfer_id=T1, batch=batch, group=1, indices=(batch,)), 0.1)
        assert isinstance(sending, Transmit)
        assert told(machine.on_message(PEER, Ack(transfer_id=T1, indices=(batch,)), 0.1)) == []
    flood = machine.on_message(PEER, Go(transfer_id=T1, batch=4, group=1, indices=(4,)), 0.1)
    assert told(flood) == [Abort(transfer_id=T1, reason="more GO credits than agreed")]


def test_a_slot_granted_twice_is_free_after_the_second_acknowledgement() -> None:
    machine, shelf = source(4)
    other = SessionId(machine.next_session())
    machine.on_accepted(other, NodeId("d2"), Epoch("e"), 0.0)
    machine.on_message(PEER, pull(4), 0.0)
    machine.on_message(other, pull(4), 0.0)
    assert machine.on_message(PEER, Ack(transfer_id=T1, indices=(0,)), 0.1) == []
    assert shelf.pins == [4]
    assert machine.on_lost(other, PeerLost("reset"), 0.2) == [Stamp(tier=Tier.DEVICE, slot=4, stamp=0)]
    assert shelf.pins == []


def test_a_new_stream_of_a_node_fences_its_old_one() -> None:
    machine, shelf = source(4)
    machine.on_message(PEER, pull(4), 0.0)
    newer = machine.next_session()
    effects = machine.on_accepted(newer, NodeId("d"), Epoch("e-next"), 0.1)
    assert [type(e) for e in effects] == [Hangup, Stamp]
    assert shelf.pins == []
    assert machine.counts()["sessions_fenced"] == 1
    assert machine.on_message(PEER, pull(4), 0.2) == []


def test_the_sources_deadline_strikes_after_the_sinks() -> None:
    machine, _ = source()
    machine.on_message(PEER, pull(4, wait=True), 0.0)
    machine.on_message(PEER, Ping(), 9.0)
    assert machine.on_tick(10.5) == []
    machine.on_message(PEER, Ping(), 10.9)
    assert told(machine.on_tick(11.0)) == [Abort(transfer_id=T1, reason="the deadline passed at the source")]


def test_a_pull_that_asks_for_a_block_twice_is_refused() -> None:
    machine, _ = source(4)
    assert told(machine.on_message(PEER, pull(4, 4), 0.0)) == [Abort(transfer_id=T1, reason="a block is wanted twice")]
