"""The simulator: figures that can be reckoned by hand, the same story every time, many steps at once or one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conductor.admission_config import AdmissionConfig
from conductor.config import ConductorConfig
from conductor.effects import Effect, End
from conductor.machine import ConductorMachine
from halfmoon.errors import ConfigError, Failed
from halfmoon.types import Outcome, RequestId
from simulator.config import SimConfig
from simulator.policies import make_conductor
from simulator.presets import load_hardware
from simulator.run import simulate
from simulator.simulation import Simulation
from tests.simulation.scenarios import HARDWARE, chats, config, fingerprint, run
from workload.trace import Trace, TraceRequest

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = (
    "crash=2,partition=1,storm=1,hang_up=2,tokens=2,stale=1,slow_tier=1,conductor=1,partition_s=3,storm_s=2,restart_s=2"
)
TIERED = {"prefill_blocks": 60, "prefill_dram_blocks": 100, "decode_dram_blocks": 100}


def outcomes(run_: object) -> Counter[Outcome]:
    return Counter(row.outcome for row in run_.requests)  # type: ignore[attr-defined]


# ---- by hand ----


def test_one_request_takes_what_the_formulas_say() -> None:
    request = TraceRequest(at_s=3.0, input_tokens=100, output_tokens=4, block_ids=tuple(range(7)))
    trace = Trace(source="one", block_tokens=16, requests=(request,))
    (row,) = simulate(trace, config(noise=0.0, prefill=1, decode=1, admission="none")).requests
    prefill_s = 0.002 + 100 * 2e-4 + 0.5 * 100**2 * 1e-7
    message_s, block_s, link_s = 5e-4, 16 * 1000 / 1e8, 2e-4
    assert row.arrived_s == pytest.approx(3.0)
    assert row.ttft_s == pytest.approx(message_s + prefill_s + message_s)
    # seven blocks, the partial one among them, follow each other over the link; the first token comes earlier
    pulled_s = message_s + 7 * block_s + link_s
    steps = [0.01 + 1e-4 + 1e-6 * kv_tokens for kv_tokens in (101, 102, 103)]
    assert row.tbt_max_s == row.tbt_worst_s == pytest.approx(pulled_s + steps[0])
    assert row.tbt_p50_s == pytest.approx(steps[2])
    assert row.ended_s == pytest.approx(3.0 + 2 * message_s + prefill_s + pulled_s + sum(steps))
    assert (row.output_tokens, row.attempts, row.outcome) == (4, 1, Outcome.FINISHED)
    assert row.prefill_s == pytest.approx(prefill_s)


def test_a_prefix_is_found_and_costs_what_is_left_of_it() -> None:
    first = TraceRequest(at_s=0.0, input_tokens=160, output_tokens=1, block_ids=tuple(range(10)))
    second = TraceRequest(at_s=5.0, input_tokens=200, output_tokens=1, block_ids=(*range(10), 90, 91, 92))
    trace = Trace(source="two", block_tokens=16, requests=(first, second))
    one, two = simulate(trace, config(noise=0.0, prefill=1, decode=1)).requests
    assert (one.hit_tokens_device, two.hit_tokens_device) == (0, 160)
    assert two.prefill_s == pytest.approx(0.002 + 40 * 2e-4 + 1e-7 * (40 * 160 + 0.5 * 40**2))


def test_two_copies_from_one_sender_wait_for_each_other() -> None:
    """Two prompts wait for a third one, end in one pass, and go to two decode workers over one outgoing link."""
    requests = [
        TraceRequest(at_s=at_s, input_tokens=64, output_tokens=2, block_ids=tuple(range(i, i + 4)))
        for at_s, i in ((0.0, 0), (0.001, 10), (0.001, 20))
    ]
    trace = Trace(source="pair", block_tokens=16, requests=tuple(requests))
    rows = simulate(trace, config(noise=0.0, prefill=1, decode=3, admission="none")).requests
    assert len({row.decode_node for row in rows}) == 3
    assert rows[1].ttft_s == pytest.approx(rows[2].ttft_s)
    one, two = (row.tbt_max_s or 0.0 for row in rows[1:])
    assert abs(two - one) == pytest.approx(4 * 16 * 1000 / 1e8)


def test_slow_links_make_a_queue_and_no_new_attempts() -> None:
    """A batch's line is longer than the links' timer, and all pulls together than a prompt's hold."""
    slow = run(1, 100, hardware={"link_bytes_per_s": 1.5e5, "batch_blocks": 64}, admission="none", prefill=4)
    assert slow.duration_s > 40.0
    assert outcomes(slow) == {Outcome.FINISHED: 100}
    assert max(row.attempts for row in slow.requests) == 1
    assert not [name for name in slow.counters if "Timeout" in name or "PeerLost" in name]


