"""Every placement policy on the same scenes: what each looks at, and what it does not. A token costs 1 ms, a block 1 ms
to move: computing a block anew takes 16 ms."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from conductor.config import ConductorConfig, PlacementName
from conductor.policy import LeastTtft, Mooncake, Placement, Random, RoundRobin, place, placement_policy
from conductor.scoring import PrefillScore
from conductor.view import SendingBook
from core.cost import CostPrior
from core.messages import BlockCopy, KvEvents
from halfmoon.errors import ConfigError
from halfmoon.types import NodeId, Tier
from service.settings import load
from tests.conductor_kit import BLOCK_BYTES, PRIOR, Play, attempt_of, chain, prompt, spec
from tests.unit.test_placement import CONFIG, NOW_S, TOKENS, Scene

NAMES = [name.value for name in PlacementName]


def configured(name: str, **changes: object) -> ConductorConfig:
    fields: dict[str, object] = {"suspect_s": 1e6, "silent_s": 2e6, "placement": name, **changes}
    return load(ConductorConfig, {**fields, "prior": PRIOR}, path="conductor")


def placed(scene: Scene, name: str, **changes: object) -> PrefillScore:
    config = configured(name, **changes)
    placement = place(scene.query(), scene.view, scene.index, placement_policy(config), config, NOW_S)
    assert placement is not None
    return placement.option.prefill


def hot_and_cold() -> Scene:
    """p0 has the prefix and a queue; p1 half of it and a shorter queue; p2 nothing and nothing to do."""
    scene = Scene()
    scene.add("p0", cached=10, queue_s=0.5)
    scene.add("p1", cached=4, queue_s=0.05)
    scene.add("p2", queue_s=0.06)
    scene.add("d0")
    return scene


@pytest.mark.parametrize(
    ("name", "node", "hit_blocks", "fetch_blocks"),
    [
        ("algorithm1", "p1", 4, 6),  # 50 + 7 to fetch + 11 < 60 + 11 + 11 < 500 + 11
        ("mooncake", "p1", 4, 6),
        ("local_prefix", "p1", 4, 0),  # 50 + 107 < 60 + 171
        ("least_loaded", "p1", 4, 0),
        ("round_robin", "p0", 10, 0),
    ],
)
def test_what_each_policy_picks_for_a_hot_prefix(name: str, node: str, hit_blocks: int, fetch_blocks: int) -> None:
    score = placed(hot_and_cold(), name)
    assert (score.node_id, score.hit_blocks, score.fetch_blocks) == (node, hit_blocks, fetch_blocks)


def test_local_prefix_waits_for_the_holder_when_that_is_quicker_than_computing() -> None:
    scene = Scene()
    scene.add("p0", cached=10, queue_s=0.1)
    scene.add("p1")
    scene.add("d0")
    assert placed(scene, "local_prefix").node_id == "p0"  # 100 + 11 < 171
    assert placed(scene, "least_loaded").node_id == "p1"
    assert placed(scene, "algorithm1").node_id == "p1"  # 11 to fetch + 11


def test_least_loaded_ignores_prefixes_but_uses_those_that_are_there() -> None:
    scene = hot_and_cold()
    scene.view.get(NodeId("p1")).book_prefill(attempt_of("more#1"), 0.2, NOW_S)  # type: ignore[union-attr]
    assert placed(scene, "least_loaded").node_id == "p2"
    scene.view.get(NodeId("p2")).book_prefill(attempt_of("more#1"), 9.0, NOW_S)  # type: ignore[union-attr]
    score = placed(scene, "least_loaded")
    assert (score.node_id, score.hit_blocks, score.prefill_s) == ("p1", 4, pytest.approx(0.01 + 0.097))


@pytest.mark.parametrize(
    ("why", "threshold", "own", "remote", "fetched"),
    [
        ("twice as long is not more than twice", 2.0, 5, 10, False),
        ("a little over twice", 2.0, 4, 10, True),
        ("nothing here: infinitely longer", 2.0, 0, 1, True),
        ("nothing anywhere: a ratio of one", 1.0, 0, 0, False),
        ("as long here as there", 1.0, 10, 10, False),
        ("the paper's rule looks at lengths, not at seconds", 1.0, 9, 10, True),
    ],
)
def test_the_ratio_test(why: str, threshold: float, own: int, remote: int, fetched: bool) -> None:
    assert Mooncake(threshold).fetches(own, remote, 9.0, 1.0) is fetched, why


def test_the_ratio_test_fetches_from_a_busy_sender_where_seconds_would_not() -> None:
    scene = Scene()
    scene.add("p0")
    scene.add("p1", cached=10, sending=500 * BLOCK_BYTES, queue_s=9.0)
    scene.add("d0")
    assert placed(scene, "mooncake").fetch_blocks == 10
    assert placed(scene, "algorithm1").fetch_blocks == 0


def test_round_robin_goes_through_the_names_whoever_comes_and_goes() -> None:
    scene = Scene()
    for name in ("p2", "p0", "d0", "p1"):
        scene.add(name)
    policy = RoundRobin()

    def next_node() -> str:
        placement = place(scene.query(), scene.view, scene.index, policy, CONFIG, NOW_S)
        assert placement is not None
        return placement.option.prefill.node_id

    assert [next_node() for _ in range(4)] == ["p0", "p1", "p2", "p0"]
    scene.view.remove(NodeId("p1"), NOW_S)
    assert [next_node() for _ in range(3)] == ["p2", "p0", "p2"]


def test_random_gives_each_the_same_chance_and_the_same_seed_the_same_choices() -> None:
    workers = [Scene().add(f"p{i}") for i in (2, 0, 1)]

    def choices(seed: int) -> list[str]:
        policy = Random(seed)
        return [policy.shortlist(workers, NOW_S)[0].node_id for _ in range(3000)]

    assert choices(1) == choices(1) != choices(2)
    counts = Counter(choices(1))
    assert sorted(counts) == ["p0", "p1", "p2"]
    assert all(900 < count < 1100 for count in counts.values()), counts


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_is_reached_by_its_name_and_written_into_the_record(name: str) -> None:
    play = Play("p0 p1 d0 d1", placement=PlacementName(name))
    play.request(spec("r", tokens=prompt(200)))
    record = play.machine.explain(attempt_of("r#1").request_id)
    assert record is not None
    assert record.policy == name
    assert len(record.choices) == 1
    choice = record.choices[0]
    assert choice.prefill_node in [score.node_id for score in choice.prefill_scores]
    assert choice.decode_node == "d0"


@pytest.mark.parametrize("name", NAMES)
def test_coupled_workers_are_among_the_candidates_of_every_policy(name: str) -> None:
    scene = Scene()
    scene.add("c0")
    scene.add("p0")  # without a decode worker it serves nobody
    assert placed(scene, name).node_id == "c0"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("placement", "fastest"),
        ("balancing_threshold", 0.5),
        ("balancing_threshold", float("nan")),
        ("copies_share_max", 1.5),
        ("copies_share_max", 0.0),
        ("prior", {"prefill": [0.01, -1.0, 1e-7]}),
        ("prior", {"decode": [0.01, 1e-3]}),
        ("prior", {"transfer": [float("inf"), 1e-9]}),
        ("priors", {"trainer": {}}),
        ("priors", {"decode": {"decode": [0.0, 1e-3, 1e-6]}}),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        load(ConductorConfig, {field: value}, path="conductor")
    assert refused.value.key.startswith(f"conductor.{field}")


def test_a_profile_by_role_is_what_a_new_worker_is_believed_to_cost() -> None:
    slow = CostPrior(prefill=(0.5, 1e-3, 1e-12))
    scene = Scene(ConductorConfig(prior=PRIOR, priors={"coupled": slow}, suspect_s=1e6, silent_s=2e6))
    assert scene.add("c0").cost.prefill_s(100, 0).seconds == pytest.approx(0.6)
    assert scene.add("p0").cost.prefill_s(100, 0).seconds == pytest.approx(0.11)


# ---- copies: capped, and priced by tier ----


def copying(share: float) -> tuple[Scene, ConductorConfig]:
    """p0 holds two prefixes' worth and is busy; p1 is empty, of 40 blocks."""
    config = ConductorConfig(prior=PRIOR, suspect_s=1e6, silent_s=2e6, copies_share_max=share, copies_window_s=10.0)
    scene = Scene(config)
    scene.add("p0", cached=10, queue_s=99.0)
    scene.add("p1", num_device_blocks=40)
    scene.add("d0")
    return scene, config


