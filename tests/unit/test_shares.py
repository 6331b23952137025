"""Whose turn it is among those who wait: chances by size, classes, claims; and that nobody starves."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.admission_config import AdmissionConfig
from conductor.admission_policies import admission_named
from conductor.config import ConductorConfig
from conductor.shares import SizeShares, size_class
from conductor.view import ClusterView
from conductor.waiting import Line, WaitingRoom, seniority
from halfmoon.types import RequestId
from tests.conductor_kit import Play, prompt, spec

CONFIG = AdmissionConfig(priority_step_s=10.0, patience_s=30.0)


def empty_room(config: AdmissionConfig = CONFIG) -> WaitingRoom:
    return WaitingRoom(ClusterView(ConductorConfig()), config)


def drained(room: WaitingRoom, now_s: float) -> list[RequestId]:
    """All who wait, as if each in its turn came in and shares stayed as they are. Modifies `room`."""
    order = []
    while (line := room.next_line(now_s, set())) is not None:
        order.append(room.first(line, now_s))
        room.discard(order[-1])
    return order


# ---- chances by size ----


def dealt(size_fairness: float, sizes: dict[int, int], share_taken: float, seed: int = 1) -> dict[int, float]:
    """Requests of some sizes (tokens: how many) come in random order; there is room for a share of their tokens.

    Of two that compete each time the one further behind comes in, if there is room. Share let in, by size.
    """
    random, shares = Random(seed), SizeShares(size_fairness)
    stream = [size for size, count in sizes.items() for _ in range(count)]
    random.shuffle(stream)
    taken, room = dict.fromkeys(sizes, 0), 0.0
    waiting: list[int] = []
    for size in stream:
        room += size * share_taken
        waiting.append(size)
        if len(waiting) < 40:
            continue
        first = max(waiting, key=lambda s: shares.lag(size_class(s)))
        while waiting and room >= first:
            room -= first
            waiting.remove(first)
            taken[first] += 1
            shares.see(size_class(first), let_in=True)
            first = max(waiting, key=lambda s: shares.lag(size_class(s)), default=0)
        if len(waiting) >= 40:
            shares.see(size_class(waiting.pop(0)), let_in=False)
    return {size: taken[size] / count for size, count in sizes.items()}


SIZES = {1000: 2000, 4000: 1500, 16000: 750, 64000: 200}


def test_with_full_fairness_every_size_has_the_same_chance() -> None:
    shares = dealt(1.0, SIZES, 0.4)
    assert max(shares.values()) - min(shares.values()) < 0.1


def test_with_half_of_it_every_token_has_the_same_chance() -> None:
    """-ln p is in proportion to size: of 16,000 tokens as of four times 4,000."""
    shares = dealt(0.5, SIZES, 0.4)
    assert shares[1000] > shares[4000] > shares[16000] > shares[64000] > 0.0
    assert shares[16000] == pytest.approx(shares[4000] ** 4, abs=0.1)


def test_between_the_two_it_lies_between() -> None:
    low, mid, high = (dealt(fairness, SIZES, 0.4)[64000] for fairness in (0.5, 0.75, 1.0))
    assert low < mid < high


def test_what_is_not_known_lags_behind_nobody_and_what_was_long_ago_fades() -> None:
    shares = SizeShares(0.0)
    assert (shares.share(10), shares.lag(10)) == (1.0, 0.0)
    for _ in range(1000):
        shares.see(10, let_in=False)
    assert shares.share(10) < 0.01
    for _ in range(8000):
        shares.see(10, let_in=True)
    assert 0.9 < shares.share(10) <= 1.0


# ---- whose turn it is ----


def test_the_higher_class_goes_first_and_then_the_size_that_lags() -> None:
    room = empty_room()
    room.shares.see(12, let_in=False)
    for name, line in (("a", Line(0, 10)), ("b", Line(0, 12)), ("c", Line(1, 10)), ("d", Line(-1, 12))):
        room.add(RequestId(name), line, 0.0, 60.0)
    assert room.next_line(1.0, set()) == Line(1, 10)
    assert room.next_line(1.0, {Line(1, 10)}) == Line(0, 12)
    assert drained(room, 1.0) == ["c", "b", "a", "d"]


def test_the_newest_of_a_line_goes_first_until_the_oldest_is_overdue() -> None:
    room = empty_room()
    for name, arrived_s in (("old", 0.0), ("mid", 10.0), ("new", 20.0)):
        room.add(RequestId(name), Line(0, 10), arrived_s, arrived_s + 60.0)
    assert room.first(Line(0, 10), 29.9) == "new"
    assert room.first(Line(0, 10), 30.0) == "old"
    assert drained(room, 30.0) == ["old", "new", "mid"]


def test_who_is_overdue_goes_before_all_who_are_not() -> None:
    room = empty_room()
    room.shares.see(12, let_in=False)
    room.add(RequestId("low"), Line(-1, 10), 0.0, 60.0)
    room.add(RequestId("new"), Line(1, 12), 39.0, 99.0)
    assert room.next_line(39.9, set()) == Line(1, 12)
    assert drained(room, 40.0) == ["low", "new"]  # 30 s, and 10 s for its class


@given(st.data())
def test_the_overdue_are_overtaken_by_their_seniors_only(data: st.DataObject) -> None:
    """Whatever the shares are: so a bounded set goes before it, since who comes later is the junior in the end."""
    room = empty_room()
    for _ in range(data.draw(st.integers(0, 30))):
        room.shares.see(data.draw(st.integers(8, 12)), let_in=data.draw(st.booleans()))
    known: dict[RequestId, float] = {}
    for i in range(data.draw(st.integers(1, 20))):
        line = Line(data.draw(st.integers(-2, 2)), data.draw(st.integers(8, 12)))
        arrived_s = data.draw(st.floats(0.0, 100.0))
        known[RequestId(f"r{i}")] = seniority(arrived_s, line.priority, CONFIG)
        room.add(RequestId(f"r{i}"), line, arrived_s, arrived_s + 60.0)
    first = room.next_line(100.0, set())
    assert first is not None
    order = [room.first(first, 100.0)]
    room.discard(order[0])
    order += drained(room, 100.0)
    assert sorted(order) == sorted(known)
    for i, name in enumerate(order):
        if known[name] <= 100.0 - CONFIG.patience_s:
            assert all(known[before] <= known[name] for before in order[:i])


@pytest.mark.parametrize("seed", range(5))
def test_the_waiting_room_is_a_sorted_list(seed: int) -> None:
    random, room, twin = Random(seed), empty_room(), dict[RequestId, float]()
    for _ in range(300):
        name = RequestId(f"r{random.randrange(20)}")
        if name in twin:
            assert room.discard(name)
            del twin[name]
        else:
            twin[name] = float(random.randrange(8))
            room.add(name, Line(0, 10), twin[name], 60.0)
        assert not room.discard(RequestId("nobody"))
    order = drained(room, 100.0)  # when all are overdue
    assert order == sorted(twin, key=twin.__getitem__)  # both stable: by coming


def test_a_line_that_grows_old_is_behind_before_any_of_it_is_rejected() -> None:
    room = empty_room(AdmissionConfig(size_fairness=1.0))
    room.add(RequestId("a"), Line(0, 10), 0.0, 20.0)
    room.add(RequestId("b"), Line(0, 12), 4.0, 14.0)
    room.add(RequestId("c"), Line(0, 12), 4.0, 24.0)
    assert (room.losing(10, 4.0), room.losing(12, 4.0)) == (pytest.approx(0.2), pytest.approx(0.0))
    assert room.next_line(4.0, set()) == Line(0, 10)
    assert (room.losing(10, 14.0), room.losing(12, 14.0)) == (pytest.approx(0.7), pytest.approx(1.5))
    assert room.next_line(14.0, set()) == Line(0, 12)
    room.discard(RequestId("b"))
    assert room.losing(12, 14.0) == pytest.approx(0.5)
    room.discard(RequestId("c"))
    assert room.losing(12, 14.0) == 0.0


# ---- the whole machine ----


@pytest.mark.parametrize("priority", [0, -1])
@pytest.mark.parametrize("fairness", [0.0, 1.0])
def test_a_long_one_gets_room_against_an_endless_stream_of_short_ones(priority: int, fairness: float) -> None:
    """It needs most of the only decode worker, which short ones of a higher class fill as fast as it is freed."""
    admission = AdmissionConfig(size_fairness=fairness, patience_s=5.0, priority_step_s=2.0)
    play = Play("", admission=admission_named("forecast", admission))
    play.join("p0", num_device_blocks=1000)
    play.join("d0", num_device_blocks=10)
    play.now_s = 200.0
    running: dict[str, float] = {}
    begun: list[str] = []

    def see(told: list[str]) -> None:
        for line in told:
            if line.startswith("begin "):
                name = line.removeprefix("begin ").removesuffix("#1")
                begun.append(name)
                play.reserved("d0", f"{name}#1")
                play.prefilled("p0", f"{name}#1")
                play.joined("d0", f"{name}#1")
                running[name] = play.now_s + 1.0

    for i in range(200):
        if i == 5:
            see(play.request(replace(spec("long", tokens=prompt(100)), priority=priority)))
        see(play.request(spec(f"s{i}", tokens=prompt(17, seed=i), max_tokens=4)))
        see(play.wait(0.1))
        for name in [name for name, end_s in running.items() if end_s <= play.now_s]:
            del running[name]
            see(play.ended("d0", f"{name}#1"))
            see(play.finished_stream(name))
        if "long" in begun:
            break
    assert "long" in begun
    assert play.now_s - 200.5 < 5.0 + 2.0 * -priority + 3.0  # patience, its class, and what runs ends