def test_nodes_that_die_behind_full_links_cost_attempts_and_no_request() -> None:
    """Whoever waits in line for a dead source's bytes is told at once, and begins again elsewhere."""
    slow = {"link_bytes_per_s": 1.5e5, "batch_blocks": 64}
    died = run(2, 100, "crash=4,restart_s=2", hardware=slow, admission="none", prefill=4)
    assert outcomes(died) == {Outcome.FINISHED: 100}
    assert died.counters["pulls_ended_PeerLost"] > 0
    assert max(row.attempts for row in died.requests) <= 1 + 4  # no more than crashes


@pytest.mark.parametrize(
    ("chunk", "hides", "constant_s"),
    [(256, False, 0.01), (256, True, 0.002), (26, False, 0.01), (26, True, 0.005)],  # 0.01 - 25 tokens * 2e-4
)
def test_a_running_sequence_waits_for_the_chunk_in_its_pass(chunk: int, hides: bool, constant_s: float) -> None:
    runs = TraceRequest(at_s=0.0, input_tokens=100, output_tokens=40, block_ids=tuple(range(7)))
    comes = TraceRequest(at_s=0.2, input_tokens=100, output_tokens=1, block_ids=tuple(range(50, 57)))
    trace = Trace(source="two", block_tokens=16, requests=(runs, comes))
    hardware = {"tokens_per_pass_max": chunk, "mixed_hides_weights": hides}
    row, _ = simulate(
        trace, config(hardware=hardware, noise=0.0, prefill=0, decode=0, coupled=1, admission="none")
    ).requests
    new = min(100, chunk - 1)  # beside one step
    chunk_s = new * 2e-4 + 1e-7 * (new * (100 - new) + 0.5 * new**2)  # the prompt's last one is the longest
    assert row.tbt_max_s == pytest.approx(constant_s + chunk_s + 1e-4 + 1e-6 * 120, abs=2e-5)


def test_nobody_is_told_how_long_an_output_will_be() -> None:
    asked = set()

    class Nosy(ConductorMachine):
        def on_request(self, spec: object, now_s: float) -> list[Effect]:
            asked.add((spec.sampling.max_tokens, spec.sampling.stop_token_ids))  # type: ignore[attr-defined]
            return super().on_request(spec, now_s)  # type: ignore[arg-type]

    def conductor(*args: object) -> ConductorMachine:
        machine = make_conductor(*args)  # type: ignore[arg-type]
        machine.__class__ = Nosy
        return machine

    done = simulate(chats(1, 30), config(), conductor=conductor)
    assert [limit for limit, _ in asked] == [2048]
    assert len({row.output_tokens for row in done.requests}) > 10


def test_a_request_may_say_how_long_its_output_will_be() -> None:
    asked = []

    def conductor(*args: object) -> ConductorMachine:
        machine = make_conductor(*args)  # type: ignore[arg-type]
        listen = machine.on_request
        machine.on_request = lambda spec, now_s: asked.append(spec.sampling.max_tokens) or listen(spec, now_s)  # type: ignore
        return machine

    done = simulate(chats(1, 30), config(outputs_told=True), conductor=conductor)
    assert asked == [row.output_tokens for row in done.requests]


def test_steps_may_vary_more_than_passes() -> None:
    calm, uneven = (
        simulate(chats(1, 30), config(noise=0.0, step_noise=spread, admission="none")).requests for spread in (0.0, 0.5)
    )
    assert calm[0].ttft_s == uneven[0].ttft_s
    assert [row.tbt_max_s for row in calm] != [row.tbt_max_s for row in uneven]


# ---- the same story ----