def copied(scene: Scene, config: ConductorConfig, now_s: float) -> Placement:
    placement = place(scene.query(), scene.view, scene.index, LeastTtft(), config, now_s)
    assert placement is not None
    score = placement.option.prefill
    worker = scene.view.get(score.node_id)
    assert worker is not None
    if score.fetch_blocks:
        worker.book_copy(score.fetch_blocks, now_s, config)
    return placement


def test_the_cap_on_copies_lets_a_pool_be_filled_at_a_rate_and_no_faster() -> None:
    scene, config = copying(share=0.5)  # 20 blocks in 10 s
    fetched = [copied(scene, config, NOW_S).option.prefill.fetch_blocks for _ in range(3)]
    assert fetched == [10, 10, 0]
    refused = copied(scene, config, NOW_S)
    assert refused.option.prefill.capped
    assert refused.capped
    assert refused.option.prefill.prefill_s == pytest.approx(0.01 + 0.161)  # computed instead
    assert copied(scene, config, NOW_S + 4.9).option.prefill.fetch_blocks == 0
    later = copied(scene, config, NOW_S + 5.1)
    assert (later.option.prefill.fetch_blocks, later.capped) == (10, False)


def test_a_prefix_longer_than_the_share_may_still_be_fetched_once() -> None:
    scene, config = copying(share=0.1)
    fetched = [copied(scene, config, NOW_S + at_s).option.prefill.fetch_blocks for at_s in (0.0, 1.0, 20.0, 30.0)]
    assert fetched == [10, 0, 0, 10]  # 4 blocks in 10 s: ten are forgotten after 25


