"""Placement: filter, score in seconds, pick. Tables over hand-made views; a token costs 1 ms, a block 1 ms to move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from conductor.config import ConductorConfig
from conductor.effects import Slo
from conductor.policy import LeastTtft, Placement, place, place_decode
from conductor.prefix_index import PrefixIndex
from conductor.scoring import Query
from conductor.view import ClusterView, DecodeBook, SendingBook, Worker
from core.messages import BlockCopy, LoadReport
from halfmoon.types import AttemptId, NodeId, RequestId, Tier
from tests.conductor_kit import BLOCK_BYTES, BLOCK_SIZE, PRIOR, attempt_of, chain, info, prompt

CONFIG = ConductorConfig(prior=PRIOR, suspect_s=1e6, silent_s=2e6)
NOW_S = 1000.0
TOKENS = prompt(161)  # ten full blocks and one token


class Scene:
    """Workers by name, each with `cached` leading blocks of TOKENS, `queue_s` booked and `sending` bytes."""

    def __init__(self, config: ConductorConfig = CONFIG) -> None:
        self.config = config
        self.view = ClusterView(config)
        self.index = PrefixIndex()

    def add(
        self,
        name: str,
        *,
        cached: int = 0,
        queue_s: float = 0.0,
        sending: int = 0,
        batch: int = 0,
        kv_tokens: int = 0,
        blocks: int = 0,
        ready_s: float = 0.0,
        **changes: object,
    ) -> Worker:
        worker = self.view.join(info(name, **changes), 0.0)
        worker.ready_s = ready_s
        self.index.join(worker.node_id)
        copies = [BlockCopy(block_hash=h, tier=Tier.DEVICE) for h in chain(TOKENS)[:cached]]
        self.index.on_snapshot(worker.node_id, 0, copies)
        if queue_s:
            worker.book_prefill(attempt_of(f"{name}queue#1"), queue_s, NOW_S)
        if sending:
            worker.book_sending(attempt_of(f"{name}send#1"), "fetch", SendingBook(sending, 0.0, math.inf))
        for i in range(batch):
            book = DecodeBook(kv_tokens // batch, blocks // batch)
            worker.book_decode(AttemptId(RequestId(f"{name}batch{i}"), 1), book)
        return worker

    def query(self, *, slo: Slo | None = None, num_tokens: int = 161, max_tokens: int = 8, **changes: object) -> Query:
        fields: dict[str, object] = {
            "num_tokens": num_tokens,
            "hashes": chain(TOKENS)[: (num_tokens - 1) // BLOCK_SIZE],
            "tokens_max": num_tokens + max_tokens,
            "output_tokens": max_tokens,
            "slo": slo or Slo(),
            "block_size": BLOCK_SIZE,
            "block_bytes": BLOCK_BYTES,
        }
        return Query(**{**fields, **changes})  # type: ignore[arg-type]

    def place(self, **query: object) -> Placement | None:
        return place(self.query(**query), self.view, self.index, LeastTtft(), self.config, NOW_S)  # type: ignore[arg-type]

    def picked(self, **query: object) -> tuple[str, str] | None:
        placement = self.place(**query)
        return placement and (placement.option.prefill.node_id, placement.option.decode.node_id)


def test_every_term_is_in_seconds_and_they_add_up() -> None:
    scene = Scene()
    scene.add("p0", cached=4, queue_s=0.5)
    scene.add("p1", cached=10, queue_s=2.0, sending=3 * BLOCK_BYTES)
    scene.add("d0")
    placement = scene.place()
    assert placement is not None
    p0, p1 = placement.prefill_scores
    assert (p0.hit_blocks, p0.fetch_blocks, p0.source) == (4, 6, "p1")
    assert p0.queue_s == pytest.approx(0.5)
    assert p0.fetch_s == pytest.approx(0.001 + 0.006 + 0.003)  # six blocks behind three
    assert p0.prefill_s == pytest.approx(0.01 + 0.001)
    assert p0.ttft_s == pytest.approx(p0.queue_s + p0.fetch_s + p0.prefill_s)
    assert (p1.ttft_s, p1.source) == (pytest.approx(2.011), None)
    assert placement.option.prefill is p0


@pytest.mark.parametrize(
    ("why", "own", "remote", "sending", "fetched"),
    [
        ("nothing anywhere", 0, 0, 0, 0),
        ("all of it is elsewhere", 0, 10, 0, 10),
        ("a little more elsewhere, still cheaper to move", 9, 10, 0, 1),
        ("as much here as there", 10, 10, 0, 0),
        ("more here than there", 10, 4, 0, 0),
        ("the sender is too busy", 0, 10, 200 * BLOCK_BYTES, 0),
    ],
)
def test_a_prefix_is_fetched_only_when_that_beats_computing_it(
    why: str, own: int, remote: int, sending: int, fetched: int
) -> None:
    scene = Scene()
    scene.add("p0", cached=own)
    scene.add("p1", cached=remote, sending=sending, queue_s=9.0)
    scene.add("d0")
    placement = scene.place()
    assert placement is not None
    assert placement.option.prefill.node_id == "p0", why
    assert placement.option.prefill.fetch_blocks == fetched, why


def test_a_shorter_copy_at_a_free_sender_beats_a_longer_one_at_a_busy_sender() -> None:
    scene = Scene()
    scene.add("p0")
    scene.add("p1", cached=10, sending=500 * BLOCK_BYTES, queue_s=9.0)
    scene.add("p2", cached=9, queue_s=9.0)
    scene.add("d0", cached=3)
    placement = scene.place()
    assert placement is not None
    assert (placement.option.prefill.source, placement.option.prefill.fetch_blocks) == ("p2", 9)


def test_decode_workers_hold_prefixes_worth_fetching_too() -> None:
    scene = Scene()
    scene.add("p0")
    scene.add("d0", cached=10)
    placement = scene.place()
    assert placement is not None
    assert placement.option.prefill.source == "d0"


def test_the_least_ttft_wins_and_ties_go_by_name() -> None:
    scene = Scene()
    for name, queue_s in (("p2", 0.0), ("p1", 0.0), ("p0", 0.3)):
        scene.add(name, queue_s=queue_s)
    scene.add("d1")
    scene.add("d0")
    assert scene.picked() == ("p1", "d0")


@pytest.mark.parametrize(
    ("why", "d0", "d1", "picked"),
    [
        ("fewer sequences", {"batch": 8, "kv_tokens": 800}, {"batch": 2, "kv_tokens": 200}, "d1"),
        ("more room", {"batch": 2, "blocks": 900}, {"batch": 8, "blocks": 100}, "d1"),
        ("a cached prefix decides between equals", {}, {"cached": 8}, "d1"),
        ("but not between unequal loads", {}, {"cached": 8, "batch": 16}, "d0"),
        ("its batch is full", {"sequences_max": 1, "batch": 1}, {"batch": 20}, "d1"),
        ("the request does not fit", {"num_device_blocks": 5}, {"batch": 20}, "d1"),
    ],
)
def test_the_decode_worker_with_the_lowest_load_is_picked(
    why: str, d0: dict[str, object], d1: dict[str, object], picked: str
) -> None:
    scene = Scene()
    scene.add("p0")
    scene.add("d0", **d0)  # type: ignore[arg-type]
    scene.add("d1", **d1)  # type: ignore[arg-type]
    assert scene.picked() == ("p0", picked), why


def test_without_a_limit_between_tokens_room_says_who_is_less_loaded() -> None:
    scene = Scene(replace(CONFIG, slo=Slo()))
    scene.add("p0")
    scene.add("d0", batch=8, blocks=100)
    scene.add("d1")
    assert scene.picked() == ("p0", "d1")


def test_coupled_workers_compete() -> None:
    scene = Scene()
    scene.add("p0", queue_s=0.2)
    scene.add("d0")
    scene.add("c0")
    assert scene.picked() == ("c0", "c0")
    scene.view.get(NodeId("c0")).book_prefill(attempt_of("x#1"), 0.3, NOW_S)  # type: ignore[union-attr]
    assert scene.picked() == ("p0", "d0")


def test_a_coupled_worker_pays_for_mixing_with_its_own_decode_steps() -> None:
    scene = Scene()
    scene.add("c0", batch=4, kv_tokens=4000, queue_s=0.1)
    placement = scene.place(num_tokens=1025)
    assert placement is not None
    step_s = 0.02 + 4 * 1e-3 + 4000 * 1e-9
    assert placement.option.prefill.mixing_s == pytest.approx(3 * step_s)  # 1025 tokens take three passes
    assert placement.option.decode.stall_s == pytest.approx(0.1)


def test_an_overloaded_decode_side_loses_to_a_later_first_token() -> None:
    scene = Scene()
    scene.add("c0", batch=30, sequences_max=30)
    scene.add("p0", queue_s=1.0)
    scene.add("d0")
    assert scene.picked() == ("p0", "d0")


def test_without_one_of_the_pools_only_coupled_workers_serve() -> None:
    scene = Scene()
    scene.add("p0")
    assert scene.picked() is None
    scene.add("c0", queue_s=5.0)
    assert scene.picked() == ("c0", "c0")


def test_who_refused_is_not_asked_again() -> None:
    scene = Scene()
    scene.add("p0")
    scene.add("p1", queue_s=5.0)
    scene.add("d0")
    scene.add("d1", batch=9)
    assert scene.picked(excluded=frozenset({NodeId("p0"), NodeId("d0")})) == ("p1", "d1")
    query = scene.query(excluded=frozenset({NodeId("d0")}))
    score = place_decode(query, scene.view, scene.index, LeastTtft(), CONFIG, NOW_S)
    assert score is not None
    assert score.node_id == "d1"
    query = scene.query(excluded=frozenset({NodeId("d0"), NodeId("d1")}))
    assert place_decode(query, scene.view, scene.index, LeastTtft(), CONFIG, NOW_S) is None


def test_a_newcomer_is_not_flooded_and_grows_up() -> None:
    config = ConductorConfig(prior=PRIOR, suspect_s=1e6, silent_s=2e6, slow_start_s=10.0, young_attempts=2)
    scene = Scene(config)
    scene.add("p0", queue_s=0.2)
    newcomer = scene.add("p1", ready_s=NOW_S)
    scene.add("d0")
    picked = []
    for i in range(4):
        placement = scene.place()
        assert placement is not None
        picked.append(placement.option.prefill.node_id)
        if picked[-1] == "p1":
            newcomer.book_prefill(attempt_of(f"n#{i}"), 0.001, NOW_S)
    assert picked == ["p1", "p1", "p0", "p0"]
    assert [newcomer.young(NOW_S + age_s, config) for age_s in (0.0, 1.9, 2.1, 10.0)] == [True, False, False, False]


def test_when_all_are_young_nobody_is_kept_waiting() -> None:
    scene = Scene()
    scene.add("p0", ready_s=NOW_S, queue_s=1.0).book_prefill(attempt_of("n#1"), 1.0, NOW_S)
    scene.add("d0", ready_s=NOW_S, batch=2)
    assert scene.picked() == ("p0", "d0")


# ---- the books behind it ----


def test_the_queue_shrinks_as_its_head_runs_and_empties_exactly() -> None:
    worker = Scene().add("p0")
    worker.book_prefill(attempt_of("a#1"), 0.3, 10.0)
    worker.book_prefill(attempt_of("b#1"), 0.1, 10.0)
    assert worker.queue_s(10.0) == pytest.approx(0.4)
    assert worker.queue_s(10.2) == pytest.approx(0.2)
    assert worker.queue_s(99.0) == pytest.approx(0.1)  # the head is late: believed to end now
    assert worker.release_prefill(attempt_of("a#1"), 11.0)
    assert not worker.release_prefill(attempt_of("a#1"), 11.0)
    assert worker.queue_s(11.05) == pytest.approx(0.05)
    worker.release_prefill(attempt_of("b#1"), 12.0)
    assert worker.books().empty


def test_the_batch_counts_what_is_booked_and_what_is_reported_but_nothing_twice() -> None:
    worker = Scene().add("d0")
    worker.book_decode(attempt_of("a#1"), DecodeBook(100, 7))
    worker.book_decode(attempt_of("b#1"), DecodeBook(50, 4))
    assert (worker.batch, worker.kv_tokens, worker.decode_blocks) == (2, 150, 11)
    worker.join_decode(attempt_of("a#1"))
    worker.load = LoadReport(running_sequences=1, kv_tokens=120)  # it has grown
    assert (worker.batch, worker.kv_tokens) == (2, 170)
    worker.release_decode(attempt_of("a#1"))
    worker.release_decode(attempt_of("b#1"))
    assert worker.books().empty


def test_what_was_learned_survives_a_restart_and_helps_newcomers() -> None:
    scene = Scene()
    worker = scene.add("p0")
    cost = worker.cost
    scene.view.remove(worker.node_id, 5.0)
    assert scene.view.join(info("p0@2"), 6.0).cost is cost


def test_a_pool_is_returning_for_a_while_after_its_last_worker_left() -> None:
    scene = Scene()
    scene.add("d0")
    assert not scene.view.returning(NOW_S)
    scene.view.remove(NodeId("d0"), NOW_S)
    assert scene.view.returning(NOW_S + 14.0)
    assert not scene.view.returning(NOW_S + 16.0)