def test_the_hash_seed_changes_nothing() -> None:
    program = "from tests.simulation.scenarios import *; print(fingerprint(run(5, faults='crash=1,storm=1,tokens=1')))"
    prints = []
    for seed in ("0", "4242"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True, check=True
        )
        prints.append(done.stdout)
    assert prints[0] == prints[1] == fingerprint(run(5, faults="crash=1,storm=1,tokens=1")) + "\n"


def test_another_seed_is_another_story() -> None:
    trace = chats(1, 40)
    first, second = (simulate(trace, config(seed=seed)) for seed in (1, 2))
    assert first.digest != second.digest


@pytest.mark.parametrize(
    ("seed", "faults"),
    [
        (1, ""),
        (1, "crash=2"),
        (1, "hang_up=4,tokens=4"),
        (1, "partition=2"),
        (2, "storm=1"),  # here and in the next one decode steps follow a first token that comes late
        (22, "partition=8,partition_s=0.4,tokens=6,storm=10,storm_s=0.2,late=0.4,hang_up=3"),
        (1, EVERYTHING),
        (2, EVERYTHING),
    ],
)
def test_many_steps_at_once_are_as_good_as_one_by_one(seed: int, faults: str) -> None:
    hardware = TIERED if "slow_tier" in faults else {}
    many, single = (run(seed, 60, faults, hardware, macro=macro, check=macro) for macro in (True, False))
    assert many.counters["sim_events"] < single.counters["sim_events"]
    assert fingerprint(many) == fingerprint(single)


@pytest.mark.parametrize("dram", [0, 60])
def test_many_steps_at_once_where_room_is_short(dram: int) -> None:
    hardware = {"decode_blocks": 40, "decode_dram_blocks": dram}
    settings = {
        "hardware": hardware,
        "output_factor": 3.0,
        "every_s": 0.05,
        "output_tokens_max": 200,
        "admission": "none",
    }
    many, single = (run(3, 80, macro=macro, check=macro, **settings) for macro in (True, False))
    assert fingerprint(many) == fingerprint(single)
    assert outcomes(many)[Outcome.FINISHED] > 70
    assert sum(row.preemptions for row in many.requests) > 0 or dram == 0


def test_first_tokens_are_held_with_many_steps_at_once_as_with_single_ones() -> None:
    """Where room is short, with a limit on TBT that a hand-over breaks; held ones are later, and nothing else is."""
    settings: dict[str, Any] = {
        "hardware": {"decode_blocks": 60},
        "output_factor": 3.0,
        "every_s": 0.05,
        "output_tokens_max": 200,
        "slo_ttft_s": 30.0,
        "slo_tbt_s": 0.03,
    }
    many, single = (run(3, 80, macro=macro, check=macro, **settings) for macro in (True, False))
    assert fingerprint(many) == fingerprint(single)
    shown = run(3, 80, **settings, conductor=ConductorConfig(admission=AdmissionConfig(hold_first_share=0.0)))
    later = [(a.ttft_s or 0.0) - (b.ttft_s or 0.0) for a, b in zip(many.requests, shown.requests, strict=True)]
    assert min(later) == 0.0
    assert sum(s > 0.0 for s in later) > 5
    assert [row.ended_s for row in many.requests] == [row.ended_s for row in shown.requests]


@pytest.mark.parametrize("settings", [{"coupled": 3, "prefill": 0, "decode": 0}, {"coupled": 1}])
def test_coupled_workers_serve_too(settings: dict[str, int]) -> None:
    done = run(2, 60, **settings)
    assert outcomes(done) == {Outcome.FINISHED: 60}
    assert any(row.prefill_node.startswith("c") for row in done.requests)


def test_policies_in_the_shadow_change_nothing() -> None:
    settings = {"admission": "forecast", "slo_ttft_s": 3.0, "hardware": {"decode_blocks": 60}}
    with_them, without = (run(4, 120, shadows=shadows, **settings) for shadows in (True, False))
    assert outcomes(with_them)[Outcome.REJECTED] > 0
    assert (with_them.digest, with_them.requests) == (without.digest, without.requests)


# ---- faults ----


@pytest.mark.parametrize("faults", ["crash=3", "hang_up=6", "tokens=6", "storm=1", "stale=3"])
def test_faults_cost_time_and_nobody_an_answer(faults: str) -> None:
    kind = faults.split("=", maxsplit=1)[0]
    done = run(7, 60, faults)
    assert outcomes(done) == {Outcome.FINISHED: 60}
    assert done.counters[f"fault_{kind}"] > 0