def test_what_the_cap_refuses_goes_elsewhere_if_that_is_quicker() -> None:
    scene, config = copying(share=0.1)
    scene.add("p2", queue_s=0.1)
    scene.view.get(NodeId("p1")).book_copy(10, NOW_S, config)  # type: ignore[union-attr]
    placement = copied(scene, config, NOW_S)
    assert (placement.option.prefill.node_id, placement.option.prefill.fetch_blocks) == ("p2", 10)
    assert placement.capped  # p1 had promised less


def test_the_machine_counts_what_the_cap_refused() -> None:
    play = Play("p1 d0", copies_share_max=0.005, copies_window_s=100.0)  # 5 of 1000 blocks
    play.join("p0", chain(TOKENS)[:10])
    play.machine._desk.view.get(NodeId("p0")).book_prefill(attempt_of("busy#1"), 999.0, 100.0)  # type: ignore[union-attr]
    play.now_s += 100.0
    for i in range(3):
        play.request(spec(f"r{i}", tokens=TOKENS))
    assert play.counter("copies_capped") == 2


def tiered(tier: Tier, cached: int, holder: str = "p0") -> Scene:
    scene = Scene()
    worker = scene.add(holder)
    scene.add("d0")
    copies = tuple(BlockCopy(block_hash=h, tier=tier) for h in chain(TOKENS)[:cached])
    scene.index.on_events(worker.node_id, KvEvents(event_id=1, stored=copies))
    return scene


@pytest.mark.parametrize(
    ("tier", "read_s"), [(Tier.DEVICE, 0.0), (Tier.DRAM, 2e-4 + 10 * 1e-4), (Tier.SSD, 1e-3 + 10 * 5e-4)]
)
def test_own_hits_cost_their_way_into_device(tier: Tier, read_s: float) -> None:
    score = placed(tiered(tier, cached=10), "algorithm1")
    assert (score.hit_blocks, score.read_s) == (10, pytest.approx(read_s))
    assert score.ttft_s == pytest.approx(0.011 + read_s)


def test_a_sender_reads_what_it_has_in_dram_before_it_sends() -> None:
    scene = tiered(Tier.DRAM, cached=10, holder="p1")
    scene.view.get(NodeId("p1")).book_prefill(attempt_of("busy#1"), 9.0, NOW_S)  # type: ignore[union-attr]
    scene.add("p0", cached=4)
    score = placed(scene, "algorithm1")
    assert (score.node_id, score.source, score.read_s) == ("p0", "p1", 0.0)
    assert score.fetch_s == pytest.approx(0.001 + 0.006 + 2e-4 + 6 * 1e-4)


