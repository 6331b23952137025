"""Whole workloads on the real machines under a virtual clock: tokens equal the oracle's, everything is released."""

from __future__ import annotations

import random

import pytest

from core.messages import AttemptFailed, FailureKind, Refused
from decode_worker.machine import DecodeConfig
from halfmoon.types import Role, SamplingParams, Tier
from prefill_worker.machine import PrefillConfig
from tests.simulation.driver import Driver, Request
from tests.simulation.world import World


def workload(rng: random.Random, count: int, *, long: bool = False) -> list[Request]:
    """Chats that share prefixes, of 1 to about 50 tokens; unless `long`, some end by a stop token or at the first."""
    stems = [tuple(rng.randrange(256) for _ in range(24)) for _ in range(3)]
    requests = []
    for i in range(count):
        stem = rng.choice(stems)[: rng.randint(0, 24)]
        prompt = stem + tuple(rng.randrange(256) for _ in range(rng.randint(1, 24)))
        sampling = SamplingParams(
            temperature=rng.choice((0.0, 1.0)),
            seed=rng.randrange(100),
            max_tokens=rng.randint(40, 70) if long else rng.choice((1, 2, rng.randint(3, 30))),
            stop_token_ids=tuple(b"z.") if rng.random() < 0.3 and not long else (),
        )
        requests.append(Request(name=f"r{i}", prompt=prompt, sampling=sampling, priority=rng.randint(-1, 1)))
    return requests


def submit_all(driver: Driver, count: int, *, within_s: float, long: bool = False) -> list[Request]:
    rng = driver.world.rng
    return [driver.submit(r, rng.uniform(0.0, within_s)) for r in workload(rng, count, long=long)]


@pytest.mark.parametrize("seed", range(3))
def test_two_prefill_two_decode_and_a_coupled_worker_serve_everybody(seed: int) -> None:
    world = World(seed)
    for name, role in (("p1", Role.PREFILL), ("p2", Role.PREFILL), ("d1", Role.DECODE), ("d2", Role.DECODE)):
        world.add(name, role, device=120, dram=60)
    world.add("c1", Role.COUPLED, device=120, dram=60)
    driver = Driver(world)
    requests = submit_all(driver, 40, within_s=1.0)
    driver.run()
    assert [r.outcome for r in requests] == ["finished"] * 40
    assert [r.failures for r in requests if r.failures] == []
    assert sum(s.decode_prefilled_tokens for s in driver.stats) == 0
    assert sum(s.pulled_blocks for s in driver.stats) > 0


@pytest.mark.parametrize("seed", range(3))
def test_tiny_pools_preempt_and_the_tokens_stay_the_same(seed: int) -> None:
    world = World(seed)
    world.add("p1", Role.PREFILL, device=14, dram=6, prefill=PrefillConfig(tokens_per_pass_max=7))
    world.add("d1", Role.DECODE, device=34, dram=60, decode=DecodeConfig(reserve_wait_s=0.2))
    world.add("c1", Role.COUPLED, device=34, dram=60)
    driver = Driver(world)
    requests = submit_all(driver, 20, within_s=0.5, long=True)
    driver.run(limit_s=600.0)
    assert [r.outcome for r in requests] == ["finished"] * 20
    assert sum(s.preemptions for s in driver.stats) > 0
    failed = [f for r in requests for f in r.failures if isinstance(f, AttemptFailed)]
    assert {f.kind for f in failed} <= {FailureKind.NO_ROOM}
    assert not {f.attempt_id for f in failed} & driver.joined  # a pull may give way; what runs is parked


@pytest.mark.parametrize("seed", range(3))
def test_without_dram_the_least_urgent_fail_over_and_still_finish(seed: int) -> None:
    world = World(seed)
    world.add("p1", Role.PREFILL, device=40, dram=0)
    world.add("d1", Role.DECODE, device=40, dram=0)
    world.add("c1", Role.COUPLED, device=40, dram=0)
    driver = Driver(world)
    requests = submit_all(driver, 16, within_s=0.5, long=True)
    driver.run(limit_s=600.0)
    assert [r.outcome for r in requests] == ["finished"] * 16
    failures = [f for r in requests for f in r.failures]
    assert failures
    assert all(
        isinstance(f, Refused) or f.kind == "no_room" for f in failures if isinstance(f, Refused | AttemptFailed)
    )


@pytest.mark.parametrize("seed", range(3))
def test_cancelled_at_every_moment(seed: int) -> None:
    world = World(seed)
    for name, role in (("p1", Role.PREFILL), ("d1", Role.DECODE), ("c1", Role.COUPLED)):
        world.add(name, role, device=60, dram=20)
    driver = Driver(world)
    for request in submit_all(driver, 30, within_s=0.001):
        world.after(world.rng.uniform(0.0, 0.6), lambda r=request: driver.cancel(r))
    driver.run()
    outcomes = {r.outcome for r in driver.requests.values()}
    assert "cancelled" in outcomes
    for node in world.nodes.values():
        counts = node.cache.counts(Tier.DEVICE)
        assert [counts[s] for s in ("filling", "pinned", "quarantined", "evicting")] == [0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("victim", ["p1", "d1", "c1"])
def test_a_worker_dies_and_every_stream_goes_on_without_a_gap(seed: int, victim: str) -> None:
    world = World(seed)
    roles = {"p1": Role.PREFILL, "p2": Role.PREFILL, "d1": Role.DECODE, "d2": Role.DECODE, "c1": Role.COUPLED}
    for name, role in roles.items():
        world.add(name, role, device=120, dram=40)
    driver = Driver(world)
    requests = submit_all(driver, 24, within_s=0.4)
    world.after(0.3, lambda: driver.kill(world.nodes[victim]))
    world.after(1.5, lambda: world.add(victim, roles[victim], device=120, dram=40))
    driver.run()
    assert [r.outcome for r in requests] == ["finished"] * 24


def test_the_same_seed_tells_the_same_story() -> None:
    def story() -> list[str]:
        world = World(11)
        for name, role in (("p1", Role.PREFILL), ("d1", Role.DECODE), ("c1", Role.COUPLED)):
            world.add(name, role, device=30, dram=20)
        driver = Driver(world)
        submit_all(driver, 12, within_s=0.3)
        lines: list[str] = []
        listen = world.on_event
        world.on_event = lambda node, event: (
            lines.append(f"{world.now_s} {node.node_id} {event}"),
            listen(node, event),
        )[1]
        driver.run()
        return lines

    first = story()
    assert len(first) > 24
    assert story() == first