def test_a_slow_tier_is_a_slower_cache_and_nothing_else() -> None:
    """Pools so small that blocks move to DRAM and back all the time; then each move takes a second and more."""
    small = {"hardware": {"prefill_blocks": 40, "prefill_dram_blocks": 80, "move_s_per_byte": 1e-7}}
    quick, slow = run(5, 120, **small), run(5, 120, "slow_tier=6,slow_s=60", **small)
    assert outcomes(quick) == outcomes(slow) == {Outcome.FINISHED: 120}
    assert slow.counters["fault_slow_tier"] == 6
    means = [sum(row.ttft_s or 0.0 for row in run_.requests) / 120 for run_ in (quick, slow)]
    assert means[1] > 1.2 * means[0]


def test_a_slower_tier_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="no node has a DRAM tier") as caught:
        config("slow_tier=2")
    assert caught.value.key == "faults.slow_tier"
    decode_alone = {"decode_dram_blocks": 100}
    assert config("slow_tier=2", decode_alone).faults.slow_tier == 2
    with pytest.raises(ConfigError):
        config("slow_tier=2", decode_alone, prefill=0, decode=0, coupled=2)


def test_the_preset_with_two_tiers_finds_prompts_in_both() -> None:
    """On a 32nd of its memory, so that 60 conversations of three turns are enough to fill the first tier."""
    whole = load_hardware("a800-llama-70b-dram")
    assert whole.prefill_dram_blocks > whole.prefill_blocks
    small = {"prefill_blocks": whole.prefill_blocks // 32, "decode_blocks": whole.decode_blocks // 32}
    turns = [(3.0 * (60 * turn + one), 1000 * one, 8 * (turn + 1)) for turn in range(3) for one in range(60)]
    requests = tuple(
        TraceRequest(
            at_s=at_s, input_tokens=512 * length, output_tokens=20, block_ids=tuple(range(first, first + length))
        )
        for at_s, first, length in turns
    )
    trace = Trace(source="turns", block_tokens=512, requests=requests)
    done = simulate(trace, SimConfig(hardware=replace(whole, **small), prefill=1, decode=1, check=True, jitter_s=0.0))
    assert outcomes(done) == {Outcome.FINISHED: 180}
    assert sum(row.hit_tokens_dram for row in done.requests) > 100_000


def test_evictions_decide_what_is_found_again() -> None:
    small = {"hardware": {"prefill_blocks": 30}, "prefill": 1}
    found = {
        name: sum(row.hit_tokens_device for row in run(5, 120, eviction=name, **small).requests)
        for name in ("lru", "lfu", "length_aware", "s3fifo", "leased")
    }
    assert len(set(found.values())) >= 3, found
    assert run(5, 60).digest == run(5, 60, eviction="lru").digest
    assert run(5, 60).settings["eviction"] == "lru"


def test_a_node_that_is_cut_off_for_long_is_given_up_and_nobody_loses_an_answer() -> None:
    done = run(4, faults="partition=1,partition_s=8", prefill=3, decode=3, every_s=0.2)
    assert outcomes(done) == {Outcome.FINISHED: 120}
    assert done.counters["nodes_lost"] == 1


def test_a_new_conductor_serves_those_who_come_after() -> None:
    done = run(3, faults="conductor=1")
    ends = outcomes(done)
    assert ends[Outcome.FAILED] > 0
    assert ends[Outcome.FINISHED] > 100


@pytest.mark.parametrize("again", ["halfmoon simulate --seed 9 --output-scale 2", ""])
def test_a_broken_promise_says_how_to_see_it_again(again: str) -> None:
    class Twice(ConductorMachine):
        def on_stream_finished(self, request_id: RequestId, now_s: float, **told: Any) -> list[Effect]:
            effects = super().on_stream_finished(request_id, now_s, **told)
            return [*effects, End(request_id=request_id, outcome=Outcome.FAILED, error=Failed("again"))]

    def conductor(*args: object) -> ConductorMachine:
        machine = make_conductor(*args)  # type: ignore[arg-type]
        machine.__class__ = Twice
        return machine

    with pytest.raises(Failed) as caught:
        simulate(chats(1, 10), config("crash=1", seed=9), again=again, conductor=conductor)
    said, how = str(caught.value).splitlines()
    assert "is ended a second time" in said
    if again:
        assert how == f"again: {again}"
    else:
        for setting in ("trace chats", "nodes 2P+2D", "seed 9", "jitter_s 0.0", "faults crash=1", "macro True"):
            assert setting in how.removeprefix("again: ").split(", ")


# ---- beliefs ----


def test_what_is_believed_is_not_what_is_true_until_it_was_measured() -> None:
    settings = {"belief_factors": {"prefill": 10.0, "decode": 1.0, "transfer": 1.0}, "every_s": 1.0, "noise": 0.0}
    taught, stubborn = (run(6, learn=learn, **settings) for learn in (True, False))
    errors = [
        [row.predicted_ttft_s / row.ttft_s for row in done.requests[60:] if row.predicted_ttft_s and row.ttft_s]
        for done in (taught, stubborn)
    ]
    assert 0.8 < sum(errors[0]) / len(errors[0]) < 1.2
    assert 8.0 < sum(errors[1]) / len(errors[1]) < 11.0
    assert taught.residuals.keys() >= {"prefill", "decode"}
    assert stubborn.residuals == {}


def test_a_link_that_only_carries_hand_overs_is_learned() -> None:
    factors = {"prefill": 1.0, "decode": 1.0, "transfer": 10.0}
    done = run(6, learn=True, belief_factors=factors, every_s=1.0, noise=0.0)
    bias, error = done.residuals["transfer"]  # pulls of parts that come pass by pass begin more than once
    assert abs(bias) < 0.2
    assert error < 0.25


# ---- growth ----


def test_what_a_request_costs_does_not_grow_with_their_number() -> None:
    small, large = (run(8, count, every_s=0.2, check=False) for count in (60, 240))
    per_request = [done.counters["sim_events"] / len(done.requests) for done in (small, large)]
    assert per_request[1] < 1.1 * per_request[0]


@pytest.mark.parametrize("check", [True, False])
def test_counters_have_heard_of_every_end_and_the_run_ends_with_the_last_answer(check: bool) -> None:
    done = run(1, 60, check=check)
    assert done.counters["requests_finished"] == 60
    assert done.duration_s == max(row.ended_s or 0.0 for row in done.requests)


def test_tokens_and_records_are_forgotten_with_their_request() -> None:
    settings = config(check=False, conductor=replace(SimConfig(hardware=HARDWARE).conductor, records_max=10))
    simulation = Simulation(chats(1, 60), settings, _generators, make_conductor)
    result = simulation.run()
    assert len(result.rows) == 60
    assert not any(planned.token_ids for planned in simulation._prompts.planned.values())
    known = [simulation.cluster.machine.explain(row.request_id) for row in result.rows]  # type: ignore[arg-type]
    assert sum(record is not None for record in known) == 10


def _generators(name: str) -> object:
    import random

    return random.Random(name)


def test_every_second_has_its_sample() -> None:
    done = run(1, check=False)
    first, last = done.requests[0].arrived_s, done.requests[-1].arrived_s
    assert [s.at_s - first for s in done.samples] == pytest.approx(list(range(int(last - first) + 1)))
    assert max(s.decode_sequences for s in done.samples) > 0
    assert max(s.decode_kv_tokens for s in done.samples) > 100


# ---- bad settings ----


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"prefill": 0}, "simulation.decode"),
        ({"speedup": 0.0}, "simulation.speedup"),
        ({"slo_ttft_s": -1.0}, "simulation.slo_ttft_s"),
        ({"noise": float("nan")}, "simulation.noise"),
        ({"belief_factors": {"luck": 2.0}}, "simulation.belief_factors"),
        ({"placement": "best"}, "simulation.placement"),
        ({"admission": "strict"}, "simulation.admission"),
        ({"eviction": "random"}, "simulation.eviction"),
        ({"faults": "slow_disk"}, "faults"),
        ({"faults": "slow_factor=0.5"}, "faults.slow_factor"),
        ({"faults": "crash=-1"}, "faults.crash"),
        ({"faults": "lost=often"}, "faults.lost"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        simulate(chats(1, 1), config(**settings))  # type: ignore[arg-type]
    assert caught.value.key == key
