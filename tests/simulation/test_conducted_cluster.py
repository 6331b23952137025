"""The conductor's machine over the workers' machines, with faults: one end each, no gap, nothing held, soon."""

from __future__ import annotations

import random
from functools import partial

import pytest

from halfmoon.types import RequestId, Role, SamplingParams
from tests.simulation.conducted import Conducted
from tests.simulation.world import World

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "c": Role.COUPLED}


def cluster(seed: int, names: str, **sizes: int) -> Conducted:
    """Nodes by the first letters of their names, long enough there to be trusted with everything."""
    world = World(seed)
    conducted = Conducted(world)
    for name in names.split():
        conducted.start(name, ROLES[name[0]], **sizes)
    world.run(lambda: world.now_s > 12.0)
    return conducted


def submit(conducted: Conducted, name: str) -> None:
    rng = conducted.world.rng
    prompt = tuple(rng.randrange(256) for _ in range(rng.randint(1, 40)))
    sampling = SamplingParams(
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(100),
        max_tokens=rng.choice((1, 2, rng.randint(3, 40))),
        stop_token_ids=tuple(b"z.") if rng.random() < 0.3 else (),
    )
    conducted.ask(name, prompt, sampling)


def flood(conducted: Conducted, count: int, within_s: float) -> random.Random:
    """`count` requests at random moments from now on."""
    world = conducted.world
    for i in range(count):
        world.after(world.rng.uniform(0.0, within_s), partial(submit, conducted, f"r{i}"))
    return world.rng


def finish(conducted: Conducted, count: int) -> tuple[list[str], float]:
    """How the requests ended, and how long the last one took after the last arrival."""
    world = conducted.world
    world.run(lambda: len(conducted.stories) == count)
    arrived_s = world.now_s
    conducted.run()
    clients = list(conducted.stories.values())
    return [client.ends[0] for client in clients], max(c.ended_s for c in clients) - arrived_s


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("names", ["p1 d1", "p1 p2 d1", "p1 d1 c1"])
def test_prompts_that_wait_for_decode_room_and_room_that_waits_for_prompts_do_not_block_each_other(
    names: str, seed: int
) -> None:
    conducted = cluster(seed, names, device=24, dram=0)
    flood(conducted, 30, within_s=0.3)
    ends, took_s = finish(conducted, 30)
    assert ends == ["finished"] * 30
    assert took_s < 8.0  # it was 26 s, with half of them failed, when both workers were always commanded at once


@pytest.mark.parametrize("seed", range(8))
def test_a_death_that_the_peers_see_first_costs_a_try_or_two(seed: int) -> None:
    conducted = cluster(seed, "p1 p2 d1 d2 c1", device=80, dram=30)
    rng = flood(conducted, 24, within_s=1.0)
    victim = conducted.world.nodes[rng.choice(list(conducted.world.nodes))]
    at_s = rng.uniform(0.1, 1.0)
    conducted.world.after(at_s, lambda: conducted.kill(victim))
    again = partial(conducted.start, victim.node_id, victim.role, device=80, dram=30)
    conducted.world.after(at_s + 1.0, again)
    ends, _ = finish(conducted, 24)
    assert ends == ["finished"] * 24


@pytest.mark.parametrize("seed", range(8))
def test_streams_that_break_leave_no_gap_and_hold_nothing(seed: int) -> None:
    conducted = cluster(seed, "p1 p2 d1 d2 c1", device=80, dram=30)
    rng = flood(conducted, 24, within_s=1.0)
    nodes = list(conducted.world.nodes.values())
    for fault in (conducted.break_link, conducted.break_tokens, conducted.break_link):
        conducted.world.after(rng.uniform(0.1, 1.2), partial(fault, rng.choice(nodes)))
    ends, took_s = finish(conducted, 24)
    assert ends == ["finished"] * 24
    assert took_s < 8.0


@pytest.mark.parametrize("seed", range(6))
def test_cancels_at_every_moment_between_faults(seed: int) -> None:
    conducted = cluster(seed, "p1 p2 d1 c1", device=40, dram=10)
    rng = flood(conducted, 24, within_s=0.1)
    world = conducted.world
    world.run(lambda: len(conducted.stories) == 24)
    for client in list(conducted.stories.values())[::2]:
        world.after(rng.uniform(0.0, 0.15), partial(conducted.drop, client))
    world.after(rng.uniform(0.0, 0.5), lambda: conducted.break_link(world.nodes[rng.choice(list(world.nodes))]))
    ends, _ = finish(conducted, 24)
    assert set(ends) == {"cancelled", "finished"}


@pytest.mark.parametrize("seed", range(6))
def test_a_new_conductor_ends_what_the_old_one_began(seed: int) -> None:
    conducted = cluster(seed, "p1 p2 d1 c1", device=40, dram=10)
    rng = flood(conducted, 20, within_s=0.3)
    conducted.world.after(0.3 + rng.uniform(0.0, 0.2), conducted.restart)
    ends, _ = finish(conducted, 20)
    assert "failed: the conductor was lost" in ends
    conducted.world.run(lambda: conducted.machine.status().nodes != () and conducted.world.at_rest)
    submit(conducted, "later")
    conducted.run()
    assert conducted.stories[RequestId("later")].ends == ["finished"]