# ---- senders, hand-over ----


def test_bytes_in_flight_leave_evenly_and_are_gone_when_they_should_be() -> None:
    worker = Scene().add("p0")
    worker.book_sending(attempt_of("a#1"), "fetch", SendingBook(1000, 10.0, 20.0))
    worker.book_sending(attempt_of("b#1"), "pull", SendingBook(500, 15.0, 20.0))  # its prompt is computed from 15 on
    assert [worker.sending_bytes(at_s) for at_s in (9.9, 10.0, 14.0, 15.0, 18.0, 20.0)] == [0, 1000, 600, 1000, 400, 0]
    assert worker.books().sending_bytes == 1500
    assert worker.release_sending(attempt_of("a#1"), "fetch")
    assert not worker.release_sending(attempt_of("a#1"), "fetch")
    assert worker.sending_bytes(18.0) == 200


def test_among_equal_halves_the_pair_with_the_shortest_hand_over_is_picked() -> None:
    scene = Scene()
    scene.add("p0", sending=400 * BLOCK_BYTES)
    scene.add("p1", sending=0)
    scene.add("d0")
    scene.add("d1", cached=10)
    assert scene.picked() == ("p1", "d1")
    placement = scene.place()
    assert placement is not None
    assert placement.handover_s == pytest.approx(0.002)  # 1 ms and a block of 1 ms, of the last pass: it hides nowhere


def test_what_the_last_pass_computes_cannot_have_moved_before_its_end() -> None:
    """Eleven blocks, 161 tokens: in passes of 64 the last one fills or begins three, in one pass all of them."""
    for most, cached, blocks in ((64, 0, 3), (512, 0, 11), (512, 6, 5), (64, 9, 2), (1, 0, 1)):
        scene = Scene()
        scene.add("p0", cached=cached, tokens_per_pass_max=most)
        scene.add("d0")
        placement = scene.place()
        assert placement is not None
        assert placement.handover_s == pytest.approx(0.001 * (1 + blocks))


def test_a_busy_sender_does_not_outweigh_an_earlier_first_token() -> None:
    scene = Scene()
    scene.add("p0", sending=400 * BLOCK_BYTES)
    scene.add("p1", queue_s=0.1)
    scene.add("d0")
    placement = scene.place()
    assert placement is not None
    assert placement.option.prefill.node_id == "p0"
    assert placement.handover_s == pytest.approx(0.001 + 0.411 - 0.171)  # eleven blocks behind 400


# ---- determinism ----


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_joining_changes_no_decision(name: str) -> None:
    decisions = []
    people = [("p0", 10), ("p1", 10), ("p2", 0), ("c0", 3), ("d0", 2), ("d1", 2)]
    for order in itertools.islice(itertools.permutations(people), 0, None, 60):
        scene = Scene()
        for worker, cached in order:
            scene.add(worker, cached=cached)
        config = configured(name)
        policy = placement_policy(config)
        decisions.append([place(scene.query(), scene.view, scene.index, policy, config, NOW_S) for _ in range(2)])
    assert all(decision == decisions[0] for decision in decisions)


# ---- what workers report ----


@pytest.mark.parametrize(
    "nonsense",
    [
        {"kv_tokens": -1},
        {"running_sequences": -3},
        {"kv_tokens": 2**63},
        {"running_sequences": float("nan")},
        {"queued_tokens": float("inf")},
        {"free_device_blocks": -1},
    ],
)
def test_a_report_that_cannot_be_is_refused_and_the_last_good_one_stands(nonsense: dict[str, object]) -> None:
    play = Play("p0 d0 d1")
    play.load("d0", running_sequences=3, kv_tokens=300)
    play.load("d0", **nonsense)
    assert play.counter("loads_refused") == 1
    d0 = next(node for node in play.machine.status().nodes if node.info.node_id == "d0")
    assert (d0.load.running_sequences, d0.load.kv_tokens) == (3, 300)
    assert "reserve r#1 41(41) from p0@e1" in "\n".join(play.request(spec("r", tokens=prompt(41)))).split("d1 <- ")[1]
    play.load("d0", running_sequences=0, kv_tokens=0)
    assert play.counter("loads_refused") == 1
